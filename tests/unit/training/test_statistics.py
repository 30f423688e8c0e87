"""Statistics that training records for inference (mean and covariance of embeddings), and training on cached features."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from vilseg.config import ViewsConfig
from vilseg.config.loss import LossConfig
from vilseg.data.batch_reader import WorkerBatch
from vilseg.training.batch import TensorBatch
from vilseg.training.objective import Objective

N, F_IMAGE, F_TEXT, B = 9, 16, 16, 6


def loss(**parts: Any) -> LossConfig:
    off = {"nouns": {"weight": 0}, "vision": {"weight": 0}, "mutual_information": {"weight": 0}}
    return LossConfig.model_validate({**off, **parts})


def cached_batch(seed: int) -> TensorBatch:
    rng = np.random.default_rng(seed)
    batch = WorkerBatch(
        rng.normal(size=(B, N, F_IMAGE)).astype(np.float16),
        rng.normal(size=(B, F_TEXT)).astype(np.float16),
        np.full((B, 32), -1, np.int32),
        rng.integers(0, 2**40, B),
        tuple("abcdef"),
    )
    return TensorBatch.of(batch, torch.device("cpu"))


@pytest.fixture
def frozen(make_model: Callable[..., Any]) -> Any:
    model = make_model(image_encoder={"sizes": {"width": 16, "depth": 1}, "frozen": True})
    return model.train()


def test_statistics_are_those_of_all_embeddings_seen(frozen: Any) -> None:
    objective = Objective(frozen, loss(), ViewsConfig(feature_dropout=0.5)).train()
    batches = [cached_batch(seed) for seed in range(3)]
    for batch in batches:
        objective(batch)
    texts = torch.cat([F.normalize(frozen.text_projection(batch.tokens.float()), dim=-1) for batch in batches])
    patches = [F.normalize(frozen.image_projection(batch.images.float()), dim=-1).flatten(0, 1) for batch in batches]
    assert torch.allclose(frozen.caption_mean, texts.mean(0), atol=1e-5)
    assert torch.allclose(frozen.patch_mean, torch.cat(patches).mean(0), atol=1e-5)
    covariance = torch.stack([torch.cov(one.T, correction=0) for one in patches]).mean(0)
    assert torch.allclose(frozen.patch_covariance, covariance, atol=1e-5)
    assert int(frozen.recorded_steps) == 3


def test_evaluation_records_nothing(frozen: Any) -> None:
    objective = Objective(frozen, loss(), ViewsConfig()).eval()
    objective(cached_batch(0))
    assert int(frozen.recorded_steps) == 0
    assert torch.equal(frozen.patch_covariance, torch.eye(8) / 8)


def test_a_model_takes_its_statistics_with_it(frozen: Any, tmp_path: Any) -> None:
    objective = Objective(frozen, loss(), ViewsConfig()).train()
    objective(cached_batch(0))
    frozen.save_pretrained(str(tmp_path / "model"))
    again = type(frozen).from_pretrained(str(tmp_path / "model"))
    assert torch.equal(again.patch_covariance, frozen.patch_covariance)
    assert torch.equal(again.caption_mean, frozen.caption_mean)


def test_the_loss_on_whole_images_needs_no_patch_embeddings(frozen: Any) -> None:
    """Without a loss on patches, patch embeddings are skipped; a tiny fraction of one computes them and gives the same loss."""
    batch = cached_batch(0)
    whole = Objective(frozen, loss(cross_modal={"patch_share": 0}), ViewsConfig()).eval()(batch)
    nearly = Objective(frozen, loss(cross_modal={"patch_share": 1e-12}), ViewsConfig()).eval()(batch)
    assert float(whole["loss"].detach()) == pytest.approx(float(nearly["loss"].detach()), rel=1e-6)


def test_cached_features_train_what_comes_after_the_frozen_encoder(frozen: Any) -> None:
    objective = Objective(
        frozen,
        loss(mutual_information={"weight": 0.1}, cross_modal={"patch_share": 0}),
        ViewsConfig(feature_dropout=0.5),
    ).train()
    objective(cached_batch(0))["loss"].backward()
    assert frozen.image_projection.weight.grad.abs().sum() > 0
    assert frozen.clustering_head[1].weight.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in frozen.image_encoder.parameters())
