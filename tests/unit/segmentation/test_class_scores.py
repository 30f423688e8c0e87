"""The scores of classes: against loops over patches and classes, and what calibration and background words do."""

import math

import pytest
import torch
import torch.nn.functional as F

from vilseg.config import SegmentationConfig
from vilseg.model import ImageEmbeddings
from vilseg.segmentation.class_embeddings import ClassEmbeddings, normalize_class_name
from vilseg.segmentation.class_scores import (
    compute_class_scores,
    objectness,
    select_top_classes,
)

B, GRID, D, K, C, WORDS = 2, (2, 3), 6, 4, 5, 3
N = GRID[0] * GRID[1]


def unit(*shape: int) -> torch.Tensor:
    return F.normalize(torch.randn(*shape, dtype=torch.float64), dim=-1)


@pytest.fixture
def scene() -> tuple[ImageEmbeddings, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    noise = torch.randn(D, D, dtype=torch.float64)
    embeddings = ImageEmbeddings(unit(B, D), unit(B, N, D), GRID)
    mean = torch.randn(D, dtype=torch.float64) * 0.1
    return embeddings, torch.randn(B, N, K, dtype=torch.float64).softmax(-1), unit(C + WORDS, D), mean, noise @ noise.T


def slow(scene: tuple, config: SegmentationConfig, image: int, patch: int, text: int) -> float:
    """The formula of the module for one patch and one text, term by term."""
    embeddings, assignments, texts, mean, covariance = scene
    p, a, t = embeddings.patches[image], assignments[image], texts[text]
    g = sum(p[n] for n in range(N))
    g = g / g.norm()

    def mixed(e: torch.Tensor) -> torch.Tensor:
        m = config.image_mix
        both = (1 - m) * e + m * g
        return both / both.norm()

    by_region = 0.0
    for k in range(K):
        region = sum(a[n, k] * p[n] for n in range(N))
        by_region += float(a[patch, k] * (mixed(region / region.norm()) @ t))
    score = config.region_weight * by_region + (1 - config.region_weight) * float(mixed(p[patch]) @ t)
    spreads = [math.sqrt(float(x @ covariance @ x)) for x in texts]
    q = config.calibration
    return (score - q * float(mean @ t)) * (sum(spreads) / len(spreads) / spreads[text]) ** q


@pytest.mark.parametrize(("weight", "mix", "calibration"), [(1, 0, 0), (0, 0.3, 0), (0.4, 0.2, 0.7), (0.5, 0, 1)])
def test_scores_are_those_of_the_formula(scene: tuple, weight: float, mix: float, calibration: float) -> None:
    config = SegmentationConfig(region_weight=weight, image_mix=mix, calibration=calibration)
    embeddings, assignments, texts, mean, covariance = scene
    classes = ClassEmbeddings.standardized(texts, mean, covariance, calibration, num_classes=C, background=None)
    scores = compute_class_scores(embeddings, assignments, classes, config)
    assert scores.shape == (B, C, *GRID)
    for image in range(B):
        for patch in range(N):
            for text in range(C):
                wanted = slow(scene, config, image, patch, text)
                assert float(scores[image, text].flatten()[patch]) == pytest.approx(wanted, abs=1e-9)


def test_background_takes_the_best_of_its_words_and_the_bias(scene: tuple) -> None:
    config = SegmentationConfig(background_bias=0.1)
    embeddings, assignments, texts, mean, covariance = scene
    plain = ClassEmbeddings.standardized(texts, mean, covariance, 0.0, num_classes=C + WORDS, background=None)
    every = compute_class_scores(embeddings, assignments, plain, config)
    classes = ClassEmbeddings.standardized(texts, mean, covariance, 0.0, num_classes=C, background=2)
    scores = compute_class_scores(embeddings, assignments, classes, config)
    assert torch.allclose(scores[:, 2], every[:, C:].amax(1) + 0.1)
    others = [index for index in range(C) if index != 2]
    assert torch.equal(scores[:, others], every[:, others])


def test_background_without_words_is_the_word_itself_with_the_bias(scene: tuple) -> None:
    embeddings, assignments, texts, mean, covariance = scene
    classes = ClassEmbeddings.standardized(texts[:C], mean, covariance, 0.0, num_classes=C, background=0)
    biased = compute_class_scores(embeddings, assignments, classes, SegmentationConfig(background_bias=0.1))
    plain = compute_class_scores(embeddings, assignments, classes, SegmentationConfig())
    assert torch.allclose(biased[:, 0], plain[:, 0] + 0.1)
    assert torch.equal(biased[:, 1:], plain[:, 1:])


def test_objectness_is_the_formula(scene: tuple) -> None:
    _, assignments, *_ = scene
    grid = (2, 3)
    found = objectness(assignments, grid)
    for image in range(B):
        for patch in range(N):
            wanted = 0.0
            for k in range(K):
                size = sum(float(assignments[image, n, k]) for n in range(N))
                # All patches of a grid of two rows are on the border.
                wanted += float(assignments[image, patch, k]) * math.exp(-((size / math.sqrt(size)) ** 2) / 2)
            assert float(found[image, patch]) == pytest.approx(wanted, abs=1e-9)


def test_a_region_within_the_image_is_an_object_and_its_surroundings_are_not() -> None:
    inside = torch.zeros(8, 8, dtype=torch.float64)
    inside[2:6, 3:6] = 1
    found = objectness(torch.stack([inside, 1 - inside], dim=-1).flatten(0, 1).unsqueeze(0), (8, 8)).view(8, 8)
    assert torch.equal(found[inside == 1], torch.ones(12, dtype=torch.float64))
    # 28 patches of the border among 52.
    assert torch.allclose(found[inside == 0], torch.tensor(math.exp(-(28**2) / 52 / 2), dtype=torch.float64))


def test_objectness_moves_the_background_alone(scene: tuple) -> None:
    embeddings, assignments, texts, mean, covariance = scene
    classes = ClassEmbeddings.standardized(texts, mean, covariance, 0.0, num_classes=C, background=2)
    plain, moved = (
        compute_class_scores(embeddings, assignments, classes, SegmentationConfig(objectness=weight))
        for weight in (0, 0.3)
    )
    change = (0.3 * (1 - 2 * objectness(assignments, GRID))).unflatten(1, GRID)
    assert torch.allclose(moved[:, 2], plain[:, 2] + change)
    others = [index for index in range(C) if index != 2]
    assert torch.equal(moved[:, others], plain[:, others])


def test_full_calibration_gives_all_classes_one_mean_and_spread_over_the_images_it_was_measured_on() -> None:
    torch.manual_seed(1)
    patches = F.normalize(torch.randn(1, 400, D, dtype=torch.float64) * torch.arange(1, D + 1) + 1, dim=-1)
    texts = unit(C, D)
    classes = ClassEmbeddings.standardized(
        texts, patches[0].mean(0), torch.cov(patches[0].T), 1.0, num_classes=C, background=None
    )
    config = SegmentationConfig(region_weight=0)
    embeddings = ImageEmbeddings(patches.mean(1), patches, (20, 20))
    scores = compute_class_scores(embeddings, torch.ones(1, 400, 1, dtype=torch.float64), classes, config).flatten(2)[0]
    assert torch.allclose(scores.mean(1), torch.zeros(C, dtype=torch.float64), atol=1e-9)
    assert torch.allclose(scores.std(1), scores.std(1)[0].expand(C))


def test_directions_that_are_all_alike_leave_the_cosines_as_they_are(scene: tuple) -> None:
    embeddings, assignments, texts, *_ = scene
    isotropic = torch.eye(D, dtype=torch.float64) / D
    zero = torch.zeros(D, dtype=torch.float64)
    pair = [
        ClassEmbeddings.standardized(texts, zero, isotropic, strength, num_classes=C, background=None)
        for strength in (0.0, 1.0)
    ]
    first, second = (compute_class_scores(embeddings, assignments, classes, SegmentationConfig()) for classes in pair)
    assert torch.allclose(first, second)


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("wall-other-merged", "wall"),
        ("floor-wood", "floor wood"),
        ("food-other-merged", "food"),
        ("tv_monitor", "tv monitor"),
        ("sofa", "sofa"),
        ("-", "-"),
    ],
)
def test_class_names_are_said_as_captions_would_say_them(name: str, wanted: str) -> None:
    assert normalize_class_name(name) == wanted


def test_a_class_has_the_score_of_its_best_synonym(scene: tuple) -> None:
    embeddings, assignments, texts, mean, covariance = scene
    plain = ClassEmbeddings.standardized(texts, mean, covariance, 0.0, num_classes=C + WORDS, background=None)
    every = compute_class_scores(embeddings, assignments, plain, SegmentationConfig())
    owners = torch.tensor([1] * WORDS)
    classes = ClassEmbeddings.standardized(
        texts, mean, covariance, 0.0, num_classes=C, background=None, synonym_of_S=owners
    )
    scores = compute_class_scores(embeddings, assignments, classes, SegmentationConfig())
    assert torch.equal(scores[:, 1], every[:, [1, *range(C, C + WORDS)]].amax(1))
    others = [index for index in range(C) if index != 1]
    assert torch.equal(scores[:, others], every[:, others])


@pytest.mark.parametrize("how", ["mean", "logsumexp"])
def test_synonyms_are_joined_by_the_formula(scene: tuple, how: str) -> None:
    embeddings, assignments, texts, mean, covariance = scene
    config = SegmentationConfig(synonyms=how, temperature=0.07)
    plain = ClassEmbeddings.standardized(texts, mean, covariance, 0.0, num_classes=C + WORDS, background=None)
    every = compute_class_scores(embeddings, assignments, plain, config)
    classes = ClassEmbeddings.standardized(
        texts, mean, covariance, 0.0, num_classes=C, background=None, synonym_of_S=torch.tensor([1, 4, 1])
    )
    scores = compute_class_scores(embeddings, assignments, classes, config)
    for index, rows in {0: [0], 1: [1, C, C + 2], 2: [2], 3: [3], 4: [4, C + 1]}.items():
        for image in range(B):
            for patch in range(N):
                names = [float(every[image, row].flatten()[patch]) for row in rows]
                if how == "mean":
                    wanted = sum(names) / len(names)
                else:
                    wanted = 0.07 * math.log(sum(math.exp(name / 0.07) for name in names) / len(names))
                assert float(scores[image, index].flatten()[patch]) == pytest.approx(wanted, abs=1e-9)


def test_log_sum_exp_lies_between_mean_and_maximum_and_does_not_overflow(scene: tuple) -> None:
    embeddings, assignments, texts, mean, covariance = scene
    classes = ClassEmbeddings.standardized(
        texts, mean, covariance, 0.0, num_classes=C, background=None, synonym_of_S=torch.tensor([0] * WORDS)
    )

    def scores(how: str, temperature: float) -> torch.Tensor:
        config = SegmentationConfig(synonyms=how, temperature=temperature)
        return compute_class_scores(embeddings, assignments, classes, config)[:, 0]

    assert torch.allclose(scores("logsumexp", 1e-6), scores("max", 1e-6), atol=1e-5)
    assert torch.allclose(scores("logsumexp", 1e4), scores("mean", 1e4), atol=1e-3)
    between = scores("logsumexp", 0.1)
    assert ((scores("mean", 0.1) <= between) & (between <= scores("max", 0.1))).all()


def test_negative_words_are_a_row_of_their_own(scene: tuple) -> None:
    embeddings, assignments, texts, mean, covariance = scene
    every = compute_class_scores(
        embeddings,
        assignments,
        ClassEmbeddings.standardized(texts, mean, covariance, 0.0, num_classes=C + WORDS, background=None),
        SegmentationConfig(),
    )
    classes = ClassEmbeddings.standardized(
        texts, mean, covariance, 0.0, num_classes=C, background=None, num_negatives=WORDS
    )
    scores = compute_class_scores(embeddings, assignments, classes, SegmentationConfig())
    assert scores.shape == (B, C + 1, *GRID)
    assert torch.equal(scores[:, :C], every[:, :C])
    assert torch.equal(scores[:, C], every[:, C:].amax(1))


def test_negative_words_are_background_without_its_bias(scene: tuple) -> None:
    embeddings, assignments, texts, mean, covariance = scene
    every = compute_class_scores(
        embeddings,
        assignments,
        ClassEmbeddings.standardized(texts, mean, covariance, 0.0, num_classes=C + WORDS, background=None),
        SegmentationConfig(),
    )
    classes = ClassEmbeddings.standardized(texts, mean, covariance, 0.0, num_classes=C, background=3, num_negatives=1)
    scores = compute_class_scores(embeddings, assignments, classes, SegmentationConfig(background_bias=-0.2))
    assert scores.shape == (B, C, *GRID)
    assert torch.allclose(scores[:, 3], torch.maximum(every[:, C], every[:, C + 1 :].amax(1) - 0.2))


def test_the_gate_keeps_the_classes_of_the_highest_scores() -> None:
    torch.manual_seed(0)
    scores = torch.randn(7, *GRID)  # six classes, and the row of no class
    best = {index: float(scores[index].max()) for index in range(6)}
    for background in (None, 2):
        for most in range(1, 8):
            counted = sorted((index for index in range(6) if index != background), key=lambda index: -best[index])
            wanted = sorted([*counted[:most], 6, *([] if background is None else [background])])
            assert select_top_classes(scores, most, background, 6).tolist() == wanted
    assert select_top_classes(scores, None, 2, 6).tolist() == list(range(7))
