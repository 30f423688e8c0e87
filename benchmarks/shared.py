"""Resources shared by several benchmarks: the photos and an embedded object store."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cluster.object_store import ObjectStore
from vilseg.errors import DataError

DATA_VARIABLE = "VILSEG_SHARED_DATA"


def shared_data(*needed: str) -> Path:
    """Return the folder that the environment variable ``VILSEG_SHARED_DATA`` names.

    Args:
        needed: subfolders that it must contain.

    Raises:
        DataError: the variable is not set, or a subfolder is missing.
    """
    folder = os.environ.get(DATA_VARIABLE)
    if not folder:
        raise DataError(f"{DATA_VARIABLE} is not set; it names the folder with {', '.join(needed)}")
    for name in needed:
        if not (Path(folder) / name).is_dir():
            raise DataError(f"there is no {name} in {folder}, which {DATA_VARIABLE} names")
    return Path(folder)


@contextmanager
def embedded_store(folder: Path) -> Iterator[None]:
    """Run an empty object store in ``folder`` within the ``with`` block; existing content is deleted.

    The ``AWS_*`` environment variables of this process are set to the store, also after the block.
    """
    shutil.rmtree(folder, ignore_errors=True)
    store = ObjectStore.start(folder)
    try:
        os.environ.update(store.environment())
        yield
    finally:
        store.stop()
