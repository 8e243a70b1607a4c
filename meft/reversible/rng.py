"""Dropout that can be replayed: one seed a forward, one stream of numbers a branch.

The forward draws a single seed from the caller's generator. Branch number n (F of block
i is 2i, G is 2i + 1) then runs under `replayed(seed, n)`, which gives it generators of
its own and puts the caller's back. So a branch can be run again at any time, in any
order, with the same masks; nothing is kept per block; the caller's generator moves by
one draw however deep the stack is; and runs repeat under `torch.manual_seed`.
"""

import contextlib
from collections.abc import Iterator

import torch


def draw_seed() -> int:
    """A seed from the caller's generator."""
    return int(torch.randint(2**62, ()))


@contextlib.contextmanager
def replayed(seed: int | None, branch: int, device: torch.device) -> Iterator[None]:
    """Run the body on generators that depend on `seed` and `branch` alone.

    With `seed=None` (evaluation: nothing is random) the generators are left alone.
    """
    if seed is None:
        yield
        return
    cuda = device.type == "cuda"
    with torch.random.fork_rng(devices=[device] if cuda else []):
        # An odd multiplier keeps neighbouring branches far apart in seed space.
        mixed = (seed + branch * 0x9E3779B97F4A7C15) % 2**63
        torch.default_generator.manual_seed(mixed)
        if cuda:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(mixed)
        yield
