"""Two published architectures trained from scratch on the same pairs as vilseg, as a comparison.

``GroupViTModel`` (Xu et al. 2022) groups patches inside the network and classifies its groups. ``CLIPModel`` (Radford et al.
2021) classifies each patch by the embedding of this patch, through the projection that it has learned for the whole image. Both
are the classes of ``transformers`` with their own loss, in sizes close to the demo's model, with patches of 4 pixels. They get
the same images in the same order, with the same crops and flips, and use the same tokenizer. Their score maps are refined as
vilseg's are, so that the comparison is of the training only.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from jobs.train.ray_data import read_batches_locally
from vilseg.config import RunConfig
from vilseg.data.views import make_views
from vilseg.device import has_bfloat16_units
from vilseg.evaluation.datasets import FolderDataset
from vilseg.evaluation.evaluate import evaluate
from vilseg.segmentation.refinement import refine
from vilseg.training import run_setup
from vilseg.training.lr_schedule import learning_rate, parameter_groups

GROUP_VIT, CLIP = "GroupViTModel, its groups", "CLIPModel, its patches"
PEERS = (GROUP_VIT, CLIP)
RATES = (3e-4, 1e-3, 3e-3)
"""Learning rates to choose from; the last is that of the demo."""
_MEAN, _DEVIATION = 0.5, 0.25
_PROMPT = "the {}"


def train(name: str, config: RunConfig, dataset: FolderDataset, rate: float) -> float:
    """Train a peer and return its mIoU.

    Args:
        name: one of `PEERS`.
        config: configuration with the pairs, steps, batch size, views and seed.
        dataset: dataset to evaluate on.
        rate: peak learning rate.
    """
    with tempfile.TemporaryDirectory() as left:
        config = config.replace(name="peer", **{"trainer.storage": str(left)})
        prepared = run_setup.prepare(config, run_setup.open_run_directory(config, resume=False))
    torch.manual_seed(config.trainer.seed)
    words = prepared.tokenizer
    model = _MODELS[name](config.data.canvas, words)
    optimizer_config = config.optimizer.replace(learning_rate=rate)
    optimizer = torch.optim.AdamW(parameter_groups(model, config.optimizer.weight_decay), betas=config.optimizer.betas)
    for step, batch in enumerate(read_batches_locally(config, prepared)):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(optimizer_config, step, config.trainer.steps)
        images, seeds = torch.tensor(batch.images), torch.tensor(batch.seeds)
        views = make_views(images, seeds, config.views, global_crops=1, local_crops=0)
        tokens = _with_end(torch.tensor(batch.tokens).long(), words.pad_id)
        optimizer.zero_grad(set_to_none=True)
        # As in vilseg's own training: the matrix units of recent CPUs are several times faster in bfloat16.
        with torch.autocast("cpu", torch.bfloat16, enabled=has_bfloat16_units(images.device)):
            loss = model(
                input_ids=tokens,
                attention_mask=tokens != words.pad_id,
                pixel_values=_normalised(views.global_GB3HW[0]),
                return_loss=True,
            ).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.optimizer.gradient_clip)
        optimizer.step()
    model.eval()
    texts = _with_end(torch.tensor(words([_PROMPT.format(label) for label in dataset.classes])).long(), words.pad_id)
    return round(evaluate(_Named(dataset.classes, _MAPS[name](model, texts, words.pad_id), config), dataset).miou, 4)


@dataclass(frozen=True)
class _Labels:
    labels: np.ndarray


@dataclass(frozen=True)
class _Named:
    """Segmentation as `evaluate` expects it: labels from score maps, refined along edges as vilseg's are."""

    classes: tuple[str, ...]
    scores: Callable[[Tensor], Tensor]
    """Images (B, 3, H, W) -> (B, C, h, w)."""
    config: RunConfig

    def batch(self, images: list[np.ndarray], /) -> Sequence[Any]:
        pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 255
        with torch.inference_mode():
            maps = self.scores(_normalised(pixels)).softmax(1)
            return [_Labels(self._labels(scores, image)) for scores, image in zip(maps, pixels, strict=True)]

    def _labels(self, scores_Chw: Tensor, image_3HW: Tensor) -> np.ndarray:
        refined = refine(scores_Chw, image_3HW, self.config.segmentation.refinement)
        size = image_3HW.shape[1:]
        large_AHW = F.interpolate(refined.scores_AHW[None], size, mode="bilinear", align_corners=False)[0]
        return refined.classes_A[large_AHW.argmax(0)].numpy()


def _normalised(pixels: Tensor) -> Tensor:
    return (pixels - _MEAN) / _DEVIATION


def _with_end(tokens_BT: Tensor, pad: int) -> Tensor:
    """Both read a text at its end, so there must be a token there: one more id than the tokenizer has, after the last word."""
    end = torch.full((len(tokens_BT), 1), pad)
    longer = torch.cat([tokens_BT, end], 1)
    lengths = (longer != pad).sum(1, keepdim=True)
    return longer.scatter(1, lengths, _END)


_END = 8_192
"""Above all ids of the tokenizer; both models take the highest id, or this one, for the end of a text."""
_TEXT = {
    "vocab_size": _END + 1,
    "hidden_size": 128,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "eos_token_id": _END,
    "bos_token_id": None,
}


def _clip(size: int, words: Any) -> torch.nn.Module:
    from transformers import CLIPConfig, CLIPModel

    vision = {
        "hidden_size": 128,
        "intermediate_size": 512,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "image_size": size,
        "patch_size": 4,
    }
    text = {**_TEXT, "pad_token_id": words.pad_id}
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=128))


def _clip_map(model: Any, texts_CT: Tensor, pad: int) -> Callable[[Tensor], Tensor]:
    with torch.inference_mode():
        names_CD = _unit(
            model.text_projection(model.text_model(texts_CT, attention_mask=texts_CT != pad).pooler_output)
        )

    def scores(pixels: Tensor) -> Tensor:
        tokens = model.vision_model(pixels).last_hidden_state[:, 1:]
        patches_BND = _unit(model.visual_projection(model.vision_model.post_layernorm(tokens)))
        side = math.isqrt(patches_BND.shape[1])
        return model.logit_scale.exp() * (patches_BND @ names_CD.T).transpose(1, 2).unflatten(2, (side, side))

    return scores


def _group_vit(size: int, words: Any) -> torch.nn.Module:
    from transformers import GroupViTConfig, GroupViTModel

    vision = {
        "hidden_size": 128,
        "intermediate_size": 512,
        "depths": [3, 2, 1],
        "num_hidden_layers": 6,
        "num_group_tokens": [32, 8, 0],
        "num_output_groups": [32, 8, 0],
        "num_attention_heads": 4,
        "image_size": size,
        "patch_size": 4,
        "assign_mlp_ratio": [0.5, 4],
    }
    text = {**_TEXT, "pad_token_id": words.pad_id}
    config = GroupViTConfig(text_config=text, vision_config=vision, projection_dim=128, projection_intermediate_dim=256)
    return GroupViTModel(config)


def _group_vit_map(model: Any, texts_CT: Tensor, pad: int) -> Callable[[Tensor], Tensor]:
    def scores(pixels: Tensor) -> Tensor:
        found = model(input_ids=texts_CT, attention_mask=texts_CT != pad, pixel_values=pixels, output_segmentation=True)
        return found.segmentation_logits

    return scores


def _unit(x: Tensor) -> Tensor:
    return F.normalize(x, dim=-1)


_MODELS = {GROUP_VIT: _group_vit, CLIP: _clip}
_MAPS = {GROUP_VIT: _group_vit_map, CLIP: _clip_map}
