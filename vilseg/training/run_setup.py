"""Set-up of a run: open its directory, prepare or resume it, and make its trainer."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Sequence

import torch
from torch import nn

from vilseg import storage
from vilseg.config import ModelConfig, RunConfig
from vilseg.config.base import flatten
from vilseg.config.data import WeightedSource
from vilseg.config.loss import CrossModalConfig
from vilseg.data.batch_reader import index_shards, sample_pairs
from vilseg.data.sampler import PairSampler
from vilseg.data.shards import Pair, Shard, list_shards
from vilseg.data.text_selection import TextSelector
from vilseg.device import precision_dtype
from vilseg.errors import ConfigError, DataError, StorageError
from vilseg.model import ViLSeg
from vilseg.text.noun_phrases import NounPhrases
from vilseg.training.loop import Trainer
from vilseg.training.objective import Objective
from vilseg.training.run_dir import PreparedRun, RunDirectory
from vilseg.training.run_results import model_card

_SAMPLE_PAIRS = 10_000
"""Number of pairs whose captions the tokenizer and the list of noun phrases are made from."""


def open_run_directory(config: RunConfig, *, resume: bool) -> RunDirectory:
    """Return the directory of the run, after a check that it exists if and only if ``resume`` is True.

    Raises:
        StorageError: the run exists but ``resume`` is False, or the storage cannot be reached.
        ConfigError: ``resume`` is True but there is no run of that name.
    """
    assert config.name is not None
    storage.require_bucket(config.trainer.storage)
    run_dir = RunDirectory(storage.join(storage.absolute(config.trainer.storage), config.name))
    exists = storage.exists(run_dir.config)
    if exists and not resume:
        raise StorageError(f"the run {run_dir.uri} exists already; go on with it by --resume or choose another --name")
    if resume and not exists:
        raise ConfigError(f"there is no run to resume at {run_dir.uri}")
    return run_dir


_MAY_CHANGE = re.compile(r"name|optimizer\..*|segmentation\..*|trainer\.(?!batch_size|seed).*")
"""Configuration keys that a resumed run may change, because neither the order of pairs nor the checkpoints depend on them."""


def resume(config: RunConfig, run_dir: RunDirectory) -> PreparedRun:
    """Read what :func:`prepare` wrote to the run directory, and replace the configuration there by ``config``.

    Raises:
        ConfigError: ``config`` differs from the run's in a key that must not change, or has fewer steps than are already done.
    """
    before = flatten(RunConfig.load(run_dir.config).model_dump())
    now = flatten(config.model_dump())
    for key in sorted(before.keys() | now.keys()):
        if before.get(key) != now.get(key) and not _MAY_CHANGE.fullmatch(key):
            raise ConfigError(
                f"cannot resume {run_dir.uri}: {key} was {before.get(key)!r} and is now {now.get(key)!r}; "
                "set it as it was, or start a new run by another --name"
            )
    done = run_dir.last_step
    if config.trainer.steps < done:
        raise ConfigError(
            f"cannot resume {run_dir.uri}: it has made {done} steps, trainer.steps={config.trainer.steps}"
        )
    storage.write_text(run_dir.config, config.to_yaml())
    return PreparedRun.from_json(storage.read_text(run_dir.prepared))


def preflight(config: RunConfig, *, resume: bool) -> None:
    """Check a configuration before anything is started; a run without a name is not looked for.

    Raises:
        ConfigError: the batch cannot be divided evenly among the workers, no source is set, or ``resume`` is True but there is
            no run of that name.
        DataError: a source has no shards.
        StorageError: a source or the storage cannot be reached, or the run exists but ``resume`` is False.
    """
    config.trainer.check_even_split()
    for part in require_sources(config).values():
        list_shards(part.source, without=config.data.held_out)
    if config.name:
        open_run_directory(config, resume=resume)
    else:
        storage.require_bucket(config.trainer.storage)


def prepare(
    config: RunConfig,
    run_dir: RunDirectory,
    *,
    count: Callable[[list[str]], list[int]] | None = None,
    cache: str | None = None,
) -> PreparedRun:
    """List the shards, extract noun phrases, and make the initial model; write all of them to the run directory.

    Args:
        config: configuration of the run; ``data.source`` or ``data.mix`` must be set.
        run_dir: directory of the run.
        count: function that counts the pairs of many shards at once; see :func:`index_shards`.
        cache: URI of a feature cache made from ``data.source``, to train on instead of the images; None for none.

    Raises:
        ConfigError: no source is set, or a setting conflicts with one that the model of ``model.init`` has itself.
        DataError: there are no shards, or a source has no readable pair.
        ModelError: the model of ``model.init`` or an encoder cannot be loaded.
    """
    sources = require_sources(config)
    _check_temperature(config)
    # A feature cache has no held-out pairs.
    without = None if cache else config.data.held_out
    uris = {name: cache or storage.absolute(part.source) for name, part in sources.items()}
    shards = tuple(
        itertools.chain.from_iterable(
            index_shards(uri, count, without=without, name=name) for name, uri in uris.items()
        )
    )
    PairSampler(
        shards, 1, 0, weights={name: part.weight for name, part in sources.items()}
    )  # raises if a source has no pair
    pairs = _sample(config, shards, cached=cache is not None)
    captions = [caption for pair in pairs for caption in pair.captions]
    nouns = NounPhrases()
    if config.loss.nouns.weight or config.stage == "self-train":
        settings = config.loss.nouns
        nouns = NounPhrases.from_captions(
            captions[:: math.ceil(len(captions) / _SAMPLE_PAIRS)],
            max_phrases=settings.max_phrases,
            min_count=settings.min_count,
            finder=settings.finder,
        )
    torch.manual_seed(config.trainer.seed)
    model = ViLSeg.from_config(
        model_settings(config),
        captions,
        segmentation=config.segmentation,
        temperature=config.loss.cross_modal.temperature,
    )
    model.save_pretrained(run_dir.initial, card=model_card(config, "not trained yet", {}))
    prepared = PreparedRun(shards, nouns, model.text_encoder.fixed_tokenizer())
    storage.write_text(run_dir.prepared, prepared.to_json())
    storage.write_text(run_dir.config, config.to_yaml())
    return prepared


def model_settings(config: RunConfig) -> ModelConfig:
    """Return ``config.model``; if ``config.init`` names a run or a model folder, with ``init`` set to the model in it."""
    if not config.init:
        return config.model
    model = RunDirectory(storage.absolute(config.init)).model
    begun = model if storage.exists(storage.join(model, "config.json")) else config.init
    return config.model.replace(init=begun)


def _check_temperature(config: RunConfig) -> None:
    temperature = config.loss.cross_modal.temperature
    usual = CrossModalConfig(form=config.loss.cross_modal.form).temperature
    if config.model.init and temperature != usual:
        raise ConfigError(
            f"loss.cross_modal.temperature is {temperature}, but model.init brings its own; leave the key away"
        )


def _sample(config: RunConfig, shards: Sequence[Shard], *, cached: bool) -> list[Pair]:
    """Read about ``_SAMPLE_PAIRS`` pairs, from every source in proportion to its weight."""
    selector = TextSelector(config.data.text, config.data.filters)
    sources = config.data.sources
    total = sum(part.weight for part in sources.values())
    pairs: list[Pair] = []
    for name, part in sources.items():
        read = [shard for shard in shards if shard.source == name]
        if cached:
            # Read the original shards: the captions are the same, and images are smaller than cached features.
            entries = list_shards(part.source, without=config.data.held_out)
            read = [Shard(entry.uri, _SAMPLE_PAIRS) for entry in entries]
        wanted = math.ceil(_SAMPLE_PAIRS * part.weight / total)
        good, bad = sample_pairs(read, config.data.columns, wanted, selector)
        if not good:
            reason = f"; the first, {bad[0].key}, failed because {bad[0].reason}" if bad else ""
            raise DataError(f"no readable pair at {part.source}{reason}")
        pairs += good
    return pairs


def require_sources(config: RunConfig) -> dict[str, WeightedSource]:
    """Return ``data.sources`` by name, after a check that their buckets exist.

    Raises:
        ConfigError: no source is set.
        StorageError: a bucket does not exist.
    """
    sources = config.data.sources
    if not sources:
        raise ConfigError(
            "data.source is not set; give the URI of pair shards, for example data.source=s3://bucket/pairs"
        )
    for part in sources.values():
        storage.require_bucket(part.source)
    return sources


def make_trainer(
    config: RunConfig,
    run_dir: RunDirectory,
    prepared: PreparedRun,
    device: torch.device,
    *,
    wrap: Callable[[nn.Module], nn.Module] = lambda module: module,
) -> Trainer:
    """Make the trainer of a run's initial model, with torch's random generator set to the seed of the run.

    Args:
        config: configuration of the run.
        run_dir: directory of the run, with its initial model.
        prepared: shards, noun phrases and tokenizer of the run.
        device: device to train on.
        wrap: see :class:`~vilseg.training.loop.Trainer`.
    """
    torch.manual_seed(config.trainer.seed)
    objective = Objective(
        ViLSeg.from_pretrained(run_dir.initial),
        config.loss,
        config.views,
        prepared.nouns.phrases,
        autocast=precision_dtype(config.trainer.precision, device),
        self_training=config.stage == "self-train",
    ).to(device)
    return Trainer(objective, config.optimizer, config.trainer, device, wrap=wrap)
