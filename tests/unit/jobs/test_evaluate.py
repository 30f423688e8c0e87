"""`vilseg evaluate` on a published dataset: protocols, boundary IoU, the page, and what is said of mistakes."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from cli.app import run
from tests.unit import benchmark_dataset_trees as trees


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, save_tiny_model: Callable[[str, int], str]) -> Path:
    folder = tmp_path_factory.mktemp("evaluate")
    save_tiny_model(str(folder / "model"), 32)
    trees.voc(folder / "VOCdevkit" / "VOC2012")
    trees.ade20k(folder / "ADEChallengeData2016")
    return folder


def evaluate(place: Path, dataset: str, *options: str) -> int:
    return run(["evaluate", "--model", str(place / "model"), "--dataset", dataset, *options])


@pytest.mark.parametrize(
    ("protocol", "asked", "measured"), [("all", 21, 21), ("no-background", 20, 20), ("unseen", 21, 5)]
)
def test_protocols(
    protocol: str, asked: int, measured: int, place: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    arguments = ("--protocol", protocol, "--boundary-width", "0.1", "--out", str(tmp_path), "--json")
    assert evaluate(place, f"voc:{place}", *arguments) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures == json.loads((tmp_path / "evaluation.json").read_text())
    assert 0 <= figures["miou"] <= 1
    assert 0 <= figures["boundary_iou"] <= 1
    assert (figures["protocol"], figures["boundary_width"], figures["images"]) == (protocol, 0.1, 2)
    assert (len(figures["per_class"]), len(figures["measured"])) == (asked, measured)
    page = (tmp_path / "report.html").read_text()
    assert f"Protocol {protocol}." in page
    assert "boundary IoU" in page


def test_text_names_the_classes_of_the_mean(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate(place, f"voc:{place}", "--protocol", "unseen") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("mIoU 0.")
    assert "boundary IoU 0." in lines[0]
    assert lines[1] == "over potted plant, sheep, sofa, train, tv monitor"


def test_a_fitted_temperature_lowers_the_calibration_error(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def figures(*options: str) -> dict[str, float]:
        assert evaluate(place, f"voc:{place}", "--json", *options) == 0
        return json.loads(capsys.readouterr().out)

    before = figures("--fit-temperature", "segmentation.temperature=0.0001")
    after = figures(f"segmentation.temperature={before['fitted_temperature']}")
    assert after["fitted_temperature"] is None
    assert 0 <= after["calibration_error"] < before["calibration_error"] <= 1
    assert after["miou"] == before["miou"]
    assert evaluate(place, f"voc:{place}", "--fit-temperature") == 0
    said = capsys.readouterr().out
    assert "calibration error 0." in said
    assert "best with segmentation.temperature=" in said


def test_other_names_follow_the_protocol(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = [f"name {number}" for number in range(20)]
    (tmp_path / "names.txt").write_text("\n".join(names))
    options = ("--classes", str(tmp_path / "names.txt"), "--json")
    assert evaluate(place, f"voc:{place}", "--protocol", "no-background", *options) == 0
    assert list(json.loads(capsys.readouterr().out)["per_class"]) == names
    assert evaluate(place, f"voc:{place}", *options) == 2
    said = capsys.readouterr().err
    assert "--classes has 20 names, but the protocol all asks for 21 classes" in said


@pytest.mark.parametrize(
    ("kind", "options", "said"),
    [
        ("ade20k", ("--protocol", "unseen"), "the protocol unseen needs a dataset with a list of unseen classes"),
        ("ade20k", ("--protocol", "no-background"), "use the protocol all"),
        ("voc", ("--protocol", "unsen"), "--protocol unsen is none of all, no-background, unseen"),
        ("voc", ("--boundary-width", "0"), "--boundary-width 0.0 is no share of the diagonal"),
        ("context", (), "does not hold PASCAL Context"),
        ("pascal", (), "KIND one of folder, voc, context, coco-stuff, ade20k"),
    ],
)
def test_mistakes_are_said_in_a_sentence(
    kind: str, options: tuple[str, ...], said: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate(place, f"{kind}:{place}", *options) == 2
    message = capsys.readouterr().err
    assert said in message
    assert len(message.strip().splitlines()) == 1
