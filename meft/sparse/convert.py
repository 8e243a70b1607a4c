"""Adds sparse adapters to the blocks of a transformers model."""

import contextlib
import functools
import inspect
import shutil
from collections.abc import Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from meft import host_memory, mapped_memory
from meft.backbone import parallel
from meft.backbone.block_call import by_name
from meft.backbone.families import FAMILIES
from meft.backbone.family import Family
from meft.backbone.find import BlockList, find_blocks, transformers_model
from meft.backbone.proof import prove
from meft.backbone.uncalled import refuse_what_would_not_run
from meft.backbone.weights import refuse_without_derivative
from meft.errors import ConfigError, HostMemoryError, UnsupportedModelError
from meft.sparse import router
from meft.sparse.adapter import (
    NO_BATCH,
    Batch,
    OnBatch,
    Padding,
    SharedState,
    SparseAdapter,
    sparse_adapters,
)
from meft.sparse.config import SparseConfig
from meft.sparse.engine import slots_for
from meft.sparse.home import STATES
from meft.sparse.offloaded_rows import offload
from meft.sparse.row_parameter import rows_of
from meft.sparse.rows import ResidentRows, Rows
from meft.sparse.store import RowStore
from meft.trainable import choose_trainable, has_peft_layers, warn_if_frozen

Model = TypeVar("Model", bound=nn.Module)
_IGNORED_BY_DDP = "_ddp_params_and_buffers_to_ignore"


def insert_sparse_adapters(model: Model, config: SparseConfig) -> Model:
    """Add a sparse adapter next to the feed-forward of every block, in place.

    Arguments, result, errors and warnings are those of `meft.add_sparse_adapters`.
    """
    if sparse_adapters(model):
        raise UnsupportedModelError("this model has sparse adapters already")
    refuse_without_derivative(model)
    found = _find(model)
    if any(p.is_meta for p in found.blocks[0].parameters()):
        raise UnsupportedModelError(
            "this model has no weights yet (device `meta`): load them, or call "
            "`model.to_empty(device=...)` and initialize them, before "
            "`meft.add_sparse_adapters()`"
        )
    # Skip quantised weights, whose dtype is that of their storage.
    weights = found.blocks[0].parameters()
    dtype = next(p.dtype for p in weights if p.is_floating_point())
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        dtype = torch.float32  # rows are no wider than that
    transfer_dtype = (
        getattr(torch, config.transfer_dtype) if config.transfer_dtype else dtype
    )
    _refuse_too_many_rows(found, config, transfer_dtype)
    _refuse_far(config, len(found.blocks))
    choose_trainable(model)
    shared = SharedState(had_peft_layers=has_peft_layers(model))
    stores = [
        _new_store(block, found, config, transfer_dtype) for block in found.blocks
    ]
    for block, rows in zip(found.blocks, _rows(stores, config), strict=True):
        weight = None
        device = next(block.parameters()).device
        if config.experts:
            keys = rows.store.rows[:, : rows.store.width // 2]
            weight = router.make_router(keys, config.experts)
            weight.requires_grad = config.router_learns
        adapter = SparseAdapter(rows, weight, config, shared)
        block.add_module(parallel.NAME, adapter.to(device).train(block.training))
        kind: Any = type(block)
        block.__class__ = _with_adapter(kind, found.family)
    for module in _that_know_batches(model):
        _watch_batches(module, shared)
    # Otherwise `DistributedDataParallel` would copy rows into its buckets.
    names = [name for name, p in model.named_parameters() if rows_of(p) is not None]
    model.__dict__[_IGNORED_BY_DDP] = names
    return model


def remove_sparse_adapters(model: nn.Module) -> None:
    """Undo `insert_sparse_adapters()`, except for which parameters are trainable."""
    blocks: list[Any] = [m for m in model.modules() if hasattr(m, parallel.NAME)]
    for block in blocks:
        delattr(block, parallel.NAME)
        block.__class__ = block.plain
    for module in model.modules():
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for key, hook in list(hooks.items()):
                if isinstance(hook, functools.partial) and hook.func in _HOOKS:
                    del hooks[key]
    model.__dict__.pop(_IGNORED_BY_DDP, None)


@contextlib.contextmanager
def without_sparse_adapters(model: nn.Module) -> Iterator[None]:
    """Run the body with blocks of their own classes, which do not run adapters."""
    blocks: list[Any] = [m for m in model.modules() if hasattr(m, parallel.NAME)]
    adapted = [(block, type(block)) for block in blocks]
    for block, kind in adapted:
        block.__class__ = kind.plain
    try:
        yield
    finally:
        for block, kind in adapted:
            block.__class__ = kind


def _that_know_batches(model: nn.Module) -> list[nn.Module]:
    """Return the modules around all blocks that are given the mask of a batch.

    Models with a head call them in different orders: that of OPT calls its decoder, and
    not the model without a head, which calls it too.
    """
    inner = transformers_model(model)
    whole = {inner, inner.base_model} if isinstance(inner, PreTrainedModel) else {inner}
    return [
        module
        for module in inner.modules()
        if module in whole or (_takes_mask(module) and sparse_adapters(module))
    ]


def _takes_mask(module: nn.Module) -> bool:
    kind: Any = type(module)
    names = inspect.signature(kind.forward).parameters.keys()
    return _MASK in names and not names.isdisjoint(_TOKENS)


def _find(model: nn.Module) -> BlockList:
    if any(getattr(module, parallel.REBUILDS, False) for module in model.modules()):
        raise UnsupportedModelError(
            "this model is reversible already: call `meft.add_sparse_adapters()` first "
            "and `meft.make_reversible()` on the result"
        )
    lists = find_blocks(model)
    if len(lists) != 1 or not lists[0].family.takes_parallel_adapter:
        names = ", ".join(f.name for f in FAMILIES if f.takes_parallel_adapter)
        raise UnsupportedModelError(
            f"{type(model).__name__} is not supported by sparse adapters: they run in "
            f"parallel with the feed-forward of transformers' {names}, with any head"
        )
    return lists[0]


def _refuse_far(config: SparseConfig, num_blocks: int) -> None:
    if config.lookahead >= num_blocks:
        raise ConfigError(
            f"`lookahead` is {config.lookahead}, but the model has {num_blocks} "
            f"blocks, in none of which experts would be chosen so early: set it to at "
            f"most {num_blocks - 1}"
        )


def _refuse_too_many_rows(
    found: BlockList, config: SparseConfig, transfer_dtype: torch.dtype
) -> None:
    first = found.blocks[0]
    width = 2 * found.family.adapter_shape(first, found.config).hidden_size
    num_rows = len(found.blocks) * config.num_neurons
    is_on_host = next(first.parameters()).device.type == "cpu"
    parts = host_bytes(config, num_rows, width, transfer_dtype, is_on_host=is_on_host)
    places = {"host memory": (parts, host_memory.available_bytes(), _OR_FILES)}
    if config.folder is not None:
        inside = {name: n for name, n in parts.items() if name not in _IN_MEMORY}
        outside = {name: n for name, n in parts.items() if name in _IN_MEMORY}
        places = {
            f"the disk of {config.folder!r}": (inside, _free(config.folder), ""),
            "host memory": (outside, host_memory.available_bytes(), ""),
        }
    for place, (kept, available, remedy) in places.items():
        needed = sum(kept.values())
        if available is None or needed <= available:
            continue
        listed = ", ".join(f"{name} {n:,}" for name, n in kept.items() if n)
        raise HostMemoryError(
            f"to train {num_rows:,} neurons of {width} numbers takes {needed:,} bytes "
            f"of {place} ({listed}), but {available:,} bytes are available: lower "
            f"`num_neurons` (now {config.num_neurons} a block){remedy}"
        )


_IN_MEMORY = ("idle steps", "cache")
"""What takes host memory also where rows are kept in files."""
_OR_FILES = ", or keep rows in files by `SparseConfig.folder`"


def _free(folder: str) -> int:
    """Return the free bytes of the disk of a folder.

    Raises:
        HostMemoryError: there is no such folder.
    """
    try:
        return shutil.disk_usage(folder).free
    except OSError as error:
        raise HostMemoryError(
            f"rows cannot be kept in `folder` {folder!r}: {error.strerror}. Create it, "
            "or take a folder on a local disk"
        ) from error


def host_bytes(
    config: SparseConfig,
    num_rows: int,
    width: int,
    transfer_dtype: torch.dtype,
    *,
    is_on_host: bool,
) -> dict[str, int]:
    """Return the bytes of host memory that rows take in training, by purpose.

    Args:
        config: placement and cache of the rows.
        num_rows: the number of rows of all blocks.
        width: numbers in a row.
        transfer_dtype: dtype of the copy that is transferred.
        is_on_host: whether the model itself is in host memory.

    Returns:
        The bytes of each purpose.
    """
    numbers = num_rows * width
    steps = RowStore.bytes_per_row * num_rows
    found = {"rows": 4 * numbers}
    if transfer_dtype != torch.float32:
        found["16-bit copy"] = 2 * numbers
    if config.placement == "resident":
        if is_on_host:
            found |= {"moments": 8 * numbers, "gradients": 4 * numbers}
            found |= {"idle steps": steps, "rows while they are saved": 4 * numbers}
        return found
    held, gradients, home = slots_for(config, num_rows, width, transfer_dtype)
    found["moments"] = 8 * numbers
    found |= {"idle steps": steps, "rows while they are saved": 4 * numbers}
    if gradients < num_rows:
        found["gradients"] = 4 * numbers
    if is_on_host:
        of_slots = held * transfer_dtype.itemsize + gradients * 4 + home * 4 * STATES
        found["cache"] = width * of_slots
    return found


def _new_store(
    block: nn.Module,
    found: BlockList,
    config: SparseConfig,
    transfer_dtype: torch.dtype,
) -> RowStore:
    """Create rows with keys from N(0, 0.02^2) and values 0.

    Initially the adapter therefore adds 0.
    """
    hidden_size = found.family.adapter_shape(block, found.config).hidden_size
    shape = config.num_neurons, 2 * hidden_size
    folder = config.folder
    rows = torch.zeros(shape)
    if folder is not None:
        rows = mapped_memory.zeros(shape, torch.float32, folder)
    rows[:, :hidden_size].normal_(std=router.KEY_STD)
    return RowStore(rows, transfer_dtype, config.update, folder)


def _rows(stores: list[RowStore], config: SparseConfig) -> list[Rows]:
    if config.placement == "resident":
        return [ResidentRows(store) for store in stores]
    return list(offload(stores, config).blocks)


@functools.cache
def _with_adapter(original: Any, family: Family) -> type[nn.Module]:
    """Return a subclass of `original` for blocks with a sparse adapter."""

    class WithSparseAdapter(original):  # type: ignore[misc]
        plain = original

        def __reduce_ex__(self, protocol: Any) -> Any:
            # This class cannot be imported by name.
            _, _, *state = super().__reduce_ex__(protocol)
            return (_bare_block, (original, family), *state)

        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            # It is an argument so that gradient checkpointing passes it again.
            batch = self.parallel_adapter.shared.batch
            return super().__call__(*args, batch=batch, **kwargs)

        def forward(
            self,
            *args: Any,
            batch: Batch = NO_BATCH,
            **kwargs: Any,
        ) -> Any:
            hidden, call = by_name(original, args, kwargs)
            label = f"a {original.__name__}"
            refuse_what_would_not_run(family, self, label, is_called=True)
            known = self.parallel_adapter.shared.proven
            proven = prove(
                known, family, self, original, hidden, call, "a block", is_running=True
            )
            adapter = OnBatch(self.parallel_adapter, batch)
            output = proven.whole(self, hidden, adapter, **call)
            return proven.layout(self).returned(output)

    WithSparseAdapter.__name__ = f"{original.__name__}WithSparseAdapter"
    WithSparseAdapter.__qualname__ = WithSparseAdapter.__name__
    return WithSparseAdapter


def _bare_block(original: Any, family: Family) -> nn.Module:
    """Create a block with a sparse adapter that `copy` or `pickle` fills."""
    kind = _with_adapter(original, family)
    return kind.__new__(kind)


def _watch_batches(model: nn.Module, shared: SharedState) -> None:
    # Partials are used instead of closures: a copy of the model gets hooks on its own
    # state.
    model.register_forward_pre_hook(
        functools.partial(_note_batch, shared), with_kwargs=True
    )
    model.register_forward_hook(
        functools.partial(_forget_batch, shared), always_call=True
    )


def _note_batch(
    shared: SharedState, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    _warn_if_frozen(shared, model)
    given = inspect.signature(type(model).forward).bind(model, *args, **kwargs)
    call = {**given.arguments, **given.arguments.get("kwargs", {})}
    named = {name: call.get(name) for name in (_MASK, *_TOKENS)}
    tensors = {name: each for name, each in named.items() if isinstance(each, Tensor)}
    around = shared.batch
    if shared.runs(model) or not _is_same(around, tensors):
        around = Batch(
            padding=_padding(call), chosen_by=_chosen_by(model), given=tensors
        )
    shared.enter(model, around)


def _is_same(around: Batch, given: dict[str, Tensor]) -> bool:
    """Return whether a module is given what the one around it was given.

    A mask of another form than that of tokens is made of that.
    """
    if around is NO_BATCH:
        return False
    mask = given.get(_MASK)
    has_own = mask is not None and mask.dim() == 2
    names = given.keys() & around.given.keys()
    if not has_own:
        names -= {_MASK}
    elif _MASK not in names:
        return False
    return all(given[name] is around.given[name] for name in names)


def _padding(call: dict[str, Any]) -> Padding | None:
    mask = call.get(_MASK)
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        return None  # the mask does not identify padding tokens
    for name in _TOKENS:
        if isinstance(call.get(name), Tensor):
            # With a cache, the mask also covers the cached tokens.
            return Padding.of(mask[:, -call[name].shape[1] :].bool())
    return None


def _chosen_by(model: nn.Module) -> dict[SparseAdapter, SparseAdapter]:
    """Return the adapter at whose input the experts of another one are chosen."""
    adapters = list(sparse_adapters(model).values())
    distance = adapters[0].config.lookahead if adapters else 0
    if not distance:
        return {}
    return dict(zip(adapters[distance:], adapters, strict=False))


def _warn_if_frozen(shared: SharedState, model: nn.Module) -> None:
    if not model.training or not torch.is_grad_enabled() or shared.has_warned_of_frozen:
        return
    adapters = sparse_adapters(model).values()
    shared.has_warned_of_frozen = warn_if_frozen(
        [p for adapter in adapters for p in adapter.parameters()],
        "meft.add_sparse_adapters",
        f".{parallel.NAME}.",
        peft_came_last=has_peft_layers(model) and not shared.had_peft_layers,
    )


def _forget_batch(shared: SharedState, *unused: Any) -> None:
    shared.leave()


_MASK, _TOKENS = "attention_mask", ("input_ids", "inputs_embeds")
"""Arguments that say which tokens are padding, and hold the tokens of a batch."""
_HOOKS = (_note_batch, _forget_batch)
