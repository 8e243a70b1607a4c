"""A recompute that gives other bits is noticed, named and handled as requested."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

import meft
from library.models import batch, gradient, gradients, reversible
from library.training import (
    assert_same,
    batch_without_reseeding,
    dtypes,
    left,
    stack_of,
    stored_gradients,
    trainable,
    variants,
)
from marks import slow_but_for
from meft.reversible.integer_format import FRACTION_BITS_WIDE


class Fault:
    """Adds an error to one element of a module's output: once, when armed."""

    def __init__(
        self, module: nn.Module, error: Callable[[torch.Tensor], torch.Tensor]
    ) -> None:
        self._error = error
        self.armed = False
        module.register_forward_hook(self)

    def __call__(
        self, module: nn.Module, args: Any, output: torch.Tensor
    ) -> torch.Tensor | None:
        if not self.armed:
            return None
        self.armed = False
        return output + self._error(output.detach())


def one_ulp(output: torch.Tensor) -> torch.Tensor:
    """The least change of the greatest element, in the dtype of `output`."""
    flat = output.flatten()
    at = int(flat.abs().argmax())
    error = torch.zeros_like(flat)
    error[at] = torch.nextafter(flat[at], flat.new_tensor(torch.inf)) - flat[at]
    return error.view_as(output)


def quanta(number: float) -> Callable[[torch.Tensor], torch.Tensor]:
    """So many quanta on the element that lies closest to a quantum in float32."""

    def error(output: torch.Tensor) -> torch.Tensor:
        flat = output.flatten()
        scaled = flat.double() * 2.0**FRACTION_BITS_WIDE
        at = int((scaled - scaled.round()).abs().argmin())
        error = torch.zeros_like(flat)
        error[at] = number * 2.0**-FRACTION_BITS_WIDE
        return error.view_as(output)

    return error


LEAST = {torch.float32: quanta(1), torch.bfloat16: one_ulp}
"""The least fault that a stream can hold. In float32 one ulp of a number of ordinary
size is far less than a quantum; in bfloat16 it is many."""

BOTTOM, MIDDLE, TOP = 0, 2, 4


def faulty(
    block: int, dtype: torch.dtype, variant: str, on_mismatch: str
) -> tuple[PreTrainedModel, Fault]:
    """Five blocks, one of which ends in a fault that can be armed."""
    model = reversible(
        5, dropout=0.1, dtype=dtype, variant=variant, on_mismatch=on_mismatch
    )
    return model, Fault(stack_of(model)[block].output.LayerNorm, LEAST[dtype])


@pytest.mark.parametrize("block", [BOTTOM, MIDDLE, TOP])
@dtypes
@variants
def test_the_least_fault_is_named_and_leaves_no_gradient(
    variant: str, dtype: torch.dtype, block: int
) -> None:
    """One element off by one, in the recompute of any block: the error has its number.
    Nothing of it stays: the next step has the twin's gradients."""
    model, fault = faulty(block, dtype, variant, "raise")
    model.zero_grad()
    loss = model(**batch()).loss
    fault.armed = True
    with pytest.raises(meft.ReconstructionError, match=f"input of block {block} is"):
        loss.backward()
    assert not fault.armed
    adapters = stack_of(model).adapters.parameters()
    assert all(parameter.grad is None for parameter in adapters)
    assert_same(gradients(model, batch()), stored_gradients(model, batch()))


@pytest.mark.parametrize("block", [0, 2, 3])
@variants
def test_a_fault_in_an_adapter_is_named(variant: str, block: int) -> None:
    """The other coupling of a block is watched as well."""
    model = reversible(5, dropout=0.1, variant=variant)
    adapters = stack_of(model).adapters_of(block)
    name = "attention" if variant == "meft3" else "reversible"
    fault = Fault(adapters[name], quanta(1000))
    loss = model(**batch()).loss
    fault.armed = True
    with pytest.raises(meft.ReconstructionError, match=f"input of block {block} is"):
        loss.backward()


@pytest.mark.parametrize("part", ["intermediate.dense", "output.dense"])
@variants
def test_a_fault_before_a_norm_is_named(variant: str, part: str) -> None:
    """What a layer norm gives adds up to nothing with and without the fault, so a plain
    sum would pass the block and blame another below. No dropout, which could drop the
    fault."""
    model = reversible(8, variant=variant)
    for block in range(8):
        fault = Fault(stack_of(model)[block].get_submodule(part), quanta(1000))
        loss = model(**batch_without_reseeding).loss
        fault.armed = True
        with pytest.raises(meft.ReconstructionError, match=f"of block {block} is"):
            loss.backward()


@pytest.mark.parametrize("block", slow_but_for([BOTTOM, MIDDLE, TOP], MIDDLE))
@dtypes
@variants
def test_skip_leaves_the_stack_without_gradient(
    variant: str, dtype: torch.dtype, block: int
) -> None:
    """None for every parameter of the stack and for what lies below it; the head above
    has its own; a warning says so. The next step is the twin's."""
    model, fault = faulty(block, dtype, variant, "skip")
    model.get_submodule("bert.embeddings").requires_grad_(True)
    expected = stored_gradients(model, batch())
    model.zero_grad()
    torch.manual_seed(3)
    loss = model(**batch_without_reseeding).loss
    fault.armed = True
    message = f"block {block} .* what is above it, as a task head, has its own .*'skip'"
    with pytest.warns(meft.MismatchWarning, match=message):
        loss.backward()
    for name, parameter in trainable(model).items():
        if name.startswith("classifier"):
            assert torch.equal(gradient(parameter), expected[name])
        else:
            assert parameter.grad is None, name
    assert_same(gradients(model, batch()), expected)


@pytest.mark.parametrize("block", slow_but_for([BOTTOM, MIDDLE, TOP], MIDDLE))
@dtypes
@variants
def test_redo_gives_the_twins_gradients(
    variant: str, dtype: torch.dtype, block: int
) -> None:
    """Computed again with stored activations, in the same bits, down to the embeddings;
    a warning says so."""
    model, fault = faulty(block, dtype, variant, "redo")
    model.get_submodule("bert.embeddings").requires_grad_(True)
    expected = stored_gradients(model, batch_without_reseeding)
    model.zero_grad()
    torch.manual_seed(3)
    loss = model(**batch_without_reseeding).loss
    fault.armed = True
    with pytest.warns(meft.MismatchWarning, match=f"block {block} .*'redo'"):
        loss.backward()
    assert_same(left(model), expected)
    assert_same(gradients(model, batch_without_reseeding), expected)


@pytest.mark.parametrize("on_mismatch", ["raise", "skip", "redo"])
@variants
def test_what_rounding_absorbs_is_no_fault(variant: str, on_mismatch: str) -> None:
    """A quarter of a quantum on an element that lies on one: the streams do not notice,
    so gradients are the twin's and there is no warning."""
    model = reversible(3, dropout=0.1, variant=variant, on_mismatch=on_mismatch)
    fault = Fault(stack_of(model)[1].output.LayerNorm, quanta(0.25))
    expected = stored_gradients(model, batch())
    model.zero_grad()
    torch.manual_seed(3)
    loss = model(**batch_without_reseeding).loss
    fault.armed = True
    loss.backward()
    assert not fault.armed
    assert_same(left(model), expected)


@pytest.mark.slow
@dtypes
@variants
def test_without_a_fault_there_is_no_alarm(variant: str, dtype: torch.dtype) -> None:
    """Thirty-six steps of three shapes, trained hard enough to move: no error (and any
    warning would be one)."""
    model = reversible(3, dropout=0.1, dtype=dtype, variant=variant)
    optimizer = torch.optim.AdamW(trainable(model).values(), lr=5e-2)
    batches = [batch(), batch(rows=2, seq=11), batch(rows=1, seq=1, padded=False)]
    torch.manual_seed(3)
    losses = set()
    for step in range(36):
        optimizer.zero_grad()
        loss = model(**batches[step % 3]).loss
        loss.backward()
        optimizer.step()
        losses.add(loss.item())
    assert len(losses) > 18
