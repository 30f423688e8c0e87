"""From images of any kind and size to masks of their own size."""

import weakref
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vilseg.config import SegmentationConfig
from vilseg.errors import DataError, StorageError
from vilseg.model import ViLSeg
from vilseg.segmentation import class_embeddings, dense_features, pixel_labeling
from vilseg.segmentation.result import Segmentation
from vilseg.segmentation.segmenter import Segmenter
from vilseg.text.vocabulary import Vocabulary

Make = Callable[..., ViLSeg]
CLASSES = ["dog", "cat", "sofa by the sea", "grass"]


@pytest.fixture(autouse=True)
def _exact(monkeypatch: pytest.MonkeyPatch) -> None:
    # bfloat16, where the machine has units for it, rounds differently for every batch size.
    monkeypatch.setattr("vilseg.segmentation.dense_features.has_bfloat16_units", lambda device: False)


@pytest.fixture
def segmenter(make_model: Make) -> Segmenter:
    model = make_model()
    model.segmentation = SegmentationConfig(input_size=32, max_aspect=3)
    return Segmenter(model, CLASSES, device="cpu")


def random_image(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Coloured blobs."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BILINEAR))


def assert_alike(first: Segmentation, second: Segmentation) -> None:
    np.testing.assert_allclose(first.scores, second.scores, atol=1e-4)
    assert (first.labels == second.labels).mean() > 0.999, "only ties may fall the other way"


def test_a_result_has_the_size_of_its_image(segmenter: Segmenter) -> None:
    for size in ((48, 48), (37, 90), (200, 31), (5, 3), (1, 1), (2, 300)):
        image = random_image(*size)
        result = segmenter(image)
        assert result.labels.shape == result.scores.shape == size
        assert result.labels.dtype == np.uint8
        assert result.labels.max() < 4
        assert result.scores.dtype == np.float32
        assert result.clusters is not None
        assert result.clusters.shape == size
        assert result.clusters.max() < 5
        assert ((result.scores >= 1 / 4 - 1e-6) & (result.scores <= 1 + 1e-6)).all()
        np.testing.assert_array_equal(result.image, image)
        assert result.classes == tuple(CLASSES)
    assert segmenter.classes == tuple(CLASSES)


def test_a_batch_equals_one_by_one(segmenter: Segmenter) -> None:
    images = [
        random_image(40, 60, 1),
        random_image(60, 40, 2),
        random_image(40, 60, 3),
        random_image(80, 120, 4),
        random_image(33, 33, 5),
    ]
    together = segmenter.batch(images)
    assert len(together) == 5
    for image, result in zip(images, together, strict=True):
        assert_alike(result, segmenter(image))
    assert len(np.unique(np.concatenate([r.labels.ravel() for r in together]))) > 1
    assert segmenter.batch([]) == []


def test_images_of_one_size_share_a_pass(segmenter: Segmenter, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, ...]] = []
    encode = segmenter.model.image_features
    monkeypatch.setattr(segmenter.model, "image_features", lambda x: (seen.append(tuple(x.shape)), encode(x))[1])
    segmenter.batch([random_image(40, 60), random_image(60, 40), random_image(80, 120), random_image(2, 300)])
    # Shorter side 32, sides whole patches, and no longer than three times as long as wide.
    assert sorted(seen) == [(1, 3, 32, 96), (1, 3, 48, 32), (2, 3, 32, 48)]


def test_strips_equal_the_whole(segmenter: Segmenter, monkeypatch: pytest.MonkeyPatch) -> None:
    image = random_image(61, 40)
    whole = segmenter(image)
    for values in (1, 40 * 5 * 7):
        monkeypatch.setattr(pixel_labeling, "_STRIP_VALUES", values)
        strips = segmenter(image)
        np.testing.assert_allclose(strips.scores, whole.scores, atol=1e-5)
        assert (strips.labels == whole.labels).mean() > 0.999
        assert whole.clusters is not None
        assert strips.clusters is not None
        assert (strips.clusters == whole.clusters).mean() > 0.999


def test_scores_and_labels_are_the_soft_max_of_enlarged_similarities(segmenter: Segmenter) -> None:
    image = random_image(50, 70)
    result = segmenter(image)
    [features] = segmenter.encode([image])
    similarity = segmenter._class_scores(features).unsqueeze(0)
    clusters = features.assignments_NK.T.unflatten(1, features.grid).unsqueeze(0)
    size = {"size": (50, 70), "mode": "bilinear", "align_corners": False}
    scores = (torch.nn.functional.interpolate(similarity, **size)[0] / segmenter.config.temperature).softmax(0)
    np.testing.assert_allclose(result.scores, scores.max(0).values, atol=1e-4)
    assert (result.labels == scores.argmax(0).numpy()).mean() > 0.999
    assert (result.clusters == torch.nn.functional.interpolate(clusters, **size)[0].argmax(0).numpy()).mean() > 0.999


@pytest.mark.parametrize(("count", "dtype"), [(254, np.uint8), (255, np.uint16), (300, np.uint16)])
def test_many_classes_need_sixteen_bits(make_model: Make, count: int, dtype: type[np.generic]) -> None:
    model = make_model()
    model.segmentation = SegmentationConfig(input_size=32)
    result = Segmenter(model, [f"thing {i}" for i in range(count)], device="cpu")(random_image(40, 30))
    assert result.labels.dtype == dtype
    assert result.labels.max() < count


def test_class_names_by_any_means(make_model: Make, tmp_path: Path) -> None:
    (tmp_path / "classes.txt").write_text("cat\nsofa\n")
    for classes in (["cat", "sofa"], Vocabulary(("cat", "sofa")), "cat,sofa", f"{tmp_path}/classes.txt"):
        assert Segmenter(make_model(), classes, device="cpu").classes == ("cat", "sofa")
    with pytest.raises(DataError, match="listed twice"):
        Segmenter(make_model(), ["cat", "Cat"], device="cpu")


def test_every_kind_of_input_gives_the_same(segmenter: Segmenter, tmp_path: Path) -> None:
    image = random_image(40, 60)
    expected = segmenter(image)
    path = tmp_path / "image.png"
    Image.fromarray(image).save(path)
    palette = Image.fromarray(image).quantize(256)
    for kind in (Image.fromarray(image), path, str(path), f"file://{path}", np.asfortranarray(image)):
        assert_alike(segmenter(kind), expected)
    assert segmenter(palette).labels.shape == (40, 60)


@pytest.mark.parametrize("kind", ["transparent", "sixteen bits", "turned"])
def test_an_open_image_is_seen_as_its_file_is(segmenter: Segmenter, tmp_path: Path, kind: str) -> None:
    image, exif = Image.fromarray(random_image(40, 60)), Image.Exif()
    if kind == "transparent":
        image.putalpha(Image.fromarray(random_image(40, 60, 3)[:, :, 0]))
    elif kind == "sixteen bits":
        image = Image.fromarray(random_image(40, 60)[:, :, 0].astype(np.uint16) * 257)
    else:
        exif[0x0112] = 6
    image.save(tmp_path / "image.png", exif=exif)
    opened, by_path = segmenter(Image.open(tmp_path / "image.png")), segmenter(tmp_path / "image.png")
    np.testing.assert_array_equal(opened.image, by_path.image)
    assert by_path.labels.shape == ((60, 40) if kind == "turned" else (40, 60))
    assert_alike(opened, by_path)


@pytest.mark.parametrize(
    ("image", "words"),
    [
        (np.zeros((4, 4, 3), np.float32), r"\(4, 4, 3\) float32"),
        (np.zeros((4, 4), np.uint8), r"\(4, 4\) uint8"),
        (np.zeros((3, 4, 4), np.uint8), r"\(3, 4, 4\) uint8"),
        (np.zeros((0, 4, 3), np.uint8), r"\(0, 4, 3\) uint8"),
        (None, "NoneType"),
        (torch.zeros(3, 4, 4), "torch.float32"),
    ],
)
def test_objects_that_are_no_image_are_rejected(segmenter: Segmenter, image: object, words: str) -> None:
    with pytest.raises(DataError, match=rf"an image must be a PIL image, an \(H, W, 3\) uint8 RGB array.*{words}"):
        segmenter(image)  # type: ignore[arg-type]


def test_files_that_are_no_images_are_rejected(segmenter: Segmenter, tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("not an image")
    with pytest.raises(DataError, match="not an image"):
        segmenter(path)
    with pytest.raises(StorageError, match="does not exist"):
        segmenter(tmp_path / "none.jpg")


def test_settings_that_a_model_carries_are_followed(make_model: Make) -> None:
    model = make_model()
    model.segmentation = SegmentationConfig(input_size=32)
    sharp = Segmenter(model, CLASSES, device="cpu")(random_image(40, 40))
    model.segmentation = SegmentationConfig(input_size=32, temperature=10.0)
    flat = Segmenter(model, CLASSES, device="cpu")(random_image(40, 40))
    assert (flat.labels == sharp.labels).mean() > 0.999
    assert flat.scores.max() < 0.3 < sharp.scores.max()


def test_dense_features_serve_every_class_list_of_one_model(make_model: Make) -> None:
    model = make_model()
    model.segmentation = SegmentationConfig(input_size=32, region_weight=0.5)
    first, second = (Segmenter(model, names, device="cpu") for names in ("cat,sofa", "sky|clouds,sea,background"))
    image = random_image(40, 60)
    [features] = first.encode([image])
    assert_alike(second.classify(features, image), second(image))
    labels = second.classify(features, image, background_bias=1.0).labels
    assert (labels == 2).all()


def test_synonyms_are_compared_like_names(make_model: Make) -> None:
    model = make_model()
    model.segmentation = SegmentationConfig(input_size=32, region_weight=0)
    image = random_image(40, 60)
    apart = Segmenter(model, ["cat", "sofa", "sky"], device="cpu")(image)
    joined = Segmenter(model, ["cat", "sofa|sky"], device="cpu")(image)
    # Where sofa or sky is best of the three, their class is; where cat is, enlarging may decide otherwise at its border.
    assert (joined.labels == np.minimum(apart.labels, 1)).mean() > 0.9


@pytest.mark.parametrize("iterations", [0, 2])
def test_the_gate_gives_what_the_classes_that_it_leaves_give_alone(make_model: Make, iterations: int) -> None:
    model, image = make_model(), random_image(40, 60)
    names = [f"{thing} {number}" for thing in ("dog", "grass", "sea") for number in range(20)] + ["background"]
    settings = {"input_size": 32, "region_weight": 0.5, "refinement": {"iterations": iterations}}
    model.segmentation = SegmentationConfig(**settings)
    best = Segmenter(model, names, device="cpu").class_scores(image).flatten(1).amax(1)[:-1]
    if iterations:  # the gate judges before refinement
        model.segmentation = SegmentationConfig(input_size=32, region_weight=0.5)
        best = Segmenter(model, names, device="cpu").class_scores(image).flatten(1).amax(1)[:-1]
    kept = [*sorted(best.topk(3).indices.tolist()), 60]
    model.segmentation = SegmentationConfig(**settings)
    alone = Segmenter(model, [names[index] for index in kept], device="cpu")(image)
    model.segmentation = SegmentationConfig(**settings, gate=3)
    gated = Segmenter(model, names, device="cpu")
    result = gated(image)
    np.testing.assert_allclose(result.scores, alone.scores, atol=1e-5)
    assert (result.labels == np.array(kept)[alone.labels]).mean() > 0.999
    if not iterations:  # videos take this way
        assert (gated.label_pixels(image, gated.class_scores(image)).labels == result.labels).mean() > 0.999


@pytest.mark.parametrize(("rest", "label"), [((), 255), (("background",), 2)])
def test_unsure_pixels_are_unknown(make_model: Make, rest: tuple[str, ...], label: int) -> None:
    model, image = make_model(), random_image(40, 60)
    names = ["cat", "sofa", *rest]
    model.segmentation = SegmentationConfig(input_size=32)
    sure = Segmenter(model, names, device="cpu")(image)
    threshold = float(np.median(sure.scores))
    model.segmentation = SegmentationConfig(input_size=32, threshold=threshold)
    result = Segmenter(model, names, device="cpu")(image)
    np.testing.assert_array_equal(result.labels, np.where(sure.scores < threshold, label, sure.labels))
    np.testing.assert_array_equal(result.labels, sure.above(threshold).labels)
    np.testing.assert_array_equal(result.scores, sure.scores)


@pytest.mark.parametrize("iterations", [0, 2])
def test_what_a_negative_word_names_best_has_no_class(make_model: Make, iterations: int) -> None:
    model, image = make_model(), random_image(40, 60)
    model.segmentation = SegmentationConfig(input_size=32, region_weight=0, refinement={"iterations": iterations})
    shown = Segmenter(model, ["cat", "sofa", "sky"], device="cpu")(image)
    counts = np.bincount(shown.labels.ravel(), minlength=3)
    assert counts.max() < shown.labels.size, "one class alone would prove little"
    unwanted = int(counts.argmax())
    others = tuple(name for index, name in enumerate(("cat", "sofa", "sky")) if index != unwanted)
    vocabulary = Vocabulary(others, negatives=(("cat", "sofa", "sky")[unwanted],))
    segmenter = Segmenter(model, vocabulary, device="cpu")
    result = segmenter(image)
    assert result.classes == others
    np.testing.assert_array_equal(result.labels == 255, shown.labels == unwanted)
    np.testing.assert_allclose(result.scores, shown.scores, atol=1e-5)
    assert sum(region.area for region in result.regions) == (shown.labels != unwanted).sum()
    if not iterations:
        np.testing.assert_array_equal(
            segmenter.label_pixels(image, segmenter.class_scores(image)).labels, result.labels
        )
    background = Segmenter(model, vocabulary.with_background(), device="cpu")(image)
    assert (background.labels[shown.labels == unwanted] == 2).all()


def test_a_vocabularys_prompts_go_before_the_models(make_model: Make) -> None:
    model = make_model()
    model.segmentation = SegmentationConfig(prompts=["a photo of a {}."])
    usual = Segmenter(model, ["cat", "sofa|couch"], device="cpu")._class_embeddings.embeddings_ED
    model.segmentation = SegmentationConfig(prompts=["the {}", "a {} in the grass"])
    other = Segmenter(model, ["cat", "sofa|couch"], device="cpu")._class_embeddings.embeddings_ED
    vocabulary = Vocabulary(("cat", "sofa"), ((), ("couch",)), prompts=("a photo of a {}.",))
    np.testing.assert_allclose(
        Segmenter(model, vocabulary, device="cpu")._class_embeddings.embeddings_ED, usual, atol=1e-6
    )
    vocabulary = Vocabulary(("cat", "sofa"), ((), ("couch",)), class_prompts=((), ("a photo of a {}.",)))
    mixed = Segmenter(model, vocabulary, device="cpu")._class_embeddings.embeddings_ED
    np.testing.assert_allclose(mixed, torch.stack([other[0], usual[1], usual[2]]), atol=1e-6)
    wanted = model.encode_text(["the cat", "a cat in the grass"]).mean(0)
    np.testing.assert_allclose(other[0], (wanted / wanted.norm()).detach(), atol=1e-6)


def test_texts_are_embedded_once_while_the_weights_stay(make_model: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    model, embedded = make_model(), []
    encode = model.encode_text
    monkeypatch.setattr(model, "encode_text", lambda texts: (embedded.append(len(texts)), encode(texts))[1])
    first = Segmenter(model, ["cat", "sofa"], device="cpu")
    first.with_classes(["cat", "sofa"])
    Segmenter(model, Vocabulary.of("cat,sofa"), device="cpu")
    assert embedded == [2]
    other = first.with_classes("sky,sea,dog")
    assert other.classes == ("sky", "sea", "dog")
    assert first.classes == ("cat", "sofa")
    assert embedded == [2, 3]
    image = random_image(40, 60)
    assert_alike(other(image), Segmenter(model, "sky,sea,dog", device="cpu")(image))
    model.segmentation = SegmentationConfig(prompts=["the {}"])
    Segmenter(model, ["cat", "sofa"], device="cpu")
    assert embedded == [2, 3, 2]
    optimizer = torch.optim.SGD(model.text_encoder.parameters(), lr=0.1)
    encode(["a cat"]).sum().backward()
    optimizer.step()
    changed = Segmenter(model, ["cat", "sofa"], device="cpu")
    assert embedded == [2, 3, 2, 2]
    assert not torch.equal(changed._class_embeddings.embeddings_ED, first._class_embeddings.embeddings_ED)


def test_names_used_least_lately_are_forgotten(make_model: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    model, embedded = make_model(), []
    encode = model.encode_text
    monkeypatch.setattr(model, "encode_text", lambda texts: (embedded.append(len(texts)), encode(texts))[1])
    monkeypatch.setattr(class_embeddings, "_CACHED_ENTRIES", 5)
    segmenter = Segmenter(model, "a,b", device="cpu")
    for classes in ("c,d", "a,b", "e,f", "a,b", "c,d", "a,b,c,d,e,f", "a,b,c,d,e,f", "a,b"):
        segmenter.with_classes(classes)
    # "c,d" makes way for "e,f", and all for six names, which stay alone though they are too many.
    assert embedded == [2, 2, 2, 2, 6, 2]


def test_a_pass_is_bounded_however_many_images_are_given(segmenter: Segmenter, monkeypatch: pytest.MonkeyPatch) -> None:
    images = [random_image(32, 48, seed) for seed in range(7)] + [random_image(32, 32, 8)]
    expected = segmenter.batch(images)
    passes: list[tuple[int, ...]] = []
    encode = segmenter.model.image_features
    monkeypatch.setattr(segmenter.model, "image_features", lambda x: (passes.append(tuple(x.shape)), encode(x))[1])
    monkeypatch.setattr(dense_features, "_PIXELS_PER_PASS", 3 * 32 * 48 + 1)
    for image, result, whole in zip(images, segmenter.batch(images), expected, strict=True):
        assert_alike(result, whole)
        assert result.image is image
    assert passes == [(3, 3, 32, 48), (3, 3, 32, 48), (1, 3, 32, 48), (1, 3, 32, 32)]
    assert [len(features.patches_ND) for features in segmenter.encode(images)] == [96] * 7 + [64]
    assert max(shape[0] for shape in passes) == 3
    passes.clear()
    monkeypatch.setattr(dense_features, "_PIXELS_PER_PASS", 1)
    segmenter.batch(images[:2])
    assert passes == [(1, 3, 32, 48)] * 2, "an image that is larger than the bound has a pass of its own"


def test_prompts_are_averaged_pass_by_pass(make_model: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model()
    model.segmentation = SegmentationConfig(prompts=["a {}", "the {}", "{} by the sea"])
    names = [f"thing {number}" for number in range(11)]
    whole = Segmenter(model, names, device="cpu")._class_embeddings.embeddings_ED
    alive: list[weakref.ref[torch.Tensor]] = []
    most = 0
    encode = model.encode_text

    def counted(texts: list[str]) -> torch.Tensor:
        nonlocal most
        most = max(most, sum(one() is not None for one in alive))
        encoded = encode(texts)
        alive.append(weakref.ref(encoded))
        return encoded

    monkeypatch.setattr(model, "encode_text", counted)
    monkeypatch.setattr(class_embeddings, "_TEXTS_PER_PASS", 4)
    monkeypatch.setattr(class_embeddings, "_cache", weakref.WeakKeyDictionary())
    embeddings = Segmenter(model, names, device="cpu")._class_embeddings.embeddings_ED
    torch.testing.assert_close(embeddings, whole, atol=1e-6, rtol=1e-5)
    assert len(alive) == 9
    assert most <= 2, "the embeddings of earlier passes are kept beside their means"
