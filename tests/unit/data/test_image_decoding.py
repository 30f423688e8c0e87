"""Decoding: upright RGB whatever the file holds, and one kind of error for whatever is wrong with it."""

import io
import random
import struct
import warnings
import zlib
from typing import Any

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from vilseg.data.image_decoding import crop_to_square, decode_image
from vilseg.errors import DataError


def picture(height: int = 40, width: int = 60) -> np.ndarray:
    """Make an image that is smooth, so that lossy formats keep it, and different in every corner."""
    y, x = np.mgrid[0 : 1 : height * 1j, 0 : 1 : width * 1j]
    return (np.stack([x, y, (1 - x) * y], -1) * 255).astype(np.uint8)


def encode(image: Image.Image, form: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def difference(first: np.ndarray, second: np.ndarray) -> float:
    assert first.shape == second.shape
    return float(np.abs(first.astype(float) - second).mean())


@pytest.mark.parametrize(
    ("form", "options", "tolerance"),
    [
        ("PNG", {}, 0),
        ("BMP", {}, 0),
        ("TIFF", {"compression": "tiff_lzw"}, 0),
        ("WEBP", {"lossless": True}, 0),
        ("JPEG", {"quality": 95}, 2),
        ("JPEG", {"quality": 95, "progressive": True}, 2),
        ("JPEG", {"quality": 95, "optimize": True, "subsampling": 0}, 2),
    ],
)
def test_what_was_encoded_comes_back(form: str, options: dict[str, Any], tolerance: float) -> None:
    array = decode_image(encode(Image.fromarray(picture()), form, **options))
    assert array.dtype == np.uint8
    assert difference(array, picture()) <= tolerance


def test_progressive_and_baseline_are_the_same_picture() -> None:
    image = Image.fromarray(picture())
    baseline, progressive = (decode_image(encode(image, "JPEG", quality=90, progressive=p)) for p in (False, True))
    np.testing.assert_array_equal(baseline, progressive)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("form", ["JPEG", "PNG"])
def test_pictures_are_turned_upright(form: str, orientation: int) -> None:
    # How a camera held in that way would have stored the upright picture.
    stored = {
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.swapaxes(0, 1),
        6: lambda a: np.rot90(a, 1),
        7: lambda a: np.rot90(a.swapaxes(0, 1), 2),
        8: lambda a: np.rot90(a, -1),
    }[orientation](picture())
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(
        Image.fromarray(np.ascontiguousarray(stored)), form, exif=exif, **({"quality": 95} if form == "JPEG" else {})
    )
    assert difference(decode_image(data), picture()) < 3


def test_grey_and_cmyk_become_rgb() -> None:
    grey = Image.fromarray(picture()[:, :, 0])
    np.testing.assert_array_equal(decode_image(encode(grey, "PNG")), np.repeat(picture()[:, :, :1], 3, 2))
    assert difference(decode_image(encode(grey, "JPEG", quality=95)), np.repeat(picture()[:, :, :1], 3, 2)) < 2
    cmyk = Image.fromarray(picture()).convert("CMYK")
    assert difference(decode_image(encode(cmyk, "JPEG", quality=95)), picture()) < 4


def test_sixteen_bits_keep_their_brightness() -> None:
    deep = (picture()[:, :, 0].astype(np.uint16) * 257).astype(np.uint16)
    np.testing.assert_array_equal(decode_image(encode(Image.fromarray(deep), "PNG"))[:, :, 1], picture()[:, :, 0])


def test_floats_from_0_to_1_keep_their_brightness() -> None:
    grey = picture()[:, :, 0]
    floats = (grey / 255).astype(np.float32)
    array = decode_image(encode(Image.fromarray(floats), "TIFF"))
    np.testing.assert_allclose(array, np.repeat(grey[:, :, None], 3, 2), atol=1)
    floats[0, 0] = np.nan
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert decode_image(encode(Image.fromarray(floats), "TIFF"))[0, 0].tolist() == [0, 0, 0]


def test_transparency_lies_over_white() -> None:
    rgba = np.dstack([picture(), np.full(picture().shape[:2], 255, np.uint8)])
    rgba[:, :20, 3] = 0
    expected = picture()
    expected[:, :20] = 255
    for form in ("PNG", "WEBP"):
        data = encode(Image.fromarray(rgba), form, **({"lossless": True} if form == "WEBP" else {}))
        np.testing.assert_array_equal(decode_image(data), expected)


def test_a_palette_with_a_transparent_entry() -> None:
    indices = np.zeros((4, 6), np.uint8)
    indices[:, 3:] = 1
    image = Image.fromarray(indices, "L")
    image = Image.frombytes("P", image.size, image.tobytes())
    image.putpalette([255, 0, 0, 0, 0, 255])
    array = decode_image(encode(image, "PNG", transparency=0))
    assert array[0, 0].tolist() == [255, 255, 255]
    assert array[0, 5].tolist() == [0, 0, 255]


def test_of_an_animation_the_first_frame_is_taken() -> None:
    frames = [Image.fromarray(np.full((8, 8, 3), value, np.uint8)) for value in (0, 255)]
    assert decode_image(encode(frames[0], "GIF", save_all=True, append_images=frames[1:])).max() == 0


@pytest.mark.parametrize(
    ("min_side", "expected"), [(None, (400, 640)), (130, (150, 240)), (60, (100, 160)), (1, (50, 80))]
)
def test_scaled_decoding_stays_above_the_side_asked_for_and_looks_the_same(
    min_side: int | None, expected: tuple[int, int]
) -> None:
    data = encode(Image.fromarray(picture(400, 640)), "JPEG", quality=95)
    array = decode_image(data, min_side=min_side)
    assert array.shape[:2] == expected
    small = Image.fromarray(decode_image(data)).resize(expected[::-1], Image.Resampling.BOX)
    assert difference(array, np.asarray(small)) < 1.5


def png_header(width: int, height: int) -> bytes:
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = b"\0\0\0\4IDAT" + b"\0" * 8
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header)) + pixels


def jpeg_header(width: int, height: int) -> bytes:
    data = encode(Image.fromarray(picture()), "JPEG")
    start = data.index(b"\xff\xc0") + 5
    return data[:start] + struct.pack(">HH", height, width) + data[start + 4 :]


@pytest.mark.parametrize("data", [png_header(200_000, 100_000), jpeg_header(60_000, 65_000)], ids=["png", "jpeg"])
def test_a_bomb_is_refused_from_its_header(data: bytes) -> None:
    with pytest.raises(DataError, match="more than the limit of 100,000,000"):
        decode_image(data)


def big_png(side: int) -> bytes:
    """Make a whole PNG of ``side`` x ``side`` black pixels, one bit each."""

    def task(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    rows = zlib.compress(bytes((side // 8 + 1) * side), 9)
    return b"\x89PNG\r\n\x1a\n" + task(b"IHDR", header) + task(b"IDAT", rows) + task(b"IEND", b"")


@pytest.mark.parametrize("icon", ["ico", "icns"])
def test_a_bomb_inside_an_icon_is_not_decoded(icon: str, monkeypatch: pytest.MonkeyPatch) -> None:
    png = big_png(10_008)
    if icon == "ico":
        data = struct.pack("<HHHBBBBHHII", 0, 1, 1, 16, 16, 0, 0, 1, 32, len(png), 22) + png
    else:
        data = b"icns" + struct.pack(">I", 16 + len(png)) + b"ic07" + struct.pack(">I", 8 + len(png)) + png

    def decoded(*_: Any, **__: Any) -> None:
        pytest.fail("its pixels were decoded")

    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", decoded)
    with pytest.raises(DataError, match="10008 x 10008 pixels, more than the limit of 100,000,000"):
        decode_image(data)


def test_the_limit_is_the_callers() -> None:
    data = encode(Image.fromarray(picture()), "PNG")
    assert decode_image(data, max_pixels=2400).shape == (40, 60, 3)
    with pytest.raises(DataError, match="60 x 40 pixels, more than the limit of 2,399"):
        decode_image(data, max_pixels=2399)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "no bytes"),
        (b"\x00" * 100, "not an image"),
        (b"<html>404</html>", "not an image"),
        (encode(Image.fromarray(picture()), "JPEG")[:-200], "damaged"),
        (encode(Image.fromarray(picture()), "PNG")[:-200], "damaged"),
        (b"\xff\xd8\xff\xe0", "not an image"),
    ],
    ids=["empty", "zeros", "html", "cut jpeg", "cut png", "jpeg start"],
)
def test_what_is_no_picture_is_told(data: bytes, words: str) -> None:
    with pytest.raises(DataError, match=words) as caught:
        decode_image(data)
    assert "\n" not in str(caught.value)


def test_damage_of_any_kind_is_a_data_error() -> None:
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "a picture"
    image = Image.fromarray(picture(20, 30))
    forms = ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "ICO", "TGA", "DDS", "PPM", "JPEG2000", "AVIF"]
    originals = [encode(image, form, **({"exif": exif} if form in ("JPEG", "PNG", "WEBP") else {})) for form in forms]
    chance, refused = random.Random(0), 0
    for _ in range(60):
        for original in originals:
            data = bytearray(original)
            for _ in range(chance.choice([1, 3, 20])):
                data[chance.randrange(min(len(data), chance.choice([40, 400, 4000])))] = chance.choice([0, 255, 77])
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("error")  # nor is anything to be printed
                    array = decode_image(
                        bytes(data[: chance.choice([len(data), chance.randrange(len(data))])]), max_pixels=10**6
                    )
            except DataError:
                refused += 1
            else:
                assert array.ndim == 3
    assert refused > 100


@pytest.mark.parametrize(("position", "expected"), [(0.0, 0), (0.5, 10), (1.0, 20)])
def test_square_crops_the_longer_side_where_it_is_told(position: float, expected: int) -> None:
    wide = picture(40, 60)
    np.testing.assert_array_equal(crop_to_square(wide, 40, position), wide[:, expected : expected + 40])
    tall = np.ascontiguousarray(wide.swapaxes(0, 1))
    np.testing.assert_array_equal(crop_to_square(tall, 40, position), tall[expected : expected + 40])


def test_square_resizes_the_shorter_side() -> None:
    expected = picture(20, 30)[:, 5:25]
    assert difference(crop_to_square(picture(40, 60), 20), expected) < 4
    assert crop_to_square(picture(), 40).shape == (40, 40, 3)
    assert crop_to_square(picture(1, 500), 8).shape == (8, 8, 3)


def test_what_pillow_does_not_expect_is_damage_too() -> None:
    two_formats = b"FTEX" + struct.pack("<5i", 0, 1, 1, 1, 2)  # Pillow asserts that there is one
    with pytest.raises(DataError, match="damaged"):
        decode_image(two_formats)
