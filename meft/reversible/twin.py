"""The plain twin: a stack of couplings, run forward under ordinary autograd.

This is `backward="store"`, the reference of every test: autograd stores the activations
of each branch and differentiates through them. The couplings between branches are three
small autograd functions, whose gradients are those of

    t <- scale t [- scale s] + value

with the identity for every rounding. A stream consists of values, which the arithmetic
computes with and which are not part of the autograd graph, and a carrier, which has the
gradient's shape and dtype, and no storage.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from meft.reversible.coupling import Arithmetic, Context, Coupling
from meft.reversible.execution_context import ExecutionContext
from meft.reversible.extremes import Extremes
from meft.reversible.rng import replayed
from meft.shapes import Hidden


class TrackedStream(NamedTuple):
    """A stream as autograd handles it: its values and its carrier."""

    values: Tensor
    carrier: Tensor


class Streams(NamedTuple):
    """The two streams of a stack."""

    first: TrackedStream
    second: TrackedStream

    def pair(self) -> list[TrackedStream]:
        """Return the two streams."""
        return [self.first, self.second]


@dataclass(frozen=True, kw_only=True, slots=True)
class Stack:
    """A run of couplings with plain arguments, created anew for every forward."""

    couplings: Sequence[Coupling]
    """Couplings, lowest first."""
    arithmetic: Arithmetic
    seed: int | None
    """Seed of the dropout masks; None in evaluation."""
    num_chunks: int
    """Number of parts in which the tokenwise part of a branch processes the tokens."""

    @property
    def lowest(self) -> int:
        """Return the index in the model of the lowest block."""
        return self.couplings[0].block

    def mixed(self, coupling: Coupling, x: Tensor, context: Context) -> Tensor:
        """Run the first half of a branch, which mixes tokens.

        Args:
            coupling: the coupling whose branch is run.
            x: what its source stream holds, `batch seq hidden`.
            context: tensors that the block receives in addition to the stream, by name.

        Returns:
            The result, of the shape of `x`; `x` itself if the branch has no such half.
        """
        part = coupling.branch.mixing
        if part is None:
            return x
        with replayed(self.seed, coupling.number, 0, x.device):
            return part.function(x, context)

    def chunks(self, coupling: Coupling, mixed: Tensor) -> Sequence[Tensor]:
        """Split a tensor into the chunks to which the second half is applied in turn.

        Gradients of the same shape can be split in the same way.
        """
        if coupling.branch.tokenwise is None or self.num_chunks == 1:
            return (mixed,)
        # These are parts of one long row: parts of every row would not be contiguous,
        # and a linear layer would then copy its weights for each.
        row = mixed.reshape(1, -1, mixed.shape[-1])
        return row.chunk(self.num_chunks, dim=1)

    def tokenwise(self, coupling: Coupling, chunk: Tensor, index: int) -> Tensor:
        """Run the second half of a branch, which processes each token independently.

        Args:
            coupling: the coupling whose branch is run.
            chunk: one of `chunks()`.
            index: the position of the chunk, which determines the seed of its dropout.

        Returns:
            The result, of the shape of `chunk`.
        """
        part = coupling.branch.tokenwise
        if part is None:
            return chunk
        with replayed(self.seed, coupling.number, 1 + index, chunk.device):
            return part.function(chunk)

    def value(self, coupling: Coupling, x: Tensor, context: Context) -> Tensor:
        """Run a branch.

        Args:
            coupling: the coupling whose branch is run.
            x: what its source stream holds, `batch seq hidden`.
            context: tensors that the block receives in addition to the stream, by name.

        Returns:
            The output of the branch, of the shape of `x`.
        """
        if coupling.branch.is_sum:
            # These views give each part a node, which sums its gradients of x before
            # they are added, as the parts of a rebuilt branch are.
            mixed = self.mixed(coupling, x.view_as(x), context)
            return mixed + self._in_chunks(coupling, x.view_as(x))
        return self._in_chunks(coupling, self.mixed(coupling, x, context))

    def _in_chunks(self, coupling: Coupling, mixed: Tensor) -> Tensor:
        chunks = self.chunks(coupling, mixed)
        outputs = [self.tokenwise(coupling, c, i) for i, c in enumerate(chunks)]
        return joined(outputs, mixed.shape)


def joined(chunks: Sequence[Tensor], shape: torch.Size) -> Tensor:
    """Join chunks to a tensor of that shape."""
    whole = chunks[0] if len(chunks) == 1 else torch.cat(list(chunks), dim=1)
    return whole.view(shape)


def enter(stack: Stack, hidden: Hidden, extremes: Extremes) -> Streams:
    """Create two equal streams from the hidden states.

    Args:
        stack: the couplings.
        hidden: `batch seq hidden`.
        extremes: records the range of `hidden`.

    Returns:
        The streams, connected to `hidden` by autograd.
    """
    values = stack.arithmetic.enter(hidden.detach())
    carriers = _Enter.apply(hidden, values, stack.arithmetic.gradient_dtype)  # type: ignore[no-untyped-call]
    extremes.note(stack.lowest, hidden, values)
    first, second = (TrackedStream(values, carrier) for carrier in carriers)
    return Streams(first, second)


def run(
    stack: Stack, streams: Streams, context: Context, extremes: Extremes
) -> Streams:
    """Run all couplings, the lowest first, under autograd.

    Args:
        stack: the couplings.
        streams: the streams that `enter` returned.
        context: tensors that the blocks receive in addition to the streams, by name.
        extremes: records the range of every stream.

    Returns:
        The streams after the last coupling.
    """
    with ExecutionContext.current(streams.first.values.device).entered():
        return _run(stack, streams, context, extremes)


def _run(
    stack: Stack, streams: Streams, context: Context, extremes: Extremes
) -> Streams:
    pair = streams.pair()
    # These views give the whole run a node, which sums the gradient of a shared tensor
    # as a rebuilding stack does before that of another run is added: sums depend on
    # their order.
    context = {name: tensor.view_as(tensor) for name, tensor in context.items()}
    for coupling in stack.couplings:
        target, source = pair[coupling.target], pair[1 - coupling.target]
        value = stack.value(coupling, read(stack, source), context)
        coupled = _couple(stack.arithmetic, target, source, value, coupling)
        extremes.note(coupling.block, value, coupled.values)
        pair[coupling.target] = coupled
    return Streams(pair[0], pair[1])


def read(stack: Stack, stream: TrackedStream) -> Hidden:
    """Return what a stream holds, with the gradient of the identity."""
    out: Tensor = _Read.apply(stream.carrier, stream.values, stack.arithmetic)  # type: ignore[no-untyped-call]
    return out


def added(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    """Return the sum of two tensors, either of which may be None."""
    return one if other is None else other if one is None else one + other


def carrier_like(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a tensor of the shape of `values` that takes no memory."""
    return values.new_zeros((), dtype=dtype).expand(values.shape)


def _couple(
    arithmetic: Arithmetic,
    target: TrackedStream,
    source: TrackedStream,
    value: Tensor,
    coupling: Coupling,
) -> TrackedStream:
    values = target.values.clone()
    arithmetic.couple_(values, source.values, value.detach(), coupling)
    carrier = _Couple.apply(target.carrier, source.carrier, value, coupling)  # type: ignore[no-untyped-call]
    return TrackedStream(values, carrier)


class _Enter(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, values: Tensor, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """Create the carriers of two equal streams.

        Args:
            ctx: the autograd context.
            hidden: the input of the stack, `batch seq hidden`.
            values: the values of the streams, of the same shape.
            dtype: the dtype of the gradients of streams.

        Returns:
            The two carriers, of the shape of `values`.
        """
        ctx.dtype = hidden.dtype
        ctx.set_materialize_grads(False)
        return carrier_like(values, dtype), carrier_like(values, dtype)

    @staticmethod
    def backward(
        ctx: Any, one: Tensor | None, other: Tensor | None
    ) -> tuple[Tensor | None, None, None]:
        """Add up the gradients of both carriers.

        Args:
            ctx: what `forward` kept.
            one, other: gradients of the two carriers, `batch seq hidden`; None for one
                that nothing used.

        Returns:
            The gradient of the hidden states, None if there is none; None twice.
        """
        total = added(one, other)
        return None if total is None else total.to(ctx.dtype), None, None


class _Read(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, carrier: Tensor, values: Tensor, arithmetic: Arithmetic
    ) -> Tensor:
        """Return what a stream holds.

        Args:
            ctx: the autograd context.
            carrier: the carrier of the stream, `batch seq hidden`.
            values: its values, of the same shape.
            arithmetic: the arithmetic of the stream.

        Returns:
            The stream in the dtype in which branches read it, of the same shape.
        """
        ctx.dtype = carrier.dtype
        return arithmetic.read(values)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        # Always a copy: a rebuilt stack below empties the gradient that it receives.
        return gradient.to(ctx.dtype, copy=True), None, None


class _Couple(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, target: Tensor, source: Tensor, value: Tensor, coupling: Coupling
    ) -> Tensor:
        """Create the carrier of a target after its coupling.

        Args:
            ctx: the autograd context.
            target: the carrier of the target, `batch seq hidden`.
            source: the carrier of the source, of the same shape.
            value: the output of the branch, of the same shape.
            coupling: the scale and the form of the coupling.

        Returns:
            The new carrier, of the same shape.
        """
        ctx.coupling, ctx.dtype = coupling, value.dtype
        return carrier_like(target, target.dtype)

    @staticmethod
    def backward(
        ctx: Any, gradient: Tensor
    ) -> tuple[Tensor, Tensor | None, Tensor, None]:
        scaled = gradient * ctx.coupling.scale  # a new tensor, for the same reason
        to_source = -scaled if ctx.coupling.difference else None
        return scaled, to_source, gradient.to(ctx.dtype), None
