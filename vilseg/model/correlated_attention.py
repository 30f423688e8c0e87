"""Correlated self-attention in the last block of a vision transformer, which keeps patch features local.

An encoder trained on global features mixes global information into every patch in its last block. Two variants of the
attention reduce this mixing without any training. With the block's input x, the queries, keys and values q, k, v of one head of
width d after the first norm, and positions p on the patch grid:

    sclip     a = (softmax(q q^T / sqrt d) + softmax(k k^T / sqrt d)) v W_o    y = x + a    out = y + MLP(norm(y))
    naclip    a = softmax(k k^T / sqrt d + G) v W_o                            out = a
              G_ij = exp(-|p_i - p_j|^2 / (2 s^2)) between patches, 0 from and to class and register tokens; s = 5

sclip: correlative self-attention (SCLIP, Wang et al. 2023, arXiv 2312.01597, section on the method; `custom_attn` with
`csa` in wangf3014/SCLIP, clip/model.py): the two soft-maxes are added, so a row sums to 2; the residual and the MLP are
kept. naclip: neighbourhood bias on the similarity of keys, and the block without residual and MLP (NACLIP, Hajimiri et al.
2024, arXiv 2404.08181, section on the method; `custom_attn` with `naclip` and `reduced` in sinahmr/NACLIP, clip/model.py).
Both papers treat CLIP only. If a block scales its branches (DINOv2's layer scale), a and the MLP are scaled likewise.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

_DEVIATION = 5.0
"""Standard deviation s in the module's docstring, in patches (NACLIP, `gaussian_std`; the same for all its data sets)."""

_captured: ContextVar[list[Tensor] | None] = ContextVar("captured", default=None)
"""List that the hook `_capture` appends the block's input to, for forward passes in this thread; None captures nothing."""


class _Attributes(NamedTuple):
    """Names of the attributes that hold the layers of a transformers model and the modules of one layer."""

    layers: str
    norm: str
    attention: str
    norm_after: str
    last_norm: str | None
    """Norm that the model applies to the output of the last layer; None if it applies none."""


_CLIP = _Attributes("encoder.layers", "layer_norm1", "self_attn", "layer_norm2", None)
_SIGLIP = _CLIP._replace(last_norm="post_layernorm")
_DINOV2 = _Attributes("encoder.layer", "norm1", "attention", "norm2", "layernorm")
_BY_MODEL_TYPE = {
    "clip_vision_model": _CLIP,
    "siglip_vision_model": _SIGLIP,
    "siglip2_vision_model": _SIGLIP,
    "dinov2": _DINOV2,
    "dinov2_with_registers": _DINOV2,
    "vit": _Attributes("layers", "layernorm_before", "attention", "layernorm_after", "layernorm"),
}


@dataclass(frozen=True)
class LastBlock:
    """Modules of a transformers model that compute its last hidden state: those of the last block, and the norm after it."""

    layer: nn.Module
    norm: Any
    attention: Any
    out: Any
    norm_after: Any
    mlp: Any
    scale: Any
    scale_after: Any
    last_norm: Any

    @classmethod
    def find(cls, model: nn.Module) -> LastBlock | None:
        """Return the last block of ``model``, or None if its architecture is not supported."""
        names = _BY_MODEL_TYPE.get(str(getattr(getattr(model, "config", None), "model_type", None)))
        if names is None:
            return None
        try:
            layer: Any = model.get_submodule(names.layers)[-1]  # type: ignore[index]  # a ModuleList
            attention = getattr(layer, names.attention)
            for needed in ("q_proj", "k_proj", "v_proj", "head_dim"):
                getattr(attention, needed)
            out = attention.out_proj if hasattr(attention, "out_proj") else attention.o_proj
            return cls(
                layer=layer,
                norm=getattr(layer, names.norm),
                attention=attention,
                out=out,
                norm_after=getattr(layer, names.norm_after),
                mlp=layer.mlp,
                scale=getattr(layer, "layer_scale1", _identity),
                scale_after=getattr(layer, "layer_scale2", _identity),
                last_norm=getattr(model, names.last_norm) if names.last_norm else _identity,
            )
        except (AttributeError, IndexError):  # another version of transformers, or a model without blocks
            return None

    @contextmanager
    def captured_input(self) -> Iterator[list[Tensor]]:
        """Yield a list to which the last block's input (B, T, F) is appended when the model runs inside the ``with`` block."""
        # transformers' own mechanism keeps the inputs of all blocks, and its hooks cannot be pickled.
        if _capture not in self.layer._forward_pre_hooks.values():
            self.layer.register_forward_pre_hook(_capture, with_kwargs=True)
        inputs: list[Tensor] = []
        token = _captured.set(inputs)
        try:
            yield inputs
        finally:
            _captured.reset(token)

    def __call__(
        self, tokens_BTF: Float[Tensor, "B T F"], grid: tuple[int, int], attention: Literal["sclip", "naclip"]
    ) -> Float[Tensor, "B T F"]:
        """Compute the model's last hidden state with another attention variant.

        Args:
            tokens_BTF: input of the last block: T tokens, of which the last h x w are patches. Shape: (B, T, F).
            grid: (h, w), rows and columns of patches.
            attention: variant, as defined in the module's docstring.

        Returns:
            The last hidden state. Shape: (B, T, F).
        """
        normed_BTF = self.norm(tokens_BTF)
        projections = (self.attention.q_proj, self.attention.k_proj, self.attention.v_proj)
        q, k, v = (
            project(normed_BTF).unflatten(-1, (-1, self.attention.head_dim)).transpose(1, 2) for project in projections
        )
        # Attention weights are never materialised.
        if attention == "sclip":
            mixed = F.scaled_dot_product_attention(q, q, v) + F.scaled_dot_product_attention(k, k, v)
        else:
            bias_TT = neighbourhood_bias(tokens_BTF.shape[1], grid, tokens_BTF.device).to(k.dtype)
            mixed = F.scaled_dot_product_attention(k, k, v, attn_mask=bias_TT)
        added_BTF = self.scale(self.out(mixed.transpose(1, 2).flatten(2)))
        if attention == "naclip":
            return self.last_norm(added_BTF)
        tokens_BTF = tokens_BTF + added_BTF
        return self.last_norm(tokens_BTF + self.scale_after(self.mlp(self.norm_after(tokens_BTF))))


def _capture(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    inputs = _captured.get()
    if inputs is not None:
        inputs.append(args[0] if args else kwargs["hidden_states"])


def neighbourhood_bias(tokens: int, grid: tuple[int, int], device: torch.device) -> Float[Tensor, "T T"]:
    """Compute G of the module's docstring. Shape: -> (T, T), float32.

    Args:
        tokens: number of tokens T; those before the h x w patches are class and register tokens.
        grid: (h, w), rows and columns of patches.
        device: device of the result.
    """
    h, w = grid
    near_hh, near_ww = (_gaussian(side, device) for side in grid)
    near_NN = torch.einsum("ik,jl->ijkl", near_hh, near_ww).reshape(h * w, h * w)
    prefix = tokens - h * w
    return F.pad(near_NN, (prefix, 0, prefix, 0))


def _gaussian(side: int, device: torch.device) -> Tensor:
    position = torch.arange(side, device=device, dtype=torch.float32)
    return torch.exp(-((position[:, None] - position[None]) ** 2) / (2 * _DEVIATION**2))


def _identity(tokens: Tensor) -> Tensor:
    return tokens
