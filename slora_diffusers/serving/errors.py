"""What a request can be told, each with the status code of its answer."""

from __future__ import annotations

from ..errors import SerialLoraError


class RequestError(SerialLoraError):
    """A request that is not served: the message is its answer, with status code 422 unless a subclass says so."""

    status = 422


class UnknownAdapter(RequestError):
    """There is no adapter of that name."""

    status = 404


class NoRoom(RequestError):
    """The adapters do not fit the memory limit, at least not beside those of the batch."""


class Unauthorised(RequestError):
    """The API key is missing or another."""

    status = 401


class NotFound(RequestError):
    """No request of that id is waiting or running."""

    status = 404


class Busy(RequestError):
    """The queue is full."""

    status = 429


class Cancelled(RequestError):
    """The client left, or cancelled the request."""

    status = 499


class Failed(RequestError):
    """The server, not the request, is at fault."""

    status = 500


class Closing(RequestError):
    """The server takes no more requests."""

    status = 503


class TimedOut(RequestError):
    """The request was not done by its deadline."""

    status = 504


def status_of(error: BaseException) -> int:
    """The status code of an error; what this library raises elsewhere (a damaged adapter) is the request's fault."""
    return getattr(error, "status", 422 if isinstance(error, SerialLoraError) else 500)
