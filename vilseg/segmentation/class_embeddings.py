"""A vocabulary as a model's patches meet it: names, synonyms, negative and background words, embedded once and kept."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor

from vilseg.config import SegmentationConfig
from vilseg.model import ViLSeg
from vilseg.segmentation.class_scores import ClassEmbeddings, standardized_embeddings
from vilseg.text.vocabulary import Vocabulary

_KEPT_NAMES = 1 << 16
"""Names of all vocabularies whose embeddings a model keeps, those used last; 128 MB where embeddings have 512 values."""
_BATCH = 256

_COCO_MARKS = ("-merged", "-other", "-stuff")
"""What COCO's panoptic class names say of how the classes were made, not of what they show."""

_kept: WeakKeyDictionary[ViLSeg, OrderedDict[Hashable, ClassEmbeddings]] = WeakKeyDictionary()


class _Name(NamedTuple):
    """A name as it is embedded."""

    text: str
    prompts: tuple[str, ...]


def embed_classes(model: ViLSeg, vocabulary: Vocabulary, config: SegmentationConfig) -> ClassEmbeddings:
    """The embeddings of a vocabulary, on the model's device; computed once, as long as the weights stay as they are.

    Args:
        model: in evaluation mode.
        vocabulary: what to embed.
        config: prompts, background_words, center_text and calibration.
    """
    settings = (tuple(config.prompts), tuple(config.background_words), config.center_text, config.calibration)
    key = (vocabulary, settings, _weights(model))
    kept = _kept.setdefault(model, OrderedDict())
    texts = kept.pop(key, None)
    if texts is None:
        texts = _embed(model, vocabulary, config)
    kept[key] = texts
    while len(kept) > 1 and sum(len(each.offset_T) for each in list(kept.values())) > _KEPT_NAMES:
        kept.popitem(last=False)
    return texts


def normalize_class_name(name: str) -> str:
    """A class name as a caption would have it: ``wall-other-merged`` (COCO) is wall, ``tv_monitor`` tv monitor."""
    for mark in _COCO_MARKS:
        name = name.replace(mark, "")
    return name.replace("-", " ").replace("_", " ").strip() or name


def _weights(model: ViLSeg) -> Hashable:
    """What changes where a weight that the embeddings depend on does: by a step of the optimiser, loading, or moving."""
    parts = (model.text_encoder, model.text_projection)
    tensors = [tensor for part in parts for tensors in (part.parameters(), part.buffers()) for tensor in tensors]
    tensors += [model.caption_mean, model.patch_mean, model.patch_covariance]
    # Tensors made in inference mode count no versions; they cannot be changed outside it either.
    return tuple((tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version) for tensor in tensors)


@torch.inference_mode()
def _embed(model: ViLSeg, vocabulary: Vocabulary, config: SegmentationConfig) -> ClassEmbeddings:
    count = len(vocabulary.classes)
    usual = vocabulary.prompts or tuple(config.prompts)
    own = vocabulary.class_prompts or ((),) * count
    classes = [_Name(normalize_class_name(name), own[index] or usual) for index, name in enumerate(vocabulary.classes)]
    owners = [index for index in range(count) for _ in vocabulary.names(index)[1:]]
    synonyms = [
        _Name(normalize_class_name(name), own[index] or usual)
        for index in range(count)
        for name in vocabulary.names(index)[1:]
    ]
    negatives = [_Name(normalize_class_name(word), usual) for word in vocabulary.negatives]
    words: list[_Name] = []
    if vocabulary.background is not None:
        asked_for = {name.text.casefold() for name in [*classes, *synonyms]}
        candidates = [normalize_class_name(word) for word in vocabulary.background_words or config.background_words]
        words = [_Name(word, usual) for word in candidates if word.casefold() not in asked_for]
    mean_TD = _mean_over_prompts(model, [*classes, *synonyms, *negatives, *words])
    if config.center_text:
        mean_TD = mean_TD - model.caption_mean
    return standardized_embeddings(
        F.normalize(mean_TD, dim=-1),
        model.patch_mean,
        model.patch_covariance,
        config.calibration,
        classes=count,
        synonym_of_S=torch.tensor(owners, dtype=torch.long, device=mean_TD.device),
        negatives=len(negatives),
        background=vocabulary.background,
    )


def _mean_over_prompts(model: ViLSeg, names: list[_Name]) -> Tensor:
    """Shape: names (T) -> (T, D)."""
    texts = [prompt.format(name.text) for name in names for prompt in name.prompts]
    embedded = torch.cat([model.encode_text(texts[i : i + _BATCH]) for i in range(0, len(texts), _BATCH)])
    return torch.stack([part.mean(0) for part in embedded.split([len(name.prompts) for name in names])])
