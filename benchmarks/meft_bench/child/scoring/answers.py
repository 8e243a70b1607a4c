"""Language models: choose the most likely option, or generate text that a rule scores.

Options are chosen by their log-likelihood, and by the same divided by the number of
characters, as `acc` and `acc_norm` of lm-evaluation-harness; of options that are
equally likely, the first is chosen. Texts are generated greedily and end at the model's
end token, where the next prompt would begin, or after `max_new_tokens`. `rules` has the
metrics. `majority` always gives the most frequent answer of the training rows; for
options, the position that is most often right.
"""

from collections import Counter
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from meft_bench.child.own import metric as own_metric
from meft_bench.child.scoring.examples import Examples
from meft_bench.child.scoring.rules import METRICS, Answer, Choice
from meft_bench.child.tasks.batches import IGNORED, Example, collate
from meft_bench.child.tasks.question import AnswerTask, Question
from meft_bench.child.tasks.token_cache import cached
from meft_bench.child.training.steps import Stepper
from meft_bench.shared.cell import Cell


def examples(
    task: AnswerTask, tokenizer: PreTrainedTokenizerBase, cell: Cell
) -> Examples:
    """Return prompts with answers for training, and questions for scoring.

    Args:
        task: the questions.
        tokenizer: the tokenizer of the model.
        cell: the cell, which includes the sequence length.

    Raises:
        ValueError: an option does not fit into `cell.seq_len` tokens.
    """
    for rows in (task.validation, task.evaluation):
        _refuse_long(_options(rows, tokenizer, cell.seq_len), task, cell.seq_len)
    return Examples(
        train=_learned(task.train, tokenizer, cell.seq_len),
        validation=task.validation,
        evaluation=task.evaluation,
    )


def predict(
    stepper: Stepper,
    task: AnswerTask,
    rows: Sequence[Question],
    tokenizer: PreTrainedTokenizerBase,
    cell: Cell,
) -> list[Choice] | list[str]:
    """Return the chosen options or the generated text for each row.

    Args:
        stepper: the model.
        task: the task.
        rows: the questions.
        tokenizer: the tokenizer of the model.
        cell: the cell, which includes batch size and sequence length.
    """
    stepper.model.eval()
    if task.has_options:
        return _choose(stepper, rows, tokenizer, cell)
    return _write(stepper, task, rows, tokenizer, cell)


def is_right(
    task: AnswerTask, predictions: Sequence[Answer], rows: Sequence[Question]
) -> list[bool] | None:
    """Return whether each answer is right by the score of the task's metric.

    None is returned for a metric of the user, which scores all answers together.

    Args:
        task: the task.
        predictions: the answers.
        rows: the questions, in the same order.
    """
    if own_metric.is_own(task.metric):
        return None
    rule = next(iter(METRICS[task.metric].values.values()))
    return [rule(*pair) == 1 for pair in zip(predictions, rows, strict=True)]


def scores(
    task: AnswerTask, predictions: Sequence[Answer], rows: Sequence[Question]
) -> dict[str, float]:
    """Return the mean over the questions of each value of the metric, the score first.

    Args:
        task: the task.
        predictions: the answers.
        rows: the questions, in the same order.
    """
    if own_metric.is_own(task.metric):
        several = any(len(row.accepted) > 1 for row in rows)
        references = [[*row.accepted] if several else row.accepted[0] for row in rows]
        texts = [_text(*pair) for pair in zip(predictions, rows, strict=True)]
        return own_metric.scores(task.metric, texts, references)
    pairs = list(zip(predictions, rows, strict=True))
    return {
        name: sum(rule(*pair) for pair in pairs) / len(pairs)
        for name, rule in METRICS[task.metric].values.items()
    }


def row_scores(
    task: AnswerTask, predictions: Sequence[Answer], rows: Sequence[Question]
) -> None:
    """Return None: every score but one of the user is a share of right rows.

    Args:
        task: the task.
        predictions: the answers.
        rows: the questions.
    """


def _text(answer: Answer, question: Question) -> str:
    """Return an answer as text: of a choice, the likeliest option per character."""
    if isinstance(answer, Choice):
        return question.options[answer.likeliest_per_character]
    return answer


def majority(task: AnswerTask) -> dict[str, float]:
    """Return the scores of always giving the most frequent answer."""
    answers: list[Answer]
    if task.has_options:
        places = Counter(q.right_option for q in task.train)
        place = places.most_common(1)[0][0]
        lasts = [len(q.options) - 1 for q in task.evaluation]
        answers = [Choice(min(place, last), min(place, last)) for last in lasts]
    else:
        # Solutions of GSM8K are all different, but their numbers are not.
        is_own = own_metric.is_own(task.metric)
        key = str if is_own else METRICS[task.metric].key
        keys = [key(q.accepted[0]) for q in task.train]
        common = Counter(keys).most_common(1)[0][0]
        answer = task.train[keys.index(common)].answer
        answers = [answer] * len(task.evaluation)
    return scores(task, answers, task.evaluation)


def _learned(
    questions: Sequence[Question], tokenizer: PreTrainedTokenizerBase, seq_len: int
) -> list[Example]:
    """Return prompts with their answers and, unless they are cut, the end token."""
    # Without an end token, `NEXT_PROMPT` marks the end of an answer.
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]

    def make() -> list[Example]:
        return [
            # One token of the prompt is kept, because the first of a row is no target.
            _example(prompt, [*answer, *end][: seq_len - 1], seq_len)
            for prompt, answer in _split(texts, tokenizer)
        ]

    texts = [(question.prompt, question.answer) for question in questions]
    return cached("answers", texts, tokenizer, seq_len, code=[__file__], make=make)


def _options(
    questions: Sequence[Question], tokenizer: PreTrainedTokenizerBase, seq_len: int
) -> list[Example]:
    """Return each prompt with each of its options, in order.

    There is no end token, which would be a part of every option.
    """

    def make() -> list[Example]:
        return [
            _example(prompt, option, seq_len)
            for prompt, option in _split(texts, tokenizer)
        ]

    texts = [(q.prompt, f" {option}") for q in questions for option in q.options]
    return cached("options", texts, tokenizer, seq_len, code=[__file__], make=make)


def _refuse_long(options: Sequence[Example], task: AnswerTask, seq_len: int) -> None:
    """Raise early if an option and a token before it do not fit."""
    for option in options:
        assert isinstance(option.label, list)
        num_tokens = sum(token != IGNORED for token in option.label)
        if num_tokens >= seq_len:
            raise ValueError(
                f"`seq_len` is {seq_len}, but an option of task {task.name!r} has "
                f"{num_tokens} tokens: set it above, to make room for questions"
            )


def _example(prompt: list[int], answer: list[int], seq_len: int) -> Example:
    """Return prompt and answer as one row; the prompt is cut at its beginning."""
    prompt = prompt[max(0, len(prompt) + len(answer) - seq_len) :]
    return Example(
        token_ids=[*prompt, *answer],
        segment_ids=[0] * (len(prompt) + len(answer)),
        label=[*[IGNORED] * len(prompt), *answer],
    )


def _split(
    texts: Sequence[tuple[str, str]], tokenizer: PreTrainedTokenizerBase
) -> Iterator[tuple[list[int], list[int]]]:
    """Tokenise prompts and answers together, and split after the tokens of the prompt.

    This follows lm-evaluation-harness, which counts spaces at the end of a prompt to
    the answer. Tokenised separately, the answer would begin with different tokens where
    a tokenizer marks the beginning of a text, as those of LLaMA and Mistral do.

    Args:
        texts: prompts, each with its answer.
        tokenizer: the tokenizer of the model.

    Yields:
        The tokens of the prompt and those of the answer.
    """
    if not texts:
        return
    prompts = list(dict.fromkeys(prompt for prompt, _ in texts))  # one for all options
    begins = tokenizer([prompt.rstrip() for prompt in prompts])["input_ids"]
    lengths = {p: len(begin) for p, begin in zip(prompts, begins, strict=True)}
    wholes = tokenizer([prompt + answer for prompt, answer in texts])["input_ids"]
    for (prompt, _), whole in zip(texts, wholes, strict=True):
        yield whole[: lengths[prompt]], whole[lengths[prompt] :]


@torch.no_grad()
def _choose(
    stepper: Stepper,
    rows: Sequence[Question],
    tokenizer: PreTrainedTokenizerBase,
    cell: Cell,
) -> list[Choice]:
    likely = log_likelihoods(stepper, rows, tokenizer, cell)
    return [choice_of(row, values) for row, values in zip(rows, likely, strict=True)]


def choice_of(question: Question, log_likelihoods: Sequence[float]) -> Choice:
    """Return the options that are chosen by both rules.

    Args:
        question: the question.
        log_likelihoods: those of its options, in order.
    """
    lengths = [len(option) for option in question.options]
    per_character = [
        value / length for value, length in zip(log_likelihoods, lengths, strict=True)
    ]
    return Choice(_first_largest(log_likelihoods), _first_largest(per_character))


def _first_largest(values: Sequence[float]) -> int:
    return max(range(len(values)), key=values.__getitem__)


@torch.no_grad()
def log_likelihoods(
    stepper: Stepper,
    rows: Sequence[Question],
    tokenizer: PreTrainedTokenizerBase,
    cell: Cell,
) -> list[list[float]]:
    """Return the log-likelihood of each option of each row after its prompt.

    Args:
        stepper: the model, in evaluation mode.
        rows: the questions.
        tokenizer: the tokenizer of the model.
        cell: the cell, which includes batch size and sequence length.
    """
    pairs = [(i, k) for i, q in enumerate(rows) for k in range(len(q.options))]
    encoded = _options(rows, tokenizer, cell.seq_len)
    found = [[0.0] * len(row.options) for row in rows]
    for chosen in _by_length(encoded, cell.batch_size):
        batch = collate([encoded[n] for n in chosen], stepper.pad_token_id)
        targets = batch.pop("labels")[:, 1:]
        # The head is the most expensive part, and only the option's tokens need it.
        places = (targets != IGNORED).any(0).nonzero()[:, 0]
        logits = stepper.logits_at(batch, places)
        likely = _log_likelihood(logits.float().cpu(), targets[:, places])
        for n, value in zip(chosen, likely.tolist(), strict=True):
            i, place = pairs[n]
            found[i][place] = value
    return found


def _log_likelihood(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the sum of the target tokens' log-likelihoods per row."""
    found = logits.log_softmax(-1).gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    return (found * (targets != IGNORED)).sum(1)


@torch.no_grad()
def _write(
    stepper: Stepper,
    task: AnswerTask,
    rows: Sequence[Question],
    tokenizer: PreTrainedTokenizerBase,
    cell: Cell,
) -> list[str]:
    end = tokenizer.eos_token_id
    # As in training, a prompt that is too long is cut at its beginning.
    tokens = tokenizer([q.prompt for q in rows])["input_ids"] if rows else []
    prompts = [ids[-cell.seq_len :] for ids in tokens]
    written = [""] * len(rows)
    encoded = [Example(token_ids=p, segment_ids=[0] * len(p), label=0) for p in prompts]
    for chosen in _by_length(encoded, cell.batch_size):
        longest = max(len(prompts[n]) for n in chosen)
        # Padded on the left, because a decoder continues at the right end.
        ids = [
            [stepper.pad_token_id] * (longest - len(prompts[n])) + prompts[n]
            for n in chosen
        ]
        mask = [
            [0] * (longest - len(prompts[n])) + [1] * len(prompts[n]) for n in chosen
        ]
        batch = {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}
        with stepper.autocast():
            out = stepper.model.generate(  # type: ignore[operator]
                **stepper.to_device(batch),
                max_new_tokens=task.max_new_tokens,
                do_sample=False,
                use_cache=True,
                pad_token_id=stepper.pad_token_id,
                eos_token_id=end,
                stop_strings=[task.stop] if task.stop else None,
                tokenizer=tokenizer,
            )
        for n, tokens in zip(chosen, out[:, longest:].tolist(), strict=True):
            # A row that has ended is padded until the last row has ended.
            tokens = tokens[: tokens.index(end)] if end in tokens else tokens
            text = str(tokenizer.decode(tokens, skip_special_tokens=True))
            written[n] = text.partition(task.stop)[0] if task.stop else text
    return written


def _by_length(rows: Sequence[Example], size: int) -> list[list[int]]:
    """Return batches of rows of similar length, which need the least padding."""
    order = sorted(range(len(rows)), key=lambda n: len(rows[n].token_ids))
    return [order[start : start + size] for start in range(0, len(order), size)]
