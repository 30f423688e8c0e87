"""Where an export goes: the names of its files, what it may replace, and how it appears whole."""

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
"""Added to the name of an ONNX file for that of its weights, where these are too large for it."""
_OURS = {
    DESCRIPTION,
    STATISTICS,
    *(f"{tower}{end}" for tower in (IMAGE_TOWER, TEXT_TOWER) for end in ("", WEIGHTS_BESIDE)),
}


def check_target(out: str, *, overwrite: bool = False) -> None:
    """Say now whether an export can go to ``out``; what no export wrote is never replaced.

    Raises:
        StorageError: there is a file, an export and no ``overwrite``, or anything else; or the place cannot be reached.
    """
    storage.require_bucket(out)
    if not storage.exists(out):
        return
    if not storage.is_folder(out):
        raise StorageError(f"{out} is a file; give a folder for the export")
    found = False
    for entry in storage.stream_files(out):
        if entry.relative not in _OURS and not entry.relative.startswith(f"{TOKENIZER}/"):
            raise StorageError(f"{out} holds {entry.relative}, which no export wrote; choose another --out")
        found = True
    if found and not overwrite:
        raise StorageError(f"{out} holds an export already; replace it by --overwrite or choose another --out")


@contextmanager
def output_folder(out: str) -> Iterator[Path]:
    """A local folder to fill that takes the place of what is at ``out`` only if the block ends without an exception.

    On this machine it appears whole, by its renaming. An object store renames nothing: there the old files are deleted, and of
    the new ones the description comes after all others.

    Raises:
        StorageError: it cannot be written.
    """
    try:
        with _replacing(out) if storage.is_local(out) else _sending(out) as folder:
            yield folder
    except OSError as error:
        raise StorageError(f"cannot write {out}: {error.strerror or error}") from error


@contextmanager
def _replacing(out: str) -> Iterator[Path]:
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
def _sending(out: str) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="vilseg-") as scratch:
        folder = Path(scratch) / "folder"
        folder.mkdir()
        yield folder
        last = (folder / DESCRIPTION).rename(Path(scratch) / DESCRIPTION)
        storage.delete(out)
        storage.upload_folder(folder, out)
        storage.write_bytes(storage.join(out, DESCRIPTION), last.read_bytes())
