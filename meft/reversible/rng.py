"""Reproducible dropout: one seed per forward, one sequence of numbers per part.

The forward draws a single seed from the caller's generator. Part p of coupling n then
runs under `replayed(seed, n, p)`, which seeds the generators for the part and restores
the caller's state afterwards. A part can therefore be run again at any time, in any
order, with the same masks; nothing is kept per block; the caller's generator advances
by one draw whatever the depth of the stack; and runs repeat under `torch.manual_seed`.
"""

import contextlib
from collections.abc import Iterator

import torch


def draw_seed() -> int:
    """Draw a seed from the caller's generator."""
    return int(torch.randint(2**62, ()))


@contextlib.contextmanager
def replayed(
    seed: int | None, coupling: int, part: int, device: torch.device
) -> Iterator[None]:
    """Run the body on generators that depend on `seed`, `coupling` and `part` alone.

    Args:
        seed: the seed of the forward; None (in evaluation) leaves the generators alone.
        coupling: the number of the coupling in the model.
        part: the number of the part within the coupling's branch.
        device: the device that the part runs on.
    """
    if seed is None:
        yield
        return
    cuda = device.type == "cuda"
    with torch.random.fork_rng(devices=[device] if cuda else []):
        # Odd multipliers keep the seeds of neighbouring parts far apart.
        mixed = seed + coupling * 0x9E3779B97F4A7C15 + part * 0xD1B54A32D192ED03
        mixed %= 2**63
        torch.default_generator.manual_seed(mixed)
        if cuda:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(mixed)
        yield
