"""What a stack keeps between forward and backward, and while it goes back."""

import weakref
from typing import Any

import pytest
import torch

from library.models import batch, only_stack, reversible
from marks import slow_but_for
from meft.reversible.blocks import ReversibleBlocks
from meft.reversible.packing import packed_bytes
from meft.testing import saved_bytes

VARIANTS = ["meft1", "meft2", "meft3"]
FLOAT: dict[str, Any] = {"arithmetic": "float"}
variants = pytest.mark.parametrize("variant", VARIANTS)


@variants
def test_only_the_two_streams_are_saved_at_any_depth(variant: str) -> None:
    """Saved for backward: 2 * batch * seq * hidden * 4 bytes, for depth 2, 8 and 32.
    The twin's bytes grow with every block."""
    hidden = torch.randn(3, 7, 16)
    saved: dict[str, list[int]] = {"rebuild": [], "store": []}
    for backward, totals in saved.items():
        for depth in (2, 8, 32):
            model = reversible(
                depth, dropout=0.1, variant=variant, backward=backward, **FLOAT
            )
            stack = only_stack(model)
            with saved_bytes(exclude=model.parameters()) as counter:
                out = stack(hidden)  # noqa: F841 (alive, see saved_bytes)
            totals.append(counter.total)
    assert saved["rebuild"] == [2 * 3 * 7 * 16 * 4] * 3
    first, second, third = saved["store"]
    assert (third - second) == 4 * (second - first) > 0


@pytest.mark.parametrize("variant", slow_but_for(VARIANTS, "meft3"))
@pytest.mark.parametrize("lost_bits", slow_but_for([0, 3, 4], 3))
def test_fixed_streams_save_their_lost_bits_in_addition(
    variant: str, lost_bits: int
) -> None:
    """Saved for backward: two int32 streams; k bits an element for every scaled
    coupling but one where the stack starts, when both streams are equal; and 8 bytes a
    coupling to compare sums with. To the byte, for depths 2, 8, 32 and 96.

    At a scale of 1 differences grow 1.6-fold a block, beyond all integers at 96."""
    coupling = None if lost_bits else "paper"
    options: dict[str, Any] = {"lost_bits": lost_bits, "coupling": coupling}
    hidden = torch.randn(3, 7, 16)
    num_elements = hidden.numel()
    for depth in (2, 8, 32, 96):
        model = reversible(depth, dropout=0.1, variant=variant, **options)
        stack = only_stack(model)
        with saved_bytes(exclude=model.parameters()) as counter:
            out = stack(hidden)  # noqa: F841
        # MEFT1 has no reversible adapter in its last block, which nothing would read.
        num_steps = 2 * depth - (variant == "meft1")
        num_scaled = {"meft1": depth - 1, "meft2": depth, "meft3": 2 * depth - 1}
        kept = num_scaled[variant] * packed_bytes(num_elements, lost_bits)
        assert counter.total == 2 * num_elements * 4 + kept + 8 * num_steps


def test_full_fine_tuning_keeps_more_with_every_block() -> None:
    """The plain encoder's saved bytes are linear in depth."""
    from library.models import classifier

    hidden, totals = torch.randn(3, 7, 16), []
    for depth in (2, 8, 32):
        model = classifier(depth, dropout=0.1).train()
        with saved_bytes(exclude=model.parameters()) as counter:
            out = model.bert.encoder(hidden)  # noqa: F841
        totals.append(counter.total)
    assert totals[2] - totals[1] == 4 * (totals[1] - totals[0]) > 0


def test_the_encoder_keeps_no_tensor_of_a_forward() -> None:
    """Nothing hangs on the module between forward and backward."""
    encoder = only_stack(reversible(2, dropout=0.1, variant="meft1"))

    def tensors(module: ReversibleBlocks) -> set[str]:
        return {k for k, v in vars(module).items() if isinstance(v, torch.Tensor)}

    before = tensors(encoder)
    encoder(torch.randn(2, 3, 16)).sum().backward()
    encoder(torch.randn(2, 3, 16))
    assert tensors(encoder) == before == set()
    assert encoder.probe is None


@pytest.mark.parametrize("num_chunks", [2, 3, 100])
def test_chunks_are_contiguous(num_chunks: int) -> None:
    """In both passes, also where they do not divide the tokens or are more than those:
    for a part of every row a linear layer would copy its weights row by row."""
    model = reversible(1, variant="meft1", mlp_chunks=num_chunks)
    seen: list[bool] = []
    dense = only_stack(model)[0].intermediate.dense
    dense.register_forward_pre_hook(
        lambda _, args: seen.append(args[0].is_contiguous())
    )
    model(**batch()).loss.backward()
    assert len(seen) >= 2 * min(num_chunks, 21)  # 3 rows of 7 tokens, twice
    assert all(seen)


class _Alive:
    """Counts those of the tensors it was shown whose storage is still there."""

    def __init__(self) -> None:
        self._refs: dict[str, list[weakref.ref[torch.UntypedStorage]]] = {}

    def show(self, name: str, tensor: torch.Tensor) -> None:
        """Count `tensor` under `name` from now on."""
        self._refs.setdefault(name, []).append(weakref.ref(tensor.untyped_storage()))

    def count(self) -> dict[str, tuple[int, int]]:
        """Under each name, how many are there and how many were shown."""
        return {
            name: (sum(ref() is not None for ref in refs), len(refs))
            for name, refs in self._refs.items()
        }


def test_a_mixing_part_is_differentiated_alone() -> None:
    """While the gradient passes through attention, neither what attention gave nor what
    the block gave is alive; nor, from the second block on, the gradient that autograd
    handed over at the top."""
    encoder = only_stack(reversible(2, variant="meft1", mlp_chunks=3))
    alive, seen = _Alive(), []

    def as_it_passes(module: Any, args: Any, query: torch.Tensor) -> None:
        if query.requires_grad:
            query.register_hook(lambda _: seen.append(alive.count()))

    out = encoder(torch.randn(3, 7, 16, requires_grad=True))
    for block in encoder.blocks:
        attention: Any = block.attention
        attention.self.query.register_forward_hook(as_it_passes)
        attention.output.LayerNorm.register_forward_hook(
            lambda module, args, mixed: alive.show("mixed", mixed)
        )
        block.output.LayerNorm.register_forward_hook(  # type: ignore[union-attr]
            lambda module, args, value: alive.show("value", value)
        )
    read_out = out.grad_fn
    while type(read_out).__name__ != "_ReadBackward":
        read_out = read_out.next_functions[0][0]
    (rebuild, _), *_ = read_out.next_functions
    rebuild.register_prehook(lambda top: alive.show("top", top[-1]))
    out.sin().sum().backward()
    assert seen == [
        {"top": (1, 1), "mixed": (0, 1), "value": (0, 3)},
        {"top": (0, 1), "mixed": (0, 2), "value": (0, 6)},
    ]


def test_the_gradient_of_the_output_is_left_alone() -> None:
    """A rebuilding backward empties the tensors that it is handed. The one that a hook
    of the caller's holds is not among them."""
    encoder = only_stack(reversible(2, variant="meft1"))
    held: list[torch.Tensor] = []
    out = encoder(torch.randn(3, 7, 16, requires_grad=True))
    out.register_hook(held.append)
    out.sin().sum().backward()
    assert torch.equal(held[0], out.cos())
