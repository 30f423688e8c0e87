"""The interface of a loss term, and the images that it works on."""

from __future__ import annotations

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
    """Views and texts that a term works on. The objective encodes the union of the needs of its terms, once."""

    global_views: int = 1
    local_views: int = 0
    second_view_gradient: bool = False
    """A gradient flows through the encoding of the global views after the first."""
    all_captions: bool = False
    """Captions of all workers, for every image."""
    phrases: bool = False
    """Noun phrases of the captions of all workers, for every image."""


class EncodedImages:
    """Images of a worker's batch, or of one chunk of it, encoded.

    Args:
        model: the student.
        batch: the images, their texts and seeds.
        views: their encoded views.
        texts: texts that every image is compared with.
        pairs: in the worker's whole batch, of which this may be a chunk.
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
        """Patch embeddings of the first view, unit length; computed once, for the first term that asks. Shape: (B, N, D)."""
        return self._model.embed_patches(self.views.view(0))

    @property
    def positives(self) -> Tensor:
        """True where an image's captions hold the phrase. Shape: (B, P), bool."""
        return find_positives(self.batch, self.texts.phrase_ids_P)

    def autocast(self) -> torch.autocast:
        """Context in which networks run."""
        return autocast(self._model.device, self._precision)


class Term(Generic[R]):
    """One term of the objective: it brings images to representations, and takes its loss of those of the whole batch.

    The two steps are separate because a contrastive loss needs all images of a batch at once, but only their
    representations: GradCache (``vilseg.training.grad_cache``) encodes a large batch in chunks, puts the representations of the
    chunks together with :meth:`combine`, and takes the losses of the whole.

    A term is a plain object. What it trains or keeps is registered with the objective by :meth:`modules` and
    :meth:`parameters`, whose names are those in checkpoints.

    Type parameter: R, a NamedTuple of tensors (None for an absent one).
    """

    weight: float = 1.0
    """Factor of the term's losses in the sum."""
    needs = Needs()

    def represent(self, images: EncodedImages) -> R:
        """Return what the losses need of some images. Called with and without gradient; must not change any state."""
        raise NotImplementedError

    def combine(self, parts: Sequence[R]) -> R:
        """Put the representations of the chunks of a batch together: here along the first dimension, which counts images."""
        return _combine_fields(parts, torch.cat)

    def losses(self, representations: R, texts: OwnTexts) -> dict[str, Tensor]:
        """Return the unweighted losses by name, scalars; their means over the workers are those of the whole batch."""
        raise NotImplementedError

    def metrics(self, representations: R) -> dict[str, Tensor]:
        """Return scalars that are reported and not trained on."""
        return {}

    def modules(self) -> dict[str, nn.Module]:
        """Return the modules beside the model that this term trains or keeps, by their names in checkpoints."""
        return {}

    def parameters(self) -> dict[str, nn.Parameter]:
        """Return the scalar parameters beside those of :meth:`modules`, by their names in checkpoints."""
        return {}

    def encoders(self) -> list[nn.Module]:
        """Return the encoders beside those of the model that ``torch.compile`` should compile."""
        return []

    def after_losses(self, representations: R, texts: OwnTexts) -> None:
        """Update running state; called once per training step, after the losses."""

    def after_update(self, progress: float) -> None:
        """Follow the trained weights; called after the optimiser's update.

        Args:
            progress: fraction of the run that is done, 0..1.
        """


class SummedTerm(Term[R]):
    """A term whose representations are sums over images, so that those of chunks add up."""

    def combine(self, parts: Sequence[R]) -> R:
        """Add up the representations of the chunks of a batch."""
        return _combine_fields(parts, lambda tensors: torch.stack(list(tensors)).sum(0))


def _combine_fields(parts: Sequence[R], combine: Any) -> R:
    kind = cast(Any, type(parts[0]))
    return kind(*(None if field[0] is None else combine(field) for field in zip(*parts, strict=True)))
