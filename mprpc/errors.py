"""The error tree and the status codes: what a call can end with, and whether trying again is safe.

Every failure that a caller sees is an `RpcError` with a `Status`; errors of the operating system, of kazoo and of
protobuf never escape as such.

    Exception
    ├── RpcError                          .status, .text, .not_run, .details
    │   ├── Cancelled                     CANCELLED
    │   ├── InvalidArgument               INVALID_ARGUMENT      (also a ValueError)
    │   ├── DeadlineExceeded              DEADLINE_EXCEEDED     (also a TimeoutError)
    │   ├── NotFound                      NOT_FOUND
    │   ├── AlreadyExists                 ALREADY_EXISTS
    │   ├── PermissionDenied              PERMISSION_DENIED     (also a PermissionError)
    │   ├── ResourceExhausted             RESOURCE_EXHAUSTED
    │   ├── FailedPrecondition            FAILED_PRECONDITION
    │   ├── Aborted                       ABORTED
    │   ├── OutOfRange                    OUT_OF_RANGE
    │   ├── Unimplemented                 UNIMPLEMENTED         (also a NotImplementedError)
    │   ├── Internal                      INTERNAL
    │   ├── Unavailable                   UNAVAILABLE           (also a ConnectionError)
    │   ├── DataLoss                      DATA_LOSS
    │   └── Unauthenticated               UNAUTHENTICATED
    └── ConfigError                       a configuration that can't be used; its text names file, line and key

`RpcError(Status.NOT_FOUND, "no such user")` builds the class that fits the status and is the same as
`NotFound("no such user")`, so `except NotFound` works however the error was made. Which statuses a caller may retry is
said at each member of `Status`; `not_run` is stronger: the framework itself says that the handler never started.
"""

from __future__ import annotations

from enum import IntEnum

__all__ = [
    "Aborted",
    "AlreadyExists",
    "Cancelled",
    "ConfigError",
    "DataLoss",
    "DeadlineExceeded",
    "FailedPrecondition",
    "Internal",
    "InvalidArgument",
    "NotFound",
    "OutOfRange",
    "PermissionDenied",
    "ResourceExhausted",
    "RpcError",
    "Status",
    "Unauthenticated",
    "Unavailable",
    "Unimplemented",
]


class Status(IntEnum):
    """How a call ended: the numbers of google.rpc.Code. In brackets: may the same call be tried again?"""

    OK = 0  # it succeeded
    CANCELLED = 1  # the caller gave up [no: nobody waits for it]
    UNKNOWN = 2  # a status that this version does not know [no]
    INVALID_ARGUMENT = 3  # the request itself is wrong [no: it stays wrong]
    DEADLINE_EXCEEDED = 4  # time ran out; the handler may have run [only if idempotent]
    NOT_FOUND = 5  # the handler says so [no]
    ALREADY_EXISTS = 6  # the handler says so [no]
    PERMISSION_DENIED = 7  # the handler says so [no]
    RESOURCE_EXHAUSTED = 8  # a bound was reached [if not_run: elsewhere, or later]
    FAILED_PRECONDITION = 9  # the system is not in the state for it [no: change the state first]
    ABORTED = 10  # a conflict [yes, from the transaction's start]
    OUT_OF_RANGE = 11  # past the end [no]
    UNIMPLEMENTED = 12  # no such service or method there [no; another provider may have it]
    INTERNAL = 13  # the handler raised; its log has the traceback [only if idempotent]
    UNAVAILABLE = 14  # nobody answered [if not_run or idempotent]
    DATA_LOSS = 15  # the handler says so [no]
    UNAUTHENTICATED = 16  # the handler says so [no]


class RpcError(Exception):
    """A call that failed; what a handler raises to fail one, and what a caller without a controller catches.

    `status` is the canonical code, `text` one line for a person, `not_run` whether the framework knows that the
    handler never started (such a call may be tried elsewhere whatever its method), `details` a serialized
    google.rpc.Status or empty. Immutable in practice and safe to hand between threads.
    """

    status: Status = Status.UNKNOWN

    def __new__(cls, status: Status | int | str = "", text: str = "", **kwargs: object) -> RpcError:
        made = _BY_STATUS.get(status, cls) if cls is RpcError and not isinstance(status, str) else cls
        # OSError's layout wants its own __new__; without arguments, or it would take the status for an errno.
        return OSError.__new__(made) if issubclass(made, OSError) else Exception.__new__(made)

    def __init__(
        self, status: Status | int | str = "", text: str = "", *, not_run: bool = False, details: bytes = b""
    ) -> None:
        if isinstance(status, str):
            text = status  # NotFound("no such user"): the class says the status
        else:
            self.status = Status(status) if status in _NUMBERS else Status.UNKNOWN
        self.text = text
        self.not_run = not_run
        self.details = details
        super().__init__(self.status, self.text)

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild, (int(self.status), self.text, self.not_run, self.details)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.status.name}, {self.text!r}{', not_run=True' if self.not_run else ''})"

    def __str__(self) -> str:
        return f"{self.status.name}: {self.text}" if self.text else self.status.name


def _rebuild(status: int, text: str, not_run: bool, details: bytes) -> RpcError:
    return RpcError(status, text, not_run=not_run, details=details)


class Cancelled(RpcError):
    """The caller cancelled the call, or went away."""

    status = Status.CANCELLED


class InvalidArgument(RpcError, ValueError):
    """The request is wrong whatever the state of the system."""

    status = Status.INVALID_ARGUMENT


class DeadlineExceeded(RpcError, TimeoutError):
    """The deadline passed first; unless `not_run`, the handler may have run all the same."""

    status = Status.DEADLINE_EXCEEDED


class NotFound(RpcError):
    """The handler did not find what was asked for."""

    status = Status.NOT_FOUND


class AlreadyExists(RpcError):
    """What should be made is there already."""

    status = Status.ALREADY_EXISTS


class PermissionDenied(RpcError, PermissionError):
    """The caller is known and may not do this."""

    status = Status.PERMISSION_DENIED


class ResourceExhausted(RpcError):
    """A bound was reached: a full server, a message over the limit, a quota."""

    status = Status.RESOURCE_EXHAUSTED


class FailedPrecondition(RpcError):
    """The system is not in the state that the call needs."""

    status = Status.FAILED_PRECONDITION


class Aborted(RpcError):
    """A conflict with another operation."""

    status = Status.ABORTED


class OutOfRange(RpcError):
    """Past the valid range, in a state that may grow."""

    status = Status.OUT_OF_RANGE


class Unimplemented(RpcError, NotImplementedError):
    """The provider has no such service or method, or not this feature of the protocol."""

    status = Status.UNIMPLEMENTED


class Internal(RpcError):
    """The handler raised, or returned something else than its response; the provider's log says what."""

    status = Status.INTERNAL


class Unavailable(RpcError, ConnectionError):
    """No provider could be reached, or the connection ended before the answer."""

    status = Status.UNAVAILABLE


class DataLoss(RpcError):
    """Data is lost for good."""

    status = Status.DATA_LOSS


class Unauthenticated(RpcError):
    """The caller is not known."""

    status = Status.UNAUTHENTICATED


_NUMBERS = frozenset(int(status) for status in Status)
_BY_STATUS: dict[int, type[RpcError]] = {
    Status.CANCELLED: Cancelled,
    Status.INVALID_ARGUMENT: InvalidArgument,
    Status.DEADLINE_EXCEEDED: DeadlineExceeded,
    Status.NOT_FOUND: NotFound,
    Status.ALREADY_EXISTS: AlreadyExists,
    Status.PERMISSION_DENIED: PermissionDenied,
    Status.RESOURCE_EXHAUSTED: ResourceExhausted,
    Status.FAILED_PRECONDITION: FailedPrecondition,
    Status.ABORTED: Aborted,
    Status.OUT_OF_RANGE: OutOfRange,
    Status.UNIMPLEMENTED: Unimplemented,
    Status.INTERNAL: Internal,
    Status.UNAVAILABLE: Unavailable,
    Status.DATA_LOSS: DataLoss,
    Status.UNAUTHENTICATED: Unauthenticated,
}


class ConfigError(ValueError):
    """A configuration that can't be used. The text is one line for a person and names file, line number and key."""
