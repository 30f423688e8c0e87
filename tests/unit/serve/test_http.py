"""The HTTP API against the application in process, with a real model behind it."""

import asyncio
import io
import json
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from serve.api_keys import add_key
from serve.http_errors import overloaded_error
from serve.request_types import SegmentRequest, SegmentResponse
from vilseg import Segmenter, ViLSeg
from vilseg.api_schema import ImageResult
from vilseg.data.image_decoding import decode_image
from vilseg.text.vocabulary import Vocabulary

Start = Callable[..., Any]
CLASSES = "sky|clouds, sea"


def labels_of(response: Any) -> np.ndarray:
    return ImageResult.model_validate_json(response.content).to_segmentation().labels


def post(client: Any, photo: bytes, path: str = "/v1/segment", name: str = "image", **form: Any) -> Any:
    return client.post(path, files={name: ("photo.jpg", photo)}, data={"classes": CLASSES, **form})


def refused(response: Any, status: int, code: str) -> str:
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert error["code"] == code
    assert error["request_id"] == response.headers["x-request-id"]
    assert error["message"][0].isupper() or error["message"].split(":")[0].islower()
    assert error["message"].endswith(".")
    return str(error["message"])


def test_the_answer_is_that_of_the_segmenter(start: Start, photo: bytes, model_uri: str) -> None:
    response = post(start(), photo)
    assert response.status_code == 200
    document = response.json()
    wanted = Segmenter(ViLSeg.from_pretrained(model_uri), CLASSES, device="cpu")(decode_image(photo))
    np.testing.assert_array_equal(labels_of(response), wanted.labels)
    assert document["classes"] == ["sky", "sea"]
    assert (document["width"], document["height"], document["model"]) == (60, 40, "default")
    assert document["request_id"] == response.headers["x-request-id"]


def test_other_formats(start: Start, photo: bytes) -> None:
    client = start()
    labels = labels_of(post(client, photo))
    png = post(client, photo, format="png")
    assert png.headers["content-type"] == "image/png"
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(png.content))), labels)
    overlay = Image.open(io.BytesIO(post(client, photo, format="overlay").content))
    assert overlay.mode == "RGB"
    assert "polygons" in post(client, photo, polygons="true").json()["regions"][0]


def test_background_by_word_by_switch_and_by_list(start: Start, photo: bytes) -> None:
    client = start()
    for form in ({"background": "true"}, {"classes": "sky,sea,background"}, {"background": "wall, road"}):
        assert post(client, photo, **form).json()["classes"] == ["sky", "sea", "background"]
    assert post(client, photo, background="false").json()["classes"] == ["sky", "sea"]
    most = post(client, photo, background="true", background_bias="1").json()["regions"]
    assert [region["class"] for region in most] == ["background"]


def test_class_lists_may_be_json_and_hold_commas(start: Start, photo: bytes) -> None:
    names = ["wall, concrete", "sky|clouds"]
    document = post(start(), photo, classes=json.dumps(names)).json()
    assert document["classes"] == ["wall, concrete", "sky"]


def test_a_class_list_is_never_taken_for_a_path(start: Start, photo: bytes, tmp_path: Path) -> None:
    (tmp_path / "secret.txt").write_text("a secret\n")
    document = post(start(), photo, classes=str(tmp_path / "secret.txt")).json()
    assert document["classes"] == [str(tmp_path / "secret.txt")]


@pytest.mark.parametrize(
    ("form", "status", "code", "words"),
    [
        ({"classes": ""}, 422, "invalid", "classes"),
        ({"classes": " , "}, 422, "bad_classes", "at least one class name"),
        ({"classes": "a,b,A"}, 422, "bad_classes", "listed twice"),
        ({"classes": '["a", 1]'}, 422, "bad_classes", "no array of strings"),
        ({"classes": "a|"}, 422, "bad_classes", "empty synonym"),
        ({"classes": ",".join(map(str, range(1001)))}, 422, "too_many_classes", "1,001 names; at most 1,000"),
        ({"classes": "x" * 101}, 422, "name_too_long", "longer than 100 letters"),
        ({"threshold": "2"}, 422, "invalid", "threshold"),
        ({"threshold": "nan"}, 422, "invalid", "threshold"),
        ({"format": "bmp"}, 422, "invalid", "format"),
        ({"model": "nobody"}, 404, "unknown_model", "the models are: default, other"),
    ],
)
def test_what_is_wrong_is_said(
    start: Start, photo: bytes, form: dict[str, str], status: int, code: str, words: str
) -> None:
    assert words in refused(post(start(), photo, **form), status, code)


def test_what_is_no_image_is_refused(start: Start, photo: bytes) -> None:
    client = start(limits={"pixels": 2000, "body_bytes": 10_000})
    assert "known format" in refused(post(client, b"text named .jpg"), 422, "not_a_picture")
    assert "no bytes" in refused(post(client, b""), 422, "not_a_picture")
    assert "60 x 40 pixels" in refused(post(client, photo), 413, "too_many_pixels")
    assert "bytes, the most" in refused(post(client, b"0" * 200_000), 413, "body_too_large")


def test_a_body_that_does_not_say_how_long_it_is_ends_at_the_limit(start: Start) -> None:
    def body() -> Any:
        yield b'--x\r\nContent-Disposition: form-data; name="image"; filename="a"\r\n\r\n'
        for _ in range(100):
            yield b"0" * 10_000

    headers = {"content-type": "multipart/form-data; boundary=x"}
    response = start(limits={"body_bytes": 10_000}).post("/v1/segment", content=body(), headers=headers)
    refused(response, 413, "body_too_large")


def test_a_batch_keeps_the_order_and_refuses_one_by_one(start: Start, photo: bytes) -> None:
    client = start()
    files = [("images", (name, data)) for name, data in (("a.jpg", photo), ("../b.jpg", b"no"), ("c.jpg", photo))]
    items = client.post("/v1/segment/batch", files=files, data={"classes": CLASSES}).json()["results"]
    assert [(item["name"], item["status"]) for item in items] == [
        ("a.jpg", "ok"),
        ("../b.jpg", "rejected"),
        ("c.jpg", "ok"),
    ]
    assert items[1]["error"]["code"] == "not_a_picture"
    assert items[0]["result"]["regions"] == items[2]["result"]["regions"]
    many = client.post("/v1/segment/batch", files=[files[0]] * 17, data={"classes": CLASSES})
    assert "16" in refused(many, 422, "invalid")


def test_overload_is_told_with_a_time_to_come_back(start: Start, photo: bytes) -> None:
    async def segment(_: SegmentRequest) -> SegmentResponse:
        raise overloaded_error()

    client = start(segment)
    for response in (post(client, photo), post(client, photo, "/v1/segment/batch", "images")):
        refused(response, 503, "overloaded")
        assert int(response.headers["retry-after"]) >= 1


def test_what_takes_too_long_is_given_up(start: Start, photo: bytes) -> None:
    dropped = []

    async def segment(_: SegmentRequest) -> SegmentResponse:
        try:
            await asyncio.sleep(30)
        except asyncio.CancelledError:
            dropped.append(True)
            raise
        return SegmentResponse()

    # Long enough to be asked at all where other tests have the cores.
    response = post(start(segment, limits={"seconds": 1.5}), photo)
    assert "1.5 s" in refused(response, 503, "timeout")
    assert dropped


def test_errors_of_our_own_tell_nothing_of_the_inside(start: Start, photo: bytes) -> None:
    async def segment(_: SegmentRequest) -> SegmentResponse:
        raise RuntimeError("/srv/secret/model.safetensors")

    client = start(segment)
    response = client.post("/v1/segment", files={"image": photo}, data={"classes": "a"})
    refused(response, 500, "internal")
    assert "secret" not in response.text
    assert "Traceback" not in response.text


def test_without_keys_only_this_machine_is_answered(start: Start, photo: bytes) -> None:
    for client in (start(address="192.0.2.7"), start(host="evil.example")):
        for response in (post(client, photo), client.get("/v1/models"), client.get("/metrics")):
            refused(response, 403, "this_machine_only")


def test_with_keys_everybody_needs_one(start: Start, photo: bytes, tmp_path: Path) -> None:
    key = add_key(str(tmp_path / "keys.txt"), "anna")
    client = start(keys=str(tmp_path / "keys.txt"), address="192.0.2.7", host="vilseg.example")
    for headers in ({}, {"authorization": key}, {"authorization": f"Bearer {key}x"}, {"authorization": f"Basic {key}"}):
        response = client.get("/v1/models", headers=headers)
        refused(response, 401, "unauthorized")
        assert response.headers["www-authenticate"] == "Bearer"
        assert client.get("/metrics", headers=headers).status_code == 401
    client.headers["authorization"] = f"Bearer {key}"
    assert post(client, photo).status_code == 200
    assert client.get("/metrics").status_code == 200


def test_other_origins_are_not_let_in_unless_they_are_named(start: Start) -> None:
    page = {"origin": "https://page.example"}
    assert "access-control-allow-origin" not in start().get("/v1/models", headers=page).headers
    named = start(cors_origins=["https://page.example"]).get("/v1/models", headers=page)
    assert named.headers["access-control-allow-origin"] == "https://page.example"


def test_a_request_may_bring_its_own_id(start: Start) -> None:
    client = start()
    assert client.get("/v1/models", headers={"x-request-id": "abc-1"}).headers["x-request-id"] == "abc-1"
    for odd in ("a b", "x" * 65, "<b>"):
        given = client.get("/v1/models", headers={"x-request-id": odd}).headers["x-request-id"]
        assert given != odd
        assert len(given) == 16


def test_wrong_addresses_and_methods(start: Start) -> None:
    client = start()
    refused(client.get("/v1/nothing"), 404, "unknown_route")
    response = client.get("/v1/segment")
    refused(response, 405, "method_not_allowed")
    assert response.headers["allow"] == "POST"
    assert client.get("/healthz").json() == {"status": "ok"}


def test_metrics_for_prometheus_count_what_happened(start: Start, photo: bytes) -> None:
    client = start()
    for image in (photo, photo, b"no"):
        post(client, image)
    lines = dict(line.rsplit(" ", 1) for line in client.get("/metrics").text.splitlines() if line[0] != "#")
    assert lines['vilseg_requests_total{route="/v1/segment",status="200"}'] == "2.0"
    assert lines['vilseg_rejected_total{code="not_a_picture"}'] == "1.0"
    assert lines['vilseg_request_seconds_count{route="/v1/segment"}'] == "3.0"


def test_the_schema_shows_every_route_with_an_example(start: Start) -> None:
    schema = start().get("/openapi.json").json()
    assert {
        "/v1/segment",
        "/v1/segment/batch",
        "/v1/videos",
        "/v1/videos/{video_id}",
        "/v1/videos/{video_id}/{name}",
        "/v1/models",
        "/healthz",
        "/metrics",
    } == set(schema["paths"])
    form = schema["components"]["schemas"]["Body_segment_v1_segment_post"]["properties"]
    assert form["classes"]["examples"]
    assert schema["components"]["schemas"]["ImageResult"]["example"]["regions"]


def test_an_encoded_image_is_classified_again_without_the_encoder(model_uri: str, photo: bytes) -> None:
    from serve import engine as module

    async def scenario() -> None:
        engine, model = module.Engine(batch=4, max_pixels=10**6), module.LoadedModel(model_uri)
        responses = []
        for names, encoded in (
            (("sky", "sea"), None),
            (("boat", "sea", "sky"), "kept"),
            (("boat", "sea", "sky"), None),
        ):
            request = SegmentRequest(
                request_id="r",
                model="m",
                image=photo,
                vocabulary=Vocabulary(names),
                format="viewer",
                encoded=responses[0].encoded if encoded else None,
            )
            responses.append(await engine.segment(model, request))
        assert json.loads(responses[1].body) == json.loads(responses[2].body)

    asyncio.run(scenario())


@pytest.fixture
def video(tmp_path: Path) -> bytes:
    pytest.importorskip("av", reason="needs PyAV (pip install vilseg[video])")
    from vilseg.segmentation.video_io import Frame, write_video

    frames = (Frame(i, i / 10, np.full((48, 64, 3), 20 * i, np.uint8)) for i in range(8))
    write_video(str(tmp_path / "video.mp4"), frames)
    return (tmp_path / "video.mp4").read_bytes()


def wait(client: Any, url: str) -> dict[str, Any]:
    end = time.monotonic() + 60
    while time.monotonic() < end:
        state = client.get(url).json()
        if state["status"] in ("done", "failed"):
            return dict(state)
        time.sleep(0.1)
    raise AssertionError(f"the video is still {state}")


def test_a_video_is_handed_in_asked_after_and_fetched(start: Start, video: bytes) -> None:
    client = start()
    response = post(client, video, "/v1/videos", "video", key_every="4")
    assert response.status_code == 202
    state = wait(client, response.json()["status_url"])
    assert (state["status"], state["frames"], state["width"], state["height"]) == ("done", 8, 64, 48)
    assert client.get(state["overlay_url"]).headers["content-type"] == "video/mp4"
    masks = zipfile.ZipFile(io.BytesIO(client.get(state["masks_url"]).content))
    assert {f"{i:06d}.png" for i in range(8)} | {"frames.csv", "classes.txt"} == set(masks.namelist())
    assert Image.open(masks.open("000003.png")).size == (64, 48)
    assert client.delete(state["status_url"]).status_code == 204
    refused(client.get(state["status_url"]), 404, "unknown_film")


@pytest.mark.parametrize(
    ("content", "limits", "words"),
    [
        (b"#EXTM3U\n#EXTINF:1,\nhttp://127.0.0.1:9/a.ts\n", {}, "not a video"),
        (b"ffconcat version 1.0\nfile /etc/passwd\n", {}, "not a video"),
        (None, {"video_pixels": 100}, "64 x 48 pixels"),
        (None, {"video_seconds": 0.3}, "longer than 0.3 s"),
    ],
)
def test_videos_that_cannot_be_used(
    start: Start, video: bytes, content: bytes | None, limits: dict[str, Any], words: str, tmp_path: Path
) -> None:
    client = start(limits=limits)
    state = wait(client, post(client, content or video, "/v1/videos", "video").json()["status_url"])
    assert state["status"] == "failed"
    assert words in state["error"]
    assert str(tmp_path) not in state["error"]


def test_video_ids_are_no_paths(start: Start) -> None:
    client = start()
    for video_id in ("..", "%2e%2e", "a" * 31, "A" * 32):
        assert client.get(f"/v1/videos/{video_id}").status_code in (404, 405, 422)
    refused(client.get(f"/v1/videos/{'0' * 32}"), 404, "unknown_film")
    refused(client.get(f"/v1/videos/{'0' * 32}/overlay.mp4"), 404, "unknown_film")


def test_gradios_own_way_to_fetch_addresses_is_closed(start: Start) -> None:
    client = start()
    for path in ("file=http://192.0.2.1/a", "file/https://192.0.2.1/a", "proxy=http://192.0.2.1/a", "file=HTTPS:/x"):
        refused(client.get(f"/gradio_api/{path}"), 403, "not_fetched")


def test_pages_of_other_origins_cannot_use_a_server_without_keys(start: Start, photo: bytes) -> None:
    client = start(cors_origins=["https://friend.example"])
    for origin, status in (("https://evil.example", 403), ("https://friend.example", 200), ("http://localhost:1", 200)):
        files, data = {"image": photo}, {"classes": CLASSES}
        assert client.post("/v1/segment", files=files, data=data, headers={"origin": origin}).status_code == status


def test_a_browser_may_ask_without_a_key_whether_it_may_ask(start: Start, tmp_path: Path) -> None:
    add_key(str(tmp_path / "keys.txt"), "anna")
    client = start(keys=str(tmp_path / "keys.txt"), cors_origins=["https://friend.example"])
    for origin, status in (("https://friend.example", 200), ("https://evil.example", 400)):
        headers = {"origin": origin, "access-control-request-method": "POST"}
        assert client.options("/v1/segment", headers=headers).status_code == status


def test_a_prefix_opens_no_way_round_the_keys(start: Start, tmp_path: Path) -> None:
    add_key(str(tmp_path / "keys.txt"), "anna")
    client = start(keys=str(tmp_path / "keys.txt"), root_path="/seg")
    assert client.get("/seg/v1/models").status_code == 401
    assert client.get("/seg/metrics").status_code == 401


@pytest.mark.parametrize("classes", ["[" * 100_000, '["\\ud800"]'])
def test_class_lists_that_break_parsers_are_refused(start: Start, photo: bytes, classes: str) -> None:
    refused(post(start(), photo, classes=classes), 422, "bad_classes")
