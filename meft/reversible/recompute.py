"""The recompute of one branch in the backward, and the gradients that flow through it.

The tokenwise part is differentiated as soon as it has been recomputed, chunk by chunk.
The mixing part is differentiated later (`pull_mixed`), after its coupling is undone.
"""

from typing import NamedTuple

from torch import Tensor

from meft.reversible import twin
from meft.reversible.coupling import Context, Coupling
from meft.reversible.gradients import Gradients, Pull
from meft.reversible.rebuild_call import RebuildCall


class Mixed(NamedTuple):
    """The recomputed mixing part of a branch, before its backward pass."""

    pull: Pull | None
    """Pull through the mixing part; None if the branch has no such part."""
    gradient: Tensor
    """Gradient of the output of the mixing part."""
    direct: Tensor | None = None
    """Gradient of the input through the tokenwise part, if that reads the input."""


def recompute_branch(
    call: RebuildCall,
    coupling: Coupling,
    x: Tensor,
    context: Context,
    dy: Tensor | None,
    wants_x: bool,
    gradients: Gradients,
) -> tuple[Tensor, Mixed | None]:
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
    is_sum = coupling.branch.is_sum
    read = (x if is_sum else mixed).detach()
    wants_read = wants_x if is_sum else mixed.requires_grad
    chunks = stack.chunks(coupling, read)
    slices = stack.chunks(coupling, dy)
    for index in reversed(range(len(chunks))):
        chunk = chunks[index].detach().requires_grad_(wants_read)
        with call.recomputing():
            output = stack.tokenwise(coupling, chunk, index)
        call.refuse_outside(coupling, output, [chunk, *own])
        chunk_pull = gradients.prepare([output], parameters)
        pulled.insert(0, gradients.pull(chunk_pull, chunk, [slices[index]]))
        outputs.insert(0, output.detach())
        del output, chunk_pull
    value = twin.joined(outputs, x.shape)
    d_chunks = [d for d in pulled if d is not None]
    d_read = twin.joined(d_chunks, x.shape) if wants_read else None
    if is_sum:
        value = mixed.detach() + value
        return value, Mixed(pull, dy, direct=d_read)
    return value, None if d_read is None else Mixed(pull, d_read)


def pull_mixed(mixed: Mixed | None, x: Tensor, gradients: Gradients) -> Tensor | None:
    """Pull through the mixing part of a branch.

    Args:
        mixed: the mixing part; None if its gradient is not needed.
        x: what the source stream holds, `batch seq hidden`.
        gradients: the sums of the backward, to which those of parameters are added.

    Returns:
        The gradient of `x`, of its shape; None if it is not needed.
    """
    if mixed is None:
        return None
    if mixed.pull is None:
        return mixed.gradient
    pulled = gradients.pull(mixed.pull, x, [mixed.gradient])
    return twin.added(mixed.direct, pulled)


def _prepare_mixed(
    call: RebuildCall,
    coupling: Coupling,
    mixed: Tensor,
    context: Context,
    gradients: Gradients,
) -> Pull | None:
    """Prepare the pull through the mixing part, to be run after freeing `mixed`."""
    if coupling.branch.mixing is None:
        return None
    others = [t for t in context.values() if t.requires_grad]
    if coupling.branch.is_sharded:
        return gradients.prepare_sharded(mixed, others)
    others += call.state.trainable_in(coupling.branch.mixing, coupling)
    meanwhile = call.state.trainable_in(coupling.branch.tokenwise, coupling)
    return gradients.prepare([mixed], others, meanwhile)
