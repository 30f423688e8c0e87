"""Output directory of an export: names of its files, check that it may be replaced, and atomic replacement."""

from __future__ import annotations

import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vilseg import storage
from vilseg.errors import StorageError

IMAGE_TOWER, TEXT_TOWER, STATISTICS, DESCRIPTION = "image.onnx", "text.onnx", "statistics.npz", "export.json"
TOKENIZER = "tokenizer"
WEIGHTS_BESIDE = ".data"
"""Suffix added to the name of an ONNX file for the second file with its weights, if they are too large for the first."""
_EXPORT_FILES = {
    DESCRIPTION,
    STATISTICS,
    *(f"{tower}{end}" for tower in (IMAGE_TOWER, TEXT_TOWER) for end in ("", WEIGHTS_BESIDE)),
}


def check_target(out: str, *, overwrite: bool = False) -> None:
    """Check that an export may be written to ``out``; files that no export wrote are never replaced.

    Raises:
        StorageError: ``out`` is a file, has files that no export wrote, has an export while ``overwrite`` is
            False, or cannot be reached.
    """
    storage.require_bucket(out)
    if not storage.exists(out):
        return
    if not storage.is_folder(out):
        raise StorageError(f"{out} is a file; give a folder for the export")
    found = False
    for entry in storage.stream_files(out):
        if entry.relative not in _EXPORT_FILES and not entry.relative.startswith(f"{TOKENIZER}/"):
            raise StorageError(f"{out} holds {entry.relative}, which no export wrote; choose another --out")
        found = True
    if found and not overwrite:
        raise StorageError(f"{out} holds an export already; replace it by --overwrite or choose another --out")


@contextmanager
def output_folder(out: str) -> Iterator[Path]:
    """Yield an empty local folder to fill; it replaces ``out`` only if the ``with`` block ends without an exception.

    If ``out`` is on a local disk, the folder is renamed to ``out``, so ``out`` never holds an incomplete export. An object store
    has no renaming: the old files are deleted, then the new ones are uploaded, with ``export.json`` last.

    Raises:
        StorageError: ``out`` cannot be written.
    """
    try:
        with _renamed_into_place(out) if storage.is_local(out) else _uploaded(out) as folder:
            yield folder
    except OSError as error:
        raise StorageError(f"cannot write {out}: {error.strerror or error}") from error


@contextmanager
def _renamed_into_place(out: str) -> Iterator[Path]:
    target = Path(os.path.realpath(storage.absolute(out)))
    partial, old = (target.with_name(f".{target.name}.{secrets.token_hex(4)}.{end}") for end in ("partial", "old"))
    try:
        partial.mkdir(parents=True)
        yield partial
        replaced = target.exists()
        if replaced:
            target.rename(old)
        try:
            partial.rename(target)
        except OSError:
            if replaced:
                old.rename(target)
            raise
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def _uploaded(out: str) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="vilseg-") as scratch:
        folder = Path(scratch) / "folder"
        folder.mkdir()
        yield folder
        last = (folder / DESCRIPTION).rename(Path(scratch) / DESCRIPTION)
        storage.delete(out)
        storage.upload_folder(folder, out)
        storage.write_bytes(storage.join(out, DESCRIPTION), last.read_bytes())
