"""Streaming listing of the inputs of bulk segmentation: folders, prefixes, globs, lists and single files in one call.

:func:`scan` yields the first image while the rest is still being listed, so an archive of any size starts at once and no
list of it is held in memory.
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
    """Yield everything to be segmented at ``inputs``, in the order of the inputs and their listings, while they are listed.

    A folder, prefix or glob yields all files below it except those whose suffix or name is not that of an image; hidden
    folders are skipped. The lines of a list (``.txt``, ``.lst``) are paths relative to its folder, or URIs; blank lines and
    those that begin with "#" are skipped. An existing path is never read as a glob. A file reached twice under one name is
    yielded once. Inside `storage.retrying`, a listing that is interrupted resumes after the last key; a store that does not
    respond at the start is an error at once.

    Args:
        inputs: local paths and ``s3://`` URIs.
        columns: names of the columns of Parquet files.

    Raises:
        DataError: no input; nothing found at one of them, once its listing has ended; two files with one name.
        StorageError: an input does not exist or cannot be listed.
    """
    if not inputs:
        raise DataError(f"no input is given: name {_EXPECTED}")
    # All of them before any work, so that a mistake in the last one is reported at once.
    with storage.retrying(seconds=0):
        places = [_Place(given) for given in inputs]

    def every() -> Iterator[Input | Container]:
        for place in places:
            yield from _at(place, columns or ColumnsConfig())

    # One folder cannot hold two files of one name, so no names need to be remembered.
    names = _Names(every) if len(inputs) > 1 or _is_list(inputs[0]) else None
    for found in every():
        if names is None or names.is_new(found):
            yield found


def fixed_part(given: str) -> str:
    """Return the folder or file that an input refers to: for a glob, the folder before its first wildcard."""
    place = _Place(given)
    return place.glob.folder if place.glob else place.root


class _Place:
    """Resolved location of one of the inputs."""

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
        """Yield the files to consider, each once."""
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
    """Skip the Parquet file next to a tar or folder of the same name, in which img2dataset describes it.

    Names with the same stem followed by a dot or slash are adjacent in every listing order, so a Parquet file
    waits for few others. Some stores list the folder first.
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
    """Pattern below a folder without wildcards; files below a matching folder match as well.

    States are sets of the numbers of pattern parts that a path may have consumed; the path matches if all parts are
    consumed.
    """

    def __init__(self, pattern: str) -> None:
        scheme = _SCHEME.match(pattern)
        start = scheme.end() if scheme else 0
        parts = pattern[start:].split("/")
        fixed = 1  # the bucket, or the part before the root's slash
        while fixed < len(parts) - 1 and self._is_literal(parts[fixed], pattern[:start] + "/".join(parts[: fixed + 1])):
            fixed += 1
        self.folder = pattern[:start] + "/".join(parts[:fixed]) or "/"
        self.beginning = _WILD.split(parts[fixed], maxsplit=1)[0]
        """Common prefix of every relative path that can match."""
        # ** is any number of folders.
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
        """Return ``states`` and those after each ``**``, which may match no folder."""
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
    """Inputs listed in a text file; a line that is no supported URI becomes an input with a problem."""
    folder, number = storage.parent(uri), 0
    # A copy, because a connection would stay open for as long as the images take.
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
    """Detects files that are reached twice, and refuses different files with one name; holds hashes only.

    Args:
        again: lists everything anew, to find the first file with a name.
    """

    def __init__(self, again: Callable[[], Iterator[Input | Container]]) -> None:
        self._again = again
        self._hashes = Hashes()

    def is_new(self, found: Input | Container) -> bool:
        """Return whether the input was not seen before; raises `DataError` if another one has its name."""
        is_new_name = self._hashes.add(hash(found.name))
        is_new_pair = self._hashes.add(hash((found.name, found.uri)))
        if is_new_name or not is_new_pair:
            return is_new_name
        first = next((other for other in self._again() if other.name == found.name), found)
        if first.uri == found.uri:
            return True  # equal hashes of two names, once in a thousand archives of a hundred million files
        raise DataError(
            f"{first.uri} and {found.uri} would both be written as {found.name}; "
            "segment the folder above them, or one at a time"
        )
