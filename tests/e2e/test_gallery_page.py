"""The gallery in a browser: what is shown, filtered, opened and shared; from a disk and from a web server."""

import functools
import http.server
import io
import itertools
import random
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlencode

import numpy as np
import pytest
from PIL import Image

from vilseg import storage
from vilseg.bulk.gallery import THUMBS, thumbnail, write_gallery
from vilseg.segmentation.result import Segmentation
from vilseg.segmentation.visualization import class_colours

playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright (pip install vilseg[dev])")
CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")

CLASSES = ["sky", "grass", "cat", '<b onclick="alert(1)">odd & </script>', "never there"]
PATHS = [
    "plain.jpg",
    "deep/er/with space.jpg",
    "hash#1 query?x=1&y=2.jpg",
    "100% %41.jpg",
    "line\nbreak.jpg",
    "día/日本語 🐈.jpg",
    "quotes\"'`.jpg",
    "back\\slash;comma,(1).jpg",
    "<img src=x onerror=alert(1)>.jpg",
    "javascript:alert(1).jpg",
]
Open = Callable[..., Any]


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    switches = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    with playwright.sync_playwright() as library:
        # A profile of its own: nothing of the user's browser takes part.
        context = library.chromium.launch_persistent_context(
            str(tmp_path_factory.mktemp("profile")), executable_path=CHROMIUM, args=switches
        )
        yield context
        context.close()


@pytest.fixture
def open_page(browser: Any) -> Iterator[Open]:
    """``open_page(url, state=..., width=...)``: the page with all its rows; errors and foreign requests end the test."""
    pages: list[Any] = []
    wrong: list[str] = []

    def show(url: str, state: Any = (), *, width: int = 1280, all_rows: bool = True) -> Any:
        page = browser.new_page()
        pages.append(page)
        page.set_viewport_size({"width": width, "height": 800})
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("dialog", lambda dialog: (wrong.append(f"dialog {dialog.message}"), dialog.dismiss()))
        root = url.rsplit("/", 1)[0]
        page.on("request", lambda request: None if request.url.startswith(root) else wrong.append(request.url))
        page.goto(f"{url}#{urlencode(state)}")
        if all_rows:
            page.wait_for_function("rows.count === about.rows")
        return page

    yield show
    for page in pages:
        page.close()
    assert wrong == []


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten pictures with thumbnails and masks, one of them rejected; scores fall from one to the next."""
    folder = tmp_path_factory.mktemp("an archive")
    rows: list[dict[str, Any]] = []
    for number, path in enumerate(PATHS):
        labels = np.zeros((40, 60), np.uint8)
        labels[:, 20:40] = 2
        labels[:, 40:] = 3 if number % 2 else 255
        image = np.full((40, 60, 3), 25 * number, np.uint8)
        scores = np.full((40, 60), 0.9 - number / 20, np.float32)
        result = Segmentation(labels=labels, classes=tuple(CLASSES), scores=scores, image=image)
        storage.write_bytes(storage.join(str(folder), THUMBS, f"{path}.webp"), thumbnail(image, labels, CLASSES))
        storage.write_bytes(storage.join(str(folder), "masks", f"{path}.png"), result.to_png_bytes())
        rows.append({"path": path, "width": 60, "height": 40, "status": "ok", "error": None})
        rows[-1]["classes"] = [region.class_name for region in result.regions]
        rows[-1]["areas"] = [region.area for region in result.regions]
        rows[-1]["scores"] = [region.score for region in result.regions]
    sentence = "the image is damaged: <script>alert(1)</script>"
    rows.append({"path": "broken.jpg", "status": "rejected", "error": sentence})
    write_gallery(str(folder), rows, CLASSES, title="An archive & more")
    return folder


@pytest.fixture(params=["disk", "server"])
def url(request: pytest.FixtureRequest, archive: Path) -> Iterator[str]:
    if request.param == "disk":
        yield (archive / "gallery.html").as_uri()
        return

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(archive))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/gallery.html"
        server.shutdown()


def paths_shown(page: Any) -> list[str]:
    """Paths of all rows that pass the filter, in order, whether or not there is a card for them now."""
    return page.evaluate("Array.from(order, (row) => rows.paths[row])")


def test_every_picture_is_shown_with_its_thumbnail_whatever_its_name(url: str, open_page: Open) -> None:
    page = open_page(url)
    assert page.locator("#count").inner_text() == "11 pictures"
    page.wait_for_function("[...document.querySelectorAll('.tile img')].every((image) => image.complete)")
    images = page.locator(".tile img").evaluate_all("(all) => all.map((i) => [i.naturalWidth, i.naturalHeight])")
    assert images == [[480, 160]] * 10
    # The worst first, rejected pictures last.
    assert paths_shown(page) == [*reversed(PATHS), "broken.jpg"]
    shown = [text.replace("␊", "\n") for text in page.locator(".tile .path").all_text_contents()]
    assert shown == [*reversed(PATHS), "broken.jpg"]
    assert "the image is damaged: <script>alert(1)</script>" in page.locator(".tile.rejected").inner_text()
    assert page.locator(".tile .score").first.inner_text() == "0.45"
    assert page.evaluate("document.querySelectorAll('[onerror], [onclick]').length") == 0
    assert page.title() == "An archive & more"


def test_every_picture_opens_with_its_mask(url: str, open_page: Open) -> None:
    page = open_page(url, {"order": "name", "status": "ok"})
    page.locator(".tile").first.click()
    seen = []
    for place in range(10):
        page.wait_for_function("document.getElementById('stage').classList.contains('masked')")
        assert page.locator("#position").inner_text() == f"{place + 1} of 10"
        assert page.evaluate("document.getElementById('mask').naturalWidth") == 60
        seen.append(page.evaluate("rows.paths[openRow]"))
        page.keyboard.press("ArrowRight")
    # JavaScript orders by UTF-16 units, as Python does where all is within the basic plane.
    assert seen == sorted(PATHS)
    page.wait_for_function("location.hash.includes('open=')")
    page.keyboard.press("Escape")
    page.locator("#large").wait_for(state="hidden")
    page.wait_for_function("!location.hash.includes('open=')")


def pixel(page: Any, x: float, y: float) -> np.ndarray:
    """The colour at a part of the picture's width and height, as seen on the screen."""
    image = Image.open(io.BytesIO(page.locator("#stage").screenshot())).convert("RGB")
    return np.asarray(image)[int(image.height * y), int(image.width * x)].astype(int)


def test_the_large_view_shows_classes_alone_together_or_not_at_all(archive: Path, open_page: Open) -> None:
    page = open_page((archive / "gallery.html").as_uri(), {"open": PATHS[4]})
    page.wait_for_function("document.getElementById('stage').classList.contains('masked')")
    page.wait_for_function("document.getElementById('photo').complete")
    plain, colours = np.full(3, 100), class_colours(CLASSES).astype(int)

    def mixed(index: int) -> np.ndarray:
        return 0.4 * plain + 0.6 * colours[index]

    page.mouse.move(2, 2)
    assert np.abs(pixel(page, 0.2, 0.5) - mixed(0)).max() <= 8
    assert np.abs(pixel(page, 0.5, 0.5) - mixed(2)).max() <= 8
    assert np.abs(pixel(page, 0.8, 0.5) - plain).max() <= 8  # no class
    rows = page.locator("#legend tr:has(td)").all_inner_texts()
    assert [row.split() for row in rows] == [["sky", "33", "%", "0.70"], ["cat", "33", "%", "0.70"]]
    page.locator("#legend tr:has(td)").nth(1).hover()
    assert np.abs(pixel(page, 0.2, 0.5) - plain).max() <= 8
    assert np.abs(pixel(page, 0.5, 0.5) - mixed(2)).max() <= 8
    page.mouse.move(2, 2)
    page.locator("#fade input").fill("0")
    assert np.abs(pixel(page, 0.2, 0.5) - plain).max() <= 8


def test_without_masks_and_thumbnails_the_numbers_remain(tmp_path: Path, open_page: Open) -> None:
    row = {
        "path": "a.jpg",
        "width": 10,
        "height": 10,
        "status": "ok",
        "classes": ["cat"],
        "areas": [40],
        "scores": [1.0],
    }
    write_gallery(str(tmp_path), [row], CLASSES)
    page = open_page((tmp_path / "gallery.html").as_uri())
    page.get_by_text("no thumbnail").wait_for()
    page.locator(".tile").click()
    assert page.locator("#legend tr:has(td)").all_inner_texts()[0].split() == ["cat", "40", "%", "1.00"]


def test_label_maps_without_colours_are_shown_by_the_thumbnail(tmp_path: Path, open_page: Open) -> None:
    names = [f"class {number}" for number in range(300)]
    labels, image = np.full((60, 40), 299, np.uint16), np.full((60, 40, 3), 100, np.uint8)
    storage.write_bytes(storage.join(str(tmp_path), THUMBS, "a.jpg.webp"), thumbnail(image, labels, names))
    numbers = {"classes": ["class 299"], "areas": [2400], "scores": [0.5]}
    write_gallery(str(tmp_path), [{"path": "a.jpg", "width": 40, "height": 60, "status": "ok", **numbers}], names)
    page = open_page((tmp_path / "gallery.html").as_uri(), {"open": "a.jpg"})
    page.wait_for_function("document.getElementById('tinted').complete")
    expected_colour = 0.45 * 100 + 0.55 * class_colours(names)[299]
    assert np.abs(pixel(page, 0.5, 0.5) - expected_colour).max() <= 12
    page.keyboard.press("Escape")
    assert page.locator("#class-list label").count() == 200
    assert "+ 100 more" in page.locator("#class-list").inner_text()
    page.locator("#class-text").fill("class 123")
    assert page.locator("#class-list label").count() == 1


def random_rows(count: int, seed: int) -> list[dict[str, Any]]:
    rng = random.Random(seed)
    rows: list[dict[str, Any]] = []
    for number in range(count):
        row = {"path": f"{rng.choice('abc')}/IMG {number}.JPG", "width": 640, "height": 480}
        if rng.random() < 0.1:
            rows.append({**row, "status": "rejected", "error": "too large"})
            continue
        names = rng.sample(CLASSES[:4], rng.randint(0, 4))
        areas = [rng.randint(1, 640 * 480 // 4) for _ in names]
        scores = [round(rng.random(), 3) for _ in names]
        rows.append({**row, "status": "ok", "classes": names, "areas": areas, "scores": scores})
    return rows


def expected(rows: list[dict[str, Any]], state: dict[str, Any]) -> dict[str, tuple[bool, Any]]:
    """The paths that a filter lets through, each with what decides its place: the same once more and plainly."""
    low_share, high_share = (float(state.get(f"share_{end}", default)) / 100 for end, default in BOUNDS)
    low_score, high_score = (float(state.get(f"score_{end}", default)) for end, default in BOUNDS)
    wanted, order = state.get("class", []), state.get("order", "")
    bounded = any(name.startswith(("share_", "score_")) for name in state)
    kept = {}
    for row in rows:
        is_ok = row["status"] == "ok"
        if (
            row["status"] != state.get("status", row["status"])
            or state.get("text", "").lower() not in row["path"].lower()
        ):
            continue
        triples = list(zip(row["classes"], row["areas"], row["scores"], strict=True)) if is_ok else []
        regions = {name: (area / (640 * 480), score) for name, area, score in triples}
        total = sum(share for share, _ in regions.values())
        mean = sum(share * score for share, score in regions.values()) / total if total else 0.0
        largest = max((share for share, _ in regions.values()), default=0.0)
        hits = [
            share
            for share, score in (regions[name] for name in wanted if name in regions)
            if low_share <= share <= high_share and low_score <= score <= high_score
        ]
        if wanted and len(hits) < (len(wanted) if state.get("match") == "all" else 1):
            continue
        inside = is_ok and low_share <= largest <= high_share and low_score <= mean <= high_score
        if not wanted and bounded and not inside:
            continue
        key = {"": mean, "best": -mean, "name": row["path"], "area": -sum(hits) if wanted else -largest}[order]
        kept[row["path"]] = (not is_ok and order != "name", key)
    return kept


BOUNDS = (("min", "-inf"), ("max", "inf"))
# Bounds lie between the steps that shares and scores are rounded to.
STATES: list[dict[str, Any]] = [
    {},
    {"order": "best"},
    {"order": "name"},
    {"order": "area"},
    {"status": "rejected"},
    {"status": "ok", "text": "IMG 1"},
    {"text": "b/img 2"},
    {"text": ".*"},
    {"class": ["cat"]},
    {"class": ["cat", "sky"]},
    {"class": ["cat", "sky"], "match": "all"},
    {"class": ["cat", CLASSES[3], "grass"], "match": "all", "order": "area"},
    {"class": ["never there"]},
    {"share_min": "15.005"},
    {"share_max": "9.995", "order": "best"},
    {"score_min": "0.40005", "score_max": "0.60005"},
    {"class": ["cat"], "score_max": "0.2505", "order": "area"},
    {"class": ["cat", "grass"], "share_min": "10.005", "share_max": "20.005", "score_min": "0.5005", "match": "all"},
    {"class": ["sky"], "share_min": "5.005", "status": "ok", "text": "a/", "order": "name"},
]


def test_filters_and_orders_agree_with_a_plain_reckoning(tmp_path: Path, open_page: Open) -> None:
    rows = random_rows(600, seed=3)
    write_gallery(str(tmp_path), rows, CLASSES)
    page = open_page((tmp_path / "gallery.html").as_uri(), {"order": "name"})
    passed = set()
    for state in STATES:
        address = urlencode(state, doseq=True)
        page.evaluate(
            "(state) => new Promise((done) => {"
            " addEventListener('hashchange', done, {once: true}); location.hash = state; })",
            address,
        )
        found, places = paths_shown(page), expected(rows, state)
        assert sorted(found) == sorted(places), state
        for before, after in itertools.pairwise(places[path] for path in found):
            if state.get("order") == "name" or before[0] != after[0]:
                assert before < after, state
            else:  # what is equal after rounding may stand in either order
                assert before[1] < after[1] + 2e-3, state
        passed.add(len(found))
    assert len(passed) > 12  # the filters do let different pictures through


def test_a_filter_set_by_hand_is_in_the_address_and_can_be_cleared(tmp_path: Path, open_page: Open) -> None:
    rows = random_rows(300, seed=4)
    write_gallery(str(tmp_path), rows, CLASSES)
    page = open_page((tmp_path / "gallery.html").as_uri())
    page.locator("#class-text").fill("odd")
    page.get_by_role("checkbox").check()
    page.locator("[name=share_min]").fill("12.505")
    page.locator("[name=order]").select_option("best")
    page.get_by_text("ok 2").click()
    page.wait_for_function("location.hash.includes('status=ok')")
    state = {"class": [CLASSES[3]], "share_min": "12.505", "order": "best", "status": "ok"}
    assert sorted(parse_qsl(page.url.split("#")[1])) == sorted((k, "".join(v)) for k, v in state.items())
    found = paths_shown(page)
    assert sorted(found) == sorted(expected(rows, state))
    assert page.locator("#count").inner_text() == f"{len(found)} of 300 pictures"
    page.keyboard.press("Enter")  # nothing is sent anywhere
    page.locator(".tile").nth(1).click()
    page.wait_for_function("location.hash.includes('open=')")

    again = open_page(page.url.split("#")[0], parse_qsl(page.url.split("#")[1]))
    assert paths_shown(again) == found
    assert again.locator("#large-path").inner_text() == found[1]
    again.locator("#close").click()
    assert again.locator("#class-list label").first.inner_text().startswith(CLASSES[3])
    assert again.locator("#class-list input").first.is_checked()
    assert again.locator(".tile .item").first.inner_text().startswith(CLASSES[3])
    again.locator("#clear").click()
    assert again.locator("#count").inner_text() == "300 pictures"
    again.wait_for_function("location.hash === '#order=best'")


def test_only_the_cards_near_the_view_exist_however_many_rows_there_are(tmp_path: Path, open_page: Open) -> None:
    def rows() -> Iterator[dict[str, Any]]:
        for number in range(50_000):
            numbers = {"classes": ["cat"], "areas": [1 + number], "scores": [number / 50_000]}
            yield {"path": f"{number:05d}.jpg", "width": 640, "height": 480, "status": "ok", **numbers}

    write_gallery(str(tmp_path), rows(), CLASSES)
    page = open_page((tmp_path / "gallery.html").as_uri(), {"order": "name"})

    def expect_in_view(number: int) -> None:
        playwright.expect(page.locator(f"[title='{number:05d}.jpg']")).to_be_in_viewport()
        assert page.locator(".tile").count() < 60

    expect_in_view(0)
    page.evaluate("window.scrollTo(0, document.documentElement.scrollHeight)")
    expect_in_view(19_999)
    page.locator("#page-after").click()
    expect_in_view(20_000)
    page.locator(".tile").first.focus()
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowRight")
    assert page.evaluate("document.activeElement.title") == f"{20_001 + page.evaluate('columns'):05d}.jpg"
    # A row beyond the cards in view: closing its large view leads there.
    page.evaluate("openLarge(45678)")
    page.keyboard.press("Escape")
    expect_in_view(45_678)


def test_a_phone_sees_the_page_in_its_width(archive: Path, open_page: Open) -> None:
    page = open_page((archive / "gallery.html").as_uri(), width=360)
    assert not page.locator("[name=text]").is_visible()
    page.locator("summary").click()
    assert page.locator("[name=text]").is_visible()
    widths = "[document.documentElement.scrollWidth, document.getElementById('large').scrollWidth]"
    assert page.evaluate(widths)[0] == 360
    page.locator("summary").click()
    page.locator(".tile").first.click()
    assert page.evaluate(widths)[1] <= 360


def test_a_page_without_its_data_says_so(tmp_path: Path, open_page: Open) -> None:
    write_gallery(str(tmp_path), random_rows(9000, seed=5), CLASSES)
    (tmp_path / "gallery" / "rows-0001.js").unlink()
    page = open_page((tmp_path / "gallery.html").as_uri(), all_rows=False)
    page.locator("#problem").wait_for()
    assert "gallery/rows-0001.js cannot be loaded" in page.locator("#problem").inner_text()
    assert page.locator(".tile").count() > 0
