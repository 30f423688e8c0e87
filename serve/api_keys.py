"""API keys, stored as hashes: a text file with one ``NAME:HASH`` per line."""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
import time

from vilseg import storage
from vilseg.errors import ConfigError, UserError

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}")
_LINE = re.compile(r"([^:\s]+):([0-9a-f]{64})")
_REFRESH = 15.0
"""Seconds between two reads of the key file, which is read again so that keys can be added and removed while the server runs."""


def add_key(uri: str, name: str) -> str:
    """Generate a key, append its hash to a key file and return the key, which cannot be recovered from the file.

    Args:
        uri: URI of the key file; created if it does not exist.
        name: Name of the holder, up to 64 letters, digits and ``. _ @ -``.

    Raises:
        ConfigError: ``name`` is invalid or already in the file, or the file is not a key file.
        StorageError: The file cannot be read or written.
    """
    if not _NAME.fullmatch(name):
        raise ConfigError(f"'{name}' is no name for a key; use up to 64 letters, digits and . _ @ -")
    hashes = _read(uri) if storage.exists(uri) else {}
    if name in hashes:
        raise ConfigError(f"{uri} has a key for '{name}' already; delete its line first")
    key = f"vs_{secrets.token_urlsafe(32)}"
    lines = [f"{holder}:{digest}" for holder, digest in {**hashes, name: _digest(key)}.items()]
    storage.write_text(uri, "\n".join(lines) + "\n")
    return key


class ApiKeys:
    """API keys that a server accepts.

    Args:
        uri: URI of a key file that `add_key` wrote.

    Raises:
        ConfigError: The file is not a key file, or contains no key.
        StorageError: The file cannot be read.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     uri = str(Path(directory) / "keys.txt")
        ...     key = add_key(uri, "anna")
        ...     keys = ApiKeys(uri)
        >>> keys.holder(key), keys.holder("wrong")
        ('anna', None)
    """

    def __init__(self, uri: str) -> None:
        self._uri = uri
        self._hashes = _read(uri)
        self._read_at = time.monotonic()

    def holder(self, key: str) -> str | None:
        """Return the name of the holder of ``key``, or None if the key is not valid; compare in constant time."""
        # A key has 256 random bits, so one round of SHA-256 protects it as well as a slow password hash would.
        digest, found = _digest(key), None
        for name, known in self._hashes.items():
            if hmac.compare_digest(digest, known):
                found = name
        return found

    def is_stale(self) -> bool:
        """Return True if the key file was last read more than `_REFRESH` seconds ago, so that `refresh` is due."""
        return time.monotonic() - self._read_at > _REFRESH

    def refresh(self) -> None:
        """Read the key file again.

        Raises:
            ConfigError: The file cannot be read; the keys are unchanged.
        """
        self._read_at = time.monotonic()
        try:
            self._hashes = _read(self._uri)
        except UserError as error:
            raise ConfigError(f"the keys stay as they were: {error}") from error


def _read(uri: str) -> dict[str, str]:
    hashes: dict[str, str] = {}
    for number, line in enumerate(storage.read_text(uri).splitlines(), 1):
        if not line.strip() or line.startswith("#"):
            continue
        match = _LINE.fullmatch(line.strip())
        if match is None:
            raise ConfigError(f"{uri}, line {number} is not NAME:HASH; make keys by: vilseg key NAME --file {uri}")
        hashes[match[1]] = match[2]
    if not hashes:
        raise ConfigError(f"{uri} holds no key; make one by: vilseg key NAME --file {uri}")
    return hashes


def _digest(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()
