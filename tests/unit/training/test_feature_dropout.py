"""Clustering head with feature dropout: equal to the head on explicitly multiplied features, and its gradient."""

import pytest
import torch
from torch import Tensor, nn

from vilseg.training import feature_dropout
from vilseg.training.feature_dropout import logits_with_feature_dropout

VIEWS, B, N, F, K = 2, 3, 4, 12, 5


@pytest.fixture(params=[1, 100, 1 << 20])
def head(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> nn.Sequential:
    """Return a float64 head; slices hold one image, two images or the whole batch at once."""
    monkeypatch.setattr(feature_dropout, "_CHUNK_VALUES", request.param)
    torch.manual_seed(0)
    made = nn.Sequential(nn.LayerNorm(F), nn.Linear(F, K)).double()
    for parameter in made.parameters():
        nn.init.normal_(parameter)
    return made


def inputs() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    kept = torch.rand(VIEWS, B, F, generator=generator) >= 0.4
    return torch.randn(B, N, F, generator=generator).half(), kept.double() / 0.6


def test_logits_and_gradient_are_those_of_the_views_themselves(head: nn.Sequential) -> None:
    patches, factors = inputs()
    found = logits_with_feature_dropout(head, patches, factors)
    wanted = torch.stack([head(patches.double() * view.unsqueeze(1)) for view in factors])
    torch.testing.assert_close(found, wanted, atol=1e-12, rtol=0)
    weights = torch.randn_like(found)
    parameters = list(head.parameters())
    gradients = [torch.autograd.grad((logits * weights).sum(), parameters) for logits in (found, wanted)]
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, atol=1e-11, rtol=0)


def test_gradient(head: nn.Sequential) -> None:
    patches, factors = inputs()
    names = [name for name, _ in head.named_parameters()]

    def logits(*values: Tensor) -> Tensor:
        norm, linear = nn.LayerNorm(F), nn.Linear(F, K)
        other = nn.Sequential(norm, linear).double()
        given = dict(zip(names, values, strict=True))
        for name in names:
            owner, _, key = name.rpartition(".")
            part = other.get_submodule(owner)
            delattr(part, key)
            setattr(part, key, given[name])
        return logits_with_feature_dropout(other, patches, factors)

    assert torch.autograd.gradcheck(logits, tuple(parameter for parameter in head.parameters()))


def test_features_that_are_all_alike_divide_by_no_zero(head: nn.Sequential) -> None:
    _, factors = inputs()
    assert logits_with_feature_dropout(head, torch.zeros(B, N, F), factors).isfinite().all()
