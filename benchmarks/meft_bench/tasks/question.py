"""A task whose rows are questions that a language model answers in words.

Training continues the prompt with the answer; only the answer's tokens count in the
loss. Scoring lets the model choose among options, or write and be read.
"""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """A prompt and what is right."""

    prompt: str
    """Ends where the answer begins, without a space."""
    answer: str
    """What training continues with, its leading space included."""
    accepted: tuple[str, ...]
    """Any of these is right; the first is the answer."""
    options: tuple[str, ...] = ()
    """To choose among, the right one included; empty where the model has to write."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AnswerTask:
    """Questions to learn from and to be scored on; splits as in `Task`."""

    name: str
    train: tuple[Question, ...]
    validation: tuple[Question, ...]
    evaluation: tuple[Question, ...]
    metric: str
    """A name of `scoring.answers.METRICS`."""
    max_new_tokens: int
    """The longest answer that is read; 0 where there are options."""
    origin: str
    """Where the rows came from and which splits they are."""
