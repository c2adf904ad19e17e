"""What can be published and how its handlers answer, for all three kinds of services."""

from __future__ import annotations

import logging
import subprocess
import sys
import threading
import typing
from collections.abc import Awaitable, Callable
from concurrent.futures import Future
from typing import Any, cast

import pytest

import generated
from mprpc.errors import RpcError, Status
from mprpc.service import MethodEntry, Reply, Service, attribute_of, blocking, methods_of

legacy_pb2 = generated.module("legacy_pb2")
streams_pb2 = generated.module("streams_pb2")
user_pb2 = generated.module("user_pb2")

USER = user_pb2.DESCRIPTOR.services_by_name["UserServiceRpc"]


class Controller:
    """As much of MprpcController as a handler's adapter looks at."""

    def __init__(self) -> None:
        self.text = ""

    def SetFailed(self, text: str) -> None:
        self.text = text

    def failed(self) -> bool:
        return bool(self.text)


class UserService(Service):
    DESCRIPTOR = USER

    def Login(self, request: Any, controller: Any) -> Any:
        return user_pb2.LoginResponse(success=request.pwd != b"wrong")

    def Register(self, request: Any, controller: Any) -> Any:
        return user_pb2.RegisterResponse(success=True)


class Oracle(legacy_pb2.Oracle):  # type: ignore[name-defined, misc]
    """A py_generic_services class whose Ask does what a test wants; its Silence is not written."""

    def __init__(self, ask: Callable[..., object]) -> None:
        self.ask = ask

    def Ask(self, controller: Any, request: Any, done: Any) -> Any:
        return self.ask(controller, request, done)


def run(entry: MethodEntry, request: object) -> Any:
    """What a method's handler makes of a request, with a controller of its own."""
    return cast(Any, entry.handler)(request, Controller())


def handler_of(ask: Callable[..., object]) -> Callable[..., Any]:
    return methods_of(Oracle(ask))[0].handler


def test_entries_name_the_service_and_its_messages() -> None:
    login, register = methods_of(UserService())
    assert login[:3] == ("fixbug.UserServiceRpc", "UserServiceRpc", "Login")
    assert login.descriptor.full_name == "fixbug.UserServiceRpc.Login"
    assert (login.request_class, login.response_class) == (user_pb2.LoginRequest, user_pb2.LoginResponse)
    assert register.request_class is user_pb2.RegisterRequest
    assert run(login, user_pb2.LoginRequest(pwd=b"wrong")) == user_pb2.LoginResponse()


def test_generated_base_answers_unimplemented_until_written() -> None:
    user_mprpc = generated.module("user_mprpc")

    class Half(user_mprpc.UserServiceRpc):  # type: ignore[name-defined, misc]
        def Login(self, request: Any, controller: Any) -> Any:
            return user_pb2.LoginResponse(success=True)

    login, register = methods_of(Half())
    assert run(login, user_pb2.LoginRequest()).success
    with pytest.raises(RpcError, match=r"fixbug\.UserServiceRpc\.Register is not implemented") as caught:
        run(register, user_pb2.RegisterRequest())
    assert caught.value.status is Status.UNIMPLEMENTED
    assert Half.GetDescriptor() is Half.DESCRIPTOR


def test_any_object_with_a_descriptor_is_a_service() -> None:
    class Loose:
        DESCRIPTOR = USER

        def __init__(self) -> None:
            self.Register = lambda request, controller, *rest: user_pb2.RegisterResponse()

        @staticmethod
        def Login(request: Any, controller: Any = None) -> Any:
            return user_pb2.LoginResponse(success=True)

    login, _ = methods_of(Loose())
    assert run(login, user_pb2.LoginRequest()).success


def test_a_method_written_in_c_has_no_signature_to_refuse() -> None:
    class Loose(UserService):
        Login = max  # type: ignore[assignment]

    assert methods_of(Loose())[0].handler is max


def test_names_that_python_keeps_have_an_underscore() -> None:
    words = generated.module("import.words_mprpc")
    descriptor = words.Words.DESCRIPTOR
    assert [attribute_of(method) for method in descriptor.methods] == [
        "from_",
        "DESCRIPTOR_",
        "GetDescriptor_",
        "mprpc_",
        "match",
        "_private",
    ]

    class Loud(words.Words):  # type: ignore[name-defined, misc]
        def from_(self, request: Any, controller: Any) -> str:
            return "from"

        def GetDescriptor_(self, request: Any, controller: Any) -> str:
            return "GetDescriptor"

    entries = {entry.name: entry for entry in methods_of(Loud())}
    assert (run(entries["from"], None), run(entries["GetDescriptor"], None)) == (
        "from",
        "GetDescriptor",
    )
    with pytest.raises(RpcError, match=r"Words\.mprpc is not implemented"):
        run(entries["mprpc"], None)


class Missing:
    DESCRIPTOR = USER

    def Login(self, request: Any, controller: Any) -> Any: ...


class NotCallable(UserService):
    Login = "x"  # type: ignore[assignment]


class OldShape(UserService):
    def Login(self, controller: Any, request: Any, done: Any) -> Any: ...  # type: ignore[override]


class NewShape(legacy_pb2.Oracle):  # type: ignore[name-defined, misc]
    def Ask(self, request: Any, controller: Any) -> Any: ...


class Streaming(Service):
    DESCRIPTOR = streams_pb2.DESCRIPTOR.services_by_name["River"]

    def Flow(self, request: Any, controller: Any) -> Any: ...


class Undecided(UserService):
    @blocking
    async def Login(self, request: Any, controller: Any) -> Any: ...


class Bare(Service):
    pass


@pytest.mark.parametrize(
    ("service", "says"),
    [
        (UserService, "UserService is a class and can't be published: give an instance of it, UserService(...)"),
        (legacy_pb2.Oracle, "Oracle is a class and can't be published: give an instance of it, Oracle(...)"),
        (legacy_pb2.Oracle_Stub(None), "a Oracle_Stub calls a service and can't be published: "),
        (USER, "has no service descriptor as its DESCRIPTOR: give an instance of a class that is derived from a"),
        (user_pb2.LoginRequest(), "a LoginRequest can't be published, it has no service descriptor as its DESCRIPTOR"),
        (user_pb2, "a module can't be published, it has no service descriptor"),
        (Bare(), "a Bare can't be published, it has no service descriptor"),
        (None, "a NoneType can't be published"),
        (Missing(), "Missing has no method for fixbug.UserServiceRpc.Register: write def Register(self, request, cont"),
        (NotCallable(), "NotCallable has no method for fixbug.UserServiceRpc.Login: write def Login("),
        (OldShape(), "OldShape does not fit fixbug.UserServiceRpc.Login, missing a required argument: 'done': write d"),
        (
            NewShape(),
            "NewShape does not fit mprpc.test.Oracle.Ask, too many positional arguments: write def Ask(",
        ),
        (Undecided(), "fixbug.UserServiceRpc.Login is async def and declared blocking: it can't be both"),
        (Streaming(), "mprpc.test.River.Flow is a streaming method, which can't be published: make it a unary one"),
    ],
)
def test_what_is_no_service_is_refused_in_one_line(service: object, says: str) -> None:
    with pytest.raises(TypeError) as caught:
        methods_of(service)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_handler_is_declared_blocking_where_it_is_written() -> None:
    class Patient(UserService):
        @blocking
        def Login(self, request: Any, controller: Any) -> Any:
            return super().Login(request, controller)

    class PatientOracle(Oracle):
        @blocking
        def Ask(self, controller: Any, request: Any, done: Any) -> Any:
            return super().Ask(controller, request, done)

    assert [entry.blocking for entry in methods_of(UserService())] == [False, False]
    assert [entry.blocking for entry in methods_of(Patient())] == [True, False]
    assert [entry.blocking for entry in methods_of(PatientOracle(lambda *_: None))] == [True, False]
    assert run(methods_of(Patient())[0], user_pb2.LoginRequest()).success


def test_done_within_the_method_is_the_response() -> None:
    answer = legacy_pb2.Answer(text="42")
    ask = handler_of(lambda controller, request, done: done(answer))
    assert ask(legacy_pb2.Question(), Controller()) is answer


def test_generic_method_gets_its_own_arguments() -> None:
    seen: list[object] = []

    def ask(controller: object, request: object, done: Callable[[object], None]) -> None:
        seen.extend((controller, request))
        done(legacy_pb2.Answer())

    controller, question = Controller(), legacy_pb2.Question(text="?")
    handler_of(ask)(question, controller)
    assert seen == [controller, question]


def test_done_later_from_another_thread_resolves_a_future() -> None:
    held: list[Callable[[object], None]] = []
    future = handler_of(lambda controller, request, done: held.append(done))(legacy_pb2.Question(), Controller())
    assert isinstance(future, Future)
    assert not future.done()
    thread = threading.Thread(target=held[0], args=(legacy_pb2.Answer(text="late"),))
    thread.start()
    assert future.result(5).text == "late"
    thread.join(5)


def test_done_while_the_method_returns_never_loses_an_answer() -> None:
    """done() on another thread may come at any point of the return; each call has its answer all the same."""
    threads: list[threading.Thread] = []

    def ask(controller: object, request: Any, done: Callable[[object], None]) -> None:
        thread = threading.Thread(target=done, args=(legacy_pb2.Answer(text=request.text),))
        threads.append(thread)
        thread.start()

    handler = handler_of(ask)
    for number in range(300):
        reply = handler(legacy_pb2.Question(text=str(number)), Controller())
        assert (reply.result(5) if isinstance(reply, Future) else reply).text == str(number)
    for thread in threads:
        thread.join(5)


def test_done_twice_is_logged_and_the_first_answer_counts(caplog: pytest.LogCaptureFixture) -> None:
    def ask(controller: object, request: object, done: Callable[[object], None]) -> None:
        done(legacy_pb2.Answer(text="first"))
        done(legacy_pb2.Answer(text="second"))

    with caplog.at_level(logging.WARNING, "mprpc.service"):
        assert handler_of(ask)(legacy_pb2.Question(), Controller()).text == "first"
    assert [record.getMessage() for record in caplog.records] == [
        "mprpc.test.Oracle.Ask called done more than once; the first answer counts"
    ]


def test_a_future_is_never_cancelled_under_done() -> None:
    held: list[Callable[[object], None]] = []
    future = handler_of(lambda controller, request, done: held.append(done))(legacy_pb2.Question(), Controller())
    assert not future.cancel()
    held[0](legacy_pb2.Answer(text="still"))
    assert future.result(0).text == "still"


def test_generic_failure_goes_through_the_controller() -> None:
    def ask(controller: Any, request: object, done: Callable[[object], None]) -> None:
        controller.SetFailed("no oracle today")
        done(None)

    controller = Controller()
    assert handler_of(ask)(legacy_pb2.Question(), controller) == legacy_pb2.Answer()
    assert controller.text == "no oracle today"


def test_done_with_nothing_is_the_handlers_mistake() -> None:
    with pytest.raises(TypeError, match="called done without a response"):
        handler_of(lambda controller, request, done: done(None))(legacy_pb2.Question(), Controller())
    held: list[Callable[[], None]] = []
    future = handler_of(lambda controller, request, done: held.append(done))(legacy_pb2.Question(), Controller())
    held[0]()
    assert isinstance(future.exception(0), TypeError)


def test_generic_method_that_returns_its_response_is_told() -> None:
    with pytest.raises(TypeError, match=r"returned a Answer: a py_generic_services method calls done\(response\)"):
        handler_of(lambda controller, request, done: legacy_pb2.Answer())(legacy_pb2.Question(), Controller())


def test_generic_method_may_raise() -> None:
    def ask(controller: object, request: object, done: object) -> None:
        raise RpcError(Status.NOT_FOUND, "no such question")

    with pytest.raises(RpcError, match="no such question"):
        handler_of(ask)(legacy_pb2.Question(), Controller())


def test_generic_method_that_is_not_written_answers_unimplemented() -> None:
    silence = methods_of(Oracle(print))[1]
    with pytest.raises(RpcError, match=r"mprpc\.test\.Oracle\.Silence is not implemented") as caught:
        run(silence, legacy_pb2.Question())
    assert caught.value.status is Status.UNIMPLEMENTED


def test_generic_stub_calls_the_channel_with_five_arguments() -> None:
    """What MprpcChannel.CallMethod gets from protoc's own stubs; callback is None when it is left out."""
    got: list[tuple[object, ...]] = []

    class Channel:
        def CallMethod(self, *arguments: object) -> str:
            got.append(arguments)
            return "response"

    question, controller = legacy_pb2.Question(), Controller()
    stub = legacy_pb2.Oracle_Stub(Channel())
    assert stub.Ask(controller, question) == "response"
    assert stub.Ask(None, question, print) == "response"
    method = legacy_pb2.DESCRIPTOR.services_by_name["Oracle"].methods_by_name["Ask"]
    assert got == [
        (method, controller, question, legacy_pb2.Answer, None),
        (method, None, question, legacy_pb2.Answer, print),
    ]


def test_reply_works_in_annotations_at_run_time() -> None:
    def handler() -> Reply[int]:
        return 1

    assert typing.get_type_hints(handler)["return"] == int | Awaitable[int]
    evaluated: Any = Reply
    assert evaluated[MethodEntry] == MethodEntry | Awaitable[MethodEntry]


def test_publishing_imports_neither_asyncio_nor_futures() -> None:
    code = """
import sys
sys.modules["mprpc"] = type(sys)("mprpc")
sys.modules["mprpc"].__path__ = [sys.argv[1]]
from mprpc.service import Service, methods_of
import legacy_pb2
class Oracle(legacy_pb2.Oracle):
    def Ask(self, controller, request, done):
        done(legacy_pb2.Answer(text="42"))
assert methods_of(Oracle())[0].handler(legacy_pb2.Question(), None).text == "42"
print(sorted({"asyncio", "concurrent.futures", "kazoo", "google.protobuf.descriptor_pb2"} & set(sys.modules)))
"""
    command = [sys.executable, "-c", code, str(generated.ROOT / "mprpc")]
    environment = {"PYTHONPATH": str(generated.directory())}
    ran = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, env=environment)
    assert (ran.stdout, ran.stderr) == ("[]\n", "")
