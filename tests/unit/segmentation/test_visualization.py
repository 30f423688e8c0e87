import numpy as np
import pytest
from PIL import Image

from vilseg.segmentation.visualization import (
    add_legend,
    class_colours,
    draw_clusters,
    draw_overlay,
    legend_entries,
    palette,
    percent_text,
    upscale_factor,
)


def test_palette_does_not_depend_on_its_length() -> None:
    np.testing.assert_array_equal(palette(5), palette(40)[:5])


def test_palette_can_be_changed_by_its_user() -> None:
    mine = palette(3)
    mine[:] = 0
    assert palette(3).any()


@pytest.mark.parametrize(("count", "least"), [(16, 60), (64, 25), (200, 10)])
def test_colours_differ(count: int, least: float) -> None:
    colours = palette(count).astype(float)
    distances = [np.linalg.norm(a - b) for number, a in enumerate(colours) for b in colours[:number]]
    assert min(distances) > least


def test_palette_goes_on_after_its_distinct_colours() -> None:
    assert palette(1000).shape == (1000, 3)
    assert palette(0).shape == (0, 3)


def test_background_is_grey_and_others_keep_their_colour() -> None:
    colours = class_colours(["background", "cat"])
    assert np.ptp(colours[0].astype(int)) < 20
    np.testing.assert_array_equal(colours[1], palette(2)[1])


def test_legend_lists_the_largest_first_and_skips_what_is_no_class() -> None:
    labels = np.array([[0, 2, 2, 2], [255, 255, 2, 0]], np.uint8)
    entries = legend_entries(labels, ("cat", "dog", "sofa"))
    assert [(entry.name, entry.fraction) for entry in entries] == [("sofa", 0.5), ("cat", 0.25)]
    assert entries[0].colour == tuple(class_colours(("cat", "dog", "sofa"))[2])


@pytest.mark.parametrize(
    ("size", "factor"), [((64, 64), 4), ((100, 300), 3), ((256, 256), 1), ((2000, 3000), 1), ((10, 2000), 1)]
)
def test_small_images_are_enlarged(size: tuple[int, int], factor: int) -> None:
    assert upscale_factor(*size) == factor


def test_enlarged_overlay_keeps_square_pixels_apart_from_borders() -> None:
    labels = np.array([[0, 1], [1, 0]], np.uint8)
    rendered = np.array(draw_overlay(None, labels, ("cat", "dog"), factor=10))
    assert rendered.shape == (20, 20, 3)
    np.testing.assert_array_equal(rendered[4, 4], class_colours(("cat", "dog"))[0])
    np.testing.assert_array_equal(rendered[4, 15], class_colours(("cat", "dog"))[1])
    assert rendered[4, 9].sum() < rendered[4, 4].sum()  # the border is darker


def test_clusters_of_equal_number_have_one_colour() -> None:
    rendered = np.array(draw_clusters(np.array([[0, 1, 30], [1, 0, 30]])))
    np.testing.assert_array_equal(rendered[0, 0], rendered[1, 1])
    assert len(np.unique(rendered.reshape(-1, 3), axis=0)) == 3


def test_legend_is_added_below_and_shows_each_colour() -> None:
    labels = np.arange(12, dtype=np.uint8).reshape(3, 4)
    entries = legend_entries(labels, tuple(f"a class with quite a long name {n}" * 3 for n in range(12)))
    plain = Image.new("RGB", (300, 200), "white")
    rendered = add_legend(plain, entries)
    assert rendered.width == 300
    colours = {colour for _, colour in rendered.getcolors(maxcolors=300 * rendered.height)}
    assert {entry.colour for entry in entries} <= colours


def test_letters_beyond_ascii_are_written() -> None:
    labels, plain = np.zeros((1, 1), np.uint8), Image.new("RGB", (300, 200))
    all_rendered = [add_legend(plain, legend_entries(labels, (name,))) for name in ("ß", "Ж", "é")]
    assert (
        len({rendered.tobytes() for rendered in all_rendered}) == 3
    )  # a missing letter would be the same box each time


def test_an_image_without_classes_gets_no_legend() -> None:
    plain = Image.new("RGB", (300, 200))
    assert add_legend(plain, []) is plain


@pytest.mark.parametrize(("fraction", "text"), [(0.0, "0 %"), (0.001, "<1 %"), (0.344, "34 %"), (1.0, "100 %")])
def test_fractions_are_rounded_but_never_to_nothing(fraction: float, text: str) -> None:
    assert percent_text(fraction) == text
