"""Locations of the files in a run directory, and the data that a run is prepared with.

The module imports neither torch nor Ray, so that processes which only read pairs need little memory.
"""

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
"""Name of the state file in a checkpoint's folder."""
MANIFEST = "manifest.json"
"""Name of the manifest file in the same folder, written last."""
_STATE_FILE = re.compile(rf"step-(\d+)/{re.escape(STATE)}")


@dataclass(frozen=True)
class Manifest:
    """Manifest of a checkpoint. If the state file has another size than the manifest says, the checkpoint is incomplete."""

    step: int
    """Number of training steps done."""
    bytes: int
    """Size of the state file in bytes."""
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
    """URIs of the files in the directory of a run."""

    uri: str
    """URI of the directory."""

    @property
    def config(self) -> str:
        """YAML file with the complete configuration of the run."""
        return storage.join(self.uri, "config.yaml")

    @property
    def metrics(self) -> str:
        """File with one JSON object per report."""
        return storage.join(self.uri, "metrics.jsonl")

    @property
    def tensorboard(self) -> str:
        """Folder of TensorBoard events."""
        return storage.join(self.uri, "tensorboard")

    @property
    def quarantine(self) -> str:
        """File with one JSON object per pair that could not be read: ``key``, ``reason`` and ``shard``, the URI of its file."""
        return storage.join(self.uri, "quarantine.jsonl")

    @property
    def nonfinite(self) -> str:
        """JSON file on the step whose loss or gradient was NaN or infinite: ``step``, ``losses`` and ``keys`` of its pairs."""
        return storage.join(self.uri, "nonfinite.json")

    @property
    def checkpoints(self) -> str:
        """Folder of the checkpoints, one folder ``step-NNNNNNNN`` each."""
        return storage.join(self.uri, "checkpoints")

    @property
    def initial(self) -> str:
        """Folder of the model before the first step."""
        return storage.join(self.uri, "initial")

    @property
    def model(self) -> str:
        """Folder of the trained model."""
        return storage.join(self.uri, "model")

    @property
    def prepared(self) -> str:
        """JSON file with the shards, noun phrases and tokenizer of the run; see :class:`PreparedRun`."""
        return storage.join(self.uri, "prepared.json")

    def checkpoint_steps(self) -> list[int]:
        """Return the steps of all complete checkpoints, ascending."""
        return sorted(self.manifests())

    def manifests(self) -> dict[int, Manifest]:
        """Read the manifests of all complete checkpoints, by step."""
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
        """Step of the last complete checkpoint, from which a resumed run continues; 0 if there is none.

        Requests are repeated while the object store does not answer.
        """
        with storage.retrying():
            return max(self.checkpoint_steps(), default=0)

    def manifest(self, step: int) -> str:
        """Return the URI of the manifest of the checkpoint at ``step``."""
        return storage.join(self.checkpoint(step), MANIFEST)

    def state(self, step: int) -> str:
        """Return the URI of the state file of the checkpoint at ``step``."""
        return storage.join(self.checkpoint(step), STATE)

    def checkpoint(self, step: int) -> str:
        """Return the URI of the folder of the checkpoint at ``step``."""
        return storage.join(self.checkpoints, checkpoint_directory_name(step))


def checkpoint_directory_name(step: int) -> str:
    """Return the name of the folder of the checkpoint at ``step``."""
    return f"step-{step:08d}"


def new_run_name() -> str:
    """Return a default name for a run: the local date and time."""
    return time.strftime("%Y-%m-%d-%H%M%S")


@dataclass(frozen=True)
class PreparedRun:
    """Shards, noun phrases and tokenizer of a run, saved once so that all workers and resumed runs use the same."""

    shards: tuple[Shard, ...]
    nouns: NounPhrases
    tokenizer: FixedTokenizer

    def to_json(self) -> str:
        """Return the JSON text that :meth:`from_json` parses."""
        tree = {
            "shards": [[shard.uri, shard.pairs, shard.source] for shard in self.shards],
            "nouns": self.nouns.to_json(),
            "tokenizer": self.tokenizer.__getstate__(),
        }
        return json.dumps(tree)

    @classmethod
    def from_json(cls, text: str) -> PreparedRun:
        """Parse the text that :meth:`to_json` returned."""
        tree = json.loads(text)
        shards = tuple(Shard(*shard) for shard in tree["shards"])  # old runs have no source in a shard
        return cls(shards, NounPhrases.from_json(tree["nouns"]), FixedTokenizer(**tree["tokenizer"]))
