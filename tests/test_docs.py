"""What the documentation says, done: its Python runs, its commands exist, its files are there."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

import generated

ROOT = Path(__file__).resolve().parent.parent


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_the_guides_examples_run_in_order() -> None:
    generated.module("user_mprpc")  # puts the generated modules on the path
    examples = blocks("docs/guide.md", "python")
    assert len(examples) >= 6
    namespace: dict[str, object] = {}
    for example in examples:
        exec(compile(example, "docs/guide.md", "exec"), namespace)


def test_the_readmes_service_answers_its_consumer(tmp_path: Path) -> None:
    """The twenty lines, as two processes and an embedded ZooKeeper; only the ports differ."""
    (tmp_path / "hello.proto").write_text(blocks("README.md", "proto")[0])
    generated.run_protoc(f"-I{tmp_path}", f"--python_out={tmp_path}", f"--mprpc_out={tmp_path}", "hello.proto")
    provider, consumer = blocks("README.md", "python")
    where = f'zookeeperip="127.0.0.1", zookeeperport={free_port()}'
    ready = "provider.start()\nprovider.wait_registered(10) and print('ready', flush=True)\nprovider.run()"
    provider = provider.replace('zookeeperip="127.0.0.1"', where).replace("=8000", "=0")
    (tmp_path / "provider.py").write_text(provider.replace("provider.run()", ready))
    (tmp_path / "consumer.py").write_text(consumer.replace('zookeeperip="127.0.0.1"', where))
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        [sys.executable, "provider.py"], cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True
    ) as serving:
        try:
            assert serving.stdout is not None
            assert serving.stdout.readline() == "ready\n"
            called = subprocess.run(
                [sys.executable, "consumer.py"],
                cwd=tmp_path,
                env=environment,
                capture_output=True,
                text=True,
                timeout=30,
            )
        finally:
            serving.terminate()
    assert (called.stdout, called.stderr) == ("hello, zhang san\n", "")
    assert serving.returncode == 0


@pytest.mark.parametrize("page", ["README.md", *(str(p.relative_to(ROOT)) for p in (ROOT / "docs").glob("*.md"))])
def test_every_link_and_target_exists(page: str) -> None:
    text = (ROOT / page).read_text()
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"`?make ([a-z-]+)", text)) <= targets
    for link in re.findall(r"\]\(([^)#:]+)\)", text):
        assert ((ROOT / page).parent / link).exists(), link
