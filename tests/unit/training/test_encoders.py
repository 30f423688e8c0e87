"""Activation checkpointing and compiled encoders: the same gradients, and an error if an encoder supports neither."""

from __future__ import annotations

import shutil
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from vilseg.config import OptimizerConfig, TrainerConfig, ViewsConfig
from vilseg.config.loss import LossConfig
from vilseg.errors import ConfigError
from vilseg.model import ImageFeatures, ViLSeg
from vilseg.training.batch import TensorBatch
from vilseg.training.loop import Trainer
from vilseg.training.objective import Objective

Make = Callable[..., ViLSeg]
DROPOUT = {"hidden_dropout_prob": 0.2, "attention_probs_dropout_prob": 0.2}
SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
VIT = {"architecture": "vit", "sizes": {**SMALL, **DROPOUT, "image_size": 16, "patch_size": 4}}
LOCAL_CONV = {"sizes": {"width": 16, "depth": 2}}
TEXT = {"sizes": {**SMALL, **DROPOUT}, "max_tokens": 12}
LOSS = {
    "vision": {"weight": 0.5, "prototypes": 8, "hidden_dim": 16},
    "mutual_information": {"weight": 0.5},
    "nouns": {"weight": 0},
}
HAS_COMPILER = shutil.which("g++") is not None and (Path(sysconfig.get_paths()["include"]) / "Python.h").exists()


class Plain(nn.Module):
    """A user's image encoder without ``checkpoint_activations``."""

    def __init__(self) -> None:
        super().__init__()
        self.num_features = 16
        self.patches = nn.Conv2d(3, 16, 4, 4)

    def forward(self, images: torch.Tensor) -> ImageFeatures:
        x = self.patches(images)
        return ImageFeatures(x.flatten(2).transpose(1, 2), None, (x.shape[2], x.shape[3]))


def plain() -> nn.Module:
    return Plain()


def trainer_of(
    make_model: Make,
    image_encoder: dict[str, Any],
    loss: dict[str, Any] = LOSS,
    text_encoder: dict[str, Any] = TEXT,
    **settings: Any,
) -> Trainer:
    model = make_model(image_encoder=image_encoder, text_encoder=text_encoder)
    torch.manual_seed(1)
    objective = Objective(model, LossConfig.model_validate(loss), ViewsConfig(global_size=16, local_size=8))
    config = TrainerConfig(batch_size=4, steps=2, **settings)
    return Trainer(objective, OptimizerConfig(gradient_clip=0), config, torch.device("cpu"))


def gradients(trainer: Trainer) -> dict[str, np.ndarray]:
    """Return the gradients of one step, and its losses."""
    objective = trainer.objective.train()
    images = torch.randint(0, 256, (4, 24, 24, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))
    tokens = objective.model.text_encoder.tokenize(["a dog on grass", "two cats", "a horse by the sea", "a sofa"])
    batch = TensorBatch(images, tokens, torch.full((4, 32), -1), torch.arange(4) * 1013 + 7, tuple("abcd"))
    losses = trainer.train_step(batch)
    found = {name: p.grad.numpy().copy() for name, p in objective.named_parameters() if p.grad is not None}
    return found | {name: value.numpy().copy() for name, value in losses.items()}


def assert_equal(found: dict[str, np.ndarray], expected: dict[str, np.ndarray], tolerance: float) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=tolerance, atol=tolerance, err_msg=name)


@pytest.mark.parametrize("image_encoder", [VIT, LOCAL_CONV], ids=["vit", "local_conv"])
def test_activations_computed_again_give_the_same_gradients(make_model: Make, image_encoder: dict[str, Any]) -> None:
    expected = gradients(trainer_of(make_model, image_encoder))
    found = gradients(trainer_of(make_model, image_encoder, checkpoint_activations=True))
    assert_equal(found, expected, 1e-6)
    by_chunks = gradients(trainer_of(make_model, image_encoder, chunk_size=3))
    both = gradients(trainer_of(make_model, image_encoder, chunk_size=3, checkpoint_activations=True))
    assert_equal(both, by_chunks, 1e-6)


@pytest.mark.parametrize("image_encoder", [VIT, LOCAL_CONV], ids=["vit", "local_conv"])
def test_blocks_run_twice_where_they_are_computed_again(make_model: Make, image_encoder: dict[str, Any]) -> None:
    counts = []
    for again in (False, True):
        trainer = trainer_of(make_model, image_encoder, checkpoint_activations=again)
        encoder = trainer.objective.model.image_encoder
        norms = [m for m in encoder.modules() if isinstance(m, nn.LayerNorm)]
        calls: list[int] = []
        for norm in norms[:2]:
            norm.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        gradients(trainer)
        counts.append(len(calls))
    assert counts[1] > 1.5 * counts[0]


def test_encoders_that_cannot_are_told_in_a_sentence(make_model: Make) -> None:
    resnet = {"architecture": "resnet", "sizes": {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]}}
    with pytest.raises(ConfigError, match=r"checkpoint_activations cannot be used: model.image_encoder \(resnet\)"):
        trainer_of(make_model, resnet, checkpoint_activations=True)
    factory = trainer_of(make_model, LOCAL_CONV)
    factory.objective.model.image_encoder = plain()
    with pytest.raises(ConfigError, match=r"model.image_encoder.factory has no method of that name"):
        factory.objective.model.checkpoint_activations()
    # What is frozen has no activations to keep.
    trainer_of(make_model, {**resnet, "frozen": True}, checkpoint_activations=True)


def test_texts_that_are_means_of_word_embeddings_have_nothing_to_compute_again(make_model: Make) -> None:
    model = make_model(text_encoder={"sizes": {**SMALL, "num_hidden_layers": 0}, "max_tokens": 12})
    model.checkpoint_activations()


needs_compiler = pytest.mark.skipif(
    not HAS_COMPILER, reason="torch.compile needs g++ and Python's headers, and they are not installed"
)


@pytest.fixture
def fresh_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Empty the compiler's caches: the one of this process, and the one on disk by using a new folder."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "compiled"))
    torch.compiler.reset()


ONE_VIEW = {"vision": {"weight": 0.0}, "mutual_information": {"weight": 0.0}, "nouns": {"weight": 0.0}}


@pytest.mark.slow
@needs_compiler
@pytest.mark.usefixtures("fresh_compiler")
def test_a_compiled_encoder_gives_the_same_gradients(make_model: Make) -> None:
    small = {"sizes": {"width": 8, "depth": 1}}
    eager = trainer_of(make_model, small, ONE_VIEW, {**TEXT, "frozen": True})
    expected = gradients(eager)
    compiled = trainer_of(make_model, small, ONE_VIEW, {**TEXT, "frozen": True}, compile=True)
    assert compiled.objective.state_dict().keys() == eager.objective.state_dict().keys()
    assert_equal(gradients(compiled), expected, 1e-4)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0, "nothing was compiled"


@pytest.mark.slow
@pytest.mark.timeout(1800)
@needs_compiler
@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_towers_drop_the_same_units_by_chunks(make_model: Make) -> None:
    expected = gradients(trainer_of(make_model, VIT, ONE_VIEW, chunk_size=2))
    assert_equal(gradients(trainer_of(make_model, VIT, ONE_VIEW, chunk_size=2, compile=True)), expected, 1e-4)


def test_without_a_compiler_compiling_is_refused_in_a_sentence(
    make_model: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(
        ConfigError, match=r"trainer.compile needs a C\+\+ compiler, and there is no g\+\+ here"
    ) as caught:
        trainer_of(make_model, LOCAL_CONV, compile=True)
    assert "\n" not in str(caught.value)
