"""What a caller is told when there is no answer."""

from __future__ import annotations

import json


class HttpError(Exception):
    """A status, a code for programs and a sentence for people.

    Args:
        status: of HTTP: 4xx where the caller can mend it, 503 where a later try may succeed.
        code: short, in snake_case.
        message: one sentence without paths of this machine.
        retry_after: seconds to wait before another try.
    """

    def __init__(self, status: int, code: str, message: str, *, retry_after: int | None = None) -> None:
        super().__init__(message)
        self.status, self.code, self.message, self.retry_after = status, code, message, retry_after

    def body(self, request_id: str) -> bytes:
        """The JSON that every refusal has."""
        error = {"code": self.code, "message": self.message, "request_id": request_id}
        return json.dumps({"error": error}).encode()


def overloaded_error() -> HttpError:
    """All replicas are busy and enough others wait."""
    return HttpError(503, "overloaded", "The server is busy; try again in a moment.", retry_after=1)


def internal_error() -> HttpError:
    """A fault of ours; the error itself is in the log alone."""
    return HttpError(500, "internal", "Something went wrong here; the server's log has the request id.")


def unknown_video_error() -> HttpError:
    """No film has this id, or not any more."""
    return HttpError(404, "unknown_film", "There is no such film; it may have been deleted after its time.")
