"""What the list of blocks is to loops, slices and indices after the conversion.

The loop in the model's own `forward` runs the whole stack. Every other loop has the
original blocks, to freeze them or to look at them, and cannot run them one by one.
"""

import contextlib
import weakref
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


class Around(nn.Module):
    """A model of one's own with a loop over the blocks of a stack."""

    def __init__(self, stack: nn.Module, loop: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.stack, self.loop = stack, loop

    def forward(self, hidden: Tensor) -> Tensor:
        # The loop itself has to be in a `forward`, so this calls one of that name.
        return self.loop(self.stack, hidden)


@cases("Model")
def test_loops_outside_of_a_forward_cannot_call_blocks(case: Case) -> None:
    """They would run without adapters, as a loop over indices would."""
    model = family_model(case).eval()
    expected = objective(model(**case.batch()))
    for stack in find_stacks(model).values():
        for block in stack.blocks[stack.span[0] :]:
            with pytest.raises(meft.UnsupportedCallError, match="called by itself"):
                block(torch.zeros(1, 1, 16))
    assert torch.equal(objective(model(**case.batch())), expected)


def _encoder() -> tuple[Any, Tensor]:
    """A stack of BERT's blocks and hidden states for it."""
    stack: Any = layers(reversible(DEPTH, variant="meft1").eval())
    return stack, torch.randn(2, 3, 16)


def test_a_loop_of_ones_own_runs_the_stack() -> None:
    """A loop that passes on what each block returns gives the output of the stack,
    over the list, a slice of all of it, or pairs with something else."""

    def forward(stack: Any, hidden: Tensor) -> Tensor:
        for block in stack:
            hidden = block(hidden)
        for _, block in enumerate(stack[: len(stack)]):
            hidden = block(hidden_states=hidden)
        for block, _ in zip(stack[:], range(DEPTH), strict=True):
            hidden = block(hidden)
        return hidden

    stack, hidden = _encoder()
    assert torch.equal(Around(stack, forward)(hidden), stack(stack(stack(hidden))))


def test_a_stand_in_has_the_attributes_of_its_block() -> None:
    """To read, as a loop that asks a block for its kind of attention does, and to
    write, as one that freezes does."""

    def forward(stack: Any, hidden: Tensor) -> Tensor:
        for index, block in enumerate(stack):
            assert block.attention is stack.blocks[index].attention
            block.was_seen = index
            if index == 1:
                block.requires_grad_(True)
        return hidden

    stack, hidden = _encoder()
    Around(stack, forward)(hidden)
    assert [block.was_seen for block in stack.blocks] == [0, 1, 2]
    trained = [any(p.requires_grad for p in b.parameters()) for b in stack.blocks]
    assert trained == [False, True, False]


def _with(change: Callable[[Tensor], Any]) -> Callable[[Any, Tensor], Tensor]:
    def forward(stack: Any, hidden: Tensor) -> Tensor:
        for index, block in enumerate(stack):
            hidden = block(hidden)
            if index == 0:
                changed = change(hidden)
                hidden = changed if isinstance(changed, Tensor) else hidden
        return hidden

    return forward


@pytest.mark.parametrize(
    "change",
    [
        lambda hidden: hidden + 1,
        lambda hidden: hidden.add_(1),
        lambda hidden: hidden[:, :1],
        lambda hidden: nn.functional.dropout(hidden, 0.1, training=True),
        lambda hidden: hidden.detach(),
        lambda hidden: bool(hidden.isnan().any()),
        lambda hidden: hidden.to(torch.float64),
        lambda hidden: torch.cat([torch.zeros(2, 1, 16), hidden], dim=1),
        lambda hidden: torch.randn(2, 3, 16),
    ],
)
def test_work_between_two_blocks_is_refused(change: Callable[[Tensor], Any]) -> None:
    """Reading, changing and replacing hidden states: there are none."""
    stack, hidden = _encoder()
    with pytest.raises(meft.UnsupportedCallError, match="runs all its blocks as one"):
        Around(stack, _with(change))(hidden)
    assert torch.isfinite(stack(hidden)).all()


def test_what_leaves_hidden_states_alone_is_allowed() -> None:
    """Their shape, dtype and device are known."""
    seen: list[Any] = []

    def look(hidden: Tensor) -> None:
        seen.append((hidden.shape, hidden.dtype, hidden.device.type))
        seen.append(hidden.to("cpu") is hidden.contiguous())

    stack, hidden = _encoder()
    assert torch.equal(Around(stack, _with(look))(hidden), stack(hidden))
    assert seen == [((2, 3, 16), torch.float32, "cpu"), True]


@pytest.mark.parametrize("how", ["left out", "out of order", "twice", "early exit"])
def test_a_loop_over_some_blocks_is_refused(how: str) -> None:
    """An early exit leaves hidden states without values, which nothing can use."""
    orders = {
        "left out": [0, 2],
        "out of order": [0, 2, 1],
        "twice": [0, 1, 1, 2],
        "early exit": [0, 1],
    }

    def forward(stack: Any, hidden: Tensor) -> Tensor:
        blocks = list(stack)
        for index in orders[how]:
            hidden = blocks[index](hidden)
        return hidden + 0  # as the norm that follows

    stack, hidden = _encoder()
    with pytest.raises(meft.UnsupportedCallError, match="runs all its blocks as one"):
        Around(stack, forward)(hidden)


@pytest.mark.parametrize(
    "context",
    [torch.no_grad, lambda: torch.autocast("cpu", torch.bfloat16)],
)
def test_a_context_around_some_blocks_is_refused(context: Any) -> None:
    """A stack would run all blocks in that of the last."""

    def forward(stack: Any, hidden: Tensor) -> Tensor:
        for index, block in enumerate(stack):
            with context() if index == 0 else contextlib.nullcontext():
                hidden = block(hidden)
        return hidden

    stack, hidden = _encoder()
    with pytest.raises(meft.UnsupportedCallError, match="switched differently"):
        Around(stack, forward)(hidden)


def test_the_input_of_a_stack_is_not_kept_by_its_loop() -> None:
    """The loop of a model would otherwise hold it until the loop has run."""
    freed = []

    def forward(stack: Any, hidden: Tensor) -> Tensor:
        hidden = hidden + 1
        given = weakref.ref(hidden)
        blocks = list(stack)
        for block in blocks:
            hidden = block(hidden)
        freed.append(given() is None)
        return hidden

    stack, hidden = _encoder()
    with torch.no_grad():
        Around(stack, forward)(hidden)
    assert freed == [True]


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
