"""`vilseg serve` and its page in a browser.

Screenshots go to the directory VILSEG_SCREENSHOTS; VILSEG_PAGE_MODEL is the model to serve, a tiny
untrained one without it.
"""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from vilseg.data.synthetic import scenes

playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright (pip install vilseg[dev])")
CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
ROOT = Path(__file__).parents[2]
PATIENCE_MS = 60_000
Open = Callable[..., Any]


def serve(log: Path, *arguments: str, port: int) -> tuple[subprocess.Popen[str], dict[str, Any]]:
    """Start the command; return it once it has printed its result."""
    command = [sys.executable, "-m", "cli.app", "serve", "--port", str(port), "--json", *arguments]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=log.open("w"), text=True)
    line = process.stdout.readline() if process.stdout else ""
    assert line, log.read_text()
    return process, json.loads(line)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory, save_tiny_model: Callable[[str, int], str]) -> Iterator[str]:
    """URL of a server with two models; it is stopped in the end and must exit with 0."""
    folder = tmp_path_factory.mktemp("serve")
    model = os.environ.get("VILSEG_PAGE_MODEL") or save_tiny_model(str(folder / "model"), 128)
    process, said = serve(
        folder / "log",
        *("--model", f"day={model}", "--model", f"night={model}"),
        *(f"videos.storage={folder / 'videos'}", "replicas.maximum=1", "limits.body_bytes=3000000"),
        port=free_port(),
    )
    yield said["url"]
    process.send_signal(signal.SIGINT)
    assert process.wait(90) == 0, (folder / "log").read_text()


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    switches = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    with playwright.sync_playwright() as library:
        context = library.chromium.launch_persistent_context(
            str(tmp_path_factory.mktemp("profile")), executable_path=CHROMIUM, args=switches, accept_downloads=True
        )
        context.set_default_timeout(PATIENCE_MS)
        yield context
        context.close()


@pytest.fixture
def open_page(browser: Any, url: str) -> Iterator[Open]:
    """``open_page(query, width)``: the page; errors of scripts and requests that go elsewhere end the test."""
    pages: list[Any] = []
    wrong: list[str] = []

    def show(query: str = "", width: int = 1280, height: int = 1150, scheme: str = "light") -> Any:
        page = browser.new_page()
        pages.append(page)
        page.set_viewport_size({"width": width, "height": height})
        page.emulate_media(color_scheme=scheme)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("request", lambda request: wrong.append(request.url) if foreign(request.url, url) else None)
        page.goto(url + query)
        page.wait_for_selector("#vilseg-examples button")
        return page

    yield show
    seen = list(wrong)  # a page that is closed gives up what it was fetching, and says so
    for page in pages:
        page.close()
    # A video that is shown anew is fetched anew, and its page says that the fetch before was given up.
    assert [text for text in seen if text != "Failed to fetch"] == []


def foreign(asked: str, url: str) -> bool:
    return not asked.startswith((url, "data:", "blob:"))


def keep(page: Any, name: str) -> None:
    """Save a screenshot of the page."""
    folder = os.environ.get("VILSEG_SCREENSHOTS")
    if folder:
        Path(folder).mkdir(parents=True, exist_ok=True)
        page.screenshot(path=Path(folder) / f"{name}.png", full_page=True)


def result(page: Any, name: str = "picture") -> Any:
    viewer = page.locator(f"vilseg-viewer[name={name}][ready]")
    viewer.wait_for()
    return viewer


def names(viewer: Any) -> list[str]:
    return viewer.locator("li span").all_text_contents()


def add_class(page: Any, field: str, name: str) -> None:
    box = page.locator(f"#{field} input")
    box.fill(name)
    box.press("Enter")


def tags(page: Any, field: str) -> list[str]:
    return [text.strip() for text in page.locator(f"#{field} .token").all_text_contents()]


def shown_pixels(viewer: Any) -> np.ndarray:
    """Return the pixels of the canvas. Shape: (H, W, 4)."""
    script = """v => { const c = v.shadowRoot.querySelector('canvas');
        return [c.height, c.width, Array.from(c.getContext('2d').getImageData(0, 0, c.width, c.height).data)]; }"""
    height, width, values = viewer.evaluate(script)
    return np.array(values, np.uint8).reshape(height, width, 4)


@pytest.fixture(scope="module")
def photo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("photos") / "my photo.png"
    Image.fromarray(scenes.render_scene(3, 0, 160).image).save(path)
    return path


def test_the_first_result_is_one_click_away(open_page: Open) -> None:
    page = open_page()
    keep(page, "0-start")
    page.locator("#vilseg-examples button").first.click()
    viewer = result(page)
    assert set(names(viewer)) <= {re.split(r"\|", tag)[0] for tag in tags(page, "classes")}
    assert names(viewer)
    page.wait_for_timeout(500)
    keep(page, "1-example")


def test_a_picture_of_ones_own_with_ones_own_classes(open_page: Open, photo: Path) -> None:
    page = open_page()
    page.locator("#picture input[type=file]").set_input_files(photo)
    page.get_by_text("Name at least one class").wait_for()
    for name in ("sky|clouds", "grass", "a boat"):
        add_class(page, "classes", name)
    viewer = result(page)
    page.wait_for_function("document.querySelector('vilseg-viewer[ready]') && location.search.includes('a+boat')")
    assert set(names(viewer)) <= {"sky", "grass", "a boat"}
    assert shown_pixels(viewer).shape == (160, 160, 4)


def test_hovering_names_what_is_below_and_so_does_the_keyboard(open_page: Open) -> None:
    page = open_page()
    page.locator("#vilseg-examples button").first.click()
    viewer = result(page)
    canvas = viewer.locator("canvas")
    plain = shown_pixels(viewer)
    canvas.hover(position={"x": 40, "y": 40})
    tip = viewer.locator(".tip")
    assert re.fullmatch(r"[\w ]+ · [01]\.\d\d", tip.inner_text())
    assert tip.inner_text().split(" · ")[0] in names(viewer)
    page.mouse.move(0, 0)
    assert not tip.is_visible()
    np.testing.assert_array_equal(shown_pixels(viewer), plain)
    first = viewer.locator("li button").first
    first.focus()
    marked = shown_pixels(viewer)
    assert len(names(viewer)) == 1 or (marked != plain).any()
    page.keyboard.press("Enter")
    assert first.get_attribute("aria-pressed") == "true"


def test_threshold_opacity_and_views_are_live_without_asking_the_server(open_page: Open) -> None:
    page = open_page()
    page.locator("#vilseg-examples button").first.click()
    viewer = result(page)
    page.wait_for_timeout(1000)
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url) if "queue/join" in request.url else None)
    classes = shown_pixels(viewer)
    page.locator("#opacity input[type=number]").fill("0")
    assert (shown_pixels(viewer) != classes).any()
    seen = {classes.tobytes(), shown_pixels(viewer).tobytes()}
    page.locator("#opacity input[type=number]").fill("0.9")
    for label in ("Clusters", "Scores", "Picture"):
        page.locator("#view").get_by_text(label).click()
        page.wait_for_timeout(100)
        seen.add(shown_pixels(viewer).tobytes())
        keep(page, f"2-{label.lower()}")
    assert len(seen) == 5
    page.locator("#threshold input[type=number]").fill("1")
    note = viewer.get_by_text("has no class at this threshold")
    note.wait_for()
    page.locator("#threshold input[type=number]").fill("0")
    note.wait_for(state="hidden")
    assert names(viewer)
    assert asked == []


def test_background_takes_what_is_left_and_the_link_restores_it_all(open_page: Open, url: str) -> None:
    page = open_page()
    page.locator("#vilseg-examples button").nth(1).click()
    viewer = result(page)
    page.get_by_label("Background", exact=True).first.check()
    page.wait_for_function("location.search.includes('background=1')")
    page.locator("#bias input[type=number]").fill("0.3")
    page.wait_for_function("location.search.includes('bias=0.3')")
    viewer.locator("[data-class=background]").wait_for()
    page.locator("#threshold input[type=number]").fill("0.2")
    page.locator("#view").get_by_text("Scores").click()
    page.wait_for_function("location.search.includes('view=scores')")
    drawn, listed = shown_pixels(viewer), names(viewer)
    again = open_page(page.url.removeprefix(url))
    restored = result(again)
    assert tags(again, "classes") == tags(page, "classes")
    assert names(restored) == listed
    np.testing.assert_array_equal(shown_pixels(restored), drawn)
    assert again.locator("#threshold input[type=number]").input_value() == "0.2"


def test_a_link_to_a_picture_that_is_gone_says_so(open_page: Open) -> None:
    page = open_page('/?picture=0123456789abcdef&classes=["sky"]')
    page.get_by_text("not kept any more").wait_for()
    assert tags(page, "classes") == ["sky"]


def test_downloads_hold_what_is_shown(open_page: Open, photo: Path, tmp_path: Path) -> None:
    page = open_page()
    for name in ("sky", "grass"):
        add_class(page, "classes", name)
    page.locator("#picture input[type=file]").set_input_files(photo)
    result(page)
    with page.expect_download() as mask:
        page.get_by_role("button", name="Download mask (PNG)").click()
    mask.value.save_as(tmp_path / "mask.png")
    labels = np.asarray(Image.open(tmp_path / "mask.png"))
    assert labels.shape == (160, 160)
    assert set(np.unique(labels)) <= {0, 1}
    with page.expect_download() as coco:
        page.get_by_role("button", name="Download COCO (JSON)").click()
    coco.value.save_as(tmp_path / "coco.json")
    found = json.loads((tmp_path / "coco.json").read_text())
    assert {category["name"] for category in found["categories"]} == {"sky", "grass"}
    assert sum(annotation["area"] for annotation in found["annotations"]) == labels.size


def test_every_mistake_has_its_sentence(open_page: Open, tmp_path: Path) -> None:
    page = open_page()
    add_class(page, "classes", "sky")
    (tmp_path / "text.jpg").write_text("text named .jpg")
    page.locator("#picture input[type=file]").set_input_files(tmp_path / "text.jpg")
    page.get_by_text("The bytes are not an image of a known format.").wait_for()
    page.wait_for_timeout(500)
    keep(page, "3-error")
    page = open_page()
    page.locator("#vilseg-examples button").first.click()
    result(page)
    add_class(page, "classes", "x" * 101)
    page.get_by_text("A class name is longer than 100 letters.").wait_for()
    noise = np.random.default_rng(0).integers(0, 255, (1200, 1200, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "large.png")
    page.locator("#picture").get_by_label("Remove Image").click()
    page.locator("#picture input[type=file]").set_input_files(tmp_path / "large.png")
    page.get_by_text("more than 3,000,000 bytes").wait_for()


def test_two_class_lists_side_by_side(open_page: Open, photo: Path) -> None:
    page = open_page()
    page.get_by_role("tab", name="Compare").click()
    page.locator("#compare-picture input[type=file]").set_input_files(photo)
    for letter, names_there in (("A", ["sky", "grass"]), ("B", ["wall", "cat", "sky"])):
        for name in names_there:
            add_class(page, f"classes-{letter}", name)
    page.locator("#compare").click()
    for letter, names_there in (("A", ["sky", "grass"]), ("B", ["wall", "cat", "sky"])):
        assert set(names(result(page, f"compare-{letter}"))) <= set(names_there)
    page.wait_for_timeout(300)
    keep(page, "4-compare")


def test_several_pictures_at_once(open_page: Open, photo: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.jpg").write_text("no picture")
    shutil.copy(photo, tmp_path / "second.png")
    page = open_page()
    page.get_by_role("tab", name="Several pictures").click()
    page.locator("#pictures input[type=file]").set_input_files([photo, tmp_path / "bad.jpg", tmp_path / "second.png"])
    for name in ("sky", "grass"):
        add_class(page, "batch-classes", name)
    page.locator("#batch").click()
    page.get_by_text("2 of 3 pictures segmented.").wait_for()
    page.get_by_text("bad.jpg: The bytes are not an image").wait_for()
    with page.expect_download() as download:
        page.locator("#batch-file a").first.click()
    download.value.save_as(tmp_path / "masks.zip")
    archive = zipfile.ZipFile(tmp_path / "masks.zip")
    masks = sorted(name for name in archive.namelist() if name.startswith("masks/"))
    assert [re.sub(r"\W", "", name[6:]) for name in masks] == ["001myphotopng", "003secondpng"]
    found = json.loads(archive.read("annotations.json"))
    assert [panoptic["file_name"] for panoptic in found["panoptic"]] == masks
    labels = np.asarray(Image.open(io.BytesIO(archive.read(masks[0]))))
    assert sum(a["area"] for a in found["annotations"] if a["image_id"] == 1) == labels.size
    page.wait_for_timeout(500)
    keep(page, "5-batch")


def test_a_video(open_page: Open, tmp_path: Path) -> None:
    pytest.importorskip("av", reason="needs PyAV (pip install vilseg[video])")
    from vilseg.segmentation.video_io import Frame, write_video

    images = [scenes.render_scene(3, 0, 128).image for _ in range(2)]
    write_video(str(tmp_path / "video.mp4"), (Frame(i, i / 10, images[i % 2]) for i in range(12)))
    page = open_page()
    page.get_by_role("tab", name="Video").click()
    page.locator("#video input[type=file]").set_input_files(tmp_path / "video.mp4")
    for name in ("sky", "grass"):
        add_class(page, "video-classes", name)
    page.locator("#video video").wait_for()
    page.locator("#video-run").click()
    page.get_by_text(re.compile(r"12 frames, 1\.2 s")).wait_for()
    page.locator("#video-overlay video").wait_for()
    with page.expect_download() as download:
        page.locator("#video-masks a").first.click()
    download.value.save_as(tmp_path / "masks.zip")
    assert "000011.png" in zipfile.ZipFile(tmp_path / "masks.zip").namelist()
    keep(page, "6-video")


def test_a_telephone_shows_all_of_it(open_page: Open) -> None:
    page = open_page(width=390, height=844, scheme="dark")
    page.locator("#vilseg-examples button").first.click()
    viewer = result(page)
    page.wait_for_timeout(500)
    keep(page, "7-telephone-dark")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    box = viewer.locator("canvas").bounding_box()
    assert box["x"] >= 0
    assert box["x"] + box["width"] <= 390


def test_nothing_is_fetched_from_addresses_that_callers_send(url: str) -> None:
    asked: list[bytes] = []
    with socket.socket() as trap:
        trap.bind(("127.0.0.1", 0))
        trap.listen()
        trap.settimeout(3)
        address = f"http://127.0.0.1:{trap.getsockname()[1]}/a.png"

        def listen() -> None:
            try:
                connection, _ = trap.accept()
                asked.append(connection.recv(100))
            except TimeoutError:
                return

        listener = threading.Thread(target=listen)
        listener.start()
        config = httpx.get(f"{url}/config").json()
        for number, dependency in enumerate(config["dependencies"]):
            data = [{"path": address, "url": address, "meta": {"_type": "gradio.FileData"}}] * len(dependency["inputs"])
            body = {"data": data, "fn_index": dependency["id"], "session_hash": f"s{number}"}
            httpx.post(f"{url}/gradio_api/queue/join", json=body)
        time.sleep(1)
        listener.join()
    assert asked == []


@pytest.mark.slow
def test_with_keys_the_page_wants_one_and_a_stop_waits_for_what_is_in_work(
    tmp_path: Path, save_tiny_model: Callable[[str, int], str], vilseg: Callable[..., Any], browser: Any
) -> None:
    keys, model = tmp_path / "keys.txt", save_tiny_model(str(tmp_path / "model"), 64)
    key = vilseg("key", "anna", "--file", str(keys)).stdout.strip()
    options = ("--model", model, "--keys", str(keys), "--host", "0.0.0.0", f"videos.storage={tmp_path / 'videos'}")
    process, said = serve(tmp_path / "log", *options, port=free_port())
    try:
        page = browser.new_page()
        page.goto(said["url"])
        page.get_by_label("username").fill("anna")
        page.get_by_label("password").fill("wrong")
        page.get_by_role("button", name="Login").click()
        page.get_by_text("Incorrect").wait_for()
        page.get_by_label("username").fill("anna")
        page.get_by_label("password").fill(key)
        page.get_by_role("button", name="Login").click()
        page.locator("#vilseg-examples button").first.click()
        assert names(result(page))
        page.close()
        headers = {"Authorization": f"Bearer {key}"}
        assert httpx.get(f"{said['url']}/v1/models").status_code == 401
        assert httpx.get(f"{said['url']}/v1/models", headers=headers).status_code == 200
        heavy = io.BytesIO()
        Image.fromarray(np.random.default_rng(0).integers(0, 255, (2500, 2500, 3), np.uint8)).save(heavy, "JPEG")
        answers: list[httpx.Response] = []

        def ask() -> None:
            files, data = {"image": heavy.getvalue()}, {"classes": "sky,grass"}
            answers.append(httpx.post(f"{said['url']}/v1/segment", files=files, data=data, headers=headers, timeout=90))

        asking = threading.Thread(target=ask)
        asking.start()
        time.sleep(0.5)
        process.send_signal(signal.SIGTERM)
        asking.join()
        assert [answer.status_code for answer in answers] == [200]
        assert process.wait(90) == 0
    finally:
        process.kill()
