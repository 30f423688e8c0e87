"""Errors of the HTTP API, each with a status, a code and a sentence."""

from __future__ import annotations

from vilseg.api_schema import Error, ErrorBody


class HttpError(Exception):
    """An error that is reported to the caller.

    Args:
        status: HTTP status: 4xx if the caller can correct the request, 503 if a later try may succeed.
        code: For programs, in snake_case.
        message: One sentence without paths of this machine.
        retry_after: Seconds to wait before another try.

    Example:
        >>> HttpError(404, "unknown_model", "There is no such model.").body(request_id="1")
        b'{"error":{"code":"unknown_model","message":"There is no such model.","request_id":"1"}}'
    """

    def __init__(self, status: int, code: str, message: str, *, retry_after: int | None = None) -> None:
        super().__init__(message)
        self.status, self.code, self.message, self.retry_after = status, code, message, retry_after

    def to_schema(self, request_id: str) -> ErrorBody:
        """Return the description that goes into a response."""
        return ErrorBody(code=self.code, message=self.message, request_id=request_id)

    def body(self, request_id: str) -> bytes:
        """Return the JSON body of the response."""
        return Error(error=self.to_schema(request_id)).to_json()


def overloaded_error() -> HttpError:
    """Return the error for: all replicas are busy and the queue is full."""
    return HttpError(503, "overloaded", "The server is busy; try again in a moment.", retry_after=1)


def unavailable_error() -> HttpError:
    """Return the error for: no replica holds the model at the moment."""
    sentence = "The model is not available at the moment; try again later."
    return HttpError(503, "unavailable", sentence, retry_after=10)


def internal_error() -> HttpError:
    """Return the error for a fault of the server; its cause is in the log only."""
    return HttpError(500, "internal", "Something went wrong here; the server's log has the request id.")


def unknown_video_error() -> HttpError:
    """Return the error for: no video has this id, or it was deleted."""
    return HttpError(404, "unknown_film", "There is no such video; it may have been deleted after its time.")
