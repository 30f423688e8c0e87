"""The folder of a run and what it is begun with; light to import, so that processes which only read pairs stay small."""

from __future__ import annotations

import json
import re
import time
from dataclasses import dataclass

from vilseg import storage
from vilseg.data.shards import Shard
from vilseg.text.noun_phrases import NounPhrases
from vilseg.text.tokenizer import FixedTokenizer

STATE = "state.pt"
"""What a checkpoint's folder holds."""
MANIFEST = "manifest.json"
"""Beside it, written last."""
_STATE_FILE = re.compile(rf"step-(\d+)/{re.escape(STATE)}")


@dataclass(frozen=True)
class Manifest:
    """Manifest of a checkpoint: a checkpoint whose state has another size is incomplete."""

    step: int
    bytes: int
    """Size of the state file."""
    metric_value: float | None
    """Value of the metric that chooses the best checkpoint; None if the last report before the checkpoint did not have it."""

    def to_json(self) -> str:
        """Return the JSON text that :meth:`from_json` parses."""
        return json.dumps({"step": self.step, "bytes": self.bytes, "figure": self.metric_value})

    @classmethod
    def from_json(cls, text: str) -> Manifest:
        """Parse the text that :meth:`to_json` returned."""
        fields = json.loads(text)
        return cls(fields["step"], fields["bytes"], fields["figure"])


@dataclass(frozen=True)
class RunDirectory:
    """Names inside a run's folder at ``uri``."""

    uri: str

    @property
    def config(self) -> str:
        """The resolved configuration, YAML."""
        return storage.join(self.uri, "config.yaml")

    @property
    def metrics(self) -> str:
        """One JSON object a report."""
        return storage.join(self.uri, "metrics.jsonl")

    @property
    def tensorboard(self) -> str:
        """Folder of TensorBoard events."""
        return storage.join(self.uri, "tensorboard")

    @property
    def quarantine(self) -> str:
        """One JSON object for each pair that could not be read: ``key``, ``reason`` and ``shard``, the URI of its file."""
        return storage.join(self.uri, "quarantine.jsonl")

    @property
    def nonfinite(self) -> str:
        """JSON file of a loss that was not finite: the step, its losses and the keys of its pairs."""
        return storage.join(self.uri, "nonfinite.json")

    @property
    def checkpoints(self) -> str:
        """Folder of ``step-NNNNNNNN`` folders."""
        return storage.join(self.uri, "checkpoints")

    @property
    def initial(self) -> str:
        """The model folder before the first step."""
        return storage.join(self.uri, "initial")

    @property
    def model(self) -> str:
        """The trained model folder."""
        return storage.join(self.uri, "model")

    @property
    def prepared(self) -> str:
        """Shards, noun phrases and tokenizer that the run was begun with."""
        return storage.join(self.uri, "prepared.json")

    def checkpoint_steps(self) -> list[int]:
        """Steps of the whole checkpoints kept, ascending; one that was cut off while it was written does not count."""
        return sorted(self.manifests())

    def manifests(self) -> dict[int, Manifest]:
        """The manifests of the whole checkpoints by step."""
        if not storage.exists(self.checkpoints):
            return {}
        listed = {entry.relative: entry for entry in storage.list_files(self.checkpoints)}
        found = {}
        for name, entry in listed.items():
            state = _STATE_FILE.fullmatch(name)
            beside = listed.get(f"{state[0].removesuffix(STATE)}{MANIFEST}") if state else None
            if state and beside:
                manifest = Manifest.from_json(storage.read_text(beside.uri))
                if manifest.bytes == entry.size:
                    found[int(state[1])] = manifest
        return found

    @property
    def last_step(self) -> int:
        """Step of the last whole checkpoint, where a resumed run goes on; 0 where there is none. Waits for the store."""
        with storage.retrying():
            return max(self.checkpoint_steps(), default=0)

    def manifest(self, step: int) -> str:
        """The file that makes the checkpoint at ``step`` whole."""
        return storage.join(self.checkpoint(step), MANIFEST)

    def state(self, step: int) -> str:
        """The file of the checkpoint at ``step``."""
        return storage.join(self.checkpoint(step), STATE)

    def checkpoint(self, step: int) -> str:
        """Folder of the checkpoint at ``step``."""
        return storage.join(self.checkpoints, checkpoint_directory_name(step))


def checkpoint_directory_name(step: int) -> str:
    """Name of a checkpoint's folder."""
    return f"step-{step:08d}"


def new_run_name() -> str:
    """A name for a run without one."""
    return time.strftime("%Y-%m-%d-%H%M%S")


@dataclass(frozen=True)
class PreparedRun:
    """Shards, noun phrases and tokenizer of a run; the same for every worker and every resumption."""

    shards: tuple[Shard, ...]
    nouns: NounPhrases
    tokenizer: FixedTokenizer

    def to_json(self) -> str:
        """Text that :meth:`from_json` reads."""
        tree = {
            "shards": [[shard.uri, shard.pairs, shard.source] for shard in self.shards],
            "nouns": self.nouns.to_json(),
            "tokenizer": self.tokenizer.__getstate__(),
        }
        return json.dumps(tree)

    @classmethod
    def from_json(cls, text: str) -> PreparedRun:
        """Parse the text of :meth:`to_json`."""
        tree = json.loads(text)
        shards = tuple(Shard(*shard) for shard in tree["shards"])  # runs of before there were mixes name no source
        return cls(shards, NounPhrases.from_json(tree["nouns"]), FixedTokenizer(**tree["tokenizer"]))
