"""Videos: labels follow motion, start anew at cuts, and are written completely or not at all."""

import csv
import re
import sys
import wave
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from vilseg.config import RefinementConfig, SegmentationConfig
from vilseg.data.synthetic import scenes
from vilseg.data.synthetic.videos import SyntheticVideo, render_video
from vilseg.errors import ConfigError, DataError, StorageError, UserError
from vilseg.model import ViLSeg
from vilseg.segmentation import video_io
from vilseg.segmentation.segmenter import Segmenter
from vilseg.segmentation.video import Frame, read_frames, segment_file, segment_video, write_video
from vilseg.text.vocabulary import Vocabulary

av = pytest.importorskip("av")

Make = Callable[..., ViLSeg]
NAMES = [scene_class.name for scene_class in scenes.CLASSES]
WORDS = ["dog", "cats", "sofa", "grass", "horse", "sea", "man", "rides", "two", "and"]
SIZE = 64


@pytest.fixture(autouse=True)
def _exact(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vilseg.segmentation.dense_features.has_bfloat16_units", lambda device: False)


class Oracle(Segmenter):
    """Knows the classes of every frame it is asked for, and notes which these were."""

    def __init__(self, model: ViLSeg, *videos: SyntheticVideo) -> None:
        super().__init__(model, NAMES, device="cpu")
        self.asked: list[bytes] = []
        self._truth = {
            image.tobytes(): mask for video in videos for image, mask in zip(video.images, video.masks, strict=True)
        }

    def class_scores(self, image: Any) -> torch.Tensor:
        """One for the true class, zero for all others."""
        self.asked.append(image.tobytes())
        mask = torch.from_numpy(self._truth[image.tobytes()].astype(np.int64))
        return torch.nn.functional.one_hot(mask, len(NAMES)).permute(2, 0, 1).float()


@pytest.fixture(scope="module")
def videos() -> list[SyntheticVideo]:
    return [render_video(5, index, SIZE, frames=13) for index in range(4)]


@pytest.fixture
def segmenter(make_model: Make) -> Segmenter:
    model = make_model()
    model.segmentation = SegmentationConfig(input_size=32, region_weight=0, prompts=["{}"])
    return Segmenter(model, WORDS, device="cpu")


def keys_of(oracle: Oracle, frames: np.ndarray) -> list[int]:
    place = {image.tobytes(): index for index, image in enumerate(frames)}
    return [place[asked] for asked in oracle.asked]


def frames_of(video: SyntheticVideo, rate: float = 25) -> list[Frame]:
    return [Frame(index, index / rate, image) for index, image in enumerate(video.images)]


# ----------------------------------------------------------------------------------- scores, and labels from them


@pytest.mark.parametrize("iterations", [0, 3])
def test_labelled_scores_are_the_segmentation(make_model: Make, iterations: int) -> None:
    model = make_model()
    model.segmentation = SegmentationConfig(
        input_size=32, region_weight=0, prompts=["{}"], refinement=RefinementConfig(iterations=iterations)
    )
    segmenter = Segmenter(model, WORDS, device="cpu")
    for image in (scenes.render_scene(0, 0, 50).image, scenes.render_scene(0, 1, 60).image[:33]):
        scores = segmenter.class_scores(image)
        assert scores.shape[0] == len(WORDS)
        labelled, expected = segmenter.label_pixels(image, scores), segmenter(image)
        assert len(np.unique(expected.labels)) > 1
        if iterations == 0:
            np.testing.assert_array_equal(labelled.labels, expected.labels)
            np.testing.assert_array_equal(labelled.scores, expected.scores)
        # Refined, the classes that are best nowhere take part on another grid, which shows where nothing is sure.
        assert (labelled.labels == expected.labels).mean() > 0.97
        assert np.abs(labelled.scores - expected.scores).mean() < 0.03
        np.testing.assert_array_equal(labelled.image, image)
        assert labelled.clusters is None


# ------------------------------------------------------------------------------------------------------- segment_video


def test_propagated_labels_follow_motion(make_model: Make, videos: list[SyntheticVideo]) -> None:
    wrong, kept = [], []
    for video in videos:
        oracle = Oracle(make_model(), video)
        results = list(segment_video(oracle, video.images, key_every=6))
        assert keys_of(oracle, video.images) == [0, 6, 12]
        between = [t for t in range(13) if t % 6]
        wrong += [(results[t].labels != video.masks[t]).mean() for t in between]
        kept += [(video.masks[t - t % 6] != video.masks[t]).mean() for t in between]
    assert np.mean(kept) > 0.03, "something has to move"
    assert np.mean(wrong) < 0.25 * np.mean(kept)


def test_frame_by_frame_is_a_special_case(segmenter: Segmenter, videos: list[SyntheticVideo]) -> None:
    images = videos[0].images[:4]
    for result, image in zip(segment_video(segmenter, images, key_every=1, smoothing=0), images, strict=True):
        expected = segmenter(image)
        # Here the patch grid is enlarged in two steps.
        assert (result.labels == expected.labels).mean() > 0.95
        assert np.abs(result.scores - expected.scores).mean() < 0.01


def test_a_still_video_has_still_labels(segmenter: Segmenter, videos: list[SyntheticVideo]) -> None:
    results = list(segment_video(segmenter, [videos[0].images[0]] * 9, key_every=4))
    assert len(results) == 9
    changed = [(result.labels != results[0].labels).mean() for result in results]
    assert max(changed) < 0.03


def test_a_flickering_key_frame_is_evened_out(make_model: Make, videos: list[SyntheticVideo]) -> None:
    """The scores of one key frame are wrong where they are weak; what was carried there outweighs them."""
    video = SyntheticVideo(
        images=np.concatenate([videos[0].images[:1]] * 5), masks=videos[0].masks[:5], sources=videos[0].sources[:5]
    )
    calls = []

    class Flickering(Oracle):
        def class_scores(self, image: Any) -> torch.Tensor:
            calls.append(1)
            truth = torch.nn.functional.one_hot(torch.from_numpy(video.masks[0].astype(np.int64)), len(NAMES))
            scores = truth.permute(2, 0, 1).float()
            return scores if len(calls) != 2 else 0.3 * scores.roll(1, 0)

    steady = list(segment_video(Flickering(make_model(), video), video.images, key_every=2))
    assert (steady[2].labels == video.masks[0]).mean() > 0.95
    calls.clear()
    flickering = list(segment_video(Flickering(make_model(), video), video.images, key_every=2, smoothing=0))
    assert (flickering[2].labels == video.masks[0]).mean() < 0.05


def test_a_cut_begins_anew(make_model: Make, videos: list[SyntheticVideo]) -> None:
    one, other = videos[0], videos[2]
    images = np.concatenate([one.images[:9], other.images[:5]])
    oracle = Oracle(make_model(), one, other)
    results = list(segment_video(oracle, images, key_every=6))
    assert keys_of(oracle, images) == [0, 6, 9]
    parts = [*segment_video(oracle, one.images[:9]), *segment_video(oracle, other.images[:5])]
    for result, alone in zip(results, parts, strict=True):
        np.testing.assert_array_equal(result.labels, alone.labels)
        np.testing.assert_array_equal(result.scores, alone.scores)


def test_another_size_begins_anew(segmenter: Segmenter, videos: list[SyntheticVideo]) -> None:
    images = [*videos[0].images[:3], *(image[:40] for image in videos[0].images[3:5])]
    results = list(segment_video(segmenter, images))
    assert [result.labels.shape for result in results] == [(64, 64)] * 3 + [(40, 64)] * 2
    assert list(segment_video(segmenter, [])) == []


def test_no_more_than_the_distance_of_keys_is_held(make_model: Make, videos: list[SyntheticVideo]) -> None:
    read = 0

    def counted() -> Iterator[np.ndarray]:
        nonlocal read
        for image in videos[0].images:
            read += 1
            yield image

    ahead = []
    for done, result in enumerate(segment_video(Oracle(make_model(), videos[0]), counted(), key_every=4), start=1):
        np.testing.assert_array_equal(result.image, videos[0].images[done - 1])  # in order
        ahead.append(read - done)
    assert len(ahead) == 13
    assert ahead[0] == 0
    assert max(ahead) == 3


@pytest.mark.parametrize("settings", [{"key_every": 0}, {"smoothing": 1.0}, {"smoothing": -0.1}])
def test_settings_out_of_range(segmenter: Segmenter, settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(settings))):
        segment_video(segmenter, [], **settings)


def test_arrays_that_are_no_frame_are_rejected(segmenter: Segmenter, videos: list[SyntheticVideo]) -> None:
    with pytest.raises(DataError, match="an image must be"):
        list(segment_video(segmenter, [videos[0].images[0], videos[0].images[1].astype(np.float32)]))


# --------------------------------------------------------------------------------------------------------------- files


def smooth(seed: int, height: int, width: int) -> np.ndarray:
    """An image that survives compression."""
    coarse = np.random.default_rng(seed).integers(0, 256, (3, 4, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BILINEAR))


@pytest.mark.parametrize("encoder", ["libx264", "mpeg4"])
def test_what_is_written_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, encoder: str) -> None:
    if encoder not in av.codecs_available:
        pytest.skip(f"this FFmpeg has no {encoder}")
    monkeypatch.setattr(video_io, "_ENCODERS", {encoder: video_io._ENCODERS[encoder]})
    times = [0.0, 0.04, 0.2, 0.24, 1.001, 1.0345, 3.0]  # a variable rate
    frames = [Frame(i, seconds, smooth(0, 49, 64)) for i, seconds in enumerate(times)]
    write_video(f"{tmp_path}/a/video.mp4", iter(frames))
    found = list(read_frames(f"{tmp_path}/a/video.mp4"))
    assert [frame.index for frame in found] == list(range(7))
    assert [frame.seconds for frame in found] == pytest.approx(times, abs=1 / 60_000)
    for frame, expected in zip(found, frames, strict=True):
        assert frame.image.shape == (50, 64, 3), "made even"
        assert frame.image.dtype == np.uint8
        assert np.abs(frame.image[:49].astype(int) - expected.image).mean() < 6
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["video.mp4"]


# a, b, c, d of the matrix in the track header (ISO/IEC 14496-12, 8.3.2): x' = a x + c y, y' = b x + d y, y down.
TURNS = {0: (1, 0, 0, 1), 90: (0, 1, -1, 0), 180: (-1, 0, 0, -1), 270: (0, -1, 1, 0)}


@pytest.mark.parametrize("clockwise", TURNS)
def test_frames_are_upright(tmp_path: Path, clockwise: int) -> None:
    image = smooth(1, 48, 64)
    write_video(f"{tmp_path}/video.mp4", [Frame(0, 0.0, image), Frame(1, 0.04, image)])
    data = (tmp_path / "video.mp4").read_bytes()
    start = data.index(b"tkhd") + 4 + 40  # past version, flags, times, id, duration, layer and volume
    a, b, c, d = (part * 65536 for part in TURNS[clockwise])
    fields = [(number, 4) for number in (a, b, 0, c, d, 0, 0, 0, 1 << 30)]
    matrix = b"".join(number.to_bytes(size, "big", signed=True) for number, size in fields)
    (tmp_path / "turned.mp4").write_bytes(data[:start] + matrix + data[start + 36 :])
    found = next(read_frames(tmp_path / "turned.mp4")).image
    expected = np.asarray(Image.fromarray(image).rotate(-clockwise, expand=True))
    assert found.shape == expected.shape
    assert np.abs(found.astype(int) - expected).mean() < 6


@pytest.fixture
def video_bytes(videos: list[SyntheticVideo], tmp_path: Path) -> Callable[[str], bytes]:
    """The first video as MP4 with its index in front, or as Matroska."""

    def encode(kind: str) -> bytes:
        path = str(tmp_path / f"encoded.{kind}")
        with av.open(path, "w", options={"movflags": "faststart"} if kind == "mp4" else {}) as container:
            stream = container.add_stream("mpeg4", rate=Fraction(10))
            stream.width = stream.height = SIZE
            stream.pix_fmt = "yuv420p"
            stream.gop_size = 1  # every frame by itself: a part of the bytes is a part of the frames
            for image in videos[0].images:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
            container.mux(stream.encode(None))
        return Path(path).read_bytes()

    return encode


def until_damage(path: Path) -> tuple[list[Frame], DataError]:
    found: list[Frame] = []
    frames = read_frames(path)
    try:
        while True:
            found.append(next(frames))
    except DataError as error:
        return found, error


@pytest.mark.parametrize("kind", ["mp4", "mkv"])
def test_good_frames_come_before_the_damage_is_told(
    tmp_path: Path, video_bytes: Callable[[str], bytes], kind: str
) -> None:
    data = video_bytes(kind)
    (tmp_path / "video").write_bytes(data)
    assert len(list(read_frames(tmp_path / "video"))) == 13
    (tmp_path / "cut").write_bytes(data[: int(len(data) * 0.7)])
    found, error = until_damage(tmp_path / "cut")
    assert 2 <= len(found) <= 11
    assert re.search(rf"cut is (damaged|cut short) after {len(found)} frames \(0\.\d0 s\)", str(error))


def test_files_that_are_no_video_are_rejected(tmp_path: Path, video_bytes: Callable[[str], bytes]) -> None:
    data = video_bytes("mkv")
    for name, content in (("empty.mp4", b""), ("notes.mp4", b"not a video\n" * 400), ("head.mkv", data[:40])):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=f"{name} is not a video"):
            next(read_frames(tmp_path / name))
    with wave.open(str(tmp_path / "sound.wav"), "wb") as sound:
        sound.setparams((1, 2, 8000, 0, "NONE", ""))
        sound.writeframes(bytes(16000))
    with pytest.raises(DataError, match=r"sound\.wav has no video stream"):
        next(read_frames(tmp_path / "sound.wav"))
    with pytest.raises(StorageError, match="does not exist"):
        next(read_frames(tmp_path / "none.mp4"))
    with pytest.raises(StorageError, match="folder"):
        next(read_frames(tmp_path))


def test_too_large_frames_are_not_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_video(f"{tmp_path}/video.mp4", [Frame(0, 0.0, smooth(0, 48, 64))])
    monkeypatch.setattr(video_io, "_MAX_PIXELS", 3000)
    with pytest.raises(DataError, match="64 x 48 pixels, more than the limit of 3,000"):
        next(read_frames(tmp_path / "video.mp4"))


def test_a_video_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "video.mp4"
    path.write_bytes(b"the old one")

    def failing() -> Iterator[Frame]:
        yield Frame(0, 0.0, smooth(0, 48, 64))
        raise DataError("the source is damaged")

    with pytest.raises(DataError, match="the source is damaged"):
        write_video(str(path), failing())
    with pytest.raises(DataError, match=r"frame 1 of .* has 32 x 48 pixels, and the first one 64 x 48"):
        write_video(str(path), [Frame(0, 0.0, smooth(0, 48, 64)), Frame(1, 1.0, smooth(0, 48, 32))])
    with pytest.raises(DataError, match="no frame to write"):
        write_video(str(path), [])
    assert path.read_bytes() == b"the old one"
    assert len(list(tmp_path.iterdir())) == 1


def test_the_extra_is_named_when_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(UserError, match=r"pip install 'vilseg\[video\]'"):
        next(read_frames(tmp_path / "video.mp4"))
    with pytest.raises(UserError, match=r"pip install 'vilseg\[video\]'"):
        write_video(f"{tmp_path}/video.mp4", [Frame(0, 0.0, smooth(0, 48, 64))])


# -------------------------------------------------------------------------------------------------------- segment_file


def test_a_file_becomes_masks_times_and_an_overlay(
    tmp_path: Path, segmenter: Segmenter, videos: list[SyntheticVideo]
) -> None:
    source, masks, overlay = str(tmp_path / "video.mp4"), tmp_path / "masks", tmp_path / "overlay.mp4"
    write_video(source, frames_of(videos[0], rate=10))
    done = segment_file(segmenter, source, masks_uri=str(masks), overlay_uri=str(overlay), key_every=4)

    expected = list(segment_video(segmenter, [frame.image for frame in read_frames(source)], key_every=4))
    assert sorted(path.name for path in masks.iterdir()) == [*(f"{i:06d}.png" for i in range(13)), "frames.csv"]
    for index, result in enumerate(expected):
        rendered = Image.open(masks / f"{index:06d}.png")
        assert rendered.mode == "P"
        np.testing.assert_array_equal(np.asarray(rendered), result.labels)
    with (masks / "frames.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["index"]) for row in rows] == list(range(13))
    assert [float(row["seconds"]) for row in rows] == pytest.approx([i / 10 for i in range(13)])

    labels = np.stack([result.labels for result in expected])
    scores = np.stack([result.scores for result in expected])
    present = np.unique(labels)
    assert (done.frames, done.width, done.height) == (13, SIZE, SIZE)
    assert done.seconds == pytest.approx(1.3)
    assert done.classes == tuple(segmenter.classes[index] for index in present)
    assert done.areas == tuple(int((labels == index).sum()) for index in present)
    assert done.scores == pytest.approx([scores[labels == index].mean() for index in present], rel=1e-4)

    drawn = list(read_frames(overlay))
    assert [frame.seconds for frame in drawn] == pytest.approx([i / 10 for i in range(13)], abs=1e-3)
    for frame, result in zip(drawn, expected, strict=True):
        rendered = np.asarray(result.overlay(legend=False)).astype(int)
        assert np.abs(frame.image - rendered).mean() < 12


def test_masks_before_the_damage_are_kept(
    tmp_path: Path, segmenter: Segmenter, video_bytes: Callable[[str], bytes]
) -> None:
    data = video_bytes("mkv")
    source, masks, overlay = tmp_path / "cut.mkv", tmp_path / "masks", tmp_path / "overlay.mp4"
    source.write_bytes(data[: int(len(data) * 0.7)])
    good, _ = until_damage(source)
    with pytest.raises(DataError, match=r"cut\.mkv is .*; the masks of the frames before that are in .*masks"):
        segment_file(segmenter, str(source), masks_uri=str(masks), overlay_uri=str(overlay))
    assert len(good) >= 2
    assert sorted(path.name for path in masks.iterdir()) == [f"{i:06d}.png" for i in range(len(good))]
    assert not overlay.exists()


def test_pixels_without_a_class_are_no_area_of_a_video(
    tmp_path: Path, segmenter: Segmenter, videos: list[SyntheticVideo]
) -> None:
    source = str(tmp_path / "video.mp4")
    write_video(source, frames_of(videos[0])[:3])
    every = segment_file(segmenter, source, masks_uri=str(tmp_path / "every"))
    vocabulary = Vocabulary(segmenter.classes, negatives=("nothing of this kind",))
    segmenter.config = segmenter.config.replace(threshold=0.5)
    some = segment_file(segmenter.with_classes(vocabulary), source, masks_uri=str(tmp_path / "some"))
    labels = [np.asarray(Image.open(path)) for path in sorted((tmp_path / "some").glob("*.png"))]
    assert sum(some.areas) == sum(int((frame != 255).sum()) for frame in labels) < sum(every.areas)


def test_a_damaged_head_leaves_nothing(tmp_path: Path, segmenter: Segmenter) -> None:
    (tmp_path / "video.mp4").write_bytes(b"nothing of use")
    with pytest.raises(DataError, match="not a video"):
        segment_file(segmenter, str(tmp_path / "video.mp4"), masks_uri=str(tmp_path / "masks"))
    assert not (tmp_path / "masks").exists()


def test_other_masks_are_not_mixed_in(tmp_path: Path, segmenter: Segmenter, videos: list[SyntheticVideo]) -> None:
    source = str(tmp_path / "video.mp4")
    write_video(source, frames_of(videos[0])[:2])
    (tmp_path / "masks").mkdir()
    segment_file(segmenter, source, masks_uri=str(tmp_path / "masks"))
    with pytest.raises(StorageError, match="holds files already"):
        segment_file(segmenter, source, masks_uri=str(tmp_path / "masks"))
