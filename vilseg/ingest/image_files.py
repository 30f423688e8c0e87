"""Resolution of the image paths in caption files, and construction of the keys of pairs."""

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
    """Resolver of the image paths in caption files.

    Args:
        root: folder of the source.
        files: all files under ``root``. If None, they are listed only when the first image is not at the path in its caption
            file.
    """

    def __init__(self, root: str, files: list[storage.FileEntry] | None = None):
        self.root = root
        self._files = files
        self._as_written: bool | None = None if files is None else False

    @cached_property
    def uris(self) -> dict[str, None]:
        """URIs of all image files under the root folder, sorted by path (the keys of a dictionary, for fast lookup)."""
        files = storage.list_files(self.root) if self._files is None else self._files
        return dict.fromkeys(with_suffix(files, IMAGE_SUFFIXES))

    @cached_property
    def _by_name(self) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {}
        for uri in self.uris:
            found.setdefault(posixpath.basename(uri), []).append(uri)
        return found

    def find(self, folder: str, path: str) -> str:
        """Return the URI of an image from its ``path`` in a caption file in ``folder``.

        The path may be absolute, or relative to ``folder`` or to the root folder. Otherwise it may be the end of a file's path;
        of several such files, the one with the fewest parent folders is returned. If no file matches, the URI relative to
        ``folder`` is returned.

        Raises:
            DataError: several files at the same depth match.
        """
        if "://" in path:
            return path
        if path.startswith(("/", "~")):
            return storage.absolute(path)
        if "\\" in path and resolve(folder, path) not in self.uris:  # a Windows path, not a backslash in a file name
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
    """Return the path of an image relative to ``root``, without its suffix; the full path if it is not under ``root``."""
    return posixpath.splitext(relative(uri, root))[0]


def relative(uri: str, root: str) -> str:
    """Return ``uri`` relative to ``root``; if it is not under ``root``, return it without its scheme."""
    below = uri.removeprefix(root.rstrip("/") + "/")
    return below.partition("://")[2] or below


def clean_key(text: str) -> str:
    """Convert ``text`` to a valid key of a pair, without the path components "." and "..", and without dots in the name.

    Readers of tar shards split a member's name at the first dot.
    """
    printable = re.sub(r"[\x00-\x1f\x7f]", "_", text.encode("utf-8", "replace").decode())
    parts = [part for part in printable.split("/") if part not in ("", ".", "..")]
    return "/".join([*parts[:-1], parts[-1].replace(".", "_")]) if parts else "image"


def unique_key(key: str, taken: set[str]) -> str:
    """Return ``key`` if it is not in ``taken``, otherwise the first unused of ``key-2``, ``key-3``, …; add it to ``taken``."""
    numbered = (f"{key}-{number}" for number in itertools.count(2))
    free = next(candidate for candidate in itertools.chain([key], numbered) if candidate not in taken)
    taken.add(free)
    return free


def resolve(folder: str, path: str) -> str:
    """Return the URI of ``path`` relative to ``folder``, with ".." components resolved."""
    scheme, mark, rest = storage.join(folder, path).rpartition("://")
    return scheme + mark + posixpath.normpath(rest)


def with_suffix(files: Iterable[storage.FileEntry], suffixes: tuple[str, ...]) -> list[str]:
    """Return the URIs of the files with one of ``suffixes``, ignoring case."""
    return [file.uri for file in files if file.relative.lower().endswith(suffixes)]
