"""ONNX files against the model that they were written from, and where an export may go."""

from __future__ import annotations

import functools
import importlib.util
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import AutoTokenizer

from cli.app import run
from tests.unit import checkpoints
from vilseg import Segmenter
from vilseg.config import ModelConfig, SegmentationConfig
from vilseg.errors import ModelError, StorageError, UserError
from vilseg.export.onnx_export import ExportResult, export_model
from vilseg.export.output_directory import check_target, output_folder
from vilseg.model import ImageFeatures, ViLSeg

TEXTS = ["a dog", "two cats on a sofa by the sea", ""]
DOCS = Path(__file__).parents[2] / "docs" / "export.md"
SMALL = {
    "text_encoder": {
        "sizes": {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32},
        "max_tokens": 12,
    },
    "embedding_dim": 8,
    "clusters": 5,
}


class Case(NamedTuple):
    model: ViLSeg
    folder: Path
    done: ExportResult
    about: dict[str, Any]

    def run(self, tower: str, batch: np.ndarray) -> list[np.ndarray]:
        session = onnxruntime.InferenceSession(str(self.folder / f"{tower}.onnx"), providers=["CPUExecutionProvider"])
        return session.run(None, {session.get_inputs()[0].name: batch})


def made(kind: str, folder: Path) -> ViLSeg:
    if kind in checkpoints.CONTRASTIVE:
        checkpoints.contrastive(kind, folder)
        return ViLSeg.from_pretrained(str(folder))
    encoder: dict[str, Any] = {"sizes": {"width": 16, "depth": 1}}
    if kind != "local_conv":
        checkpoints.vision(kind, folder)
        encoder = {"checkpoint": str(folder)}
    torch.manual_seed(0)
    config = ModelConfig.model_validate({**SMALL, "image_encoder": encoder})
    settings = SegmentationConfig(input_size=32, prompts=["a photo of a {}.", "{}"])
    return ViLSeg.from_config(config, ["a dog on the grass", "two cats and a sofa by the sea"], segmentation=settings)


def exported(kind: str, place: Path) -> Case:
    model = made(kind, place / "checkpoint")
    changed = {"image_mix": 0.3, "region_weight": 0.6, "calibration": 0.5, "center_text": True}
    model.segmentation = model.segmentation.replace(**changed)
    with torch.no_grad():
        spread = torch.randn(model.embedding_dim, model.embedding_dim, generator=torch.Generator().manual_seed(2)) / 8
        model.patch_covariance.copy_(spread @ spread.T)
        model.patch_mean.normal_(std=0.1)
        model.caption_mean.normal_(std=0.1)
    done = export_model(model, str(place / "onnx"), name=kind)
    return Case(model, place / "onnx", done, json.loads((place / "onnx" / "export.json").read_text()))


@pytest.fixture(scope="module")
def export_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Case]:
    """Each kind once: it takes seconds."""
    return functools.cache(lambda kind: exported(kind, tmp_path_factory.mktemp(kind)))


@pytest.fixture(params=["local_conv", "vit", "clip"])
def case(request: pytest.FixtureRequest, export_of: Callable[[str], Case]) -> Case:
    return export_of(request.param)


@pytest.fixture
def conv(export_of: Callable[[str], Case]) -> Case:
    return export_of("local_conv")


def check_images(case: Case, count: int, size: tuple[int, int]) -> None:
    images = torch.rand(count, 3, *size, generator=torch.Generator().manual_seed(count))
    pooled, patches, assignments = case.run("image", images.numpy())
    with torch.no_grad():
        expected = case.model.encode_image(images)
        features, named = case.model.dense_features(
            images, case.model.segmentation.attention
        )  # a CLIP folder's is naclip
        patches_BND = case.model.embed_patches(features._replace(patches=named))
        np.testing.assert_allclose(assignments, case.model.assignments(images), atol=1e-4)
    np.testing.assert_allclose(pooled, expected.pooled, atol=1e-4)
    h, w = expected.grid
    assert patches.shape == (count, case.model.embedding_dim, h, w)
    rows_BND = patches.reshape(count, case.model.embedding_dim, h * w).transpose(0, 2, 1)
    np.testing.assert_allclose(rows_BND, patches_BND, atol=1e-4)


@pytest.mark.parametrize("size", [(32, 32), (48, 64), (16, 32)])
@pytest.mark.parametrize("count", [1, 3])
def test_the_image_tower_says_what_torch_says(case: Case, count: int, size: tuple[int, int]) -> None:
    assert case.done.fixed_size is None
    check_images(case, count, size)


@pytest.mark.parametrize("count", [1, 3])
def test_texts_through_tokenizer_file_and_text_tower_are_what_torch_makes_of_them(case: Case, count: int) -> None:
    tokenizer = Tokenizer.from_file(str(case.folder / "tokenizer" / "tokenizer.json"))
    tokens = np.array([row.ids for row in tokenizer.encode_batch([*TEXTS[:2], " ".join(["grass"] * 40)][:count])])
    [found] = case.run("text", tokens)
    with torch.no_grad():
        expected = case.model.encode_text([*TEXTS[:2], " ".join(["grass"] * 40)][:count])
    np.testing.assert_allclose(found, expected, atol=1e-4)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-5)
    again = AutoTokenizer.from_pretrained(str(case.folder / "tokenizer"))
    assert again(TEXTS[1])["input_ids"] == case.model.text_encoder.tokenizer(TEXTS[1])["input_ids"]


def test_the_description_and_the_files_say_the_same(case: Case) -> None:
    assert case.done.difference < 1e-4
    assert case.about["largest_difference_from_torch"] == case.done.difference
    assert case.about["contrast"]["temperature"] == pytest.approx(1 / case.model.scale.item())
    assert case.about["segmentation"] == case.model.segmentation.model_dump(mode="json")
    for part in ("image", "text"):
        proto = onnx.load(case.folder / case.about[part]["file"])
        onnx.checker.check_model(proto)
        assert proto.opset_import[0].version == case.about["opset"]
        assert [value.name for value in proto.graph.input] == [case.about[part]["input"]["name"]]
        assert [value.name for value in proto.graph.output] == list(case.about[part]["outputs"])
        for value, shape in zip(proto.graph.output, case.about[part]["outputs"].values(), strict=True):
            sizes = [dimension.dim_value or None for dimension in value.type.tensor_type.shape.dim]
            assert sizes == [size if isinstance(size, int) else None for size in shape]
        assert b"site-packages" not in proto.SerializeToString(), "a path of the machine that wrote it"


def test_the_documented_program_names_pixels_as_the_segmenter_does(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vilseg.segmentation.dense_features.has_bfloat16_units", lambda device: False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "onnx").symlink_to(case.folder)
    noise = np.random.default_rng(3).integers(0, 256, (6, 9, 3), np.uint8)
    photo = Image.fromarray(noise).resize((90, 60), Image.Resampling.NEAREST)
    photo.save("photo.jpg", "PNG")  # no losses, whatever it is called
    [program] = re.findall(r"```python\n(.*?)```", DOCS.read_text(), re.DOTALL)
    found: dict[str, Any] = {}
    exec(program, found)
    expected = Segmenter(case.model, found["classes"], device="cpu")(photo)
    # The attention of CLIP folders lets patches look at their neighbours, and random weights name all of these alike.
    assert len(np.unique(expected.labels)) > 1 or case.model.segmentation.attention == "naclip"
    assert (found["labels"] == expected.labels).mean() > 0.995


class Bound(nn.Module):
    """An encoder whose positions are a table of one size, as those of many are."""

    num_features, patch_size = 16, 8

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 16, 8, stride=8)
        self.positions = nn.Parameter(torch.randn(16, 4, 4))

    def forward(self, images: Tensor) -> ImageFeatures:
        return ImageFeatures((self.patches(images) + self.positions).flatten(2).transpose(1, 2), None, (4, 4))


def test_an_encoder_that_binds_its_size_says_so(tmp_path: Path) -> None:
    model, said = made("local_conv", tmp_path), list[str]()
    model.image_encoder = Bound()
    done = export_model(model, str(tmp_path / "onnx"), say=said.append)
    assert done.fixed_size == (32, 32)
    assert any("takes 32 x 32 pixels" in line for line in said)
    about = json.loads((tmp_path / "onnx" / "export.json").read_text())
    assert about["image"]["fixed_size"] == {"height": 32, "width": 32}
    for count in (1, 3):
        check_images(Case(model, tmp_path / "onnx", done, about), count, (32, 32))


# ------------------------------------------------------------------------------------------- what stands in the way


@pytest.fixture
def written_before(conv: Case, monkeypatch: pytest.MonkeyPatch) -> Case:
    """Writing a tower copies the one of ``conv``, which takes no time."""
    monkeypatch.setattr(
        "vilseg.export.onnx_export.write_onnx",
        lambda *arguments: shutil.copy(conv.folder / arguments[-1].name, arguments[-1]),
    )
    return conv


def test_what_differs_from_torch_is_not_written(written_before: Case, tmp_path: Path) -> None:
    other = made("local_conv", tmp_path)
    with torch.no_grad():
        other.image_projection.weight.neg_()
    with pytest.raises(ModelError, match=r"image tower .* nothing was written: .*differs from torch by"):
        export_model(other, str(tmp_path / "new" / "onnx"))
    assert list((tmp_path / "new").iterdir()) == []


def test_the_verb_writes_once_and_again_only_if_told_to(
    written_before: Case, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    written_before.model.save_pretrained(str(tmp_path / "model"))
    out = tmp_path / "onnx"
    call = ["export", "--model", str(tmp_path / "model"), "--out", str(out)]
    assert run([*call, "--json", "segmentation.input_size=64"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["uri"] == str(out)
    assert result["difference"] < 1e-4
    assert json.loads((out / "export.json").read_text())["image"]["input_size"] == 64
    assert run(call) == 2
    assert f"{out} holds an export already; replace it by --overwrite" in capsys.readouterr().err
    assert run([*call, "--overwrite"]) == 0
    assert capsys.readouterr().out.startswith(f"{out}\npictures of any size; largest difference from torch")
    assert json.loads((out / "export.json").read_text())["image"]["input_size"] == 32
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "onnx"]


def test_a_missing_package_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, conv: Case) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnxscript" else find(name))
    with pytest.raises(
        UserError, match=r"^ONNX needs onnxscript, which is not installed: pip install 'vilseg\[export\]'$"
    ):
        export_model(conv.model, str(tmp_path / "onnx"))


def fill(out: Path, error: OSError | None = None) -> None:
    with output_folder(str(out)) as folder:
        (folder / "export.json").write_text("new")
        if error:
            raise error


def test_a_folder_appears_whole_or_stays_as_it_was(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "onnx"
    fill(out)
    (out / "image.onnx").write_text("old")
    with pytest.raises(StorageError, match=r"cannot write .*onnx: No space left"):
        fill(out, OSError(28, "No space left on device"))
    assert (out / "image.onnx").read_text() == "old"
    fill(out)
    assert [path.name for path in out.iterdir()] == ["export.json"]
    assert [path.name for path in out.parent.iterdir()] == ["onnx"]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda out: out.write_text("x"), "is a file; give a folder"),
        (
            lambda out: (out / "a").mkdir(parents=True) or (out / "a" / "b.txt").write_text("x"),
            "holds a/b.txt, which no",
        ),
        (
            lambda out: out.mkdir() or (out / ".git").write_text("x"),
            "holds .git, which no export wrote; choose another",
        ),
    ],
)
def test_what_no_export_wrote_is_never_replaced(tmp_path: Path, make: Callable[[Path], Any], words: str) -> None:
    make(tmp_path / "out")
    with pytest.raises(StorageError, match=words):
        check_target(str(tmp_path / "out"), overwrite=True)


def test_an_empty_folder_is_taken(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    check_target(str(tmp_path / "out"))  # raises nothing
    assert (tmp_path / "out").is_dir()
