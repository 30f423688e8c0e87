"""One picture: looked at once, then named, thresholded and drawn as often as one likes."""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import gradio as gr

from serve.http import json_names
from serve.page.components import PageBackend, class_tags, empty, viewer
from serve.page.examples import Example
from vilseg.client import arrays_of
from vilseg.segmentation.result import Segmentation

_KEPT, _KEPT_BYTES = 64, 256 << 20
"""Pictures whose links work, and their bytes in all; the ones used longest ago go first."""
_BEGIN = "Drop or paste a picture, or choose an example."
_SESSION_S = 3600
"""Seconds after which an idle page's picture is forgotten."""


class ImageCache:
    """Pictures by an id that nobody guesses who has not got the picture, for links that restore what a page showed."""

    def __init__(self, examples: Sequence[Example]) -> None:
        self.examples = {f"example-{number}": example for number, example in enumerate(examples, 1)}
        self._kept: OrderedDict[str, bytes] = OrderedDict()

    def keep(self, image: bytes) -> str:
        """The id of a picture from now on."""
        for name, example in self.examples.items():
            if example.image == image:
                return name
        name = hashlib.sha256(image).hexdigest()[:32]
        self._kept[name] = image
        self._kept.move_to_end(name)
        while len(self._kept) > _KEPT or sum(map(len, self._kept.values())) > _KEPT_BYTES:
            self._kept.popitem(last=False)
        return name

    def get(self, name: str) -> bytes | None:
        """The picture, if it is still there."""
        if name in self.examples:
            return self.examples[name].image
        return self._kept.get(name)


def build(desk: PageBackend, kept: ImageCache, demo: gr.Blocks) -> None:
    """Add the tab to the page."""
    session = gr.State({}, time_to_live=_SESSION_S)
    with gr.Row():
        with gr.Column(scale=2, min_width=320):
            image = gr.Image(
                label="Picture", type="filepath", sources=["upload", "clipboard"], height=260, elem_id="picture"
            )
            classes = class_tags("Classes", elem_id="classes")
            with gr.Row():
                background = gr.Checkbox(label="Background", elem_id="background")
                bias = gr.Slider(-0.3, 0.3, 0, step=0.01, label="More background", interactive=True, elem_id="bias")
            model = gr.Dropdown(label="Model", choices=desk.models(), value=desk.models()[0], elem_id="model")
            examples = gr.Dataset(
                components=[gr.Image(visible=False)],
                samples=[[desk.file(example.image, example.name)] for example in kept.examples.values()],
                label="Or begin with an example",
                type="index",
                elem_id="vilseg-examples",
            )
        with gr.Column(scale=3, min_width=320):
            shown = gr.HTML(empty(_BEGIN), elem_id="result")
            view = gr.Radio(
                [("Classes", "classes"), ("Clusters", "clusters"), ("Scores", "scores"), ("Picture", "picture")],
                value="classes",
                label="Show",
                elem_id="view",
            )
            with gr.Row():
                opacity = gr.Slider(0, 1, 0.6, step=0.05, label="Opacity", elem_id="opacity")
                threshold = gr.Slider(0, 1, 0, step=0.01, label="Threshold", elem_id="threshold")
            with gr.Row():
                link = gr.Button("Copy link", size="sm")
                png = gr.Button("Download mask (PNG)", size="sm")
                coco = gr.Button("Download COCO (JSON)", size="sm")
            file = gr.DownloadButton(visible="hidden", elem_id="file")

    wishes = [classes, background, bias, model, view, opacity, threshold]

    async def show(state: dict[str, Any], *wished: Any) -> tuple[str, dict[str, Any]]:
        names, has_background, more, name, *looks = wished
        if not state.get("image"):
            return empty(_BEGIN), state
        if not names:
            return empty("Name at least one class to look for."), state
        uri = desk.config().models.get(name, "")  # a name may get another model while the page is open
        question = desk.question(
            state["image"],
            names,
            model=name,
            background=has_background,
            bias=more,
            seen=state.get("seen", {}).get(uri),
        )
        answer = await desk.ask(question)
        state = {**state, "seen": {**state.get("seen", {}), uri: answer.seen}, "shown": wished[:4]}
        found = json.loads(answer.body)
        if state.pop("restored", False):  # else the browser knows better where its controls are
            found["settings"] = dict(zip(("view", "opacity", "threshold"), looks, strict=True))
        found["link"] = {
            "picture": kept.keep(state["image"]),
            "classes": json.dumps(names, ensure_ascii=False),
            "background": "1" if has_background else "",
            "bias": more or "",
            "model": "" if name == desk.models()[0] else name,
        }
        return viewer("picture", found), state

    async def name_anew(state: dict[str, Any], *wished: Any) -> tuple[Any, Any]:
        # The class field also tells of what an example or a link has put into it, and that is shown already.
        if state.get("shown") == wished[:4]:
            return gr.skip(), gr.skip()
        return await show(state, *wished)

    async def take(path: str | None, *wished: Any) -> tuple[str, dict[str, Any]]:
        return await show({"image": await desk.read(path)} if path else {}, *wished)

    async def example(index: int, *wished: Any) -> tuple[Any, ...]:
        chosen = list(kept.examples.values())[index]
        names = list(chosen.classes)
        html, state = await show({"image": chosen.image}, names, *wished[1:])
        return desk.file(chosen.image, chosen.name), names, html, state

    async def restore(request: gr.Request) -> tuple[Any, ...]:
        asked = dict(request.query_params)
        known = desk.models()
        if not asked.keys() & {"picture", "classes"}:
            # Nothing to restore, and what somebody quick has begun meanwhile stays.
            skipped = [gr.skip() for _ in wishes]
            skipped[3] = gr.Dropdown(choices=known)
            return gr.skip(), *skipped, gr.skip(), gr.skip()
        names = json_names(asked.get("classes", "")) or []
        wished = [
            names,
            asked.get("background") == "1",
            _number(asked.get("bias"), 0, -0.3, 0.3),
            asked["model"] if asked.get("model") in known else known[0],
            asked["view"] if asked.get("view") in ("classes", "clusters", "scores", "picture") else "classes",
            _number(asked.get("opacity"), 0.6),
            _number(asked.get("threshold"), 0),
        ]
        picture = kept.get(asked.get("picture", ""))
        if picture is None:
            if asked.get("picture"):
                gr.Warning("The picture of this link is not kept any more; drop it once more.")
            html, path = empty(_BEGIN), None
            state: dict[str, Any] = {}
        else:
            html, state = await show({"image": picture, "restored": True}, *wished)
            path = desk.file(picture, "picture")
        wished[3] = gr.Dropdown(choices=known, value=wished[3])
        return path, *wished, html, state

    async def download(kind: str, state: dict[str, Any], *wished: Any) -> str:
        names, has_background, more, name, *_, limit = wished
        if not state.get("image") or not names:
            raise gr.Error("There is nothing to download yet.", title="No result")
        question = desk.question(
            state["image"], names, model=name, background=has_background, bias=more, threshold=limit, format=kind
        )
        answer = await desk.ask(question)
        if kind == "png":
            return desk.file(answer.body, "mask.png")
        found = Segmentation(**arrays_of(json.loads(answer.body))).to_coco()
        return desk.file(json.dumps(found).encode(), "annotations.json")

    image.upload(take, [image, *wishes], [shown, session])
    image.clear(lambda: (empty(_BEGIN), {}), None, [shown, session])
    examples.click(example, [examples, *wishes], [image, classes, shown, session])
    classes.change(name_anew, [session, *wishes], [shown, session], trigger_mode="always_last")
    for control in (background, model):
        control.input(show, [session, *wishes], [shown, session], trigger_mode="always_last")
    bias.input(show, [session, *wishes], [shown, session], trigger_mode="always_last", show_progress="hidden")
    # These are drawn anew from what the browser has.
    view.input(None, view, None, js="(view) => { vilseg.set(['picture'], { view }); }")
    opacity.input(None, opacity, None, js="(opacity) => { vilseg.set(['picture'], { opacity }); }")
    threshold.input(None, threshold, None, js="(threshold) => { vilseg.set(['picture'], { threshold }); }")
    link.click(None, None, None, js="() => vilseg.copyLink()")
    for button, kind in ((png, "png"), (coco, "json")):
        made = button.click(_of(download, kind), [session, *wishes], file)
        made.success(None, None, None, js="() => vilseg.download('file')")
    demo.load(restore, None, [image, *wishes, shown, session])


def _of(download: Any, kind: str) -> Any:
    async def run(*inputs: Any) -> str:
        return await download(kind, *inputs)

    return run


def _number(text: str | None, otherwise: float, low: float = 0, high: float = 1) -> float:
    try:
        return min(high, max(low, float(text or otherwise)))
    except ValueError:
        return otherwise
