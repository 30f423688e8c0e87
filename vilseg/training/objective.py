"""Training objective: a weighted sum of terms, in one module that data-parallel training wraps.

A forward pass has three phases, so that ``vilseg.training.grad_cache`` can process the images in chunks:

1. embed the texts;
2. encode the views of images once and compute the representations of every term from them;
3. compute the losses of every term from the representations of the whole batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vilseg.config import ViewsConfig
from vilseg.config.loss import LossConfig
from vilseg.distributed import gather_rows
from vilseg.model import ViLSeg
from vilseg.training.batch import TensorBatch
from vilseg.training.encoded_texts import OwnTexts, SharedTexts, TextEmbedder, find_positives, find_present_phrases
from vilseg.training.encoded_views import encode_views
from vilseg.training.precision import autocast
from vilseg.training.terms import EncodedImages, Term, build_terms

Representations = tuple[Any, ...]
"""One NamedTuple per term, in the order of the terms."""
_FIRST_MODULES = ("vision_head", "vision_loss", "teacher")
"""Modules to register before those of other terms, because checkpoints number optimiser states in the order of registration."""


class Objective(nn.Module):
    """Weighted sum of the losses of ViL-Seg (section 3), the multi-label loss on noun phrases, and self-training.

    Args:
        model: the student; trained in place.
        loss: weights and settings of the losses; one of weight 0 is not computed.
        views: settings of the augmentation.
        phrases: all noun phrases of the corpus; batches refer to them by index.
        autocast: dtype of the networks; float32 turns autocast off.
        self_training: True to add the loss on pseudo labels, which a copy of ``model``, made on construction, gives.
        extra_terms: terms in addition to those of the configuration.
    """

    def __init__(
        self,
        model: ViLSeg,
        loss: LossConfig,
        views: ViewsConfig,
        phrases: tuple[str, ...] = (),
        *,
        autocast: torch.dtype = torch.float32,
        self_training: bool = False,
        extra_terms: Sequence[Term[Any]] = (),
    ) -> None:
        super().__init__()
        self.model = model
        self.config = loss
        self.views = views
        self.autocast = autocast
        tokens_PT = model.text_encoder.tokenize(phrases)
        self.text_embedder = TextEmbedder(model, tokens_PT)
        terms = build_terms(model, loss, tokens_PT, local_crops=views.local_crops, self_training=self_training)
        self.terms = [*terms, *extra_terms]
        modules = {name: module for term in self.terms for name, module in term.modules().items()}
        for name in sorted(modules, key=lambda name: name not in _FIRST_MODULES):
            self.add_module(name, modules[name])
        for term in self.terms:
            for name, parameter in term.parameters().items():
                self.register_parameter(name, parameter)
        if not loss.mutual_information.weight:
            model.clustering_head.requires_grad_(False)

    def forward(self, batch: TensorBatch) -> dict[str, Tensor]:
        """Return the weighted sum of this worker's losses as ``loss``, each unweighted loss as ``loss/NAME``, and metrics.

        The metrics are those that :meth:`Term.metrics` returns. The means over the workers of ``loss`` and of its gradient are
        those of the whole batch.
        """
        phrase_ids_P = self.present_phrases(batch)
        captions_BD = self.text_embedder.embed_captions(batch.tokens, self.autocast)
        phrases_PD = self.text_embedder.embed_phrases(phrase_ids_P, self.autocast)
        texts = SharedTexts(self.shared_captions(captions_BD), phrases_PD, phrase_ids_P)
        representations = self.represent(batch, texts, pairs=len(batch))
        own = OwnTexts(captions_BD, find_positives(batch, phrase_ids_P))
        losses = self.losses(representations, own)
        if self.training:
            self.after_losses(representations, own)
        return losses

    def present_phrases(self, batch: TensorBatch) -> Tensor:
        """Return the indices of the phrases in the captions of all workers, ascending; empty if no term needs phrases."""
        if not any(term.needs.phrases for term in self.terms):
            return batch.phrases.new_empty(0)
        return find_present_phrases(batch)

    def shared_captions(self, captions_BD: Tensor) -> Tensor:
        """Return the caption embeddings of all workers; empty if no term needs them. Shape: (B, D) -> (Q, D)."""
        return gather_rows(captions_BD) if any(term.needs.all_captions for term in self.terms) else captions_BD[:0]

    def represent(self, batch: TensorBatch, texts: SharedTexts, *, pairs: int) -> Representations:
        """Encode the views of some images and compute the representations of every term.

        Args:
            batch: a batch or a chunk of one.
            texts: texts of all workers that the images are compared with.
            pairs: number of pairs in this worker's whole batch.
        """
        needs = [term.needs for term in self.terms]
        with autocast(self.model.device, self.autocast):
            views = encode_views(
                self.model,
                batch,
                self.views,
                global_=max(need.global_views for need in needs),
                local=max(need.local_views for need in needs),
                second_learns=any(need.second_view_gradient for need in needs),
                drop=self.training,
            )
        images = EncodedImages(self.model, batch, views, texts, pairs=pairs, precision=self.autocast)
        return tuple(term.represent(images) for term in self.terms)

    def combine(self, parts: Sequence[Representations]) -> Representations:
        """Join the representations of the chunks of a batch."""
        return tuple(term.combine(of_term) for term, of_term in zip(self.terms, zip(*parts, strict=True), strict=True))

    def losses(self, representations: Representations, texts: OwnTexts) -> dict[str, Tensor]:
        """Return losses and metrics as :meth:`forward` does, from the representations of this worker's whole batch."""
        pairs = list(zip(self.terms, representations, strict=True))
        losses = [(term.weight, term.losses(of_term, texts)) for term, of_term in pairs]
        total = torch.stack([weight * value for weight, named in losses for value in named.values()]).sum()
        found = {"loss": total}
        for _, named in losses:
            found |= {f"loss/{name}": value.detach() for name, value in named.items()}
        for term, of_term in pairs:
            found |= term.metrics(of_term)
        return found

    def after_losses(self, representations: Representations, texts: OwnTexts) -> None:
        """Update the running state of the terms. Call it once per step, after the losses."""
        for term, of_term in zip(self.terms, representations, strict=True):
            term.after_losses(of_term, texts)

    def after_update(self, progress: float) -> None:
        """Update EMA teachers after an optimiser step; ``progress`` is the fraction of the run's steps that are done, 0..1."""
        for term in self.terms:
            term.after_update(progress)

    def compile_encoders(self) -> None:
        """Compile each encoder in place with ``torch.compile``; the names of the weights do not change."""
        teachers = [encoder for term in self.terms for encoder in term.encoders()]
        for encoder in (self.model.image_encoder, self.model.text_encoder, *teachers):
            # Draw dropout from torch's generator, because GradCache and resumed runs restore its state.
            encoder.compile(options={"fallback_random": True})
