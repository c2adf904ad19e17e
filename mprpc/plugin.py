"""protoc-gen-mprpc: the protoc plugin that writes `x_mprpc.py` for every .proto file with services.

    protoc --python_out=. --pyi_out=. --mprpc_out=. user.proto

A request for code comes in on standard input and the code goes out on standard output, both as protobuf messages of
google.protobuf.compiler. For a service the generated module holds a typed base class, to be subclassed and published,
and a stub class, to be called. It imports the `_pb2` modules that protoc's own Python generator writes, by the same
names, and nothing is repeated that their descriptors already say.

Rules: the descriptors' names are all that is read, so files of any syntax and edition up to the declared one are
understood; what can't be generated is an error of protoc, one line that names the file; this module imports nothing of
the rest of mprpc.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Sequence
from keyword import iskeyword
from typing import NamedTuple

from google.protobuf.compiler.plugin_pb2 import CodeGeneratorRequest, CodeGeneratorResponse
from google.protobuf.descriptor_pb2 import (
    EDITION_2024,
    EDITION_PROTO2,
    DescriptorProto,
    FileDescriptorProto,
    MethodDescriptorProto,
    ServiceDescriptorProto,
)
from google.protobuf.message import DecodeError

USAGE = "protoc-gen-mprpc is run by protoc: protoc --python_out=. --pyi_out=. --mprpc_out=. FILE.proto"

# What the generated code uses itself. A method of such a name gets an underscore after it, as one that is called like a
# keyword does; a service can't have such a name.
_USED_IN_CLASS = frozenset({"DESCRIPTOR", "GetDescriptor", "mprpc", "typing"})
_USED_IN_MODULE = frozenset({"importlib", "mprpc", "typing"})

# Steps of a path in SourceCodeInfo: FileDescriptorProto.service and ServiceDescriptorProto.method.
_SERVICE, _METHOD = 6, 2


class _Unfit(Exception):
    """Something that has no form in Python or in mprpc; its text is the line that protoc prints."""


def generate(request: CodeGeneratorRequest) -> CodeGeneratorResponse:
    """The generated modules, or `error`. Any thread."""
    response = CodeGeneratorResponse(
        supported_features=CodeGeneratorResponse.FEATURE_PROTO3_OPTIONAL
        | CodeGeneratorResponse.FEATURE_SUPPORTS_EDITIONS,
        minimum_edition=EDITION_PROTO2,
        maximum_edition=EDITION_2024,
    )
    try:
        if request.parameter:
            raise _Unfit(f"there are no options for mprpc, found {request.parameter!r}")
        messages = dict(_messages(request.proto_file))
        wanted = set(request.file_to_generate)
        for file in request.proto_file:
            if file.name in wanted and file.service:
                name = _module_name(file.name, "_mprpc").replace(".", "/") + ".py"
                response.file.add(name=name, content=_Module(file, messages).text())
    except _Unfit as unfit:
        del response.file[:]
        response.error = str(unfit)
    return response


def main() -> int:
    """The console script. Exit code 2 if it is not protoc that runs it."""
    if len(sys.argv) > 1 or sys.stdin.isatty():
        helped = sys.argv[1:] in (["-h"], ["--help"])
        print(USAGE, file=sys.stdout if helped else sys.stderr)
        return 0 if helped else 2
    try:
        request = CodeGeneratorRequest.FromString(sys.stdin.buffer.read())
    except DecodeError:
        print(f"standard input holds no CodeGeneratorRequest; {USAGE}", file=sys.stderr)
        return 2
    except UnicodeDecodeError as error:  # protobuf without its C code does not read them at all
        print(f"a comment of the .proto files is not UTF-8: {error.object!r}", file=sys.stderr)
        return 2
    sys.stdout.buffer.write(generate(request).SerializeToString())
    return 0


class _Message(NamedTuple):
    """Where a message lives: its .proto file, and its name there, in parts where it is nested."""

    file: str
    parts: tuple[str, ...]

    @property
    def has_type(self) -> bool:
        """Whether an annotation can spell it: a module or a class that needs a detour is no type for a checker."""
        return all(map(_is_plain, (*_module_name(self.file).split("."), *self.parts)))

    @property
    def annotation(self) -> str:
        return ".".join((_alias(self.file), *self.parts)) if self.has_type else "typing.Any"

    @property
    def expression(self) -> str:
        made = _alias(self.file)
        for part in self.parts:
            made = f"{made}.{part}" if _is_plain(part) else f'getattr({made}, "{part}")'
        return made


def _messages(files: Sequence[FileDescriptorProto]) -> Iterator[tuple[str, _Message]]:
    """Every message by its full name, as the types of methods spell it: with a dot before it."""

    def walk(scope: str, outer: _Message, found: Sequence[DescriptorProto]) -> Iterator[tuple[str, _Message]]:
        for descriptor in found:
            message = _Message(outer.file, (*outer.parts, descriptor.name))
            yield f"{scope}.{descriptor.name}", message
            yield from walk(f"{scope}.{descriptor.name}", message, descriptor.nested_type)

    for file in files:
        yield from walk(f".{file.package}" if file.package else "", _Message(file.name, ()), file.message_type)


class _Module:
    """The code for one file with services."""

    def __init__(self, file: FileDescriptorProto, messages: dict[str, _Message]) -> None:
        self._file = file
        self._messages = messages
        self._comments = {tuple(at.path): _decoded(at.leading_comments) for at in file.source_code_info.location}

    def text(self) -> str:
        used = [
            self._messages[name]
            for service in self._file.service
            for method in service.method
            for name in (method.input_type, method.output_type)
        ]
        files = sorted({self._file.name, *(message.file for message in used)})
        self._check_class_names(taken=_USED_IN_MODULE.union(map(_alias, files)))
        lines = [
            f"# Generated by protoc-gen-mprpc from {self._file.name}. Do not edit.",
            f'"""The services of {self._file.name}: base classes to implement, stubs to call."""',
            "",
            "from __future__ import annotations",
            "",
            *_imports(files, typing=not all(message.has_type for message in used)),
        ]
        for index, service in enumerate(self._file.service):
            names = self._method_names(service)
            lines += ["", "", *self._base_class(index, service, names)]
            lines += ["", "", *self._stub_class(service, names, "")]
            lines += ["", "", *self._stub_class(service, names, "Async")]
        return "\n".join(lines) + "\n"

    def _base_class(self, index: int, service: ServiceDescriptorProto, names: Sequence[str]) -> Iterator[str]:
        comment = self._comments.get((_SERVICE, index), "")
        yield f"class {service.name}(mprpc.Service):"
        yield from _docstring(comment or f"The service {self._full(service)}, to be subclassed.", "    ")
        yield ""
        yield f'    DESCRIPTOR = {_alias(self._file.name)}.DESCRIPTOR.services_by_name["{service.name}"]'
        for at, (method, name) in enumerate(zip(service.method, names, strict=True)):
            request, response = self._messages[method.input_type], self._messages[method.output_type]
            yield ""
            yield f"    def {name}("
            yield f"        self, request: {request.annotation}, controller: mprpc.MprpcController"
            yield f"    ) -> mprpc.Reply[{response.annotation}]:"
            yield from _docstring(self._comments.get((_SERVICE, index, _METHOD, at), ""), "        ")
            said = f"{self._full(service)}.{method.name} is not implemented"
            yield f'        raise mprpc.RpcError(mprpc.Status.UNIMPLEMENTED, "{said}")'

    def _stub_class(self, service: ServiceDescriptorProto, names: Sequence[str], kind: str) -> Iterator[str]:
        where = "with await, in any event loop" if kind else "in any thread"
        yield f"class {service.name}_{kind}Stub:"
        yield f'    """Calls {self._full(service)} through a channel, {where}."""'
        yield ""
        yield f"    def __init__(self, channel: mprpc.{kind}MprpcChannel) -> None:"
        yield f"        methods = {service.name}.DESCRIPTOR.methods_by_name"
        for method, name in zip(service.method, names, strict=True):
            request, response = self._messages[method.input_type], self._messages[method.output_type]
            yield f"        self.{name}: mprpc.{kind}UnaryCall[{request.annotation}, {response.annotation}] = ("
            yield f'            channel.unary_call(methods["{method.name}"], {response.expression})'
            yield "        )"

    def _method_names(self, service: ServiceDescriptorProto) -> list[str]:
        """The methods' names in Python, all different; a method that can't be generated is refused here."""
        names: dict[str, str] = {}
        for method in service.method:
            where = f"{self._file.name}: service {service.name}: method {method.name}"
            self._check_method(where, method)
            name = method.name + "_" * (iskeyword(method.name) or method.name in _USED_IN_CLASS)
            if name in names:
                raise _Unfit(f"{where} and method {names[name]} are both {name} in Python; rename one")
            names[name] = method.name
        return list(names)

    @staticmethod
    def _check_method(where: str, method: MethodDescriptorProto) -> None:
        if method.client_streaming or method.server_streaming:
            raise _Unfit(f"{where} is a streaming one, which mprpc does not have; make it a unary one or take it out")
        if method.name.startswith("__"):
            raise _Unfit(f"{where} begins with two underscores, which Python keeps for itself; rename it")

    def _check_class_names(self, taken: frozenset[str]) -> None:
        names: set[str] = set(taken)
        for service in self._file.service:
            where = f"{self._file.name}: service {service.name}"
            if not _is_plain(service.name):
                raise _Unfit(f"{where} can't be the name of a Python class; rename it")
            for name in (service.name, f"{service.name}_Stub", f"{service.name}_AsyncStub"):
                if name in names:
                    raise _Unfit(f"{where} needs the name {name}, which is taken in the generated module; rename it")
                names.add(name)

    def _full(self, service: ServiceDescriptorProto) -> str:
        return f"{self._file.package}.{service.name}" if self._file.package else service.name


def _imports(files: Sequence[str], *, typing: bool) -> Iterator[str]:
    """Import statements: the files' _pb2 modules in protoc's own forms and by its names, and what goes with them."""
    plain, detours = [], []
    for file in files:
        package, _, module = _module_name(file).rpartition(".")
        if not all(map(_is_plain, _module_name(file).split("."))):
            detours.append(f'{_alias(file)} = importlib.import_module("{package}.{module}")')
        elif package:
            plain.append(f"from {package} import {module} as {_alias(file)}")
        else:
            plain.append(f"import {module} as {_alias(file)}")
    library = ["import importlib"] * bool(detours) + ["import typing"] * typing
    yield from [*library, ""] if library else []
    yield from ("import mprpc", *plain)
    yield from ["", *detours] if detours else []


def _module_name(file: str, suffix: str = "_pb2") -> str:
    """The Python module for a .proto file: protoc's rule."""
    name = file.removesuffix(".proto").replace("-", "_").replace("/", ".") + suffix
    if not all(part.isidentifier() for part in name.split(".")):
        raise _Unfit(f"{file}: a file of this name has no Python module that can be imported; rename it")
    return name


def _alias(file: str) -> str:
    return _module_name(file).replace("_", "__").replace(".", "_dot_")


def _is_plain(name: str) -> bool:
    """Whether a name can be written as it is: no keyword, and nothing that a class body would mangle."""
    return not iskeyword(name) and not name.startswith("__")


def _decoded(comment: str | bytes) -> str:
    """A comment's text. protobuf hands out bytes where a .proto file is not UTF-8, which protoc lets comments be."""
    return comment.decode(errors="replace") if isinstance(comment, bytes) else comment


def _docstring(comment: str, indent: str) -> Iterator[str]:
    """The lines of a docstring that says what a comment says, or none if it says nothing."""
    lines = [_escaped(line.removeprefix(" ").rstrip()) for line in comment.strip().split("\n")]
    if lines == [""]:
        return
    lines[0] = '"""' + lines[0]
    lines[-1:] = [lines[-1] + '"""'] if len(lines) == 1 else [lines[-1], '"""']
    yield from (indent + line if line else "" for line in lines)


def _escaped(line: str) -> str:
    """A line as it stands in a docstring: it can't end it, and no backslash or control character changes it."""
    kept = re.sub(r'"(?="|$)', r"\"", line.replace("\\", r"\\"))
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in kept)


if __name__ == "__main__":
    sys.exit(main())
