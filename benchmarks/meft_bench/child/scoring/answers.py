"""Language models: choose the most likely option, or generate text that a rule scores.

An option's likelihood is its log-likelihood per byte. Texts are generated greedily and
end at the model's end token, where the next prompt would begin, or after
`max_new_tokens`. `rules` has the metrics. `majority` always gives the most frequent
answer of the training rows; for options, the position that is most often right.
"""

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from meft_bench.child.own import metric as own_metric
from meft_bench.child.scoring.examples import Examples
from meft_bench.child.scoring.rules import METRICS
from meft_bench.child.tasks.batches import IGNORED, Example, collate
from meft_bench.child.tasks.question import AnswerTask, Question
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
    _refuse_long_options(task, tokenizer, cell.seq_len)
    return Examples(
        train=[_learned(q, tokenizer, cell.seq_len) for q in task.train],
        validation=task.validation,
        evaluation=task.evaluation,
    )


def predict(
    stepper: Stepper,
    task: AnswerTask,
    rows: Sequence[Question],
    tokenizer: PreTrainedTokenizerBase,
    cell: Cell,
) -> list[str]:
    """Return the chosen option or the generated text for each row.

    Args:
        stepper: the model.
        task: the task, whose metric decides between options and text.
        rows: the questions.
        tokenizer: the tokenizer of the model.
        cell: the cell, which includes batch size and sequence length.
    """
    stepper.model.eval()
    ask = _choose if task.has_options else _write
    return ask(stepper, task, rows, tokenizer, cell)


def is_right(
    task: AnswerTask, predictions: Sequence[str], rows: Sequence[Question]
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
    task: AnswerTask, predictions: Sequence[str], rows: Sequence[Question]
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
        return own_metric.scores(task.metric, predictions, references)
    pairs = list(zip(predictions, rows, strict=True))
    return {
        name: sum(rule(*pair) for pair in pairs) / len(pairs)
        for name, rule in METRICS[task.metric].values.items()
    }


def majority(task: AnswerTask) -> dict[str, float]:
    """Return the scores of always giving the most frequent answer."""
    if task.has_options:
        places = Counter(q.options.index(q.accepted[0]) for q in task.train)
        place = places.most_common(1)[0][0]
        answers = [q.options[min(place, len(q.options) - 1)] for q in task.evaluation]
    else:
        # Solutions of GSM8K are all different, but their numbers are not.
        is_own = own_metric.is_own(task.metric)
        key = str if is_own else METRICS[task.metric].key
        keys = [key(q.accepted[0]) for q in task.train]
        common = Counter(keys).most_common(1)[0][0]
        answer = task.train[keys.index(common)].answer
        answers = [answer] * len(task.evaluation)
    return scores(task, answers, task.evaluation)


def _refuse_long_options(
    task: AnswerTask, tokenizer: PreTrainedTokenizerBase, seq_len: int
) -> None:
    """Raise early if an option and a token before it do not fit."""
    for question in (*task.validation, *task.evaluation):
        for option in question.options:
            _, tokens = _split(question.prompt, f" {option}", tokenizer)
            if len(tokens) >= seq_len:
                raise ValueError(
                    f"`seq_len` is {seq_len}, but an option of task {task.name!r} has "
                    f"{len(tokens)} tokens: set it above, to make room for questions"
                )


def _learned(
    question: Question, tokenizer: PreTrainedTokenizerBase, seq_len: int
) -> Example:
    """Return the prompt with its answer and, unless it is cut, the end token."""
    prompt, answer = _split(question.prompt, question.answer, tokenizer)
    # Without an end token, `NEXT_PROMPT` marks the end of an answer.
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    # One token of the prompt is kept, because the first of a row is no target.
    return _example(prompt, [*answer, *end][: seq_len - 1], seq_len)


def _example(prompt: list[int], answer: list[int], seq_len: int) -> Example:
    """Return prompt and answer as one row; the prompt is cut at its beginning."""
    prompt = prompt[max(0, len(prompt) + len(answer) - seq_len) :]
    return Example(
        token_ids=[*prompt, *answer],
        segment_ids=[0] * (len(prompt) + len(answer)),
        label=[*[IGNORED] * len(prompt), *answer],
    )


def _split(
    prompt: str, answer: str, tokenizer: PreTrainedTokenizerBase
) -> tuple[list[int], list[int]]:
    """Tokenise both texts together, and split after the tokens of the prompt.

    This follows lm-evaluation-harness. Tokenised separately, the answer would begin
    with different tokens where a tokenizer marks the beginning of a text, as those of
    LLaMA and Mistral do.
    """
    begin: list[int] = tokenizer(prompt)["input_ids"]
    whole: list[int] = tokenizer(prompt + answer)["input_ids"]
    return whole[: len(begin)], whole[len(begin) :]


@torch.no_grad()
def _choose(
    stepper: Stepper,
    task: AnswerTask,
    rows: Sequence[Question],
    tokenizer: PreTrainedTokenizerBase,
    cell: Cell,
) -> list[str]:
    pairs = [(i, option) for i, q in enumerate(rows) for option in q.options]
    encoded = [
        # Without an end token, which would be a part of every option.
        _example(*_split(rows[i].prompt, f" {o}", tokenizer), cell.seq_len)
        for i, o in pairs
    ]
    best: dict[int, tuple[float, str]] = {}
    for chosen in _by_length(encoded, cell.batch_size):
        batch = collate([encoded[n] for n in chosen], stepper.pad_token_id)
        targets = batch.pop("labels")[:, 1:]
        # The head is the most expensive part, and only the option's tokens need it.
        places = (targets != IGNORED).any(0).nonzero()[:, 0]
        logits = stepper.logits_at(batch, places)
        likely = _log_likelihood(logits.float().cpu(), targets[:, places])
        for n, value in zip(chosen, likely.tolist(), strict=True):
            i, option = pairs[n]
            per_byte = value / max(1, len(option.encode()))
            if i not in best or per_byte > best[i][0]:
                best[i] = per_byte, option
    return [best[i][1] for i in range(len(rows))]


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
    prompts = [tokenizer(q.prompt)["input_ids"][-cell.seq_len :] for q in rows]
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
