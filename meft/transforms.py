"""Checks against uses of a model that this library's autograd functions do not support.

These are second derivatives, `torch.func`, and programs recorded by `torch.jit.trace`
or `torch.export`. Each is refused at the first point where its result would be wrong.
"""

import torch

from meft.errors import UnsupportedCallError


def refuse_create_graph(what: str, remedy: str = "") -> None:
    """Refuse a backward pass that records its own graph. Call it in a `backward`.

    `once_differentiable` would raise when the gradients are differentiated, but not if
    the incoming gradient is a constant: a penalty on gradients would then omit a part
    of them.

    Args:
        what: the part of the library that does not support it, for the message.
        remedy: an additional sentence of the message.

    Raises:
        UnsupportedCallError: this backward pass runs with `create_graph=True`.
    """
    if torch.is_grad_enabled():
        raise UnsupportedCallError(
            f"`create_graph=True` is not supported by {what}: gradients are computed "
            f"without a graph, so they have no derivative. {remedy}".rstrip(". ")
        )


def refuse_func(what: str) -> None:
    """Refuse `torch.func` and `torch.vmap`.

    Args:
        what: the part of the library that does not support them, for the message.

    Raises:
        UnsupportedCallError: one of their transforms is active.
    """
    if torch._C._are_functorch_transforms_active():
        raise UnsupportedCallError(
            f"`torch.func` and `torch.vmap` are not supported by {what}: call the "
            "model outside of them, and use `torch.autograd.grad()` or `backward()`"
        )


def refuse_recording(reason: str) -> None:
    """Refuse `torch.jit.trace` and `torch.export`.

    Args:
        reason: why a recorded program would be wrong, as the end of the message.

    Raises:
        UnsupportedCallError: the model is being traced or exported.
    """
    if torch._C._is_tracing() or torch.compiler.is_exporting():
        raise UnsupportedCallError(
            "this model cannot be recorded by `torch.jit.trace` or `torch.export`: "
            f"{reason}"
        )


def is_recording() -> bool:
    """Return whether operations are recorded or transformed instead of computed."""
    return (
        torch.compiler.is_compiling()
        or torch.compiler.is_exporting()
        or bool(torch._C._is_tracing())
        or torch._C._are_functorch_transforms_active()
    )


def in_backward() -> bool:
    """Return whether autograd is running a backward in this thread."""
    return bool(torch._C._current_graph_task_id() != -1)
