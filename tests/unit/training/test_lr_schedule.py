"""Learning-rate schedule, and the parameters without weight decay."""

from itertools import pairwise

import pytest
from torch import nn

from vilseg.config import OptimizerConfig
from vilseg.training.lr_schedule import learning_rate, parameter_groups

CONFIG = OptimizerConfig(learning_rate=0.2, warmup_steps=10)


def test_warm_up_rises_in_even_steps_to_the_top() -> None:
    rates = [learning_rate(CONFIG, step, 100) for step in range(11)]
    assert rates[0] == pytest.approx(0.02)
    assert rates[9] == rates[10] == pytest.approx(0.2)
    assert [b - a for a, b in pairwise(rates[:10])] == pytest.approx([0.02] * 9)


def test_then_it_falls_in_even_steps_to_zero() -> None:
    rates = [learning_rate(CONFIG, step, 100) for step in range(10, 101)]
    assert rates[0] == pytest.approx(0.2)
    assert rates[-1] == pytest.approx(0, abs=1e-12)
    assert [a - b for a, b in pairwise(rates)] == pytest.approx([0.2 / 90] * 90)
    assert rates[-2] > 0, "the last step that is made, number 99, still learns a little"


@pytest.mark.parametrize(("warmup", "steps"), [(0, 5), (5, 5), (100, 5)])
def test_any_number_of_steps(warmup: int, steps: int) -> None:
    config = OptimizerConfig(learning_rate=0.2, warmup_steps=warmup)
    rates = [learning_rate(config, step, steps) for step in range(steps)]
    assert rates[0] == pytest.approx(0.2 if warmup == 0 else 0.2 / warmup)
    assert all(0 < rate <= 0.2 for rate in rates)


def test_weight_decay_is_for_trained_matrices() -> None:
    module = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2))
    module[2].requires_grad_(False)
    decayed, plain = parameter_groups(module, 0.1)
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.1, 0.0)
    assert [p.shape for p in decayed["params"]] == [(4, 3)]
    assert len(plain["params"]) == 3
