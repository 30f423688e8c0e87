"""Embed the names of a vocabulary once, in the space of a model's patches, and keep the embeddings.

A class score is standardized with the statistics that its text has over the patches of the training images (``calibration`` of
the settings), see :mod:`vilseg.segmentation.class_scores` for the formula.
"""

from collections import OrderedDict
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from vilseg.config import SegmentationConfig
from vilseg.model import ViLSeg
from vilseg.text.vocabulary import Vocabulary

_EPS = 1e-6
"""Lower bound of a standard deviation: a class whose cosine never varies would divide by zero; one that matters is above 1e-3."""

_CACHED_ENTRIES = 1 << 16
"""Entries of all vocabularies that are cached for a model, the least recently used dropped first; 128 MB for embeddings of 512
values."""

_TEXTS_PER_PASS = 256
"""Texts in one pass of the text encoder."""

_COCO_SUFFIXES = ("-merged", "-other", "-stuff")
"""Parts of COCO's panoptic class names that say how the classes were made, not what they show."""


@dataclass(frozen=True, eq=False)
class ClassEmbeddings:
    """Embeddings that patches are compared with, and the constants that standardize their cosines.

    Example:
        >>> import torch
        >>> embeddings = ClassEmbeddings.standardized(torch.eye(2), torch.zeros(2), torch.diag(torch.tensor([1.0, 9.0])), 1.0)
        >>> embeddings.num_classes, embeddings.gain_E.mul(3).round().tolist()  # the second cosine varies three times as much
        (2, [6.0, 2.0])
    """

    embeddings_ED: Float[Tensor, "E D"]
    """Unit length; rows 0..C-1 are the classes. Shape: (E, D)."""
    num_classes: int
    """C."""
    synonym_of_S: Int[Tensor, " S"]
    """Index of the class that each synonym, rows C..C+S-1, stands for. Shape: (S,)."""
    num_negatives: int
    """Number of negative words."""
    background: int | None
    """Index of the class ``background``, which takes the scores of the background words; None without such a class."""
    offset_E: Float[Tensor, " E"]
    """q mu, subtracted from the cosines. Shape: (E,)."""
    gain_E: Float[Tensor, " E"]
    """Factor of the difference. Shape: (E,)."""

    @classmethod
    def standardized(
        cls,
        embeddings_ED: Float[Tensor, "E D"],
        mean_D: Float[Tensor, " D"],
        covariance_DD: Float[Tensor, "D D"],
        strength: float,
        *,
        num_classes: int | None = None,
        background: int | None = None,
        synonym_of_S: Int[Tensor, " S"] | None = None,
        num_negatives: int = 0,
    ) -> "ClassEmbeddings":
        """Derive offset and gain from the statistics of patch embeddings; see `vilseg.segmentation.class_scores`.

        Args:
            embeddings_ED: classes, synonyms, negative words, background words, unit length. Shape: (E, D).
            mean_D: mean of unit-length patch embeddings. Shape: (D,).
            covariance_DD: their covariance. Shape: (D, D).
            strength: q in 0..1; 0 leaves the cosines as they are.
            num_classes: number of entries that are classes; all where None.
            background: index of the class ``background``, or None.
            synonym_of_S: index of the class of each synonym, where there are any. Shape: (S,).
            num_negatives: number of entries that are negative words.
        """
        deviation_E = score_deviations(embeddings_ED, covariance_DD)
        gain_E = (deviation_E.mean() / deviation_E) ** strength
        if synonym_of_S is None:
            synonym_of_S = torch.empty(0, dtype=torch.long, device=embeddings_ED.device)
        offset_E = strength * (embeddings_ED @ mean_D)
        count = len(embeddings_ED) if num_classes is None else num_classes
        return cls(embeddings_ED, count, synonym_of_S, num_negatives, background, offset_E, gain_E)

    def to(self, device: torch.device) -> "ClassEmbeddings":
        """Return the same on another device."""
        return replace(
            self,
            embeddings_ED=self.embeddings_ED.to(device),
            synonym_of_S=self.synonym_of_S.to(device),
            offset_E=self.offset_E.to(device),
            gain_E=self.gain_E.to(device),
        )


def score_deviations(embeddings_ED: Float[Tensor, "E D"], covariance_DD: Float[Tensor, "D D"]) -> Float[Tensor, " E"]:
    """Compute the standard deviation that the cosine with each text has over the patches (sigma_c), at least 1e-6.

    Shape: (E, D), (D, D) -> (E,).
    """
    return ((embeddings_ED @ covariance_DD) * embeddings_ED).sum(1).clamp(min=0).sqrt().clamp(min=_EPS)


_cache: WeakKeyDictionary[ViLSeg, OrderedDict[Hashable, ClassEmbeddings]] = WeakKeyDictionary()


class _Entry(NamedTuple):
    """A name and the prompt templates that it is embedded with."""

    text: str
    prompts: tuple[str, ...]


def embed_classes(model: ViLSeg, vocabulary: Vocabulary, config: SegmentationConfig) -> ClassEmbeddings:
    """Embed a vocabulary on the model's device; cached for as long as the weights stay as they are.

    Args:
        model: in evaluation mode.
        vocabulary: classes, synonyms, negative and background words.
        config: prompts, background_words, center_text and calibration.
    """
    settings = (tuple(config.prompts), tuple(config.background_words), config.center_text, config.calibration)
    key = (vocabulary, settings, _weights_version(model))
    cached = _cache.setdefault(model, OrderedDict())
    embeddings = cached.pop(key, None)
    if embeddings is None:
        embeddings = _embed(model, vocabulary, config)
    cached[key] = embeddings
    while len(cached) > 1 and sum(len(each.offset_E) for each in list(cached.values())) > _CACHED_ENTRIES:
        cached.popitem(last=False)
    return embeddings


def normalize_class_name(name: str) -> str:
    """Return a class name as a caption has it: ``wall-other-merged`` (COCO) is wall, ``tv_monitor`` is tv monitor.

    Example:
        >>> normalize_class_name("tv_monitor"), normalize_class_name("wall-other-merged")
        ('tv monitor', 'wall')
    """
    for suffix in _COCO_SUFFIXES:
        name = name.replace(suffix, "")
    return name.replace("-", " ").replace("_", " ").strip() or name


def _weights_version(model: ViLSeg) -> Hashable:
    """Key that changes with any weight the embeddings depend on: by an optimizer step, by loading, or by moving."""
    parts = (model.text_encoder, model.text_projection)
    tensors = [tensor for part in parts for tensors in (part.parameters(), part.buffers()) for tensor in tensors]
    tensors += [model.caption_mean, model.patch_mean, model.patch_covariance]
    # Tensors made in inference mode count no versions; they cannot be changed outside it either.
    return tuple((tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version) for tensor in tensors)


@torch.inference_mode()
def _embed(model: ViLSeg, vocabulary: Vocabulary, config: SegmentationConfig) -> ClassEmbeddings:
    count = len(vocabulary.classes)
    default = vocabulary.prompts or tuple(config.prompts)
    own = vocabulary.class_prompts or ((),) * count

    def entry(name: str, index: int | None = None) -> _Entry:
        return _Entry(normalize_class_name(name), default if index is None else own[index] or default)

    classes = [entry(name, index) for index, name in enumerate(vocabulary.classes)]
    owners = [index for index in range(count) for _ in vocabulary.names(index)[1:]]
    synonyms = [entry(name, index) for index in range(count) for name in vocabulary.names(index)[1:]]
    negatives = [entry(word) for word in vocabulary.negatives]
    background_words: list[_Entry] = []
    if vocabulary.background is not None:
        named = {one.text.casefold() for one in [*classes, *synonyms]}
        candidates = [entry(word) for word in vocabulary.background_words or config.background_words]
        background_words = [word for word in candidates if word.text.casefold() not in named]
    mean_ED = _mean_over_prompts(model, [*classes, *synonyms, *negatives, *background_words])
    if config.center_text:
        mean_ED = mean_ED - model.caption_mean
    return ClassEmbeddings.standardized(
        F.normalize(mean_ED, dim=-1),
        model.patch_mean,
        model.patch_covariance,
        config.calibration,
        num_classes=count,
        synonym_of_S=torch.tensor(owners, dtype=torch.long, device=mean_ED.device),
        num_negatives=len(negatives),
        background=vocabulary.background,
    )


def _mean_over_prompts(model: ViLSeg, entries: Sequence[_Entry]) -> Tensor:
    """Embed every entry in all of its prompts and average. Shape: -> (E, D).

    At most a pass and the prompts of one entry are held beside the result, however many entries there are.
    """
    passes = _encode_passes(model, [prompt.format(entry.text) for entry in entries for prompt in entry.prompts])
    means: list[Tensor] = []
    encoded = next(passes)
    for entry in entries:
        while len(encoded) < len(entry.prompts):
            encoded = torch.cat([encoded, next(passes)])
        means.append(encoded[: len(entry.prompts)].mean(0))
        encoded = encoded[len(entry.prompts) :]
    return torch.stack(means)


def _encode_passes(model: ViLSeg, texts: Sequence[str]) -> Iterator[Tensor]:
    for start in range(0, len(texts), _TEXTS_PER_PASS):
        yield model.encode_text(texts[start : start + _TEXTS_PER_PASS])
