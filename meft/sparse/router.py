"""Selection of neurons: the experts that a token is routed to, the neurons it keeps.

    logits = W_g h                        (one per expert; no softmax: appendix B)
    experts of a token = its top_k_experts largest logits           (equations 5, 6)
    neurons of a token = its top_k_neurons largest scores among theirs   (equation 7)

Hao et al., ACL 2024, section 3.2. Of equal scores the lowest index is selected, so that
a choice does not depend on the device.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from meft.errors import ConfigError

KEY_STD = 0.02
"""Standard deviation of the initial keys (the authors' `initializer_range`)."""
ROUTER_GAIN = 50.0
"""Factor of an expert's mean key in its initial router row (the authors' code)."""


def top(scores: Float[Tensor, "tokens choices"], k: int) -> Int[Tensor, "tokens kept"]:
    """Return the indices of the `k` largest scores of each token, ascending.

    Ties go to the lowest index. A NaN counts as the largest score, so that it reaches
    the output.
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
    # The size is known; `nonzero` would make the host wait for the device.
    found = torch.nonzero_static(kept, size=tokens * k)
    return found[:, 1].view(tokens, k)


def make_router(
    keys: Float[Tensor, "neurons hidden"], num_experts: int
) -> nn.Parameter:
    """Return the initial W_g: the mean key of each expert, times `ROUTER_GAIN`."""
    groups = keys.view(num_experts, -1, keys.shape[1])
    return nn.Parameter(ROUTER_GAIN * groups.mean(1))


def gates(
    logits: Float[Tensor, "tokens experts"],
    chosen: Int[Tensor, "tokens kept"],
    gate: str,
) -> Float[Tensor, "tokens kept"]:
    """Return the factors on the scores of the chosen experts' neurons.

    Args:
        logits: the router scores, `tokens experts`.
        chosen: the experts of each token, `tokens kept`.
        gate: `softmax` or `logit`.
    """
    if gate == "softmax":
        logits = logits.softmax(1)
    return logits.gather(1, chosen)
