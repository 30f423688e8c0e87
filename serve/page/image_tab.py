"""Tab for one image, which is encoded once and then segmented into any classes that the user enters."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import gradio as gr

from serve.http.forms import json_names
from serve.page.components import PageBackend, class_tags, empty, viewer
from serve.page.examples import Example
from serve.request_types import Format, SegmentRequest
from vilseg.api_schema import ImageResult

_CACHED, _CACHED_BYTES = 64, 256 << 20
"""Maximum number of cached images, and maximum of their total bytes; the least recently used image is evicted."""
_BEGIN = "Drop or paste a picture, or choose an example."
_SESSION_S = 3600
"""Seconds after which the image of an idle page is deleted from memory."""
_VIEWS = ("classes", "clusters", "scores", "picture")


class ImageCache:
    """Cache of images for links that restore the content of a page; ids are hashes of the images, so they cannot be guessed.

    Args:
        examples: Example images, which are never evicted.

    Example:
        >>> cache = ImageCache([])
        >>> name = cache.name(b"an encoded image")
        >>> cache.add(name, b"an encoded image")
        >>> len(name), cache.get(name), cache.get("0" * 32)
        (32, b'an encoded image', None)
    """

    def __init__(self, examples: Sequence[Example]) -> None:
        self.examples = {f"example-{number}": example for number, example in enumerate(examples, 1)}
        self._names = {example.image: name for name, example in self.examples.items()}
        self._images: OrderedDict[str, bytes] = OrderedDict()

    def name(self, image: bytes) -> str:
        """Compute the id of an encoded image. This hashes the image, so call it in a thread."""
        return self._names.get(image) or hashlib.sha256(image).hexdigest()[:32]

    def add(self, name: str, image: bytes) -> None:
        """Store an image under its id and mark it as most recently used. Not thread-safe: call it in the event loop only."""
        if name in self.examples:
            return
        self._images[name] = image
        self._images.move_to_end(name)
        while len(self._images) > _CACHED or sum(map(len, self._images.values())) > _CACHED_BYTES:
            self._images.popitem(last=False)

    def get(self, name: str) -> bytes | None:
        """Return the image with the id ``name``; None if it is unknown or was evicted."""
        if name in self.examples:
            return self.examples[name].image
        return self._images.get(name)


class ImageTab:
    """Event handlers of the tab.

    The state of a session is a dictionary with ``image`` (encoded bytes), ``id`` (id in the cache), ``encoded`` (model URI ->
    features of the image) and ``shown`` (values of class list, background, bias and model for the displayed result).

    Args:
        backend: Sender of requests to replicas.
        cache: Images that links refer to.
    """

    def __init__(self, backend: PageBackend, cache: ImageCache) -> None:
        self._backend = backend
        self._cache = cache

    async def open(self, image: bytes) -> dict[str, Any]:
        """Return the state of a session for a new encoded image."""
        return {"image": image, "id": await asyncio.to_thread(self._cache.name, image)}

    async def show(self, state: dict[str, Any], *controls: Any) -> tuple[str, dict[str, Any]]:
        """Segment the image of the session; return the result as HTML and the new state.

        Args:
            state: State of the session.
            controls: Values of class list, background, bias, model, view, opacity and threshold.
        """
        names, has_background, bias, model, *display = controls
        if not state.get("image"):
            return empty(_BEGIN), state
        if not names:
            return empty("Name at least one class to look for."), state
        uri = self._backend.config().models.get(model, "")  # a rollout may change the model of a name
        request = self._backend.request(
            state["image"],
            names,
            model=model,
            background=has_background,
            bias=bias,
            encoded=state.get("encoded", {}).get(uri),
        )
        response = await self._backend.segment(request)
        encoded = {**state.get("encoded", {}), uri: response.encoded}
        state = {**state, "encoded": encoded, "shown": controls[:4]}
        self._cache.add(state["id"], state["image"])
        context: dict[str, Any] = {"link": self._link(state["id"], *controls[:4])}
        if state.pop("restored", False):  # otherwise the browser has newer values of its controls
            context["settings"] = dict(zip(("view", "opacity", "threshold"), display, strict=True))
        return await asyncio.to_thread(viewer, "picture", response.body, context), state

    async def show_if_changed(self, state: dict[str, Any], *controls: Any) -> tuple[Any, Any]:
        """Segment as `show` does if the controls have changed; do nothing if the result for them is already displayed.

        The class field also reports changes that an example or a link made, whose result is already displayed.
        """
        if state.get("shown") == controls[:4]:
            return gr.skip(), gr.skip()
        return await self.show(state, *controls)

    async def upload(self, path: str | None, *controls: Any) -> tuple[str, dict[str, Any]]:
        """Segment the uploaded image at ``path``; return the result as HTML and the new state."""
        return await self.show(await self.open(await self._backend.read(path)) if path else {}, *controls)

    async def example(self, index: int, *controls: Any) -> tuple[Any, ...]:
        """Segment an example image; return its path and class list, the result as HTML, and the new state."""
        chosen = list(self._cache.examples.values())[index]
        names = list(chosen.classes)
        html, state = await self.show(await self.open(chosen.image), names, *controls[1:])
        path = await asyncio.to_thread(self._backend.write_file, chosen.image, chosen.name)
        return path, names, html, state

    async def restore(self, request: gr.Request) -> tuple[Any, ...]:
        """Restore the page from the query parameters of its address; return image path, controls, result (HTML) and state."""
        query = dict(request.query_params)
        models = self._backend.models()
        if not query.keys() & {"picture", "classes"}:
            # Nothing to restore; skip all outputs but the list of models, so that input made while the page loaded is kept.
            skipped = [gr.skip() for _ in range(7)]
            skipped[3] = gr.Dropdown(choices=models)
            return gr.skip(), *skipped, gr.skip(), gr.skip()
        controls = [
            json_names(query.get("classes", "")) or [],
            query.get("background") == "1",
            _number(query.get("bias"), 0, -0.3, 0.3),
            query["model"] if query.get("model") in models else models[0],
            query["view"] if query.get("view") in _VIEWS else "classes",
            _number(query.get("opacity"), 0.6),
            _number(query.get("threshold"), 0),
        ]
        image = self._cache.get(query.get("picture", ""))
        if image is None:
            if query.get("picture"):
                gr.Warning("The picture of this link is not kept any more; drop it once more.")
            html, path = empty(_BEGIN), None
            state: dict[str, Any] = {}
        else:
            html, state = await self.show({**await self.open(image), "restored": True}, *controls)
            path = await asyncio.to_thread(self._backend.write_file, image, "picture")
        controls[3] = gr.Dropdown(choices=models, value=controls[3])
        return path, *controls, html, state

    async def download_mask(self, state: dict[str, Any], *controls: Any) -> str:
        """Segment the image, write the label map (PNG) and return its path."""
        response = await self._backend.segment(self._download_request(state, controls, "png"))
        return await asyncio.to_thread(self._backend.write_file, response.body, "mask.png")

    async def download_coco(self, state: dict[str, Any], *controls: Any) -> str:
        """Segment the image, write the annotations (COCO JSON) and return their path."""
        response = await self._backend.segment(self._download_request(state, controls, "json"))

        def write() -> str:
            annotations = ImageResult.model_validate_json(response.body).to_segmentation().to_coco()
            return self._backend.write_file(json.dumps(annotations).encode(), "annotations.json")

        return await asyncio.to_thread(write)

    def _download_request(self, state: dict[str, Any], controls: Sequence[Any], format: Format) -> SegmentRequest:
        names, has_background, bias, model, *_, threshold = controls
        if not state.get("image") or not names:
            raise gr.Error("There is nothing to download yet.", title="No result")
        return self._backend.request(
            state["image"],
            names,
            model=model,
            background=has_background,
            bias=bias,
            threshold=threshold,
            format=format,
        )

    def _link(self, image_id: str, names: list[str], has_background: bool, bias: float, model: str) -> dict[str, Any]:
        """Return the query parameters of a link that restores a result; the browser adds those of view, opacity and threshold."""
        return {
            "picture": image_id,
            "classes": json.dumps(names, ensure_ascii=False),
            "background": "1" if has_background else "",
            "bias": bias or "",
            "model": "" if model == self._backend.models()[0] else model,
        }


def build(backend: PageBackend, cache: ImageCache, demo: gr.Blocks) -> None:
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
            model = gr.Dropdown(label="Model", choices=backend.models(), value=backend.models()[0], elem_id="model")
            examples = gr.Dataset(
                components=[gr.Image(visible=False)],
                samples=[[backend.write_file(example.image, example.name)] for example in cache.examples.values()],
                label="Or begin with an example",
                type="index",
                elem_id="vilseg-examples",
            )
        with gr.Column(scale=3, min_width=320):
            result = gr.HTML(empty(_BEGIN), elem_id="result")
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

    tab = ImageTab(backend, cache)
    controls = [classes, background, bias, model, view, opacity, threshold]

    image.upload(tab.upload, [image, *controls], [result, session])
    image.clear(lambda: (empty(_BEGIN), {}), None, [result, session])
    examples.click(tab.example, [examples, *controls], [image, classes, result, session])
    classes.change(tab.show_if_changed, [session, *controls], [result, session], trigger_mode="always_last")
    for control in (background, model):
        control.input(tab.show, [session, *controls], [result, session], trigger_mode="always_last")
    bias.input(tab.show, [session, *controls], [result, session], trigger_mode="always_last", show_progress="hidden")
    # Rendered in the browser, without the server.
    view.input(None, view, None, js="(view) => { vilseg.set(['picture'], { view }); }")
    opacity.input(None, opacity, None, js="(opacity) => { vilseg.set(['picture'], { opacity }); }")
    threshold.input(None, threshold, None, js="(threshold) => { vilseg.set(['picture'], { threshold }); }")
    link.click(None, None, None, js="() => vilseg.copyLink()")
    for button, download in ((png, tab.download_mask), (coco, tab.download_coco)):
        made = button.click(download, [session, *controls], file)
        made.success(None, None, None, js="() => vilseg.download('file')")
    demo.load(tab.restore, None, [image, *controls, result, session])


def _number(text: str | None, default: float, low: float = 0, high: float = 1) -> float:
    try:
        return min(high, max(low, float(text or default)))
    except ValueError:
        return default
