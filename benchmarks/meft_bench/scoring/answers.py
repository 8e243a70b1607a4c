"""Language models: the likeliest option, or what the model writes, read by a rule.

    options                the option with the largest log-likelihood per byte
    exact_match            an accepted answer appears in the first line written
    exact_match_any_case   likewise, capitals aside
    number                 the number after the last `####`, as a number

Texts are written greedily. `majority` always gives the most frequent answer of the
training rows; of options, the place that is most often right.
"""

from collections import Counter
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from meft_bench.cell import Cell
from meft_bench.scoring.examples import Examples
from meft_bench.tasks.batches import IGNORED, Example, collate
from meft_bench.tasks.question import AnswerTask, Question
from meft_bench.training import Stepper

Judge = Callable[[str, Question], bool]


def examples(
    task: AnswerTask, tokenizer: PreTrainedTokenizerBase, cell: Cell
) -> Examples:
    """Prompts with their answers to train on; questions as they are to score."""
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
    """The option that is chosen, or the text that is written."""
    stepper.model.eval()
    ask = _choose if task.metric == "options" else _write
    return ask(stepper, task, rows, tokenizer, cell)


def is_right(
    task: AnswerTask, predictions: Sequence[str], rows: Sequence[Question]
) -> list[bool]:
    """What the task's metric says of each answer."""
    judge = METRICS[task.metric]
    return [judge(*pair) for pair in zip(predictions, rows, strict=True)]


def scores(
    task: AnswerTask, predictions: Sequence[str], rows: Sequence[Question]
) -> dict[str, float]:
    """The share of questions that are answered right."""
    right = is_right(task, predictions, rows)
    return {task.metric: sum(right) / len(right)}


def majority(task: AnswerTask) -> dict[str, float]:
    """For always answering alike."""
    if task.metric == "options":
        places = Counter(q.options.index(q.accepted[0]) for q in task.train)
        place = places.most_common(1)[0][0]
        answers = [q.options[min(place, len(q.options) - 1)] for q in task.evaluation]
    else:
        common = Counter(q.answer for q in task.train).most_common(1)[0][0]
        answers = [common.strip()] * len(task.evaluation)
    return scores(task, answers, task.evaluation)


def _learned(
    question: Question, tokenizer: PreTrainedTokenizerBase, seq_len: int
) -> Example:
    """The prompt with its answer, and where that ends."""
    told = _tokens(question.answer, tokenizer)[: seq_len - 1]
    return _example(question, [*told, tokenizer.eos_token_id], tokenizer, seq_len)


def _example(
    question: Question,
    told: list[int],
    tokenizer: PreTrainedTokenizerBase,
    seq_len: int,
) -> Example:
    """The prompt loses its beginning where both are too long together."""
    prompt: list[int] = tokenizer(question.prompt)["input_ids"]
    prompt = prompt[max(0, len(prompt) + len(told) - seq_len) :]
    tokens = [*prompt, *told][-seq_len:]
    return Example(
        token_ids=tokens,
        segment_ids=[0] * len(tokens),
        label=[*[IGNORED] * len(prompt), *told][-seq_len:],
    )


def _tokens(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    tokens: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return tokens


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
        # Without an end: no option is asked for more than the others.
        _example(rows[i], _tokens(f" {o}", tokenizer), tokenizer, cell.seq_len)
        for i, o in pairs
    ]
    best: dict[int, tuple[float, str]] = {}
    for chosen in _by_length(encoded, cell.batch_size):
        batch = collate([encoded[n] for n in chosen], stepper.pad_token_id)
        told = batch.pop("labels")[:, 1:]
        # The head is the dearest part, and only the option's tokens need it.
        places = (told != IGNORED).any(0).nonzero()[:, 0]
        inputs = stepper.to_device(batch | {"logits_to_keep": places})
        with stepper.autocast():
            logits = stepper.model(**inputs).logits
        likely = _log_likelihood(logits.float().cpu(), told[:, places])
        for n, value in zip(chosen, likely.tolist(), strict=True):
            i, option = pairs[n]
            per_byte = value / max(1, len(option.encode()))
            if i not in best or per_byte > best[i][0]:
                best[i] = per_byte, option
    return [best[i][1] for i in range(len(rows))]


def _log_likelihood(logits: Tensor, told: Tensor) -> Tensor:
    """Of the tokens that count, summed per row."""
    found = logits.log_softmax(-1).gather(-1, told.clamp(min=0)[..., None])[..., 0]
    return (found * (told != IGNORED)).sum(1)


@torch.no_grad()
def _write(
    stepper: Stepper,
    task: AnswerTask,
    rows: Sequence[Question],
    tokenizer: PreTrainedTokenizerBase,
    cell: Cell,
) -> list[str]:
    room = max(1, cell.seq_len - task.max_new_tokens)
    prompts = [tokenizer(q.prompt)["input_ids"][-room:] for q in rows]
    written = [""] * len(rows)
    encoded = [Example(token_ids=p, segment_ids=[0] * len(p), label=0) for p in prompts]
    for chosen in _by_length(encoded, cell.batch_size):
        longest = max(len(prompts[n]) for n in chosen)
        # A decoder goes on from the right end.
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
                eos_token_id=tokenizer.eos_token_id,
            )
        texts = tokenizer.batch_decode(out[:, longest:], skip_special_tokens=True)
        for n, text in zip(chosen, texts, strict=True):
            written[n] = text
    return written


def _by_length(rows: Sequence[Example], size: int) -> list[list[int]]:
    """Batches of equal lengths need the least padding."""
    order = sorted(range(len(rows)), key=lambda n: len(rows[n].token_ids))
    return [order[start : start + size] for start in range(0, len(order), size)]


def _first_line(text: str) -> str:
    return text.strip().partition("\n")[0]


def _contains(text: str, question: Question) -> bool:
    return any(answer in _first_line(text) for answer in question.accepted)


def _contains_any_case(text: str, question: Question) -> bool:
    line = _first_line(text).lower()
    return any(answer.lower() in line for answer in question.accepted)


def _is_number(text: str, question: Question) -> bool:
    found, wanted = (
        part.rpartition("####")[2].replace(",", "").strip()
        for part in (text, question.accepted[0])
    )
    try:
        return abs(float(found) - float(wanted)) < 1e-6
    except ValueError:
        return False


METRICS: dict[str, Judge] = {
    "options": lambda text, question: text in question.accepted,
    "exact_match": _contains,
    "exact_match_any_case": _contains_any_case,
    "number": _is_number,
}
"""Whether what was answered is right."""
