"""Dropout that can be replayed: one seed a forward, one stream of numbers a part.

The forward draws a single seed from the caller's generator. Part p of coupling n then
runs under `replayed(seed, n, p)`, which gives it generators of its own and puts the
caller's back. So a part can be run again at any time, in any order, with the same
masks; nothing is kept per block; the caller's generator moves by one draw however deep
the stack is; and runs repeat under `torch.manual_seed`."""

import contextlib
from collections.abc import Iterator

import torch


def draw_seed() -> int:
    """A seed from the caller's generator."""
    return int(torch.randint(2**62, ()))


@contextlib.contextmanager
def replayed(
    seed: int | None, coupling: int, part: int, device: torch.device
) -> Iterator[None]:
    """Run the body on generators that depend on `seed`, `coupling` and `part` alone.

    With `seed=None` (evaluation: nothing is random) the generators are left alone.
    """
    if seed is None:
        yield
        return
    cuda = device.type == "cuda"
    with torch.random.fork_rng(devices=[device] if cuda else []):
        # Odd multipliers keep neighbouring parts far apart in seed space.
        mixed = seed + coupling * 0x9E3779B97F4A7C15 + part * 0xD1B54A32D192ED03
        mixed %= 2**63
        torch.default_generator.manual_seed(mixed)
        if cuda:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(mixed)
        yield
