"""The training objective: a sum of terms. This is the module that data-parallel training wraps.

A step has three parts, so that ``vilseg.training.grad_cache`` can put a batch together from chunks: texts are embedded; the views
of images are encoded once, and every term brings them to its representations; every term takes its losses of the representations
of the whole batch.
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
"""One NamedTuple for each term, in the order of the terms."""
_FIRST_MODULES = ("vision_head", "vision_loss", "teacher")
"""Registered before those of other terms: optimiser states in checkpoints are numbered in this order."""


class Objective(nn.Module):
    """The losses of ViL-Seg (section 3), the multi-label loss on noun phrases and self-training, on one batch.

    Args:
        model: the student; trained in place.
        loss: weights, forms and temperatures; a loss of weight 0 costs nothing.
        views: augmentation.
        phrases: noun phrases of the corpus, to which batches refer by index.
        autocast: dtype that the networks run in; float32 for none.
        self_training: add the loss on labels that the model, as it is now, gives to patches.
        extra_terms: terms beside those of the configuration.
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
        """Return the weighted sum of this worker's losses as ``loss``, each loss unweighted as ``loss/NAME``, and metrics.

        The mean of ``loss`` over the workers is that of the whole batch, and so is its gradient.
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
        """Return the indices of the phrases in the captions of all workers, ascending; none where no term needs them."""
        if not any(term.needs.phrases for term in self.terms):
            return batch.phrases.new_empty(0)
        return find_present_phrases(batch)

    def shared_captions(self, captions_BD: Tensor) -> Tensor:
        """Return the captions of all workers; none where no term needs them. Shape: (B, D) -> (Q, D)."""
        return gather_rows(captions_BD) if any(term.needs.all_captions for term in self.terms) else captions_BD[:0]

    def represent(self, batch: TensorBatch, texts: SharedTexts, *, pairs: int) -> Representations:
        """Encode the views of some images and bring them to the representations of every term.

        Args:
            batch: the images.
            texts: texts that they are compared with.
            pairs: in this worker's whole batch, of which ``batch`` may be a chunk.
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
        """Put the representations of the chunks of a batch together."""
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
        """Update what terms keep over the run; once per step, after the losses."""
        for term, of_term in zip(self.terms, representations, strict=True):
            term.after_losses(of_term, texts)

    def after_update(self, progress: float) -> None:
        """Let EMA teachers follow the student; ``progress`` is the fraction of the run that is done."""
        for term in self.terms:
            term.after_update(progress)

    def compile_encoders(self) -> None:
        """Compile each encoder with ``torch.compile``; the names of the weights stay."""
        teachers = [encoder for term in self.terms for encoder in term.encoders()]
        for encoder in (self.model.image_encoder, self.model.text_encoder, *teachers):
            # Torch's own generator for dropout: GradCache replays it, and a run resumes by it.
            encoder.compile(options={"fallback_random": True})
