"""A child must not outlive its parent.

The worker calls `die_with_parent` before it imports anything heavy, so that `kill -9`
of the harness leaves nothing behind that holds memory or a device. On Linux the kernel
keeps the promise; elsewhere a thread asks, twice a second, whose child it is.

Nothing is imported here but the standard library's smallest modules.
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
    """Arrange that this process is killed when `parent_pid` ends.

    Args:
        parent_pid: process that started this one, as it said on the command line. A
            parent that ended before this call is noticed by comparing.
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
