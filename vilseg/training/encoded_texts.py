"""Embeddings of a batch's captions and of the noun phrases in them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from vilseg.distributed import gather_rows
from vilseg.model import ViLSeg
from vilseg.training.batch import TensorBatch
from vilseg.training.precision import autocast

_FROZEN_CHUNK = 256
"""Number of phrases that a frozen text encoder encodes at once."""


class SharedTexts(NamedTuple):
    """Embeddings of the texts of all workers' batches, which every image is compared with; the same on every worker."""

    captions_QD: Tensor
    """Caption embeddings, unit length. Empty if no term needs them."""
    phrases_PD: Tensor
    """Embeddings of the phrases that occur in the batches, unit length. Empty if no term needs them."""
    phrase_ids_P: Tensor
    """Indices of these phrases in the list of all phrases of the corpus, ascending."""


class OwnTexts(NamedTuple):
    """Texts of this worker's images."""

    captions_BD: Tensor
    """Caption embeddings, unit length."""
    positives_BP: Tensor
    """Boolean mask, True if one of the image's captions contains the phrase."""


class TextEmbedder:
    """Embedder of captions and phrases by the model's text encoder.

    Args:
        model: the student.
        tokens_PT: tokens of all phrases of the corpus.
    """

    def __init__(self, model: ViLSeg, tokens_PT: Tensor) -> None:
        self._model = model
        self._tokens_PT = tokens_PT
        self._frozen_PF: Tensor | None = None

    def embed_captions(self, tokens_BT: Tensor, precision: torch.dtype) -> Tensor:
        """Embed captions from their tokens, or from cached features (B, F). Shape: -> (B, D), unit length."""
        model = self._model
        if tokens_BT.is_floating_point():
            return model.embed_text(tokens_BT.float())
        with autocast(model.device, precision):
            features = model.text_features(model.text_encoder.trim(tokens_BT))
        return model.embed_text(features.float())

    def embed_phrases(self, phrase_ids_P: Tensor, precision: torch.dtype) -> Tensor:
        """Embed phrases by their indices in the list of all phrases of the corpus. Shape: (P,) -> (P, D), unit length.

        A frozen text encoder encodes all phrases of the corpus on the first call; later calls reuse these features.
        """
        model = self._model
        if not len(phrase_ids_P):
            return model.caption_mean.new_empty((0, model.embedding_dim))
        self._tokens_PT = self._tokens_PT.to(phrase_ids_P.device)
        with autocast(model.device, precision):
            if not model.config.text_encoder.frozen:
                features = model.text_features(model.text_encoder.trim(self._tokens_PT[phrase_ids_P]))
            else:
                if self._frozen_PF is None:
                    chunks = self._tokens_PT.split(_FROZEN_CHUNK)
                    self._frozen_PF = torch.cat([model.text_features(tokens).float() for tokens in chunks])
                features = self._frozen_PF[phrase_ids_P]
        return model.embed_text(features.float())


def find_present_phrases(batch: TensorBatch) -> Tensor:
    """Return the indices of the phrases that occur in the captions of all workers, ascending. Shape: -> (P,)."""
    present = gather_rows(batch.phrases).unique()
    return present[present >= 0]


def find_positives(batch: TensorBatch, phrase_ids_P: Tensor) -> Tensor:
    """Return a boolean mask, True if one of the image's captions contains the phrase. Shape: -> (B, P)."""
    none = len(phrase_ids_P)  # an extra column collects the entries that stand for no phrase
    columns = torch.where(batch.phrases >= 0, torch.searchsorted(phrase_ids_P, batch.phrases), none)
    positives = torch.zeros((len(batch), none + 1), dtype=torch.bool, device=batch.phrases.device)
    return positives.scatter_(1, columns, True)[:, :none]
