"""Tasks that a language model answers in words."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from harness.tiny import cell
from meft_bench import backbones
from meft_bench.registry import TASKS, load
from meft_bench.scoring import answers
from meft_bench.source import MissingError, Source
from meft_bench.tasks.batches import IGNORED, Example, collate, full_batches
from meft_bench.tasks.question import AnswerTask, Question
from meft_bench.training import Stepper

QUESTIONS = ("nq-open", "squad", "gsm8k", "arc-easy", "arc-challenge")
WORDS = ["[PAD]", "[END]", "[UNK]", "Question:", "Answer:", "sky", "blue", "red", "?"]
every_task = pytest.mark.parametrize("name", QUESTIONS)


def write(folder: Path, name: str, text: str) -> None:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(text)


def write_nq_open(root: Path) -> None:
    write(root / "nq-open", "topics.nq.dev.txt", "who wrote it\t['A', 'B']\n" * 20)
    row = json.dumps({"question": "who sang it", "answer": ["C", "D"]})
    write(root / "nq-open", "NQ-open.dev.jsonl", f"{row}\n" * 3)


def write_squad(root: Path) -> None:
    paragraph = {
        "context": "The sky is blue.",
        "qas": [{"question": "What colour is it?", "answers": [{"text": "blue"}]}] * 4,
    }
    data = {"data": [{"paragraphs": [paragraph]}] * 10}
    write(root / "squad-xquad-en", "xquad.en.json", json.dumps(data))


def write_gsm8k(root: Path) -> None:
    row = json.dumps({"question": "One and one?", "answer": "1+1=2\n#### 2"})
    for name in ("train.jsonl", "test.jsonl"):
        write(root / "gsm8k", name, f"{row}\n" * 20)


def write_arc(root: Path) -> None:
    text = (
        "Please choose the correct answer to the question: What is up?\n\nAnswer1: the"
        " sky Answer2: the sea Answer3: a cat\n\nAnswer format: answer1/answer2/answer3"
    )
    rows = json.dumps([{"instruction": text, "answer": "answer1"}] * 20)
    for name in ("arc-easy", "arc-challenge"):
        for file in ("train.json", "test.json"):
            write(root / name, file, rows)


@pytest.fixture
def source(tmp_path: Path) -> Source:
    """A few rows of every task."""
    for make in (write_nq_open, write_squad, write_gsm8k, write_arc):
        make(tmp_path)
    return Source(data_dir=tmp_path)


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    """Words, and nothing put around them."""
    words = {word: index for index, word in enumerate(WORDS)}
    model = Tokenizer(WordLevel(words, unk_token="[UNK]"))
    model.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=model, pad_token="[PAD]", eos_token="[END]", unk_token="[UNK]"
    )


def writer() -> Any:
    """A stepper with a tiny language model."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=1,
        initializer_range=0.5,
    )
    return Stepper(LlamaForCausalLM(config), cell())


def sky(**changes: Any) -> Question:
    fields: dict[str, Any] = {
        "prompt": "Question: sky ?\nAnswer:",
        "answer": " blue",
        "accepted": ("blue",),
        "options": ("red", "blue"),
    }
    return Question(**fields | changes)


def asked(metric: str, *questions: Question) -> AnswerTask:
    return AnswerTask(
        name="made up",
        train=questions,
        validation=(),
        evaluation=questions,
        metric=metric,
        max_new_tokens=3,
        origin="made up",
    )


@every_task
def test_a_task_says_where_its_rows_come_from(name: str, source: Source) -> None:
    """Splits do not overlap in number, and the prompt ends where the answer begins."""
    task = load(TASKS[name])(cell(task=name, eval_rows=3), source)
    assert task.metric in answers.METRICS
    assert len(task.evaluation) == 3
    assert len(task.validation) == (len(task.train) + len(task.validation)) // 10
    for question in (*task.train, *task.evaluation):
        assert question.prompt.endswith("Answer:")
        assert question.answer.startswith(" ")
        assert question.accepted
        judge = answers.METRICS[task.metric]
        wanted = question.accepted[0] if question.options else question.answer
        assert judge(wanted, question)
        assert not judge("nothing of the kind", question)
    assert "sha256" in task.origin


@every_task
def test_a_task_without_its_files_says_where_to_put_them(name: str) -> None:
    with pytest.raises(MissingError, match=f"--data DIR` with {name[:3]}|squad"):
        load(TASKS[name])(cell(task=name), Source())


@every_task
def test_the_real_files_are_read(name: str, data_dir: Path) -> None:
    task = load(TASKS[name])(cell(task=name), Source(data_dir=data_dir))
    sizes = {
        "nq-open": (8757, 3610),
        "gsm8k": (7473, 1319),
        "arc-easy": (2251, 2376),
        "arc-challenge": (1119, 1172),
    }
    found = len(task.train) + len(task.validation), len(task.evaluation)
    if name == "squad":
        assert sum(found) == 1190
    else:
        assert found == sizes[name]
    assert all(len(q.options) != 1 for q in task.evaluation)


def test_only_the_answer_is_learned(tokenizer: PreTrainedTokenizerFast) -> None:
    """And the end; a prompt that is too long loses its beginning."""
    task = asked("options", sky())
    (example,) = answers.examples(task, tokenizer, cell(seq_len=8)).train
    assert isinstance(example, Example)
    assert example.token_ids == [3, 5, 8, 4, 6, 1]
    assert example.label == [IGNORED] * 4 + [6, 1]
    (short,) = answers.examples(task, tokenizer, cell(seq_len=4)).train
    assert isinstance(short, Example)
    assert short.token_ids == [8, 4, 6, 1]
    batch = collate([example, short], 0)
    assert batch["labels"].tolist()[1] == [IGNORED] * 2 + [6, 1] + [IGNORED] * 2
    (full,) = full_batches([example], cell(batch_size=2, seq_len=8))
    assert torch.equal(full["labels"], full["input_ids"])


@torch.no_grad()
def likeliest(
    stepper: Stepper, tokenizer: PreTrainedTokenizerFast, question: Question
) -> str:
    """The plain way: one option at a time, token by token."""
    values = {}
    for option in question.options:
        prompt = tokenizer(question.prompt)["input_ids"]
        told = tokenizer(option)["input_ids"]
        logits = stepper.model.eval()(torch.tensor([[*prompt, *told]])).logits[0]
        likely = logits[len(prompt) - 1 : -1].log_softmax(-1)
        total = sum(likely[place, token] for place, token in enumerate(told))
        values[option] = float(total) / len(option)
    return max(values, key=lambda option: values[option])


def test_the_likeliest_option_is_chosen(tokenizer: PreTrainedTokenizerFast) -> None:
    """By the byte, whichever of the options is right."""
    stepper = writer()
    options = ("red", "blue", "red blue sky", "sky")
    prompts = ("Question: sky ?\nAnswer:", "Question: red sky ?\nAnswer:", "Answer:")
    questions = [
        sky(prompt=prompt, options=options, answer=f" {right}", accepted=(right,))
        for prompt in prompts
        for right in options
    ]
    wanted = [likeliest(stepper, tokenizer, q) for q in questions]
    assert len(set(wanted)) > 1
    task = asked("options", *questions)
    found = answers.predict(stepper, task, questions, tokenizer, cell(batch_size=4))
    assert found == wanted
    right = answers.is_right(task, found, questions)
    assert right == [
        w == q.answer.strip() for w, q in zip(wanted, questions, strict=True)
    ]
    assert answers.scores(task, found, questions) == {"options": 0.25}


def test_what_is_written_does_not_depend_on_the_batch(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    """Prompts of unequal lengths are padded on the left."""
    stepper = writer()
    prompts = [
        "Question: sky ?\nAnswer:",
        "Answer:",
        "Question: red blue sky ?\nAnswer:",
    ]
    task = asked("exact_match", *(sky(prompt=p) for p in prompts))
    alone = [
        answers._write(stepper, task, [q], tokenizer, cell()) for q in task.evaluation
    ]
    together = answers._write(stepper, task, task.evaluation, tokenizer, cell())
    assert [text for (text,) in alone] == together


@pytest.mark.parametrize(
    ("metric", "text", "is_right"),
    [
        ("exact_match", " It is Blue sky\nred", True),
        ("exact_match", "it is blue", False),
        ("exact_match", "red\nBlue", False),
        ("exact_match_any_case", "it is blue", True),
        ("number", "so #### 1,200", True),
        ("number", "so #### 1200.0", True),
        ("number", "1200", True),
        ("number", "so #### twelve", False),
    ],
)
def test_an_answer_is_read_by_its_rule(metric: str, text: str, is_right: bool) -> None:
    accepted = ("1200",) if metric == "number" else ("Blue",)
    assert answers.METRICS[metric](text, sky(accepted=accepted)) == is_right


def test_the_most_frequent_answer_is_what_scores_are_held_against() -> None:
    questions = [sky(), sky(), sky(options=("blue", "red"))]
    assert answers.majority(asked("options", *questions)) == {"options": 2 / 3}
    written = [sky(), sky(answer=" red", accepted=("red",)), sky()]
    assert answers.majority(asked("exact_match", *written)) == {"exact_match": 2 / 3}


@pytest.mark.parametrize("family", ["bert", "bart", "vit"])
def test_questions_are_not_asked_of_what_cannot_write(family: str) -> None:
    """Nor of a second stack, which scoring does not know."""
    chosen = cell(backbone=f"random:{family}-tiny", task="nq-open")
    words = f"'nq-open' wants a language model of llama, mistral, opt, .* '{family}'"
    with pytest.raises(ValueError, match=words):
        backbones.load(chosen, None, Source())
