"""Synthetic scenes: same bytes everywhere, exact masks, captions that say a true part, colours that tell little."""

import hashlib
import io
import random
import re
import subprocess
import sys
import time
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from vilseg.data.synthetic import scenes
from vilseg.data.synthetic.captions import plural, write_caption
from vilseg.data.synthetic.scenes import CLASSES, pairs, render_scene, write_masked_dataset
from vilseg.errors import DataError

SIZE = 64
OBJECT_IDS = [i for i, scene_class in enumerate(CLASSES) if scene_class.kind == "object"]


@pytest.fixture(scope="module")
def sample() -> list[scenes.Scene]:
    return [render_scene(0, index, SIZE) for index in range(900)]


def _digest(scene: scenes.Scene) -> str:
    return hashlib.sha256(scene.image.tobytes() + scene.mask.tobytes() + scene.caption.encode()).hexdigest()


def _named_in(text: str) -> set[int]:
    """Read the classes off a caption by their names, singular or plural, on word boundaries."""
    found = set()
    for class_id, scene_class in enumerate(CLASSES):
        forms = {form for name in scene_class.names for form in (name, plural(name))}
        if any(re.search(rf"\b{form}\b", text.lower()) for form in forms):
            found.add(class_id)
    return found


def test_class_list() -> None:
    names = [name for scene_class in CLASSES for name in scene_class.names]
    assert len(set(names)) == len(names), "a name must mean one class"
    assert all(2 <= len(scene_class.names) <= 3 for scene_class in CLASSES)
    assert Counter(scene_class.kind for scene_class in CLASSES) == {"stuff": 7, "object": 12}


@pytest.mark.parametrize("size", [48, 64, 97])
def test_shapes_and_ids(size: int) -> None:
    scene = render_scene(3, 5, size)
    assert scene.image.shape == (size, size, 3)
    assert scene.image.dtype == np.uint8
    assert scene.mask.shape == (size, size)
    assert scene.mask.dtype == np.uint8
    assert set(np.unique(scene.mask)) <= {*scene.stuff, *(item.class_id for item in scene.objects)}


def test_same_scene_in_another_process_and_in_any_order() -> None:
    here = [_digest(render_scene(11, index, SIZE)) for index in (7, 2, 0)]
    code = (
        "import hashlib\nfrom vilseg.data.synthetic.scenes import render_scene\nfor i in (0, 2, 7):\n"
        "    s = render_scene(11, i, 64)\n"
        "    print(hashlib.sha256(s.image.tobytes() + s.mask.tobytes() + s.caption.encode()).hexdigest())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == here[::-1]


def test_size_changes_resolution_not_content() -> None:
    small, large = render_scene(0, 4, 64), render_scene(0, 4, 128)
    assert small.caption == large.caption
    assert np.mean(small.mask == large.mask[1::2, 1::2]) > 0.95


def test_streams_share_no_scene() -> None:
    streams = [(0, "train"), (0, "eval"), (1, "train"), (1, "eval")]
    digests = [_digest(render_scene(seed, index, SIZE, split=split)) for seed, split in streams for index in range(25)]
    assert len(set(digests)) == len(digests)


def test_every_class_is_common_and_covers_pixels(sample: list[scenes.Scene]) -> None:
    for class_id, scene_class in enumerate(CLASSES):
        areas = np.array([np.mean(scene.mask == class_id) for scene in sample])
        assert np.mean(areas > 0) > 0.08, scene_class.name
        assert np.mean(areas) > 0.008, scene_class.name


def test_number_and_scale_of_objects(sample: list[scenes.Scene]) -> None:
    counts = Counter(len(scene.objects) for scene in sample)
    assert set(counts) == {1, 2, 3, 4}
    widths = [item.width / SIZE for scene in sample for item in scene.objects]
    assert 0.1 < np.quantile(widths, 0.02) < 0.35
    assert 0.4 < np.quantile(widths, 0.98) < 0.75


def test_objects_of_a_scene_are_visible(sample: list[scenes.Scene]) -> None:
    hidden = sum(not np.any(scene.mask == item.class_id) for scene in sample for item in scene.objects)
    assert hidden == 0


def test_mask_fits_the_picture() -> None:
    # Object borders must lie on edges of the picture: the step across a border is larger than elsewhere.
    on_border, elsewhere = [], []
    for index in range(40):
        scene = render_scene(2, index, 96)
        step = np.abs(np.diff(scene.image.astype(float), axis=1)).mean(-1)
        border = np.diff(scene.mask.astype(int), axis=1) != 0
        on_border.append(step[border].mean())
        elsewhere.append(step[~border].mean())
    assert np.mean(on_border) > 1.6 * np.mean(elsewhere)


def test_captions_name_a_true_part(sample: list[scenes.Scene]) -> None:
    for scene in sample:
        assert scene.caption.strip()
        present = {*scene.stuff, *(item.class_id for item in scene.objects)}
        assert scene.named
        assert scene.named <= present
        assert _named_in(scene.caption) == set(scene.named), scene.caption
    total = sum(len(scene.objects) for scene in sample)
    named = sum(item.class_id in scene.named for scene in sample for item in scene.objects)
    assert 0.68 < named / total < 0.8
    stuff_named = sum(class_id in scene.named for scene in sample for class_id in scene.stuff)
    assert 0.62 < stuff_named / sum(len(scene.stuff) for scene in sample) < 0.78


def test_captions_vary(sample: list[scenes.Scene]) -> None:
    captions = [scene.caption for scene in sample]
    assert len(set(captions)) > 0.9 * len(captions)
    text = " ".join(captions).lower()
    for word in ("two", "photo", "sea", "lawn", "kitten", "afternoon", "red"):
        assert re.search(rf"\b{word}\b", text), word
    for scene_class in CLASSES:
        first, *others = (len(re.findall(rf"\b{re.escape(name)}\b", text)) for name in scene_class.names)
        if all(" " not in name for name in scene_class.names):
            assert first > max(others), scene_class.name


def test_caption_is_never_empty() -> None:
    for seed in range(300):
        caption, objects, stuff = write_caption(
            [(("cat", "kitten"), [None])], [("grass", ("grass",))], random.Random(seed)
        )
        assert caption
        assert any(objects + stuff)


@pytest.mark.parametrize(
    ("noun", "expected"),
    [("ball", "balls"), ("daisy", "daisies"), ("bush", "bushes"), ("sheep", "sheep"), ("toy", "toys")],
)
def test_plural(noun: str, expected: str) -> None:
    assert plural(noun) == expected


def test_colour_alone_does_not_tell_the_class(sample: list[scenes.Scene]) -> None:
    """Naive Bayes on 16 x 16 x 16 colours, fitted with masks, stays far below what texture and shape give."""
    count = len(CLASSES)

    def colours(scene: scenes.Scene) -> np.ndarray:
        r, g, b = np.moveaxis(scene.image.astype(int) // 16, -1, 0)
        return ((r * 16 + g) * 16 + b).ravel()

    seen = np.full((count, 4096), 0.1)
    for scene in sample[:200]:
        np.add.at(seen, (scene.mask.ravel(), colours(scene)), 1)
    likelihood = np.log(seen / seen.sum(1, keepdims=True))
    for prior in (np.zeros((count, 1)), np.log(seen.sum(1, keepdims=True))):
        guess = (likelihood + prior).argmax(0)
        confusion = np.zeros((count, count))
        for scene in sample[200:300]:
            np.add.at(confusion, (scene.mask.ravel(), guess[colours(scene)]), 1)
        hits = np.diag(confusion)
        iou = hits / (confusion.sum(0) + confusion.sum(1) - hits)
        assert iou.mean() < 0.25


def test_pairs_are_jpegs_with_captions_and_ranges_add_up() -> None:
    whole = list(pairs(6, 5, SIZE))
    parts = [*pairs(2, 5, SIZE), *pairs(4, 5, SIZE, start=2)]
    assert parts == whole
    assert len({pair.key for pair in whole}) == 6
    for index, (_, data, captions) in enumerate(whole):
        scene = render_scene(5, index, SIZE)
        picture = Image.open(io.BytesIO(data))
        assert picture.format == "JPEG"
        # Full colour resolution: no chroma subsampling, so thin coloured parts survive.
        assert {layer[1:3] for layer in picture.layer} == {(1, 1)}
        assert np.abs(np.asarray(picture, float) - scene.image).mean() < 5.0
        assert captions == [scene.caption]


def test_masked_dataset_layout(tmp_path) -> None:
    write_masked_dataset(str(tmp_path / "eval"), count=3, seed=9, size=SIZE)
    folder = tmp_path / "eval"
    assert (folder / "classes.txt").read_text().splitlines() == [scene_class.name for scene_class in CLASSES]
    images, masks = sorted((folder / "images").iterdir()), sorted((folder / "masks").iterdir())
    assert [path.stem for path in images] == [path.stem for path in masks]
    assert len(images) == 3
    for index, path in enumerate(masks):
        picture = Image.open(path)
        assert picture.mode == "L"
        np.testing.assert_array_equal(np.asarray(picture), render_scene(9, index, SIZE, split="eval").mask)


def test_fast_enough_to_wait_for(sample: list[scenes.Scene]) -> None:
    # A tenth of what one free core does: fails on a slip of the algorithm, not on a busy machine.
    start = time.process_time()
    for index in range(100):
        render_scene(0, index, SIZE)
    assert time.process_time() - start < 1.0


@pytest.mark.parametrize(
    ("arguments", "words"), [({"size": 16}, "at least 32"), ({"split": "test"}, "'train' or 'eval'")]
)
def test_wrong_arguments(arguments: dict, words: str) -> None:
    with pytest.raises(DataError, match=words):
        render_scene(0, 0, **arguments)
