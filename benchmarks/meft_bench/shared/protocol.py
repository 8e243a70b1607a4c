"""The constants of the training protocol, all of them in one table.

They are those of Liao et al. (NeurIPS 2023) and their code, apart from LoRA's, which
are those that peft's examples use. `docs/numbers.md` prints the table, and a test
compares the two. This module imports nothing, so that the parent process can read it.
"""

from typing import Any

ADAM_BETAS = (0.9, 0.98)
"""Decay rates of AdamW's two moments."""
ADAM_EPSILON = 1e-6
"""Added to the root of AdamW's second moment."""
WEIGHT_DECAY = 0.1
"""Decoupled weight decay of every parameter of two dimensions or more."""
WEIGHT_DECAY_OF_VECTORS = 0.0
"""The same for parameters of one dimension: biases and the weights of norms."""
WARMUP_FRACTION = 0.06
"""Share of `max_steps` in which the learning rate rises, before it falls to 0."""
MAX_GRADIENT_NORM = 1.0
"""The norm of all gradients together is clipped to this value before every step."""
LORA_ALPHA_PER_RANK = 2
"""`lora_alpha` divided by the rank, so that LoRA's output is multiplied by 2."""
ROWS_PER_VALIDATION_ROW = 10
"""One training row in this many is set aside to select weights."""
TRIAL_SEED = 1000
"""First seed of trials that choose a learning rate; results have other seeds."""


def adam_arguments() -> dict[str, Any]:
    """Return the arguments of every kind of AdamW but the learning rate."""
    return {"betas": ADAM_BETAS, "eps": ADAM_EPSILON}
