"""Modules that are run in parts, and checks for attached code that would never run.

The two halves of a family call the modules inside a block, not the block: its own
`forward`, and the hooks that `nn.Module.__call__` runs around it, would silently be
skipped. A few containers inside a block are run in parts as well (`Layout.in_parts`).
Where a block has such code (`must_be_called`), a stack calls the block if it can. Code
that runs the halves calls `refuse_what_would_not_run` first. `refuse_calls` is for
blocks whose adapters are stored outside the block.
"""

from collections.abc import Collection, Iterator
from typing import Any

from torch import nn

from meft.backbone.called import is_called_by_a_stack, is_sharded
from meft.backbone.family import Family
from meft.errors import UnsupportedCallError

_HOOKS = {
    "_forward_pre_hooks": "forward pre-hook",
    "_forward_hooks": "forward hook",
    "_backward_pre_hooks": "full backward pre-hook",
    "_backward_hooks": "backward hook",
}
"""Attributes of a module that hold hooks, with PyTorch's names for the hooks."""
_WRAPPER = "FullyShardedDataParallel"
"""Name of PyTorch's class of FSDP1; importing it takes a second."""


def run_in_parts(
    family: Family, block: nn.Module, is_called: bool = False
) -> Iterator[tuple[str, nn.Module]]:
    """Yield the modules of a block that are never called, by their name in the block.

    Args:
        family: the structure of the block.
        block: one block.
        is_called: whether the block itself is called, and only its inside run in parts.
    """
    if not is_called:
        yield "", block
    for name in family.layout(block).in_parts:
        yield name, block.get_submodule(name)


def ignored(module: Any) -> str | None:
    """Describe code attached to `module` that runs only if it is called, if any."""
    for attribute, kind in _HOOKS.items():
        for hook in getattr(module, attribute).values():
            # transformers leaves these hooks after a call with
            # `output_hidden_states=True`. They do nothing by themselves, and that
            # argument is refused elsewhere.
            is_theirs = hook.__module__ == "transformers.utils.output_capturing"
            if not is_theirs and hook is not _refuse_call:
                return f"a {kind} (`{getattr(hook, '__qualname__', hook)}`)"
    if is_replaced(module):
        return (
            "a `forward` that was replaced on the instance (accelerate does so to move "
            "inputs between devices)"
        )
    return None


def is_replaced(module: Any) -> bool:
    """Return whether the `forward` of an instance is not that of its class."""
    forward = vars(module).get("forward")
    # Code that restores a replaced `forward` may leave the module's own method there.
    return getattr(forward, "__func__", forward) not in (None, type(module).forward)


def refuse_calls(block: nn.Module) -> None:
    """Make every call of `block` raise, as it would run without its adapters."""
    block.register_forward_pre_hook(_refuse_call)


def allow_calls(block: nn.Module) -> None:
    """Undo `refuse_calls`."""
    hooks = block._forward_pre_hooks
    for key in [key for key, hook in hooks.items() if hook is _refuse_call]:
        del hooks[key]


def _refuse_call(block: nn.Module, args: tuple[Any, ...]) -> None:
    if is_called_by_a_stack(block):
        return
    raise UnsupportedCallError(
        f"a {type(block).__name__} of a reversible stack was called by itself, and "
        "would run apart from the stack, without its adapters. Call the model. A loop "
        "of your own works in a method named `forward`; elsewhere, call the stack as "
        "one module, `layers(hidden_states, ...)` in place of all its blocks. To train "
        "fewer, more or other blocks, change the list before "
        "`meft.make_reversible`"
    )


def refuse_sharded(module: nn.Module) -> None:
    """Refuse FSDP1 around a part of `module`, which holds all blocks.

    Raises:
        UnsupportedCallError: a module inside is sharded separately.
    """
    for name, part in module.named_modules():
        kinds = {kind.__name__ for kind in type(part).__mro__}
        if _WRAPPER in kinds or (not name and "FSDPModule" in kinds):
            raise UnsupportedCallError(
                f"`{name}` of a reversible stack is sharded by FSDP "
                f"({type(part).__name__}), which is not supported: its weights would "
                "get no gradient. Shard blocks by FSDP2, `fully_shard(block)`, or the "
                "whole model by one `fully_shard(model)`, or train with "
                "DistributedDataParallel"
            )


def must_be_called(block: nn.Module) -> bool:
    """Return whether a block has attached code that runs only if it is called."""
    return ignored(block) is not None or is_sharded(block) or is_compiled(block)


def is_compiled(block: nn.Module) -> bool:
    """Return whether `module.compile()` has been called on a block."""
    return getattr(block, "_compiled_call_impl", None) is not None


def refuse_what_would_not_run(
    family: Family,
    block: nn.Module,
    label: str,
    is_called: bool = False,
    remedy: str = "",
) -> None:
    """Refuse a block with attached code that would never run.

    Args:
        family: the structure of the block.
        block: one block.
        label: the name of the block in the message, `block 3`.
        is_called: whether the block itself is called, and only its inside run in parts.
        remedy: how the block could be called, as the end of the message.

    Raises:
        UnsupportedCallError: there is such code, or the block has been wrapped.
    """
    if not family.has(block):
        raise UnsupportedCallError(
            f"{label} was replaced by a {type(block).__name__}: wrap or compile "
            f"modules inside the {family.block}, not the block itself, which "
            "is run in parts and never called"
        )
    for name, module in run_in_parts(family, block, is_called):
        found = ignored(module)
        if found is not None:
            in_parts = family.layout(block).in_parts
            inside = ", ".join(
                f"`{child}`" for child in _called_children(in_parts, module, name)
            )
            outside = "the block" if is_called else "the module that holds all blocks"
            owner = f"`{name}` of {label}" if name else label
            raise UnsupportedCallError(
                f"{owner} has {found}, which would never run: this module is run in "
                "parts and not called. Remove it, or attach it to a module that is "
                f"called: {inside}, or {outside}{remedy}"
            )


def _called_children(
    in_parts: Collection[str], module: nn.Module, name: str
) -> Iterator[str]:
    for child_name, child in module.named_children():
        path = f"{name}.{child_name}".lstrip(".")
        if path in in_parts:
            yield from _called_children(in_parts, child, path)
        else:
            yield path
