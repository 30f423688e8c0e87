"""Text embeddings of a vocabulary's names, cached for each model.

Class scores are standardized with the mean and the deviation of the cosine between a text and the patches of the training images
(``calibration`` of the settings); see :mod:`vilseg.segmentation.class_scores` for the formula.
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
"""Lower bound of a standard deviation, to avoid a division by zero if a cosine never varies; usual values are above 1e-3."""

_CACHED_ENTRIES = 1 << 16
"""Maximum number of entries (names and words) of all vocabularies cached for a model: 128 MB for embeddings of 512 values. The
least recently used vocabularies are dropped first."""

_TEXTS_PER_PASS = 256
"""Maximum number of texts in one pass of the text encoder."""

_COCO_SUFFIXES = ("-merged", "-other", "-stuff")
"""Suffixes in COCO's panoptic class names that tell how a class was defined, not what it shows."""


@dataclass(frozen=True, eq=False)
class ClassEmbeddings:
    """Text embeddings of a vocabulary, and the constants that standardize their cosines with patches.

    Example:
        >>> import torch
        >>> embeddings = ClassEmbeddings.standardized(torch.eye(2), torch.zeros(2), torch.diag(torch.tensor([1.0, 9.0])), 1.0)
        >>> embeddings.num_classes, embeddings.gain_E.mul(3).round().tolist()  # the second cosine varies three times as much
        (2, [6.0, 2.0])
    """

    embeddings_ED: Float[Tensor, "E D"]
    """Unit-length embeddings, in the order classes (rows 0..C-1), synonyms, negative words, background words. Shape: (E, D)."""
    num_classes: int
    """Number of classes C."""
    synonym_of_S: Int[Tensor, " S"]
    """Index of the class of each synonym; the embeddings of the synonyms are rows C..C+S-1. Shape: (S,)."""
    num_negatives: int
    """Number of negative words."""
    background: int | None
    """Index of the class ``background``, whose score is that of the best background word; None if there is no such class."""
    offset_E: Float[Tensor, " E"]
    """Value subtracted from the cosine with each text: q mu_c. Shape: (E,)."""
    gain_E: Float[Tensor, " E"]
    """Factor that multiplies the difference: (mean(sigma) / sigma_c)^q. Shape: (E,)."""

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
        """Compute offset and gain from the statistics of patch embeddings; see `vilseg.segmentation.class_scores`.

        Args:
            embeddings_ED: unit-length embeddings of classes, synonyms, negative words and background words. Shape: (E, D).
            mean_D: mean of unit-length patch embeddings. Shape: (D,).
            covariance_DD: covariance of these patch embeddings. Shape: (D, D).
            strength: q in 0..1; 0 leaves the cosines unchanged.
            num_classes: number of entries that are classes; None counts all entries.
            background: index of the class ``background``; None if there is no such class.
            synonym_of_S: index of the class of each synonym; None if there are no synonyms. Shape: (S,).
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
        """Return a copy with all tensors on ``device``."""
        return replace(
            self,
            embeddings_ED=self.embeddings_ED.to(device),
            synonym_of_S=self.synonym_of_S.to(device),
            offset_E=self.offset_E.to(device),
            gain_E=self.gain_E.to(device),
        )


def score_deviations(embeddings_ED: Float[Tensor, "E D"], covariance_DD: Float[Tensor, "D D"]) -> Float[Tensor, " E"]:
    """Compute sigma_c, the standard deviation over patches of the cosine with each text; at least 1e-6.

    Shape: (E, D), (D, D) -> (E,).
    """
    return ((embeddings_ED @ covariance_DD) * embeddings_ED).sum(1).clamp(min=0).sqrt().clamp(min=_EPS)


_cache: WeakKeyDictionary[ViLSeg, OrderedDict[Hashable, ClassEmbeddings]] = WeakKeyDictionary()


class _Entry(NamedTuple):
    """A name or word, and the prompt templates that it is embedded with."""

    text: str
    prompts: tuple[str, ...]


def embed_classes(model: ViLSeg, vocabulary: Vocabulary, config: SegmentationConfig) -> ClassEmbeddings:
    """Compute the embeddings of a vocabulary on the model's device, or return them from a cache.

    Cached embeddings are used only while the model's weights are unchanged.

    Args:
        model: model in evaluation mode.
        vocabulary: classes, synonyms, negative words and background words.
        config: settings prompts, background_words, center_text and calibration.
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
    """Return a class name as a caption would write it: ``wall-other-merged`` (COCO) becomes wall, ``tv_monitor`` tv monitor.

    Example:
        >>> normalize_class_name("tv_monitor"), normalize_class_name("wall-other-merged")
        ('tv monitor', 'wall')
    """
    for suffix in _COCO_SUFFIXES:
        name = name.replace(suffix, "")
    return name.replace("-", " ").replace("_", " ").strip() or name


def _weights_version(model: ViLSeg) -> Hashable:
    """Return a key that changes if a weight that the embeddings depend on is changed in place, loaded or moved."""
    parts = (model.text_encoder, model.text_projection)
    tensors = [tensor for part in parts for tensors in (part.parameters(), part.buffers()) for tensor in tensors]
    tensors += [model.caption_mean, model.patch_mean, model.patch_covariance]
    # Tensors created in inference mode have no version counter; they cannot be changed outside that mode either.
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
    """Compute the mean embedding of every entry over its prompts. Shape: -> (E, D).

    Besides the result, only one pass of the text encoder and the prompts of one entry are in memory.
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
