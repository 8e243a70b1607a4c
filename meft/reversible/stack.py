"""A stack of couplings whose backward rebuilds activations instead of storing them.

Between forward and backward, the stack keeps the top pair of streams, a seed, and per
coupling what the arithmetic needs to undo it. The backward visits the couplings from
the top to the bottom. At each coupling, where dt and ds are the gradients of target and
source:

    recompute value = branch(s), pull dt through it:  gradients of parameters, v
    t <- the coupling undone;    dt <- scale dt;    ds <- ds [- dt] + v

(Liao et al., NeurIPS 2023, section 3.1.) Trainable parameters are inputs of the
autograd function and their gradients are returned, so hooks, accumulation, gradient
scaling and `torch.autograd.grad` work as for any other operation, and no frozen tensor
has to require a gradient. Only half a branch's graph is alive at a time: its tokenwise
part is differentiated as soon as it has been recomputed, chunk by chunk, because the
gradient of its output is available already. The coupling is undone before the mixing
part is differentiated: at that point only the graph of the recompute is still alive.
"""

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from meft.errors import MismatchWarning, ReconstructionError
from meft.reversible import twin
from meft.reversible.branch_state import BranchState
from meft.reversible.coupling import Context, Coupling
from meft.reversible.execution_context import ExecutionContext
from meft.reversible.extremes import Extremes
from meft.reversible.gradients import Gradients, keep_hooks_for_whole_gradients
from meft.reversible.rebuild_call import RebuildCall
from meft.reversible.recompute import pull_mixed, recompute_branch
from meft.reversible.recompute_check import RecomputeCheck
from meft.reversible.twin import Stack, Streams, TrackedStream, carrier_like
from meft.shapes import Hidden
from meft.transfer import TransferLedger
from meft.transforms import refuse_create_graph


def run_rebuilt(
    stack: Stack,
    hidden: Hidden,
    context: Context,
    check: RecomputeCheck,
    extremes: Extremes,
    on_mismatch: str = "raise",
    host_ledger: TransferLedger | None = None,
) -> Streams:
    """Compute what `twin.run(twin.enter(...))` does without storing activations.

    Args:
        stack: the couplings.
        hidden: the initial value of both streams, `batch seq hidden`.
        context: tensors in addition to the stream, by name.
        check: checks the rebuilt streams in the forward and in the backward.
        extremes: records the extremes of the forward.
        on_mismatch: what the backward does if it computes other bits than the forward:
            `raise`, `skip` (return no gradients for this stack and the layers below,
            and warn) or `redo` (compute them with stored activations, and warn;
            `hidden` is kept for that).
        host_ledger: if given, what has to be kept is stored in host memory until the
            backward, and this ledger counts the bytes.

    Returns:
        The streams after the last coupling.
    """
    outside = {c.number: check.outside_of(c) for c in stack.couplings}
    state = BranchState.of(stack, outside)
    call = RebuildCall(
        stack=stack,
        names=tuple(context),
        parameters=state.trainable(),
        state=state,
        execution=ExecutionContext.current(hidden.device),
        check=check,
        on_mismatch=on_mismatch,
        host_ledger=host_ledger,
    )
    values_1, values_2, carrier_1, carrier_2 = _Rebuild.apply(  # type: ignore[no-untyped-call]
        call, extremes, hidden, *context.values(), *call.parameters
    )
    return Streams(
        TrackedStream(values_1, carrier_1), TrackedStream(values_2, carrier_2)
    )


_RAISED = (
    "`on_mismatch='redo'` computes such a step again with stored activations, "
    "`on_mismatch='skip'` gives the stack and what is below it no gradients."
)
_SKIPPED = (
    "This batch gives no gradients to this stack and to what is below it; what is "
    "above it, as a task head, has its own (`on_mismatch='skip'`)."
)
_REDONE = (
    "The gradients of this batch were computed again with stored activations "
    "(`on_mismatch='redo'`)."
)


class _Rebuild(torch.autograd.Function):
    """The autograd function that the module's docstring describes."""

    @staticmethod
    def forward(
        ctx: Any, call: RebuildCall, extremes: Extremes, hidden: Tensor, *inputs: Tensor
    ) -> tuple[Tensor, ...]:
        """Run all couplings without storing activations.

        Args:
            ctx: the autograd context.
            call: the data of the forward that the backward needs.
            extremes: records the extremes of values and streams.
            hidden: the initial value of both streams, `batch seq hidden`.
            *inputs: the tensors of the context, then the trainable parameters.

        Returns:
            The values and the carriers of both streams, all of the shape of `hidden`.
        """
        ctx.set_materialize_grads(False)
        stack = call.stack
        context = call.context(inputs)
        streams = [stack.arithmetic.enter(hidden) for _ in range(2)]
        extremes.note(stack.lowest, hidden, streams[0])
        kept: list[Tensor | None] = []
        with call.execution.entered():
            for index, coupling in enumerate(stack.couplings):
                target, source = streams[coupling.target], streams[1 - coupling.target]
                call.check.before(stack, index, target)
                x = stack.arithmetic.read(source)
                wants_input = ctx.needs_input_grad[2] or index > 0
                value = call.value(coupling, x, context, wants_input, (hidden, *inputs))
                lost = stack.arithmetic.couple_(target, source, value, coupling)
                extremes.note(coupling.block, value, target)
                kept.append(call.put_away(lost))
        ctx.call, ctx.dtype = call, hidden.dtype
        start = hidden if call.on_mismatch == "redo" else None
        expected = call.check.expected()
        ctx.save_for_backward(*streams, *context.values(), *kept, expected, start)
        ctx.mark_non_differentiable(*streams)
        dtype = stack.arithmetic.gradient_dtype
        carriers = (carrier_like(values, dtype) for values in streams)
        return (*streams, *carriers)

    @staticmethod
    def backward(
        ctx: Any, _1: None, _2: None, d1: Tensor | None, d2: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        """Rebuild the activations from the top down and return all gradients.

        Args:
            ctx: the autograd context.
            _1: None, as the values of stream 1 are not differentiable.
            _2: None, as the values of stream 2 are not differentiable.
            d1: the gradient of the carrier of stream 1, `batch seq hidden`.
            d2: the gradient of the carrier of stream 2, of the same shape.

        Returns:
            The gradient of each input of `forward`; None for inputs without one.

        Raises:
            ReconstructionError: a rebuilt stream is wrong and `on_mismatch` is `raise`.
        """
        refuse_create_graph("a rebuilding backward", "Set `backward='store'` for that")
        call: RebuildCall = ctx.call
        call.refuse_changed_state()
        keep_hooks_for_whole_gradients(call.parameters)
        first, second, *rest = ctx.saved_tensors
        streams = [first, second]
        if torch._C._autograd._get_current_graph_task_keep_graph():
            streams = [first.clone(), second.clone()]
        context = {
            name: tensor.detach().requires_grad_(wanted)
            for name, tensor, wanted in zip(
                call.names, rest, ctx.needs_input_grad[3:], strict=False
            )
        }
        *kept, expected, start = rest[len(call.names) :]
        gradients = Gradients()
        d = [_taken(d1), _taken(d2)] if start is None else [_copy(d1), _copy(d2)]
        wants_input = ctx.needs_input_grad[2]
        with call.state.modes():
            _walk_down(
                call, streams, d, kept, expected, context, wants_input, gradients
            )
        try:
            call.check.finish(call.stack, streams)
        except ReconstructionError as error:
            message = f"{error}{call.changes(streams[0].device)}"
            if call.on_mismatch == "raise":
                raise ReconstructionError(f"{message} {_RAISED}") from None
            outcome = _SKIPPED if start is None else _REDONE
            warnings.warn(f"{message} {outcome}", MismatchWarning, stacklevel=2)
            if start is None:
                return tuple(None for _ in ctx.needs_input_grad)
            del streams, d
            gradients = Gradients()
            with call.state.modes():
                hidden = _stored(call, start, context, (d1, d2), wants_input, gradients)
        else:
            hidden = twin.added(d[0], d[1]) if wants_input else None
        return (
            None,
            None,
            None if hidden is None else hidden.to(ctx.dtype),
            *(gradients.of(tensor) for tensor in context.values()),
            *(gradients.of(parameter) for parameter in call.parameters),
        )


def _walk_down(
    call: RebuildCall,
    streams: list[Tensor],
    d: list[Tensor | None],
    kept: Sequence[Tensor | None],
    expected: Tensor | None,
    context: Context,
    wants_input: bool,
    gradients: Gradients,
) -> None:
    """Process the couplings from the top one down, in place.

    Args:
        call: the data of the forward.
        streams: both streams, `batch seq hidden`: the top pair, replaced by the bottom
            pair.
        d: the gradients of both streams, likewise; None for a gradient of 0.
        kept: what each coupling has kept, lowest first.
        expected: what the check has saved of the true streams.
        context: tensors that the blocks read in addition to the stream, by name.
        wants_input: whether the gradient of the stack's input is needed.
        gradients: the sums to which gradients of other tensors are added.
    """
    stack, couplings = call.stack, call.stack.couplings
    for index in reversed(range(len(couplings))):
        coupling = couplings[index]
        target, source = coupling.target, 1 - coupling.target
        x = stack.arithmetic.read(streams[source])
        wants_x = wants_input or index > 0
        call.check.point(index, d[target])
        value, mixed = recompute_branch(
            call, coupling, x, context, d[target], wants_x, gradients
        )
        stack.arithmetic.uncouple_(
            streams[target],
            streams[source],
            value,
            coupling,
            call.fetched(kept[index], value.device),
        )
        del value
        call.check.after(index, streams[target], expected)
        v = pull_mixed(mixed, x, gradients)
        d[target], d[source] = _down(d[target], d[source], v, coupling)
        del x, mixed, v


def _stored(
    call: RebuildCall,
    start: Tensor,
    context: Context,
    d: tuple[Tensor | None, Tensor | None],
    wants_input: bool,
    gradients: Gradients,
) -> Tensor | None:
    """Compute the gradients with the twin, which stores activations.

    Args:
        call: the data of the forward.
        start: the input of the stack, `batch seq hidden`.
        context: tensors that the blocks read in addition to the stream, by name.
        d: the gradients of both streams at the top.
        wants_input: whether the gradient of `start` is needed.
        gradients: the sums to which gradients of other tensors are added.

    Returns:
        The gradient of `start`, or None if it is not needed.
    """
    start = start.detach().requires_grad_(wants_input)
    unread = Extremes(call.stack.arithmetic)
    with call.recomputing():
        entered = twin.enter(call.stack, start, unread)
        streams = twin.run(call.stack, entered, context, unread)
    ends = [
        (stream.carrier, gradient)
        for stream, gradient in zip(streams.pair(), d, strict=True)
        if gradient is not None and stream.carrier.requires_grad
    ]
    others = [t for t in context.values() if t.requires_grad]
    pull = gradients.prepare(
        [carrier for carrier, _ in ends], [*others, *call.parameters]
    )
    return gradients.pull(pull, start, [gradient for _, gradient in ends])


def _taken(gradient: Tensor | None) -> Tensor | None:
    """Take ownership of the gradient and free autograd's reference to its memory.

    Autograd's frames hold the gradients that they pass to a backward until it returns,
    which here would be for the whole loop over couplings. Their tensor is emptied. This
    is safe because it is the gradient of a carrier, created for this function alone.
    """
    if gradient is None:
        return None
    taken = gradient.detach()
    gradient.data = gradient.new_empty(0)
    return taken


def _copy(gradient: Tensor | None) -> Tensor | None:
    return None if gradient is None else gradient.clone()


def _down(
    dt: Tensor | None, ds: Tensor | None, v: Tensor | None, coupling: Coupling
) -> tuple[Tensor | None, Tensor | None]:
    """Return the gradients of target and source below a coupling.

    They are added in the order in which autograd adds them for the twin, so that the
    bits are equal.

    Args:
        dt: the gradient of the target above the coupling, `batch seq hidden`.
        ds: the gradient of the source above the coupling; updated in place.
        v: the gradient of the source through the branch.
        coupling: the scale and the form of the coupling.
    """
    if dt is None:
        return None, ds
    # A new tensor also for a scale of 1: the branch received the old one, and hooks may
    # hold it.
    dt = dt * coupling.scale
    if coupling.difference:
        ds = -dt if ds is None else ds.sub_(dt)
    if v is None:
        return dt, ds
    return dt, v.to(dt.dtype, copy=True) if ds is None else ds.add_(v.to(dt.dtype))
