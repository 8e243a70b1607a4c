"""DistributedDataParallel in a rank whose other ranks do not exist.

Its reducer, which is compiled code, makes the buckets and copies gradients into them as
on a GPU. Three things that it does besides need other ranks, or a GPU: it compares the
shapes of parameters, it takes times, and it waits for what a collective returns.
"""

import contextlib
import importlib
import warnings
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor, distributed
from torch._subclasses import fake_impls
from torch.nn.parallel import DistributedDataParallel

from meft_bench.virtual.recording.tensors import device_of


def alone() -> Iterator[contextlib.AbstractContextManager[Any]]:
    """Yield the patches that let DistributedDataParallel run without other ranks."""
    plain_init: Any = DistributedDataParallel.__init__
    plain_hook: Any = DistributedDataParallel.register_comm_hook

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        plain_init(self, *args, **kwargs)
        self.logger = _NoTimes()
        plain_hook(self, None, _reduced)

    module = importlib.import_module("torch.nn.parallel.distributed")
    yield _no_warning_of_addresses()
    yield mock.patch.dict(
        fake_impls.op_implementations_dict,
        {torch.ops.aten.is_pinned.default: _is_of_host},
    )
    yield mock.patch.object(module, "_verify_param_shape_across_processes", _nothing)
    yield mock.patch.object(DistributedDataParallel, "__init__", init)
    yield mock.patch.object(
        DistributedDataParallel, "register_comm_hook", _refuse_other_hook
    )


@contextlib.contextmanager
def _no_warning_of_addresses() -> Iterator[None]:
    """Let the reducer compare the addresses of two tensors, of which one has none."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")
        yield


class _NoTimes:
    """Takes the place of the reducer's logger, whose timer a GPU has."""

    def __getattr__(self, name: str) -> Any:
        return _nothing


def _reduced(
    state: None,
    bucket: distributed.GradBucket,  # type: ignore[name-defined]
) -> torch.futures.Future[Tensor]:
    """Reduce a bucket in place, as the reducer does without a hook."""
    distributed.all_reduce(bucket.buffer())
    done: torch.futures.Future[Tensor] = torch.futures.Future()
    done.set_result(bucket.buffer())
    return done


def _is_of_host(mode: Any, func: Any, tensor: Tensor, device: Any = None) -> bool:
    """Return whether a tensor is on the host, all of which counts as page-locked."""
    return device_of(tensor) == "cpu"


def _nothing(*args: Any, **kwargs: Any) -> None:
    return None


def _refuse_other_hook(*args: Any, **kwargs: Any) -> None:
    raise NotImplementedError(
        "`DistributedDataParallel.register_comm_hook` is not modelled by "
        "`virtual_gpu`: leave it out to plan buckets that are reduced in place"
    )
