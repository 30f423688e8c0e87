"""The objective: every loss alone and all together, the teacher, and cached features."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from vilseg.config import ViewsConfig
from vilseg.config.loss import LossConfig
from vilseg.data.views import make_views
from vilseg.errors import ConfigError
from vilseg.losses import iic_loss
from vilseg.model import ViLSeg
from vilseg.training.batch import TensorBatch
from vilseg.training.encoded_views import encode_views
from vilseg.training.objective import Objective

Make = Callable[..., ViLSeg]
LOSSES = ("cross_modal", "nouns", "vision", "mutual_information")
VIEWS = ViewsConfig(global_size=16, local_size=8)
PHRASES = ("dog", "cat", "sofa")
CAPTIONS = ["a dog on the grass", "two cats and a sofa", "a man rides a horse by the sea", "a dog and a sofa"]
FROZEN = {"sizes": {"width": 16, "depth": 1}, "frozen": True}


def loss_config(*names: str, **parts: Any) -> LossConfig:
    """Return a configuration in which the named losses have weight 0.5 and the others 0."""
    tree: dict[str, Any] = {name: {"weight": 0.5 * (name in names)} for name in LOSSES}
    tree["vision"] |= {"prototypes": 8, "hidden_dim": 16}
    for name, values in parts.items():
        tree[name] |= values
    return LossConfig.model_validate(tree)


def batch_for(model: ViLSeg, *, features: bool = False) -> TensorBatch:
    generator = torch.Generator().manual_seed(3)
    images = torch.randint(0, 256, (4, 24, 24, 3), dtype=torch.uint8, generator=generator)
    if features:
        images = torch.randn(4, 9, 16, generator=generator).half()
    phrases = torch.full((4, 32), -1)
    phrases[0, 0], phrases[1, 0], phrases[1, 1], phrases[3, 0], phrases[3, 1] = 0, 1, 2, 0, 2
    tokens = model.text_encoder.tokenize(CAPTIONS)
    return TensorBatch(images, tokens, phrases, torch.arange(4) * 1013 + 7, tuple("abcd"))


def gradients(objective: Objective, batch: TensorBatch) -> tuple[dict[str, Tensor], set[str]]:
    """Return the losses, and the names of the modules that the gradient of their sum reaches."""
    losses = objective.train()(batch)
    losses["loss"].backward()
    reached = {n for n, p in objective.named_parameters() if p.grad is not None and bool(p.grad.any())}
    return losses, {".".join(name.split(".")[:2]).removeprefix("model.") for name in reached}


@pytest.mark.parametrize(
    ("name", "reached"),
    [
        ("cross_modal", {"image_encoder", "image_projection", "text_encoder", "text_projection", "logit_scale"}),
        ("nouns", {"image_encoder", "image_projection", "text_encoder", "text_projection", "logit_scale"}),
        ("vision", {"image_encoder", "vision_head.mlp", "vision_head.prototypes"}),
        ("mutual_information", {"image_encoder", "clustering_head"}),
    ],
)
def test_every_loss_alone(make_model: Make, name: str, reached: set[str]) -> None:
    model = make_model()
    losses, parts = gradients(Objective(model, loss_config(name), VIEWS, PHRASES), batch_for(model))
    assert {key for key in losses if key.startswith("loss")} == {"loss", f"loss/{name}"}
    assert ("clusters/entropy" in losses) == (name == "mutual_information")
    assert losses["loss"].isfinite()
    assert losses["loss"].item() == pytest.approx(0.5 * losses[f"loss/{name}"].item())
    assert parts == reached


def test_all_together_are_their_weighted_sum(make_model: Make) -> None:
    model = make_model()
    config = loss_config(*LOSSES, nouns={"weight": 2.0})
    losses, parts = gradients(Objective(model, config, VIEWS, PHRASES), batch_for(model))
    expected = sum(getattr(config, name).weight * losses[f"loss/{name}"].item() for name in LOSSES)
    assert losses["loss"].item() == pytest.approx(expected, rel=1e-5)
    assert {"image_encoder", "text_encoder", "clustering_head", "vision_head.mlp"} <= parts


def test_a_loss_is_the_same_alone_and_with_the_others(make_model: Make) -> None:
    together = Objective(make_model(), loss_config(*LOSSES), VIEWS, PHRASES).eval()
    all_losses = together(batch_for(together.model))
    for name in ("cross_modal", "nouns", "mutual_information"):
        alone = Objective(make_model(), loss_config(name), VIEWS, PHRASES).eval()
        value = alone(batch_for(alone.model))[f"loss/{name}"]
        assert value.item() == pytest.approx(all_losses[f"loss/{name}"].item(), abs=1e-6)


def test_the_order_of_the_batch_does_not_matter(make_model: Make) -> None:
    objective = Objective(make_model(), loss_config(*LOSSES), VIEWS, PHRASES).eval()
    batch, order = batch_for(objective.model), torch.tensor([2, 0, 3, 1])
    shuffled = TensorBatch(
        batch.images[order], batch.tokens[order], batch.phrases[order], batch.seeds[order], batch.keys
    )
    for name, value in objective(batch).items():
        assert objective(shuffled)[name].item() == pytest.approx(value.item(), abs=1e-5), name


@pytest.mark.parametrize("pooling", ["mean", "softmax"])
@pytest.mark.parametrize("share", [0.0, 1.0])
def test_shares_and_poolings_of_the_contrast(make_model: Make, pooling: str, share: float) -> None:
    config = loss_config("cross_modal", cross_modal={"patch_pooling": pooling, "patch_share": share})
    objective = Objective(make_model(), config, VIEWS)
    losses, _ = gradients(objective, batch_for(objective.model))
    assert losses["loss"].isfinite()


@pytest.mark.parametrize("form", ["infonce", "sigmoid"])
def test_the_mean_of_the_patches_meets_the_caption(make_model: Make, form: str) -> None:
    config = loss_config("cross_modal", cross_modal={"patch_pooling": "mean", "patch_share": 1.0, "form": form})
    objective = Objective(make_model(), config, VIEWS).eval()
    batch, model = batch_for(objective.model), objective.model
    with torch.no_grad():
        view = make_views(batch.images, batch.seeds, VIEWS, global_crops=1, local_crops=0).global_GB3HW[0]
        patches, texts = model.encode_image(view).patches, model.encode_text(CAPTIONS)
        total = 0.0
        for i in range(4):
            mean = patches[i].mean(0)
            logits = model.scale * (texts @ (mean / mean.norm()))
            for j in range(4):
                if form == "sigmoid":
                    total -= float(torch.nn.functional.logsigmoid((1 if i == j else -1) * (logits[j] - 10)))
            if form == "infonce":
                total -= float(logits.log_softmax(0)[i])
        if form == "infonce":
            means = torch.stack([patches[i].mean(0) / patches[i].mean(0).norm() for i in range(4)])
            for j in range(4):
                total -= float((model.scale * (means @ texts[j])).log_softmax(0)[j])
            total /= 2
    assert objective(batch)["loss/cross_modal"].item() == pytest.approx(total / 4, abs=1e-5)


def test_the_sigmoid_form_learns_its_bias(make_model: Make) -> None:
    objective = Objective(make_model(), loss_config("cross_modal", cross_modal={"form": "sigmoid"}), VIEWS)
    assert objective.logit_bias is not None
    assert objective.logit_bias.item() == -10
    assert objective.config.cross_modal.temperature == 0.1
    losses, parts = gradients(objective, batch_for(objective.model))
    assert "logit_bias" in parts
    assert "logit_scale" in parts
    assert losses["loss/cross_modal"].item() > 1, "every right pair costs about what the bias says"
    other = Objective(make_model(), loss_config("cross_modal"), VIEWS)
    assert "logit_bias" not in other.state_dict(), "checkpoints of the other form stay as they were"


def test_info_nce_of_crops_trains_the_bottleneck_and_has_no_prototypes(make_model: Make) -> None:
    objective = Objective(make_model(), loss_config("vision", vision={"form": "infonce"}), VIEWS)
    losses, parts = gradients(objective, batch_for(objective.model))
    assert parts == {"image_encoder", "vision_head.mlp"}
    assert not {name for name in objective.state_dict() if "prototypes" in name or "center" in name}
    assert losses["loss/vision"].isfinite()


def test_the_second_head_learns_and_is_no_part_of_the_model(make_model: Make) -> None:
    config = loss_config("mutual_information", mutual_information={"overclusters": 11})
    objective = Objective(make_model(), config, VIEWS)
    losses, parts = gradients(objective, batch_for(objective.model))
    assert {key for key in losses if key.startswith("loss/")} == {"loss/mutual_information", "loss/overclustering"}
    expected = 0.5 * (losses["loss/mutual_information"] + losses["loss/overclustering"])
    assert losses["loss"].item() == pytest.approx(expected.item())
    assert {"clustering_head", "overclustering_head.1", "image_encoder"} <= parts
    assert not any("over" in name for name in objective.model.state_dict())
    alone = Objective(make_model(), loss_config("mutual_information"), VIEWS).train()
    value = alone(batch_for(alone.model))["loss/mutual_information"]
    assert value.item() == pytest.approx(losses["loss/mutual_information"].item(), abs=1e-6)


def test_the_head_alone_learns_where_the_encoder_is_not_to(make_model: Make) -> None:
    config = loss_config("mutual_information", mutual_information={"train_encoder": False})
    objective = Objective(make_model(), config, VIEWS)
    assert gradients(objective, batch_for(objective.model))[1] == {"clustering_head"}


def test_a_batch_without_phrases_costs_nothing(make_model: Make) -> None:
    objective = Objective(make_model(), loss_config("cross_modal", "nouns"), VIEWS, PHRASES)
    batch = batch_for(objective.model)
    batch.phrases.fill_(-1)
    losses, _ = gradients(objective, batch)
    assert losses["loss/nouns"].item() == 0


def test_bfloat16_stays_near_float32(make_model: Make) -> None:
    values = []
    for dtype in (torch.float32, torch.bfloat16):
        objective = Objective(make_model(), loss_config(*LOSSES), VIEWS, PHRASES, autocast=dtype).eval()
        values.append({name: value.item() for name, value in objective(batch_for(objective.model)).items()})
    assert values[0] == pytest.approx(values[1], abs=0.03)
    assert values[0] != values[1]


def test_only_training_moves_the_centre_and_the_statistics(make_model: Make) -> None:
    objective = Objective(make_model(), loss_config(*LOSSES), VIEWS, PHRASES).eval()
    batch = batch_for(objective.model)
    before = {name: value.clone() for name, value in objective.named_buffers()}
    objective(batch)
    assert all(torch.equal(before[name], value) for name, value in objective.named_buffers())
    objective.train()(batch)
    changed = {name for name, value in objective.named_buffers() if not torch.equal(before[name], value)}
    assert {"vision_loss.center", "model.caption_mean"} <= changed


# ----------------------------------------------------------------------------------------------------------- teacher


def test_the_teacher_starts_as_the_student_and_follows_it(make_model: Make) -> None:
    config = loss_config("vision", vision={"teacher_momentum": 0.9})
    objective = Objective(make_model(), config, VIEWS)
    pairs = [
        *zip(objective.teacher["encoder"].parameters(), objective.model.image_encoder.parameters(), strict=True),
        *zip(objective.teacher["head"].parameters(), objective.vision_head.parameters(), strict=True),
    ]
    assert all(torch.equal(old, new) for old, new in pairs)
    assert not any(old.requires_grad for old, _ in pairs)
    with torch.no_grad():
        for _, new in pairs:
            new += 1.0
    start = [old.clone() for old, _ in pairs]
    objective.after_update(0.0)
    for before, (old, new) in zip(start, pairs, strict=True):
        np.testing.assert_allclose(old, 0.9 * before + 0.1 * new.detach(), atol=1e-6)
    start = [old.clone() for old, _ in pairs]
    objective.after_update(0.5)
    for before, (old, new) in zip(start, pairs, strict=True):
        np.testing.assert_allclose(old, 0.95 * before + 0.05 * new.detach(), atol=1e-6)
    start = [old.clone() for old, _ in pairs]
    objective.after_update(1.0)
    assert all(torch.equal(before, old) for before, (old, _) in zip(start, pairs, strict=True))


def test_there_is_no_teacher_without_the_vision_loss(make_model: Make) -> None:
    objective = Objective(make_model(), loss_config("cross_modal"), VIEWS)
    assert "teacher" not in dict(objective.named_children())
    objective.after_update(0.5)
    assert not any("teacher" in name for name in objective.state_dict())


# --------------------------------------------------------------------------------------------------- cached features


def test_cached_half_precision_features_train_all_losses(make_model: Make) -> None:
    model = make_model(image_encoder=FROZEN)
    objective = Objective(model, loss_config(*LOSSES), VIEWS.replace(feature_dropout=0.5), PHRASES)
    losses, parts = gradients(objective, batch_for(model, features=True))
    assert all(value.isfinite() for value in losses.values())
    assert parts == {
        "image_projection",
        "text_encoder",
        "text_projection",
        "logit_scale",
        "clustering_head",
        "vision_head.mlp",
        "vision_head.prototypes",
    }


def test_captions_are_compared_with_the_cached_pooled_feature(make_model: Make) -> None:
    model = make_model(image_encoder=FROZEN)
    objective = Objective(model, loss_config(*LOSSES), VIEWS.replace(feature_dropout=0.5), PHRASES)
    batch = batch_for(model, features=True)
    whole = torch.randn(4, 16, generator=torch.Generator().manual_seed(5)).half()
    batch = replace(batch, images=torch.cat([batch.images, whole.unsqueeze(1)], 1))
    seen = encode_views(model, batch, objective.views, global_=2, local=0, second_learns=False, drop=True)
    assert seen.factors_GBF is not None
    assert seen.global_[0].grid == (3, 3)
    torch.testing.assert_close(seen.global_[0].patches, batch.images[:, :9])
    for number, factors_BF in enumerate(seen.factors_GBF):
        torch.testing.assert_close(seen.pooled(number), whole.float() * factors_BF)
        torch.testing.assert_close(seen.view(number).pooled, whole.float() * factors_BF)
    losses, _ = gradients(objective, batch)
    assert all(value.isfinite() for value in losses.values())


def test_dropout_takes_whole_channels_of_a_pair_and_is_what_makes_two_views(make_model: Make) -> None:
    model = make_model(image_encoder=FROZEN)
    objective = Objective(model, loss_config(*LOSSES), VIEWS.replace(feature_dropout=0.25), PHRASES)
    batch = batch_for(model, features=True)

    def views(*, drop: bool) -> list[Tensor]:
        seen = encode_views(model, batch, objective.views, global_=2, local=0, second_learns=False, drop=drop)
        return [seen.view(number).patches for number in range(2)]

    first, second = views(drop=True)
    original = batch.images.float()
    for view in (first, second):
        kept = (view != 0).any(1)  # (B, F)
        expected = torch.where(kept.unsqueeze(1), original / 0.75, torch.zeros(()))
        np.testing.assert_allclose(view, expected, rtol=1e-6)
        assert 0.5 < kept.float().mean() < 0.95
    assert not torch.equal(first != 0, second != 0)
    for again, before in zip(views(drop=True), (first, second), strict=True):
        np.testing.assert_array_equal(again, before)
    for plain in views(drop=False):
        np.testing.assert_array_equal(plain, original)


def test_cached_views_meet_the_head_as_if_each_had_been_made(make_model: Make) -> None:
    model = make_model(image_encoder=FROZEN)
    dropout = VIEWS.replace(feature_dropout=0.5)
    objective = Objective(model, loss_config("mutual_information"), dropout).train()
    batch = batch_for(model, features=True)
    losses = objective(batch)
    found = torch.autograd.grad(losses["loss"], list(model.clustering_head.parameters()))
    seen = encode_views(model, batch, dropout, global_=2, local=0, second_learns=False, drop=True)
    first, second = (
        model.cluster_logits(seen.view(number)).softmax(-1).transpose(1, 2).unflatten(2, (3, 3)) for number in range(2)
    )
    config = objective.config.mutual_information
    loss = iic_loss(first, second, radius=config.radius, entropy_weight=config.entropy_weight)
    wanted = torch.autograd.grad(0.5 * loss, list(model.clustering_head.parameters()))
    assert losses["loss/mutual_information"].item() == pytest.approx(loss.item(), abs=1e-6)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)


def test_a_radius_beyond_the_patches_is_told(make_model: Make) -> None:
    model = make_model()
    objective = Objective(model, loss_config("mutual_information", mutual_information={"radius": 9}), VIEWS)
    with pytest.raises(ConfigError, match=r"loss.mutual_information.radius=9 does not fit the \d+ x \d+ patches"):
        objective(batch_for(model))


def test_frozen_encoders_train_with_images_too(make_model: Make) -> None:
    text = {"sizes": {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}}
    model = make_model(image_encoder=FROZEN, text_encoder={**text, "frozen": True})
    objective = Objective(model, loss_config(*LOSSES), VIEWS, PHRASES)
    _, parts = gradients(objective, batch_for(model))
    assert parts == {
        "image_projection",
        "text_projection",
        "logit_scale",
        "clustering_head",
        "vision_head.mlp",
        "vision_head.prototypes",
    }
