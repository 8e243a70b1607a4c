"""Children that are forked from a process with all imports done.

`ForkServer` starts that process (`meft_bench.child.fork_server`) at the first child,
and again if it has ended. It runs children as `child_process` does, and no number of a
cell depends on which of the two started it but the resident memory of the process.

Children with a real GPU are never forked: libraries may have opened the device when
they were imported. Nor are those of other systems than Linux.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from meft_bench.parent.engines.child_process import LostError, Stopped
from meft_bench.parent.engines.host_memory import Watch
from meft_bench.shared.request import WORKER

SERVER = "meft_bench.child.fork_server"
IMPORTS = (
    "meft_bench.child.measuring.measure",
    "meft_bench.virtual.prediction.predict",
    "meft_bench.child.methods.checkpointing",
    "meft_bench.child.methods.reversible",
    "meft_bench.child.methods.sparse",
    "meft_bench.child.tasks.synthetic",
)
"""Modules of cells, which import torch, transformers and peft."""
_POLL_SECONDS = 0.05


def is_available() -> bool:
    """Return whether this system can fork children and wait for them."""
    return sys.platform == "linux" and hasattr(os, "pidfd_open")


class _Child:
    """A child of the server: its process and its end."""

    def __init__(self) -> None:
        self.ended = threading.Event()
        self.pid: int | None = None
        self.errno: int | None = None
        self.code: int | None = None
        """Exit status; None where the server ended before the child."""
        self._lock = threading.Lock()
        self._is_wanted = True

    def started(self, pid: int) -> None:
        """Note the process, and kill one that is not wanted any more."""
        with self._lock:
            self.pid = pid
            if not self._is_wanted:
                self._kill(pid)

    def kill(self) -> None:
        """Kill the child and the processes it started, and wait for its end.

        One that has not started yet is killed when it starts.
        """
        with self._lock:
            self._is_wanted = False
            # What an ended one had left running, the server has killed.
            if self.ended.is_set() or self.pid is None:
                return
            self._kill(self.pid)
        self.ended.wait()

    def _kill(self, pid: int) -> None:
        for kill in (os.killpg, os.kill):  # it may lead no group yet
            with contextlib.suppress(ProcessLookupError, PermissionError):
                kill(pid, signal.SIGKILL)


class ForkServer:
    """Start children by forks of one process.

    Args:
        variables: environment variables of the imports.
        log: file that receives what the server prints.
        worker_module: module that runs as the child; for the cells' own, the server
            imports `IMPORTS`.
    """

    def __init__(
        self,
        variables: Mapping[str, str],
        log: Path,
        worker_module: str = WORKER,
    ) -> None:
        self._variables = dict(variables)
        self._log = log
        self._worker_module = worker_module
        self._imports = IMPORTS if worker_module == WORKER else ()
        self._lock = threading.Lock()
        self._server: _Server | None = None
        self._num_children = 0

    def close(self) -> None:
        """End the server, and with it children that still run."""
        if self._server is not None:
            self._server.close()

    def run(
        self,
        command: Sequence[str],
        *,
        log: Path,
        variables: Mapping[str, str],
        timeout_seconds: float,
        stop: threading.Event,
        memory_limit_bytes: int | None = None,
    ) -> int | None:
        """Run a child to its end and return its exit status, or None after a timeout.

        Args:
            command: a command of `meft_bench.shared.request`, of which the arguments
                are taken.
            log: file that receives what the child prints.
            variables: its environment variables.
            timeout_seconds: time after which it is killed.
            stop: when set, it is killed and `Stopped` is raised.
            memory_limit_bytes: host memory that it may hold with all processes that it
                starts; None for no limit.

        Raises:
            Stopped: `stop` was set.
            TooLargeError: they held more, and were killed.
            LostError: the server was killed, and the child with it.
            OSError: the log cannot be written, or no child can be started.
        """
        log.write_bytes(b"")
        arguments = _arguments(command, self._worker_module)
        child = self._ask(arguments, log, variables)
        try:
            is_over = not _wait(child, timeout_seconds, stop, Watch(memory_limit_bytes))
        finally:
            child.kill()
        if child.errno is not None:
            reason = f"no child could be started: {os.strerror(child.errno)}"
            raise OSError(child.errno, reason, sys.executable)
        if is_over:
            return None
        if child.code is None:
            raise LostError
        return child.code

    def _ask(
        self, arguments: Sequence[str], log: Path, variables: Mapping[str, str]
    ) -> _Child:
        child = _Child()
        with self._lock:
            server = self._start()
            self._num_children += 1
            server.send(
                self._num_children,
                child,
                argv=[*arguments],
                log=str(log.resolve()),
                variables=dict(variables),
            )
        return child

    def _start(self) -> "_Server":
        if self._server is not None and not self._server.ended.is_set():
            return self._server
        command = [
            *(sys.executable, "-P", "-m", SERVER),
            *("--parent", str(os.getpid())),
            *("--worker", self._worker_module),
            *("--import", *self._imports),
        ]
        server = _Server(command, self._variables, self._log)
        server.start()
        self._server = server
        return server


class _Server(threading.Thread):
    """The server, and the thread that listens to it.

    The thread starts the server itself: on Linux, the signal that ends a process with
    its parent is tied to the thread that started it.
    """

    def __init__(
        self, command: Sequence[str], variables: Mapping[str, str], log: Path
    ) -> None:
        super().__init__(name="forks", daemon=True)
        self._command = command
        self._variables = variables
        self._log = log
        self._launched = threading.Event()
        self._error: OSError | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self.children: dict[int, _Child] = {}
        """Children that have not ended, by the number of their request."""
        self.ended = threading.Event()

    def start(self) -> None:
        """Start the server.

        Raises:
            OSError: the log cannot be written, or no process can be started.
        """
        super().start()
        self._launched.wait()
        if self._error is not None:
            raise self._error

    def run(self) -> None:
        """Start the process, and note what it says of its children."""
        try:
            with self._log.open("ab") as log:
                self._process = subprocess.Popen(
                    self._command,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    env=self._variables,
                    start_new_session=True,
                )
        except OSError as error:
            reason = f"no child could be started: {error.strerror}"
            self._error = OSError(error.errno, reason, error.filename or sys.executable)
            self.ended.set()
            self._launched.set()
            return
        self._launched.set()
        with self._process as process:
            assert process.stdout is not None
            for line in process.stdout:
                self._note(json.loads(line))
            self.ended.set()  # no request is sent after this
            process.wait()
        # Its end is that of all its children.
        for child in [*self.children.values()]:
            child.ended.set()

    def _note(self, reply: Mapping[str, Any]) -> None:
        child = self.children[reply["id"]]
        if reply.get("pid") is not None:
            child.started(reply["pid"])
            return
        child.code, child.errno = reply.get("code"), reply.get("errno")
        del self.children[reply["id"]]
        child.ended.set()

    def send(self, number: int, child: _Child, **fields: Any) -> None:
        """Request a child.

        Args:
            number: number of the request.
            child: what becomes of it is noted here.
            fields: the request.
        """
        assert self._process is not None
        assert self._process.stdin is not None
        self.children[number] = child
        line = json.dumps({"id": number, **fields}).encode() + b"\n"
        try:
            self._process.stdin.write(line)
            self._process.stdin.flush()
        except OSError:  # it has just ended
            child.ended.set()

    def kill(self) -> None:
        """Kill the server, and with it its children."""
        assert self._process is not None
        self._process.kill()

    def close(self) -> None:
        """End the server, and with it children that still run."""
        self.kill()
        self.join()


def _wait(
    child: _Child, timeout_seconds: float, stop: threading.Event, watch: Watch
) -> bool:
    """Wait for the end of a child; False if the time is over, imports included."""
    deadline = time.monotonic() + timeout_seconds
    while not child.ended.wait(_POLL_SECONDS):
        if time.monotonic() > deadline:
            return False
        if stop.is_set():
            raise Stopped
        if child.pid is not None:
            watch.look(child.pid)
    return True


def _arguments(command: Sequence[str], worker_module: str) -> list[str]:
    """Return the arguments of a command without the parent, which is the server."""
    begin = [*command].index(worker_module) + 1
    end = [*command].index("--parent")
    return [*command[begin:end]]
