"""A TIFF of any kind and size becomes a mask that lies in the same place."""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
import torch
from PIL import Image
from rasterio.control import GroundControlPoint
from rasterio.enums import ColorInterp
from rasterio.rpc import RPC
from rasterio.transform import Affine

from vilseg.config import RefinementConfig, SegmentationConfig
from vilseg.errors import ConfigError, DataError, StorageError, UserError
from vilseg.model import ViLSeg
from vilseg.segmentation import geotiff, geotiff_io
from vilseg.segmentation.geotiff import GeoMask, is_georeferenced, segment_geotiff
from vilseg.segmentation.segmenter import Segmenter
from vilseg.segmentation.visualization import class_colours
from vilseg.text.vocabulary import Vocabulary

pytestmark = pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")

Make = Callable[..., ViLSeg]
CLASSES = ["dog", "cat", "sofa by the sea", "grass"]
UTM = {"crs": "EPSG:32633", "transform": Affine(0.5, 0, 500_000, 0, -0.5, 5_400_000)}
RGB = (ColorInterp.red, ColorInterp.green, ColorInterp.blue)


@pytest.fixture(autouse=True)
def _exact(monkeypatch: pytest.MonkeyPatch) -> None:
    # bfloat16, where the machine has units for it, rounds differently for every size.
    monkeypatch.setattr("vilseg.segmentation.dense_features.has_bfloat16_units", lambda device: False)


@pytest.fixture
def make_segmenter(make_model: Make) -> Callable[..., Segmenter]:
    """A segmenter whose names all occur in images of noise; its patches see about 10 pixels around them."""

    def make(input_size: int = 64, classes: list[str] | None = None, iterations: int = 0) -> Segmenter:
        model = make_model()
        model.patch_mean = model.encode_image(torch.rand(1, 3, 32, 32)).patches[0].mean(0)
        model.segmentation = SegmentationConfig(
            input_size=input_size,
            region_weight=0,
            calibration=1,
            refinement=RefinementConfig(iterations=iterations, dilations=[1, 2]),
        )
        return Segmenter(model, classes or CLASSES, device="cpu")

    return make


@pytest.fixture
def segmenter(make_segmenter: Callable[..., Segmenter]) -> Segmenter:
    return make_segmenter()


def random_image(height: int, width: int, bands: int = 3, seed: int = 0) -> np.ndarray:
    """Coloured blobs of about 6 pixels, (bands, height, width)."""
    coarse = np.random.default_rng(seed).integers(0, 256, (bands, height // 6 + 1, width // 6 + 1), dtype=np.uint8)
    size = (width, height)
    return np.stack([np.asarray(Image.fromarray(band).resize(size, Image.Resampling.BILINEAR)) for band in coarse])


def write(path: Path, bands_BHW: np.ndarray, colours: tuple[ColorInterp, ...] = (), **profile: Any) -> str:
    count, height, width = bands_BHW.shape
    settings = {"count": count, "height": height, "width": width, "dtype": bands_BHW.dtype, **profile}
    with rasterio.open(path, "w", driver="GTiff", **settings) as dataset:
        if colours:
            dataset.colorinterp = colours
        dataset.write(bands_BHW)
    return str(path)


def labels_of(path: str) -> np.ndarray:
    with rasterio.open(path) as dataset:
        return dataset.read(1)


def segmented(segmenter: Segmenter, source: str, **options: Any) -> tuple[np.ndarray, GeoMask]:
    target = f"{source}.mask.tif"
    mask = segment_geotiff(segmenter, source, target, **options)
    return labels_of(target), mask


def labels_by_segmenter(segmenter: Segmenter, bands_3HW: np.ndarray) -> np.ndarray:
    """The labels of three bands as an image."""
    return segmenter(np.ascontiguousarray(bands_3HW.transpose(1, 2, 0))).labels


# ------------------------------------------------------------------------------------------------------ what is kept


@pytest.mark.parametrize(
    "layout",
    [
        {"tiled": True, "blockxsize": 32, "blockysize": 48},
        {"tiled": True, "blockxsize": 512, "blockysize": 512},
        {"blockysize": 7, "compress": "lzw"},
        {"blockysize": 1, "compress": "deflate", "interleave": "band"},
        {"blockysize": 100, "compress": "deflate"},
        {"BIGTIFF": "YES"},
    ],
    ids=["tiled", "large tiles", "strips", "rows", "one strip", "uncompressed big tiff"],
)
def test_a_mask_has_the_place_and_layout_of_its_image(segmenter: Segmenter, tmp_path: Path, layout: Any) -> None:
    turned = {"crs": "EPSG:2154", "transform": Affine(0.4, 0.1, 650_000, 0.1, -0.4, 6_860_000)}
    source, target = write(tmp_path / "in.tif", random_image(100, 150), **turned, **layout), str(tmp_path / "out.tif")
    segment_geotiff(segmenter, source, target)
    with rasterio.open(source) as before, rasterio.open(target) as after:
        assert after.crs == before.crs
        assert after.transform.almost_equals(before.transform, 1e-9)
        assert after.shape == before.shape
        assert after.block_shapes == before.block_shapes[:1]
        assert after.dtypes == ("uint8",)
        assert after.nodata == 255
        assert after.compression.name == "deflate"
        assert after.colorinterp == (ColorInterp.palette,)
        assert [after.colormap(1)[i][:3] for i in range(4)] == [tuple(c) for c in class_colours(CLASSES)]
        assert json.loads(after.tags()["CLASS_NAMES"]) == CLASSES
        assert set(np.unique(after.read(1))) == {0, 1, 2, 3}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.tif", "out.tif"]


def test_control_points_rpcs_and_the_meaning_of_a_pixel_are_kept(segmenter: Segmenter, tmp_path: Path) -> None:
    points = [GroundControlPoint(row, col, 10 + col / 100, 50 - row / 100) for row in (0, 40) for col in (0, 60)]
    linear, constant = [0.0, 1.0] + [0.0] * 18, [1.0] + [0.0] * 19
    coefficients = {
        **{f"{axis}_num_coeff": linear for axis in ("line", "samp")},
        **{f"{axis}_den_coeff": constant for axis in ("line", "samp")},
    }
    centre = {f"{name}_off": 50.0 for name in ("lat", "long", "line", "samp", "height")}
    rpcs = RPC(**coefficients, **centre, **{name.replace("_off", "_scale"): 20.0 for name in centre})
    by_points = write(tmp_path / "points.tif", random_image(40, 60), gcps=points, crs="EPSG:4326")
    by_rpcs = write(tmp_path / "rpcs.tif", random_image(40, 60), rpcs=rpcs)
    by_centre = write(tmp_path / "centre.tif", random_image(40, 60), **UTM)
    with rasterio.open(by_centre, "r+") as dataset:
        dataset.update_tags(AREA_OR_POINT="Point")
    for source in (by_points, by_rpcs, by_centre):
        assert is_georeferenced(source)
        segmented(segmenter, source)
        with rasterio.open(source) as before, rasterio.open(f"{source}.mask.tif") as after:
            assert [point.asdict() | {"id": ""} for point in after.gcps[0]] == [
                point.asdict() | {"id": ""} for point in before.gcps[0]
            ]
            assert after.gcps[1] == before.gcps[1]
            assert after.rpcs == before.rpcs
            assert (after.crs, after.transform) == (before.crs, before.transform)
            assert after.tags().get("AREA_OR_POINT") == before.tags().get("AREA_OR_POINT")
    with rasterio.open(f"{by_points}.mask.tif") as dataset:
        assert len(dataset.gcps[0]) == 4
    with rasterio.open(f"{by_rpcs}.mask.tif") as dataset:
        assert dataset.rpcs.lat_off == 50


def test_many_classes_need_sixteen_bits(make_segmenter: Callable[..., Segmenter], tmp_path: Path) -> None:
    names = [f"thing {i}" for i in range(300)]
    bands = random_image(40, 60)
    source = write(tmp_path / "in.tif", bands, nodata=int(bands[0, 3, 5]), **UTM)
    labels, mask = segmented(make_segmenter(classes=names), source)
    with rasterio.open(f"{source}.mask.tif") as dataset:
        assert dataset.nodata == 65535
        assert json.loads(dataset.tags()["CLASS_NAMES"]) == names
    assert labels.dtype == np.uint16
    assert sum(mask.areas) == (labels < 300).sum() == (labels != 65535).sum()


# ------------------------------------------------------------------------------------------------------- the labels


@pytest.mark.parametrize("iterations", [0, 4])
@pytest.mark.parametrize("tile", [64, 100, 300])
def test_an_image_no_larger_than_a_tile_is_labelled_as_the_segmenter_does(
    make_segmenter: Callable[..., Segmenter], tmp_path: Path, iterations: int, tile: int
) -> None:
    segmenter, bands = make_segmenter(iterations=iterations), random_image(64, 40)
    expected = segmenter(np.ascontiguousarray(bands.transpose(1, 2, 0)))
    labels, mask = segmented(segmenter, write(tmp_path / "in.tif", bands, **UTM), tile=tile)
    assert (labels == expected.labels).mean() > 0.999, "only ties may fall the other way"
    assert (mask.width, mask.height) == (40, 64)
    assert mask.classes == tuple(region.class_name for region in expected.regions)
    np.testing.assert_allclose(mask.areas, [region.area for region in expected.regions], atol=3)
    np.testing.assert_allclose(mask.scores, [region.score for region in expected.regions], atol=2e-3)


def test_tiles_give_what_one_pass_at_the_same_scale_gives(
    make_segmenter: Callable[..., Segmenter], tmp_path: Path
) -> None:
    # At one scale and with regions off, a patch depends on some 10 pixels around it. So only the borders of tiles can
    # differ: within an overlap of 16, and hardly within one of 32.
    bands = random_image(160, 220)
    source, whole = write(tmp_path / "in.tif", bands, **UTM), labels_by_segmenter(make_segmenter(160), bands)
    assert (np.bincount(whole.ravel(), minlength=4) > 0.05 * whole.size).all()
    by_overlap = {overlap: segmented(make_segmenter(64), source, overlap=overlap)[0] for overlap in (0, 16, 32)}
    agreement = {overlap: (labels == whole).mean() for overlap, labels in by_overlap.items()}
    assert agreement[0] < 0.95
    assert agreement[16] > 0.99
    assert agreement[32] > 0.999
    default, _ = segmented(make_segmenter(64), source)
    np.testing.assert_array_equal(default, by_overlap[16])


def test_a_larger_tile_is_seen_smaller(make_segmenter: Callable[..., Segmenter], tmp_path: Path) -> None:
    bands = random_image(192, 320)
    by_half, _ = segmented(make_segmenter(64), write(tmp_path / "in.tif", bands, **UTM), tile=128, overlap=64)
    assert (by_half == labels_by_segmenter(make_segmenter(96), bands)).mean() > 0.98


@pytest.mark.parametrize(("iterations", "least"), [(0, 1), (4, 0.99)])
def test_a_repeated_texture_has_repeated_labels(
    make_segmenter: Callable[..., Segmenter], tmp_path: Path, iterations: int, least: float
) -> None:
    # Four rounds of refinement reach 8 pixels further than the patches do, and so past the context of the tiles.
    texture = np.random.default_rng(1).integers(0, 256, (3, 16, 16), dtype=np.uint8)
    source = write(tmp_path / "in.tif", np.tile(texture, (1, 14, 16)), tiled=True, blockxsize=48, blockysize=48)

    def repeats(overlap: int) -> float:
        labels, _ = segmented(make_segmenter(64, iterations=iterations), source, overlap=overlap)
        inner = labels[32:-32, 32:-32]
        assert len(np.unique(inner)) > 1
        return min((inner[:, 16:] == inner[:, :-16]).mean(), (inner[16:] == inner[:-16]).mean())

    assert repeats(0) < 0.95, "tiles that are cut hard show"
    assert repeats(32) >= least


def test_progress_is_told_in_pixels(segmenter: Segmenter, tmp_path: Path) -> None:
    calls: list[tuple[int, int]] = []
    source = write(tmp_path / "in.tif", random_image(300, 290), tiled=True, blockxsize=64, blockysize=64, **UTM)
    segmented(segmenter, source, tile=256, progress=lambda done, total: calls.append((done, total)))
    assert len(calls) > 1
    assert calls == sorted(set(calls))
    assert calls[-1] == (300 * 290, 300 * 290)


# ------------------------------------------------------------------------------------------------- what has no data


@pytest.mark.parametrize("kind", ["nodata", "alpha", "nan", "mask", "nothing at all"])
def test_pixels_without_data_have_no_class(segmenter: Segmenter, tmp_path: Path, kind: str) -> None:
    bands, hole = random_image(80, 120).clip(1), np.zeros((80, 120), bool)
    hole[10:50, 30:60] = True
    hole[70:] = True
    hole |= kind == "nothing at all"
    path = tmp_path / "in.tif"
    if kind == "alpha":
        alpha = np.where(hole, 0, 255).astype(np.uint8)[None]
        source = write(path, np.concatenate([bands, alpha]), (*RGB, ColorInterp.alpha), **UTM)
    elif kind == "nan":
        source = write(path, np.where(hole, np.nan, bands).astype(np.float32), **UTM)
    elif kind == "mask":
        source = write(path, bands, **UTM)
        with rasterio.open(source, "r+") as dataset:
            dataset.write_mask(~hole)
    else:
        source = write(path, np.where(hole, 0, bands), nodata=0, **UTM)
    labels, mask = segmented(segmenter, source)
    np.testing.assert_array_equal(labels == 255, hole)
    assert sum(mask.areas) == (~hole).sum()
    assert mask.areas == tuple(np.bincount(labels[~hole], minlength=4)[np.unique(labels[~hole])])
    assert mask.classes == tuple(CLASSES[index] for index in np.unique(labels[~hole]))


# --------------------------------------------------------------------------------------------------- kinds of bands


def stretched(bands_BHW: np.ndarray) -> np.ndarray:
    """8 bits between the 2nd and the 98th percentile of each band."""
    low, high = np.percentile(bands_BHW, (2, 98), axis=(1, 2), keepdims=True)
    return ((bands_BHW - low) / (high - low) * 255).clip(0, 255).round().astype(np.uint8)


@pytest.mark.parametrize("dtype", ["uint16", "int16", "float32", "float64"])
def test_other_types_are_scaled_by_percentiles_of_the_whole(segmenter: Segmenter, tmp_path: Path, dtype: str) -> None:
    bands = random_image(60, 64).astype(np.float64) * np.array([1, 20, 7])[:, None, None] + 100
    bands[:, 5, 5] = 30_000  # one bright pixel must not leave the rest dark
    bands = bands.astype(dtype)
    labels, _ = segmented(segmenter, write(tmp_path / "in.tif", bands, **UTM))
    assert (labels == labels_by_segmenter(segmenter, stretched(bands))).mean() > 0.99


def test_the_scale_of_sixteen_bits_is_one_for_all_tiles(segmenter: Segmenter, tmp_path: Path) -> None:
    bands = random_image(160, 200).astype(np.uint16) * 30
    bands[:, :, :100] //= 4  # tiles of their own scale would see both halves alike
    scaled = stretched(bands)
    expected, _ = segmented(segmenter, write(tmp_path / "8.tif", scaled, **UTM))
    labels, _ = segmented(segmenter, write(tmp_path / "16.tif", bands, **UTM))
    assert (labels == expected).mean() > 0.99


def test_the_bands_that_are_used(segmenter: Segmenter, tmp_path: Path) -> None:
    bands, undefined = random_image(64, 64, bands=5), ColorInterp.undefined
    red, green, blue = RGB
    cases = [
        (1, (ColorInterp.gray,), [0, 0, 0]),
        (2, (ColorInterp.gray, undefined), [0, 0, 0]),
        (3, (undefined,) * 3, [0, 1, 2]),
        (3, (blue, green, red), [2, 1, 0]),
        (4, (undefined, red, green, blue), [1, 2, 3]),
        (5, (ColorInterp.gray, *(undefined,) * 4), [0, 1, 2]),
    ]
    for number, (count, colours, expected) in enumerate(cases):
        source = write(tmp_path / f"{number}.tif", bands[:count], colours, photometric="minisblack", **UTM)
        labels, _ = segmented(segmenter, source)
        assert (labels == labels_by_segmenter(segmenter, bands[expected])).mean() > 0.999, colours


def test_a_colour_table_is_followed(segmenter: Segmenter, tmp_path: Path) -> None:
    image = Image.fromarray(np.ascontiguousarray(random_image(64, 64).transpose(1, 2, 0))).quantize(200)
    path = tmp_path / "palette.tif"
    image.save(path)
    labels, _ = segmented(segmenter, str(path))
    assert (labels == segmenter(image).labels).mean() > 0.999


# ------------------------------------------------------------------------------------------------------ is it a map?


def test_what_says_where_it_lies(tmp_path: Path) -> None:
    bands = random_image(20, 30)
    assert is_georeferenced(write(tmp_path / "both.tif", bands, **UTM))
    assert is_georeferenced(f"file://{tmp_path}/both.tif")
    assert is_georeferenced(write(tmp_path / "crs.tif", bands, crs="EPSG:3857"))
    assert is_georeferenced(write(tmp_path / "transform.tif", bands, transform=UTM["transform"]))
    assert is_georeferenced(write(tmp_path / "big.tif", bands, BIGTIFF="YES", **UTM))
    assert is_georeferenced(write(tmp_path / "motorola.tif", bands, ENDIANNESS="BIG", **UTM))
    plain = write(tmp_path / "plain.tif", bands)
    assert not is_georeferenced(plain)
    (tmp_path / "plain.tfw").write_text("0.5\n0\n0\n-0.5\n500000\n5400000\n")
    assert is_georeferenced(plain)


def test_an_object_is_asked_by_its_stream(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here, plain = (
        write(tmp_path / "here.tif", random_image(20, 30), **UTM),
        write(tmp_path / "plain.tif", random_image(20, 30)),
    )
    (tmp_path / "broken.tif").write_bytes(Path(here).read_bytes()[:50])
    monkeypatch.setattr(geotiff.storage, "is_local", lambda uri: False)
    assert is_georeferenced(here)
    assert not is_georeferenced(plain)
    assert not is_georeferenced(str(tmp_path / "broken.tif"))


def test_anything_else_lies_nowhere(tmp_path: Path) -> None:
    for name, content in (("a.txt", b"notes"), ("empty.tif", b""), ("b.tif", b"II*\0" + b"\xff" * 40)):
        (tmp_path / name).write_bytes(content)
        assert not is_georeferenced(str(tmp_path / name))
    Image.new("RGB", (4, 4)).save(tmp_path / "c.png")
    assert not is_georeferenced(str(tmp_path / "c.png"))
    with pytest.raises(StorageError, match="does not exist"):
        is_georeferenced(str(tmp_path / "none.tif"))


def test_an_image_without_a_place_gets_a_mask_without_one(segmenter: Segmenter, tmp_path: Path) -> None:
    bands = random_image(70, 90)
    source = write(tmp_path / "in.tif", bands)
    labels, _ = segmented(segmenter, source)
    assert labels.shape == (70, 90)
    assert set(np.unique(labels)) <= {0, 1, 2, 3}
    assert not is_georeferenced(f"{source}.mask.tif")


# ------------------------------------------------------------------------------------------------- what goes wrong


@pytest.mark.parametrize("kind", ["truncated", "header", "text"])
def test_a_damaged_file_is_told_and_leaves_what_was_there(segmenter: Segmenter, tmp_path: Path, kind: str) -> None:
    source, target = (
        Path(write(tmp_path / "in.tif", random_image(200, 200), compress="deflate", **UTM)),
        tmp_path / "out.tif",
    )
    content = {"truncated": source.read_bytes()[:-20_000], "header": b"II*\0\xff\xff", "text": b"not an image"}[kind]
    source.write_bytes(content)
    target.write_bytes(b"an older mask")
    with pytest.raises(DataError, match=rf"{source} is not a TIFF or is damaged: .*[^.]$") as caught:
        segment_geotiff(segmenter, str(source), str(target))
    assert "\n" not in str(caught.value)
    assert target.read_bytes() == b"an older mask"
    assert len(list(tmp_path.iterdir())) == 2


def test_wrong_places_and_sizes_are_told(segmenter: Segmenter, tmp_path: Path) -> None:
    source = write(tmp_path / "in.tif", random_image(40, 40), **UTM)
    target = str(tmp_path / "out.tif")
    with pytest.raises(StorageError, match="does not exist"):
        segment_geotiff(segmenter, str(tmp_path / "none.tif"), target)
    with pytest.raises(StorageError, match="is the image itself"):
        segment_geotiff(segmenter, source, f"file://{source}")
    with pytest.raises(StorageError, match="cannot write"):
        segment_geotiff(segmenter, source, f"{source}/out.tif/mask.tif")
    for tile, overlap in ((0, None), (32, 17), (32, -1)):
        with pytest.raises(ConfigError, match="pixels"):
            segment_geotiff(segmenter, source, target, tile=tile, overlap=overlap)
    waves = write(tmp_path / "radar.tif", random_image(40, 40).astype(np.complex64), **UTM)
    with pytest.raises(DataError, match=r"radar\.tif holds complex numbers"):
        segment_geotiff(segmenter, waves, target)
    assert not Path(target).exists()


def test_negative_words_and_the_threshold_leave_pixels_without_a_class(segmenter: Segmenter, tmp_path: Path) -> None:
    bands = random_image(64, 64)
    source = write(tmp_path / "in.tif", bands, **UTM)
    every, _ = segmented(segmenter, source)
    vocabulary = Vocabulary(tuple(CLASSES[:3]), negatives=(CLASSES[3],))
    labels, mask = segmented(segmenter.with_classes(vocabulary), source)
    np.testing.assert_array_equal(labels, np.where(every == 3, 255, every))
    assert sum(mask.areas) == (every != 3).sum() < every.size
    segmenter.config = segmenter.config.replace(threshold=0.3)
    labels, mask = segmented(segmenter, source)
    np.testing.assert_array_equal(labels, labels_by_segmenter(segmenter, bands))
    assert 0 < sum(mask.areas) == (labels != 255).sum() < labels.size


@pytest.mark.parametrize("missing", [1, 100, 2_000])
def test_a_mask_that_was_cut_short_is_not_published(
    segmenter: Segmenter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: int
) -> None:
    # What GDAL does where the disk is full when the dataset is closed: nothing is raised, and the end is not there.
    write_mask = geotiff._write_mask

    def cut(raster: Any, classes: Any, threshold: Any, scores_at: Any, mask: Path, progress: Any) -> GeoMask:
        done = write_mask(raster, classes, threshold, scores_at, mask, progress)
        os.truncate(mask, mask.stat().st_size - missing)
        return done

    monkeypatch.setattr(geotiff, "_write_mask", cut)
    source = write(tmp_path / "in.tif", random_image(120, 120), tiled=True, blockxsize=32, blockysize=32, **UTM)
    with pytest.raises(StorageError, match=r"cannot write .*out\.tif by way of .* TMPDIR"):
        segment_geotiff(segmenter, source, str(tmp_path / "out.tif"))
    assert [path.name for path in tmp_path.iterdir()] == ["in.tif"]


def test_without_rasterio_the_extra_is_named(
    segmenter: Segmenter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write(tmp_path / "in.tif", random_image(40, 40), **UTM)
    monkeypatch.setitem(sys.modules, "rasterio", None)
    for use in (lambda: is_georeferenced(source), lambda: segment_geotiff(segmenter, source, f"{source}.mask.tif")):
        with pytest.raises(UserError, match=r"pip install vilseg\[geo\]"):
            use()
    (tmp_path / "a.txt").write_text("notes")
    assert not is_georeferenced(str(tmp_path / "a.txt"))


def test_wide_images_of_many_classes_are_labelled_in_small_parts(
    segmenter: Segmenter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write(tmp_path / "in.tif", random_image(90, 300), blockysize=90, compress="deflate", **UTM)
    expected, mask = segmented(segmenter, source)
    monkeypatch.setattr(geotiff, "_BLOCK_VALUES", 5 * 4 * 256)
    monkeypatch.setattr(geotiff_io, "_STRIP_PIXELS", 300 * 20)
    labels, again = segmented(segmenter, source)
    np.testing.assert_array_equal(labels, expected)
    assert again.areas == mask.areas
    with rasterio.open(f"{source}.mask.tif") as dataset:
        assert dataset.block_shapes == [(20, 300)]
