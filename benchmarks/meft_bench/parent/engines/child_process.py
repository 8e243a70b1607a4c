"""One child process: started, awaited, and killed with all processes of its own."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from meft_bench.parent.engines.host_memory import Watch

_POLL_SECONDS = 0.05


class Stopped(Exception):
    """Raised if the run was stopped while a cell ran: there is no ending to record."""


class LostError(Exception):
    """Raised where a child ended with the process that had forked it."""


def run(
    command: Sequence[str],
    *,
    log: Path,
    variables: Mapping[str, str],
    timeout_seconds: float,
    stop: threading.Event,
    memory_limit_bytes: int | None = None,
) -> int | None:
    """Run a command to its end and return its exit status, or None after a timeout.

    Args:
        command: the program and its arguments.
        log: file that receives what it prints.
        variables: its environment variables.
        timeout_seconds: time after which it is killed.
        stop: when set, it is killed and `Stopped` is raised.
        memory_limit_bytes: host memory that it may hold with all processes that it
            starts; None for no limit.

    Raises:
        Stopped: `stop` was set.
        TooLargeError: they held more, and were killed.
        OSError: the log cannot be written, or no process can be started.
    """
    deadline = time.monotonic() + timeout_seconds
    with log.open("wb") as log_file:
        try:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log_file,
                stderr=subprocess.STDOUT,
                env=variables,
                start_new_session=True,
            )
        except OSError as error:  # too many processes, or no memory for another
            reason = f"no child could be started: {error.strerror}"
            raise OSError(error.errno, reason, sys.executable) from error
    try:
        return _wait(process, deadline, stop, Watch(memory_limit_bytes))
    finally:
        _kill_group(process)


def describe_signal(number: int) -> str:
    """Return the name of the signal that ended a process, and why it may have."""
    try:
        name = signal.Signals(number).name
    except ValueError:
        name = f"signal {number}"
    if number == signal.SIGKILL:
        return f"{name}: the kernel does this when the machine runs out of memory"
    return name


def _wait(
    process: subprocess.Popen[bytes],
    deadline: float,
    stop: threading.Event,
    watch: Watch,
) -> int | None:
    """Return the exit status, or None when the deadline passed first.

    Args:
        process: the child.
        deadline: time of the monotonic clock, in seconds.
        stop: when set, `Stopped` is raised.
        watch: looks whether the child holds too much memory.
    """
    while process.poll() is None:
        watch.look(process.pid)
        if time.monotonic() > deadline:
            return None
        if stop.wait(_POLL_SECONDS):
            raise Stopped
    return process.returncode


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    """Kill the child and its processes; does nothing when all have ended."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        pass  # macOS returns EPERM for a group with only a zombie
    process.wait()
