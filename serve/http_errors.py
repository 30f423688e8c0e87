"""Errors of the HTTP API, each with a status, a code and a sentence."""

from __future__ import annotations

from vilseg.api_schema import Error, ErrorBody


class HttpError(Exception):
    """Error that becomes an HTTP error response.

    Args:
        status: HTTP status: 4xx if the caller can correct the request, 503 if a later attempt may succeed.
        code: Machine-readable error code in snake_case.
        message: One sentence for people, without paths of the server.
        retry_after: Seconds to wait before another attempt; None sends no ``Retry-After`` header.

    Example:
        >>> HttpError(404, "unknown_model", "There is no such model.").body(request_id="1")
        b'{"error":{"code":"unknown_model","message":"There is no such model.","request_id":"1"}}'
    """

    def __init__(self, status: int, code: str, message: str, *, retry_after: int | None = None) -> None:
        super().__init__(message)
        self.status, self.code, self.message, self.retry_after = status, code, message, retry_after

    def to_schema(self, request_id: str) -> ErrorBody:
        """Convert into the error object of a response body."""
        return ErrorBody(code=self.code, message=self.message, request_id=request_id)

    def body(self, request_id: str) -> bytes:
        """Encode as the JSON body of a response."""
        return Error(error=self.to_schema(request_id)).to_json()


def overloaded_error() -> HttpError:
    """Return the error for a request that arrives while all replicas are busy and the queue is full."""
    return HttpError(503, "overloaded", "The server is busy; try again in a moment.", retry_after=1)


def unavailable_error() -> HttpError:
    """Return the error for a request whose model no replica can currently serve."""
    sentence = "The model is not available at the moment; try again later."
    return HttpError(503, "unavailable", sentence, retry_after=10)


def internal_error() -> HttpError:
    """Return the error for an unexpected exception in the server, whose cause is only in the log."""
    return HttpError(500, "internal", "Something went wrong here; the server's log has the request id.")


def unknown_video_error() -> HttpError:
    """Return the error for a video id that does not exist, or whose video was deleted."""
    return HttpError(404, "unknown_film", "There is no such video; it may have been deleted after its time.")
