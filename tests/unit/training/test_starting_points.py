"""Runs that start from pretrained models, of Hugging Face or of vilseg: their embeddings are kept, and they train."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoImageProcessor, PreTrainedModel

from tests.unit import checkpoints
from tests.unit.checkpoints import CONTRASTIVE, MEAN, PATCH, SIDE, STD
from vilseg import Segmenter, storage
from vilseg.config import ModelConfig, RunConfig, SegmentationConfig
from vilseg.data.batch_reader import BatchReader, decode_to_canvas
from vilseg.data.image_decoding import crop_to_square
from vilseg.data.sampler import PairSampler
from vilseg.data.shards import write_tar
from vilseg.data.synthetic import scenes
from vilseg.errors import ConfigError, ModelError
from vilseg.model import ViLSeg
from vilseg.model.image_encoder import build_image_encoder
from vilseg.model.serialization import read_segmentation_config
from vilseg.text.tokenizer import load_tokenizer
from vilseg.training import run_results, run_setup
from vilseg.training.run_dir import RunDirectory

Make = Callable[..., ViLSeg]
TEXTS = ["a dog", "Two cats, on a sofa!", "grass"]


def random_images(*size: int) -> Tensor:
    return torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(1))


def normalised(kind: str, images: Tensor) -> Tensor:
    return (images - torch.tensor(MEAN[kind]).view(3, 1, 1)) / torch.tensor(STD[kind]).view(3, 1, 1)


def cut_into_patches(pixels: Tensor) -> dict[str, Tensor]:
    """Return the inputs of SigLIP 2, patches of the pixels, by an independent loop."""
    h, w = pixels.shape[2] // PATCH, pixels.shape[3] // PATCH
    rows = []
    for image in pixels:
        for y in range(h):
            for x in range(w):
                patch = image[:, y * PATCH : (y + 1) * PATCH, x * PATCH : (x + 1) * PATCH]
                rows.append(patch.permute(1, 2, 0).flatten())
    return {
        "pixel_values": torch.stack(rows).unflatten(0, (len(pixels), h * w)),
        "pixel_attention_mask": torch.ones(len(pixels), h * w, dtype=torch.long),
        "spatial_shapes": torch.tensor([[h, w]] * len(pixels)),
    }


@torch.no_grad()
def images_of_original(kind: str, original: Any, seen: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Return the original model's embeddings of images and of patches, unit length."""
    options = {} if kind == "siglip2" else {"interpolate_pos_encoding": True}
    whole = original.get_image_features(**seen, **options).pooler_output
    tokens = original.vision_model(**seen, **options).last_hidden_state
    if kind == "clip":
        patches = original.visual_projection(original.vision_model.post_layernorm(tokens[:, 1:]))
    else:
        patches = torch.stack([original.vision_model.head(one.unsqueeze(1)) for one in tokens])
    return F.normalize(whole, dim=-1), F.normalize(patches, dim=-1)


@torch.no_grad()
def texts_of_original(kind: str, original: Any, folder: Path) -> Tensor:
    tokenizer = load_tokenizer(str(folder))
    if kind == "clip":
        tokens = dict(tokenizer(TEXTS, padding=True, return_tensors="pt"))
    else:  # as Hugging Face's own example has it
        rows = tokenizer(TEXTS, padding="max_length", max_length=20, truncation=True, return_tensors="pt")
        tokens = {"input_ids": rows["input_ids"]}
    return F.normalize(original.get_text_features(**tokens).pooler_output, dim=-1)


def from_init(folder: Path, **parts: Any) -> ViLSeg:
    torch.manual_seed(0)
    return ViLSeg.from_config(ModelConfig.model_validate({"init": str(folder), **parts})).eval()


# ---------------------------------------------------------------------------------- CLIP, SigLIP and SigLIP 2


@pytest.mark.parametrize(("kind", "kept"), [("clip", 100.0), ("siglip", 117.0), ("siglip2", 117.0)])
def test_the_scale_of_a_trained_siglip_is_not_cut(tmp_path: Path, kind: str, kept: float) -> None:
    original = checkpoints.contrastive(kind, tmp_path)
    with torch.no_grad():
        original.logit_scale.fill_(math.log(117.0))  # as Google's are
    original.save_pretrained(tmp_path)
    assert from_init(tmp_path).scale.item() == pytest.approx(kept, rel=1e-5)


@pytest.mark.parametrize("kind", CONTRASTIVE)
@pytest.mark.parametrize("size", [(SIDE, SIDE), (48, 64)])
def test_embeddings_are_those_of_the_original(tmp_path: Path, kind: str, size: tuple[int, int]) -> None:
    original = checkpoints.contrastive(kind, tmp_path)
    model, images = from_init(tmp_path), random_images(*size)
    pixels = normalised(kind, images)
    seen = cut_into_patches(pixels) if kind == "siglip2" else {"pixel_values": pixels}
    whole, patches = images_of_original(kind, original, seen)
    with torch.no_grad():
        found = model.encode_image(images)
        np.testing.assert_allclose(found.pooled, whole, atol=1e-5)
        np.testing.assert_allclose(found.patches, patches, atol=1e-5)
        np.testing.assert_allclose(model.encode_text(TEXTS), texts_of_original(kind, original, tmp_path), atol=1e-5)
    assert found.grid == (size[0] // PATCH, size[1] // PATCH)
    assert model.scale.item() == pytest.approx(original.logit_scale.exp().item(), rel=1e-5)
    bias = None if kind == "clip" else pytest.approx(original.logit_bias.item())
    assert (model.logit_bias.item() if model.logit_bias is not None else None) == bias


@pytest.mark.parametrize("kind", CONTRASTIVE)
def test_both_preparations_give_the_same_embeddings_of_an_image(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vilseg.segmentation.dense_features.has_bfloat16_units", lambda device: False)
    original = checkpoints.contrastive(kind, tmp_path)
    coarse = np.random.default_rng(0).integers(0, 256, (5, 5, 3), dtype=np.uint8)
    image = Image.fromarray(coarse).resize((48, 48), Image.Resampling.BICUBIC)
    processor = AutoImageProcessor.from_pretrained(tmp_path)
    whole, patches = images_of_original(kind, original, dict(processor(images=image, return_tensors="pt")))

    model = ViLSeg.from_pretrained(str(tmp_path))
    model.segmentation = model.segmentation.replace(input_size=SIDE, attention="plain")
    resized = torch.from_numpy(crop_to_square(np.asarray(image), SIDE).copy()).permute(2, 0, 1)[None]
    with torch.no_grad():
        np.testing.assert_allclose(model.encode_image(resized / 255).pooled, whole, atol=1e-5)
    embeddings = Segmenter(model, classes=["dog", "cat"], device="cpu").encode([np.asarray(image)])[0]
    np.testing.assert_allclose(embeddings.patches_ND, patches[0], atol=1e-5)


@pytest.mark.parametrize("kind", CONTRASTIVE)
def test_saved_as_ours_they_need_the_original_no_more(tmp_path: Path, kind: str) -> None:
    checkpoints.contrastive(kind, tmp_path / "original")
    model = from_init(tmp_path / "original", clusters=7)
    model.save_pretrained(str(tmp_path / "ours"))
    (tmp_path / "original").rename(tmp_path / "elsewhere")
    again = ViLSeg.from_pretrained(str(tmp_path / "ours"))
    assert again.config == model.config
    assert again.config.init is None
    with torch.no_grad():
        for one, other in zip(
            model.encode_image(random_images(32, 48)), again.encode_image(random_images(32, 48)), strict=True
        ):
            np.testing.assert_array_equal(one, other)
        np.testing.assert_array_equal(model.encode_text(TEXTS), again.encode_text(TEXTS))
        np.testing.assert_array_equal(
            model.assignments(random_images(32, 32)), again.assignments(random_images(32, 32))
        )
    assert {name: value.tolist() for name, value in again.state_dict().items() if value.ndim == 0} == {
        name: value.tolist() for name, value in model.state_dict().items() if value.ndim == 0
    }


def test_a_clip_folder_can_be_segmented_with_as_it_is(tmp_path: Path) -> None:
    checkpoints.contrastive("clip", tmp_path)
    model = ViLSeg.from_pretrained(str(tmp_path))
    assert not model.training
    assert model.segmentation.region_weight == 0
    assert model.segmentation.input_size == SIDE, "the size that it was trained on"
    assert read_segmentation_config(str(tmp_path)) == model.segmentation
    result = Segmenter(model, classes=["dog", "cat"], device="cpu")(np.zeros((40, 56, 3), np.uint8))
    assert result.labels.shape == (40, 56)


def test_the_text_tower_of_siglip_reads_lower_case_without_punctuation(tmp_path: Path) -> None:
    checkpoints.contrastive("siglip", tmp_path)
    tokenizer = from_init(tmp_path).text_encoder.fixed_tokenizer()
    rows = tokenizer(["A  dog!", "a dog", "grass."])
    assert rows.shape == (3, 20)
    np.testing.assert_array_equal(rows[0], rows[1])
    assert rows[0].tolist() == [2, 3] + [0] * 18, "words, and the end of the text, which pads as well"


@pytest.mark.parametrize("kind", CONTRASTIVE)
def test_how_rows_are_cut_does_not_change_a_text(tmp_path: Path, kind: str) -> None:
    checkpoints.contrastive(kind, tmp_path)
    model = from_init(tmp_path)
    rows = model.text_encoder.tokenize(TEXTS)
    with torch.no_grad():
        trimmed = model.encode_text(model.text_encoder.trim(rows))
        np.testing.assert_allclose(trimmed, model.encode_text(rows), atol=1e-6)


def test_weights_in_half_precision_are_taken_in_single(tmp_path: Path) -> None:
    checkpoints.contrastive("clip", tmp_path).half().save_pretrained(tmp_path)
    model = from_init(tmp_path)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    towers = {"checkpoint": str(tmp_path)}
    model = ViLSeg.from_config(
        ModelConfig.model_validate({"image_encoder": towers, "text_encoder": {**towers, "pooling": "pooler"}})
    )
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


# ------------------------------------------------------------------------------------ vision models with any text


@pytest.mark.parametrize(("kind", "prefix"), [("vit", 1), ("dinov2", 1), ("dinov2_with_registers", 4)])
@pytest.mark.parametrize("size", [(SIDE, SIDE), (48, 64)])
def test_patches_of_a_vision_checkpoint_are_its_last_hidden_state(
    tmp_path: Path, kind: str, prefix: int, size: tuple[int, int]
) -> None:
    original: Any = checkpoints.vision(kind, tmp_path)
    encoder = build_image_encoder(
        ModelConfig.model_validate({"image_encoder": {"checkpoint": str(tmp_path)}}).image_encoder
    )
    mean, std = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1), torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    options = {"interpolate_pos_encoding": True} if kind == "vit" else {}
    with torch.no_grad():
        tokens = original(pixel_values=(random_images(*size) - mean) / std, **options).last_hidden_state
        features = encoder.eval()(random_images(*size))
    np.testing.assert_allclose(features.patches, tokens[:, prefix:], atol=1e-5)
    np.testing.assert_allclose(features.pooled, tokens[:, 0], atol=1e-5)


def test_a_checkpoint_may_lie_at_a_uri(tmp_path: Path) -> None:
    original: PreTrainedModel = checkpoints.vision("vit", tmp_path / "vit")
    checkpoints.bert(tmp_path / "bert")
    parts = {
        "image_encoder": {"checkpoint": f"file://{tmp_path}/vit"},
        "text_encoder": {"checkpoint": f"file://{tmp_path}/bert"},
    }
    model = ViLSeg.from_config(ModelConfig.model_validate(parts))
    expected = original.state_dict()["embeddings.cls_token"]
    np.testing.assert_array_equal(model.image_encoder.model.state_dict()["embeddings.cls_token"], expected)


@pytest.mark.parametrize("kind", ["vit", "dinov2"])
def test_a_head_that_is_none_is_told(tmp_path: Path, kind: str) -> None:
    checkpoints.vision(kind, tmp_path)
    part = {"checkpoint": str(tmp_path), "head": True}
    with pytest.raises(ConfigError, match=rf"model.image_encoder.head .*{kind} has none"):
        build_image_encoder(ModelConfig.model_validate({"image_encoder": part}).image_encoder)


# ---------------------------------------------------------------------------------------------- a model of ours


def test_a_model_of_ours_goes_on_with_all_it_has(tmp_path: Path, make_model: Make) -> None:
    before = make_model()
    with torch.no_grad():
        before.logit_scale.fill_(3.0)
        before.caption_mean.copy_(torch.arange(8.0))
        before.recorded_steps.fill_(70)
    before.save_pretrained(str(tmp_path))
    settings = SegmentationConfig(input_size=96)
    config = ModelConfig.model_validate({"init": str(tmp_path), "image_encoder": {"frozen": True}})
    model = ViLSeg.from_config(config, segmentation=settings)
    assert model.segmentation == settings
    assert model.config.clusters == 5
    assert model.config.image_encoder.frozen
    assert model.config.image_encoder.sizes == before.config.image_encoder.sizes
    assert not any(parameter.requires_grad for parameter in model.image_encoder.parameters())
    for name, value in before.state_dict().items():
        np.testing.assert_array_equal(model.state_dict()[name], value, err_msg=name)
    # What was frozen may be trained on.
    model.save_pretrained(str(tmp_path / "frozen"))
    thawed = ViLSeg.from_config(ModelConfig(init=str(tmp_path / "frozen")))
    assert all(parameter.requires_grad for parameter in thawed.parameters())
    assert thawed.training


def test_keys_that_say_what_the_model_is_anyway_are_no_contradiction(tmp_path: Path, make_model: Make) -> None:
    before = make_model()
    before.save_pretrained(str(tmp_path))
    again = ViLSeg.from_config(before.config.replace(init=str(tmp_path)))
    assert again.config == before.config


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ({"embedding_dim": 99}, "model.embedding_dim is 99, but model.init .* has 8"),
        ({"clusters": 7}, "model.clusters is 7, but .* has 5"),
        ({"image_encoder": {"checkpoint": "/models/clip"}}, "model.image_encoder.checkpoint is '/models/clip'"),
        ({"image_encoder": {"sizes": {"width": 32}}}, "model.image_encoder.sizes.width is 32, but .* has 16"),
        ({"image_encoder": {"sizes": {"kernel": 5}}}, "model.image_encoder.sizes.kernel is 5, but .* no such key"),
        ({"text_encoder": {"pooling": "first"}}, "model.text_encoder.pooling is 'first', but .* has 'mean'"),
    ],
)
def test_other_sizes_than_the_models_are_told(
    tmp_path: Path, make_model: Make, parts: dict[str, Any], words: str
) -> None:
    make_model().save_pretrained(str(tmp_path))
    with pytest.raises(ConfigError, match=words):
        from_init(tmp_path, **parts)


# -------------------------------------------------------------------------------------------- what cannot be taken


def drop_a_weight(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["visual_projection.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def pickle_the_weights(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def edit(folder: Path, name: str, **values: Any) -> None:
    tree = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps({**tree, **values}))


def drop_the_tokenizer(folder: Path) -> None:
    for path in folder.iterdir():
        if path.name not in ("config.json", "model.safetensors", "preprocessor_config.json"):
            path.unlink()


@pytest.mark.parametrize(
    ("kind", "change", "words"),
    [
        ("clip", drop_a_weight, "not whole: visual_projection.weight is missing"),
        ("clip", pickle_the_weights, "cannot be loaded"),
        ("clip", drop_the_tokenizer, "tokenizer"),
        ("clip", lambda folder: edit(folder, "config.json", model_type="vit"), "not a vilseg model folder"),
        ("siglip", lambda folder: (folder / "tokenizer.json").unlink(), "sentencepiece model alone; save it as"),
        ("clip", lambda folder: (folder / "config.json").unlink(), "has no config.json"),
    ],
)
def test_a_damaged_start_is_told_in_a_sentence(
    tmp_path: Path, kind: str, change: Callable[[Path], None], words: str
) -> None:
    checkpoints.contrastive(kind, tmp_path)
    change(tmp_path)
    with pytest.raises(ModelError, match=f"^model.init cannot be taken: .*{words}") as caught:
        from_init(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_siglip_whose_images_do_not_reach_the_texts_is_told(tmp_path: Path) -> None:
    checkpoints.contrastive("siglip", tmp_path)
    tree = json.loads((tmp_path / "config.json").read_text())
    tree["vision_config"]["vision_use_head"] = False
    (tmp_path / "config.json").write_text(json.dumps(tree))
    with pytest.raises(ModelError, match="no pooling head"):
        from_init(tmp_path)


def test_a_start_that_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"model.init cannot be taken: there is no model folder at .*/missing"):
        from_init(tmp_path / "missing")


# ----------------------------------------------------------------------------------------------------- training


def write_scenes(folder: Path) -> str:
    made = scenes.pairs(24, 0, SIDE)
    write_tar(f"{folder}/pairs/0.tar", [(p.key, p.image, "jpg", {"captions": list(p.captions)}) for p in made])
    return f"{folder}/pairs"


def starting_point(kind: str, folder: Path, make_model: Make) -> list[str]:
    """Write a checkpoint of this kind; return the configuration overrides of a run that starts from it."""
    if kind in CONTRASTIVE:
        checkpoints.contrastive(kind, folder / "start")
        return [f"model.init={folder}/start"]
    if kind == "ours":
        make_model().save_pretrained(f"{folder}/start")
        return [f"model.init={folder}/start"]
    checkpoints.vision(kind, folder / "vision")
    checkpoints.bert(folder / "text")
    paths = (f"model.image_encoder.checkpoint={folder}/vision", f"model.text_encoder.checkpoint={folder}/text")
    return [*paths, "model.embedding_dim=8"]


def run_config(folder: Path, *overrides: str) -> RunConfig:
    return RunConfig.load(
        None,
        [
            "name=r",
            f"data.source={folder}/pairs",
            f"trainer.storage={folder}/runs",
            f"data.canvas={SIDE}",
            f"views.global_size={SIDE}",
            "views.local_size=16",
            "loss.nouns.min_count=2",
            "loss.vision.prototypes=8",
            "loss.vision.hidden_dim=8",
            "optimizer.learning_rate=0.001",
            "optimizer.warmup_steps=1",
            "trainer.batch_size=8",
            "trainer.steps=3",
            "trainer.log_every=1",
            "trainer.precision=float32",
            *overrides,
        ],
    )


@pytest.mark.parametrize("kind", [*CONTRASTIVE, "vit", "dinov2", "dinov2_with_registers", "ours"])
def test_three_steps_of_training_from_each(tmp_path: Path, make_model: Make, kind: str) -> None:
    write_scenes(tmp_path)
    config = run_config(tmp_path, *starting_point(kind, tmp_path, make_model))
    folder = run_setup.open_run_directory(config, resume=False)
    prepared = run_setup.prepare(config, folder)
    trainer = run_setup.make_trainer(config, folder, prepared, torch.device("cpu"))
    reader = BatchReader(
        batch_size=8,
        workers=1,
        seed=0,
        decode=partial(decode_to_canvas, canvas=SIDE, max_pixels=10**6),
        tokenize=prepared.tokenizer,
        nouns=prepared.nouns,
    )
    chunks = PairSampler(prepared.shards, 8, 0).read_tasks(0, 3)
    reports: list[dict[str, float]] = []
    trainer.train(
        (batch for chunk in chunks for batch in reader.read(chunk)),
        on_report=reports.append,
        on_checkpoint=lambda: None,
    )
    assert [report["step"] for report in reports] == [1, 2, 3]
    assert all(np.isfinite(report["loss"]) for report in reports)
    initial = ViLSeg.from_pretrained(folder.initial).state_dict()
    trained = trainer.objective.model.eval()
    parts = ("image_encoder.", "text_encoder.", "image_projection.", "clustering_head.")
    moved = {name for name, value in trained.state_dict().items() if not torch.equal(initial[name], value)}
    assert all(any(name.startswith(part) for name in moved) for part in parts)
    run_results.save_trained_model(trained, config, folder, {})
    again = ViLSeg.from_pretrained(folder.model)
    with torch.no_grad():
        np.testing.assert_array_equal(
            again.encode_image(random_images(SIDE, SIDE)).patches,
            trained.encode_image(random_images(SIDE, SIDE)).patches,
        )
        np.testing.assert_array_equal(again.encode_text(TEXTS), trained.encode_text(TEXTS))


def begin(config: RunConfig) -> tuple[RunDirectory, ViLSeg]:
    """Prepare a run; return its directory and its initial model."""
    folder = run_setup.open_run_directory(config, resume=False)
    run_setup.prepare(config, folder)
    return folder, ViLSeg.from_pretrained(folder.initial)


def test_a_runs_first_model_is_the_start_itself(tmp_path: Path) -> None:
    write_scenes(tmp_path)
    original = checkpoints.contrastive("clip", tmp_path / "start")
    config = run_config(tmp_path, f"model.init={tmp_path}/start", "segmentation.input_size=64")
    folder, initial = begin(config)
    whole, _ = images_of_original("clip", original, {"pixel_values": normalised("clip", random_images(SIDE, SIDE))})
    with torch.no_grad():
        np.testing.assert_allclose(initial.encode_image(random_images(SIDE, SIDE)).pooled, whole, atol=1e-5)
    assert initial.scale.item() == pytest.approx(original.logit_scale.exp().item(), rel=1e-5)
    assert initial.segmentation == config.segmentation
    assert RunConfig.load(folder.config) == config


def test_a_sigmoid_start_keeps_the_sigmoid_loss(tmp_path: Path) -> None:
    write_scenes(tmp_path)
    original = checkpoints.contrastive("siglip", tmp_path / "start")
    config = run_config(tmp_path, f"model.init={tmp_path}/start", "loss.cross_modal.form=sigmoid")
    _, initial = begin(config)
    assert initial.scale.item() == pytest.approx(original.logit_scale.exp().item(), rel=1e-5)


def test_a_temperature_beside_a_start_is_told(tmp_path: Path, make_model: Make) -> None:
    write_scenes(tmp_path)
    config = run_config(tmp_path, *starting_point("ours", tmp_path, make_model), "loss.cross_modal.temperature=0.2")
    folder = run_setup.open_run_directory(config, resume=False)
    with pytest.raises(ConfigError, match=r"loss.cross_modal.temperature is 0.2, but model.init brings its own"):
        run_setup.prepare(config, folder)
    assert not storage.exists(folder.initial)
