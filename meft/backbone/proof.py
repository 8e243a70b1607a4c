"""Comparison of the halves of a block with the block's own forward.

A layout says in names what a block computes. Whether that is still true in the
installed version of transformers, for this block with its config, is checked where it
is used first: the block is run once by its own `forward` and once in halves, on the
same input and with the same random numbers. Both must give the same bits. The halves of
a parallel block may be summed in another order than in its own forward, so it may
differ by the rounding of one sum.

Only a few tokens of one row are run where their part of every argument is known, so the
comparison costs little however large the batch is.
"""

import contextlib
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from meft.backbone.caches import NAMES, cache_of
from meft.backbone.called import call_block, is_sharded
from meft.backbone.family import Family
from meft.backbone.layout import Layout
from meft.errors import UnsupportedCallError, UnsupportedModelError
from meft.shapes import Hidden
from meft.transforms import is_recording

_TOKENS = 64
"""Number of tokens that are compared of a longer row."""
_DIMS_OF_TOKENS = {
    "attention_mask": (-2, -1),
    "position_embeddings": (-2,),
    "position_ids": (-1,),
    "cache_position": (-1,),
}
"""Dimensions of arguments that count tokens. The first dimension may count rows."""
_SEED = 0x6D656674
_GREATEST = 60_000
"""Some blocks clamp float16 values close to its maximum of 65,504."""

Proven = dict[tuple[Any, ...], Family]
"""The family of blocks that have been compared, by what makes blocks alike."""


def prove(
    known: Proven,
    family: Family,
    block: nn.Module,
    plain: type[nn.Module],
    hidden: Hidden,
    call: Mapping[str, Any],
    label: str,
) -> Family:
    """Compare a block with its own forward, unless one that is like it has been.

    Args:
        known: what has been compared; a new result is added.
        family: what the block is taken for.
        block: the block, in the mode in which it will run.
        plain: its class, without that of a parallel adapter.
        hidden: hidden states for it, `batch seq hidden`.
        call: its other arguments, by name.
        label: name of the block in error messages, `block 3`.

    Returns:
        `family`; for a guess, one with the layout that computes what the block does.

    Raises:
        UnsupportedModelError: the block computes something else.
        UnsupportedCallError: the family is a guess, and nothing can be said with these
            inputs.
    """
    alike = _likeness(block, plain)
    if alike not in known:
        found = None
        if not is_recording():
            found = _compared(family, block, plain, hidden, call, label)
        if found is None and family.is_guess:
            raise UnsupportedCallError(
                f"a {plain.__name__} is not of a listed family: before it is used, it "
                "has to be compared with its own `forward`, on a batch without a "
                "filled cache and with finite hidden states, and not by "
                "`torch.compile`. Run one such batch first, in the same mode (training "
                "or evaluation)"
            )
        if found is None:
            return family
        known[alike] = found
    return known[alike]


def _likeness(block: nn.Module, plain: type[nn.Module]) -> tuple[Any, ...]:
    """Return what decides how a block computes, other than its parameters.

    Args:
        block: the block.
        plain: its class, without that of a parallel adapter.
    """
    # `training` is one of the attributes: dropout may be missing in a layout.
    simple = (int, float, str, bool, type(None))
    attributes = tuple(
        (name, value)
        for name, value in sorted(vars(block).items())
        if isinstance(value, simple) and not name.endswith(("idx", "id", "index"))
    )
    children = tuple((name, type(child)) for name, child in block.named_children())
    return plain, plain.forward, attributes, children


def _compared(
    family: Family,
    block: nn.Module,
    plain: type[nn.Module],
    hidden: Hidden,
    call: Mapping[str, Any],
    label: str,
) -> Family | None:
    """Return the family with the layout that computes what a block does.

    Args:
        family, block, plain, hidden, call, label: as for `prove`.

    Returns:
        `family`, or for a guess one with a single layout; None if nothing can be said,
        because the block is given a cache with tokens or computes numbers that are not
        finite.

    Raises:
        UnsupportedModelError: the block computes something else.
    """
    if _has_longer_keys(block, hidden, call):
        return None
    call = {n: v for n, v in call.items() if n not in NAMES}
    hidden, call = _few_tokens(hidden.detach(), call)
    differences = []
    is_called = is_sharded(block)  # which gathers its parameters
    with contextlib.nullcontext() if is_called else _without_hooks(block):
        own = _run(lambda: _own(is_called, block, plain, hidden, call), hidden)
        if not _is_comparable(own):
            return None
        for layout in family.layouts if family.is_guess else (family.layout(block),):
            halves = _run(
                partial(_halves, is_called, layout, block, hidden, call), hidden
            )
            difference = _difference(own, halves, layout)
            if difference is None:
                return family.with_layout(layout) if family.is_guess else family
            differences.append(difference)
    described = "similar models" if family.is_guess else family.name
    raise UnsupportedModelError(
        f"{label}, a {plain.__name__}, does not compute what the names of its modules "
        f"imply: its own `forward` and its two halves, as those of {described}, "
        f"differ by {min(differences):.1g} of the greatest value on the same input. "
        "The `forward` may have been replaced, or be that of another version of "
        "transformers. `meft.register_family` describes a class of blocks"
    )


def _has_longer_keys(block: nn.Module, hidden: Tensor, call: Mapping[str, Any]) -> bool:
    """Return whether a block attends to more than the tokens that it is given."""
    cache, mask = cache_of(call), call.get("attention_mask")
    if cache is None:
        return False
    is_longer = isinstance(mask, Tensor) and mask.shape[-1] != hidden.shape[1]
    # Blocks below may have filled their part of the cache in this forward.
    layers = (getattr(module, "layer_idx", None) for module in block.modules())
    layer = next((index for index in layers if index is not None), 0)
    return is_longer or cache.get_seq_length(layer) > 0


def _own(
    is_called: bool,
    block: nn.Module,
    plain: type[nn.Module],
    hidden: Hidden,
    call: Mapping[str, Any],
) -> Any:
    if is_called:
        return call_block(block, hidden, call)
    return plain.forward(block, hidden, **call)


def _halves(
    is_called: bool,
    layout: Layout,
    block: nn.Module,
    hidden: Hidden,
    call: Mapping[str, Any],
) -> Tensor:
    def whole(hidden_states: Hidden, **others: Any) -> Hidden:
        return layout.whole(block, hidden_states, others)

    if is_called:
        return call_block(block, hidden, call, whole)
    return whole(hidden, **call)


@contextlib.contextmanager
def _without_hooks(block: nn.Module) -> Iterator[None]:
    """Run the body without forward hooks inside a block, which may count calls."""
    hooked = [m for m in block.modules() if m._forward_hooks or m._forward_pre_hooks]
    kept = [(m, m._forward_hooks, m._forward_pre_hooks) for m in hooked]
    for module in hooked:
        module._forward_hooks = OrderedDict()
        module._forward_pre_hooks = OrderedDict()
    try:
        yield
    finally:
        for module, hooks, pre_hooks in kept:
            module._forward_hooks, module._forward_pre_hooks = hooks, pre_hooks


def _run(function: Callable[[], Any], hidden: Tensor) -> Tensor:
    """Return the hidden states that a function computes, with fixed random numbers."""
    devices = [hidden.device] if hidden.device.type == "cuda" else []
    caches = torch.is_autocast_cache_enabled()
    # A weight that autocast converts without grad would be used with grad later.
    torch.set_autocast_cache_enabled(False)
    try:
        output = _repeated(function, hidden, devices)
    finally:
        torch.set_autocast_cache_enabled(caches)
    found: Tensor = output[0] if isinstance(output, tuple) else output
    return found


def _repeated(
    function: Callable[[], Any], hidden: Tensor, devices: list[torch.device]
) -> Any:
    with torch.no_grad(), torch.random.fork_rng(devices=devices):
        torch.default_generator.manual_seed(_SEED)
        if devices:
            with torch.cuda.device(hidden.device):
                torch.cuda.manual_seed(_SEED)
        return function()


def _is_comparable(own: Tensor) -> bool:
    """Return whether all values are finite, and none may have been clamped."""
    greatest = own.abs().amax()
    limit = _GREATEST if own.dtype == torch.float16 else torch.finfo(own.dtype).max
    return bool(greatest <= limit)


def _difference(own: Tensor, halves: Tensor, layout: Layout) -> float | None:
    """Return the relative difference; None if there is none that counts."""
    if torch.equal(own, halves):
        return None
    greatest = own.abs().amax().double()
    difference = (own.double() - halves.double()).abs().amax() / greatest
    # Of the sum of three terms in two orders.
    allowed = 4 * torch.finfo(own.dtype).eps if layout.is_parallel else 0.0
    return None if bool(difference <= allowed) else float(difference)


def _few_tokens(
    hidden: Tensor, call: Mapping[str, Any]
) -> tuple[Tensor, Mapping[str, Any]]:
    """Return a few tokens of one row, where that is known to be possible."""
    rows, tokens, *_ = hidden.shape
    tensors = {n for n, v in call.items() if not isinstance(v, _ALIKE_FOR_ALL)}
    if hidden.dim() != 3 or not tensors <= _DIMS_OF_TOKENS.keys():
        return hidden, call

    def part(name: str, value: Any) -> Any:
        if isinstance(value, tuple | list):
            return type(value)(part(name, item) for item in value)
        if not isinstance(value, Tensor):
            return value
        for dim in _DIMS_OF_TOKENS[name]:
            if value.dim() >= -dim and value.shape[dim] == tokens:
                value = value.narrow(dim, 0, min(tokens, _TOKENS))
        if value.dim() > 1 and value.shape[0] == rows:
            value = value[:1]
        return value

    return hidden[:1, :_TOKENS], {n: part(n, v) for n, v in call.items()}


_ALIKE_FOR_ALL = (int, float, str, bool, type(None))
"""Types of arguments that do not depend on the tokens."""
