"""What a provider can publish: an object that carries a service's descriptor, and a method for each one named there.

`methods_of` turns any such object into a table of entries that all look alike, so that the provider knows one kind of
handler, `handler(request, controller)`. Three kinds of objects are taken: instances of the classes that
protoc-gen-mprpc generates; instances of protoc's own `py_generic_services` classes, whose methods are
`Login(self, controller, request, done)`; any other object with a DESCRIPTOR and methods that take
`(request, controller)`.

Rules: everything is looked up and checked once, when the service is published, and what doesn't fit is a TypeError, one
line that says what to do. No generated module is imported here; inspect and concurrent.futures only when needed.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Awaitable, Callable
from keyword import iskeyword
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, TypeAlias, TypeVar

from google.protobuf import service_reflection
from google.protobuf.descriptor import MethodDescriptor, ServiceDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

from mprpc.errors import RpcError, Status

if TYPE_CHECKING:
    from concurrent.futures import Future

    from mprpc.controller import MprpcController

__all__ = ["Handler", "MethodEntry", "Reply", "Service", "adaptive_limit", "attribute_of", "blocking", "methods_of"]

_log = logging.getLogger("mprpc.service")

T = TypeVar("T")
H = TypeVar("H", bound=Callable[..., Any])

# What a handler may return. Future is left out at run time, where naming it would import concurrent.futures.
if TYPE_CHECKING:
    Reply: TypeAlias = T | Future[T] | Awaitable[T]
else:
    Reply = T | Awaitable[T]

Handler = Callable[[Any, "MprpcController"], Reply[Any]]

# Attributes of generated classes that a method can't be called like; protoc-gen-mprpc appends the same underscore.
_RESERVED = frozenset({"DESCRIPTOR", "GetDescriptor", "mprpc", "typing"})


def blocking(handler: H) -> H:
    """Declares that a handler takes long: it runs on a thread of its own from its first call on.

        @mprpc.blocking
        def Login(self, request, controller): …

    Without it the provider finds out by what the method's calls take. Any thread.
    """
    handler.mprpc_blocking = True  # type: ignore[attr-defined]
    return handler


def adaptive_limit(handler: H) -> H:
    """Gives a method a limit of its own for calls under way at once, which follows their latency.

        @mprpc.adaptive_limit
        def Login(self, request, controller): …

    A call over it fails at once with RESOURCE_EXHAUSTED, not_run. The key `adaptive_limit` gives one to all others
    together. Any thread.
    """
    handler.mprpc_adaptive_limit = True  # type: ignore[attr-defined]
    return handler


class Service:
    """Base of the generated classes: subclass a generated one, write its methods, publish an instance.

    A method gets the request and the call's controller and returns the response, or a Future or an Awaitable of it; it
    may raise `RpcError` to fail the call with a status. A method that is not written answers UNIMPLEMENTED.
    """

    DESCRIPTOR: ClassVar[ServiceDescriptor]

    @classmethod
    def GetDescriptor(cls) -> ServiceDescriptor:
        """DESCRIPTOR, by the name that protobuf's own service classes have for it. Any thread."""
        return cls.DESCRIPTOR


class MethodEntry(NamedTuple):
    """One published method.

    `service` is the full name (`fixbug.UserServiceRpc`), `short_service` the seed's (`UserServiceRpc`). `handler` takes
    the request and the controller, returns a `Reply` and may raise anything; after it, also when a Future that it
    returned is resolved, the controller may say that the call failed. `blocking`, `limited`: it is declared so.
    """

    service: str
    short_service: str
    name: str
    descriptor: MethodDescriptor
    request_class: type[Message]
    response_class: type[Message]
    handler: Handler
    blocking: bool
    limited: bool


def methods_of(service: object) -> list[MethodEntry]:
    """The methods of a service, in the order of its descriptor. Any thread.

    Raises TypeError, in one line, for what can't be published: a class, a stub, an object without a descriptor, one
    that lacks a method or whose method has another signature, a service with streaming methods.
    """
    descriptor = _descriptor_of(service)
    find_handler = _generic_handler if _is_generic(service) else _plain_handler
    return [
        MethodEntry(
            descriptor.full_name,
            descriptor.name,
            method.name,
            method,
            GetMessageClass(method.input_type),
            GetMessageClass(method.output_type),
            find_handler(service, method),
            bool(getattr(_attribute(service, method), "mprpc_blocking", False)),
            bool(getattr(_attribute(service, method), "mprpc_adaptive_limit", False)),
        )
        for method in map(_unary, descriptor.methods)
    ]


def attribute_of(method: MethodDescriptor) -> str:
    """A method's name in generated classes and stubs: its own, or with `_` appended where Python needs that."""
    changed = f"{method.name}_"
    taken = changed in method.containing_service.methods_by_name
    return changed if (iskeyword(method.name) or method.name in _RESERVED) and not taken else method.name


def _is_generic(service: object) -> bool:
    return isinstance(type(service), service_reflection.GeneratedServiceType)


def _descriptor_of(service: object) -> ServiceDescriptor:
    if isinstance(service, type):
        name = service.__qualname__
        raise TypeError(f"{name} is a class and can't be published: give an instance of it, {name}(...)")
    kind = type(service).__qualname__
    if isinstance(type(service), service_reflection.GeneratedServiceStubType):
        raise TypeError(f"a {kind} calls a service and can't be published: give an instance of the class that serves")
    descriptor = getattr(service, "DESCRIPTOR", None)
    if not isinstance(descriptor, ServiceDescriptor):
        raise TypeError(
            f"a {kind} can't be published, it has no service descriptor as its DESCRIPTOR: give an instance of a class"
            " that is derived from a generated service class"
        )
    return descriptor


def _unary(method: MethodDescriptor) -> MethodDescriptor:
    if method.client_streaming or method.server_streaming:
        raise TypeError(f"{method.full_name} is a streaming method, which can't be published: make it a unary one")
    return method


def _plain_handler(service: object, method: MethodDescriptor) -> Handler:
    return _bound(service, method, "request", "controller")


def _generic_handler(service: object, method: MethodDescriptor) -> Handler:
    """A handler for a method that takes (controller, request, done)."""
    bound = _bound(service, method, "controller", "request", "done")
    if getattr(bound, "__module__", "") == service_reflection.__name__:
        # protoc's placeholder would fail the call without a status that tells callers what is wrong.
        return _unimplemented(method)

    def handler(request: Message, controller: MprpcController) -> Message | Future[Message]:
        done = _Done(method, controller)
        returned = bound(controller, request, done)
        if returned is not None:
            kind = type(returned).__qualname__
            raise TypeError(f"{method.full_name} returned a {kind}: a py_generic_services method calls done(response)")
        return done.reply()

    return handler


def _unimplemented(method: MethodDescriptor) -> Handler:
    def handler(request: Message, controller: MprpcController) -> Message:
        raise RpcError(Status.UNIMPLEMENTED, f"{method.full_name} is not implemented")

    return handler


def _attribute(service: object, method: MethodDescriptor) -> object:
    return getattr(service, attribute_of(method), getattr(service, method.name, None))


def _bound(service: object, method: MethodDescriptor, *takes: str) -> Callable[..., Any]:
    """A service's method of that name and signature, or TypeError."""
    import inspect  # here, because consumers import this module too and publish nothing

    bound = _attribute(service, method)
    wanted = f"def {attribute_of(method)}(self, {', '.join(takes)})"
    kind = type(service).__qualname__
    if not callable(bound):
        raise TypeError(f"{kind} has no method for {method.full_name}: write {wanted}")
    if getattr(bound, "mprpc_blocking", False) and inspect.iscoroutinefunction(bound):
        raise TypeError(
            f"{method.full_name} is async def and declared blocking: it can't be both, await what takes long"
        )
    try:
        signature = inspect.signature(bound)
    except ValueError:
        return bound  # some callables written in C don't tell theirs
    try:
        signature.bind(*takes)
    except TypeError as error:
        raise TypeError(f"{kind} does not fit {method.full_name}, {error}: write {wanted}") from None
    return bound


class _Done:
    """The `done` of one call: takes one answer, before the method returns or later. Any thread."""

    def __init__(self, method: MethodDescriptor, controller: MprpcController) -> None:
        self._method = method
        self._controller = controller
        self._lock = threading.Lock()
        self._called = False
        self._response: Message | None = None
        self._future: Future[Message] | None = None

    def __call__(self, response: Message | None = None) -> None:
        with self._lock:
            again, self._called = self._called, True
            if not again:
                self._response = response
            future = self._future
        if again:
            _log.warning("%s called done more than once; the first answer counts", self._method.full_name)
        elif future is not None:
            self._resolve(future)

    def reply(self) -> Message | Future[Message]:
        """The response if it is there, else the Future of it."""
        with self._lock:
            if not self._called:
                self._future = _running_future()
                return self._future
        return self._answer()

    def _resolve(self, future: Future[Message]) -> None:
        try:
            answer = self._answer()
        except TypeError as error:
            future.set_exception(error)
        else:
            future.set_result(answer)

    def _answer(self) -> Message:
        if self._response is not None:
            return self._response
        if not self._controller.failed():
            raise TypeError(f"{self._method.full_name} called done without a response and without controller.SetFailed")
        return GetMessageClass(self._method.output_type)()


def _running_future() -> Future[Message]:
    from concurrent.futures import Future

    future: Future[Message] = Future()
    future.set_running_or_notify_cancel()  # done() decides alone: a cancelled Future would refuse its answer
    return future
