"""Pseudo labels: labels and losses equal to loops over their formulas."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vilseg.model import ImageFeatures, ViLSeg
from vilseg.training.pseudo_labels import UNLABELED, PseudoLabeler, pseudo_label_losses

Make = Callable[..., ViLSeg]
PHRASES = ("dog", "cat", "sofa", "sea")
B, N, GRID = 3, 6, (2, 3)


def unit(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(*shape, generator=generator, dtype=torch.float64), dim=-1)


@pytest.fixture
def model(make_model: Make) -> ViLSeg:
    """Return a model with statistics as if it were trained."""
    made = make_model().eval()
    generator = torch.Generator().manual_seed(4)
    noise = torch.randn(made.embedding_dim, made.embedding_dim, generator=generator)
    made.patch_covariance.copy_(noise @ noise.T / 100)
    made.patch_mean.copy_(torch.randn(made.embedding_dim, generator=generator) / 10)
    return made


def features_for(model: ViLSeg) -> ImageFeatures:
    generator = torch.Generator().manual_seed(5)
    return ImageFeatures(torch.randn(B, N, model.image_projection.in_features, generator=generator), None, GRID)


def slow_scores(model: ViLSeg, features: ImageFeatures) -> list[list[list[float]]]:
    """Return z by image, patch and phrase, from scores by region only, which is the default setting."""
    texts = model.encode_text(list(PHRASES))
    found = []
    for image in range(B):
        patches = [F.normalize(model.image_projection(x), dim=0) for x in features.patches[image]]
        shares = [model.clustering_head(x).softmax(0) for x in features.patches[image]]
        clusters = len(shares[0])
        regions = [
            F.normalize(sum(a[k] * p for a, p in zip(shares, patches, strict=True)), dim=0) for k in range(clusters)
        ]
        rows = []
        for share in shares:
            row = []
            for text in texts:
                score = sum(float(share[k] * (regions[k] @ text)) for k in range(clusters))
                usual = float(model.patch_mean @ text)
                row.append((score - usual) / math.sqrt(float(text @ model.patch_covariance @ text)))
            rows.append(row)
        found.append(rows)
    return found


@torch.no_grad()
def test_a_patch_has_the_best_phrase_of_its_own_captions_or_none(model: ViLSeg) -> None:
    features = features_for(model)
    scores = slow_scores(model, features)
    own = torch.tensor([[1, 0, 1], [0, 1, 0], [0, 0, 0]], dtype=torch.bool)
    present = torch.tensor([0, 1, 3])
    in_order = sorted(scores[0][n][p] for n in range(N) for p in (0, 3))
    middle = (in_order[N - 1] + in_order[N]) / 2
    tokens = model.text_encoder.tokenize(PHRASES)
    labels = PseudoLabeler(model, tokens, confidence=middle)(features, present, own)
    kept = 0
    for image in range(B):
        for n in range(N):
            wanted = UNLABELED
            candidates = [place for place in range(3) if own[image, place]]
            if candidates:
                best = max(candidates, key=lambda place: scores[image][n][int(present[place])])
                if scores[image][n][int(present[best])] >= middle:
                    wanted, kept = best, kept + 1
            assert int(labels[image, n]) == wanted
    assert 0 < kept < 2 * N


def test_what_labels_does_not_follow_the_student(model: ViLSeg) -> None:
    features, own = features_for(model), torch.ones(B, 4, dtype=torch.bool)
    labels = PseudoLabeler(model, model.text_encoder.tokenize(PHRASES), confidence=-1e9)
    before = labels(features, torch.arange(4), own)
    with torch.no_grad():
        model.image_projection.weight.neg_()
    assert torch.equal(labels(features, torch.arange(4), own), before)


def test_no_phrase_no_label(model: ViLSeg) -> None:
    labels = PseudoLabeler(model, model.text_encoder.tokenize(PHRASES), confidence=-1e9)
    found = labels(features_for(model), torch.empty(0, dtype=torch.long), torch.ones(B, 0, dtype=torch.bool))
    assert (found == UNLABELED).all()
    assert not pseudo_label_losses(unit(B, N, 4), unit(0, 4), found, torch.tensor(3.0)).any()


def test_losses_are_the_formula() -> None:
    patches, phrases = unit(B, N, 5), unit(4, 5, seed=1)
    labels = torch.full((B, N), UNLABELED)
    labels[0, 0], labels[0, 3], labels[2, 5] = 1, 3, 0
    found = pseudo_label_losses(patches, phrases, labels, torch.tensor(3.0, dtype=torch.float64))
    for image in range(B):
        terms = []
        for n in range(N):
            if labels[image, n] != UNLABELED:
                logits = [3 * float(patches[image, n] @ phrase) for phrase in phrases]
                terms.append(math.log(sum(map(math.exp, logits))) - logits[int(labels[image, n])])
        assert float(found[image, 0]) == pytest.approx(sum(terms) / len(terms) if terms else 0, abs=1e-12)
        assert float(found[image, 1]) == bool(terms)


def test_gradient() -> None:
    patches, phrases = unit(B, N, 5).requires_grad_(), unit(4, 5, seed=1).requires_grad_()
    labels = torch.randint(UNLABELED, 4, (B, N), generator=torch.Generator().manual_seed(2))
    scale = torch.tensor(3.0, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x, t: pseudo_label_losses(x, t, labels, scale)[:, 0], (patches, phrases))
