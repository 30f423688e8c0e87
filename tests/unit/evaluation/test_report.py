import dataclasses
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from vilseg.evaluation.boundary_iou import BoundaryCounts
from vilseg.evaluation.charts import iou_bars, line_chart
from vilseg.evaluation.confusion_matrix import ConfusionMatrix
from vilseg.evaluation.datasets import MaskedImage
from vilseg.evaluation.evaluate import Evaluation, Example
from vilseg.evaluation.html_page import seconds_text
from vilseg.evaluation.protocols import EvaluationProtocol
from vilseg.evaluation.report import RunReport, render_evaluation, render_report
from vilseg.segmentation.result import Segmentation

CLASSES = ("background", "cat", "sofa & <chair>", "lamp")


class Page(HTMLParser):
    """Content that a browser takes from a page: tags, ids, addresses, text; open tags must be closed in order."""

    VOID = frozenset({"meta", "img", "br"})

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.addresses: list[str] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(html)
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in self.VOID:
            self._open.append(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(value or "")
            if name in ("src", "href", "xlink:href", "data", "srcset"):
                self.addresses.append(value or "")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self._open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def evaluation(wrong: float, images: int = 12, size: tuple[int, int] = (32, 48)) -> Evaluation:
    """Random masks, and predictions of which the part `wrong` is drawn anew; no "lamp" anywhere."""
    rng = np.random.default_rng(0)
    confusion, examples = ConfusionMatrix(CLASSES), []
    for number in range(images):
        mask = rng.choice([0, 1, 2, 255], size=size).astype(np.uint8)
        labels = np.where(rng.random(size) < wrong, rng.integers(0, 3, size), np.minimum(mask, 2)).astype(np.uint8)
        image = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
        result = Segmentation(
            labels=labels, classes=CLASSES, scores=np.ones(size, np.float32), clusters=labels.astype(int), image=image
        )
        confusion.update(labels, mask)
        examples.append(
            Example(truth=MaskedImage(name=f"scene {number}", image=image, mask=mask, ignore=255), segmentation=result)
        )
    return Evaluation(confusion=confusion, images=images, examples=tuple(examples))


@pytest.fixture(scope="module")
def report() -> RunReport:
    return RunReport(
        title="A run <1>",
        trained=evaluation(0.2),
        untrained=evaluation(1.0),
        summary="What was done.",
        seconds={"train": 61.0, "segment": 4.25},
        metrics=[{"step": n, "loss": 5.0 - n / 100, "loss/cross_modal": 3.0, "images/s": 9.0} for n in range(400)],
        miou_curve=[(0, 0.1), (200, 0.5), (400, 0.6)],
        commands=["vilseg train --config a.yaml", "vilseg evaluate --model 'x' --dataset folder:y"],
        configuration="loss:\n  weight: <none>\n",
        facts={"model": "s3://bucket/model"},
    )


@pytest.fixture(scope="module")
def html(report: RunReport) -> str:
    return render_report(report)


def test_page_is_well_formed_and_stands_for_itself(html: str) -> None:
    page = Page(html)
    assert "script" not in page.tags
    assert "link" not in page.tags
    assert all(address.startswith(("data:image/", "#")) for address in page.addresses)
    assert not re.search(r"url\((?!#)|@import", html)
    assert "http" not in html


def test_charts_do_not_share_ids(html: str) -> None:
    page = Page(html)
    assert len(page.ids) == len(set(page.ids))
    assert {address[1:] for address in page.addresses if address.startswith("#")} <= set(page.ids)
    assert set(re.findall(r"url\(#([^)]*)\)", html)) <= set(page.ids)


def test_every_example_has_its_four_pictures(html: str) -> None:
    page = Page(html)
    assert page.tags.count("article") == 12
    assert page.tags.count("img") == 4 * 12
    for number in range(12):
        assert f"scene {number}" in page.text


def test_figures_commands_and_configuration_are_there(html: str, report: RunReport) -> None:
    text = Page(html).text
    assert report.untrained is not None
    for figure in (report.trained.miou, report.untrained.miou, report.trained.pixel_accuracy):
        assert f"{100 * figure:.1f}%" in text
    for part in (*report.commands, report.configuration, report.summary, "train 1 min 01 s", "s3://bucket/model"):
        assert part in text
    for name in CLASSES[:3]:
        assert name in text
    assert "In neither truth nor prediction: lamp." in text


def test_names_are_escaped(html: str) -> None:
    assert "<chair>" not in html
    assert "<1>" not in html
    assert "<none>" not in html


def test_only_losses_become_curves(html: str) -> None:
    labels = re.findall(r'<svg [^>]*aria-label="([^"]*)"', html)
    assert sorted(labels) == ["IoU by class", "loss", "loss/cross_modal", "mIoU"]


def test_charts_take_their_colours_from_the_page(html: str) -> None:
    for svg in re.findall(r"<svg .*?</svg>", html, flags=re.DOTALL):
        assert "var(--accent)" in svg
        assert set(re.findall(r"#[0-9a-f]{6}\b", svg)) <= {"#ffffff"}


def test_the_same_report_is_the_same_page(report: RunReport, html: str) -> None:
    assert render_report(report) == html


def test_a_run_that_knows_only_its_result() -> None:
    page = Page(render_report(RunReport(title="bare", trained=evaluation(0.5, images=1))))
    assert "untrained" not in page.text
    assert page.tags.count("article") == 1


def test_examples_without_clusters_and_of_the_size_of_photos() -> None:
    result = evaluation(0.5, images=1, size=(300, 900))
    example = result.examples[0]
    bare = dataclasses.replace(example, segmentation=dataclasses.replace(example.segmentation, clusters=None))
    html = render_evaluation(dataclasses.replace(result, examples=(bare,)), "photos", ["vilseg evaluate"])
    assert html.count("data:image/jpeg") == 3
    assert 'width="640" height="213"' in html


def test_evaluation_names_the_most_frequent_confusion() -> None:
    confusion = ConfusionMatrix(CLASSES)
    confusion.update(np.array([[0, 0, 0, 1, 1, 255]]), np.array([[0, 0, 0, 0, 1, 1]]))
    text = Page(render_evaluation(Evaluation(confusion=confusion, images=1, vocabulary="0123456789ab"), "counts")).text
    assert "0123456789ab" in text
    assert "backgroundcat25 %" in text
    assert "catno class50 %" in text


def test_evaluation_tells_boundary_iou_protocol_and_every_class() -> None:
    result = evaluation(0.3, images=2)
    boundary = BoundaryCounts(CLASSES)
    for example in result.examples:
        boundary.update(example.segmentation.labels, example.truth.mask)
    result = dataclasses.replace(result, boundary=boundary, measured=(1, 2), protocol=EvaluationProtocol.UNSEEN)
    text = Page(render_evaluation(result, "unseen")).text
    assert f"{100 * result.boundary_iou:.1f}%boundary IoU" in text
    assert "Protocol unseen. Chosen among 4 classes; the means are over cat, sofa & <chair>." in text
    assert "within 0.02 of the diagonal of a contour" in text
    iou, band = result.per_class["cat"], result.boundary_per_class["cat"]
    share = result.confusion.counts[1].sum() / result.confusion.counts.sum()
    assert f"cat{100 * share:.0f} %{100 * iou:.1f}%{100 * band:.1f}%" in text
    assert "lamp0 %––" in text


def test_worst_images_have_a_section_of_their_own() -> None:
    result = evaluation(0.5, images=3)
    worst = tuple(dataclasses.replace(example, miou=0.125) for example in result.examples[:2])
    page = Page(render_evaluation(dataclasses.replace(result, examples=(), worst=worst), "worst"))
    assert page.tags.count("article") == 2
    assert "Worst images" in page.text
    assert page.text.count(", mIoU 12.5 %") == 2


def test_nothing_measured_is_not_drawn() -> None:
    html = render_evaluation(Evaluation(confusion=ConfusionMatrix(CLASSES), images=0), "nothing")
    assert "–" in Page(html).text
    assert "<svg" not in html


def test_long_curves_are_thinned() -> None:
    short = line_chart([(n, n / 7) for n in range(240)], label="loss")
    long = line_chart([(n, n / 7) for n in range(24000)], label="loss")
    assert len(long) < 1.2 * len(short)


def test_class_names_of_any_script_are_written_as_they_are(recwarn: pytest.WarningsRecorder) -> None:
    svg = iou_bars({"猫": 0.5, "$5 $10": 0.4, '<b> & "c"': 0.3}, None, label="bars")
    text = Page(svg).text
    assert all(name in text for name in ("猫", "$5 $10", '<b> & "c"'))
    assert not recwarn.list


def test_bars_leave_out_classes_that_are_nowhere() -> None:
    svg = iou_bars({"cat": 0.5, "lamp": float("nan")}, {"cat": 0.25}, label="bars")
    assert "cat" in svg
    assert "lamp" not in svg


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.04, "0.0 s"), (9.96, "10 s"), (59.7, "1 min 00 s"), (185, "3 min 05 s"), (7620, "2 h 07 min")],
)
def test_durations(seconds: float, text: str) -> None:
    assert seconds_text(seconds) == text
