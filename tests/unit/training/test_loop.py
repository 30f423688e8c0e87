"""Training loop: a resumed run equals an uninterrupted one, two workers equal one, and errors that end a run."""

import io
import math
import pickle
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from vilseg.config import OptimizerConfig, TrainerConfig, ViewsConfig
from vilseg.config.loss import LossConfig
from vilseg.data.batch_reader import BatchReader, WorkerBatch, decode_to_canvas, index_shards
from vilseg.data.sampler import PairSampler
from vilseg.data.shards import write_tar
from vilseg.distributed import rank, world_size
from vilseg.errors import DataError
from vilseg.model import ViLSeg
from vilseg.text.noun_phrases import NounPhrases
from vilseg.training.checkpoints import read_checkpoint, write_checkpoint
from vilseg.training.loop import NonFiniteLossError, Trainer
from vilseg.training.objective import Objective
from vilseg.training.run_dir import RunDirectory

BATCH = 8
CPU = torch.device("cpu")
NAMES = ("dog", "cat", "sofa", "sea", "horse")
NOUNS = NounPhrases(NAMES, {name: i for i, name in enumerate(NAMES)})


def write_run(folder: Path, make_model: Callable[..., ViLSeg], *, dropout: float = 0.1) -> str:
    """Write shards and an initial model for a run; ``dropout`` is the probability in the text encoder."""
    chance = np.random.default_rng(0)
    for shard in range(3):
        pairs = []
        for i in range(9):
            buffer = io.BytesIO()
            coarse = chance.integers(0, 256, (4, 6, 3), dtype=np.uint8)
            Image.fromarray(coarse).resize((36, 24), Image.Resampling.BICUBIC).save(buffer, "PNG")
            words = chance.permutation(NAMES)[: 1 + i % 3]
            pairs.append((f"{shard}-{i}", buffer.getvalue(), "png", {"caption": f"a {' and a '.join(words)}"}))
        write_tar(f"{folder}/pairs/{shard}.tar", pairs)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    drop = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    make_model(text_encoder={"sizes": sizes | drop, "max_tokens": 12}).save_pretrained(f"{folder}/initial")
    return str(folder)


def data_parallel(module: nn.Module) -> nn.Module:
    if world_size() == 1:
        return module
    return nn.parallel.DistributedDataParallel(module, find_unused_parameters=True, broadcast_buffers=False)


def make_trainer(
    folder: str,
    steps: int,
    *,
    device: torch.device = CPU,
    wrap: Callable[[nn.Module], nn.Module] = data_parallel,
    gradient_clip: float = 1.0,
    **settings: Any,
) -> Trainer:
    loss = LossConfig.model_validate(
        {
            "vision": {"weight": 0.5, "prototypes": 16, "hidden_dim": 16},
            "mutual_information": {"weight": 0.5},
            "nouns": {"top_patches": 3},
        }
    )
    torch.manual_seed(1)
    objective = Objective(
        ViLSeg.from_pretrained(f"{folder}/initial"), loss, ViewsConfig(global_size=16, local_size=8), NAMES
    ).to(device)
    optimizer = OptimizerConfig(learning_rate=1e-3, warmup_steps=2, gradient_clip=gradient_clip)
    trainer = TrainerConfig(workers=world_size(), batch_size=BATCH, steps=steps, log_every=1, **settings)
    return Trainer(objective, optimizer, trainer, device, wrap=wrap)


def batches(folder: str, first_step: int, last_step: int) -> Iterator[WorkerBatch]:
    """Yield this worker's batches."""
    model = ViLSeg.from_pretrained(f"{folder}/initial")
    reader = BatchReader(
        batch_size=BATCH,
        workers=world_size(),
        seed=0,
        decode=lambda data, seed: decode_to_canvas(data, seed, canvas=24, max_pixels=10**6),
        tokenize=model.text_encoder.fixed_tokenizer(),
        nouns=NOUNS,
    )
    for chunk in PairSampler(index_shards(f"{folder}/pairs"), BATCH, 0).read_tasks(first_step, last_step):
        for number, batch in enumerate(reader.read(chunk)):
            if number % world_size() == rank():
                yield batch


def run(trainer: Trainer, fed: Iterator[WorkerBatch]) -> list[dict[str, float]]:
    reports: list[dict[str, float]] = []
    trainer.train(fed, on_report=reports.append, on_checkpoint=lambda: None)
    return reports


def losses(reports: list[dict[str, float]]) -> list[dict[str, float]]:
    return [{name: value for name, value in report.items() if name.startswith("loss")} for report in reports]


def train_together(folder: str, chunk_size: int | None) -> tuple[list[dict[str, float]], dict[str, np.ndarray]]:
    trainer = make_trainer(folder, 5, chunk_size=chunk_size)
    reports = losses(run(trainer, batches(folder, 0, 5)))
    return reports, {name: value.numpy() for name, value in trainer.objective.state_dict().items()}


# ------------------------------------------------------------------------------------------------------------ tests


@pytest.mark.parametrize("chunk_size", [None, 3])
def test_two_workers_train_as_one(
    tmp_path: Path,
    make_model: Callable[..., ViLSeg],
    on_two_workers: Callable[..., list[Any]],
    chunk_size: int | None,
) -> None:
    folder = write_run(tmp_path, make_model, dropout=0)  # every worker drops other units
    alone, state = train_together(folder, None)
    assert len(alone) == 5
    assert alone[0].keys() == {"loss", "loss/cross_modal", "loss/nouns", "loss/vision", "loss/mutual_information"}
    (first, first_state), (second, second_state) = on_two_workers(train_together, folder, chunk_size)
    assert first == second
    for expected, found in zip(alone, first, strict=True):
        assert found == pytest.approx(expected, abs=1e-5)
    for name, value in state.items():
        np.testing.assert_array_equal(first_state[name], second_state[name], err_msg=name)
        np.testing.assert_allclose(first_state[name], value, atol=1e-4, err_msg=name)


@pytest.mark.parametrize("chunk_size", [None, 3])
def test_a_resumed_run_repeats_the_unbroken_one_bit_by_bit(
    tmp_path: Path, make_model: Callable[..., ViLSeg], chunk_size: int | None
) -> None:
    folder = write_run(tmp_path, make_model)
    unbroken = make_trainer(folder, 6, chunk_size=chunk_size)
    expected = losses(run(unbroken, batches(folder, 0, 6)))

    stopped = make_trainer(folder, 6, chunk_size=chunk_size)
    left = RunDirectory(str(tmp_path / "left"))
    before: list[dict[str, float]] = []
    stopped.train(
        batches(folder, 0, 6),
        on_report=before.append,
        on_checkpoint=lambda: write_checkpoint(left, stopped.state_dict()),
        should_stop=lambda: stopped.step == 3,
    )
    assert stopped.step == 3
    resumed = make_trainer(folder, 6, chunk_size=chunk_size)
    with torch.no_grad():
        for parameter in resumed.objective.parameters():
            parameter.zero_()
    resumed.load_state_dict(read_checkpoint(left, 3))
    assert resumed.step == 3
    after = losses(run(resumed, batches(folder, resumed.step, 6)))
    assert [*losses(before), *after] == expected
    final = unbroken.objective.state_dict()
    assert all(torch.equal(final[name], value) for name, value in resumed.objective.state_dict().items())


def test_reports_and_checkpoints_come_when_they_are_due(tmp_path: Path, make_model: Callable[..., ViLSeg]) -> None:
    folder = write_run(tmp_path, make_model)
    trainer = make_trainer(folder, 5, checkpoint_every=2)
    trainer.trainer = trainer.trainer.replace(log_every=3)
    reports: list[dict[str, float]] = []
    kept: list[int] = []
    trainer.train(batches(folder, 0, 5), on_report=reports.append, on_checkpoint=lambda: kept.append(trainer.step))
    assert kept == [2, 4, 5]
    # Every third step, and before every checkpoint.
    assert [report["step"] for report in reports] == [2, 3, 4, 5]
    assert [report["samples"] for report in reports] == [16, 24, 32, 40]
    every_step = losses(run(make_trainer(folder, 5), batches(folder, 0, 5)))
    assert reports[0]["loss"] == pytest.approx(np.mean([step["loss"] for step in every_step[:2]]), abs=1e-6)
    assert reports[1]["loss"] == pytest.approx(every_step[2]["loss"], abs=1e-6)
    for report in reports:
        assert report["images_per_second"] > 0
        assert 0 < report["data_wait"] < 1
        assert 0 < report["learning_rate"] <= 1e-3
        assert report["temperature"] == pytest.approx(0.07, rel=0.05)


def test_training_lowers_the_loss(tmp_path: Path, make_model: Callable[..., ViLSeg]) -> None:
    folder = write_run(tmp_path, make_model)
    trainer = make_trainer(folder, 25)
    trainer.optimizer = trainer.optimizer.replace(learning_rate=0.01)
    reports = run(trainer, batches(folder, 0, 25))
    first, last = (np.mean([report["loss/cross_modal"] for report in part]) for part in (reports[:5], reports[-5:]))
    assert last < first - 0.15


def test_pairs_that_end_too_early_are_an_error(tmp_path: Path, make_model: Callable[..., ViLSeg]) -> None:
    folder = write_run(tmp_path, make_model)
    with pytest.raises(DataError, match="the pairs ended after step 2 of 5"):
        run(make_trainer(folder, 5), batches(folder, 0, 2))


def test_a_loss_that_is_no_number_ends_the_run_with_a_sentence(
    tmp_path: Path, make_model: Callable[..., ViLSeg]
) -> None:
    folder = write_run(tmp_path, make_model)
    trainer = make_trainer(folder, 5)
    with torch.no_grad():
        trainer.objective.model.image_projection.weight[0, 0] = math.nan
    with pytest.raises(NonFiniteLossError) as caught:
        run(trainer, batches(folder, 0, 5))
    sentence = str(caught.value)
    assert "the loss is nan at step 1" in sentence
    assert "optimizer.learning_rate" in sentence
    assert next(batches(folder, 0, 1)).keys[0] in sentence
    assert "\n" not in sentence
    again = pickle.loads(pickle.dumps(caught.value))  # as it travels between processes
    assert str(again) == sentence
    assert again.details["keys"] == caught.value.details["keys"]


def doing(action: Callable[[], None], steps: Iterable[WorkerBatch], *, before: int) -> Iterator[WorkerBatch]:
    """Yield the batches, and call ``action`` before batch number ``before``."""
    for number, batch in enumerate(steps):
        if number == before:
            action()
        yield batch


def test_the_step_that_lost_the_number_is_found_between_two_reports(
    tmp_path: Path, make_model: Callable[..., ViLSeg]
) -> None:
    folder = write_run(tmp_path, make_model)
    trainer = make_trainer(folder, 6)
    trainer.trainer = trainer.trainer.replace(log_every=6)

    def spoil() -> None:
        with torch.no_grad():
            trainer.objective.model.image_projection.weight[0, 0] = math.inf

    with pytest.raises(NonFiniteLossError) as caught:
        run(trainer, doing(spoil, batches(folder, 0, 6), before=3))
    expected = list(batches(folder, 0, 6))[3].keys
    assert caught.value.details["step"] == 4
    assert tuple(caught.value.details["keys"]) == expected
    assert caught.value.details["losses"]["loss"] in ("nan", "inf")


def test_a_gradient_that_is_no_number_ends_the_run_before_a_checkpoint_has_it(
    tmp_path: Path, make_model: Callable[..., ViLSeg]
) -> None:
    folder = write_run(tmp_path, make_model)
    trainer = make_trainer(folder, 4)
    trainer.trainer = trainer.trainer.replace(checkpoint_every=2)
    projection = trainer.objective.model.image_projection.weight

    def spoil() -> None:
        projection.register_hook(lambda gradient: gradient * math.inf)

    spoiled = doing(spoil, batches(folder, 0, 4), before=3)
    written: list[int] = []
    with pytest.raises(NonFiniteLossError, match=r"the gradient's norm is (nan|inf) at step 4") as caught:
        trainer.train(spoiled, on_report=lambda _: None, on_checkpoint=lambda: written.append(trainer.step))
    assert written == [2]
    assert math.isfinite(caught.value.details["losses"]["loss"])


def spoiled_at_step_4(folder: str, *, on_device: bool) -> tuple[NonFiniteLossError, Trainer, dict[str, Tensor]]:
    """Train a run whose fourth gradient is infinite; return its error, its trainer, and the weights before that step."""
    trainer = make_trainer(folder, 6)
    trainer.trainer = trainer.trainer.replace(log_every=6)
    if on_device:  # the fused kernel of the CPU takes the same flag as that of a GPU
        trainer._skips_on_device = True
        for group in trainer._adamw.param_groups:
            group["fused"], group["foreach"] = True, False
    before: dict[str, Tensor] = {}
    handles: list[Any] = []

    def spoil() -> None:
        before.update({name: p.detach().clone() for name, p in trainer.objective.model.named_parameters()})
        weight = trainer.objective.model.image_projection.weight
        handles.append(weight.register_hook(lambda gradient: gradient * math.inf))

    def heal() -> None:
        handles.pop().remove()

    fed = doing(heal, doing(spoil, batches(folder, 0, 6), before=3), before=4)
    with pytest.raises(NonFiniteLossError) as caught:
        run(trainer, fed)
    return caught.value, trainer, before


def test_no_update_is_made_with_a_gradient_that_is_not_finite(
    tmp_path: Path, make_model: Callable[..., ViLSeg]
) -> None:
    error, trainer, before = spoiled_at_step_4(write_run(tmp_path, make_model), on_device=False)
    assert error.details["step"] == trainer.step == 4, "found at once, not at the next report"
    for name, parameter in trainer.objective.model.named_parameters():
        assert torch.equal(parameter, before[name]), name


def test_the_optimiser_skips_such_an_update_without_the_host(tmp_path: Path, make_model: Callable[..., ViLSeg]) -> None:
    error, trainer, _ = spoiled_at_step_4(write_run(tmp_path, make_model), on_device=True)
    assert error.details["step"] == 4
    assert trainer.step == 6, "found at the next report"
    assert all(bool(parameter.isfinite().all()) for parameter in trainer.objective.model.parameters())
    steps = {int(state["step"]) for state in trainer._adamw.state.values()}
    assert steps == {5}, "two further updates were made, one was left out"


def test_the_gradient_is_clipped(tmp_path: Path, make_model: Callable[..., ViLSeg]) -> None:
    folder = write_run(tmp_path, make_model)
    norms = []
    for clip in (0.0, 0.01):
        trainer = make_trainer(folder, 1)
        trainer.optimizer = trainer.optimizer.replace(gradient_clip=clip)
        run(trainer, batches(folder, 0, 1))
        gradients = [p.grad for p in trainer.objective.parameters() if p.grad is not None]
        norms.append(math.sqrt(sum(float(gradient.square().sum()) for gradient in gradients)))
    assert norms[0] > 0.02
    assert norms[1] == pytest.approx(0.01, rel=1e-3)
