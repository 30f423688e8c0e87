"""Text encoder: a Hugging Face text model with its tokenizer, which returns one feature vector for each text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import AutoModel, PreTrainedTokenizerBase

from vilseg.config import TextEncoderConfig
from vilseg.errors import ModelError
from vilseg.model.image_encoder import checkpoint_folder, checkpoint_layers, first_line, model_from_config
from vilseg.text.tokenizer import FixedTokenizer, load_tokenizer

_SMALL_BERT = {
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 512,
    # Dropout masks would depend on how the batch is split over workers; without them losses do not depend on their number.
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}


class TextEncoder(nn.Module):
    """Text model with its tokenizer, which is saved with the model.

    The pooler of SigLIP takes the last token of a row of fixed length, including padding (Zhai et al. 2023). With this pooler,
    rows always have the model's maximum length, are never trimmed, and no token is masked.

    Args:
        model: text model, or a model with an attribute ``text_model``.
        tokenizer: tokenizer of the model.
        pooling: ``mean`` of the tokens, ``first`` token, or ``pooler`` for the pooling layer of the model itself.
        max_tokens: number of tokens of each row; limited to the number of positions of the model.
    """

    model: Any

    def __init__(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase, *, pooling: str, max_tokens: int) -> None:
        super().__init__()
        self.model = getattr(model, "text_model", model)  # CLIP and SigLIP
        self.tokenizer = tokenizer
        self.pooling = pooling
        config = self.model.config
        self._pools_padding = pooling == "pooler" and config.model_type in ("siglip_text_model", "siglip2_text_model")
        if pooling != "pooler" and getattr(self.model, "pooler", None) is not None:
            self.model.pooler = None  # its weights would never be trained
        longest: int = getattr(config, "max_position_embeddings", max_tokens)
        self.max_tokens = longest if self._pools_padding else min(max_tokens, longest)
        self.num_features: int = config.projection_size if self._pools_padding else config.hidden_size

    @property
    def hf_config(self) -> dict[str, Any]:
        """Hugging Face configuration, from which the architecture can be rebuilt without its checkpoint."""
        return self.model.config.to_dict()

    @property
    def fixed_length(self) -> bool:
        """True if rows must be ``max_tokens`` long, because the pooler reads a padding token."""
        return self._pools_padding

    def tokenize(self, texts: Sequence[str]) -> Int[Tensor, "B T"]:
        """Return token ids, padded to ``max_tokens``. Shape: B texts -> (B, T), int64."""
        return torch.from_numpy(self.fixed_tokenizer()(texts)).long()

    def fixed_tokenizer(self) -> FixedTokenizer:
        """Return the tokenizer without the model, small enough to send to the processes that read captions."""
        return FixedTokenizer(self.tokenizer.backend_tokenizer.to_str(), self.max_tokens, self.tokenizer.pad_token_id)

    def trim(self, tokens_BT: Int[Tensor, "B T"]) -> Int[Tensor, "B longest"]:
        """Remove columns that are padding in every row, unless `fixed_length` is True. Shape: (B, T) -> (B, longest)."""
        if self._pools_padding:
            return tokens_BT
        return tokens_BT[:, : int(self._is_text(tokens_BT).sum(1).max())]

    def forward(self, tokens_BT: Int[Tensor, "B T"]) -> Float[Tensor, "B F"]:
        """Compute one feature vector per text. Shape: (B, T) token ids -> (B, F)."""
        if self._pools_padding:
            return self.model(input_ids=tokens_BT).pooler_output
        mask_BT = self._is_text(tokens_BT)
        output = self.model(input_ids=tokens_BT, attention_mask=mask_BT.long())
        if self.pooling == "pooler":
            return output.pooler_output
        hidden_BTF = output.last_hidden_state
        if self.pooling == "first":
            return hidden_BTF[:, 0]
        weights_BT1 = mask_BT.unsqueeze(-1).to(hidden_BTF.dtype)
        return (hidden_BTF * weights_BT1).sum(1) / weights_BT1.sum(1)

    def checkpoint_activations(self) -> None:
        """Enable activation checkpointing in the layers; a model that has only word embeddings is left unchanged."""
        checkpoint_layers(self.model, key="model.text_encoder", optional=True)

    def _is_text(self, tokens_BT: Int[Tensor, "B T"]) -> Bool[Tensor, "B T"]:
        """Return a mask of the tokens that are not padding. Shape: (B, T) -> same, bool."""
        padding_BT = tokens_BT == self.tokenizer.pad_token_id
        if self.tokenizer.eos_token_id == self.tokenizer.pad_token_id:
            # CLIP pads with its end-of-text token. The first one belongs to the text: its feature is that of the text.
            padding_BT &= padding_BT.cumsum(1) > 1
        padding_BT[:, 0] = False  # otherwise a text without any known character would be a mean over no tokens
        return ~padding_BT


def build_text_encoder(
    config: TextEncoderConfig,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    hf_config: dict[str, Any] | None = None,
) -> TextEncoder:
    """Build the text encoder that ``config`` describes.

    Args:
        config: settings with a checkpoint, or with an architecture and its sizes.
        tokenizer: required if the model is built from an architecture or from ``hf_config``; a checkpoint contains its own.
        hf_config: Hugging Face configuration that was saved with a vilseg model. If given, the model is built from it and no
            checkpoint is loaded, because the weights will be loaded from the vilseg model.

    Raises:
        ConfigError: unknown architecture, or sizes that do not fit it.
        ModelError: the checkpoint or its tokenizer cannot be loaded.
    """
    if hf_config is None and config.checkpoint:
        with checkpoint_folder(config.checkpoint) as folder:
            try:
                model = AutoModel.from_pretrained(folder, dtype=torch.float32)
                tokenizer = load_tokenizer(folder)
            except (OSError, ValueError, ImportError) as error:
                raise ModelError(
                    f"model.text_encoder.checkpoint {config.checkpoint} cannot be loaded: {first_line(error)}"
                ) from error
    else:
        assert tokenizer is not None, "a text model without a checkpoint needs a tokenizer"
        values = hf_config or {
            **(_SMALL_BERT if config.architecture == "bert" else {}),
            **config.sizes,
            "vocab_size": len(tokenizer),
            "max_position_embeddings": config.max_tokens,
            "pad_token_id": tokenizer.pad_token_id,
        }
        model_type = values.get("model_type", config.architecture)
        model = model_from_config(model_type, values, key="model.text_encoder")
    return TextEncoder(model, tokenizer, pooling=config.pooling, max_tokens=config.max_tokens)
