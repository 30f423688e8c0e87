"""Memory of the batch reader over several epochs, to show that it does not grow.

A child process reads the pairs; its resident set size is sampled every 10 ms, and the maximum of each epoch is kept. Shards are
read one by one in one run, and four side by side (``shuffle_shards=4``) in another.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vilseg.data.shards import write_index, write_tar
from vilseg.data.synthetic import scenes

_SHARDS, _SHARD_PAIRS, _SIZE = 12, 400, 128
_BATCH, _CANVAS = 64, 112
_EPOCHS = 3


def main(out: Path) -> dict[str, Any]:
    """Run the benchmark.

    Args:
        out: folder for the shards.

    Returns:
        ``ratio`` (memory of the first epoch over memory of the last epoch, the smaller value of the two runs), and
        ``megabytes_by_epoch`` for each run.
    """
    source = write(out.absolute() / "pairs", shards=_SHARDS, pairs=_SHARD_PAIRS)
    megabytes = {mixed: measure(source, mixed=mixed, epochs=_EPOCHS) for mixed in (1, 4)}
    return {
        "benchmark": "data_memory",
        "ratio": round(min(epochs[0] / epochs[-1] for epochs in megabytes.values()), 4),
        "megabytes_by_epoch": {f"shuffle_shards={mixed}": epochs for mixed, epochs in megabytes.items()},
        "pairs": _SHARDS * _SHARD_PAIRS,
        "shards": _SHARDS,
    }


def write(folder: Path, *, shards: int, pairs: int) -> str:
    """Write shards and their index to ``folder``, and return its path.

    Every shard holds the same scenes under other keys, because rendering scenes is slow.

    Args:
        folder: folder for the shards.
        shards: number of shards.
        pairs: number of pairs per shard.
    """
    drawn = [(pair.image, list(pair.captions)) for pair in scenes.pairs(pairs, 0, _SIZE)]
    written = []
    for shard in range(shards):
        members = ((f"{shard}-{n}", image, "jpg", {"captions": texts}) for n, (image, texts) in enumerate(drawn))
        written.append((f"{shard:05d}.tar", write_tar(f"{folder}/{shard:05d}.tar", members)))
    write_index(str(folder), written)
    return str(folder)


def measure(source: str, *, mixed: int, epochs: int) -> list[float]:
    """Return the maximum resident set size in MB of each epoch, measured in a child process.

    Args:
        source: folder of the shards.
        mixed: number of shards read side by side.
        epochs: number of epochs to read.
    """
    command = [sys.executable, "-m", "benchmarks.data_memory", source, str(mixed), str(epochs)]
    done = subprocess.run(command, cwd=Path(__file__).parent.parent, stdout=subprocess.PIPE, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def read_epochs(source: str, mixed: int, epochs: int) -> list[float]:
    """Read all pairs in this process, and return the maximum resident set size in MB of each epoch.

    For the arguments see `measure`.
    """
    from functools import partial

    import numpy as np

    from vilseg.data.batch_reader import BatchReader, decode_to_canvas, index_shards
    from vilseg.data.sampler import PairSampler

    def tokenize(texts: Sequence[str]) -> np.ndarray:
        return np.array([[len(text)] for text in texts], np.int32)

    order = PairSampler(index_shards(source), _BATCH, 0, mixed)
    reader = BatchReader(
        batch_size=_BATCH,
        workers=1,
        seed=0,
        decode=partial(decode_to_canvas, canvas=_CANVAS, max_pixels=10**6),
        tokenize=tokenize,
    )
    steps = order.pairs // _BATCH
    highest = [0.0] * epochs
    done = [0]

    def look() -> None:
        while done[0] < epochs * steps:
            epoch = done[0] // steps
            highest[epoch] = max(highest[epoch], _resident_megabytes())
            time.sleep(0.01)

    watcher = threading.Thread(target=look, daemon=True)
    watcher.start()
    for task in order.read_tasks(0, epochs * steps):
        for _ in reader.read(task):
            done[0] += 1
    watcher.join()
    return [round(value, 1) for value in highest]


def _resident_megabytes() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 2**20


if __name__ == "__main__":
    print(json.dumps(read_epochs(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))))
