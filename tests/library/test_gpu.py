"""What only a GPU can show; the arithmetic has its tests on the CPU."""

import pytest
import torch
from torch import nn

from library.models import batch, gradients, only_stack, reversible

pytestmark = pytest.mark.gpu

variants = pytest.mark.parametrize("variant", ["meft1", "meft2", "meft3"])


@variants
def test_the_allocator_holds_the_same_after_a_forward_at_any_depth(
    variant: str,
) -> None:
    """What a forward leaves allocated does not depend on the number of blocks."""
    held = []
    for depth in (2, 8):
        model = reversible(depth, dropout=0.1, variant=variant, arithmetic="float")
        nn.Module.cuda(model)
        encoder = only_stack(model)
        hidden = torch.randn(4, 16, 16, device="cuda")
        encoder(hidden)  # library workspaces are allocated by the first forward
        encoder._first_step_is_over = True  # the probe's samples are the first step's
        before = torch.cuda.memory_allocated()
        out = encoder(hidden)
        held.append(torch.cuda.memory_allocated() - before)
        del out
    assert held[0] == held[1]


@variants
def test_dropout_is_replayed_by_the_devices_own_generator(variant: str) -> None:
    """With dropout on, the rebuilt gradients are the twin's, bit for bit."""
    model = reversible(4, 0.3, variant=variant)
    nn.Module.cuda(model)
    inputs = {name: rows.cuda() for name, rows in batch().items()}
    rebuilt = gradients(model, inputs)
    only_stack(model).backward_pass = "store"
    for name, expected in gradients(model, inputs).items():
        assert torch.equal(rebuilt[name], expected), name
