"""Command ``python -m benchmarks NAME --json``, which runs one benchmark and prints its result."""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from pathlib import Path
from typing import Any

from cli import console
from vilseg.errors import UserError

_NAMES = {
    "ablation": "each part of the method, and peers, on scenes: mIoU",
    "bulk": "bulk segmentation against a bare loop, Daft and a DataLoader: photos/s",
    "bulk_scale": "listing and bookkeeping of a million keys: overhead a picture, memory",
    "memory": "what a GPU holds in the paper's setting, with and without sharding: GB, and pairs that fit",
    "checkpoints": "training with checkpoints on S3 against training without: images/s",
    "data_memory": "three epochs of pairs through the reader: memory of the first over that of the last",
    "input_path": "pairs from S3 by Ray Data against a DataLoader with webdataset: photos/s",
    "loss_parity": "every loss of the first steps, bit for bit, against another commit: 1 if equal",
    "losses": "each training loss against a naive version, forward and backward: seconds",
    "quality": "what modes, refinement, synonyms, background and size are worth: mIoU, boundary IoU, ms a picture",
    "real_photos": "train on Flickr8k captions, measure on COCO masks",
    "scaling": "bulk segmentation and training on two single-core nodes against one: images/s",
    "self_training": "a stage with the model's own labels against the same stage without: mIoU",
    "serve": "vilseg serve against the bare segmenter and LitServe: requests/s, latency, overload",
    "train_input": "training steps fed by Ray Data against the same steps on batches in memory",
    "tune": "sweeps: overhead of a trial, and the time that early stopping saves",
    "video": "video segmentation against frame by frame: mIoU, steadiness, cost a frame",
}


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark named in ``arguments`` (default: the command line), and return 0, or 2 if the input is wrong."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Measurements that others can repeat.")
    names = "; ".join(f"{name}: {what}" for name, what in _NAMES.items())
    parser.add_argument("name", choices=_NAMES, help=names)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks"), help="folder for what the run leaves")
    parser.add_argument("--against", metavar="REV", help="loss_parity: the commit to compare with; HEAD without it")
    chosen = parser.parse_args(arguments)
    if chosen.against and chosen.name != "loss_parity":
        parser.error("--against is an option of loss_parity alone")
    options = {"against": chosen.against} if chosen.against else {}
    try:
        with console.logging_to_stderr():
            benchmark = importlib.import_module(f"benchmarks.{chosen.name}")
            result: dict[str, Any] = benchmark.main(chosen.out / chosen.name, **options)
    except UserError as error:
        print(f"benchmarks: {error}", file=sys.stderr)
        return 2
    print(json.dumps(result) if chosen.json else "\n".join(_text(name, value) for name, value in result.items()))
    return 0


def _text(name: str, value: Any) -> str:
    """A figure; or a table, where figures are given for several things by the same names."""
    if not isinstance(value, dict) or not value or not all(isinstance(row, dict) for row in value.values()):
        return f"{name}: {value}"
    columns = list(next(iter(value.values())))
    lines = [
        ["", *columns],
        *([thing, *(str(row.get(column, "")) for column in columns)] for thing, row in value.items()),
    ]
    widths = [max(map(len, cells)) for cells in zip(*lines, strict=True)]
    table = ("  ".join(map(str.ljust, cells, widths)).rstrip() for cells in lines)
    return "\n".join([f"{name}:", *table])


if __name__ == "__main__":
    sys.exit(main())
