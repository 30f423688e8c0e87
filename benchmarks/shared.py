"""The photos that some benchmarks need."""

from __future__ import annotations

import os
from pathlib import Path

from vilseg.errors import DataError

DATA_VARIABLE = "VILSEG_SHARED_DATA"


def shared_data(*needed: str) -> Path:
    """The folder that ``VILSEG_SHARED_DATA`` names, with ``needed`` in it.

    Raises:
        DataError: it is not set, or a folder is not there.
    """
    folder = os.environ.get(DATA_VARIABLE)
    if not folder:
        raise DataError(f"{DATA_VARIABLE} is not set; it names the folder with {', '.join(needed)}")
    for name in needed:
        if not (Path(folder) / name).is_dir():
            raise DataError(f"there is no {name} in {folder}, which {DATA_VARIABLE} names")
    return Path(folder)
