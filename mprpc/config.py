"""The configuration: the seed's file of key=value lines, or keywords, made into one immutable, checked `MprpcConfig`.

Each field of `MprpcConfig` is declared once, with its default, its kind and one line of text. That table (`KEYS`)
drives the reading of files, the checking of keywords and the documentation, so a key behaves alike wherever it is
written. A kind knows three things: how a file writes a value, which values are allowed, and how to say so.

The file: one `key=value` a line, UTF-8. Blanks, tabs and carriage returns around keys and values don't count. A `#` at
the line's start or after white space starts a comment, so `unix:/tmp/a#b` is a value. Quotes, '…' or "…", may stand
around a value and keep blanks and `#` as they are; `key=""` is an empty value, `key=` is a mistake. What the seed skips
silently (a line without `=`, an unknown key, a key twice) is a `ConfigError` here: one line with file, line number and
key. The values of secret keys are never in an error or in a repr. Relative paths are relative to the working directory.

Not made with `dataclasses`, which type checkers are told it is: importing that costs a quarter of `import mprpc`.
"""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar, cast

from mprpc import log
from mprpc.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from dataclasses import dataclass
else:

    def dataclass(**_options):
        return lambda made: made


__all__ = ["KEYS", "MAX_FILE", "Key", "Kind", "MprpcConfig", "init"]

MAX_FILE = 65536
"""Bytes of a configuration file. All keys with their comments are a few kB: more is another file, given by mistake."""

_MAX_SHOWN = 60  # characters of a bad value in an error, which is one line
_MAX_UNIX_PATH = 107  # bytes; sun_path has 108 with its final zero, unix(7)
_MAX_HOST_NAME = 253  # characters, RFC 1035

T = TypeVar("T")


class Kind:
    """What a key's values are. `rule` ends the sentence "key=value: must be …"."""

    rule: str

    def read(self, text: str) -> object:
        """The value that a file writes as `text`. Raises ValueError when no value is written so."""
        return text

    def check(self, value: object) -> object:
        """`value` in its final form. Raises ValueError when it isn't allowed."""
        raise NotImplementedError

    def write(self, value: object) -> str:
        """`value` as a file writes it."""
        return str(value) or '""'


class _Text(Kind):
    """A string that `fits`; control characters never do, since values end in paths, log lines and znodes."""

    def __init__(self, rule: str, fits: Callable[[str], object] = lambda _: True) -> None:
        self.rule, self._fits = rule, fits

    def check(self, value: object) -> object:
        if not isinstance(value, str) or _CONTROL.search(value) or not self._fits(value):
            raise ValueError
        return value


class _Choice(Kind):
    def __init__(self, *words: str) -> None:
        self._words = words
        self.rule = f"{', '.join(words[:-1])} or {words[-1]}"

    def check(self, value: object) -> object:
        if value not in self._words:
            raise ValueError
        return value


class _Switch(Kind):
    rule = "on or off"

    def read(self, text: str) -> object:
        return _SWITCH.get(text.lower(), text)

    def check(self, value: object) -> object:
        if not isinstance(value, bool):
            raise ValueError
        return value

    def write(self, value: object) -> str:
        return "on" if value else "off"


class _Whole(Kind):
    def __init__(self, low: int, high: int) -> None:
        self._low, self._high = low, high
        self.rule = f"a whole number from {low} to {high}"

    def read(self, text: str) -> object:
        return int(_plain(text))

    def check(self, value: object) -> object:
        if not isinstance(value, int) or isinstance(value, bool) or not self._low <= value <= self._high:
            raise ValueError
        return int(value)


class _Size(_Whole):
    """Bytes; a file may write 512k, 64M or 1G, powers of 1024."""

    def __init__(self, low: int, high: int) -> None:
        super().__init__(low, high)
        self.rule = f"a number of bytes from {low} to {high}, such as 1048576, 512k or 64M"

    def read(self, text: str) -> object:
        power = _POWERS.get(text[-1:].lower(), 0)
        return int(_plain(text[:-1] if power else text)) << power

    def write(self, value: object) -> str:
        size = cast("int", value)
        return f"{size >> 20}M" if size and size % (1 << 20) == 0 else str(size)


class _Number(Kind):
    def __init__(self, low: float, high: float, what: str = "a number of seconds") -> None:
        self._low, self._high = low, high
        self.rule = f"{what} from {low:g} to {high:g}"

    def read(self, text: str) -> object:
        return float(_plain(text))

    def check(self, value: object) -> object:
        # NaN is in no range, so that this comparison refuses it, too.
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not self._low <= value <= self._high:
            raise ValueError
        return float(value)


class _Words(Kind):
    rule = "words between commas, without blanks in them"

    def read(self, text: str) -> object:
        return tuple(word for word in map(str.strip, text.split(",")) if word)

    def check(self, value: object) -> object:
        if not isinstance(value, (tuple, list)):
            raise ValueError
        if not all(isinstance(word, str) and word and _is_word(word) for word in value):
            raise ValueError
        return tuple(value)

    def write(self, value: object) -> str:
        return ",".join(cast("tuple[str, ...]", value)) or '""'


_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_HOST_NAME = re.compile(r"[A-Za-z0-9_-]{1,63}(\.[A-Za-z0-9_-]{1,63})*\.?")
_SERVER = re.compile(r"(?:\[(?P<six>[^\[\]]*:[^\[\]]*)\]|(?P<name>[^:\[\]]+))(?::(?P<port>[0-9]{1,5}))?")
_SWITCH = {"on": True, "yes": True, "true": True, "1": True, "off": False, "no": False, "false": False, "0": False}
_POWERS = {"k": 10, "m": 20, "g": 30}


def _plain(text: str) -> str:
    """`text`, a number without what only Python reads: 1_000, digits of other scripts. Raises ValueError."""
    if not text.isascii() or "_" in text:
        raise ValueError
    return text


def _is_ip(text: str, *, six: bool) -> bool:
    import socket

    try:
        socket.inet_pton(socket.AF_INET6 if six else socket.AF_INET, text)
    except (OSError, ValueError):
        return False
    return True


def _is_host(text: str) -> bool:
    """Whether `text` is an IPv4 address, an IPv6 address without brackets (with or without a scope) or a host name."""
    if ":" in text:
        address, percent, scope = text.partition("%")
        return _is_ip(address, six=True) and bool(scope) == bool(percent)
    if text.rpartition(".")[2].isdigit():  # no host name ends so: 127.0.0.1.5 and 999.0.0.1 are mistakes
        return _is_ip(text, six=False)
    return len(text) <= _MAX_HOST_NAME and _HOST_NAME.fullmatch(text) is not None


def _is_listening(text: str) -> bool:
    if text.startswith("memory:"):
        return _is_word(text) and text != "memory:"
    if text.startswith("unix:"):
        path = text.removeprefix("unix:")
        return path.startswith("/") and len(os.fsencode(path)) <= _MAX_UNIX_PATH
    return _is_host(text)


def _is_reachable(text: str) -> bool:
    return not text or (_is_host(text) and text not in ("0.0.0.0", "::"))


def _is_delay(text: str) -> bool:
    return text in ("off", "p95") or 0 <= float(_plain(text)) <= 86400


def _is_word(text: str) -> bool:
    return re.search(r"[\s,\x00-\x1f\x7f]", text) is None


def _is_root(text: str) -> bool:
    """A znode's path. Not / itself, where the seed's own nodes are, and not ZooKeeper's."""
    parts = text.split("/")
    return parts[0] == "" and len(parts) > 1 and parts[1] != "zookeeper" and not {"", ".", ".."} & set(parts[1:])


def _server(text: str, port: int) -> str:
    """`host:port` of one item of zookeeperip; an IPv6 address gets its brackets. Raises ValueError."""
    bare_six = text.count(":") > 1 and not text.startswith("[")
    match = _SERVER.fullmatch(f"[{text}]" if bare_six else text)
    if match is None or not _is_host(match["six"] or match["name"]):
        raise ValueError
    port = int(match["port"] or port)
    if not 1 <= port <= 65535:
        raise ValueError
    return f"[{match['six']}]:{port}" if match["six"] else f"{match['name']}:{port}"


def _hosts(text: str, port: int) -> str:
    return ",".join(_server(item.strip(), port) for item in text.split(",")) if text else ""


def _is_servers(text: str) -> bool:
    _hosts(text, 2181)  # raises ValueError, which is as good as False to a kind
    return True


class Key:
    """One row of the table: `name`, `default`, `kind`, `text` (one line for a person), `secret` (never shown)."""

    def __init__(self, default: object, kind: Kind, text: str, *, secret: bool) -> None:
        self.name = ""
        self.default = default
        self.kind = kind
        self.text = text
        self.secret = secret

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name
        KEYS[name] = self

    @property
    def line(self) -> str:
        """The line that documents this key in a file: `key=default  # text`."""
        return f"{self.name}={self.kind.write(self.default)}".ljust(27) + f"  # {self.text}"

    def check(self, value: object) -> object:
        """`value` in its final form. Raises ConfigError."""
        try:
            return self.kind.check(value)
        except ValueError:
            raise self.wrong(repr(value), f"must be {self.kind.rule}") from None

    def read(self, text: str) -> object:
        """The value of `text`, which stands in a file. Raises ConfigError."""
        try:
            return self.kind.check(self.kind.read(text))
        except ValueError:
            raise self.wrong(text, f"must be {self.kind.rule}") from None

    def wrong(self, shown: str, why: str) -> ConfigError:
        """The error that says what is wrong with the value `shown`: one line, without the value of a secret key."""
        shown = shown if shown.isprintable() else repr(shown)
        shown = shown if len(shown) <= _MAX_SHOWN else shown[:_MAX_SHOWN] + "…"
        return ConfigError(f"{self.name}: {why}" if self.secret else f"{self.name}={shown}: {why}")


KEYS: dict[str, Key] = {}
"""Every key by name, in the order of the documentation."""


def _key(default: T, kind: Kind, text: str, *, secret: bool = False) -> T:
    return cast("T", Key(default, kind, text, secret=secret))


class _Checked:
    """What `MprpcConfig` does with its values: checks them by the table, holds them and never changes them."""

    def __init__(self, **values: object) -> None:
        for name in values:
            if name not in KEYS:
                raise ConfigError(_unknown(name))
        mine = {name: key.check(values[name]) if name in values else key.default for name, key in KEYS.items()}
        for name, why in _conflicts(mine):
            raise KEYS[name].wrong(str(mine[name]), why)
        self.__dict__.update(mine)

    def __setattr__(self, name: str, value: object) -> NoReturn:
        raise AttributeError(f"a configuration doesn't change: use replace({name}=…), which returns another one")

    def __delattr__(self, name: str) -> NoReturn:
        raise AttributeError(f"a configuration doesn't change: {name} stays")

    def __eq__(self, other: object) -> bool:
        return vars(self) == vars(other) if isinstance(other, _Checked) else NotImplemented

    def __hash__(self) -> int:
        return hash(tuple(vars(self).values()))

    def __repr__(self) -> str:
        changed = [name for name, value in vars(self).items() if value != KEYS[name].default]
        shown = (f"{name}=" + ("…" if KEYS[name].secret else repr(vars(self)[name])) for name in changed)
        return f"MprpcConfig({', '.join(shown)})"


_PATH = _Text("a path, without control characters")
_PORT = _Whole(0, 65535)
_SECONDS = _Number(0.001, 86400)


@dataclass(frozen=True, kw_only=True)
class MprpcConfig(_Checked):
    """Everything that can be set, with defaults: `MprpcConfig(rpcserverport=8000)`, or `MprpcConfig.load("test.conf")`.

    Immutable, hashable, compared by value. Durations are seconds (float), sizes bytes (int). A keyword that is no key,
    or a value that its key doesn't allow, raises ConfigError, which names the key. Any thread.
    """

    rpcserverip: str = _key(
        "127.0.0.1",
        _Text("an IPv4 or IPv6 address, a host name, unix:/path or memory:name", _is_listening),
        "where the provider listens: IPv4, IPv6, host name, unix:/path, memory:name",
    )
    rpcserverport: int = _key(0, _PORT, "its port; 0: any free one")
    zookeeperip: str = _key(
        "",
        _Text("HOST, HOST:PORT or [IPV6]:PORT, or a list of them between commas", _is_servers),
        'one server, or a list: 10.0.0.1,10.0.0.2:2182,[::1]:2181; "": no discovery',
    )
    zookeeperport: int = _key(2181, _Whole(1, 65535), "port of the servers that name none")
    zookeeper: str = _key(
        "external",
        _Choice("external", "embedded"),
        "embedded: the provider starts one where nobody answers (development)",
    )
    zookeeper_auth: str = _key(
        "",
        _Text(
            "scheme:credential, such as digest:user:password",
            lambda text: not text or re.match(r"[A-Za-z0-9]+:.", text),
        ),
        "scheme:credential, such as digest:user:password",
        secret=True,
    )
    zookeeper_acl: str = _key("open", _Choice("open", "creator"), "who may change our nodes: open (all) or creator")
    zookeeper_tls_ca: str = _key("", _PATH, "PEM file of the authorities; set: ZooKeeper is spoken to by TLS")
    zookeeper_tls_cert: str = _key("", _PATH, "PEM file of our own certificate")
    zookeeper_tls_key: str = _key("", _PATH, "PEM file of its key")
    zookeeper_sasl: str = _key(
        "",
        _Text("mechanism:user:password", lambda text: not text or re.match(r"[A-Za-z0-9_-]+:[^:]+:.", text)),
        "mechanism:user:password, such as DIGEST-MD5:user:password",
        secret=True,
    )
    root: str = _key("/mprpc", _Text("a znode's path such as /mprpc", _is_root), "the znode that holds our nodes")
    session_timeout: float = _key(10.0, _Number(0.1, 3600), "seconds until ZooKeeper gives up a silent process")
    advertise_ip: str = _key(
        "",
        _Text("an IPv4 or IPv6 address or a host name that callers reach", _is_reachable),
        'what callers are told to connect to; "": found out',
    )
    advertise_port: int = _key(0, _PORT, "the same for the port; 0: the one that is listened on")
    weight: float = _key(1.0, _Number(0, 1000, "a number"), "share of the calls, relative to other providers")
    zone: str = _key("", _Text("one word", _is_word), "where this process runs; the own zone is called first")
    tags: tuple[str, ...] = _key((), _Words(), "words between commas that callers can choose by")
    balancer: str = _key(
        "p2c",
        _Choice("p2c", "round_robin", "weighted_random", "least_in_flight", "consistent_hash"),
        "p2c, round_robin, weighted_random, least_in_flight or consistent_hash",
    )
    slow_start: float = _key(5.0, _Number(0, 3600), "seconds in which a provider that has come gets its share of calls")
    call_tags: tuple[str, ...] = _key((), _Words(), "only providers that have all of these tags are called")
    snapshot_dir: str = _key("", _PATH, 'directory that keeps the last lists of providers; "": none')
    loops: int = _key(1, _Whole(1, 64), "event loops, a thread each")
    switch_interval: float = _key(
        0.0005, _Number(0, 1), "seconds a computing thread keeps the interpreter from calls; 0: as the process has it"
    )
    handler_threads: int = _key(32, _Whole(1, 10_000), "threads beside the loops for handlers that take long")
    max_queued: int = _key(1000, _Whole(0, 1_000_000), "calls that wait for such a thread before one more is refused")
    workers: int = _key(1, _Whole(1, 64), "processes that serve, for run() alone; 1: run() serves by itself")
    worker_port: int = _key(0, _PORT, "workers' own ports, the free ones from here on; 0: any")
    call_timeout: float = _key(5.0, _SECONDS, "seconds for a call that names no timeout")
    connect_timeout: float = _key(1.0, _SECONDS, "seconds for a connection to be made")
    attempt_timeout: float = _key(
        0.0, _Number(0, 86400), "seconds for one attempt of an idempotent method's call; 0: the call's"
    )
    retries: int = _key(
        3, _Whole(0, 100), "attempts of a call that failed, beside those that cost no provider anything"
    )
    retry_backoff: float = _key(0.05, _SECONDS, "seconds before them at most, doubling (full jitter)")
    retry_backoff_max: float = _key(1.0, _SECONDS, "what that doubles up to")
    retry_share: float = _key(0.2, _Number(0, 1, "a number"), "retries of a channel, as a share of its calls")
    retry_rate: float = _key(10.0, _Number(0, 1e6, "a number"), "and so many more a second")
    hedge_delay: str = _key(
        "off",
        _Text("off, p95 or a number of seconds from 0 to 86400", _is_delay),
        "when an idempotent method's call goes to a second provider too: off, p95 or seconds",
    )
    hedge_share: float = _key(0.05, _Number(0, 1, "a number"), "calls that do, at most, as a share of the method's")
    busy_poll_us: int = _key(
        0, _Whole(0, 1000), "microseconds that a caller looks for its answer before it sleeps; costs CPU"
    )
    frame_timeout: float = _key(10.0, _SECONDS, "seconds for a frame that has begun to come whole")
    keepalive_time: float = _key(
        30.0, _Number(0, 86400), "seconds of silence after which a channel asks whether the provider lives; 0: never"
    )
    keepalive_timeout: float = _key(10.0, _SECONDS, "seconds for its answer, before the connection is given up")
    idle_timeout: float = _key(
        600.0, _Number(0, 86400), "seconds without a call after which a provider ends a connection; 0: never"
    )
    drain_timeout: float = _key(5.0, _Number(0, 86400), "seconds that calls in flight get at the provider's end")
    max_payload: int = _key(64 << 20, _Size(1, 2**31 - 1), "bytes of a message (k, M, G allowed)")
    max_connections: int = _key(10000, _Whole(1, 1_000_000), "connections of a provider; one more is reset")
    adaptive_limit: bool = _key(False, _Switch(), "a provider refuses calls that would only make all wait longer")
    max_in_flight: int = _key(10000, _Whole(1, 1_000_000), "calls in flight on one connection of a provider; more fail")
    max_input: int = _key(1 << 30, _Size(1 << 20, 2**40), "bytes of unfinished requests that a provider holds")
    max_output: int = _key(1 << 20, _Size(1, 2**31 - 1), "bytes that wait for a slow reader before it isn't read from")
    max_unsent: int = _key(64 << 20, _Size(1, 2**31 - 1), "bytes that wait for a slow provider before calls to it fail")
    max_pending: int = _key(10000, _Whole(1, 1_000_000), "futures of a process in flight before the next has to wait")
    classic: bool = _key(True, _Switch(), "serve callers that speak the seed's protocol")
    dialect: str = _key("auto", _Choice("auto", "framed", "classic"), "what a channel speaks: auto, framed or classic")
    classic_empty: bool = _key(False, _Switch(), "an empty answer in the seed's protocol is a response, no failure")
    logdir: str = _key("", _PATH, 'directory of the log, one file a day; "": standard error')
    loglevel: str = _key("info", _Choice("debug", "info", "warning", "error"), "debug, info, warning or error")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> MprpcConfig:
        """The configuration of a file. Raises ConfigError, one line: `test.conf:12: rpcserverport=70000: must be …`."""
        name = os.fspath(path)
        values: dict[str, Any] = {}
        lines: dict[str, int] = {}
        for number, key, text in _entries(name, _content(name)):
            if key.name in lines:
                raise ConfigError(f"{name}:{number}: {key.name} is given twice, first in line {lines[key.name]}")
            lines[key.name] = number
            try:
                values[key.name] = key.read(text)
            except ConfigError as error:
                raise ConfigError(f"{name}:{number}: {error}") from None
        for bad, why in _conflicts({key.name: key.default for key in KEYS.values()} | values):
            raise ConfigError(f"{name}:{lines[bad]}: {KEYS[bad].wrong(str(values[bad]), why)}")
        return cls(**values)

    def replace(self, **changes: object) -> MprpcConfig:
        """Another configuration, with `changes`. Raises ConfigError as the constructor does."""
        return MprpcConfig(**(vars(self) | changes))

    @property
    def zookeeper_hosts(self) -> str:
        """The servers as kazoo takes them, `host:port,host:port`; empty without discovery."""
        return _hosts(self.zookeeperip, self.zookeeperport)


def _conflicts(values: Mapping[str, object]) -> Iterator[tuple[str, str]]:
    """The keys whose values are wrong beside the others', each with why. Such a key never has its default."""
    if values["zookeeper"] == "embedded" and (not values["zookeeperip"] or "," in str(values["zookeeperip"])):
        yield "zookeeper", "needs the one address to start at, as zookeeperip"
    identities = ("zookeeper_auth", "zookeeper_sasl", "zookeeper_tls_cert")
    if values["zookeeper_acl"] == "creator" and not any(values[name] for name in identities):
        yield "zookeeper_acl", "needs somebody to be: zookeeper_auth, zookeeper_sasl or zookeeper_tls_cert"
    if int(str(values["workers"])) > 1 and str(values["rpcserverip"]).startswith("memory:"):
        yield "workers", "can't share an address within one process, memory:"
    if values["worker_port"] and int(str(values["worker_port"])) + 2 * int(str(values["workers"])) > 65536:
        yield "worker_port", "leaves no room for the workers' ports, two for each, as a new one starts beside the old"
    if values["zookeeper_tls_key"] and not values["zookeeper_tls_cert"]:
        yield "zookeeper_tls_key", "needs its certificate, zookeeper_tls_cert"


def _unknown(name: str) -> str:
    import difflib

    nearest = difflib.get_close_matches(name.lower(), KEYS, n=1, cutoff=0.0)
    return f"unknown key {name[:_MAX_SHOWN]}; the nearest known one is {nearest[0]}"


def _content(name: str) -> str:
    """The text of the file, its mark of UTF-8 (BOM) taken off."""
    try:
        with open(name, "rb") as file:
            data = file.read(MAX_FILE + 1)
    except OSError as error:
        raise ConfigError(f"{name}: can't be read: {error.strerror}") from None
    except ValueError as error:  # a zero byte in the name
        raise ConfigError(f"{name!r}: can't be read: {error}") from None
    if len(data) > MAX_FILE:
        raise ConfigError(f"{name}: more than {MAX_FILE} bytes, so it can't be a configuration")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"{name}:{line}: not UTF-8; save the file as UTF-8") from None


def _entries(name: str, content: str) -> Iterator[tuple[int, Key, str]]:
    """(line number, key, value's text) of every line that is neither empty nor a comment. Raises ConfigError."""
    for number, line in enumerate(content.split("\n"), 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        word, equals, rest = line.partition("=")
        word = word.strip()
        if not equals or not word.isidentifier():
            raise ConfigError(f"{name}:{number}: not a key=value line")  # not shown: it may be a part of a password
        if word not in KEYS:
            raise ConfigError(f"{name}:{number}: {_unknown(word)}")
        try:
            yield number, KEYS[word], _value(rest)
        except ConfigError as error:
            raise ConfigError(f"{name}:{number}: {word}: {error}") from None


def _value(rest: str) -> str:
    """What is written after the `=`, without blanks, quotes and comment. Raises ConfigError."""
    text = rest.strip()
    if text[:1] in ("'", '"'):
        value, closing, after = text[1:].partition(text[0])
        if not closing:
            raise ConfigError("the quote isn't closed")
        if after and not re.match(r"\s+#", after):
            raise ConfigError("there is text after the closing quote")
        return value
    comment = re.search(r"\s#", rest)
    value = rest[: comment.start()].strip() if comment else text
    if not value:
        raise ConfigError('the value is missing; leave the line out for the default, write "" for an empty value')
    return value


def init(argv: Sequence[str] | None = None) -> MprpcConfig:
    """The configuration of the file that `-i FILE` names, with logging started as it says: the seed's Init.

    For the start of a command; `argv` is the command line with or without the program's name, by default the
    process's own. Wrong usage and a configuration that can't be used end the process: a line on standard error, exit
    code 2. A program with logging or options of its own uses `MprpcConfig.load`. Main thread.
    """
    import argparse

    parser = argparse.ArgumentParser(
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="keys of FILE, with their defaults:\n" + "\n".join(f"  {key.line}" for key in KEYS.values()),
        allow_abbrev=False,
    )
    parser.add_argument("-i", metavar="FILE", dest="file", required=True, help="the configuration, such as test.conf")
    with_name = argv is not None and len(argv) > 0 and not argv[0].startswith("-")
    file = parser.parse_args(argv[1:] if argv is not None and with_name else argv).file
    try:
        config = MprpcConfig.load(file)
        log.start(logdir=config.logdir, level=config.loglevel)
    except ConfigError as error:
        parser.exit(2, f"{error}\n")
    except OSError as error:
        parser.exit(2, f"{file}: logdir={config.logdir}: can't be used: {error.strerror}\n")
    return config
