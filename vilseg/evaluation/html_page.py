"""HTML page of a report: its style, and HTML elements that several reports use.

A page is self-contained: style and images are inline, without scripts or external requests.
"""

import base64
import io
from collections.abc import Iterable, Mapping, Sequence
from html import escape

from PIL import Image

from vilseg.segmentation.visualization import LegendEntry, percent_text

_MOST_NAMES = 8  # in the legend of one image: a noisy prediction has dozens of classes with a few pixels each

_STYLE = """
:root { color-scheme: light dark;
  --page: #f6f7f9; --card: #ffffff; --ink: #1b1f24; --muted: #626a75; --line: #e2e5ea;
  --accent: #2f6fd0; --second: #a9b2bf; --code: #f0f2f5; }
@media (prefers-color-scheme: dark) { :root {
  --page: #121417; --card: #1b1e23; --ink: #e8eaee; --muted: #99a2ae; --line: #31363e;
  --accent: #6ca6ff; --second: #5d6673; --code: #23272d; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 40px 20px 64px; }
h1 { font-size: clamp(1.6rem, 4vw, 2.2rem); line-height: 1.2; letter-spacing: -0.02em; margin: 0 0 8px; }
h2 { font-size: 1.25rem; letter-spacing: -0.01em; margin: 48px 0 6px; }
h3 { font-size: 0.9rem; font-weight: 600; margin: 0 0 8px; overflow-wrap: anywhere; }
p { margin: 0 0 12px; max-width: 72ch; }
.note { color: var(--muted); font-size: 0.92rem; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 12px; padding: 18px; }
.card + .card { margin-top: 12px; }
.numbers .card, .charts .card { margin-top: 0; }
.numbers { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 12px; margin: 24px 0 12px; }
.numbers .value { font-size: 2rem; font-weight: 650; line-height: 1.15; letter-spacing: -0.02em;
  font-variant-numeric: tabular-nums; }
.numbers .first .value { color: var(--accent); }
.numbers .unit { font-size: 1.05rem; font-weight: 500; color: var(--muted); margin-left: 3px; }
.numbers .label { color: var(--muted); font-size: 0.88rem; }
.stages { display: flex; gap: 2px; height: 12px; border-radius: 6px; overflow: hidden; margin-bottom: 12px; }
.stages i { min-width: 2px; }
.key { display: flex; flex-wrap: wrap; gap: 4px 16px; margin: 0; padding: 0; list-style: none; font-size: 0.88rem; }
.key li { display: flex; align-items: center; gap: 6px; min-width: 0; }
.key b { flex: none; width: 11px; height: 11px; border-radius: 3px; }
.key span { color: var(--muted); font-variant-numeric: tabular-nums; white-space: nowrap; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 380px), 1fr)); gap: 12px;
  margin-top: 14px; }
.wide { max-width: 780px; margin-top: 14px; }
svg { display: block; width: 100%; height: auto; }
svg text { font-family: inherit !important; }
.example { margin-top: 14px; }
.example header { display: flex; flex-wrap: wrap; justify-content: space-between; gap: 0 16px; margin-bottom: 8px; }
.example header h3 { margin: 0; }
.pictures { display: grid; grid-template-columns: repeat(4, minmax(0, 1fr)); gap: 16px; align-items: start; }
figure { margin: 0; min-width: 0; }
figure img { display: block; width: 100%; border-radius: 8px; }
figure img.crisp { image-rendering: pixelated; }
figcaption { color: var(--muted); font-size: 0.82rem; margin: 6px 0 3px; }
figure .key { gap: 2px 12px; font-size: 0.82rem; line-height: 1.4; overflow-wrap: anywhere; }
table { border-collapse: collapse; font-size: 0.92rem; width: 100%; }
th, td { text-align: left; padding: 6px 12px 6px 0; border-bottom: 1px solid var(--line); vertical-align: top;
  overflow-wrap: anywhere; }
tr:last-child > * { border-bottom: 0; }
th { color: var(--muted); font-weight: 500; }
td.number, th.number { text-align: right; padding-right: 0; font-variant-numeric: tabular-nums; white-space: nowrap; }
td.number:not(:last-child), th.number:not(:last-child) { padding-right: 12px; }
pre { background: var(--code); border-radius: 8px; padding: 12px 14px; overflow-x: auto; margin: 10px 0 0;
  font: 0.85rem/1.55 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
details { margin-top: 14px; } summary { cursor: pointer; font-weight: 600; }
@media (max-width: 680px) { main { padding: 24px 14px 48px; } .card { padding: 14px; }
  .pictures { grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 14px 12px; } }
"""


def page(title: str, parts: Iterable[str]) -> str:
    """Return an HTML document; `title` is text, `parts` are HTML."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head>\n"
        f"<body><main><h1>{escape(title)}</h1>\n"
        + "\n".join(part for part in parts if part)
        + "\n</main></body></html>\n"
    )


def section(title: str, note: str, *parts: str) -> str:
    """Return a section with the heading `title`, the sentence `note` below it (omitted if empty) and HTML contents."""
    lead = f'<p class="note">{escape(note)}</p>' if note else ""
    return f"<section><h2>{escape(title)}</h2>{lead}" + "".join(parts) + "</section>"


def card(content: str, *, title: str = "", kind: str = "") -> str:
    """Return a framed box around HTML; `kind` is an additional CSS class."""
    heading = f"<h3>{escape(title)}</h3>" if title else ""
    return f'<div class="card {kind}">{heading}{content}</div>'


def numbers(values: Sequence[tuple[str, str, str]]) -> str:
    """Return the headline metrics, one box for each (label, value, unit); the first is in the accent colour."""
    boxes = [
        f'<div class="card{" first" if place == 0 else ""}"><div class="value">{escape(value)}'
        f'<span class="unit">{escape(unit)}</span></div><div class="label">{escape(label)}</div></div>'
        for place, (label, value, unit) in enumerate(values)
    ]
    return f'<div class="numbers">{"".join(boxes)}</div>'


def key(entries: Iterable[tuple[str, str, str]]) -> str:
    """Return a legend of (CSS colour, name, remark in grey)."""
    items = [
        f'<li><b style="background:{colour}"></b>{escape(name)} <span>{escape(remark)}</span></li>'
        for colour, name, remark in entries
    ]
    return f'<ul class="key">{"".join(items)}</ul>'


def class_key(entries: Sequence[LegendEntry]) -> str:
    """Return the legend of a label map: its largest classes, each with its colour and its fraction of the image area."""
    shown = [(css_colour(entry.colour), entry.name, percent_text(entry.fraction)) for entry in entries[:_MOST_NAMES]]
    if rest := entries[_MOST_NAMES:]:
        shown.append(("none", "", f"+ {len(rest)} more, {percent_text(sum(entry.fraction for entry in rest))}"))
    return key(shown)


def css_colour(colour: tuple[int, int, int]) -> str:
    """Return 8-bit sRGB as `#rrggbb`."""
    return "#{:02x}{:02x}{:02x}".format(*colour)


def figure(image: Image.Image, caption: str, *, below: str = "", crisp: bool) -> str:
    """Return an inline image with a caption and HTML below it.

    Args:
        image: RGB image.
        caption: text below the image, also used by screen readers.
        below: HTML below the caption.
        crisp: store as PNG and scale without smoothing, for upscaled images and flat colours; otherwise store as JPEG.
    """
    buffer = io.BytesIO()
    if crisp:
        image.save(buffer, format="PNG", optimize=True)
    else:
        image.save(buffer, format="JPEG", quality=88, subsampling=0)
    data = base64.b64encode(buffer.getvalue()).decode("ascii")
    return (
        f'<figure><img src="data:image/{"png" if crisp else "jpeg"};base64,{data}" width="{image.width}" '
        f'height="{image.height}" alt="{escape(caption)}" style="height:auto"{" class=crisp" if crisp else ""}>'
        f"<figcaption>{escape(caption)}</figcaption>{below}</figure>"
    )


def table(head: Sequence[str], rows: Iterable[Sequence[str]], *, numeric_columns: int = 1) -> str:
    """Return a table of text whose last `numeric_columns` columns hold numbers; an empty `head` omits the heading."""

    def row(cells: Sequence[str], tag: str) -> str:
        first = len(cells) - numeric_columns
        marked = [
            f"<{tag}{' class=number' if place >= first and head else ''}>{escape(cell)}</{tag}>"
            for place, cell in enumerate(cells)
        ]
        return f"<tr>{''.join(marked)}</tr>"

    heading = row(head, "th") if head else ""
    return f"<table>{heading}{''.join(row(cells, 'td') for cells in rows)}</table>"


def facts(values: Mapping[str, str]) -> str:
    """Return a table of names and values, one pair per row."""
    return table((), values.items())


def code(text: str) -> str:
    """Return preformatted text for copying."""
    return f"<pre>{escape(text)}</pre>"


def folded(title: str, content: str) -> str:
    """Return a collapsible box with a title and HTML content, closed at first."""
    return f'<details class="card"><summary>{escape(title)}</summary>{content}</details>'


def seconds_text(seconds: float) -> str:
    """Format a duration as `0.8 s`, `42 s`, `3 min 05 s` or `2 h 07 min`."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
