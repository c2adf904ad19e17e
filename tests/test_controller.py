"""The controller by itself; what a call does to one is in test_channel and test_provider."""

from __future__ import annotations

import pytest

from mprpc import MprpcController, Status


def test_new_controller_has_nothing_to_say() -> None:
    controller = MprpcController()
    assert (controller.failed(), controller.error_text(), controller.status) == (False, "", Status.OK)
    assert (controller.peer, controller.timeout, controller.not_run) == ("", None, False)
    assert controller.time_remaining() is None
    assert repr(controller) == "<MprpcController OK>"


def test_set_failed_says_why() -> None:
    controller = MprpcController()
    controller.set_failed("closed today", Status.UNAVAILABLE)
    assert (controller.failed(), controller.error_text(), controller.status) == (
        True,
        "closed today",
        Status.UNAVAILABLE,
    )
    assert repr(controller) == "<MprpcController UNAVAILABLE: closed today>"


def test_set_failed_without_a_status_is_unknown() -> None:
    controller = MprpcController()
    controller.set_failed("somehow")
    assert controller.status is Status.UNKNOWN


@pytest.mark.parametrize(("number", "status"), [(5, Status.NOT_FOUND), (99, Status.UNKNOWN), (-1, Status.UNKNOWN)])
def test_set_failed_takes_numbers(number: int, status: Status) -> None:
    controller = MprpcController()
    controller.set_failed("so", number)
    assert controller.status is status


def test_ok_is_no_failure() -> None:
    controller = MprpcController()
    with pytest.raises(ValueError, match="OK"):
        controller.set_failed("fine", Status.OK)
    assert not controller.failed()


def test_reset_makes_it_new() -> None:
    controller = MprpcController()
    controller.timeout = 3.0
    controller.set_failed("once")
    controller.reset()
    assert (controller.failed(), controller.error_text()) == (False, "")
    assert controller.timeout is None


def test_seeds_spellings() -> None:
    controller = MprpcController()
    controller.SetFailed("no")
    assert (controller.Failed(), controller.ErrorText()) == (True, "no")
    assert controller.status is Status.UNKNOWN
    controller.Reset()
    assert (controller.Failed(), controller.ErrorText()) == (False, "")


def test_two_controllers_share_nothing() -> None:
    one, other = MprpcController(), MprpcController()
    one.set_failed("mine")
    one.timeout = 1.0
    assert not other.failed()
    assert other.timeout is None
