"""The errors kvarn raises on purpose: each says what was got, what was expected and what to do about it.

`KvarnError` is what a command prints without a traceback (exit code 2) and what the server turns into an
HTTP 4xx. Anything else that escapes is a bug.
"""


class KvarnError(Exception):
    """Base of every error caused by input or environment rather than by a bug."""


class ModelError(KvarnError):
    """A model cannot be found, read or run: unknown name, corrupt file, unsupported architecture."""


class RequestError(KvarnError):
    """A request asks for something impossible.

    `field` names the offending field as the client wrote it (OpenAI's `param`), `status` is the HTTP status.
    """

    def __init__(self, message: str, *, field: str | None = None, code: str | None = None, status: int = 400) -> None:
        super().__init__(message)
        self.field = field
        self.code = code
        self.status = status


class CapacityError(KvarnError):
    """The machine is too small for what was asked: not one KV block fits, a port is taken."""


class EngineDead(KvarnError):
    """The engine process ended while the request was running; the same request may be sent again."""


class IllegalTransition(RuntimeError):
    """A state machine was asked for a move its table does not have: always a bug."""


def reason(error: Exception) -> str:
    """Why a file could not be read or written, in a message that names the file already."""
    return (isinstance(error, OSError) and error.strerror) or str(error)
