"""Report of a training run or of an evaluation as one self-contained HTML page."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from PIL import Image

from vilseg.evaluation import html_page
from vilseg.evaluation.charts import iou_bars, line_chart
from vilseg.evaluation.evaluate import Evaluation, Example
from vilseg.segmentation import visualization
from vilseg.segmentation.result import no_class

_LONGEST_SIDE = 640  # px; larger images are shrunk, so that a page with dozens of images still opens on a phone
_MOST_CONFUSIONS = 12


@dataclass(frozen=True, kw_only=True)
class RunReport:
    """Content of the report of a run."""

    title: str
    trained: Evaluation
    """Evaluation of the trained model; its `examples` become the rows of images."""
    untrained: Evaluation | None = None
    """Evaluation of the model before training, on the same images."""
    summary: str = ""
    """One or two sentences below the title."""
    seconds: Mapping[str, float] = field(default_factory=dict)
    """Wall time in seconds of each stage, in the order of the stages."""
    metrics: Sequence[Mapping[str, float]] = ()
    """Metrics of each reported step; every key that begins with "loss" is drawn as a curve over `step`."""
    miou_curve: Sequence[tuple[int, float]] = ()
    """(step, mIoU in 0..1) during training."""
    commands: Sequence[str] = ()
    """Commands that reproduce the run, in order."""
    configuration: str = ""
    """Resolved configuration as YAML."""
    facts: Mapping[str, str] = field(default_factory=dict)
    """Further facts by name, such as the URI of the model and the number of pairs."""


def render_report(report: RunReport) -> str:
    """Render the report of a run as an HTML document."""
    trained, untrained = report.trained, report.untrained
    headline = [("mIoU, trained", *_per_cent(trained.miou))]
    if untrained is not None:
        headline.append(("mIoU, untrained", *_per_cent(untrained.miou)))
    if trained.boundary is not None:
        headline.append(("boundary IoU, trained", *_per_cent(trained.boundary_iou)))
    headline.append(("pixel accuracy", *_per_cent(trained.pixel_accuracy)))
    headline.append(("images measured", f"{trained.images:,}", ""))
    if report.seconds:
        value, unit = html_page.seconds_text(sum(report.seconds.values())).split(" ", 1)
        headline.append(("from start to end", value, unit))
    summary = f'<p class="note">{html_page.escape(report.summary)}</p>' if report.summary else ""
    return html_page.page(
        report.title,
        [
            summary,
            html_page.numbers(headline),
            _stages(report.seconds),
            _facts({**report.facts, **_vocabulary(trained)}),
            _examples(trained.examples),
            _per_class(trained, untrained),
            _curves(report),
            _commands(report.commands),
            html_page.folded("Configuration", html_page.code(report.configuration)) if report.configuration else "",
        ],
    )


def render_evaluation(evaluation: Evaluation, title: str, commands: Sequence[str] = ()) -> str:
    """Render the metrics, confusions and examples of an evaluation as an HTML document."""
    headline = [
        ("mIoU", *_per_cent(evaluation.miou)),
        ("boundary IoU", *_per_cent(evaluation.boundary_iou)),
        ("pixel accuracy", *_per_cent(evaluation.pixel_accuracy)),
        ("calibration error", *_per_cent(evaluation.calibration_error)),
        ("images measured", f"{evaluation.images:,}", ""),
        ("classes measured", str(len(evaluation.measured_classes)), ""),
    ]
    parts = [
        f'<p class="note">{html_page.escape(_protocol(evaluation))}</p>',
        html_page.numbers(headline),
        _facts(_vocabulary(evaluation)),
        _worst(evaluation.worst),
        _examples(evaluation.examples),
        _per_class(evaluation, None),
        _confusions(evaluation),
        _commands(commands),
    ]
    return html_page.page(title, parts)


def _vocabulary(evaluation: Evaluation) -> dict[str, str]:
    return {"vocabulary": evaluation.vocabulary} if evaluation.vocabulary else {}


def _facts(facts: Mapping[str, str]) -> str:
    return html_page.card(html_page.facts(facts)) if facts else ""


def _protocol(evaluation: Evaluation) -> str:
    """Describe the protocol of the metrics in one to three sentences."""
    text = f"Protocol {evaluation.protocol}."
    if len(evaluation.measured_classes) < len(evaluation.confusion.classes):
        text += (
            f" Chosen among {len(evaluation.confusion.classes)} classes; the means are over "
            f"{', '.join(evaluation.measured_classes)}."
        )
    if evaluation.boundary is not None:
        text += f" Boundary IoU is of the pixels within {evaluation.boundary.width:.3g} of the diagonal of a contour."
    return text


def _per_cent(value: float) -> tuple[str, str]:
    return ("–", "") if math.isnan(value) else (f"{100 * value:.1f}", "%")


def _stages(seconds: Mapping[str, float]) -> str:
    """Render the wall times of a run's stages as a bar, with one segment per stage, and a legend with the times."""
    if not seconds:
        return ""
    # One hue from strong to pale, so that no stage resembles the colour of a class.
    strengths = np.linspace(100, 25, len(seconds))
    colours = [f"color-mix(in srgb, var(--accent) {strength:.0f}%, var(--card))" for strength in strengths]
    bar = "".join(
        f'<i style="flex:{max(spent, 0):.3f} 0 0;background:{colour}"></i>'
        for spent, colour in zip(seconds.values(), colours, strict=True)
    )
    entries = [
        (colour, name, html_page.seconds_text(seconds[name])) for name, colour in zip(seconds, colours, strict=True)
    ]
    return html_page.card(f'<div class="stages">{bar}</div>{html_page.key(entries)}')


def _examples(examples: Sequence[Example]) -> str:
    if not examples:
        return ""
    note = (
        "Tints are classes, laid over the image in grey; an area that keeps its own colours has no class. "
        "The clusters are the regions before they were given names."
    )
    return html_page.section("Examples", note, *(_example(example) for example in examples))


def _worst(examples: Sequence[Example]) -> str:
    if not examples:
        return ""
    note = "The images of lowest mIoU, each over the measured classes that are truly in it."
    content = "".join(_example(example) for example in examples)
    return html_page.section("Worst images", note, html_page.folded(f"{len(examples)} images", content))


def _example(example: Example) -> str:
    result, truth = example.segmentation, example.truth
    image, classes = truth.image, result.classes
    # Ignored pixels get the "no class" value of 16 bit, because 255 is a class index if there are more than 255 classes.
    true_labels = np.where(truth.mask == truth.ignore, np.uint16(no_class(np.uint16)), truth.mask)
    factor = visualization.upscale_factor(*result.labels.shape)
    crisp = factor > 1

    panels = [html_page.figure(_fit(Image.fromarray(image)), "image", crisp=crisp)]
    for caption, labels in (("prediction", result.labels), ("truth", true_labels)):
        drawn = _fit(visualization.draw_overlay(image, labels, classes, opacity=0.65, factor=factor))
        legend = html_page.class_key(visualization.legend_entries(labels, classes))
        panels.append(html_page.figure(drawn, caption, below=legend, crisp=crisp))
    if result.clusters is not None:
        drawn = _fit(visualization.draw_clusters(result.clusters, factor=factor), Image.Resampling.NEAREST)
        caption = f"{len(np.unique(result.clusters))} clusters"
        panels.append(html_page.figure(drawn, caption, crisp=True))

    known = truth.mask != truth.ignore
    right = int(np.count_nonzero((result.labels == truth.mask) & known)) / max(int(np.count_nonzero(known)), 1)
    mean = "" if math.isnan(example.miou) else f", mIoU {100 * example.miou:.1f} %"
    return (
        f'<article class="card example"><header><h3>{html_page.escape(truth.name)}</h3>'
        f'<span class="note">{visualization.percent_text(right)} of the pixels right{mean}</span></header>'
        f'<div class="pictures">{"".join(panels)}</div></article>'
    )


def _fit(image: Image.Image, resample: Image.Resampling = Image.Resampling.LANCZOS) -> Image.Image:
    """Shrink an image in place so that no side exceeds `_LONGEST_SIDE`, and return it."""
    image.thumbnail((_LONGEST_SIDE, _LONGEST_SIDE), resample)
    return image


def _per_class(trained: Evaluation, untrained: Evaluation | None) -> str:
    absent = [name for name, iou in trained.per_class.items() if math.isnan(iou)]
    if len(absent) == len(trained.per_class):
        return ""
    note = "Intersection over union in per cent; the mean over the classes that are in the truth is the mIoU."
    if absent:
        note += f" In neither truth nor prediction: {', '.join(absent)}."
    chart = iou_bars(trained.per_class, untrained.per_class if untrained else None, label="IoU by class")
    legend = html_page.key([("var(--accent)", "trained", ""), ("var(--second)", "untrained", "")]) if untrained else ""
    return html_page.section("IoU by class", note, html_page.card(legend + chart, kind="wide"), _class_table(trained))


def _class_table(evaluation: Evaluation) -> str:
    """Render a table of the metrics of every class."""
    counts = evaluation.confusion.counts
    total = max(int(counts.sum()), 1)
    rows = [
        (
            name,
            visualization.percent_text(float(counts[index].sum()) / total),
            "".join(_per_cent(iou)),
            "".join(_per_cent(evaluation.boundary_per_class.get(name, math.nan))),
        )
        for index, (name, iou) in enumerate(evaluation.per_class.items())
    ]
    head = ("class", "of all pixels", "IoU", "boundary IoU")
    return html_page.folded("All classes as a table", html_page.table(head, rows, numeric_columns=3))


def _confusions(evaluation: Evaluation) -> str:
    """Render a table of the pairs of true and wrongly predicted class with the most pixels."""
    counts = evaluation.confusion.counts
    wrong = counts.copy()
    np.fill_diagonal(wrong, 0)
    names = (*evaluation.confusion.classes, "no class")
    rows = []
    for cell in np.argsort(-wrong, axis=None, kind="stable")[:_MOST_CONFUSIONS]:
        true, predicted = np.unravel_index(cell, wrong.shape)
        if wrong[true, predicted]:
            share = float(wrong[true, predicted] / counts[true].sum())
            rows.append((names[true], names[predicted], visualization.percent_text(share)))
    if not rows:
        return ""
    content = html_page.table(("in truth", "taken for", "of its pixels"), rows)
    return html_page.section(
        "Most frequent confusions", "Those that cost most pixels come first.", html_page.card(content, kind="wide")
    )


def _curves(report: RunReport) -> str:
    cards = []
    if report.miou_curve:
        reference = report.untrained.miou if report.untrained else None
        chart = line_chart(report.miou_curve, label="mIoU", percent=True, reference=reference)
        title = "mIoU" if reference is None else "mIoU (dashed: untrained)"
        cards.append(html_page.card(chart, title=title))
    keys = dict.fromkeys(key for line in report.metrics for key in line if key.startswith("loss"))
    for key in keys:
        points = [(line["step"], line[key]) for line in report.metrics if math.isfinite(line.get(key, math.nan))]
        if points:
            cards.append(html_page.card(line_chart(points, label=key), title=key))
    return html_page.section("Training", "", f'<div class="charts">{"".join(cards)}</div>') if cards else ""


def _commands(commands: Sequence[str]) -> str:
    if not commands:
        return ""
    return html_page.section("How this was made", "", html_page.code("\n".join(commands)))
