"""Files of this machine: listing, portable paths, and sentences for their errors; used by `vilseg.storage` alone."""

import os
from collections.abc import Callable, Iterator
from urllib.parse import quote


def walk(root: str, after: str, enter: Callable[[str], bool]) -> Iterator[tuple[str, int]]:
    """Yield (path below ``root``, size) of the files that come after the path ``after``, in the order in which S3 lists keys.

    Only the names of the folders on the way to the present file are in memory. Links are followed, but not to a folder
    that holds them. A file that is gone by now, or a link to nothing, has size 0. What is no regular file is skipped.

    Args:
        root: absolute path of the folder.
        after: "" for all.
        enter: called with the path below ``root`` of each folder; False skips it.

    Raises:
        OSError: a folder cannot be listed; its ``filename`` says which.
    """
    stack = [("", iter(_names(root)), _identity(root))]
    while stack:
        folder, names, _ = stack[-1]
        name = next(names, None)
        if name is None:
            stack.pop()
        elif name.endswith("/"):
            below = folder + name
            # Of a folder that `after` lies in, a part is still to come.
            if (below > after or after.startswith(below)) and enter(below[:-1]):
                identity = _identity(os.path.join(root, below))
                if all(identity != above for *_, above in stack):
                    stack.append((below, iter(_names(os.path.join(root, below))), identity))
        elif folder + name > after:
            yield folder + name, _size(os.path.join(root, folder + name))


def _names(folder: str) -> list[str]:
    """Return the sorted names in ``folder``; those of folders end in "/", so that the order is that of S3 keys."""
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
        return 0  # reading it will raise the error


def portable(path: str) -> str:
    """Return ``path``, or a ``file://`` URI of it if it is not UTF-8, which neither Parquet nor JSON could hold."""
    try:
        path.encode()
    except UnicodeEncodeError:
        return f"file://{quote(os.fsencode(path))}"
    return path


def sentence(uri: str, path: str, action: str, error: Exception) -> str:
    """Return ``error``, met while ``uri`` (absolute: ``path``) was read, written, ..., as a sentence."""
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
