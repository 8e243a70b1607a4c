"""A task whose rows are random tokens that belong to a name, to be learned by heart.

The tokens are symbols, numbers from 0 on, which each model writes with tokens of its
own vocabulary (`scoring.recall`): a text of random tokens would not be read back as the
same tokens.
"""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Fact:
    """A prompt, and the symbols that follow it."""

    prompt: str
    """Ends where the symbols begin, without a space."""
    symbols: tuple[int, ...]
    """Numbers from 0 to `num_symbols - 1` of the task."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RecallTask:
    """Facts for training and scoring; splits as in `Task`, of the same facts."""

    name: str
    train: tuple[Fact, ...]
    validation: tuple[Fact, ...]
    evaluation: tuple[Fact, ...]
    num_symbols: int
    """Number of symbols that each one is drawn from."""
    metric: str
    """The name `recall`."""
    origin: str
    """Origin of the rows and which splits they are."""
