"""A stack of couplings whose backward rebuilds activations instead of storing them.

Kept between forward and backward: the top pair of streams, a seed, and per coupling
what the arithmetic keeps to undo it. The backward walks down. At each coupling, with dt
and ds the gradients of target and source:

    recompute value = branch(s), pull dt through it:  gradients of parameters, v
    t <- the coupling undone;    dt <- scale dt;    ds <- ds [- dt] + v

(Liao et al., NeurIPS 2023, section 3.1.) Trainable parameters are inputs of the
autograd function and their gradients are returned, so hooks, accumulation, gradient
scaling and `torch.autograd.grad` work as for any other operation, and nothing frozen
has to pretend to be trainable. Only half a branch's graph is alive at a time: its
tokenwise part is differentiated as soon as it has been recomputed, chunk by chunk,
because the gradient it needs is already there. The coupling is undone before the mixing
part is differentiated: by then nothing that the recompute gave is alive but its graph.
"""

import contextlib
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.autograd.graph import GradientEdge, get_gradient_edge

from meft.errors import MismatchWarning, ReconstructionError, UnsupportedCallError
from meft.reversible import twin
from meft.reversible.coupling import Context, Coupling, Part
from meft.reversible.kernels import Kernels
from meft.reversible.twin import Stack, Stream, Streams, carrier_like
from meft.reversible.watch import Watch
from meft.shapes import Hidden
from meft.transfer import Ledger, to_device, to_host


def run_rebuilt(
    stack: Stack,
    hidden: Hidden,
    context: Context,
    watch: Watch,
    on_mismatch: str = "raise",
    host_ledger: Ledger | None = None,
) -> Streams:
    """`twin.run(stack, twin.enter(stack, hidden), context)`, nothing stored.

    Args:
        stack: the couplings.
        hidden: what both streams start as.
        context: tensors beside the stream, by name.
        watch: looks on in the forward and in the backward.
        on_mismatch: what the backward does if it has not met what the forward saw:
            `raise`, `skip` (give no gradients, warn) or `redo` (compute them with
            stored activations, warn; `hidden` is kept for that).
        host_ledger: if given, what has to be kept waits in host memory, and this counts
            the bytes.
    """
    state = _State.of(stack)
    call = _Call(
        stack=stack,
        names=tuple(context),
        parameters=state.trainable(),
        state=state,
        kernels=Kernels.current(hidden.device),
        watch=watch,
        on_mismatch=on_mismatch,
        host_ledger=host_ledger,
    )
    values_1, values_2, finite, carrier_1, carrier_2 = _Rebuild.apply(  # type: ignore[no-untyped-call]
        call, hidden, *context.values(), *call.parameters
    )
    return Streams(Stream(values_1, carrier_1), Stream(values_2, carrier_2), finite)


_RAISED = (
    "`on_mismatch='redo'` computes such a step again with stored activations, "
    "`on_mismatch='skip'` leaves it out."
)
_SKIPPED = "This batch gives no gradients (`on_mismatch='skip'`)."
_REDONE = (
    "The gradients of this batch were computed again with stored activations "
    "(`on_mismatch='redo'`)."
)


class _Rebuild(torch.autograd.Function):
    """The autograd function; its idea is in the module's docstring."""

    @staticmethod
    def forward(
        ctx: Any, call: "_Call", hidden: Tensor, *inputs: Tensor
    ) -> tuple[Tensor | None, ...]:
        ctx.set_materialize_grads(False)
        stack = call.stack
        context = call.context(inputs)
        streams = [stack.arithmetic.enter(hidden) for _ in range(2)]
        finite = stack.arithmetic.finite(hidden)
        kept: list[Tensor | None] = []
        with call.kernels.entered():
            for index, coupling in enumerate(stack.couplings):
                target, source = streams[coupling.target], streams[1 - coupling.target]
                call.watch.before(stack, index, target)
                x = stack.arithmetic.read(source)
                wants_input = ctx.needs_input_grad[1] or index > 0
                value = call.watch.value(
                    stack, coupling, x, context, wants_input, finite
                )
                finite = twin.both(finite, stack.arithmetic.finite(value))
                lost = stack.arithmetic.couple_(target, source, value, coupling)
                kept.append(call.put_away(lost))
        ctx.call, ctx.dtype = call, hidden.dtype
        start = hidden if call.on_mismatch == "redo" else None
        expected = call.watch.expected()
        ctx.save_for_backward(*streams, *context.values(), *kept, expected, start)
        ctx.mark_non_differentiable(*streams)
        dtype = stack.arithmetic.gradient_dtype
        carriers = (carrier_like(values, dtype) for values in streams)
        return (*streams, finite, *carriers)

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, _1: None, _2: None, _3: None, d1: Tensor | None, d2: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        call: _Call = ctx.call
        call.refuse_changed_state()
        first, second, *rest = ctx.saved_tensors
        streams = [first, second]
        if torch._C._autograd._get_current_graph_task_keep_graph():
            streams = [first.clone(), second.clone()]
        beside = {
            name: tensor.detach().requires_grad_(wanted)
            for name, tensor, wanted in zip(
                call.names, rest, ctx.needs_input_grad[2:], strict=False
            )
        }
        *kept, expected, start = rest[len(call.names) :]
        gradients = _Gradients()
        d = [_taken(d1), _taken(d2)] if start is None else [_copy(d1), _copy(d2)]
        wants_input = ctx.needs_input_grad[1]
        _walk_down(call, streams, d, kept, expected, beside, wants_input, gradients)
        try:
            call.watch.finish(call.stack, streams)
        except ReconstructionError as error:
            if call.on_mismatch == "raise":
                raise ReconstructionError(f"{error} {_RAISED}") from None
            outcome = _SKIPPED if start is None else _REDONE
            warnings.warn(f"{error} {outcome}", MismatchWarning, stacklevel=2)
            if start is None:
                return tuple(None for _ in ctx.needs_input_grad)
            del streams, gradients, d
            return _stored(call, start, beside, (d1, d2), wants_input)
        hidden = twin.added(d[0], d[1]) if wants_input else None
        return (
            None,
            None if hidden is None else hidden.to(ctx.dtype),
            *(gradients.of(tensor) for tensor in beside.values()),
            *(gradients.of(parameter) for parameter in call.parameters),
        )


def _walk_down(
    call: "_Call",
    streams: list[Tensor],
    d: list[Tensor | None],
    kept: Sequence[Tensor | None],
    expected: Tensor | None,
    beside: Context,
    wants_input: bool,
    gradients: "_Gradients",
) -> None:
    """From the top streams and their gradients `d` to the bottom ones, in place."""
    stack, couplings = call.stack, call.stack.couplings
    for index in reversed(range(len(couplings))):
        coupling = couplings[index]
        target, source = coupling.target, 1 - coupling.target
        x = stack.arithmetic.read(streams[source])
        wants_x = wants_input or index > 0
        value, mixed = _recompute(
            call, coupling, x, beside, d[target], wants_x, gradients
        )
        stack.arithmetic.uncouple_(
            streams[target],
            streams[source],
            value,
            coupling,
            call.fetched(kept[index], value.device),
        )
        del value
        call.watch.after(index, streams[target], expected)
        v = _pull_mixed(call, mixed, coupling, x, beside, gradients)
        d[target], d[source] = _down(d[target], d[source], v, coupling)
        del x, mixed, v


def _stored(
    call: "_Call",
    start: Tensor,
    beside: Context,
    d: tuple[Tensor | None, Tensor | None],
    wants_input: bool,
) -> tuple[Tensor | None, ...]:
    """What the backward returns, by the twin."""
    start = start.detach().requires_grad_(wants_input)
    with call.recomputing():
        streams = twin.run(call.stack, twin.enter(call.stack, start), beside)
    inputs = [start, *beside.values(), *call.parameters]
    wanted = [tensor for tensor in inputs if tensor.requires_grad]
    ends = [
        (stream.carrier, gradient)
        for stream, gradient in zip(streams.pair(), d, strict=True)
        if gradient is not None and stream.carrier.requires_grad
    ]
    pulled = iter(
        torch.autograd.grad(
            [carrier for carrier, _ in ends],
            wanted,
            [gradient for _, gradient in ends],
            allow_unused=True,
        )
    )
    return (None, *(next(pulled) if t.requires_grad else None for t in inputs))


def _taken(gradient: Tensor | None) -> Tensor | None:
    """The gradient, in nobody else's hands.

    Autograd's frames hold what they hand over until a backward returns, and here that
    would be for the whole walk down. Their tensor is emptied: it is the gradient of a
    carrier, made for this function alone.
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
    """Gradients of target and source below a coupling; `ds` is updated in place.

    Added in the order in which autograd adds them for the twin, for equality of bits.
    """
    if dt is None:
        return None, ds
    # New also for a scale of 1: the branch was given this one, and hooks may hold it.
    dt = dt * coupling.scale
    if coupling.difference:
        ds = -dt if ds is None else ds.sub_(dt)
    if v is None:
        return dt, ds
    return dt, v.to(dt.dtype, copy=True) if ds is None else ds.add_(v.to(dt.dtype))


class _Mixed(NamedTuple):
    """The recomputed mixing part of a branch, yet to be pulled through."""

    edge: GradientEdge | None
    """Its place in autograd's graph, which is all of it that is still needed."""
    gradient: Tensor


def _recompute(
    call: "_Call",
    coupling: Coupling,
    x: Tensor,
    beside: Context,
    dy: Tensor | None,
    wants_x: bool,
    gradients: "_Gradients",
) -> tuple[Tensor, _Mixed | None]:
    """Recompute a branch at `x` and pull `dy` through its tokenwise part.

    Returns its value and what is left to pull through; adds up gradients of parameters.
    """
    if dy is None:
        with call.kernels.entered():
            value = call.watch.value(call.stack, coupling, x, beside, wants_x)
        return value, None
    stack, tokenwise = call.stack, coupling.branch.tokenwise
    x.requires_grad_(wants_x)
    with call.recomputing():
        mixed = stack.mixed(coupling, x, beside)
    parameters = call.state.trainable_in(tokenwise)
    outputs: list[Tensor] = []
    pulled: list[Tensor | None] = []
    # From the last chunk to the first, as autograd does for the twin.
    chunks = stack.chunks(coupling, mixed.detach())
    slices = stack.chunks(coupling, dy)
    for index in reversed(range(len(chunks))):
        chunk = chunks[index].detach().requires_grad_(mixed.requires_grad)
        with call.recomputing():
            output = stack.tokenwise(coupling, chunk, index)
        pulled.insert(0, gradients.pull(output, chunk, parameters, slices[index]))
        outputs.insert(0, output.detach())
        del output
    value = twin.joined(outputs, x.shape)
    if not mixed.requires_grad:
        return value, None
    d_chunks = [d for d in pulled if d is not None]
    gradient = twin.joined(d_chunks, mixed.shape)
    edge = None if coupling.branch.mixing is None else get_gradient_edge(mixed)
    return value, _Mixed(edge, gradient)


def _pull_mixed(
    call: "_Call",
    mixed: _Mixed | None,
    coupling: Coupling,
    x: Tensor,
    beside: Context,
    gradients: "_Gradients",
) -> Tensor | None:
    """Pull through the mixing part: the gradient of `x`, if wanted."""
    if mixed is None:
        return None
    if mixed.edge is None:
        return mixed.gradient
    others = [t for t in beside.values() if t.requires_grad]
    others += call.state.trainable_in(coupling.branch.mixing)
    return gradients.pull(mixed.edge, x, others, mixed.gradient)


@dataclass(frozen=True, kw_only=True, slots=True)
class _State:
    """The parameters and buffers that branches may read, and how old they were."""

    tensors: dict[int, list[Tensor]]
    """Of each module that a branch uses, by its id."""
    versions: list[tuple[int, int, bool]]

    @classmethod
    def of(cls, stack: Stack) -> "_State":
        """As they are now."""
        branches = (coupling.branch for coupling in stack.couplings)
        parts = (part for b in branches for part in (b.mixing, b.tokenwise) if part)
        modules = {id(m): m for part in parts for m in part.modules}
        tensors = {
            key: [*module.parameters(), *module.buffers()]
            for key, module in modules.items()
        }
        # In-place updates count up the version.
        versions = [
            (id(t), t._version, t.requires_grad) for ts in tensors.values() for t in ts
        ]
        return cls(tensors=tensors, versions=versions)

    def trainable(self) -> list[Tensor]:
        """The parameters that want a gradient, each once."""
        every = (t for tensors in self.tensors.values() for t in tensors)
        return list({id(t): t for t in every if t.requires_grad}.values())

    def trainable_in(self, part: Part | None) -> list[Tensor]:
        """Those of one part of a branch."""
        modules = () if part is None else part.modules
        return [t for m in modules for t in self.tensors[id(m)] if t.requires_grad]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Call:
    """What the backward needs to know of its forward, besides the saved tensors."""

    stack: Stack
    names: tuple[str, ...]
    """Of the tensors beside the stream, which come before the parameters."""
    parameters: list[Tensor]
    """The trainable ones."""
    state: _State
    """Before the forward, so that what the blocks themselves change is seen too."""
    kernels: Kernels
    watch: Watch
    on_mismatch: str
    host_ledger: Ledger | None

    def put_away(self, kept: Tensor | None) -> Tensor | None:
        """Where what is kept waits for the backward."""
        if kept is None or self.host_ledger is None:
            return kept
        return to_host(kept, self.host_ledger)

    def fetched(self, kept: Tensor | None, device: torch.device) -> Tensor | None:
        """What `put_away` was given."""
        if kept is None or self.host_ledger is None:
            return kept
        return to_device(kept, device, self.host_ledger)

    @contextlib.contextmanager
    def recomputing(self) -> Iterator[None]:
        """As the forward ran. Only that: gradients are pulled outside of autocast."""
        with torch.enable_grad(), self.kernels.entered():
            yield

    def context(self, inputs: Sequence[Tensor]) -> dict[str, Tensor]:
        return dict(zip(self.names, inputs, strict=False))

    def refuse_changed_state(self) -> None:
        """The recompute would use weights or buffers that the forward did not."""
        if _State.of(self.stack).versions != self.state.versions:
            raise UnsupportedCallError(
                "a parameter or buffer of a reversible block was changed or replaced "
                "between forward and backward (an optimizer step, a moving average, "
                "any in-place update, a changed `requires_grad`, `functional_call`), "
                "or by the block itself (running statistics): its activations can no "
                "longer be rebuilt. Run the backward first"
            )


class _Gradients:
    """Gradients of parameters and of tensors beside the stream, added up by tensor."""

    def __init__(self) -> None:
        self._sums: dict[int, Tensor] = {}

    def pull(
        self,
        output: Tensor | GradientEdge,
        x: Tensor,
        others: Sequence[Tensor],
        dy: Tensor,
    ) -> Tensor | None:
        """Pull `dy` through `output`: add up for `others`, return for `x`."""
        inputs = [*([x] if x.requires_grad else []), *others]
        if not inputs or (isinstance(output, Tensor) and not output.requires_grad):
            return torch.zeros_like(x) if x.requires_grad else None
        if isinstance(output, Tensor):
            dy = dy.to(output.dtype)
        pulled = list(torch.autograd.grad(output, inputs, dy, allow_unused=True))
        dx = pulled.pop(0) if x.requires_grad else None
        for tensor, gradient in zip(others, pulled, strict=True):
            if gradient is not None:
                earlier = self._sums.get(id(tensor))
                total = gradient if earlier is None else earlier + gradient
                self._sums[id(tensor)] = total
        if x.requires_grad and dx is None:
            return torch.zeros_like(x)
        return dx

    def of(self, tensor: Tensor) -> Tensor | None:
        return self._sums.get(id(tensor))
