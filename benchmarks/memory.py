"""GPU memory of the paper's setting, ``configs/vitb16_cc12m.yaml``, estimated on a CPU.

    weights, gradients, AdamW   number of parameters, counted on the meta device, in float32
    activations of the towers   bytes that autograd keeps per image or caption: the difference between forward passes of two and
                                of one in bfloat16 autocast on the CPU; every storage counts once, weights are left out
    losses                      bytes that autograd keeps for the tensor shapes of one worker, measured on the meta device; the
                                same number is added for gradients, which is an upper bound
    copies in bfloat16          copies of the matrices that autocast casts, kept for the forward and backward pass

Not included are CUDA's context, NCCL's buffers and fragmentation of the allocator, together 2 to 4 GB as a rule of thumb. The
values ``fits_…`` and ``pairs_that_fit_…`` leave a tenth of the card free for them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vilseg.config import RunConfig
from vilseg.losses import (
    contrastive_loss,
    contrastive_loss_from_scores,
    multi_label_loss,
    softmax_pooled_scores,
    top_k_pooled_scores,
)
from vilseg.model import ImageFeatures, ViLSeg
from vilseg.model.image_encoder import build_image_encoder, model_from_config
from vilseg.model.text_encoder import TextEncoder
from vilseg.text.tokenizer import train_tokenizer
from vilseg.training.objective import Objective

CONFIG = Path(__file__).parents[1] / "configs" / "vitb16_cc12m.yaml"
_GB = 1e9
_CARDS = (40, 80)
_FREE_SHARE = 0.1
_PHRASES_IN_BATCH = 0.5
"""Fraction of the table of phrases that occurs in a batch: an assumption, 4,096 captions name most of the frequent ones."""


def main(out: Path) -> dict[str, Any]:
    """Return the result of `table` for the configuration ``configs/vitb16_cc12m.yaml``; nothing is written to ``out``."""
    return table(RunConfig.load(str(CONFIG)))


def table(config: RunConfig) -> dict[str, Any]:
    """Compute the GPU memory of one worker in GB by purpose, without sharding (``none``) and with FSDP (``fsdp``).

    Also returned: the number of parameters, the saved activations per image and caption in MB, and for cards of 40 and 80 GB
    whether the worker fits and how many pairs per worker would.
    """
    workers = config.trainer.min_workers
    pairs = config.trainer.batch_size // workers
    objective = _on_meta(config)
    counts = _count(objective)
    image = _per_image(config)
    activations = {
        "image_encoder": pairs * (2 * image["global"] + config.views.local_crops * image["local"]),
        "text_encoder": pairs * image["caption"],
        "phrases": int(_PHRASES_IN_BATCH * config.loss.nouns.max_phrases) * image["phrase"],
        "losses": (kept := _losses(config, objective, pairs)),
        "loss_gradients": kept,
        "views": _views(config, pairs),
    }
    held = 4 * (counts["trained"] + counts["teacher"])
    bucket = 4 * counts["trained"]
    copies = 2 * (counts["matrices"] + counts["teacher_matrices"])
    whole = {
        "weights": held,
        "gradients": 4 * counts["trained"],
        "adamw": 8 * counts["trained"],
        "gradient_buckets": bucket,
        "bfloat16_copies": copies,
    }
    # Outside of layers everything is put together for the whole step; of the layers one is, and the next one on its way.
    outside = 4 * (counts["all"] - counts["in_layers"])
    cut = {
        "weights": held / workers + outside + 2 * 4 * counts["largest_layer"],
        "gradients": 4 * counts["trained"] / workers,
        "adamw": 8 * counts["trained"] / workers,
        "gradient_buckets": 2 * 4 * counts["largest_layer"] + outside,
        "bfloat16_copies": copies,
    }
    result: dict[str, Any] = {
        "benchmark": "memory",
        "config": CONFIG.name,
        "workers": workers,
        "pairs_per_worker": pairs,
        "parameters": counts,
        "megabytes_saved": {name: round(value / 1e6, 1) for name, value in image.items()},
        "activations_gb": _gigabytes(activations),
    }
    for sharding, states in (("none", whole), ("fsdp", cut)):
        total = sum(states.values()) + sum(activations.values())
        result[sharding] = {
            **_gigabytes(states),
            "activations": round(sum(activations.values()) / _GB, 2),
            "total": round(total / _GB, 2),
            **{f"fits_{card}_gb": bool(total < card * _GB * (1 - _FREE_SHARE)) for card in _CARDS},
            **{f"pairs_that_fit_{card}_gb": _largest(card, states, activations, pairs) for card in _CARDS},
        }
    return result


def _on_meta(config: RunConfig) -> Objective:
    """The run's objective without memory for its weights; its tokenizer is a stand-in."""
    with torch.device("meta"):
        model = ViLSeg(config.model, *_towers(config))
        return Objective(model, config.loss, config.views)


def _towers(config: RunConfig) -> tuple[nn.Module, TextEncoder]:
    text = config.model.text_encoder
    tokenizer = train_tokenizer(["a"], 100)
    sizes = {
        **text.sizes,
        "vocab_size": text.vocabulary_size,
        "max_position_embeddings": text.max_tokens,
        "pad_token_id": tokenizer.pad_token_id,
    }
    model = model_from_config(text.architecture, sizes, key="model.text_encoder")
    encoder = TextEncoder(model, tokenizer, pooling=text.pooling, max_tokens=text.max_tokens)
    return build_image_encoder(config.model.image_encoder), encoder


def _count(objective: Objective) -> dict[str, int]:
    """Parameters by what they cost."""

    def number(parameters: Iterable[Tensor]) -> int:
        return sum(parameter.numel() for parameter in parameters)

    layers = [member for m in objective.modules() if isinstance(m, nn.ModuleList) for member in m]
    teacher = [parameter for name, parameter in objective.named_parameters() if name.startswith("teacher.")]
    student = list(objective.model.image_encoder.parameters()) + list(objective.model.text_encoder.parameters())
    return {
        "image_encoder": number(objective.model.image_encoder.parameters()),
        "text_encoder": number(objective.model.text_encoder.parameters()),
        "trained": number(parameter for parameter in objective.parameters() if parameter.requires_grad),
        "teacher": number(teacher),
        "all": number(objective.parameters()),
        "in_layers": number(parameter for layer in layers for parameter in layer.parameters()),
        "largest_layer": max(number(layer.parameters()) for layer in layers),
        "matrices": number(parameter for parameter in student if parameter.ndim > 1),
        "teacher_matrices": number(parameter for parameter in teacher if parameter.ndim > 1),
    }


def _per_image(config: RunConfig) -> dict[str, int]:
    """Bytes that autograd keeps for one more view, caption or phrase."""
    image_encoder, text_encoder = _towers(config)
    image_encoder.train()
    text_encoder.train()

    def of_pictures(side: int) -> int:
        return _for_one_more(lambda count: image_encoder(torch.rand(count, 3, side, side)).patches, image_encoder)

    def of_texts(tokens: int) -> int:
        def encode(count: int) -> Tensor:
            return text_encoder(torch.full((count, tokens), 5))

        return _for_one_more(encode, text_encoder)

    return {
        "global": of_pictures(config.views.global_size),
        "local": of_pictures(config.views.local_size),
        "caption": of_texts(config.model.text_encoder.max_tokens),
        "phrase": of_texts(4),
    }


def _for_one_more(forward: Callable[[int], Tensor], module: nn.Module) -> int:
    with torch.autocast("cpu", torch.bfloat16):
        return _saved(lambda: forward(2), module) - _saved(lambda: forward(1), module)


def _saved(forward: Callable[[], Any], module: nn.Module | None = None) -> int:
    """Bytes of the storages that autograd keeps of a pass, weights left out."""
    weights = set() if module is None else {p.untyped_storage()._cdata for p in module.parameters()}
    kept: dict[int, Tensor] = {}

    def note(tensor: Tensor) -> Tensor:
        kept.setdefault(tensor.untyped_storage()._cdata, tensor)  # held, so that no other takes its place
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        result = forward()  # its graph is held until all has been counted
    total = sum(t.untyped_storage().nbytes() for place, t in kept.items() if place not in weights)
    del result
    return total


def _losses(config: RunConfig, objective: Objective, pairs: int) -> int:
    """Bytes kept for the losses on texts by one worker, which gathers as much from every other one as it has itself.

    Those of the clustering head and of the teacher are a thousandth of these.
    """
    workers, settings = config.trainer.min_workers, config.loss
    patches = (config.views.global_size // objective.model.image_encoder.patch_size) ** 2
    phrases = int(_PHRASES_IN_BATCH * settings.nouns.max_phrases)

    def on_meta(*shape: int) -> Tensor:
        return torch.empty(shape, device="meta", requires_grad=True)

    def gather(rows: Tensor) -> Tensor:
        return torch.cat([rows] * workers)

    def forward() -> list[Tensor]:
        features, scale = on_meta(pairs, patches, objective.model.image_projection.in_features), on_meta()
        embeddings = objective.model.embed(ImageFeatures(features, features[:, 0], (patches, 1)))
        texts = F.normalize(on_meta(pairs, config.model.embedding_dim), dim=-1)
        positives = torch.zeros(pairs, phrases, dtype=torch.bool, device="meta")
        names = F.normalize(on_meta(phrases, config.model.embedding_dim), dim=-1)
        return [
            contrastive_loss(embeddings.pooled, texts, scale),
            contrastive_loss_from_scores(
                softmax_pooled_scores(embeddings.patches, gather(texts), settings.cross_modal.pooling_temperature),
                scale,
            ),
            multi_label_loss(
                top_k_pooled_scores(embeddings.patches, names, settings.nouns.top_patches), positives, scale
            ),
        ]

    with (
        patch("vilseg.losses.contrastive_loss.gather_rows", gather),
        patch("vilseg.losses.multi_label_loss.gather_rows", gather),
    ):
        return _saved(forward)


def _views(config: RunConfig, pairs: int) -> int:
    """Float32 pixels of all views."""
    sides = [config.views.global_size] * 2 + [config.views.local_size] * config.views.local_crops
    return sum(pairs * 3 * side**2 * 4 for side in sides)


def _largest(card: int, states: dict[str, float], activations: dict[str, float], pairs: int) -> int:
    """Pairs a worker that a card has room for, everything but states growing with them."""
    room = card * _GB * (1 - _FREE_SHARE) - sum(states.values())
    return max(0, int(room / (sum(activations.values()) / pairs)))


def _gigabytes(values: dict[str, float]) -> dict[str, float]:
    return {name: round(value / _GB, 2) for name, value in values.items()}
