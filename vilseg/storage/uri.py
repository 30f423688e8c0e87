"""Functions on URIs, which are a plain path, ``file:///path`` or ``s3://bucket/key``, without access to storage.

The functions return plain paths or ``s3://`` URIs.
"""

import os
import re
from urllib.parse import unquote_to_bytes

from vilseg.errors import StorageError

_SCHEME = re.compile(r"^([A-Za-z][A-Za-z0-9+.\-]*)://")


def split(uri: str) -> tuple[str, str]:
    """Split a URI into ``("file", path)``, with the path unchanged, or ``("s3", "bucket/key")``.

    Raises:
        StorageError: ``uri`` is neither a path nor a valid ``file://`` or ``s3://`` URI.

    Example:
        >>> split("s3://pairs/2024/"), split("file:///data/a%20b")
        (('s3', 'pairs/2024'), ('file', '/data/a b'))
    """
    match = _SCHEME.match(uri)
    if match is None:
        if not uri:
            raise StorageError("an empty text is not a path or URI: give a path, file:///path or s3://bucket/key")
        return "file", uri
    scheme, rest = match.group(1).lower(), uri[match.end() :]
    if scheme == "file":
        host, slash, path = rest.partition("/")
        if host not in ("", "localhost") or not slash:
            raise StorageError(f"{uri}: a file URI has three slashes and an absolute path, as in file:///data/pairs")
        return "file", os.fsdecode(unquote_to_bytes(slash + path))
    if scheme != "s3":
        raise StorageError(f"{uri}: {scheme}:// is not supported; give a plain path, file:///path or s3://bucket/key")
    path = rest.strip("/")
    if not path or "//" in path:
        problem = "has an empty part" if path else "names no bucket"
        raise StorageError(f"{uri} {problem}: an object's URI reads s3://bucket/key")
    return "s3", path


def is_local(uri: str) -> bool:
    """Return True if ``uri`` is a path on this machine."""
    return split(uri)[0] == "file"


def absolute(uri: str) -> str:
    """Return ``uri`` as an ``s3://`` URI or an absolute local path with ``~`` expanded, which is valid in every process."""
    scheme, path = split(uri)
    return f"s3://{path}" if scheme == "s3" else os.path.abspath(os.path.expanduser(path))


def join(uri: str, *parts: str) -> str:
    """Return ``uri`` with path components appended; their leading and trailing slashes are ignored.

    Example:
        >>> join("s3://runs/demo/", "model", "config.json")
        's3://runs/demo/model/config.json'
    """
    scheme, path = split(uri)
    below = [part.strip("/") for part in parts if part.strip("/")]
    return "/".join([f"s3://{path}", *below]) if scheme == "s3" else os.path.join(path, *below)


def name(uri: str) -> str:
    """Return the last component of ``uri``: ``"demo"`` for ``runs/demo/``."""
    return os.path.basename(absolute(uri))


def parent(uri: str) -> str:
    """Return ``uri`` without its last component; a bucket and the root folder are their own parents."""
    full = absolute(uri)
    return full if full.startswith("s3://") and full.count("/") == 2 else os.path.dirname(full)


def overlap(one: str, other: str) -> bool:
    """Return True if two URIs are equal or one is under the other; symbolic links are not followed."""
    one, other = (f"{absolute(uri).rstrip('/')}/" for uri in (one, other))
    return one.startswith(other) or other.startswith(one)
