"""Who answers a token: the experts it is routed to, the neurons it keeps.

    logits = W_g h                        (one per expert; no softmax: appendix B)
    experts of a token = its top_k_experts largest logits           (equations 5, 6)
    neurons of a token = its top_k_neurons largest scores among theirs   (equation 7)

Hao et al., ACL 2024, section 3.2. Of equal scores the lowest index is taken, so that a
choice is the same wherever it is made.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from meft.errors import ConfigError

KEY_STD = 0.02
"""Of the keys at the start (the authors' `initializer_range`)."""
ROUTER_GAIN = 50.0
"""A router row starts as this many means of its expert's keys (the authors' code)."""


def top(scores: Float[Tensor, "tokens choices"], k: int) -> Int[Tensor, "tokens kept"]:
    """Indices of the `k` largest scores of each token, ascending.

    Ties go to the lowest index. A NaN counts as the largest of all, so that it reaches
    the output and is noticed.
    """
    tokens, choices = scores.shape
    if k > choices:
        raise ConfigError(f"{k} of {choices} choices cannot be kept")
    if k == choices:
        return torch.arange(k, device=scores.device).expand(tokens, k)
    scores = scores.nan_to_num(nan=torch.inf, posinf=torch.inf, neginf=-torch.inf)
    last = scores.topk(k).values[:, -1:]
    kept = scores > last
    tied = scores == last
    room = k - kept.sum(1, keepdim=True)
    kept |= tied & (tied.cumsum(1, dtype=torch.int32) <= room)
    # The size is known: `nonzero` would make the host wait for the device.
    found = torch.nonzero_static(kept, size=tokens * k)
    return found[:, 1].view(tokens, k)


def make_router(
    keys: Float[Tensor, "neurons hidden"], num_experts: int
) -> nn.Parameter:
    """W_g at the start: the mean key of each expert, enlarged."""
    groups = keys.view(num_experts, -1, keys.shape[1])
    return nn.Parameter(ROUTER_GAIN * groups.mean(1))


def gates(
    logits: Float[Tensor, "tokens experts"],
    chosen: Int[Tensor, "tokens kept"],
    gate: str,
) -> Float[Tensor, "tokens kept"]:
    """The factors on the scores of the chosen experts' neurons."""
    if gate == "softmax":
        logits = logits.softmax(1)
    return logits.gather(1, chosen)
