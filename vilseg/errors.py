"""Exceptions for mistakes of a user and failures of the surroundings; each carries one sentence.

    UserError            the input is wrong: the `vilseg` command prints the sentence and exits with 2
    |- ConfigError       a key or value of a configuration
    |- StorageError      a URI: missing, refused, unreachable
    |  |- DiskFullError      no space is left, for a result or a temporary copy
    |  `- StoreUnavailable   the object store does not answer, or says that it cannot now
    |- DataError         pairs, images, masks, class lists
    |  |- TooLargeError      more pixels than the caller allows
    |  `- FilteredError      a pair that the filters leave out
    |- ModelError        a model folder or checkpoint
    `- ClusterError      Ray nodes of this machine

A message says what is wrong, where (file, key, value) and what to do about it. Broken invariants of this code are plain
assertions; any other exception is a failed run (exit code 1).
"""


class UserError(Exception):
    """The user's input is wrong; ``str(error)`` is one sentence fit to be shown as it is."""


class ConfigError(UserError):
    """A configuration key or value is wrong."""


class StorageError(UserError):
    """A URI cannot be read or written."""


class DiskFullError(StorageError):
    """No space is left on a disk; no fault of what was read or written."""


class StoreUnavailable(StorageError):  # noqa: N818  (a temporary state, see `vilseg.storage.retry`)
    """The object store does not answer, or says that it cannot now; the same request may succeed later."""


class DataError(UserError):
    """Pairs, images, masks or class lists are wrong."""


class TooLargeError(DataError):
    """An image or video has more pixels than the caller allows."""


class FilteredError(DataError):
    """A pair is not wanted, though nothing is wrong with it."""


class ModelError(UserError):
    """A model folder or checkpoint is wrong."""


class ClusterError(UserError):
    """A Ray cluster of this machine cannot be started or ended."""
