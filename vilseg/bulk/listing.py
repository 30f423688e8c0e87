"""Streaming listing of the inputs of bulk segmentation: folders, S3 prefixes, globs, list files and single files.

:func:`scan` yields the first image while the rest is still being listed, so segmentation of an archive of any size starts
immediately, and the listing is not held in memory.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack

from vilseg import storage
from vilseg.bulk.containers import Container, Hashes, Input, safe_name
from vilseg.bulk.file_types import is_hidden_folder, is_tried, suffix_of
from vilseg.config.data import ColumnsConfig
from vilseg.data.shards import PARQUET, TAR
from vilseg.errors import DataError, StorageError
from vilseg.ingest.image_files import resolve

__all__ = ["Container", "Input", "fixed_part", "scan"]

_LIST_SUFFIXES = frozenset({".txt", ".lst"})
_LONGEST_LINE = 1 << 16
_WILD = re.compile(r"[*?[]")
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.\-]*://")
_EXPECTED = (
    "pictures, videos, .tar or .parquet files, a folder, prefix or glob (*, ?, [..], **) of them, "
    "or a .txt or .lst file with a path or URI a line"
)


def scan(inputs: Sequence[str], columns: ColumnsConfig | None = None) -> Iterator[Input | Container]:
    """Yield all files to be segmented at ``inputs`` while they are listed, in the order of the inputs and of their listings.

    - A folder, prefix or glob yields all files under it except those whose name identifies another type than image, video
      or container (see `vilseg.bulk.file_types`). Hidden folders are skipped. An existing path is never read as a glob.
    - A list file (``.txt``, ``.lst``) has one path, relative to its folder, or URI per line. Blank lines and lines that begin
      with "#" are skipped.
    - A file that is listed twice with the same name is yielded once.
    - Inside `storage.retrying`, an interrupted listing resumes after the last file. A store that does not respond at the start
      is an error without a retry.

    Args:
        inputs: local paths and ``s3://`` URIs of folders, prefixes, globs, list files and single files.
        columns: names of the columns of Parquet files; None takes the default names.

    Raises:
        DataError: ``inputs`` is empty; the listing of an input has ended without a file; or two files have the same name.
        StorageError: an input does not exist or cannot be listed.
    """
    if not inputs:
        raise DataError(f"no input is given: name {_EXPECTED}")
    # Resolve all inputs before any work, so that a mistake in the last one is reported immediately.
    with storage.retrying(seconds=0):
        places = [_Place(given) for given in inputs]

    def every() -> Iterator[Input | Container]:
        for place in places:
            yield from _at(place, columns or ColumnsConfig())

    # A single folder cannot contain two files of the same name, so names need not be remembered.
    names = _Names(every) if len(inputs) > 1 or _is_list(inputs[0]) else None
    for found in every():
        if names is None or names.is_new(found):
            yield found


def fixed_part(given: str) -> str:
    """Return the URI of the folder or file that an input refers to; for a glob, the folder before its first wildcard."""
    place = _Place(given)
    return place.glob.folder if place.glob else place.root


class _Place:
    """Resolved location of one of the inputs: a folder, prefix or file at ``root``, or a glob."""

    def __init__(self, given: str) -> None:
        self.given = given
        self.root = storage.absolute(given)
        self.glob = None
        if not storage.exists(self.root):
            if not _WILD.search(self.root):
                raise StorageError(f"{given} does not exist")
            self.glob = _Glob(self.root)
            if not storage.exists(self.glob.folder):
                raise StorageError(f"nothing matches {given}: {self.glob.folder} does not exist")

    def files(self) -> Iterator[storage.FileEntry]:
        """Yield all files under the folder, prefix or glob, each once."""
        folder = self.glob.folder if self.glob else self.root
        beginning = self.glob.beginning if self.glob else ""
        enters = self.glob.enters if self.glob else lambda folder: not is_hidden_folder(folder)
        return storage.stream_files(folder, prefix=beginning, enter=enters)


def _at(place: _Place, columns: ColumnsConfig) -> Iterator[Input | Container]:
    nothing = True
    for file in _without_tables(place.files()):
        found: Iterable[Input | Container] = ()
        if file.uri == place.root and _is_list(place.root):
            found = _lines(place.root, columns)
        elif is_tried(file.relative) and (place.glob is None or place.glob.takes(file.relative)):
            found = [_found(safe_name(file.relative), file.uri, file.size, columns)]
        for one in found:
            nothing = False
            yield one
    if nothing:
        raise DataError(f"no picture at {place.given}: expected {_EXPECTED}")


def _found(name: str, uri: str, size: int | None, columns: ColumnsConfig) -> Input | Container:
    holds_many = uri.lower().endswith((TAR, PARQUET))
    return Container(name, uri, size, columns) if holds_many else Input(name, uri, size)


def _without_tables(files: Iterator[storage.FileEntry]) -> Iterator[storage.FileEntry]:
    """Skip every Parquet file next to a tar or folder of the same name, for which it is img2dataset's metadata.

    Names with the same stem followed by a dot or slash are adjacent in every listing order, so a Parquet file is held back
    only until the next few files are known. Some stores list the folder first.
    """
    waiting: list[storage.FileEntry] = []
    before = ""
    for file in files:
        still: list[storage.FileEntry] = []
        for table in waiting:
            stem = table.relative[: -len(PARQUET)]
            if not file.relative.startswith((f"{stem}.", f"{stem}/")):
                yield table
            elif not file.relative.startswith(f"{stem}/") and file.relative[len(stem) :].lower() != TAR:
                still.append(table)
        waiting = still
        if not file.relative.lower().endswith(PARQUET):
            yield file
        elif not before.startswith(f"{file.relative[: -len(PARQUET)]}/"):
            waiting.append(file)
        before = file.relative
    yield from waiting


# ---------------------------------------------------------------------------------------------------------- globs


class _Glob:
    """Glob: a literal folder, and a pattern for paths relative to it; files under a matching folder match as well.

    Matching simulates a nondeterministic automaton. A state is the number of pattern components that a path has consumed, and
    a path matches if it can consume all of them.
    """

    def __init__(self, pattern: str) -> None:
        scheme = _SCHEME.match(pattern)
        start = scheme.end() if scheme else 0
        parts = pattern[start:].split("/")
        fixed = 1  # number of literal components; the first is the bucket, or empty before the slash of the root
        while fixed < len(parts) - 1 and self._is_literal(parts[fixed], pattern[:start] + "/".join(parts[: fixed + 1])):
            fixed += 1
        self.folder = pattern[:start] + "/".join(parts[:fixed]) or "/"
        self.beginning = _WILD.split(parts[fixed], maxsplit=1)[0]
        """Common prefix of every relative path that can match."""
        # None stands for "**", any number of folders.
        self._parts = [
            None if part == "**" else re.compile(fnmatch.translate(part)).match for part in parts[fixed:] if part
        ]

    @staticmethod
    def _is_literal(part: str, path: str) -> bool:
        return not _WILD.search(part) or ("*" not in part and "?" not in part and storage.exists(path))

    def _used(self, relative: str) -> set[int]:
        states = self._past_folders({0})
        for name in relative.split("/"):
            following = set()
            for state in states:
                if state == len(self._parts) or (matches := self._parts[state]) is None:
                    following.add(state)
                elif matches(name):
                    following.add(state + 1)
            states = self._past_folders(following)
        return states

    def _past_folders(self, states: set[int]) -> set[int]:
        """Add to ``states`` the states reached by skipping a ``**``, because it may match no folder; return ``states``."""
        for state in sorted(states):
            while state < len(self._parts) and self._parts[state] is None:
                state += 1
                states.add(state)
        return states

    def takes(self, relative: str) -> bool:
        return len(self._parts) in self._used(relative)

    def enters(self, folder: str) -> bool:
        return bool(self._used(folder)) and not is_hidden_folder(folder)


# ---------------------------------------------------------------------------------------------------------- lists


def _is_list(uri: str) -> bool:
    return suffix_of(uri) in _LIST_SUFFIXES


def _lines(uri: str, columns: ColumnsConfig) -> Iterator[Input | Container]:
    """Yield the inputs in a list file; a URI that is not supported becomes an input with a `problem`."""
    folder, number = storage.parent(uri), 0
    # Read a local copy, because a connection would have to stay open until the last image is scheduled.
    with ExitStack() as stack:
        path = stack.enter_context(storage.local_copy(uri))
        file = stack.enter_context(open(path, encoding="utf-8-sig", newline="\n"))
        try:
            while line := file.readline(_LONGEST_LINE):
                number += 1
                if len(line) == _LONGEST_LINE:
                    raise DataError(f"{uri}, line {number} is too long for a path: a list has a path or URI a line")
                line = line.removesuffix("\n").removesuffix("\r")
                if line.strip() and not line.startswith("#"):
                    yield _line(line, folder, columns)
        except UnicodeDecodeError as error:
            raise DataError(f"{uri} is not UTF-8 text after line {number}: save it as UTF-8") from error


def _line(line: str, folder: str, columns: ColumnsConfig) -> Input | Container:
    if not _SCHEME.match(line) and not line.startswith(("/", "~")):
        return _found(safe_name(line), resolve(folder, line), None, columns)
    try:
        place = storage.absolute(line)
    except StorageError as error:
        return Input(safe_name(_below_root(line)), line, problem=str(error))
    return _found(safe_name(_below_root(place)), place, None, columns)


def _below_root(uri: str) -> str:
    return _SCHEME.sub("", uri, count=1).lstrip("/")


# ---------------------------------------------------------------------------------------------------------- names


class _Names:
    """Detector of files that are listed twice, and of different files with the same name; memory holds only hashes.

    Args:
        again: function that repeats the whole listing, used to find the first file with a name for the error message.
    """

    def __init__(self, again: Callable[[], Iterator[Input | Container]]) -> None:
        self._again = again
        self._hashes = Hashes()

    def is_new(self, found: Input | Container) -> bool:
        """Return True if the input was not listed before; raise `DataError` if a different file has the same name."""
        is_new_name = self._hashes.add(hash(found.name))
        is_new_pair = self._hashes.add(hash((found.name, found.uri)))
        if is_new_name or not is_new_pair:
            return is_new_name
        first = next((other for other in self._again() if other.name == found.name), found)
        if first.uri == found.uri:
            return True  # hash collision of two names, expected once in a thousand archives of a hundred million files
        raise DataError(
            f"{first.uri} and {found.uri} would both be written as {found.name}; "
            "segment the folder above them, or one at a time"
        )
