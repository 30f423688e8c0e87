"""Image files of a source: which file a caption file means, and the key of the pair that it becomes."""

from __future__ import annotations

import itertools
import posixpath
import re
from collections.abc import Iterable
from functools import cached_property

from vilseg import storage
from vilseg.errors import DataError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")


class ImageFinder:
    """Finds the file that is meant by a path in a caption file.

    Args:
        root: folder of the source.
        files: every file below it where they are listed already; else they are listed only if the first image asked for
            is not where its caption file says.
    """

    def __init__(self, root: str, files: list[storage.FileEntry] | None = None):
        self.root = root
        self._files = files
        self._as_written: bool | None = None if files is None else False

    @cached_property
    def uris(self) -> dict[str, None]:
        """Every image file below the root, in order of path."""
        files = storage.list_files(self.root) if self._files is None else self._files
        return dict.fromkeys(with_suffix(files, IMAGE_SUFFIXES))

    @cached_property
    def _by_name(self) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {}
        for uri in self.uris:
            found.setdefault(posixpath.basename(uri), []).append(uri)
        return found

    def find(self, folder: str, path: str) -> str:
        """The URI of ``path`` as written in a caption file in ``folder``.

        It may be absolute, relative to that folder or to the root, or the end of the path of just one file, the one
        nearest to the root. Where nothing fits, this is the URI at which the file should be.

        Raises:
            DataError: several files could be meant.
        """
        if "://" in path:
            return path
        if path.startswith(("/", "~")):
            return storage.absolute(path)
        if "\\" in path and resolve(folder, path) not in self.uris:  # written on Windows, not part of a name
            path = path.replace("\\", "/")
        direct = resolve(folder, path)
        if self._as_written is None:
            self._as_written = storage.exists(direct)
        if self._as_written or direct in self.uris:
            return direct
        if (from_root := resolve(self.root, path)) in self.uris:
            return from_root
        ending = "/" + posixpath.normpath(path).lstrip("./")
        meant = [uri for uri in self._by_name.get(posixpath.basename(path), []) if uri.endswith(ending)]
        depth = min((uri.count("/") for uri in meant), default=0)
        nearest = [uri for uri in meant if uri.count("/") == depth]
        if len(nearest) > 1:
            raise DataError(f"{path} may mean {' or '.join(nearest[:2])}; write the path from the caption file on")
        return nearest[0] if nearest else direct


def key_of(uri: str, root: str) -> str:
    """The path of an image below ``root``, without its suffix; the whole path if the image lies elsewhere."""
    return posixpath.splitext(relative(uri, root))[0]


def relative(uri: str, root: str) -> str:
    """``uri`` below ``root``; without its scheme if it lies elsewhere."""
    below = uri.removeprefix(root.rstrip("/") + "/")
    return below.partition("://")[2] or below


def clean_key(text: str) -> str:
    """``text`` as the key of a pair: no part "." or "..", and no dot in the name, where tar readers would cut it."""
    printable = re.sub(r"[\x00-\x1f\x7f]", "_", text.encode("utf-8", "replace").decode())
    parts = [part for part in printable.split("/") if part not in ("", ".", "..")]
    return "/".join([*parts[:-1], parts[-1].replace(".", "_")]) if parts else "image"


def unique_key(key: str, taken: set[str]) -> str:
    """``key``, or the first of ``key-2``, ``key-3``, … that is free; it is taken from then on."""
    numbered = (f"{key}-{number}" for number in itertools.count(2))
    free = next(candidate for candidate in itertools.chain([key], numbered) if candidate not in taken)
    taken.add(free)
    return free


def resolve(folder: str, path: str) -> str:
    """The URI of a path relative to ``folder``, with ".." worked out."""
    scheme, mark, rest = storage.join(folder, path).rpartition("://")
    return scheme + mark + posixpath.normpath(rest)


def with_suffix(files: Iterable[storage.FileEntry], suffixes: tuple[str, ...]) -> list[str]:
    """URIs of the files whose names end so, upper or lower case."""
    return [file.uri for file in files if file.relative.lower().endswith(suffixes)]
