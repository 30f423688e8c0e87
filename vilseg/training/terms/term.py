"""Base class of the terms of the objective, and the encoded images that a term gets."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property
from typing import Any, Generic, NamedTuple, TypeVar, cast

import torch
from torch import Tensor, nn

from vilseg.model import ViLSeg
from vilseg.training.batch import TensorBatch
from vilseg.training.encoded_texts import OwnTexts, SharedTexts, find_positives
from vilseg.training.encoded_views import EncodedViews
from vilseg.training.precision import autocast

R = TypeVar("R", bound=tuple[Any, ...])


class Needs(NamedTuple):
    """Views and texts that a term requires. The objective encodes once whatever any of its terms requires."""

    global_views: int = 1
    """Number of global views per image."""
    local_views: int = 0
    """Number of local views per image."""
    second_view_gradient: bool = False
    """True if the gradient must flow into the encoder from the global views after the first, too."""
    all_captions: bool = False
    """True if every image is compared with the captions of all workers."""
    phrases: bool = False
    """True if every image is compared with the noun phrases of the captions of all workers."""


class EncodedImages:
    """Encoded images of a worker's batch, or of one chunk of it.

    Args:
        model: the student.
        batch: the images, their texts and seeds.
        views: encoded views of the images.
        texts: texts of all workers that every image is compared with.
        pairs: number of pairs in the worker's whole batch; more than in ``batch`` if that is a chunk.
        precision: autocast dtype of the networks.
    """

    def __init__(
        self,
        model: ViLSeg,
        batch: TensorBatch,
        views: EncodedViews,
        texts: SharedTexts,
        *,
        pairs: int,
        precision: torch.dtype,
    ) -> None:
        self.batch, self.views, self.texts, self.pairs = batch, views, texts, pairs
        self._model, self._precision = model, precision

    @cached_property
    def patch_embeddings(self) -> Tensor:
        """Patch embeddings of the first view, unit length; computed on first access, then cached. Shape: (B, N, D)."""
        return self._model.embed_patches(self.views.view(0))

    @property
    def positives(self) -> Tensor:
        """Boolean mask, True if one of the image's captions contains the phrase. Shape: (B, P)."""
        return find_positives(self.batch, self.texts.phrase_ids_P)

    def autocast(self) -> torch.autocast:
        """Return the context manager in which networks run."""
        return autocast(self._model.device, self._precision)


class Term(ABC, Generic[R]):
    """One term of the objective, computed in two steps: representations of images, then losses from these.

    The steps are separate because a contrastive loss needs all images of a batch at once, but only their representations.
    GradCache (``vilseg.training.grad_cache``) calls :meth:`represent` for every chunk of a large batch, joins the results by
    :meth:`combine`, and calls :meth:`losses` once for the whole batch.

    A term is a plain object, not a module. The objective registers the modules and parameters that :meth:`modules` and
    :meth:`parameters` return, under the names that they have in checkpoints.

    Type parameter: R, a NamedTuple of tensors; a field may be None.
    """

    weight: float = 1.0
    """Factor of the term's losses in the sum."""
    needs = Needs()
    """Views and texts that the term requires."""

    @abstractmethod
    def represent(self, images: EncodedImages) -> R:
        """Return the representations of some images that the losses are computed from.

        GradCache calls it twice per chunk, first without and then with gradient, so it must not change any state.
        """

    def combine(self, parts: Sequence[R]) -> R:
        """Join the representations of the chunks of a batch by concatenation along the first dimension, the images."""
        return _combine_fields(parts, torch.cat)

    @abstractmethod
    def losses(self, representations: R, texts: OwnTexts) -> dict[str, Tensor]:
        """Return the unweighted losses by name, scalars whose means over the workers are the losses of the whole batch."""

    def metrics(self, representations: R) -> dict[str, Tensor]:
        """Return scalars that are reported and not trained on, by name."""
        return {}

    def modules(self) -> dict[str, nn.Module]:
        """Return the modules that this term has besides those of the model, by their names in checkpoints."""
        return {}

    def parameters(self) -> dict[str, nn.Parameter]:
        """Return the scalar parameters besides those of :meth:`modules`, by their names in checkpoints."""
        return {}

    def encoders(self) -> list[nn.Module]:
        """Return the encoders, besides those of the model, that ``torch.compile`` should compile."""
        return []

    def after_losses(self, representations: R, texts: OwnTexts) -> None:
        """Update running state. Called once per training step, after the losses."""

    def after_update(self, progress: float) -> None:
        """Update copies of the trained weights, such as an EMA teacher. Called after the optimiser's update.

        Args:
            progress: fraction of the run's steps that are done, 0..1.
        """


class SummedTerm(Term[R]):
    """Base class of terms whose representations are sums over images, so that those of the chunks are added up."""

    def combine(self, parts: Sequence[R]) -> R:
        """Join the representations of the chunks of a batch by addition."""
        return _combine_fields(parts, lambda tensors: torch.stack(list(tensors)).sum(0))


def _combine_fields(parts: Sequence[R], combine: Any) -> R:
    kind = cast(Any, type(parts[0]))
    return kind(*(None if field[0] is None else combine(field) for field in zip(*parts, strict=True)))
