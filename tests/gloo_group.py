"""A process group of processes that exist, communicating by gloo on the CPU."""

import contextlib
import os
import sys
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

from torch import distributed

_TIMEOUT = timedelta(seconds=60)


@contextlib.contextmanager
def member(rank: int, world_size: int, folder: Path | str) -> Iterator[None]:
    """Run the body as one process of a group, and end the process after it."""
    distributed.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=world_size,
        timeout=_TIMEOUT,
    )
    try:
        yield
    except BaseException:
        distributed.destroy_process_group()
        raise
    leave()


def leave() -> None:
    """End this process, which is in a group, as a success.

    Not by returning: gloo's threads may still hold tensors while the interpreter is
    torn down, which aborts the process (https://github.com/pytorch/pytorch/pull/179291).
    """
    distributed.barrier()  # one that leaves closes connections that others still read
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
