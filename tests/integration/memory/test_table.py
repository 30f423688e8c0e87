"""The memory table against an objective that is really there."""

from __future__ import annotations

import pytest
import torch

from benchmarks import memory
from vilseg.config import RunConfig
from vilseg.model import ViLSeg
from vilseg.training.batch import TensorBatch
from vilseg.training.objective import Objective

TRANSFORMER = "hidden_size: 64, num_hidden_layers: 3, num_attention_heads: 4, intermediate_size: 256"
PHRASES = ("dog", "cat")


@pytest.fixture(scope="module")
def config() -> RunConfig:
    overrides = [
        f"model.image_encoder.sizes={{{TRANSFORMER}, image_size: 64, patch_size: 8}}",
        f"model.text_encoder.sizes={{{TRANSFORMER}}}",
        "model.text_encoder.vocabulary_size=300",
        "model.embedding_dim=32",
        "views.global_size=64",
        "views.local_size=32",
        "trainer.workers=4",
        "trainer.batch_size=32",
        "loss.vision.prototypes=16",
        "loss.nouns.max_phrases=10",
    ]
    return RunConfig.load(str(memory.CONFIG), overrides)


@pytest.fixture(scope="module")
def objective(config: RunConfig) -> Objective:
    torch.manual_seed(0)
    model = ViLSeg(config.model, *memory._towers(config))
    return Objective(model, config.loss, config.views, PHRASES, autocast=torch.bfloat16).train()


def batch(count: int, tokens: int) -> TensorBatch:
    phrases = torch.full((count, 32), -1)
    phrases[:, :2] = torch.tensor([0, 1])
    images = torch.randint(0, 256, (count, 64, 64, 3), dtype=torch.uint8)
    keys = tuple(map(str, range(count)))
    return TensorBatch(images, torch.full((count, tokens), 5), phrases, torch.arange(count) + 7, keys)


def test_weights_gradients_and_moments_are_those_of_a_real_optimiser(config: RunConfig, objective: Objective) -> None:
    table = memory.table(config)["parameters"]
    trained = [parameter for parameter in objective.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained)
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    moments = [value for state in optimizer.state.values() for value in state.values() if value.ndim]
    bytes_of = {
        "weights": sum(p.untyped_storage().nbytes() for p in objective.parameters()),
        "gradients": sum(p.grad.untyped_storage().nbytes() for p in trained if p.grad is not None),
        "moments": sum(value.untyped_storage().nbytes() for value in moments),
    }
    assert bytes_of["weights"] == 4 * (table["trained"] + table["teacher"])
    assert bytes_of["gradients"] == 4 * table["trained"]
    # The scalars' moments have no dimension.
    assert bytes_of["moments"] == 8 * (table["trained"] - sum(1 for p in trained if p.ndim == 0))


def test_what_a_pair_more_keeps_is_what_the_whole_step_keeps_more(config: RunConfig, objective: Objective) -> None:
    tokens = config.model.text_encoder.max_tokens
    seen = memory._saved(lambda: objective(batch(5, tokens)), objective) - memory._saved(
        lambda: objective(batch(4, tokens)), objective
    )
    one = memory._per_image(config)
    expected = 2 * one["global"] + config.views.local_crops * one["local"] + one["caption"]
    # Beside the towers a pair keeps its views, its float32 features and what the losses make of them.
    assert expected < seen < 1.6 * expected


def test_sharding_leaves_each_worker_less(config: RunConfig) -> None:
    table = memory.table(config)
    assert table["pairs_per_worker"] == 8
    assert set(table["none"]) == set(table["fsdp"])
    paper = memory.table(RunConfig.load(str(memory.CONFIG)))
    assert paper["fsdp"]["adamw"] == pytest.approx(paper["none"]["adamw"] / 32, abs=0.01)
    assert paper["fsdp"]["total"] < paper["none"]["total"]
    assert paper["none"]["fits_40_gb"]
