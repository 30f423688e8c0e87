"""The folder of a run and what it is begun with; light to import, so that processes which only read pairs stay small."""

from __future__ import annotations

import json
import re
import time
import zipfile
from dataclasses import dataclass

from vilseg import storage
from vilseg.data.pairs import Shard
from vilseg.text.nouns import NounPhrases
from vilseg.text.tokenizer import FixedTokenizer

STATE = "state.pt"
"""What a checkpoint's folder holds."""
_STATE_FILE = re.compile(rf"step-(\d+)/{re.escape(STATE)}")


@dataclass(frozen=True)
class RunFolder:
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
        if not storage.exists(self.checkpoints):
            return []
        names = [entry.relative for entry in storage.list_files(self.checkpoints)]
        steps = sorted(int(found[1]) for name in names if (found := _STATE_FILE.fullmatch(name)))
        return [step for step in steps if self._is_whole(step)]

    @property
    def last_step(self) -> int:
        """Step of the last whole checkpoint, where a resumed run goes on; 0 where there is none."""
        return max(self.checkpoint_steps(), default=0)

    def _is_whole(self, step: int) -> bool:
        # torch writes zip archives, whose table of contents comes last.
        with storage.open_input(self.state(step)) as file:
            return zipfile.is_zipfile(file)

    def state(self, step: int) -> str:
        """The file of the checkpoint at ``step``."""
        return storage.join(self.checkpoint(step), STATE)

    def checkpoint(self, step: int) -> str:
        """Folder of the checkpoint at ``step``."""
        return storage.join(self.checkpoints, checkpoint_name(step))


def checkpoint_name(step: int) -> str:
    """Name of a checkpoint's folder."""
    return f"step-{step:08d}"


def new_name() -> str:
    """A name for a run without one."""
    return time.strftime("%Y-%m-%d-%H%M%S")


@dataclass(frozen=True)
class Prepared:
    """What a run is begun with; every worker and every resumption starts from the same."""

    shards: tuple[Shard, ...]
    nouns: NounPhrases
    tokenizer: FixedTokenizer

    def to_json(self) -> str:
        """Text that :meth:`from_json` reads."""
        tree = {
            "shards": [[shard.uri, shard.pairs] for shard in self.shards],
            "nouns": self.nouns.to_json(),
            "tokenizer": self.tokenizer.__getstate__(),
        }
        return json.dumps(tree)

    @classmethod
    def from_json(cls, text: str) -> Prepared:
        """What :meth:`to_json` wrote."""
        tree = json.loads(text)
        shards = tuple(Shard(uri, pairs) for uri, pairs in tree["shards"])
        return cls(shards, NounPhrases.from_json(tree["nouns"]), FixedTokenizer(**tree["tokenizer"]))
