"""A process that has imported what cells need, and forks a new child for each.

Imports take longer than many cells run. This process imports once, does nothing else,
and so has one thread, no open device and no tensor of any cell: a fork of it is the
process that an interpreter is after its imports. A child shares no memory that it
changes with the server or with other children, leads its own session, and ends with the
server.

It reads requests from stdin and writes replies to stdout, a line of JSON each:

    {"id": 1, "argv": [...], "log": PATH, "variables": {...}}   fork, and run the worker
    {"id": 1, "pid": 4711}                                      the child has started
    {"id": 1, "code": 0}                                        it has ended

`code` is the exit status, below 0 for a signal, as `subprocess` has it. Where no child
could be started, `pid` is null and `errno` the number of the error. When stdin ends, so
does the server. It is for Linux: it waits for children by their file descriptors.
"""

import argparse
import atexit
import contextlib
import gc
import importlib
import json
import os
import runpy
import selectors
import signal
import sys
import traceback
from collections.abc import Mapping
from typing import Any

from meft_bench.child.watchdog import die_with_parent

_NAMES = ("stdin", "stdout", "stderr")


def main() -> None:
    """Import what the command line names, and serve until stdin ends."""
    parser = argparse.ArgumentParser(description="Forks children of meft-bench.")
    parser.add_argument("--parent", required=True, type=int)
    parser.add_argument("--worker", required=True)
    parser.add_argument("--import", nargs="*", default=[], dest="modules")
    given = parser.parse_args()
    die_with_parent(given.parent)
    # Imports leave little garbage, and to look for it takes a quarter of their time.
    gc.disable()
    for name in given.modules:
        # What is missing is an error of the cells that need it, in their own logs.
        with contextlib.suppress(Exception):
            importlib.import_module(name)
    gc.freeze()  # a collection in a child would copy every page that it looks at
    _serve(given.worker)


def _serve(worker: str) -> None:
    """Fork children on request, and say how they end."""
    requests, replies = os.dup(0), os.dup(1)
    # Nothing that a library prints may get between the replies.
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    os.dup2(2, 1)
    os.close(null)
    children: dict[int, tuple[int, int]] = {}
    unread = b""
    with selectors.DefaultSelector() as selector:
        selector.register(requests, selectors.EVENT_READ)
        while True:
            for key, _ in selector.select():
                if key.fd != requests:
                    number, pid = children.pop(key.fd)
                    # Before its number is free: what the child has left running.
                    with contextlib.suppress(ProcessLookupError, PermissionError):
                        os.killpg(pid, signal.SIGKILL)
                    _, status = os.waitpid(pid, 0)
                    selector.unregister(key.fd)
                    os.close(key.fd)
                    code = os.waitstatus_to_exitcode(status)
                    _reply(replies, id=number, code=code)
                    continue
                received = os.read(requests, 1 << 16)
                if not received:
                    return
                *lines, unread = (unread + received).split(b"\n")
                for line in lines:
                    request = json.loads(line)
                    number = request["id"]
                    try:
                        pid = os.fork()
                    except OSError as error:  # too many processes, or no memory
                        _reply(replies, id=number, pid=None, errno=error.errno)
                        continue
                    if pid == 0:
                        selector.close()
                        for fd in (requests, replies, *children):
                            os.close(fd)
                        _be_child(worker, request)
                    descriptor = os.pidfd_open(pid)
                    children[descriptor] = number, pid
                    selector.register(descriptor, selectors.EVENT_READ)
                    _reply(replies, id=number, pid=pid)


def _reply(replies: int, **fields: Any) -> None:
    os.write(replies, json.dumps(fields).encode() + b"\n")


def _be_child(worker: str, request: Mapping[str, Any]) -> None:
    """Run the worker as an interpreter of its own would, and end the process."""
    code = 70  # of an error outside the worker, which `_run` does not expect
    try:
        os.setsid()
        log = os.open(request["log"], os.O_WRONLY | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.close(log)
        os.environ.clear()
        os.environ.update(request["variables"])
        sys.argv = [worker, *request["argv"], "--parent", str(os.getppid())]
        gc.enable()
        code = _run(worker)
    finally:
        # `os._exit`, as the objects of all imports need not be deleted one by one.
        with contextlib.suppress(BaseException):
            atexit._run_exitfuncs()
        for name in _NAMES[1:]:
            with contextlib.suppress(OSError, ValueError):
                getattr(sys, name).flush()
        os._exit(code)


def _run(worker: str) -> int:
    """Run a module as the main program, and return the exit status."""
    try:
        runpy.run_module(worker, run_name="__main__", alter_sys=True)
    except SystemExit as error:
        if error.code is None:
            return 0
        if isinstance(error.code, int):
            return error.code & 0xFF
        print(error.code, file=sys.stderr)
        return 1
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


if __name__ == "__main__":
    main()
