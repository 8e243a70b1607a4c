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

import contextlib
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from meft.errors import MismatchWarning, ReconstructionError, UnsupportedCallError
from meft.reversible import twin
from meft.reversible.coupling import Context, Coupling, Part
from meft.reversible.execution_context import ExecutionContext
from meft.reversible.extremes import Extremes
from meft.reversible.gradients import (
    Gradients,
    Pull,
    keep_hooks_for_whole_gradients,
)
from meft.reversible.outside import has_forward_hooks, leaves_of, refuse_late
from meft.reversible.recompute_check import RecomputeCheck
from meft.reversible.twin import Stack, Streams, TrackedStream, carrier_like
from meft.shapes import Hidden
from meft.transfer import TransferLedger, to_device, to_host
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
    state = _State.of(stack, outside)
    call = _Call(
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
        ctx: Any, call: "_Call", extremes: Extremes, hidden: Tensor, *inputs: Tensor
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
        call: _Call = ctx.call
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
    call: "_Call",
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
        value, mixed = _recompute(
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
        v = _pull_mixed(mixed, x, gradients)
        d[target], d[source] = _down(d[target], d[source], v, coupling)
        del x, mixed, v


def _stored(
    call: "_Call",
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


class _Mixed(NamedTuple):
    """The recomputed mixing part of a branch, before its backward pass."""

    pull: Pull | None
    """Pull through the mixing part; None if the branch has no such part."""
    gradient: Tensor


def _recompute(
    call: "_Call",
    coupling: Coupling,
    x: Tensor,
    context: Context,
    dy: Tensor | None,
    wants_x: bool,
    gradients: Gradients,
) -> tuple[Tensor, _Mixed | None]:
    """Recompute a branch at `x` and pull `dy` through its tokenwise part.

    Gradients of parameters are added to `gradients`.

    Args:
        call: the data of the forward.
        coupling: the coupling whose branch is recomputed.
        x: what its source stream holds, `batch seq hidden`.
        context: tensors that the block reads in addition to the stream, by name.
        dy: the gradient of the output of the branch; None if it is 0.
        wants_x: whether the gradient of `x` is needed.
        gradients: the sums of the backward.

    Returns:
        The output of the branch, of the shape of `x`, and the mixing part whose
        backward pass remains to be run.
    """
    if dy is None:
        with call.execution.entered():
            value = call.value(coupling, x, context, wants_x)
        return value, None
    stack, tokenwise = call.stack, coupling.branch.tokenwise
    x.requires_grad_(wants_x)
    with call.recomputing():
        mixed = stack.mixed(coupling, x, context)
    own = [*context.values(), *call.state.trainable_of(coupling)]
    call.refuse_outside(coupling, mixed, [x, *own])
    pull = _prepare_mixed(call, coupling, mixed, context, gradients)
    parameters = call.state.trainable_in(tokenwise, coupling)
    outputs: list[Tensor] = []
    pulled: list[Tensor | None] = []
    # The order is from the last chunk to the first, as autograd does for the twin.
    chunks = stack.chunks(coupling, mixed.detach())
    slices = stack.chunks(coupling, dy)
    for index in reversed(range(len(chunks))):
        chunk = chunks[index].detach().requires_grad_(mixed.requires_grad)
        with call.recomputing():
            output = stack.tokenwise(coupling, chunk, index)
        call.refuse_outside(coupling, output, [chunk, *own])
        chunk_pull = gradients.prepare([output], parameters)
        pulled.insert(0, gradients.pull(chunk_pull, chunk, [slices[index]]))
        outputs.insert(0, output.detach())
        del output, chunk_pull
    value = twin.joined(outputs, x.shape)
    if not mixed.requires_grad:
        return value, None
    d_chunks = [d for d in pulled if d is not None]
    gradient = twin.joined(d_chunks, mixed.shape)
    return value, _Mixed(pull, gradient)


def _pull_mixed(mixed: _Mixed | None, x: Tensor, gradients: Gradients) -> Tensor | None:
    """Pull through the mixing part and return the gradient of `x`, if needed."""
    if mixed is None:
        return None
    if mixed.pull is None:
        return mixed.gradient
    return gradients.pull(mixed.pull, x, [mixed.gradient])


def _prepare_mixed(
    call: "_Call",
    coupling: Coupling,
    mixed: Tensor,
    context: Context,
    gradients: Gradients,
) -> Pull | None:
    """Prepare the pull through the mixing part, to be run after freeing `mixed`."""
    if coupling.branch.mixing is None:
        return None
    others = [t for t in context.values() if t.requires_grad]
    others += call.state.trainable_in(coupling.branch.mixing, coupling)
    meanwhile = call.state.trainable_in(coupling.branch.tokenwise, coupling)
    return gradients.prepare([mixed], others, meanwhile)


class _Tensor(NamedTuple):
    """The properties that show whether a parameter or buffer has changed."""

    identity: int
    storage: int
    dtype: torch.dtype
    device: torch.device
    version: int
    requires_grad: bool

    @classmethod
    def of(cls, tensor: Tensor) -> "_Tensor":
        return cls(
            id(tensor),
            tensor.untyped_storage()._cdata,
            tensor.dtype,
            tensor.device,
            tensor._version,  # in-place updates increment it
            tensor.requires_grad,
        )

    def change(self, now: "_Tensor") -> str:
        """Describe what happened to the tensor, as the end of a sentence."""
        if self.requires_grad != now.requires_grad:
            return f"`requires_grad` was set to {now.requires_grad}"
        if (self.dtype, self.device) != (now.dtype, now.device):
            return f"it was moved or converted to {now.dtype} on {now.device}"
        if (self.identity, self.storage) != (now.identity, now.storage):
            return "it was replaced by another tensor, or its `.data` was"
        return "it was updated in place"


@dataclass(frozen=True, kw_only=True, slots=True)
class _State:
    """The parameters and buffers that branches may read, and their modules' modes."""

    tensors: dict[int, list[Tensor]]
    """Parameters and buffers of each module that a branch uses, by the module's id."""
    outside: dict[int, list[Tensor]]
    """Parameters of other modules that a branch uses, by the coupling's number."""
    seen: list[_Tensor]
    """Identity and version of all these tensors."""
    with_hooks: set[int]
    """Ids of the modules in `tensors` that contain forward hooks."""
    training: list[tuple[nn.Module, bool]]
    """Flag `training` of every module inside."""
    attention: list[str]
    """transformers' names of the attention implementations inside."""

    @classmethod
    def of(cls, stack: Stack, outside: dict[int, list[Tensor]]) -> "_State":
        """Return the current state."""
        branches = (coupling.branch for coupling in stack.couplings)
        parts = (part for b in branches for part in (b.mixing, b.tokenwise) if part)
        modules = {id(m): [*m.modules()] for part in parts for m in part.modules}
        tensors = {key: _tensors_of(inside) for key, inside in modules.items()}
        every = [module for inside in modules.values() for module in inside]
        configs = (module.__dict__.get("config") for module in every)
        kinds = (getattr(config, "_attn_implementation", None) for config in configs)
        return cls(
            tensors=tensors,
            outside=outside,
            seen=[
                _Tensor.of(t)
                for ts in (*tensors.values(), *outside.values())
                for t in ts
            ],
            with_hooks={key for key in modules if has_forward_hooks(modules[key])},
            training=[(module, module.training) for module in every],
            attention=list(dict.fromkeys(kind for kind in kinds if kind is not None)),
        )

    @contextlib.contextmanager
    def modes(self) -> Iterator[None]:
        """Run the body with every module in the mode that it had."""
        changed = [pair for pair in self.training if pair[0].training != pair[1]]
        for module, was_training in changed:
            module.training = was_training
        try:
            yield
        finally:
            for module, was_training in changed:
                module.training = not was_training

    def trainable(self) -> list[Tensor]:
        """Return the parameters that require a gradient, without duplicates."""
        every = (
            t
            for tensors in (*self.tensors.values(), *self.outside.values())
            for t in tensors
        )
        return list({id(t): t for t in every if t.requires_grad}.values())

    def trainable_in(self, part: Part | None, coupling: Coupling) -> list[Tensor]:
        """Return those that one part of the branch of `coupling` may use."""
        if part is None:
            return []
        own = [t for m in part.modules for t in self.tensors[id(m)] if t.requires_grad]
        return own + self.outside[coupling.number]

    def trainable_of(self, coupling: Coupling) -> list[Tensor]:
        """Return those that the branch of `coupling` may use."""
        branch = coupling.branch
        return [
            tensor
            for part in (branch.mixing, branch.tokenwise)
            for tensor in self.trainable_in(part, coupling)
        ]

    def has_hooks(self, coupling: Coupling) -> bool:
        """Return whether there are forward hooks inside the branch of `coupling`."""
        parts = (coupling.branch.mixing, coupling.branch.tokenwise)
        return any(id(m) in self.with_hooks for p in parts if p for m in p.modules)


def _tensors_of(modules: Sequence[nn.Module]) -> list[Tensor]:
    """Return the parameters and buffers of these modules, without duplicates."""
    owned = (
        tensor
        for module in modules
        for tensors in (module._parameters, module._buffers)
        for tensor in tensors.values()
    )
    return list({id(tensor): tensor for tensor in owned if tensor is not None}.values())


def _name_of(identity: int, stack: Stack) -> str:
    """Return the name of a parameter or buffer, if it still exists."""
    for coupling in stack.couplings:
        for part in (coupling.branch.mixing, coupling.branch.tokenwise):
            for module in part.modules if part else ():
                for name, tensor in (
                    *module.named_parameters(),
                    *module.named_buffers(),
                ):
                    if id(tensor) == identity:
                        return f"`{name}` of block {coupling.block}"
    return "one of them"


@dataclass(frozen=True, kw_only=True, slots=True)
class _Call:
    """The data of a forward that its backward needs besides the saved tensors."""

    stack: Stack
    names: tuple[str, ...]
    """Names of the tensors in addition to the stream, which precede parameters."""
    parameters: list[Tensor]
    """Trainable parameters."""
    state: _State
    """State before the forward, so that changes by the blocks are detected too."""
    execution: ExecutionContext
    check: RecomputeCheck
    on_mismatch: str
    host_ledger: TransferLedger | None

    def put_away(self, kept: Tensor | None) -> Tensor | None:
        """Store what is kept for the backward, in host memory if requested."""
        if kept is None or self.host_ledger is None:
            return kept
        return to_host(kept, self.host_ledger)

    def fetched(self, kept: Tensor | None, device: torch.device) -> Tensor | None:
        """Return what `put_away` received, on `device`."""
        if kept is None or self.host_ledger is None:
            return kept
        return to_device(kept, device, self.host_ledger)

    @contextlib.contextmanager
    def recomputing(self) -> Iterator[None]:
        """Run the body with grad enabled and the settings of the forward.

        Backward passes run outside of this context, hence outside of autocast.
        """
        with torch.enable_grad(), self.execution.entered():
            yield

    def value(
        self,
        coupling: Coupling,
        x: Tensor,
        context: Context,
        wants_input: bool,
        sources: Sequence[Tensor] = (),
    ) -> Tensor:
        """Run a branch without keeping a graph.

        Args:
            coupling: the coupling whose branch is run.
            x: what its source stream holds, `batch seq hidden`.
            context: tensors that the block receives in addition to the stream, by name.
            wants_input: whether the gradient of `x` is needed.
            sources: tensors that a gradient of the branch may flow to.

        Returns:
            The output of the branch, of the shape of `x`.
        """
        return self.check.value(
            self.stack,
            coupling,
            x,
            context,
            wants_input,
            self.execution,
            self.state.trainable_of(coupling),
            self.state.has_hooks(coupling),
            sources,
        )

    def refuse_outside(
        self, coupling: Coupling, output: Tensor, own: Sequence[Tensor]
    ) -> None:
        """Refuse a recomputed graph with a leaf whose gradient could not be returned.

        Args:
            coupling: the coupling whose branch was recomputed.
            output: what a part of the branch has returned.
            own: the inputs of the autograd function that the branch may use.

        Raises:
            UnsupportedCallError: a leaf is not in `own`.
        """
        leaves = leaves_of(output, own, coupling.block)
        if leaves:
            self.check.look_again()
            refuse_late(leaves[0], coupling.block)

    def _state_now(self) -> _State:
        return _State.of(self.stack, self.state.outside)

    def context(self, inputs: Sequence[Tensor]) -> dict[str, Tensor]:
        return dict(zip(self.names, inputs, strict=False))

    def refuse_changed_state(self) -> None:
        """Refuse the backward if weights or buffers have changed since the forward."""
        seen, now = self.state.seen, self._state_now().seen
        if seen == now:
            return
        pairs = zip(seen, now, strict=False)
        changes = (
            f"{_name_of(after.identity, self.stack)}: {before.change(after)}"
            for before, after in pairs
            if before != after
        )
        raise UnsupportedCallError(
            "a parameter or buffer of a reversible block was changed or replaced "
            f"between forward and backward ({next(changes, 'one came or went')}). This "
            "may be an optimizer step, a moving average, any in-place update, "
            "`functional_call`, or the block itself (running statistics): its "
            "activations can no longer be rebuilt. Run the backward first"
        )

    def changes(self, device: torch.device) -> str:
        """Describe other known changes since the forward, as a sentence."""
        changed = self.execution.changed(ExecutionContext.current(device))
        before, now = self.state.attention, self._state_now().attention
        if before != now:
            changed.append(
                f"the implementation of attention from {', '.join(before)} to "
                f"{', '.join(now)}"
            )
        return f" Changed since the forward: {'; '.join(changed)}." if changed else ""
