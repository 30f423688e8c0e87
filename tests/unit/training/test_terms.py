"""Terms added to the objective, each one class: on a whole batch, in chunks, and on two workers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.unit.training.test_grad_cache import PHRASES, VIEWS, at_once, batch_for, by_chunks
from vilseg.config.loss import LossConfig
from vilseg.distributed import mean_over_workers
from vilseg.model import ViLSeg
from vilseg.training.encoded_texts import OwnTexts
from vilseg.training.objective import Objective
from vilseg.training.terms import EncodedImages, Needs, SummedTerm, Term

Make = Callable[..., ViLSeg]


class ViewDistances(NamedTuple):
    """Distances between the two views of images."""

    distances_B: Tensor


class ViewDistanceTerm(Term[ViewDistances]):
    """Example term: mean squared distance between linear maps of two global views; chunks are concatenated."""

    weight = 0.25
    needs = Needs(global_views=2, second_view_gradient=True)

    def __init__(self, model: ViLSeg) -> None:
        self.head = nn.Linear(model.image_projection.in_features, 3)
        self.updates: list[float] = []

    def modules(self) -> dict[str, nn.Module]:
        return {"toy_head": self.head}

    def represent(self, images: EncodedImages) -> ViewDistances:
        first, second = (self.head(images.views.pooled(number)) for number in range(2))
        return ViewDistances((first - second).square().sum(1))

    def losses(self, representations: ViewDistances, texts: OwnTexts) -> dict[str, Tensor]:
        return {"toy": mean_over_workers(representations.distances_B.mean())}

    def metrics(self, representations: ViewDistances) -> dict[str, Tensor]:
        return {"toy/images": torch.tensor(float(len(representations.distances_B)))}

    def after_update(self, progress: float) -> None:
        self.updates.append(progress)


class SummedDistances(NamedTuple):
    """Sum of the distances over images, and an absent field."""

    total: Tensor
    absent: Tensor | None


class SummedDistanceTerm(SummedTerm[SummedDistances]):
    """Example term with the same loss whose representations are sums; chunks are added up."""

    weight = 0.25
    needs = ViewDistanceTerm.needs

    def __init__(self, model: ViLSeg) -> None:
        self.toy = ViewDistanceTerm(model)

    def modules(self) -> dict[str, nn.Module]:
        return self.toy.modules()

    def represent(self, images: EncodedImages) -> SummedDistances:
        return SummedDistances(self.toy.represent(images).distances_B.sum(), None)

    def losses(self, representations: SummedDistances, texts: OwnTexts) -> dict[str, Tensor]:
        return {"toy": mean_over_workers(representations.total) / len(texts.captions_BD)}


KINDS: dict[str, Any] = {"concatenated": ViewDistanceTerm, "summed": SummedDistanceTerm}


def objective_with(make_model: Make, kind: str) -> Objective:
    model = make_model()
    torch.manual_seed(5)
    off = {name: {"weight": 0.0} for name in ("nouns", "vision", "mutual_information")}
    loss = LossConfig.model_validate({**off, "cross_modal": {"weight": 1.0}})
    return Objective(model, loss, VIEWS, PHRASES, extra_terms=[KINDS[kind](model)]).train()


@pytest.mark.parametrize("kind", KINDS)
def test_a_term_added_is_trained_reported_and_kept_in_checkpoints(make_model: Make, kind: str) -> None:
    objective = objective_with(make_model, kind)
    losses = objective(batch_for(objective))
    expected = losses["loss/cross_modal"] + 0.25 * losses["loss/toy"]
    assert losses["loss"].item() == pytest.approx(expected.item())
    assert losses["loss/toy"].item() > 0
    losses["loss"].backward()
    head = objective.get_submodule("toy_head")
    assert isinstance(head, nn.Linear)
    assert head.weight.grad is not None
    assert head.weight.grad.any()
    assert {"toy_head.weight", "toy_head.bias"} <= objective.state_dict().keys()


def test_its_metrics_and_its_call_after_an_update_are_there(make_model: Make) -> None:
    objective = objective_with(make_model, "concatenated")
    assert objective(batch_for(objective))["toy/images"] == 8
    objective.after_update(0.5)
    assert objective.terms[-1].updates == [0.5]  # type: ignore[attr-defined]


@pytest.mark.parametrize("kind", KINDS)
def test_chunks_give_what_the_whole_batch_gives(make_model: Make, kind: str) -> None:
    first, second = objective_with(make_model, kind), objective_with(make_model, kind)
    expected, found = at_once(first, batch_for(first)), by_chunks(second, batch_for(second))
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-5, atol=1e-5, err_msg=name)


def in_chunks_on_this_worker(folder: str, kind: str) -> dict[str, np.ndarray]:
    objective = objective_with(lambda: ViLSeg.from_pretrained(folder), kind)
    return by_chunks(objective, batch_for(objective))


@pytest.mark.parametrize("kind", KINDS)
def test_two_workers_in_chunks_have_the_gradient_of_the_whole_batch(
    tmp_path: Path, make_model: Make, on_two_workers: Callable[..., list[Any]], kind: str
) -> None:
    folder = str(tmp_path / "model")
    make_model().save_pretrained(folder)
    alone = objective_with(lambda: ViLSeg.from_pretrained(folder), kind)
    expected = at_once(alone, batch_for(alone))
    for worker in on_two_workers(in_chunks_on_this_worker, folder, kind):
        for name in ("loss/toy", "d toy_head.weight", "d model.image_projection.weight"):
            np.testing.assert_allclose(worker[name], expected[name], rtol=1e-5, atol=1e-5, err_msg=name)


def test_a_term_without_losses_cannot_be_made() -> None:
    class Incomplete(Term[ViewDistances]):
        def represent(self, images: EncodedImages) -> ViewDistances:
            return ViewDistances(torch.zeros(len(images.batch)))

    with pytest.raises(TypeError, match="abstract method"):
        Incomplete()  # type: ignore[abstract]
