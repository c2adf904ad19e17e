"""Signal handlers of ours: taken back, and never a child's."""

from __future__ import annotations

import os
import signal
import socket

from mprpc.signals import SignalHandlers


def test_what_was_there_before_is_back() -> None:
    before = signal.getsignal(signal.SIGUSR1), signal.set_wakeup_fd(-1)
    signal.set_wakeup_fd(before[1])
    came: list[int] = []
    reader, writer = socket.socketpair()
    with reader, writer:
        handlers = SignalHandlers(lambda number, frame: came.append(number), (signal.SIGUSR1,), writer)
        try:
            os.kill(os.getpid(), signal.SIGUSR1)
            assert reader.recv(1) == bytes([signal.SIGUSR1])
            assert came == [signal.SIGUSR1]
        finally:
            handlers.restore()
            handlers.restore()  # a second time does nothing
    assert (signal.getsignal(signal.SIGUSR1), signal.set_wakeup_fd(before[1])) == before


def test_a_signal_that_comes_while_it_forks_is_the_childs() -> None:
    """It used to be lost: it ran the parent's handler in the child, and woke the parent."""
    came: list[int] = []
    reader, writer = socket.socketpair()
    with reader, writer:
        handlers = SignalHandlers(lambda number, frame: came.append(number), (signal.SIGUSR1,), writer)
        try:
            child = os.fork()
            if child == 0:
                signal.pause()
                os._exit(1)
            os.kill(child, signal.SIGUSR1)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGUSR1
            reader.setblocking(False)
            try:
                assert reader.recv(1) == b""
            except BlockingIOError:
                assert came == []
        finally:
            handlers.restore()
