"""Attentions under which patches look at those like themselves, against loops over heads and tokens of the original's weights."""

from __future__ import annotations

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.unit import checkpoints
from tests.unit.checkpoints import CONTRASTIVE, MEAN, PATCH, SIDE, STD
from vilseg import Segmenter
from vilseg.config import ModelConfig, RunConfig, SegmentationConfig
from vilseg.errors import ConfigError
from vilseg.model import ImageFeatures, ViLSeg
from vilseg.model.image_encoder import IMAGENET_MEAN, IMAGENET_STD, build_image_encoder
from vilseg.model.serialization import read_segmentation_config
from vilseg.model.shared_weights import join_weights, split_weights

Make = Callable[..., ViLSeg]
ATTENTIONS = ("sclip", "naclip")
SIZES = [(SIDE, SIDE), (48, SIDE)]
HEADS = 2


def pictures(*size: int) -> Tensor:
    return torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(1))


def normalised(images: Tensor, mean: Any, std: Any) -> Tensor:
    return (images - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)


# ------------------------------------------------------------------------------------------------- the reference


def softmax(scores: list[float]) -> list[float]:
    powers = [math.exp(score - max(scores)) for score in scores]
    return [power / sum(powers) for power in powers]


def attend(attention: str, tokens: Tensor, grid: tuple[int, int], weights: dict[str, tuple[Tensor, Tensor]]) -> Tensor:
    """The formula of the attention for one picture, head by head and token by token. Shape: (L, F) -> same."""
    q, k, v = ((tokens @ weights[name][0].T + weights[name][1]).numpy() for name in "qkv")
    count, width = tokens.shape
    head_width = width // HEADS
    prefix = count - grid[0] * grid[1]
    heads = np.zeros((count, width))
    for head in range(HEADS):
        part = slice(head * head_width, (head + 1) * head_width)
        for i in range(count):
            like_queries, like_keys = [], []
            for j in range(count):
                like_queries.append(float(q[i, part] @ q[j, part]) / math.sqrt(head_width))
                score = float(k[i, part] @ k[j, part]) / math.sqrt(head_width)
                if attention == "naclip" and i >= prefix and j >= prefix:
                    (y, x), (other_y, other_x) = (divmod(place - prefix, grid[1]) for place in (i, j))
                    score += math.exp(-((y - other_y) ** 2 + (x - other_x) ** 2) / (2 * 5.0**2))
                like_keys.append(score)
            row = softmax(like_keys)
            if attention == "sclip":
                row = [one + other for one, other in zip(row, softmax(like_queries), strict=True)]
            for j in range(count):
                heads[i, part] += row[j] * v[j, part]
    return torch.from_numpy(heads) @ weights["o"][0].T + weights["o"][1]


def parts_of(tower: Any) -> dict[str, Any]:
    """The last layer of a tower of transformers, by the names that its architecture has for its parts."""
    kind = tower.config.model_type
    if kind == "vit":
        layer = tower.layers[-1]
        before, attention, after = layer.layernorm_before, layer.attention, layer.layernorm_after
    elif kind.startswith("dinov2"):
        layer = tower.encoder.layer[-1]
        before, attention, after = layer.norm1, layer.attention, layer.norm2
    else:
        layer = tower.encoder.layers[-1]
        before, attention, after = layer.layer_norm1, layer.self_attn, layer.layer_norm2
    out = attention.o_proj if kind == "vit" or kind.startswith("dinov2") else attention.out_proj
    maps = {"q": attention.q_proj, "k": attention.k_proj, "v": attention.v_proj, "o": out}
    scales = (layer.layer_scale1.lambda1, layer.layer_scale2.lambda1) if kind.startswith("dinov2") else (1, 1)
    last = {"clip_vision_model": nn.Identity(), "vit": getattr(tower, "layernorm", None)}
    return {
        "layer": layer,
        "before": before,
        "after": after,
        "mlp": layer.mlp,
        "weights": {name: (linear.weight.double(), linear.bias.double()) for name, linear in maps.items()},
        "scales": scales,
        "last": last.get(kind) or (tower.layernorm if kind.startswith("dinov2") else tower.post_layernorm),
    }


@torch.no_grad()
def last_hidden_state(attention: str, tower: Any, seen: dict[str, Any], grid: tuple[int, int]) -> Tensor:
    """Compute features with another attention in the last layer. Shape: -> (B, T, F)."""
    parts, caught = parts_of(tower), []
    hook = parts["layer"].register_forward_pre_hook(
        lambda layer, args, kwargs: caught.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
    )
    tower(**seen)
    hook.remove()
    made = []
    for x in caught[0]:
        added = attend(attention, parts["before"](x).double(), grid, parts["weights"]).float() * parts["scales"][0]
        if attention == "sclip":
            x = x + added
            added = x + parts["mlp"](parts["after"](x)) * parts["scales"][1]
        made.append(parts["last"](added))
    return torch.stack(made)


@torch.no_grad()
def embedded(kind: str, original: Any, tokens: Tensor) -> Tensor:
    """Patches in the space of the texts, at unit length."""
    if kind == "clip":
        patches = original.visual_projection(original.vision_model.post_layernorm(tokens[:, 1:]))
    else:
        patches = torch.stack([original.vision_model.head(one.unsqueeze(1)) for one in tokens])
    return F.normalize(patches, dim=-1)


def seen_by(kind: str, images: Tensor) -> dict[str, Any]:
    pixels = normalised(images, MEAN[kind], STD[kind])
    if kind != "siglip2":
        return {"pixel_values": pixels, "interpolate_pos_encoding": True}
    h, w = images.shape[2] // PATCH, images.shape[3] // PATCH
    cells = pixels.unfold(2, PATCH, PATCH).unfold(3, PATCH, PATCH)  # (B, 3, h, w, y, x)
    return {
        "pixel_values": cells.permute(0, 2, 3, 4, 5, 1).reshape(len(images), h * w, -1),
        "pixel_attention_mask": torch.ones(len(images), h * w, dtype=torch.long),
        "spatial_shapes": torch.tensor([[h, w]] * len(images)),
    }


# ------------------------------------------------------------------------------------------------------ patches


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("kind", CONTRASTIVE)
@pytest.mark.parametrize("size", SIZES)
def test_patches_of_a_contrastive_folder_follow_the_formula(
    tmp_path: Path, kind: str, attention: Any, size: tuple[int, int]
) -> None:
    original: Any = checkpoints.contrastive(kind, tmp_path)
    images, grid = pictures(*size), (size[0] // PATCH, size[1] // PATCH)
    tokens = last_hidden_state(attention, original.vision_model, seen_by(kind, images), grid)
    model = ViLSeg.from_pretrained(str(tmp_path))
    with torch.no_grad():
        features, patches = model.dense_features(images, attention)
        found = model.embed_patches(features._replace(patches=patches))
    assert features.grid == grid
    np.testing.assert_allclose(found, embedded(kind, original, tokens), atol=1e-5)


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("kind", ["dinov2", "dinov2_with_registers", "vit", "clip", "siglip"])
def test_patches_of_a_vision_checkpoint_follow_the_formula(tmp_path: Path, kind: str, attention: Any) -> None:
    size = (SIDE, 48)
    if kind in CONTRASTIVE:
        tower: Any = checkpoints.contrastive(kind, tmp_path).vision_model
        seen = seen_by(kind, pictures(*size))
    else:
        tower = checkpoints.vision(kind, tmp_path)
        seen = {"pixel_values": normalised(pictures(*size), IMAGENET_MEAN, IMAGENET_STD)}
        seen |= {"interpolate_pos_encoding": True} if kind == "vit" else {}
    grid = (size[0] // PATCH, size[1] // PATCH)
    expected = last_hidden_state(attention, tower, seen, grid)[:, -grid[0] * grid[1] :]
    config = ModelConfig.model_validate({"image_encoder": {"checkpoint": str(tmp_path)}}).image_encoder
    encoder: Any = build_image_encoder(config).eval()
    with torch.no_grad():
        features, found = encoder.correlated(pictures(*size), attention)
        plain = encoder(pictures(*size))
    np.testing.assert_allclose(found, expected, atol=1e-5)
    np.testing.assert_array_equal(features.patches, plain.patches)
    assert (found - features.patches).abs().max() > 0.01, "it is another attention"


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("kind", CONTRASTIVE)
def test_the_image_as_a_whole_and_its_clusters_stay(tmp_path: Path, kind: str, attention: Any) -> None:
    checkpoints.contrastive(kind, tmp_path)
    model = ViLSeg.from_pretrained(str(tmp_path))
    with torch.no_grad():
        plain = model.image_features(pictures(48, 64))
        features, _ = model.dense_features(pictures(48, 64), attention)
    np.testing.assert_array_equal(features.patches, plain.patches)
    np.testing.assert_array_equal(features.pooled, plain.pooled)


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_half_precision_only_rounds(tmp_path: Path, attention: Any) -> None:
    checkpoints.contrastive("clip", tmp_path)
    model = ViLSeg.from_pretrained(str(tmp_path))
    with torch.no_grad():
        _, exact = model.dense_features(pictures(48, 64), attention)
        with torch.autocast("cpu", torch.bfloat16):
            _, rounded = model.dense_features(pictures(48, 64), attention)
    np.testing.assert_allclose(rounded.float(), exact, atol=0.02 * float(exact.abs().max()))


# --------------------------------------------------------------------------------------------- the segmenter


def test_a_segmenter_names_the_patches_that_the_settings_ask_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vilseg.segmentation.dense_features.has_bfloat16_units", lambda device: False)
    original: Any = checkpoints.contrastive("clip", tmp_path)
    model = ViLSeg.from_pretrained(str(tmp_path))
    picture = np.random.default_rng(0).integers(0, 256, (SIDE, 48, 3), dtype=np.uint8)
    images = torch.from_numpy(picture).permute(2, 0, 1)[None] / 255
    clusters = []
    for attention in ATTENTIONS:
        model.segmentation = model.segmentation.replace(attention=attention)
        look = Segmenter(model, classes=["dog", "cat"], device="cpu").encode([picture])[0]
        grid = (SIDE // PATCH, 48 // PATCH)
        tokens = last_hidden_state(attention, original.vision_model, seen_by("clip", images), grid)
        np.testing.assert_allclose(look.patches_ND, embedded("clip", original, tokens)[0], atol=1e-5)
        clusters.append(look.assignments_NK)
    np.testing.assert_array_equal(*clusters)
    with torch.no_grad():
        expected = model.assignments(images)[0].flatten(1).T
    np.testing.assert_allclose(
        clusters[0], expected, atol=1e-6, err_msg="the head knows patches of the plain attention"
    )


def test_a_segmenter_that_was_used_can_be_sent_to_others(tmp_path: Path) -> None:
    checkpoints.contrastive("clip", tmp_path)
    segmenter = Segmenter(ViLSeg.from_pretrained(str(tmp_path)), classes=["dog", "cat"], device="cpu")
    picture = np.random.default_rng(0).integers(0, 256, (40, 56, 3), dtype=np.uint8)
    expected = segmenter(picture)
    for again in (join_weights(split_weights(segmenter)), segmenter):
        np.testing.assert_array_equal(again(picture).scores, expected.scores)


def test_threads_that_share_a_model_do_not_meet(tmp_path: Path) -> None:
    checkpoints.contrastive("clip", tmp_path)
    model = ViLSeg.from_pretrained(str(tmp_path))
    images = [pictures(8 * rows, 48) for rows in range(2, 10)]

    def patches(one: Tensor) -> Tensor:
        with torch.inference_mode():
            return model.dense_features(one, "naclip")[1]

    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(patches, images))
    for one, found in zip(images, together, strict=True):
        np.testing.assert_allclose(found, patches(one), atol=1e-6)


@pytest.mark.parametrize(("kind", "attention"), [("clip", "naclip"), ("siglip", "plain"), ("siglip2", "plain")])
def test_a_folder_without_training_brings_its_attention(tmp_path: Path, kind: str, attention: str) -> None:
    checkpoints.contrastive(kind, tmp_path / "original")
    model = ViLSeg.from_pretrained(str(tmp_path / "original"))
    assert model.segmentation.attention == attention
    assert read_segmentation_config(str(tmp_path / "original")).attention == attention
    model.save_pretrained(str(tmp_path / "ours"))
    assert ViLSeg.from_pretrained(str(tmp_path / "ours")).segmentation == model.segmentation


def test_what_is_trained_keeps_its_own_attention(tmp_path: Path) -> None:
    checkpoints.contrastive("clip", tmp_path)
    assert SegmentationConfig().attention == "plain"
    begun = ViLSeg.from_config(ModelConfig(init=str(tmp_path)), segmentation=RunConfig().segmentation)
    assert begun.segmentation.attention == "plain"


def test_a_model_of_before_the_setting_is_read(tmp_path: Path, make_model: Make) -> None:
    make_model().save_pretrained(str(tmp_path))
    config = tmp_path / "config.json"
    assert '"attention": "plain",' in config.read_text()
    config.write_text(config.read_text().replace('"attention": "plain",', ""))
    assert ViLSeg.from_pretrained(str(tmp_path)).segmentation.attention == "plain"


# ----------------------------------------------------------------------------------------------- what cannot be


class Plain(nn.Module):
    """An encoder of somebody else's."""

    def __init__(self) -> None:
        super().__init__()
        self.num_features = 16
        self.patches = nn.Conv2d(3, 16, 4, 4)

    def forward(self, images: Tensor) -> ImageFeatures:
        x = self.patches(images)
        return ImageFeatures(x.flatten(2).transpose(1, 2), None, (x.shape[2], x.shape[3]))


class Able(Plain):
    """One that has an attention to replace, or says so."""

    can_correlate = True

    def correlated(self, images: Tensor, attention: str) -> tuple[ImageFeatures, Tensor]:
        features = self(images)
        return features, -features.patches


CONVNEXT = {"architecture": "convnext", "sizes": {"hidden_sizes": [4, 8, 8, 16], "depths": [1, 1, 1, 1]}}


@pytest.mark.parametrize(
    ("encoder", "kind"),
    [
        ({"sizes": {"width": 16, "depth": 1}}, "local_conv"),
        (CONVNEXT, "convnext"),
        ({"factory": f"{__name__}:Plain"}, f"{__name__}:Plain"),
    ],
)
def test_an_encoder_without_such_a_block_is_told_in_a_sentence(
    make_model: Make, encoder: dict[str, Any], kind: str
) -> None:
    model = make_model(image_encoder=encoder)
    settings = SegmentationConfig(attention="sclip")
    words = (
        rf"^segmentation.attention is 'sclip', but the image encoder \({kind}\) .* set segmentation.attention=plain$"
    )
    with pytest.raises(ConfigError, match=words):
        ViLSeg(model.config, model.image_encoder, model.text_encoder, segmentation=settings)
    model.segmentation = settings
    with pytest.raises(ConfigError, match=words):
        Segmenter(model, classes=["dog"], device="cpu")


def test_an_encoder_of_somebody_elses_may_have_one(make_model: Make) -> None:
    model = make_model(image_encoder={"factory": f"{__name__}:Able"})
    model.segmentation = SegmentationConfig(attention="naclip")
    with torch.no_grad():
        features, patches = model.dense_features(pictures(16, 16), "naclip")
    np.testing.assert_array_equal(patches, -features.patches)
    assert Segmenter(model, classes=["dog"], device="cpu")(np.zeros((20, 30, 3), np.uint8)).labels.shape == (20, 30)


def test_a_word_that_is_no_attention_is_told() -> None:
    with pytest.raises(ConfigError, match=r"'segmentation\.attention': input should be 'plain', 'sclip' or 'naclip'"):
        RunConfig.load(None, ["segmentation.attention=clearclip"])
