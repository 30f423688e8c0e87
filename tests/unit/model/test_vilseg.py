"""The whole model: unit embeddings, frozen towers, and the folder that brings it back bit by bit."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPConfig, CLIPModel

from vilseg.config import SegmentationConfig
from vilseg.errors import ModelError
from vilseg.model import ViLSeg
from vilseg.text.tokenizer import train_tokenizer

Make = Callable[..., ViLSeg]
TEXTS = ["a dog", "grass", "two cats on a sofa"]
VIT = {
    "architecture": "vit",
    "sizes": {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "image_size": 32,
        "patch_size": 8,
    },
}
SMALL_TEXT = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}


def pictures(*size: int) -> Tensor:
    return torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(1))


def embeddings(model: ViLSeg) -> list[Tensor]:
    with torch.no_grad():
        image = model.encode_image(pictures(32, 48))
        return [image.pooled, image.patches, model.assignments(pictures(32, 48)), model.encode_text(TEXTS), model.scale]


@pytest.mark.parametrize("image_encoder", [{"sizes": {"width": 16, "depth": 1}}, VIT])
def test_embeddings_have_unit_length_and_assignments_sum_to_one(
    make_model: Make, image_encoder: dict[str, Any]
) -> None:
    model = make_model(image_encoder=image_encoder)
    grid = (4, 6) if image_encoder is VIT else (8, 12)
    pooled, patches, assignments, texts, _ = embeddings(model)
    assert pooled.shape == (2, 8)
    assert patches.shape == (2, grid[0] * grid[1], 8)
    assert texts.shape == (3, 8)
    for vectors in (pooled, patches, texts):
        np.testing.assert_allclose(vectors.norm(dim=-1), 1, atol=1e-6)
    assert assignments.shape == (2, 5, *grid)
    np.testing.assert_allclose(assignments.sum(1), 1, atol=1e-6)
    assert (assignments >= 0).all()


def test_the_identity_projection_keeps_the_text_space(make_model: Make) -> None:
    model = make_model(text_encoder={"sizes": SMALL_TEXT, "projection": "identity"}, embedding_dim=8)
    assert model.embedding_dim == 16, "the text model's own width, whatever embedding_dim says"
    with torch.no_grad():
        features = model.text_features(model.text_encoder.tokenize(TEXTS))
        expected = features / features.norm(dim=-1, keepdim=True)
        np.testing.assert_allclose(model.encode_text(TEXTS), expected, atol=1e-6)


def test_texts_are_embedded_alike_as_strings_and_as_token_rows(make_model: Make) -> None:
    model = make_model()
    with torch.no_grad():
        np.testing.assert_array_equal(model.encode_text(TEXTS), model.encode_text(model.text_encoder.tokenize(TEXTS)))


def test_the_inverse_temperature_is_capped(make_model: Make) -> None:
    model = make_model()
    assert model.scale.item() == pytest.approx(1 / 0.07, rel=1e-6)
    with torch.no_grad():
        model.logit_scale.fill_(20.0)
    assert model.scale.item() == pytest.approx(100)


def test_frozen_towers_stay_as_they_are(make_model: Make) -> None:
    image = {"sizes": {"width": 16, "depth": 1}, "frozen": True}
    model = make_model(image_encoder=image, text_encoder={"sizes": SMALL_TEXT, "frozen": True}).train()
    assert model.training
    assert model.clustering_head.training
    assert not any(module.training for tower in (model.image_encoder, model.text_encoder) for module in tower.modules())
    frozen = [*model.image_encoder.parameters(), *model.text_encoder.parameters()]
    before = [parameter.clone() for parameter in frozen]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    image_embeddings = model.encode_image(pictures(16, 16))
    (image_embeddings.pooled.sum() + image_embeddings.patches.sum() + model.encode_text(TEXTS).sum()).backward()
    optimizer.step()
    assert all(parameter.grad is None for parameter in frozen)
    assert all(torch.equal(old, new) for old, new in zip(before, frozen, strict=True))
    assert model.image_projection.weight.grad is not None


def test_trained_towers_follow_the_mode_and_get_gradients(make_model: Make) -> None:
    model = make_model().train()
    assert model.image_encoder.training
    assert model.text_encoder.training
    image_embeddings = model.encode_image(pictures(16, 16))
    (image_embeddings.patches[:, 0].sum() + model.encode_text(TEXTS).sum()).backward()
    assert all(parameter.grad is not None for parameter in model.image_encoder.parameters())


# ------------------------------------------------------------------------------------------------- the model folder


@pytest.mark.parametrize("image_encoder", [{"sizes": {"width": 16, "depth": 1}}, VIT])
def test_a_saved_model_comes_back_bit_by_bit(tmp_path: Path, make_model: Make, image_encoder: dict[str, Any]) -> None:
    model = make_model(image_encoder=image_encoder, text_encoder={"sizes": SMALL_TEXT, "pooling": "first"})
    model.segmentation = SegmentationConfig(input_size=96, prompts=["a {} in a scene"])
    model.caption_mean.copy_(torch.arange(8.0))
    model.save_pretrained(str(tmp_path / "model"), card="# what it is\n")
    again = ViLSeg.from_pretrained(str(tmp_path / "model"))
    assert not again.training
    assert again.config == model.config
    assert again.segmentation == model.segmentation
    assert torch.equal(again.caption_mean, model.caption_mean)
    for old, new in zip(embeddings(model), embeddings(again), strict=True):
        np.testing.assert_array_equal(old, new)


def test_the_folder_holds_no_pickle(tmp_path: Path, make_model: Make) -> None:
    make_model().save_pretrained(str(tmp_path), card="# what it is\n")
    names = {path.name for path in tmp_path.rglob("*")}
    assert {"config.json", "model.safetensors", "README.md", "tokenizer.json"} <= names
    assert {Path(name).suffix for name in names} <= {".json", ".safetensors", ".md", ".txt", ".jinja"}
    assert (tmp_path / "README.md").read_text() == "# what it is\n"


def clip_checkpoint(folder: Path) -> None:
    torch.manual_seed(0)
    tokenizer = train_tokenizer(TEXTS, 100)
    text = {**SMALL_TEXT, "vocab_size": len(tokenizer), "max_position_embeddings": 20, "eos_token_id": 3}
    config = CLIPConfig(text_config=text, vision_config=VIT["sizes"])
    CLIPModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def test_a_model_from_checkpoints_does_not_need_them_any_more(tmp_path: Path, make_model: Make) -> None:
    checkpoint = tmp_path / "clip"
    clip_checkpoint(checkpoint)
    towers = {"checkpoint": str(checkpoint)}
    model = make_model(image_encoder=towers, text_encoder={**towers, "pooling": "pooler"})
    model.save_pretrained(str(tmp_path / "model"))
    checkpoint.rename(tmp_path / "elsewhere")
    again = ViLSeg.from_pretrained(str(tmp_path / "model"))
    for old, new in zip(embeddings(model), embeddings(again), strict=True):
        np.testing.assert_array_equal(old, new)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def edit_config(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    tree = json.loads((folder / "config.json").read_text())
    change(tree)
    (folder / "config.json").write_text(json.dumps(tree))


def drop_a_weight(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["logit_scale"]
    save_file(weights, folder / "model.safetensors")


DAMAGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "is damaged.*model.safetensors"),
    "half the weights": (lambda folder: truncate(folder / "model.safetensors"), "is damaged"),
    "no tokenizer": (lambda folder: [p.unlink() for p in folder.glob("tokenizer*")] and None, "is damaged.*tokenizer"),
    "half a tokenizer": (lambda folder: truncate(folder / "tokenizer.json"), "is damaged.*tokenizer"),
    "no config": (lambda folder: (folder / "config.json").unlink(), "is not a model folder: it has no config.json"),
    "half a config": (lambda folder: truncate(folder / "config.json"), "is not a vilseg model folder"),
    "a list": (lambda folder: (folder / "config.json").write_text("[1]") and None, "is not a vilseg model folder"),
    "no towers": (lambda folder: edit_config(folder, lambda t: t.pop("text_encoder")), "is not a vilseg model folder"),
    "a foreign model": (
        lambda folder: (folder / "config.json").write_text('{"model_type": "vit"}') and None,
        "is not a vilseg model folder",
    ),
    "a later format": (lambda folder: edit_config(folder, lambda t: t.update(format=99)), "format 99"),
    "other sizes": (
        lambda folder: edit_config(folder, lambda t: t["model"].update(clusters=7)),
        "weights in .* do not fit its config.json.*clustering_head",
    ),
    "a weight short": (drop_a_weight, "weights in .* do not fit its config.json.*logit_scale"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_or_foreign_folder_is_told_in_a_sentence(tmp_path: Path, make_model: Make, damage: str) -> None:
    folder = tmp_path / "model"
    make_model().save_pretrained(str(folder))
    change, words = DAMAGE[damage]
    change(folder)
    with pytest.raises(ModelError, match=words) as caught:
        ViLSeg.from_pretrained(str(folder))
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("place", ["./missing", "/nowhere/at/all", "runs/demo/model", "missing"])
def test_a_missing_folder_is_told(place: str) -> None:
    with pytest.raises(ModelError, match=f"there is no model folder at {place}"):
        ViLSeg.from_pretrained(place)
