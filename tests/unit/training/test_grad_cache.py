"""GradCache: a batch in chunks gives losses, gradients and statistics of the whole batch, with frozen parts and dropout too."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from vilseg.config import ViewsConfig
from vilseg.config.loss import LossConfig
from vilseg.distributed import rank, world_size
from vilseg.errors import ConfigError
from vilseg.model import ViLSeg
from vilseg.training import grad_cache
from vilseg.training.batch import TensorBatch
from vilseg.training.encoded_texts import OwnTexts, SharedTexts, find_positives
from vilseg.training.grad_cache import backward_in_chunks, require_per_sample_encoders
from vilseg.training.objective import Objective
from vilseg.training.terms import statistics

Make = Callable[..., ViLSeg]
PAIRS, SIZE = 8, 3  # the last chunk is smaller
VIEWS = ViewsConfig(global_size=16, local_size=8, feature_dropout=0.25)
PHRASES = ("dog", "cat", "sofa", "sea")
CAPTIONS = ["a dog on the grass", "two cats and a sofa", "a man rides a horse by the sea", "a dog and a sofa"] * 2
VISION = {"weight": 0.5, "prototypes": 8, "hidden_dim": 16}
INFORMATION = {"weight": 0.5, "overclusters": 9}
FORMS: dict[str, dict[str, Any]] = {
    "infonce": {"cross_modal": {"weight": 1.0}},
    "sigmoid": {"cross_modal": {"weight": 1.0, "form": "sigmoid"}},
    "mean of patches": {"cross_modal": {"weight": 1.0, "patch_pooling": "mean"}},
    "images alone": {"cross_modal": {"weight": 1.0, "patch_share": 0.0}},
    "nouns": {"nouns": {"weight": 1.0, "top_patches": 3}},
    "mutual information": {"mutual_information": INFORMATION},
    "head alone": {"mutual_information": {"weight": 0.5, "train_encoder": False}},
    "dino": {"vision": VISION},
    "vision infonce": {"vision": {**VISION, "form": "infonce"}},
    "self-training": {"cross_modal": {"weight": 0.5}, "self_training": {"weight": 1.0, "confidence": 0.0}},
    "all": {
        "cross_modal": {"weight": 1.0, "form": "sigmoid"},
        "nouns": {"weight": 1.0, "top_patches": 3},
        "mutual_information": INFORMATION,
        "vision": VISION,
    },
}
DROPOUT = {"hidden_dropout_prob": 0.2, "attention_probs_dropout_prob": 0.2}
SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
DROPPING = {
    "image_encoder": {"architecture": "vit", "sizes": {**SMALL, **DROPOUT, "image_size": 16, "patch_size": 4}},
    "text_encoder": {"sizes": {**SMALL, **DROPOUT}, "max_tokens": 12},
}


def objective_of(make_model: Make, form: str, **parts: Any) -> Objective:
    off = {name: {"weight": 0.0} for name in ("cross_modal", "nouns", "vision", "mutual_information")}
    model = make_model(**parts)
    torch.manual_seed(5)
    loss = LossConfig.model_validate({**off, **FORMS[form]})
    return Objective(model, loss, VIEWS, PHRASES, self_training="self_training" in FORMS[form]).train()


def batch_for(objective: Objective, *, features: bool = False) -> TensorBatch:
    """Return this worker's part of a batch of ``PAIRS`` pairs."""
    generator = torch.Generator().manual_seed(3)
    images = torch.randint(0, 256, (PAIRS, 24, 24, 3), dtype=torch.uint8, generator=generator)
    if features:
        images = torch.randn(PAIRS, 9, 16, generator=generator).half()
    phrases = torch.full((PAIRS, 32), -1)
    for row, found in enumerate([[0], [1, 2], [3], [], [0, 2], [1], [], [2, 3]]):
        phrases[row, : len(found)] = torch.tensor(found)
    tokens = objective.model.text_encoder.tokenize(CAPTIONS)
    whole = TensorBatch(images, tokens, phrases, torch.arange(PAIRS) * 1013 + 7, tuple("abcdefgh"))
    return whole.split(PAIRS // world_size())[rank()]


def result(objective: Objective, losses: dict[str, Tensor]) -> dict[str, np.ndarray]:
    """Return losses, gradients (``d NAME``) and buffers after the backward pass of a step."""
    found = {name: value.detach().numpy().copy() for name, value in losses.items()}
    found |= {f"d {n}": p.grad.numpy().copy() for n, p in objective.named_parameters() if p.grad is not None}
    return found | {n: b.numpy().copy() for n, b in objective.named_buffers() if b.is_floating_point()}


def at_once(objective: Objective, batch: TensorBatch) -> dict[str, np.ndarray]:
    losses = objective(batch)
    losses["loss"].backward()
    return result(objective, losses)


def by_chunks(objective: Objective, batch: TensorBatch, size: int = SIZE) -> dict[str, np.ndarray]:
    return result(objective, backward_in_chunks(objective, batch, size))


def assert_equal(found: dict[str, np.ndarray], expected: dict[str, np.ndarray], tolerance: float = 1e-5) -> None:
    """Compare up to ``tolerance`` times each tensor's largest entry, because processors round float32 sums differently."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        atol = tolerance * max(1, np.abs(value).max())
        np.testing.assert_allclose(found[name], value, rtol=tolerance, atol=atol, err_msg=name)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("size", [1, SIZE])
def test_chunks_give_what_the_whole_batch_gives(make_model: Make, form: str, size: int) -> None:
    objective = objective_of(make_model, form)
    expected = at_once(objective, batch_for(objective))
    assert max(np.abs(value).max() for name, value in expected.items() if name.startswith("d ")) > 1e-3
    again = objective_of(make_model, form)
    assert_equal(by_chunks(again, batch_for(again), size), expected)


def test_statistics_look_at_the_same_patches(make_model: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics, "_RECORDED_PATCHES", 20)  # three of each image's sixteen patches
    first, second = objective_of(make_model, "images alone"), objective_of(make_model, "images alone")
    expected = at_once(first, batch_for(first))
    assert_equal(by_chunks(second, batch_for(second)), expected)
    monkeypatch.undo()
    every = objective_of(make_model, "images alone")
    assert np.abs(at_once(every, batch_for(every))["model.patch_mean"] - expected["model.patch_mean"]).max() > 1e-4


@pytest.mark.parametrize("form", ["all", "vision infonce"])
def test_cached_features_and_frozen_towers_too(make_model: Make, form: str) -> None:
    parts = {
        "image_encoder": {"sizes": {"width": 16, "depth": 1}, "frozen": True},
        "text_encoder": {"sizes": SMALL, "frozen": True, "max_tokens": 12},
    }
    for features in (False, True):
        first, second = (objective_of(make_model, form, **parts) for _ in range(2))
        expected = at_once(first, batch_for(first, features=features))
        assert_equal(by_chunks(second, batch_for(second, features=features)), expected)


def test_a_batch_without_phrases(make_model: Make) -> None:
    found = []
    for way in (at_once, by_chunks):
        objective = objective_of(make_model, "all")
        batch = batch_for(objective)
        batch.phrases.fill_(-1)
        found.append(way(objective, batch))
    assert_equal(found[1], found[0])


# ----------------------------------------------------------------------------------------------------------- dropout


def chunks_with_their_graph(objective: Objective, batch: TensorBatch) -> dict[str, np.ndarray]:
    """Run the networks chunk by chunk, so that dropout draws as in GradCache, and backpropagate once through everything."""
    present = objective.present_phrases(batch)
    embedder, precision = objective.text_embedder, objective.autocast
    captions = torch.cat([embedder.embed_captions(tokens, precision) for tokens in batch.tokens.split(SIZE)])
    phrases = torch.cat([embedder.embed_phrases(part, precision) for part in present.split(SIZE)])
    texts = SharedTexts(objective.shared_captions(captions), phrases, present)
    parts = [objective.represent(part, texts, pairs=len(batch)) for part in batch.split(SIZE)]
    representations, own = objective.combine(parts), OwnTexts(captions, find_positives(batch, present))
    losses = objective.losses(representations, own)
    losses["loss"].backward()
    objective.after_losses(representations, own)
    return result(objective, losses)


def dropping(make_model: Make, way: Callable[..., dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    objective = objective_of(make_model, "all", **DROPPING)
    torch.manual_seed(11)
    return way(objective, batch_for(objective))


def test_the_second_pass_drops_what_the_first_dropped(make_model: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = dropping(make_model, chunks_with_their_graph)
    assert_equal(dropping(make_model, by_chunks), expected)
    monkeypatch.setattr(grad_cache._Recomputed, "_set_random_state", lambda self, state: None)
    other = dropping(make_model, by_chunks)
    projection = "d model.image_projection.weight"
    assert np.abs(other[projection] - expected[projection]).max() > 1e-3, "there is no dropout to replay"


def test_networks_in_half_precision(make_model: Make) -> None:
    found = []
    for way in (chunks_with_their_graph, by_chunks):
        objective = objective_of(make_model, "all", **DROPPING)
        objective.autocast = torch.bfloat16
        torch.manual_seed(11)
        found.append(way(objective, batch_for(objective)))
    # Gradients of weights are added up in half precision, chunk by chunk or in one go.
    assert_equal(found[1], found[0], 0.02)


def test_one_chunk_with_dropout_is_the_whole_batch(make_model: Make) -> None:
    def in_one_chunk(objective: Objective, batch: TensorBatch) -> dict[str, np.ndarray]:
        return by_chunks(objective, batch, PAIRS)

    assert_equal(dropping(make_model, in_one_chunk), dropping(make_model, at_once))


# ------------------------------------------------------------------------------------------------------- two workers


def of_every_form(folder: str, way: Callable[..., dict[str, np.ndarray]]) -> dict[str, dict[str, np.ndarray]]:
    found = {}
    for form in FORMS:
        objective = objective_of(lambda: ViLSeg.from_pretrained(folder), form)
        found[form] = way(objective, batch_for(objective))
    return found


def test_two_workers_by_chunks_have_the_gradient_of_the_whole_batch(
    tmp_path: Path, make_model: Make, on_two_workers: Callable[..., list[Any]]
) -> None:
    make_model().save_pretrained(str(tmp_path / "model"))
    expected = of_every_form(str(tmp_path / "model"), at_once)
    first, second = on_two_workers(of_every_form, str(tmp_path / "model"), by_chunks)
    for form, whole in expected.items():
        losses = [name for name in whole if name.startswith("loss")]
        for name in losses:
            mean = (first[form].pop(name) + second[form].pop(name)) / 2
            np.testing.assert_allclose(mean, whole.pop(name), rtol=1e-5, atol=1e-5, err_msg=f"{form}: {name}")
        for worker in (first, second):
            assert_equal(worker[form], whole)


# ----------------------------------------------------------------------------------------------------------- refusal


def test_encoders_that_mix_the_images_of_a_chunk_are_refused(make_model: Make) -> None:
    sizes = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]}
    resnet = {"architecture": "resnet", "sizes": sizes}
    with pytest.raises(ConfigError, match=r"chunk_size cannot be used: model.image_encoder has batch normalisation"):
        require_per_sample_encoders(objective_of(make_model, "infonce", image_encoder=resnet))
    require_per_sample_encoders(objective_of(make_model, "infonce", image_encoder={**resnet, "frozen": True}))
    require_per_sample_encoders(objective_of(make_model, "all"))
