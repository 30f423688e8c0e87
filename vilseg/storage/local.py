"""Local files: listing, paths that can be stored as text, and error messages; used only inside `vilseg.storage`."""

import os
from collections.abc import Callable, Iterator
from urllib.parse import quote


def walk(root: str, after: str, enter: Callable[[str], bool]) -> Iterator[tuple[str, int]]:
    """Yield (path relative to ``root``, size in bytes) of the files after the path ``after``, in the order of S3 keys.

    Only the listings of the current folder and its parents are in memory. Symbolic links are followed, except to a folder that
    contains the link. A file that was deleted meanwhile and a broken link have size 0. Other irregular files are skipped.

    Args:
        root: absolute path of the folder.
        after: relative path after which the listing starts; "" lists all files.
        enter: function called with the path of each folder relative to ``root``; the folder is skipped if it returns False.

    Raises:
        OSError: a folder cannot be listed; the attribute ``filename`` is its path.
    """
    stack = [("", iter(_names(root)), _identity(root))]
    while stack:
        folder, names, _ = stack[-1]
        name = next(names, None)
        if name is None:
            stack.pop()
        elif name.endswith("/"):
            below = folder + name
            # A folder that contains `after` still has later files.
            if (below > after or after.startswith(below)) and enter(below[:-1]):
                identity = _identity(os.path.join(root, below))
                if all(identity != above for *_, above in stack):
                    stack.append((below, iter(_names(os.path.join(root, below))), identity))
        elif folder + name > after:
            yield folder + name, _size(os.path.join(root, folder + name))


def _names(folder: str) -> list[str]:
    """Return the sorted names in ``folder``, with "/" at the end of folder names, because S3 keys are sorted like that."""
    with os.scandir(folder) as entries:
        kinds = ((e.name, e.is_dir(), e.is_file() or _leads_nowhere(e)) for e in entries)
        return sorted(f"{name}/" if is_dir else name for name, is_dir, is_file in kinds if is_dir or is_file)


def _leads_nowhere(entry: os.DirEntry[str]) -> bool:
    return entry.is_symlink() and not os.path.exists(entry.path)


def _identity(folder: str) -> tuple[int, int]:
    status = os.stat(folder)
    return status.st_dev, status.st_ino


def _size(path: str) -> int:
    try:
        return os.stat(path).st_size
    except OSError:
        return 0  # reading the file will raise the error


def portable(path: str) -> str:
    """Return ``path``, or a ``file://`` URI of it if it is not valid UTF-8 and so could not be stored in Parquet or JSON."""
    try:
        path.encode()
    except UnicodeEncodeError:
        return f"file://{quote(os.fsencode(path))}"
    return path


def sentence(uri: str, path: str, action: str, error: Exception) -> str:
    """Describe ``error`` in a sentence; ``action`` ("read", "write", ...) failed on ``uri``, whose absolute path is ``path``."""
    if isinstance(error, FileNotFoundError):
        return f"{uri} does not exist"
    if isinstance(error, PermissionError):
        return f"cannot {action} {uri}: this user has no permission to"
    if isinstance(error, NotADirectoryError | FileExistsError):
        return f"cannot {action} {uri}: a part of its path is a file, not a folder"
    if os.path.isdir(path):
        return f"cannot {action} {uri}: it is a folder, and a file is wanted here"
    detail = getattr(error, "strerror", None) or str(error)
    return f"cannot {action} {uri}: {detail}"
