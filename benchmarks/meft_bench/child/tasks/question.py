"""A task whose rows are questions that a language model answers in words.

Training continues the prompt with the answer; only the answer's tokens count in the
loss. Scoring lets the model choose among options, or write and be read.
"""

from dataclasses import dataclass

NEXT_PROMPT = "Question:"
"""What the prompt of every task has at the beginning of its question. Where a model
writes it, its answer has ended and the next question begun."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """A prompt and the answers to it.

    Raises:
        ValueError: there is no accepted answer, or an empty one.
    """

    prompt: str
    """Ends where the answer begins, without a space."""
    answer: str
    """What training continues with, its leading space included."""
    accepted: tuple[str, ...]
    """Any of these is right; the first is the answer."""
    options: tuple[str, ...] = ()
    """To choose among, the right one included; empty where the model has to write."""

    def __post_init__(self) -> None:
        if not self.accepted or not all(answer.strip() for answer in self.accepted):
            raise ValueError(
                f"the question that ends in {self.prompt[-60:]!r} has accepted answers "
                f"{list(self.accepted)}: expected one or more, none of them empty"
            )


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
    """Tokens of the longest answer that is generated; 0 where there are options."""
    origin: str
    """Where the rows came from and which splits they are."""
