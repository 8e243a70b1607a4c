"""One forward of a rebuilt stack, as its backward needs it."""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from meft.errors import UnsupportedCallError
from meft.reversible.branch_state import BranchState, name_of
from meft.reversible.coupling import Context, Coupling
from meft.reversible.execution_context import ExecutionContext
from meft.reversible.outside import leaves_of, refuse_late
from meft.reversible.recompute_check import RecomputeCheck
from meft.reversible.twin import Stack
from meft.transfer import TransferLedger, to_device, to_host


@dataclass(frozen=True, kw_only=True, slots=True)
class RebuildCall:
    """The data of a forward that its backward needs besides the saved tensors."""

    stack: Stack
    names: tuple[str, ...]
    """Names of the tensors in addition to the stream, which precede parameters."""
    parameters: list[Tensor]
    """Trainable parameters."""
    state: BranchState
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
        if coupling.branch.is_sharded:
            return  # its leaves are gathered copies of its parameters
        leaves = leaves_of(output, own, coupling.block)
        if leaves:
            self.check.look_again()
            refuse_late(leaves[0], coupling.block)

    def _state_now(self) -> BranchState:
        return BranchState.of(self.stack, self.state.outside)

    def context(self, inputs: Sequence[Tensor]) -> dict[str, Tensor]:
        """Return the tensors in addition to the stream by name, without parameters."""
        return dict(zip(self.names, inputs, strict=False))

    def refuse_changed_state(self) -> None:
        """Refuse the backward if weights or buffers have changed since the forward."""
        seen, now = self.state.seen, self._state_now().seen
        if seen == now:
            return
        pairs = zip(seen, now, strict=False)
        changes = (
            f"{name_of(after.identity, self.stack)}: {before.change(after)}"
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
