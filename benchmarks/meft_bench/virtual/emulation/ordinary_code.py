"""Patches for what training code does besides training.

Inside `virtual_gpu` there are no values, so nothing is written by functions that save
tensors; loaders run in the process itself; a text is generated to its greatest length;
arrays are of zeros.
"""

import contextlib
import importlib
import importlib.util
import os
import warnings
from collections.abc import Iterator
from typing import Any, cast
from unittest import mock

import numpy as np
import torch
from torch import Tensor, UntypedStorage
from torch._subclasses.fake_tensor import FakeTensor
from torch.profiler import ProfilerActivity
from torch.profiler.profiler import _KinetoProfile
from torch.utils._device import _device_constructors
from torch.utils.data import DataLoader

from meft_bench.virtual.emulation import loading, refusals
from meft_bench.virtual.emulation.early_imports import everywhere

SAVING = (
    ("torch", "save"),
    ("safetensors.torch", "save_file"),
    ("safetensors.torch", "save_model"),
    ("transformers", "PreTrainedModel.save_pretrained"),
    ("peft", "PeftModel.save_pretrained"),
    # It would also remove older checkpoints, which are real ones.
    ("transformers", "Trainer._save_checkpoint"),
)
"""Functions that write tensors, by module."""


@contextlib.contextmanager
def supported(num_ranks: int = 1) -> Iterator[None]:
    """Let ordinary code run, as the module's docstring describes.

    Args:
        num_ranks: number of ranks that train together.
    """
    with contextlib.ExitStack() as stack:
        for module, name in SAVING:
            if importlib.util.find_spec(module.partition(".")[0]) is not None:
                owner, attribute = _found(module, name)
                save, plain = _saves_nothing(name), getattr(owner, attribute)
                if "." in name:
                    stack.enter_context(mock.patch.object(owner, attribute, save))
                    continue
                for patch in everywhere(plain, attribute, save):
                    stack.enter_context(patch)
        for refusal in refusals.by_name(num_ranks):
            stack.enter_context(refusal)
        stack.enter_context(mock.patch.object(DataLoader, "__init__", _loads_here))
        stack.enter_context(mock.patch.object(Tensor, "numpy", _zeros))
        stack.enter_context(mock.patch.object(Tensor, "__format__", _formatted))
        stack.enter_context(mock.patch.object(torch, "tensor", _of_numbers))
        stack.enter_context(
            mock.patch.object(_KinetoProfile, "__init__", _profiles_host)
        )
        for owner in (Tensor, UntypedStorage):
            stack.enter_context(_own_addresses(owner))
        stack.enter_context(mock.patch.object(Tensor, "__deepcopy__", _deep_copied))
        # Weights would be made in threads, in which tensors are not fake.
        stack.enter_context(
            mock.patch.dict(os.environ, {"HF_DEACTIVATE_ASYNC_LOAD": "1"})
        )
        for replacement in (*_whole_generation(), *loading.on_virtual_gpu()):
            stack.enter_context(replacement)
        yield


def _found(module: str, name: str) -> tuple[Any, str]:
    """Return the owner of a function, and its name there."""
    owner: Any = importlib.import_module(module)
    *classes, last = name.split(".")
    for one in classes:
        owner = getattr(owner, one)
    return owner, last


def _saves_nothing(name: str) -> Any:
    def save(*args: Any, **kwargs: Any) -> None:
        warnings.warn(
            f"`{name}` writes nothing inside `virtual_gpu`, where tensors have no "
            "values",
            stacklevel=2,
        )

    return save


def _own_addresses(owner: Any) -> contextlib.AbstractContextManager[Any]:
    """Let a tensor or a storage without values have an address of its own.

    Code that looks for tensors that share memory would take all of them for one.
    """
    plain = owner.data_ptr

    def data_ptr(self: Any) -> int:
        if isinstance(self, FakeTensor):
            offset = self.storage_offset() * self.element_size()
            return int(self.untyped_storage()._cdata + offset)
        if isinstance(self, UntypedStorage) and self.device.type == "meta":
            return int(self._cdata)
        return int(plain(self))

    return mock.patch.object(owner, "data_ptr", data_ptr)


_plain_deepcopy: Any = Tensor.__deepcopy__


def _deep_copied(self: Any, memo: Any) -> Any:
    """Copy a tensor by an operator, as torch copies one that has no address.

    Otherwise it clones the storage, which no operator does and the ledger cannot see.
    """
    if not isinstance(self, FakeTensor):
        return _plain_deepcopy(self, memo)
    with mock.patch.object(Tensor, "data_ptr", return_value=0):
        return _plain_deepcopy(self, memo)


_plain_tensor: Any = torch.tensor
# torch keeps which functions take the default device, as they are called at first.
_device_constructors()
_plain_profile: Any = _KinetoProfile.__init__
_plain_init: Any = DataLoader.__init__
_plain_numpy: Any = Tensor.numpy
_plain_format: Any = Tensor.__format__


def _loads_here(self: Any, *args: Any, **kwargs: Any) -> None:
    """Make a loader without worker processes, in which the GPU would not exist."""
    if len(args) > 5:
        args = (*args[:5], 0, *args[6:])
    else:
        kwargs["num_workers"] = 0
    for name in ("persistent_workers", "prefetch_factor", "timeout"):
        kwargs.pop(name, None)
    _plain_init(self, *args, **kwargs | {"multiprocessing_context": None})


def _profiles_host(self: Any, *, activities: Any = None, **kwargs: Any) -> None:
    """Profile the host as well, as a profiler of no activity that exists fails."""
    if activities is not None:
        activities = {*activities, ProfilerActivity.CPU}
    _plain_profile(self, activities=activities, **kwargs)


def _of_numbers(data: Any, **kwargs: Any) -> Tensor:
    """Make a tensor of data in which there may be fake tensors, whose memory it reads.

    `item` has an answer for them.
    """
    try:
        return cast(Tensor, _plain_tensor(data, **kwargs))
    except NotImplementedError:
        return cast(Tensor, _plain_tensor(_numbers_of(data), **kwargs))


def _numbers_of(data: Any) -> Any:
    if isinstance(data, list | tuple):
        return [_numbers_of(one) for one in data]
    return data.tolist() if isinstance(data, Tensor) else data


def _zeros(self: Tensor, **kwargs: Any) -> Any:
    """Return zeros for a fake tensor on the host, as `item` and `tolist` do."""
    if not isinstance(self, FakeTensor) or self.fake_device.type != "cpu":
        return _plain_numpy(self, **kwargs)
    name = str(self.dtype).removeprefix("torch.")
    return np.zeros(tuple(self.shape), dtype=np.dtype(name))


def _formatted(self: Tensor, spec: str) -> str:
    if isinstance(self, FakeTensor) and self.dim() == 0:
        return format(self.item(), spec)
    return str(_plain_format(self, spec))


def _whole_generation() -> Iterator[contextlib.AbstractContextManager[Any]]:
    """Generate until the greatest length, as no sequence is known to have ended."""
    if importlib.util.find_spec("transformers") is None:
        return
    criteria = importlib.import_module("transformers.generation.stopping_criteria")
    mixin = importlib.import_module("transformers").GenerationMixin
    plain = criteria.MaxLengthCriteria.__call__
    is_long = False

    def call(self: Any, input_ids: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal is_long
        is_long = input_ids.shape[-1] >= self.max_length
        return plain(self, input_ids, *args, **kwargs)

    def has_unfinished(self: Any, this_peer_finished: Any, *_: Any, **__: Any) -> bool:
        return this_peer_finished is False or not is_long

    def has_unfinished_beams(*_: Any) -> bool:
        return not is_long

    yield mock.patch.object(criteria.MaxLengthCriteria, "__call__", call)
    yield mock.patch.object(mixin, "_has_unfinished_sequences", has_unfinished)
    yield mock.patch.object(
        mixin,
        "_beam_search_has_unfinished_sequences",
        staticmethod(has_unfinished_beams),
    )
