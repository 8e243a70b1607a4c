"""Mistakes that take memory, each of which is noticed and blamed on the right place.

A small language model of plain torch takes two steps, as it should be and with one
mistake; what grew between the two breakdowns names the module and the kind.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

import meft_bench
from meft_bench.virtual.recording.breakdown import breakdown
from meft_reports.breakdown import Growth, read, what_grew

pytestmark = pytest.mark.usefixtures("no_garbage_collection")
ROWS, TOKENS, WIDTH, WORDS = 4, 32, 64, 256


class Halved(torch.autograd.Function):
    """A function whose backward needs no input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, keeps: bool) -> Tensor:
        if keeps:
            ctx.save_for_backward(x.clone())
        return x * 0.5

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0] * 0.5, None


class Attention(nn.Module):
    mask: Tensor

    def __init__(self, bug: str) -> None:
        super().__init__()
        self.bug = bug
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)
        shape = (ROWS, 2, TOKENS, TOKENS)
        self.register_buffer("mask", torch.ones(shape, dtype=torch.bool))
        if bug == "mask of another dtype":
            self.mask = self.mask.double()

    def forward(self, x: Tensor) -> Any:
        q, k, v = (
            t.unflatten(-1, (2, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1)
        )
        if self.bug == "eager attention":
            scores = (q @ k.transpose(-1, -2)).masked_fill(~self.mask.bool(), -1e9)
            mixed = scores.softmax(-1) @ v
        else:
            mixed = functional.scaled_dot_product_attention(q, k, v)
        return self.out(mixed.transpose(1, 2).flatten(-2))


class Block(nn.Module):
    def __init__(self, bug: str) -> None:
        super().__init__()
        self.bug = bug
        self.attention = Attention(bug)
        self.up = nn.Linear(WIDTH, 4 * WIDTH)
        self.down = nn.Linear(4 * WIDTH, WIDTH)
        if bug == "buffer registered twice":
            self.register_buffer("copy", self.attention.mask.clone())

    def forward(self, x: Tensor) -> Any:
        x = x + self.attention(x)
        keeps = self.bug == "input saved for nothing"
        x = Halved.apply(x, keeps)  # type: ignore[no-untyped-call]
        inner = self.up(x)
        if self.bug == "float32 upcast":
            inner = inner.double().relu().to(x.dtype)
        else:
            inner = functional.relu(inner, inplace=True)
        return x + self.down(inner)


class Model(nn.Module):
    def __init__(self, bug: str) -> None:
        super().__init__()
        self.bug = bug
        self.embed = nn.Embedding(WORDS, WIDTH)
        self.embed.requires_grad_(False)
        self.blocks = nn.ModuleList([Block(bug) for _ in range(3)])
        self.head = nn.Linear(WIDTH, WORDS)
        self.cache: list[Tensor] = []
        self.gathered: list[Tensor] = []

    def forward(self, ids: Tensor) -> Any:
        x = self.embed(ids).requires_grad_()
        for block in self.blocks:
            if self.bug == "checkpoint without effect":
                x = block(x)
            else:
                x = checkpoint(block, x, use_reentrant=False)
            if self.bug == "cache that never evicts":
                self.cache.append(x.detach().clone())
        if self.bug == "gathered weights are kept":
            halves = [*self.head.weight.detach().chunk(2)]
            self.gathered.append(torch.cat(halves))
        logits = self.head(x)
        if self.bug == "copy of the logits":
            logits = logits.clone().contiguous() * 1.0
        return logits


class Sgd(torch.optim.SGD):
    """With momentum; by mistake also of parameters that are frozen."""

    def __init__(self, model: Model, **others: Any) -> None:
        super().__init__(model.parameters(), lr=0.1, momentum=0.9, **others)
        if model.bug == "state of frozen parameters":
            for parameter in model.parameters():
                state = {"momentum_buffer": torch.zeros_like(parameter)}
                self.state[parameter] = state


HELD: list[Any] = []
"""What a loop holds by mistake."""


def step(model: Model, optimizer: Sgd, tokens: int) -> None:
    ids = torch.zeros(ROWS, tokens, dtype=torch.long, device="cuda")
    bug = model.bug
    if bug == "batch copied again":
        HELD.append([ids.clone() for _ in range(64)])
    logits = model(ids)
    loss = functional.cross_entropy(logits.flatten(0, 1), ids.flatten())
    loss.backward(retain_graph=bug == "retained graph")
    if bug == "logits kept":
        HELD.append(logits.detach())
    if bug == "list that grows":
        HELD.append(model.head.weight.detach().clone())
    if bug == "retained graph":
        HELD.append(loss)
    trained: list[Any] = [p for p in model.parameters() if p.grad is not None]
    if bug == "lost in-place":
        for parameter, scaled in [(p, p.grad * 0.5) for p in trained]:
            parameter.grad = scaled
    else:
        for parameter in trained:
            parameter.grad.mul_(0.5)
    optimizer.step()
    optimizer.zero_grad(set_to_none=bug != "gradients kept")
    if bug == "batch copied again":
        HELD.clear()


@contextlib.contextmanager
def forgotten() -> Iterator[None]:
    HELD.clear()
    yield
    HELD.clear()


def taken(bug: str, tokens: int) -> dict[str, Any]:
    """The breakdown of the third step with a mistake; "" for none."""
    with forgotten(), meft_bench.virtual_gpu("H200") as memory:
        model = Model(bug).cuda()
        is_foreach = bug != "optimizer stepping unfused"
        optimizer = Sgd(model, foreach=is_foreach, nesterov=True)
        for _ in range(2):
            step(model, optimizer, tokens)
        start = memory.ledger.mark()
        step(model, optimizer, tokens)
        return breakdown(memory.ledger.trace(), start)


BUGS: dict[str, tuple[str, str]] = {
    "logits kept": ("saved", "head"),
    "copy of the logits": ("saved", ""),
    "input saved for nothing": ("recompute", "blocks.*"),
    "float32 upcast": ("recompute", "blocks.*"),
    "lost in-place": ("gradients", "blocks.*"),
    "state of frozen parameters": ("optimizer", "embed"),
    "batch copied again": ("saved", ""),
    "checkpoint without effect": ("saved", "blocks.*"),
    "cache that never evicts": ("saved", ""),
    "buffer registered twice": ("buffers", "blocks.*"),
    "gradients kept": ("gradients", "blocks.*"),
    "eager attention": ("recompute", "blocks.*.attention"),
    "list that grows": ("saved", ""),
    "retained graph": ("saved", ""),
    "mask of another dtype": ("buffers", "blocks.*.attention"),
    "optimizer stepping unfused": ("update", ""),
    "gathered weights are kept": ("saved", ""),
}
"""Mistakes, with the kind and the beginning of the module of what grew most.

What the loop or the model as a whole makes has no module. Memory that a forward made
and that is there when a backward begins is `saved`, whatever keeps it.
"""


def growth_of(bug: str) -> Growth:
    # Of few tokens, the update is the peak.
    tokens = 1 if bug in ("lost in-place", "optimizer stepping unfused") else TOKENS
    before, after = (read(taken(which, tokens), which) for which in ("", bug))
    return what_grew(before, after, after.peak_bytes - before.peak_bytes)


@pytest.mark.parametrize("bug", BUGS)
def test_a_mistake_is_noticed_and_blamed(bug: str) -> None:
    growth = growth_of(bug)
    largest = max(growth.changes, key=lambda change: change.num_bytes)
    kind, module = BUGS[bug]
    assert largest.num_bytes >= 24 * 2**10
    assert largest.after is not None
    assert largest.after.kind == kind
    assert largest.after.module.startswith(module)
    assert bool(module) == bool(largest.after.module)


def test_what_is_as_it_was_is_not_blamed() -> None:
    assert growth_of("").changes == ()
