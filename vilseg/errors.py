"""Exceptions for mistakes of a user and failures of the environment; each carries one sentence as its message.

    UserError            the input is wrong: the `vilseg` command prints the sentence and exits with 2
    |- ConfigError       a key or value of a configuration
    |- StorageError      a URI that is missing, refused or unreachable
    |  |- DiskFullError      no disk space is left for a result or a temporary copy
    |  `- StoreUnavailable   the object store does not answer, or reports that it is temporarily unavailable
    |- DataError         image-caption pairs, images, masks or class lists
    |  |- TooLargeError      more pixels than the caller allows
    |  `- FilteredError      a pair that the configured filters leave out
    |- ModelError        a model folder or checkpoint
    `- ClusterError      Ray nodes of this machine

A message says what is wrong, where (file, key, value) and what to do about it. Broken invariants of this code are plain
assertions; any other exception is a failed run (exit code 1).
"""


class UserError(Exception):
    """Error in the user's input; ``str(error)`` is one sentence that can be shown to the user unchanged."""


class ConfigError(UserError):
    """Error for a wrong configuration key or value."""


class StorageError(UserError):
    """Error for a URI that cannot be read or written."""


class DiskFullError(StorageError):
    """Error for a full disk; the data that was read or written is not at fault."""


class StoreUnavailable(StorageError):  # noqa: N818  (a temporary state, see `vilseg.storage.retry`)
    """Error for an object store that does not answer or is temporarily unavailable; the same request may succeed later."""


class DataError(UserError):
    """Error for invalid image-caption pairs, images, masks or class lists."""


class TooLargeError(DataError):
    """Error for an image or video with more pixels than the caller allows."""


class FilteredError(DataError):
    """Error for a valid pair that the configured filters leave out."""


class ModelError(UserError):
    """Error for an invalid model folder or checkpoint."""


class ClusterError(UserError):
    """Error for a Ray cluster on this machine that cannot be started or stopped."""
