"""The error tree: numbers on the wire, classes to catch, and a drawing that can't go out of date."""

from __future__ import annotations

import copy
import pickle
import re

import pytest

from mprpc import errors
from mprpc.errors import ConfigError, NotFound, RpcError, Status, Unavailable

CLASSES = sorted(
    (each for each in vars(errors).values() if isinstance(each, type) and issubclass(each, RpcError)),
    key=lambda each: each.status,
)
CLASSES.remove(RpcError)
STATUSES = [status for status in Status if status not in (Status.OK, Status.UNKNOWN)]


def test_the_numbers_are_those_of_google_rpc_code() -> None:
    assert [(status.name, int(status)) for status in Status] == [
        ("OK", 0),
        ("CANCELLED", 1),
        ("UNKNOWN", 2),
        ("INVALID_ARGUMENT", 3),
        ("DEADLINE_EXCEEDED", 4),
        ("NOT_FOUND", 5),
        ("ALREADY_EXISTS", 6),
        ("PERMISSION_DENIED", 7),
        ("RESOURCE_EXHAUSTED", 8),
        ("FAILED_PRECONDITION", 9),
        ("ABORTED", 10),
        ("OUT_OF_RANGE", 11),
        ("UNIMPLEMENTED", 12),
        ("INTERNAL", 13),
        ("UNAVAILABLE", 14),
        ("DATA_LOSS", 15),
        ("UNAUTHENTICATED", 16),
    ]


def test_the_drawing_is_the_tree() -> None:
    """Every line of the drawing is a class with its status and its second base, and every class is a line."""
    drawn = {}
    for name, status, second in re.findall(
        r"^    │   [├└]── (\w+) +(\w+)(?: +\(also an? (\w+)\))?$", errors.__doc__ or "", re.MULTILINE
    ):
        drawn[name] = (status, second)
    real = {}
    for each in CLASSES:
        assert RpcError in each.__bases__
        others = [base.__name__ for base in each.__bases__ if base is not RpcError]
        real[each.__name__] = (each.status.name, *(others or [""]))
    assert drawn == real
    assert [status for status, _ in drawn.values()] == [status.name for status in STATUSES], "in the statuses' order"
    assert re.findall(r"^    [├└]── (\w+)", errors.__doc__ or "", re.MULTILINE) == ["RpcError", "ConfigError"]


def test_everything_public_is_exported() -> None:
    assert set(errors.__all__) == {"Status", "RpcError", "ConfigError"} | {each.__name__ for each in CLASSES}


@pytest.mark.parametrize("status", STATUSES)
def test_a_status_makes_its_class(status: Status) -> None:
    by_status, by_number = RpcError(status, "x"), RpcError(int(status), "x")
    (fitting,) = [each for each in CLASSES if each.status is status]
    by_class = fitting("x")
    for error in (by_status, by_number, by_class):
        assert type(error) is fitting
        assert (error.status, error.text, error.not_run, error.details) == (status, "x", False, b"")
        assert type(error.status) is Status
        assert isinstance(error, RpcError)
        assert str(error) == f"{status.name}: x"


@pytest.mark.parametrize(
    ("name", "builtin"),
    [
        ("InvalidArgument", ValueError),
        ("DeadlineExceeded", TimeoutError),
        ("PermissionDenied", PermissionError),
        ("Unimplemented", NotImplementedError),
        ("Unavailable", ConnectionError),
    ],
)
def test_builtin_handlers_catch_what_they_mean(name: str, builtin: type[Exception]) -> None:
    with pytest.raises(builtin) as caught:
        raise getattr(errors, name)("host:1 is gone", not_run=True)
    error = caught.value
    assert isinstance(error, RpcError)
    assert (error.text, error.not_run, str(error)) == ("host:1 is gone", True, f"{error.status.name}: host:1 is gone")


def test_no_call_error_is_another_ones_builtin() -> None:
    assert not issubclass(NotFound, (OSError, ValueError, LookupError))
    assert not issubclass(Unavailable, (TimeoutError, PermissionError))
    assert issubclass(ConfigError, ValueError)
    assert not issubclass(ConfigError, RpcError)


def test_an_errno_is_never_made_of_a_status() -> None:
    """OSError takes two arguments for (errno, strerror), and picks a class by the errno: 1 is EPERM, 4 is EINTR."""
    for status in STATUSES:
        error = RpcError(status, "x")
        assert getattr(error, "errno", None) is None
        assert getattr(error, "strerror", None) is None


@pytest.mark.parametrize("number", [2, 17, 99, -1, 2**31])
def test_a_number_from_a_newer_version_is_unknown(number: int) -> None:
    error = RpcError(number, "x")
    assert type(error) is RpcError
    assert error.status is Status.UNKNOWN


def test_without_a_text() -> None:
    assert str(NotFound()) == "NOT_FOUND"
    assert str(RpcError(Status.NOT_FOUND)) == "NOT_FOUND"
    assert str(RpcError("only text")) == "UNKNOWN: only text"
    assert repr(NotFound("x")) == "NotFound(NOT_FOUND, 'x')"
    assert repr(RpcError(Status.UNAVAILABLE, "x", not_run=True)) == "Unavailable(UNAVAILABLE, 'x', not_run=True)"


@pytest.mark.parametrize("status", [Status.UNKNOWN, *STATUSES])
def test_errors_travel_between_processes_whole(status: Status) -> None:
    error = RpcError(status, "tëxt", not_run=True, details=b"\x08\x05")
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        for same in (pickle.loads(pickle.dumps(error, protocol)), copy.copy(error), copy.deepcopy(error)):
            assert type(same) is type(error)
            assert vars(same) == vars(error)
            assert same.args == error.args
    made = pickle.loads(pickle.dumps(ConfigError("test.conf:1: x")))
    assert (type(made), str(made)) == (ConfigError, "test.conf:1: x")


def test_a_class_of_ones_own_is_kept() -> None:
    class NoSuchUser(NotFound):
        """What a program derives for its handlers."""

    error = NoSuchUser("x", details=b"d")
    assert (type(error), error.status, error.text, error.details) == (NoSuchUser, Status.NOT_FOUND, "x", b"d")
