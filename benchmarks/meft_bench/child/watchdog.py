"""End the child process when its parent ends.

The worker calls `die_with_parent` before it imports any heavy module, so that `kill -9`
of the harness leaves no process that holds memory or a device. On Linux the kernel
ensures this; elsewhere a thread checks the parent's id twice a second.

Only the smallest modules of the standard library are imported.
"""

import ctypes
import os
import signal
import sys
import threading
import time

_PR_SET_PDEATHSIG = 1  # <sys/prctl.h>
_POLL_SECONDS = 0.5


def die_with_parent(parent_pid: int) -> None:
    """Ensure that this process is killed when `parent_pid` ends.

    Args:
        parent_pid: process that started this one, as given on the command line. A
            parent that ended before this call is detected by comparison.
    """
    if sys.platform == "linux":
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL) != 0:
            code = ctypes.get_errno()
            raise OSError(code, f"prctl(PR_SET_PDEATHSIG): {os.strerror(code)}")
        _end_if_orphaned(parent_pid)
        return
    _end_if_orphaned(parent_pid)
    threading.Thread(target=_watch, args=(parent_pid,), daemon=True).start()


def _end_if_orphaned(parent_pid: int) -> None:
    if os.getppid() != parent_pid:
        os.kill(os.getpid(), signal.SIGKILL)


def _watch(parent_pid: int) -> None:
    while True:
        _end_if_orphaned(parent_pid)
        time.sleep(_POLL_SECONDS)
