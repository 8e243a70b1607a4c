"""Checks that a rebuilt stack recomputes the same streams in the backward.

With `fixed` streams the inverse is exact if every branch gives the same bits again.
Three checks ensure this:

* Before a branch is first used at a shape and dtype, it is run with and without grad.
  If the bits differ, or if code outside the branch keeps one of its tensors, its
  forwards run with grad from then on, with a graph that holds no activations
  (`outside`). If the bits differ from one run to the next, the branch is refused.
* The checksum of every stream before it changes is kept, 8 bytes per coupling, and
  compared with that of the rebuilt stream, so that an error is detected at the coupling
  where it occurs.
* At the bottom both streams must be equal, element by element.

With forward hooks inside, which may keep tensors at any time, forwards always run with
grad. Whenever a forward runs with grad, the graph of the branch is searched for
parameters that do not belong to its modules.

Comparisons stay on the device; one flag is read at the end of the backward. For
`floating` streams there is no exact comparison; an `InverseErrorProbe` may measure
their error.
"""

from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from meft.errors import ReconstructionError, UnsupportedCallError
from meft.reversible.coupling import Context, Coupling
from meft.reversible.execution_context import ExecutionContext
from meft.reversible.inverse_error import InverseErrorProbe
from meft.reversible.outside import Exits, Parameters, leaves_of, newest_node
from meft.reversible.twin import Stack, joined

Repeatable = dict[tuple[Any, ...], bool]
"""Whether a branch without grad gives the same bits as with grad, and none of its
tensors is kept, by the coupling's number and the settings that decide which kernels
run.
"""
Outside = dict[int, Parameters]
"""Parameters that a branch uses and that do not belong to its modules, by the
coupling's number.
"""

CHECKSUM_BASE = 0x5851F42D4C957F2D
"""An arbitrary large odd number."""


class RecomputeCheck:
    """Check the streams of one forward and backward.

    Args:
        exact: whether rebuilt streams must equal the true ones.
        repeatable: what is known about the branches; new results are added.
        call: the arguments of every block in addition to the stream, as far as they
            decide which kernels run.
        probe: compares samples of the streams, or all elements.
        outside: the known parameters from other modules; new ones are added.
    """

    def __init__(
        self,
        exact: bool,
        repeatable: Repeatable,
        call: Hashable = None,
        probe: InverseErrorProbe | None = None,
        outside: Outside | None = None,
    ) -> None:
        self._outside: Outside = {} if outside is None else outside
        self.found_outside = False
        """Whether a new parameter of another module was found."""
        self._exact = exact
        self._call = call
        self._repeatable = repeatable
        self._probe = probe
        self._sums: list[Tensor] = []
        self._intact: dict[int, Tensor] = {}
        self._weights: Tensor | None = None

    def before(self, stack: Stack, index: int, target: Tensor) -> None:
        """Record `target` before the forward changes it in coupling `index`.

        Args:
            stack: the couplings.
            index: the position of the coupling in the stack.
            target: the stream before the coupling, `batch seq hidden`.
        """
        if self._exact:
            self._sums.append(self._checksum(target))
        if self._probe is not None:
            self._probe.expect(stack.couplings, index, target)

    def expected(self) -> Tensor | None:
        """Return the checksums recorded so far, to be saved for the backward."""
        sums, self._sums = self._sums, []
        return torch.stack(sums) if sums else None

    def after(self, index: int, target: Tensor, expected: Tensor | None) -> None:
        """Check `target` after the backward has undone coupling `index`.

        Args:
            index: the position of the coupling in the stack.
            target: the rebuilt stream, `batch seq hidden`.
            expected: what `expected()` returned.
        """
        if expected is not None:
            self._intact[index] = self._checksum(target) == expected[index]
        if self._probe is not None:
            self._probe.compare(index, target)

    def point(self, index: int, gradient: Tensor | None) -> None:
        """Pass the gradient of a coupling's target to the probe."""
        if self._probe is not None:
            self._probe.weigh(index, gradient)

    def finish(self, stack: Stack, streams: list[Tensor]) -> None:
        """Evaluate all checks after the backward has undone all couplings.

        Raises:
            ReconstructionError: a rebuilt stream differs from the true one.
        """
        if self._exact:
            met = (streams[0] == streams[1]).all()
            intact = torch.stack([*self._intact.values(), met])
            indices = [*self._intact, 0]
            self._intact = {}
            if not intact.all():
                first = indices[int(intact.int().argmin())]
                raise ReconstructionError(_message(stack.couplings[first]))
        if self._probe is not None:
            self._probe.finish()

    def outside_of(self, coupling: Coupling) -> list[Tensor]:
        """Return the known parameters of other modules that a branch uses.

        Only those that require a gradient are returned.
        """
        known = list(self._outside.get(coupling.number, Parameters()).values())
        return [parameter for parameter in known if parameter.requires_grad]

    def value(
        self,
        stack: Stack,
        coupling: Coupling,
        x: Tensor,
        context: Context,
        wants_input: bool,
        execution: ExecutionContext,
        own: Sequence[Tensor],
        has_hooks: bool,
        sources: Sequence[Tensor],
    ) -> Tensor:
        """Run a branch without keeping a graph, in bits that a recompute reproduces.

        Args:
            stack: the couplings.
            coupling: the coupling whose branch is run.
            x: what its source stream holds, `batch seq hidden`.
            context: tensors that the block receives in addition to the stream, by name.
            wants_input: whether the gradient of `x` is needed.
            execution: the settings that decide which kernels run.
            own: the parameters that the branch is known to use.
            has_hooks: whether modules inside have forward hooks.
            sources: tensors that a gradient of the branch may flow to.

        Returns:
            The output of the branch, of the shape of `x`.
        """
        if coupling.branch.is_sharded:
            # One run in every process, whatever is known of its batch.
            return _graded(
                stack, coupling, x, context, wants_input, Exits(sources), None
            )[0]
        training = stack.seed is not None
        key: tuple[Any, ...] = (coupling.number, x.shape, x.dtype, execution, training)
        key += (self._call,)
        may_drop_graph = self._repeatable.get(key)
        if has_hooks:
            was_tried = may_drop_graph is not None
            key = (*key, "hooks")
            may_drop_graph = False if was_tried else self._repeatable.get(key)
        if may_drop_graph and not coupling.branch.is_divided:
            return stack.value(coupling, x, context)
        exits = Exits(sources)

        def graded() -> Tensor:
            value, leaves = _graded(
                stack, coupling, x, context, wants_input, exits, own
            )
            self.note_outside(coupling, leaves)
            return value

        value = graded()
        # A divided branch runs once in every process, whatever is known of its batch.
        if may_drop_graph is None and not coupling.branch.is_divided:
            # Code that keeps tensors must not receive tensors without a graph.
            may_drop_graph = not (has_hooks or exits.used())
            if self._exact and may_drop_graph:
                plain = stack.value(coupling, x, context)
                may_drop_graph = _same_bits(plain, value)
            if self._exact and not may_drop_graph and not _same_bits(graded(), value):
                raise UnsupportedCallError(_not_repeatable(coupling))
            self._repeatable[key] = may_drop_graph
        return value

    def note_outside(self, coupling: Coupling, leaves: Sequence[Tensor]) -> None:
        """Record parameters that a branch was not known to use."""
        if leaves:
            known = self._outside.setdefault(coupling.number, Parameters())
            known.update({id(leaf): leaf for leaf in leaves})
            self.found_outside = True

    def look_again(self) -> None:
        """Test every branch again before the next forward that uses it."""
        self._repeatable.clear()

    def _checksum(self, stream: Tensor) -> Tensor:
        """Return the checksum of a stream.

        It is the sum over tokens and then, with weight b^c for channel c, over
        channels, modulo 2^64. Without weights, most errors that reach the stream
        through a norm would go undetected: the output of a layer norm for a token sums
        to zero.
        """
        # The sum has the dtype of the stream, and may wrap around as streams may: torch
        # would sum int32 in int64 by way of a copy of the whole stream.
        channels = stream.flatten(0, -2).sum(0, dtype=stream.dtype)
        if self._weights is None:
            base = torch.full_like(channels, CHECKSUM_BASE, dtype=torch.int64)
            self._weights = base.cumprod(0)
        return (channels * self._weights).sum()


def _graded(
    stack: Stack,
    coupling: Coupling,
    x: Tensor,
    context: Context,
    wants_input: bool,
    exits: Exits,
    own: Sequence[Tensor] | None,
) -> tuple[Tensor, list[Tensor]]:
    """Run a branch as the backward will, with one graph per chunk, and drop the graphs.

    Args:
        stack: the couplings.
        coupling: the coupling whose branch is run.
        x: what its source stream holds, `batch seq hidden`.
        context: tensors that the block receives in addition to the stream, by name.
        wants_input: whether the gradient of `x` is needed.
        exits: provides graphs that hold no activations.
        own: the parameters that the branch is known to use; None if its leaves are not
            its parameters, as in a branch that is sharded.

    Returns:
        The output, and the leaves of the graph that are not in `own`.
    """
    if own is None:
        with exits.watched():
            start = exits.entrance(x, wants_input)
            return stack.mixed(coupling, start, context).detach(), []
    oldest = newest_node()
    with exits.watched():
        start = exits.entrance(x, wants_input)
        mixed = stack.mixed(coupling, start, context)
        own = [start, *context.values(), *own]
        leaves = leaves_of(mixed, own, coupling.block, oldest)
        is_sum = coupling.branch.is_sum
        read, wants = (x, wants_input) if is_sum else (mixed, mixed.requires_grad)
        outputs = []
        for index, chunk in enumerate(stack.chunks(coupling, read.detach())):
            chunk = exits.entrance(chunk, wants)
            output = stack.tokenwise(coupling, chunk, index)
            leaves += leaves_of(output, [chunk, *own], coupling.block, oldest)
            outputs.append(output.detach())
        value = joined(outputs, x.shape)
    return mixed.detach() + value if is_sum else value, leaves


def _same_bits(one: Tensor, other: Tensor) -> bool:
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[one.element_size()]
    return torch.equal(one.contiguous().view(integer), other.contiguous().view(integer))


def _not_repeatable(coupling: Coupling) -> str:
    return (
        f"block {coupling.block} does not give the same bits when it is run again on "
        "the same input, so its activations cannot be rebuilt exactly. Look for "
        "operations that depend on timing (atomic adds), a noise that does not come "
        "from torch's generators, or a cache; "
        "`torch.use_deterministic_algorithms(True)` finds many. Or store the "
        "activations: `backward='store'`"
    )


def _message(coupling: Coupling) -> str:
    return (
        f"the rebuilt input of block {coupling.block} is not the one that the forward "
        "saw: the block gave other bits in the backward than in the forward. Something "
        "it reads has changed in between (a weight that was written through `.data` or "
        "by a fused optimizer, a module's attribute or hook, a setting of torch), or a "
        "kernel is not deterministic. Gradients rebuilt from there on down would be "
        "wrong."
    )
