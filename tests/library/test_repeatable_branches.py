"""Branches that depend on how they are run are tested before they are relied upon."""

import pytest
import torch

import meft
from library.models import batch, gradients, reversible
from library.training import (
    Batch,
    Replaced,
    assert_same,
    stack_of,
    stored_gradients,
    variants,
)


def less_without_grad(calls: int) -> float:
    """Another kernel, a few quanta off, where no graph is wanted."""
    return 0.0 if torch.is_grad_enabled() else 2.0**-8


@variants
def test_a_branch_that_differs_without_grad_is_run_with_grad(variant: str) -> None:
    """Found out at its first use; from then on its forward gives what its backward
    meets, which is also what the twin computes."""
    model = reversible(3, dropout=0.1, variant=variant)
    plain = gradients(model, batch())
    hook = Replaced(stack_of(model)[1].output.LayerNorm, less_without_grad)
    stack_of(model)._repeatable.clear()
    for _ in range(2):
        rebuilt = gradients(model, batch())
        assert_same(rebuilt, stored_gradients(model, batch()))
    # The same function as without the hook, which adds nothing where there is a graph.
    assert_same(rebuilt, plain)
    # With grad, without, with grad again, and in the backward; then one of each.
    assert hook.calls == 4 + 1 + 2 + 1


@variants
def test_a_branch_that_never_repeats_is_refused(variant: str) -> None:
    """By name, with the reason, in the forward; and not only the first time."""
    model = reversible(3, variant=variant)
    Replaced(stack_of(model)[1].output.LayerNorm, lambda calls: calls * 2.0**-8)
    for _ in range(2):
        with pytest.raises(meft.UnsupportedCallError, match="block 1 does not give"):
            model(**batch())
    stack_of(model).backward_pass = "store"
    model(**batch()).loss.backward()


def test_a_branch_is_tried_out_once_per_shape_and_dtype() -> None:
    """Two forwards and a recompute where it is new, one and a recompute afterwards."""
    model = reversible(3, dropout=0.1, variant="meft1")
    hook = Replaced(stack_of(model)[1].output.LayerNorm, lambda calls: 0.0)

    def calls(inputs: Batch, half: bool = False) -> int:
        before = hook.calls
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            loss = model(**inputs).loss
        loss.backward()
        return hook.calls - before

    short = batch(seq=4)
    assert [calls(batch()) for _ in range(3)] == [3, 2, 2]
    assert [calls(short) for _ in range(2)] == [3, 2]
    assert calls(batch()) == 2
    assert [calls(batch(), half=True) for _ in range(2)] == [3, 2]
    model.eval()
    assert [calls(batch()) for _ in range(2)] == [3, 2]
    with torch.no_grad():
        before = hook.calls
        model(**batch(seq=5))
        assert hook.calls == before + 1
