"""Proxy metrics of a model that need no masks, computed on image-caption pairs held out of training.

They compare training runs if there are no masks. There are four metrics, and higher is better for all of them:

    retrieval            mean reciprocal rank of the right caption for an image among all captions, and of the right image
                         for a caption, by cosine similarity
    nouns                mean average precision with which an image's best patches predict the noun phrases of its captions
    mutual_information   between the cluster assignments of two views of an image, in nats (IIC, Ji et al. 2019, equation 3)
    agreement            adjusted Rand index (Hubert & Arabie 1985) between the clusters of two views, mean over the images

docs/tuning.md lists their rank correlation with mIoU over training runs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vilseg.config import ViewsConfig
from vilseg.config.data import ColumnsConfig
from vilseg.data.image_decoding import crop_to_square, decode_image
from vilseg.data.shards import Pair, list_shards, read_shard
from vilseg.data.views import align, make_views
from vilseg.errors import DataError
from vilseg.losses import iic_loss
from vilseg.model import ImageEmbeddings, ViLSeg
from vilseg.text.noun_phrases import NounPhrases

MEASURES = ("retrieval", "nouns", "mutual_information", "agreement")
"""Names of all metrics, the keys of the dictionary that `measure` returns."""

_TOP_PATCHES = 8
"""Number of most similar patches whose mean similarity is an image's score for a phrase, as in the multi-label loss."""
_MIN_COUNT = 5
"""Minimum number of captions with a phrase; for rarer phrases the average precision is mostly chance."""
_BATCH = 64
_SEED = 20
"""Random seed of the first image's views, the same for every model; image i has this seed + i."""


@dataclass(frozen=True, eq=False)
class HeldOut:
    """Decoded image-caption pairs held out of training."""

    images_BHW3: np.ndarray
    """Square crops, uint8 RGB."""
    captions: tuple[str, ...]
    """First caption of each image."""
    phrases: tuple[str, ...]
    """Noun phrases that occur in at least `_MIN_COUNT` captions."""
    holds_BP: np.ndarray
    """True if a caption of image b contains phrase p. Shape: (B, P), bool."""

    @classmethod
    def load(
        cls, source: str, *, side: int, columns: ColumnsConfig | None = None, limit: int = 500, max_pixels: int = 10**8
    ) -> HeldOut:
        """Read the first ``limit`` readable pairs at ``source``.

        Args:
            source: URI of one or several shards of pairs.
            side: side of the square crops in pixels; smaller images are skipped.
            columns: names of the columns of Parquet shards; None takes the default names.
            limit: maximum number of pairs.
            max_pixels: maximum number of pixels of an image; larger images are skipped.

        Raises:
            DataError: there are no shards, or fewer than two readable pairs.
            StorageError: the URI cannot be read.
        """
        images, captions = [], []
        for pair in _pairs(source, columns or ColumnsConfig()):
            try:
                images.append(crop_to_square(decode_image(pair.image, max_pixels=max_pixels, min_side=side), side))
            except DataError:
                continue  # skipped without a report, because ingestion and training report unreadable pairs
            captions.append(pair.captions)
            if len(images) == limit:
                break
        if len(images) < 2:
            raise DataError(f"of the held-out pairs at {source} {len(images)} can be read; at least 2 are needed")
        every = [caption for group in captions for caption in group]
        nouns = NounPhrases.from_captions(every, max_phrases=2000, min_count=_MIN_COUNT)
        holds_BP = np.zeros((len(images), len(nouns.phrases)), bool)
        for row, group in enumerate(captions):
            holds_BP[row, nouns.find(group)] = True
        return cls(np.stack(images), tuple(group[0] for group in captions), nouns.phrases, holds_BP)


def _pairs(source: str, columns: ColumnsConfig) -> Iterator[Pair]:
    for shard in list_shards(source):
        for pair in read_shard(shard.uri, columns):
            if isinstance(pair, Pair):
                yield pair


@torch.inference_mode()
def measure(model: ViLSeg, pairs: HeldOut) -> dict[str, float]:
    """Compute the proxy metrics of a model on its device.

    Returns:
        Metric by name. A metric that is undefined for these pairs is left out, such as `nouns` if there are no phrases.
    """
    training = model.training
    model.eval()
    try:
        images_BHW3 = torch.from_numpy(pairs.images_BHW3)
        seeds_B = torch.arange(len(images_BHW3)) + _SEED
        pooled, scores, maps = [], [], []
        phrases_PD = model.encode_text(list(pairs.phrases)).float() if pairs.phrases else None
        for part, seeds in zip(images_BHW3.split(_BATCH), seeds_B.split(_BATCH), strict=True):
            embeddings = _float32(model.encode_image(part.to(model.device).permute(0, 3, 1, 2).float() / 255))
            pooled.append(embeddings.pooled)
            if phrases_PD is not None:
                scores.append(_best_patches(embeddings.patches, phrases_PD))
            maps.append(_two_views(model, part.to(model.device), seeds.to(model.device)))
        texts_BD = torch.cat(
            [model.encode_text(list(pairs.captions[i : i + 256])) for i in range(0, len(seeds_B), 256)]
        )
        figures = {"retrieval": retrieval(torch.cat(pooled) @ texts_BD.float().T, pairs.captions)}
        if scores:
            figures["nouns"] = mean_average_precision(torch.cat(scores).cpu().numpy(), pairs.holds_BP)
        first, second, valid = (torch.cat(parts) for parts in zip(*maps, strict=True))
        figures["mutual_information"] = -float(iic_loss(first, second, valid, radius=0))
        figures["agreement"] = agreement(first.max(1).indices, second.max(1).indices, valid)
        return {name: value for name, value in figures.items() if np.isfinite(value)}
    finally:
        model.train(training)


def _float32(embeddings: ImageEmbeddings) -> ImageEmbeddings:
    return embeddings._replace(pooled=embeddings.pooled.float(), patches=embeddings.patches.float())


def _best_patches(patches_BND: Tensor, phrases_PD: Tensor) -> Tensor:
    """Compute the score of each phrase in each image from its `_TOP_PATCHES` best patches. Shape: -> (B, P)."""
    similarity_BNP = patches_BND @ phrases_PD.T
    return similarity_BNP.topk(min(_TOP_PATCHES, similarity_BNP.shape[1]), dim=1).values.mean(1)


def _two_views(model: ViLSeg, images_BHW3: Tensor, seeds_B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Compute cluster assignments in two views, the second resampled to the patches of the first, and the overlap mask.

    Shape: -> (B, K, h, w), (B, K, h, w), (B, h, w).
    """
    side = images_BHW3.shape[1]
    views = make_views(
        images_BHW3, seeds_B, ViewsConfig(global_size=side, global_scale=(0.4, 1.0)), global_crops=2, local_crops=0
    )
    first, second = (model.assignments(view).float() for view in views.global_GB3HW)
    second, valid = align(second, views.geometry_GB23[1], views.geometry_GB23[0], (first.shape[2], first.shape[3]))
    return first, second, valid


def retrieval(similarity_BB: Tensor, captions: tuple[str, ...]) -> float:
    """Compute the mean reciprocal rank of the right caption of each image and of the right image of each caption, in 0..1.

    Args:
        similarity_BB: similarity of each image (row) and each caption (column). Shape: (B, B).
        captions: caption of each image; images with equal captions count as right for each other.
    """
    numbers = {caption: number for number, caption in enumerate(dict.fromkeys(captions))}
    owner = torch.tensor([numbers[caption] for caption in captions], device=similarity_BB.device)
    right = owner.unsqueeze(0) == owner.unsqueeze(1)
    ranks = []
    for similarity in (similarity_BB, similarity_BB.T):
        best = similarity.masked_fill(~right, -torch.inf).amax(1, keepdim=True)
        wrong = similarity.masked_fill(right, -torch.inf)
        # Ties count half, so that a model with constant output does not score well.
        ranks.append(1 + (wrong > best).sum(1) + (wrong == best).sum(1) / 2)
    return float((1 / torch.cat(ranks)).mean())


def mean_average_precision(scores_BP: np.ndarray, holds_BP: np.ndarray) -> float:
    """Compute the average precision of each phrase's ranking of the images, and its mean over phrases, in 0..1.

    Phrases that all images or no image contain are left out; the result is nan if none remains.

    Args:
        scores_BP: score of each phrase in each image.
        holds_BP: True if the image contains the phrase.
    """
    told = holds_BP.any(0) & ~holds_BP.all(0)
    precisions = []
    for scores_B, holds_B in zip(scores_BP.T[told], holds_BP.T[told], strict=True):
        # Among equal scores, images without the phrase rank first.
        order = np.lexsort((holds_B, -scores_B))
        hits = holds_B[order]
        precisions.append((np.cumsum(hits) / np.arange(1, len(hits) + 1))[hits].mean())
    return float(np.mean(precisions)) if precisions else float("nan")


def agreement(first_Bhw: Tensor, second_Bhw: Tensor, valid_Bhw: Tensor) -> float:
    """Compute the adjusted Rand index between two clusterings of each image's valid patches, and its mean over images.

    0 is chance, 1 is identity; nan if no image has two valid patches.

    Args:
        first_Bhw: cluster index of each patch.
        second_Bhw: cluster index of each patch in the other clustering.
        valid_Bhw: mask of the patches to compare, bool.
    """
    count = int(max(first_Bhw.max(), second_Bhw.max())) + 1
    indices = []
    for first, second, valid in zip(first_Bhw, second_Bhw, valid_Bhw, strict=True):
        pairs = F.one_hot(first[valid], count).double().T @ F.one_hot(second[valid], count).double()
        total = _choose_two(pairs.sum())
        together, rows, columns = (float(_choose_two(part).sum()) for part in (pairs, pairs.sum(1), pairs.sum(0)))
        if not total:
            continue
        expected, largest = rows * columns / float(total), (rows + columns) / 2
        # The index is 0 / 0 if both clusterings have a single cluster, as from a collapsed head; count it as chance.
        indices.append(0.0 if largest == expected else (together - expected) / (largest - expected))
    return float(np.mean(indices)) if indices else float("nan")


def _choose_two(counts: Tensor) -> Tensor:
    return counts * (counts - 1) / 2
