"""What is free on a machine, and what a group of processes holds."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from meft_bench.parent.engines import host_memory
from meft_bench.parent.engines.host_memory import TooLargeError, Watch

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="read from /proc")
MIB = 2**20
FAMILY = """
import os, time
held = b"1" * 2**26
for _ in range(3):
    if os.fork() == 0:
        break
else:
    print("ready", flush=True)
time.sleep(3600)
"""


@pytest.fixture
def family() -> Iterator[int]:
    """A group of four processes with the same 64 MiB."""
    command = [sys.executable, "-c", FAMILY]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True)
    assert process.stdout is not None
    process.stdout.readline()
    yield process.pid
    os.killpg(process.pid, 9)
    process.communicate()


def test_pages_that_forks_share_count_once(family: int) -> None:
    """Though each of the four has them in its resident memory."""
    held = host_memory.held_bytes(family)
    assert 64 * MIB < held < 128 * MIB
    assert not host_memory.exceeds(family, 128 * MIB)
    assert host_memory.exceeds(family, 64 * MIB)


def test_watch(family: int) -> None:
    Watch(None).look(family)
    Watch(128 * MIB).look(family)
    with pytest.raises(TooLargeError):
        Watch(64 * MIB).look(family)


def test_a_group_that_has_ended_holds_nothing() -> None:
    process = subprocess.Popen(["true"], start_new_session=True)
    process.wait()
    assert host_memory.held_bytes(process.pid) == 0


def test_free_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The less of what the machine and the control group leave."""
    assert host_memory.free_bytes() is not None
    monkeypatch.setattr(host_memory, "PROC", tmp_path)
    monkeypatch.setattr(host_memory, "GROUP", tmp_path)
    assert host_memory.free_bytes() is None
    (tmp_path / "meminfo").write_text("MemTotal: 99 kB\nMemAvailable: 64 kB\n")
    assert host_memory.free_bytes() == 64 * 1024
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("5000\n")
    assert host_memory.free_bytes() == 64 * 1024
    (tmp_path / "memory.max").write_text("8000\n")
    assert host_memory.free_bytes() == 3000
    (tmp_path / "memory.stat").write_text("anon 4\ninactive_file 700\n")
    assert host_memory.free_bytes() == 3700
    (tmp_path / "memory.max").write_text("100\n")
    assert host_memory.free_bytes() == 0
