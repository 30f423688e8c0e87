"""Synthetic videos: equal in every process, and motion that matches the pixels."""

import numpy as np
import pytest

from vilseg.data.synthetic.scenes import CLASSES
from vilseg.data.synthetic.videos import SyntheticVideo, render_video
from vilseg.errors import DataError

SIZE = 64


@pytest.fixture(scope="module")
def films() -> list[SyntheticVideo]:
    return [render_video(0, index, SIZE, frames=13) for index in range(12)]


def test_shapes_and_ids(films: list[SyntheticVideo]) -> None:
    for film in films:
        assert film.images.shape == (13, SIZE, SIZE, 3)
        assert film.masks.shape == film.sources.shape == (13, SIZE, SIZE)
        assert film.images.dtype == film.masks.dtype == np.uint8
        assert film.masks.max() < len(CLASSES)
        assert (film.sources[0] == -1).all()
        assert film.sources.max() < SIZE * SIZE


def test_a_longer_film_begins_as_the_shorter_one(films: list[SyntheticVideo]) -> None:
    for index in (3, 0):
        longer = render_video(0, index, SIZE, frames=15)
        for name in ("images", "masks", "sources"):
            np.testing.assert_array_equal(getattr(longer, name)[:13], getattr(films[index], name))
    others = [render_video(1, 0, SIZE, frames=1), render_video(0, 0, SIZE, frames=1, split="train")]
    for other in others:
        assert (other.images[0] != films[0].images[0]).mean() > 0.5


def test_a_point_keeps_its_class(films: list[SyntheticVideo]) -> None:
    """Compare classes along the motion: they are drawn independently of it; outlines may differ by half a pixel."""
    wrong = [
        (film.masks[t - 1].ravel()[film.sources[t]] != film.masks[t])[film.sources[t] >= 0].mean()
        for film in films
        for t in range(1, 13)
    ]
    assert np.mean(wrong) < 1e-3


def test_a_point_keeps_its_colour(films: list[SyntheticVideo]) -> None:
    following, staying = [], []
    for film in films:
        for t in range(1, 13):
            visible = film.sources[t] >= 0
            now, before = film.images[t].astype(int), film.images[t - 1].astype(int)
            following.append(np.abs(before.reshape(-1, 3)[film.sources[t]] - now)[visible].mean())
            staying.append(np.abs(before - now)[visible].mean())
    assert np.mean(following) < 0.6 * np.mean(staying)


def test_most_is_visible_before_and_something_is_not(films: list[SyntheticVideo]) -> None:
    hidden = np.array([(film.sources[1:] < 0).mean() for film in films])
    assert 0.005 < hidden.mean() < 0.08
    assert hidden.max() < 0.2


def test_things_move_apart_from_the_ground(films: list[SyntheticVideo]) -> None:
    y, x = np.divmod(np.arange(SIZE * SIZE).reshape(SIZE, SIZE), SIZE)
    several = []
    for film in films:
        for sources in film.sources[1:]:
            down, right = y - sources // SIZE, x - sources % SIZE
            found = {(int(a), int(b)) for a, b in zip(down[sources >= 0], right[sources >= 0], strict=True)}
            assert all(max(abs(a), abs(b)) <= 3 for a, b in found), "about two pixels a frame at this size"
            several.append(len(found) > 1)
    assert np.mean(several) > 0.5


@pytest.mark.parametrize(
    ("arguments", "words"), [({"size": 16}, "at least 32"), ({"frames": 0}, "a video of 0 frames.*at least 1")]
)
def test_wrong_arguments(arguments: dict[str, int], words: str) -> None:
    with pytest.raises(DataError, match=words):
        render_video(0, 0, **arguments)
