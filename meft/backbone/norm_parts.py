"""Norms of a block, run and differentiated in parts of the tokens.

Norms of transformers compute in float32 by operations of Python. For long sequences,
the tensors of that dtype which the backward of one norm holds at a time are several
times as large as its input. In parts they exist for one part at a time, and only the
input is saved. Norms of torch (`nn.LayerNorm`, `nn.RMSNorm`) have kernels that need no
such tensors, and are left alone.
"""

import contextlib
import copy
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

_TRANSFORMERS = Path(transformers.__file__).parent
_ENDINGS = ("RMSNorm", "LayerNorm")
_in_use: Counter[int] = Counter()
"""How many threads have put `_run` in the place of the `forward` of a norm, by id."""
_lock = threading.Lock()


@contextlib.contextmanager
def norms_in_parts(block: nn.Module, parts: int) -> Iterator[None]:
    """Run the body with norms of a block that run in parts of the tokens.

    These are norms that transformers defines, whose `forward` reads nothing but tokens
    and the norm's own parameters. Others run as a whole, and so do those with hooks,
    buffers or modules inside, and those inside a compiled module.

    Args:
        block: the block.
        parts: the number of parts; with 1 nothing changes.
    """
    with contextlib.ExitStack() as entered:
        for norm in _norms(block) if parts > 1 else ():
            entered.enter_context(_in_parts(norm, parts))
        yield


@contextlib.contextmanager
def _in_parts(norm: nn.Module, parts: int) -> Iterator[None]:
    """Run the body with `_run` in the place of the `forward` of a norm.

    Several threads may do so at the same time.
    """
    with _lock:
        _in_use[id(norm)] += 1
        vars(norm).setdefault("forward", partial(_run, norm, parts))
    try:
        yield
    finally:
        with _lock:
            _in_use[id(norm)] -= 1
            if not _in_use[id(norm)]:
                del _in_use[id(norm)], vars(norm)["forward"]


def _norms(module: nn.Module) -> Iterator[nn.Module]:
    """Yield the norms that can be run in parts."""
    if getattr(module, "_compiled_call_impl", None) is not None:
        return
    if _is_norm(module):
        yield module
    for child in module.children():
        yield from _norms(child)


def _is_norm(module: nn.Module) -> bool:
    inside = any(True for _ in module.children()) or any(True for _ in module.buffers())
    hooks = (
        module._forward_hooks,
        module._forward_pre_hooks,
        module._backward_hooks,
        module._backward_pre_hooks,
    )
    if inside or any(hooks):
        return False
    if "forward" in vars(module) and id(module) not in _in_use:
        return False
    code = getattr(type(module).forward, "__code__", None)
    is_theirs = code and Path(code.co_filename).is_relative_to(_TRANSFORMERS)
    return bool(is_theirs) and type(module).__name__.endswith(_ENDINGS)


def _run(norm: nn.Module, parts: int, *args: Any, **kwargs: Any) -> Any:
    """Run a norm in parts, if it is called with one tensor of tokens."""
    forward = type(norm).forward
    tokens = args[0] if len(args) == 1 and not kwargs else None
    if not isinstance(tokens, Tensor) or tokens.dim() < 3:
        return forward(norm, *args, **kwargs)
    named = list(norm.named_parameters())
    names = tuple(name for name, _ in named)
    weights = (weight for _, weight in named)
    return _InParts.apply(norm, parts, names, tokens, *weights)  # type: ignore[no-untyped-call]


class _InParts(torch.autograd.Function):
    """Computes a norm part by part, and recomputes each part in the backward."""

    @staticmethod
    def forward(
        ctx: Any,
        norm: nn.Module,
        parts: int,
        names: tuple[str, ...],
        tokens: Tensor,
        *weights: Tensor,
    ) -> Tensor:
        """Return what the norm returns, of the shape of `tokens`."""
        ctx.norm, ctx.parts, ctx.names = norm, parts, names
        ctx.again = _autocast(tokens)
        ctx.save_for_backward(tokens, *weights)
        forward: Callable[..., Tensor] = type(norm).forward
        output = None
        for place in _places(tokens, parts):
            part = forward(norm, tokens[:, place])
            if output is None:
                output = part.new_empty(tokens.shape)
            output[:, place] = part
        assert output is not None  # there is at least one part
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        """Return the gradients of the tokens and of the weights."""
        tokens, *weights = ctx.saved_tensors
        wants_tokens, *wants = ctx.needs_input_grad[3:]
        # Copies, so that hooks of the parameters see their whole gradient alone.
        copies = [
            w.detach().requires_grad_(n) for w, n in zip(weights, wants, strict=True)
        ]
        forward = type(ctx.norm).forward
        # Other threads may use the norm, and hooks must not run again.
        again = copy.copy(ctx.norm)
        again._parameters = dict(zip(ctx.names, copies, strict=True))
        trained = [copy for copy in copies if copy.requires_grad]
        d_tokens = torch.empty_like(tokens) if wants_tokens else None
        sums: list[Tensor] = []
        for place in reversed(_places(tokens, ctx.parts)):
            part = tokens[:, place].detach().requires_grad_(wants_tokens)
            with torch.enable_grad(), ctx.again():
                output = forward(again, part)
            inputs = [*([part] if wants_tokens else []), *trained]
            pulled = list(torch.autograd.grad(output, inputs, gradients[0][:, place]))
            if d_tokens is not None:
                d_tokens[:, place] = pulled.pop(0)
            sums = (
                [a + b for a, b in zip(sums, pulled, strict=True)] if sums else pulled
            )
        found = iter(sums)
        d_weights = [next(found) if is_wanted else None for is_wanted in wants]
        return None, None, None, d_tokens, *d_weights


def _places(tokens: Tensor, parts: int) -> list[slice]:
    """Return the positions of each part in the second dimension."""
    length = -(-tokens.shape[1] // parts)
    return [slice(i, i + length) for i in range(0, tokens.shape[1], length)]


def _autocast(tokens: Tensor) -> Callable[[], Any]:
    """Return a context like the present one."""
    kind = tokens.device.type
    is_on, dtype = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
    return partial(torch.autocast, kind, dtype=dtype, enabled=is_on)
