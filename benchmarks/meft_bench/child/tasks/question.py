"""A task whose rows are questions that a language model answers in words.

In training, the answer follows the prompt, and only its tokens count in the loss. In
scoring, the model chooses among options, or generates text.
"""

from dataclasses import dataclass

NEXT_PROMPT = "Question:"
"""Beginning of the question in the prompt of every task.

Where a model generates it, its answer has ended and the next question has begun.
"""

OPTION_METRICS = ("options", "options_per_character")
"""Metrics of tasks with options."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """A prompt and the answers to it.

    Raises:
        ValueError: there is no accepted answer, or an empty one, or an empty option.
    """

    prompt: str
    """Ends where the answer begins, without a space."""
    answer: str
    """The text that follows the prompt in training, including its leading space."""
    accepted: tuple[str, ...]
    """All right answers; the first is the answer."""
    options: tuple[str, ...] = ()
    """Options including the right one; empty where the model generates text."""
    right: int | None = None
    """Index of the right option; None takes the first option that is the answer.

    It matters where two options are equal.
    """

    def __post_init__(self) -> None:
        if not self.accepted or not all(answer.strip() for answer in self.accepted):
            raise ValueError(
                f"the question that ends in {self.prompt[-60:]!r} has accepted answers "
                f"{list(self.accepted)}: expected one or more, none of them empty"
            )
        if not all(self.options):
            raise ValueError(
                f"the question that ends in {self.prompt[-60:]!r} has options "
                f"{list(self.options)}: expected none that is empty"
            )

    @property
    def right_option(self) -> int:
        """Index of the right option."""
        if self.right is not None:
            return self.right
        return self.options.index(self.accepted[0])


@dataclass(frozen=True, kw_only=True, slots=True)
class AnswerTask:
    """Questions for training and scoring; splits as in `Task`."""

    name: str
    train: tuple[Question, ...]
    validation: tuple[Question, ...]
    evaluation: tuple[Question, ...]
    metric: str
    """A name of `scoring.answers.METRICS`."""
    max_new_tokens: int
    """Maximum number of generated tokens; 0 where there are options."""
    origin: str
    """Origin of the rows and which splits they are."""
    stop: str = NEXT_PROMPT
    """Text at which a generated answer ends; empty for none."""

    @property
    def has_options(self) -> bool:
        """Whether the model chooses among options, and does not generate text."""
        return self.metric in OPTION_METRICS or not self.max_new_tokens
