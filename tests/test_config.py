"""Configuration: the seed's file read as the seed meant it, every mistake told in one line, keywords checked alike."""

from __future__ import annotations

import copy
import importlib
import inspect
import logging
import os
import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mprpc import log
from mprpc.config import KEYS, MAX_FILE, MprpcConfig, init
from mprpc.errors import ConfigError

ROOT = Path(__file__).parent.parent

SEED = """\
#rpc节点的ip地址
rpcserverip=127.0.0.1
#rpc节点的port端口号
rpcserverport=8000
#zk的ip地址
zookeeperip=127.0.0.1
#zk的port端口号
zookeeperport=5000
"""


@pytest.fixture
def conf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The path of a file to write, named as a user in its directory names it."""
    monkeypatch.chdir(tmp_path)
    return Path("test.conf")


def loaded(conf: Path, content: str | bytes) -> MprpcConfig:
    conf.write_bytes(content.encode() if isinstance(content, str) else content)
    return MprpcConfig.load(conf)


def refused(conf: Path, content: str | bytes) -> str:
    with pytest.raises(ConfigError) as caught:
        loaded(conf, content)
    text = str(caught.value)
    assert text.isprintable(), "one line, nothing that a terminal obeys"
    return text


# ---- the file


def test_the_seeds_own_file(conf: Path) -> None:
    config = loaded(conf, SEED)
    assert (config.rpcserverip, config.rpcserverport) == ("127.0.0.1", 8000)
    assert config.zookeeper_hosts == "127.0.0.1:5000"
    assert config == MprpcConfig(rpcserverport=8000, zookeeperip="127.0.0.1", zookeeperport=5000)


@pytest.mark.parametrize(
    "line",
    [
        "rpcserverip=10.0.0.1",
        "  rpcserverip = 10.0.0.1  ",
        "\trpcserverip\t=\t10.0.0.1\t",
        "rpcserverip=10.0.0.1\r",
        "rpcserverip=10.0.0.1 # where",
        "rpcserverip=10.0.0.1\t#where",
        "rpcserverip='10.0.0.1'",
        'rpcserverip = "10.0.0.1"  # where',
        "\ufeffrpcserverip=10.0.0.1",
        "#a=b\n\n   # c\n\t\nrpcserverip=10.0.0.1",
    ],
)
@pytest.mark.parametrize("end", ["\n", "\r\n", ""])
def test_blanks_comments_and_quotes_around_a_value(conf: Path, line: str, end: str) -> None:
    content = line.replace("\n", end or "\n") + end
    assert loaded(conf, content) == MprpcConfig(rpcserverip="10.0.0.1")


@pytest.mark.parametrize(
    ("written", "value"),
    [
        ("/tmp/a#b", "/tmp/a#b"),
        ("#b", "#b"),
        ("/tmp/a=b", "/tmp/a=b"),
        ("/tmp/a b", "/tmp/a b"),
        ("'/tmp/a #b '", "/tmp/a #b "),
        ('"/tmp/it\'s"', "/tmp/it's"),
        ("/tmp/it's", "/tmp/it's"),
        ("/tmp/日志", "/tmp/日志"),
        ('""', ""),
        ("''", ""),
    ],
)
def test_what_belongs_to_a_value(conf: Path, written: str, value: str) -> None:
    assert loaded(conf, f"logdir={written}\n").logdir == value


@pytest.mark.parametrize(
    ("line", "key", "value"),
    [
        ("max_payload=64M", "max_payload", 64 << 20),
        ("max_payload=512k", "max_payload", 512 << 10),
        ("max_payload=1G", "max_payload", 1 << 30),
        ("max_payload=1000", "max_payload", 1000),
        ("classic=off", "classic", False),
        ("classic=No", "classic", False),
        ("classic=FALSE", "classic", False),
        ("classic=0", "classic", False),
        ("classic_empty=on", "classic_empty", True),
        ("classic_empty=yes", "classic_empty", True),
        ("classic_empty=true", "classic_empty", True),
        ("classic_empty=1", "classic_empty", True),
        ("call_timeout=0.25", "call_timeout", 0.25),
        ("call_timeout=3", "call_timeout", 3.0),
        ("tags=a, b ,c", "tags", ("a", "b", "c")),
        ("loops='4'", "loops", 4),
        ("rpcserverport=0", "rpcserverport", 0),
        ("rpcserverport=65535", "rpcserverport", 65535),
        ("zookeeper_auth=digest:me:a#b,c=d", "zookeeper_auth", "digest:me:a#b,c=d"),
    ],
)
def test_values_of_every_kind(conf: Path, line: str, key: str, value: object) -> None:
    found = getattr(loaded(conf, line), key)
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("a\n", "test.conf:1: not a key=value line"),
        ("\n\nrpcserverport\n", "test.conf:3: not a key=value line"),
        ("=8000\n", "test.conf:1: not a key=value line"),
        ("zookeper_ip=1\n", "test.conf:1: unknown key zookeper_ip; the nearest known one is zookeeperip"),
        (
            "# x\r\nRpcServerPort=1\r\n",
            "test.conf:2: unknown key RpcServerPort; the nearest known one is rpcserverport",
        ),
        ("loops=1\n#\nloops=1\n", "test.conf:3: loops is given twice, first in line 1"),
        (
            "rpcserverport=70000",
            "test.conf:1: rpcserverport=70000: must be a whole number from 0 to 65535",
        ),
        ("rpcserverport=-1", "test.conf:1: rpcserverport=-1: must be a whole number from 0 to 65535"),
        ("zookeeperport=0", "test.conf:1: zookeeperport=0: must be a whole number from 1 to 65535"),
        ("loops=1_0", "test.conf:1: loops=1_0: must be a whole number from 1 to 64"),
        ("loops=٣", "test.conf:1: loops=٣: must be a whole number from 1 to 64"),
        ("loops=" + 5000 * "9", f"test.conf:1: loops={60 * '9'}…: must be a whole number from 1 to 64"),
        ("loops=2.5", "test.conf:1: loops=2.5: must be a whole number from 1 to 64"),
        ("loops=a\x1b[2Jb", "test.conf:1: loops='a\\x1b[2Jb': must be a whole number from 1 to 64"),
        ("call_timeout=nan", "test.conf:1: call_timeout=nan: must be a number of seconds from 0.001 to 86400"),
        ("call_timeout=0", "test.conf:1: call_timeout=0: must be a number of seconds from 0.001 to 86400"),
        ("call_timeout=5 s", "test.conf:1: call_timeout=5 s: must be a number of seconds from 0.001 to 86400"),
        ("classic=maybe", "test.conf:1: classic=maybe: must be on or off"),
        ("dialect=grpc", "test.conf:1: dialect=grpc: must be auto, framed or classic"),
        ("logdir='/tmp", "test.conf:1: logdir: the quote isn't closed"),
        ("logdir='a' b", "test.conf:1: logdir: there is text after the closing quote"),
        ("logdir='a'#b", "test.conf:1: logdir: there is text after the closing quote"),
        ("logdir=a\x00b", "test.conf:1: logdir='a\\x00b': must be a path, without control characters"),
        (
            "zookeeper=embedded",
            "test.conf:1: zookeeper=embedded: needs the one address to start at, as zookeeperip",
        ),
        (
            "zookeeperip=a,b\nzookeeper=embedded",
            "test.conf:2: zookeeper=embedded: needs the one address to start at, as zookeeperip",
        ),
        (
            "zookeeper_acl=creator",
            "test.conf:1: zookeeper_acl=creator: needs somebody to be: "
            "zookeeper_auth, zookeeper_sasl or zookeeper_tls_cert",
        ),
        (
            "zookeeper_tls_key=k",
            "test.conf:1: zookeeper_tls_key=k: needs its certificate, zookeeper_tls_cert",
        ),
        (b"# \xd6\xd0\xce\xc4\n", "test.conf:1: not UTF-8; save the file as UTF-8"),
        (b"# \n# \n\xff\n", "test.conf:3: not UTF-8; save the file as UTF-8"),
        ("loops=1".encode("utf-16"), "test.conf:1: not UTF-8; save the file as UTF-8"),
    ],
)
def test_a_mistake_is_one_line_with_its_place(conf: Path, content: str | bytes, text: str) -> None:
    assert refused(conf, content) == text


@pytest.mark.parametrize("line", ["loops=", "loops= ", "loops=\t\r", "loops= # two"])
def test_a_missing_value(conf: Path, line: str) -> None:
    assert refused(conf, line).startswith("test.conf:1: loops: the value is missing; leave the line out")


def test_a_file_that_cant_be_read(conf: Path, tmp_path: Path) -> None:
    cases: dict[str | os.PathLike[str], str] = {
        "no.conf": "no.conf: can't be read: No such file or directory",
        Path("no.conf"): "no.conf: can't be read: No such file or directory",
        str(tmp_path): f"{tmp_path}: can't be read: Is a directory",
        "a\0b": "'a\\x00b': can't be read: embedded null byte",
        "/proc/self/mem": "/proc/self/mem: can't be read: Input/output error",
    }
    for path, text in cases.items():
        with pytest.raises(ConfigError) as caught:
            MprpcConfig.load(path)
        assert str(caught.value) == text


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_a_file_that_may_not_be_read(conf: Path) -> None:
    conf.write_text(SEED)
    conf.chmod(0)
    with pytest.raises(ConfigError, match=r"^test\.conf: can't be read: Permission denied$"):
        MprpcConfig.load(conf)


def test_the_size_of_a_file_is_bounded(conf: Path) -> None:
    full = SEED.encode() + b"#".ljust(MAX_FILE - len(SEED.encode()), b"x")
    assert loaded(conf, full).rpcserverport == 8000
    assert refused(conf, full + b"x") == "test.conf: more than 65536 bytes, so it can't be a configuration"


@given(st.binary(max_size=200) | st.text(alphabet="lops=1#'\" \t\r\n\x00", max_size=60).map(str.encode))
def test_any_bytes_are_a_configuration_or_one_line(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    conf = tmp_path_factory.getbasetemp() / "any.conf"
    conf.write_bytes(content)
    try:
        MprpcConfig.load(conf)
    except ConfigError as error:
        assert str(error).isprintable()  # noqa: PT017


# ---- the values


@pytest.mark.parametrize(
    ("name", "good", "bad"),
    [
        (
            "rpcserverip",
            ["0.0.0.0", "::", "::1", "fe80::1%eth0", "localhost", "a-b.example.com", "x_1", "unix:/tmp/a#b"],
            [
                *("", "999.0.0.1", "127.0.0.1.5", "127.1", "[::1]", "fe80::1%", "a b", "a..b", "a/b", "a,b", "主机"),
                *("unix:", "unix:a", "unix:/" + 107 * "a", 64 * "a", ".".join(130 * ["a"]), "a\0", 5, None, b"::1"),
            ],
        ),
        ("rpcserverport", [0, 65535], [-1, 65536, "8000", 80.0, True, None]),
        (
            "zookeeperip",
            ["", "a", "10.0.0.1:1", "a,b:65535, c", "::1", "[::1]", "[::1]:2181", "::1,[::2]:5"],
            ["a,", ",", "a:0", "a:65536", "a:", "a:b", "[::1", "[a]:1", "[]:1", "a/chroot", "a:1:2", "1.2.3", "a b"],
        ),
        ("zookeeperport", [1], [0]),
        ("zookeeper_auth", ["", "digest:a:b", "x:y"], ["digest", ":a", "digest:", "a b:c", 1]),
        ("zookeeper_sasl", ["", "DIGEST-MD5:a:b:c"], ["DIGEST-MD5", "DIGEST-MD5:a", "DIGEST-MD5:a:", ":a:b"]),
        ("root", ["/a", "/a/b.c"], ["", "/", "a", "/a/", "//a", "/a/../b", "/./a", "/zookeeper/a", "/a\n"]),
        ("session_timeout", [0.1, 30, 3600], [0, -1, 3601, "10", True, float("nan"), float("inf")]),
        ("advertise_ip", ["", "10.0.0.1", "::1", "me"], ["0.0.0.0", "::", "unix:/a", "a:1"]),
        ("weight", [0, 0.5, 1000], [-0.1, 1001]),
        ("zone", ["", "eu-1"], ["a b", "a,b"]),
        ("tags", [(), ("a",), ["a", "b"]], ["a", ("a b",), ("",), (1,), None]),
        ("loops", [1, 64], [0, 65]),
        ("call_timeout", [0.001, 86400], [0, 86401]),
        ("drain_timeout", [0], [-1]),
        ("max_payload", [1, 2**31 - 1], [0, 2**31, "64M", 1.5]),
        ("max_connections", [1, 10**6], [0, 10**6 + 1]),
        ("classic", [True, False], [0, 1, "on", None]),
        ("dialect", ["auto", "framed", "classic"], ["", "Auto", None]),
        ("loglevel", ["debug", "info", "warning", "error"], ["INFO", "critical", 20]),
        ("logdir", ["", "a b", "/日志"], ["a\nb", "a\0", 1]),
    ],
)
def test_what_a_key_allows(name: str, good: list[Any], bad: list[Any]) -> None:
    for value in good:
        assert getattr(MprpcConfig(**{name: value}), name) in (value, tuple(value) if name == "tags" else value)
    for value in bad:
        with pytest.raises(ConfigError) as caught:
            MprpcConfig(**{name: value})
        text = str(caught.value)
        assert text.startswith(name)
        assert text.isprintable()
        assert KEYS[name].kind.rule in text


def test_type_checkers_know_the_keys() -> None:
    with pytest.raises(ConfigError, match="rpcserverport='8000': must be a whole number"):
        MprpcConfig(rpcserverport="8000")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="unknown key server_port; the nearest known one is rpcserverport"):
        MprpcConfig(server_port=8000)  # type: ignore[call-arg]
    with pytest.raises(TypeError):
        MprpcConfig("127.0.0.1")  # type: ignore[call-arg]
    assert set(KEYS) == {name for name, kind in inspect.get_annotations(MprpcConfig).items() if kind}


def test_keywords_are_checked_together() -> None:
    with pytest.raises(ConfigError, match=r"^zookeeper=embedded: needs the one address"):
        MprpcConfig(zookeeper="embedded")
    with pytest.raises(ConfigError, match=r"^zookeeper_acl=creator: needs somebody to be"):
        MprpcConfig(zookeeper_acl="creator")
    MprpcConfig(zookeeper="embedded", zookeeperip="127.0.0.1")
    for identity in ({"zookeeper_auth": "digest:a:b"}, {"zookeeper_sasl": "M:a:b"}, {"zookeeper_tls_cert": "c"}):
        assert MprpcConfig().replace(zookeeper_acl="creator", **identity).zookeeper_acl == "creator"


@pytest.mark.parametrize(
    ("servers", "hosts"),
    [
        ("", ""),
        ("127.0.0.1", "127.0.0.1:2182"),
        ("a, b:1 ,c", "a:2182,b:1,c:2182"),
        ("::1", "[::1]:2182"),
        ("[::1]", "[::1]:2182"),
        ("[::1]:2181,10.0.0.1", "[::1]:2181,10.0.0.1:2182"),
    ],
)
def test_the_servers_as_kazoo_takes_them(servers: str, hosts: str) -> None:
    collect_hosts = importlib.import_module("kazoo.hosts").collect_hosts
    assert MprpcConfig(zookeeperip=servers, zookeeperport=2182).zookeeper_hosts == hosts
    if hosts:
        assert len(collect_hosts(hosts)[0]) == len(servers.split(","))


def test_a_configuration_never_changes() -> None:
    config = MprpcConfig(rpcserverport=1, tags=("a",))
    with pytest.raises(AttributeError, match="replace"):
        config.rpcserverport = 2  # type: ignore[misc]
    with pytest.raises(AttributeError, match="doesn't change"):
        del config.rpcserverport
    other = config.replace(rpcserverport=2)
    assert (config.rpcserverport, other.rpcserverport, other.tags) == (1, 2, ("a",))
    with pytest.raises(ConfigError, match=r"^rpcserverport=-2: must be"):
        config.replace(rpcserverport=-2)
    with pytest.raises(ConfigError, match="unknown key nothing"):
        config.replace(nothing=1)


def test_equal_configurations_are_equal_wherever_they_come_from() -> None:
    config = MprpcConfig(rpcserverport=1, tags=["a"])  # type: ignore[arg-type]
    for same in (copy.deepcopy(config), pickle.loads(pickle.dumps(config)), config.replace()):
        assert same == config
        assert hash(same) == hash(config)
    assert config != MprpcConfig()
    assert config != "MprpcConfig"


def test_secrets_are_in_no_repr_and_no_error(conf: Path) -> None:
    config = MprpcConfig(zookeeper_auth="digest:me:hunter2", zookeeper_sasl="DIGEST-MD5:me:hunter2", loops=2)
    assert repr(config) == "MprpcConfig(zookeeper_auth=…, zookeeper_sasl=…, loops=2)"
    assert "hunter2" not in f"{config} {config!r}"
    for line in (
        "zookeeper_auth=:hunter2",
        "zookeeper_sasl='hunter2",
        "zookeeper_auth='' hunter2",
        "hunter2:hunter2=a",
    ):
        assert "hunter2" not in refused(conf, line)
    with pytest.raises(ConfigError) as caught:
        MprpcConfig(zookeeper_auth="hunter2")
    assert str(caught.value) == "zookeeper_auth: must be scheme:credential, such as digest:user:password"


# ---- the shipped file


def test_the_shipped_file_sets_the_seeds_keys() -> None:
    assert MprpcConfig.load(ROOT / "test.conf") == MprpcConfig(
        rpcserverip="127.0.0.1", rpcserverport=8000, zookeeperip="127.0.0.1", zookeeperport=2181, zookeeper="embedded"
    )
    assert os.path.samefile(ROOT / "bin" / "test.conf", ROOT / "test.conf")


def test_the_seeds_parser_reads_the_shipped_file() -> None:
    """The C++ framework knows comments only at a line's start: what it reads has none behind it."""
    lines = (ROOT / "test.conf").read_text("ascii").splitlines()
    for line in lines:
        assert len(line) <= 120
        assert line.startswith("#") or "#" not in line


def test_the_shipped_file_documents_every_key_and_stays_short(conf: Path) -> None:
    lines = (ROOT / "test.conf").read_text().splitlines()
    for key in KEYS.values():
        assert f"#{key.line}" in lines
    assert len(lines) <= len(KEYS) + 10
    taken_in = [line[1:] for line in lines if line.startswith("#") and line[1:2].isalpha()]
    assert len(taken_in) == len(KEYS)
    assert loaded(conf, "\n".join(taken_in)) == MprpcConfig()


# ---- init


@pytest.fixture
def logging_restored() -> Iterator[None]:
    yield
    log.stop()


@pytest.mark.usefixtures("logging_restored")
def test_init_reads_the_file_and_starts_the_log(conf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    conf.write_text("rpcserverport=1\nlogdir=logs\nloglevel=debug\n")
    expected = MprpcConfig(rpcserverport=1, logdir="logs", loglevel="debug")
    for argv in (["-i", "test.conf"], ["-itest.conf"], ["./provider", "-i", "test.conf"]):
        assert init(argv) == expected
    monkeypatch.setattr(sys, "argv", ["./provider", "-i", "test.conf"])
    assert init() == expected
    logging.getLogger("mprpc.test").debug("hello")
    log.stop()
    (file,) = Path("logs").glob("*-log.txt")
    assert file.read_text().endswith(" =>[debug] hello\n")


@pytest.mark.parametrize("argv", [[], ["-i"], ["-x"], ["./provider"], ["-i", "test.conf", "more"], ["-i", "a", "-v"]])
def test_wrong_usage_exits_with_2(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        init(argv)
    assert caught.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("usage: ")
    assert "-i FILE" in err


def test_help_lists_the_keys(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        init(["-h"])
    assert caught.value.code == 0
    out = capsys.readouterr().out
    for key in KEYS.values():
        assert key.line in out


def run_init(cwd: Path, *argv: str) -> subprocess.CompletedProcess[str]:
    program = "import mprpc.config as c; c.init(); print('running')"
    command = [sys.executable, "-X", "dev", "-W", "error", "-c", program, *argv]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=30, check=False)


def test_a_bad_configuration_exits_with_2_and_one_line(conf: Path, tmp_path: Path) -> None:
    conf.write_text("# x\nrpcserverport=70000\n")
    ended = run_init(tmp_path, "-i", "test.conf")
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr == "test.conf:2: rpcserverport=70000: must be a whole number from 0 to 65535\n"


def test_a_log_directory_that_cant_be_made_exits_with_2_and_one_line(conf: Path, tmp_path: Path) -> None:
    conf.write_text("logdir=test.conf/logs\n")
    ended = run_init(tmp_path, "-i", "test.conf")
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr == "test.conf: logdir=test.conf/logs: can't be used: Not a directory\n"


def test_a_good_configuration_says_nothing(conf: Path, tmp_path: Path) -> None:
    conf.write_text(SEED + "logdir=logs\n")
    ended = run_init(tmp_path, "-i", "test.conf")
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "running\n", "")


def test_importing_the_configuration_is_cheap() -> None:
    """What only mistakes and commands need is imported by them; an empty package stands in for the rest of ours."""
    program = (
        "import sys, types; package = types.ModuleType('mprpc'); package.__path__ = [sys.argv[1]]\n"
        "sys.modules['mprpc'] = package; import mprpc.config; mprpc.config.MprpcConfig(loops=2, logdir='a')\n"
        "print(*{'argparse', 'dataclasses', 'difflib', 'inspect', 'pathlib', 'socket'} & sys.modules.keys())"
    )
    command = [sys.executable, "-I", "-S", "-c", program, str(ROOT / "mprpc")]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    assert ended.stdout == "\n"
