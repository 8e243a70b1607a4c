"""What the list of blocks is to loops, slices and indices after the conversion.

The loop in the model's own `forward` runs the whole stack. Every other loop has the
original blocks, to freeze them or to look at them, and cannot run them one by one.
"""

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import meft
from library.families import CASES, Case, cases, objective
from library.families import reversible as family_model
from library.models import batch, only_stack, reversible
from library.sparse import plain_model
from meft.reversible.blocks import find_stacks

LLAMA = next(case for case in CASES if case.kind == "LlamaForCausalLM")
DEPTH = 3


def layers(model: Any) -> Any:
    return model.bert.encoder.layer


def frozen_blocks(model: nn.Module) -> list[int]:
    """The blocks whose backbone has nothing to train."""
    blocks = enumerate(only_stack(model).blocks)  # type: ignore[arg-type]
    return [
        index
        for index, block in blocks
        if not any(parameter.requires_grad for parameter in block.parameters())
    ]


@pytest.mark.parametrize(
    ("choose", "expected"),
    [
        (lambda blocks: blocks[-1:], [0, 1]),
        (lambda blocks: blocks[:2], [2]),
        (lambda blocks: blocks[::2], [1]),
        (lambda blocks: blocks, []),
        (lambda blocks: list(reversed(blocks))[:1], [0, 1]),
        (lambda blocks: [block for i, block in enumerate(blocks) if i < 1], [1, 2]),
        (lambda blocks: [blocks[0]], [1, 2]),
    ],
)
@pytest.mark.parametrize("family", ["BERT", "LLaMA"])
def test_a_loop_unfreezes_the_blocks_that_it_names(
    family: str, choose: Callable[[Any], Iterable[nn.Module]], expected: list[int]
) -> None:
    """The others stay frozen, and one step changes the named blocks only."""
    model: Any
    if family == "BERT":
        model = reversible(DEPTH, variant="meft1")
        blocks, rows = layers(model), batch()
    else:
        model = family_model(LLAMA, DEPTH)
        blocks, rows = model.model.layers, LLAMA.batch()
    assert frozen_blocks(model) == [0, 1, 2]
    for block in choose(blocks):
        block.requires_grad_(True)
    assert frozen_blocks(model) == expected
    model(**rows).loss.backward()
    for index, block in enumerate(only_stack(model).blocks):
        has_grad = any(p.grad is not None for p in block.parameters())
        assert has_grad == (index not in expected), index


def test_list_functions_agree() -> None:
    """`len`, `iter`, `reversed`, slices, indices and `in` are of the same list."""
    stack = layers(reversible(DEPTH, variant="meft1"))
    blocks = stack.blocks
    assert len(stack) == len(blocks) == DEPTH
    assert list(stack) == list(stack[:]) == blocks
    assert list(reversed(stack)) == blocks[::-1]
    assert [stack[0], stack[1], stack[-1]] == blocks
    assert blocks[1] in stack
    assert isinstance(stack[1:], nn.ModuleList)
    with pytest.raises(IndexError):
        stack[DEPTH]


def test_code_that_freezes_may_be_called_by_a_forward() -> None:
    """As a `training_step` that unfreezes block after block is, in some frameworks."""

    class Step(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = reversible(DEPTH, variant="meft1")

        def unfreeze_before_forward(self) -> None:
            for block in layers(self.model)[-1:]:
                block.requires_grad_(True)

        def forward(self, rows: dict[str, Tensor]) -> Any:
            self.unfreeze_before_forward()
            return self.model(**rows)

    step = Step()
    step(batch()).loss.backward()
    assert frozen_blocks(step.model) == [0, 1]


@cases("Model")
def test_own_loops_run_the_stack_or_are_refused(case: Case) -> None:
    """A loop in the `forward` of another module runs the whole stack, once. A loop over
    indices would run blocks without adapters, and so would a helper's: refused."""
    model = family_model(case).eval()
    expected = objective(model(**case.batch()))
    seen = []

    class Around(nn.Module):
        def __init__(self, stack: nn.Module) -> None:
            super().__init__()
            self.stack = stack

        def forward(self) -> None:
            stack: Any = self.stack
            seen.extend(list(stack) + list(stack[:]) + list(stack[: len(stack)]))

    for stack in find_stacks(model).values():
        Around(stack)()
        assert seen == [stack] * 3
        seen.clear()
        for block in stack:
            with pytest.raises(meft.UnsupportedCallError, match="called by itself"):
                block(torch.zeros(1, 1, 16))
    assert torch.equal(objective(model(**case.batch())), expected)


@pytest.mark.parametrize("how", ["shortened", "rebuilt", "config"])
def test_a_changed_list_is_refused_before_the_first_step(how: str) -> None:
    """A list of some or all of the blocks in the stack's place would run them without
    adapters; a smaller `num_hidden_layers` would run all of them."""
    model: Any = family_model(LLAMA, DEPTH)
    if how == "config":
        model.config.num_hidden_layers = 1
    else:
        end = 1 if how == "shortened" else DEPTH
        model.model.layers = nn.ModuleList(model.model.layers[:end])
    with pytest.raises(
        meft.UnsupportedCallError, match=r"before `meft.make_reversible"
    ):
        model(**LLAMA.batch())


def test_items_cannot_be_set_or_deleted() -> None:
    """The message says when the list can be changed."""
    stack = layers(reversible(DEPTH, variant="meft1"))
    with pytest.raises(meft.UnsupportedCallError, match="replaced or removed"):
        stack[0] = stack[1]
    with pytest.raises(meft.UnsupportedCallError, match="replaced or removed"):
        del stack[1:]
    assert len(stack) == DEPTH


def test_blocks_below_the_span_run_as_they_are() -> None:
    """They have no adapters, and the stack itself calls them."""
    model = reversible(DEPTH, variant="meft1", span=(1, 3))
    hidden = torch.zeros(1, 2, 16)
    layers(model)[0](hidden)
    with pytest.raises(meft.UnsupportedCallError, match="called by itself"):
        layers(model)[1](hidden)


def test_blocks_with_sparse_adapters_are_no_exception() -> None:
    """A block with a sparse adapter can be called alone, until it is in a stack."""
    config = meft.SparseConfig(num_neurons=16, top_k_neurons=2)
    model: Any = meft.add_sparse_adapters(plain_model(2), config)
    reversible_config = meft.ReversibleConfig(variant="meft1", bottleneck_size=3)
    meft.make_reversible(model, reversible_config)
    with pytest.raises(meft.UnsupportedCallError, match="called by itself"):
        model.model.layers[0](torch.zeros(1, 2, 16))


def test_a_compiled_forward_finds_the_stack_behind_a_graph_break() -> None:
    """What follows the break is a function of another name."""

    class Around(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = layers(reversible(DEPTH, variant="meft1").eval())

        def forward(self, hidden: Tensor) -> Tensor:
            hidden = hidden + 1
            torch._dynamo.graph_break()
            for block in self.layers[: len(self.layers)]:
                hidden = block(hidden)
            return hidden

    model, hidden = Around(), torch.randn(2, 3, 16)
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        assert torch.equal(compiled(hidden), model(hidden))


def test_the_forward_of_the_owner_may_be_called_directly() -> None:
    """Without the hooks that a call of the module would run."""
    model: Any = family_model(LLAMA, DEPTH).eval()
    rows = {name: x for name, x in LLAMA.batch().items() if name != "labels"}
    expected = model.model(**rows)[0]
    assert torch.equal(type(model.model).forward(model.model, **rows)[0], expected)
