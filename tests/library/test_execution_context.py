"""A recompute runs the kernels that its forward ran."""

import contextlib

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from library.models import batch, gradient, gradients, only_stack, reversible
from meft.reversible.execution_context import ExecutionContext

CPU = torch.device("cpu")


def test_backends_of_attention_differ_in_bits() -> None:
    """Else nothing below would show anything."""
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 2, 4, 33, 16)
    fused = scaled_dot_product_attention(query, key, value)
    with sdpa_kernel(SDPBackend.MATH):
        plain = scaled_dot_product_attention(query, key, value)
    assert not torch.equal(fused, plain)


@pytest.mark.parametrize("variant", ["meft1", "meft2", "meft3"])
def test_the_backward_takes_the_forwards_attention(variant: str) -> None:
    """A backend chosen around the forward alone is chosen for the recompute too, and
    the caller's choice is back afterwards."""
    model = reversible(3, variant=variant)
    inputs = batch(rows=2, seq=33)
    stack = only_stack(model)
    stack.backward_pass = "store"
    with sdpa_kernel(SDPBackend.MATH):
        expected = gradients(model, inputs)
    stack.backward_pass = "rebuild"
    model.zero_grad()
    before = ExecutionContext.current(CPU)
    with sdpa_kernel(SDPBackend.MATH):
        torch.manual_seed(3)
        loss = model(**inputs).loss
    loss.backward()
    assert ExecutionContext.current(CPU) == before
    got = {n: gradient(p) for n, p in model.named_parameters() if p.requires_grad}
    for name, tensor in expected.items():
        assert torch.equal(got[name], tensor), name


def test_settings_come_and_go() -> None:
    """Inside `entered()` they are what they were, without a cache; outside they are
    left as they are, after an error as well."""
    with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
        inside = ExecutionContext.current(CPU)
    outside = ExecutionContext.current(CPU)
    assert inside.computed_in == torch.bfloat16
    assert outside.computed_in is None
    with contextlib.suppress(ZeroDivisionError), inside.entered():
        assert ExecutionContext.current(CPU) == inside
        assert not torch.is_autocast_cache_enabled()
        _ = 1 / 0
    assert ExecutionContext.current(CPU) == outside
    assert torch.is_autocast_cache_enabled()


def test_a_mask_is_another_kind_of_call() -> None:
    """With a mask other kernels run than without one, so the probe of their bits is
    made for each; a second call of a kind needs none."""
    model = reversible(2, variant="meft1")
    known = only_stack(model)._repeatable
    sizes = []
    for padded in (False, True, False, True):
        gradients(model, batch(padded=padded))
        sizes.append(len(known))
    couplings = 3  # the last reversible adapter does not exist
    assert sizes == [couplings, 2 * couplings, 2 * couplings, 2 * couplings]
