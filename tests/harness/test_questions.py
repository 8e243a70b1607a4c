"""The questions for a language model, what it learns, and what it answers."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, normalizers, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from harness.tiny import cell, task_of
from meft_bench.child import backbones
from meft_bench.child.scoring import answers
from meft_bench.child.scoring.rules import Choice
from meft_bench.child.tasks.batches import IGNORED, Example, collate, full_batches
from meft_bench.child.tasks.question import Question
from meft_bench.child.training.steps import Stepper
from meft_bench.shared.source import Source

WORDS = [
    "[PAD]",
    "[END]",
    "[UNK]",
    "Question:",
    "Answer:",
    "sky",
    "blue",
    "red",
    "?",
    "abcdef",
]
"""The last one is that by which transformers learns how a tokenizer spells."""


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


def test_only_the_answer_is_learned(tokenizer: PreTrainedTokenizerFast) -> None:
    """And the end; a prompt that is too long loses its beginning."""
    task = task_of("options", sky(), validation=(sky(prompt="Answer:"),))
    found = answers.examples(task, tokenizer, cell(seq_len=8))
    assert (found.validation, found.evaluation) == (task.validation, task.evaluation)
    (example,) = found.train
    assert isinstance(example, Example)
    assert example.token_ids == [3, 5, 8, 4, 6, 1]
    assert example.segment_ids == [0] * 6
    assert example.label == [IGNORED] * 4 + [6, 1]
    (short,) = answers.examples(
        task_of("options", sky()), tokenizer, cell(seq_len=4)
    ).train
    assert isinstance(short, Example)
    assert short.token_ids == [8, 4, 6, 1]
    batch = collate([example, short], 0)
    assert batch["labels"].tolist()[1] == [IGNORED] * 2 + [6, 1] + [IGNORED] * 2
    (full,) = full_batches([example], cell(batch_size=2, seq_len=8))
    assert torch.equal(full["labels"], full["input_ids"])


@torch.no_grad()
def likeliest(
    stepper: Stepper, tokenizer: PreTrainedTokenizerFast, question: Question
) -> Choice:
    """The plain way: one option at a time, token by token."""
    totals, means = [], []
    for option in question.options:
        prompt = tokenizer(question.prompt)["input_ids"]
        tokens = tokenizer(option)["input_ids"]
        logits = stepper.model.eval()(torch.tensor([[*prompt, *tokens]])).logits[0]
        likely = logits[len(prompt) - 1 : -1].log_softmax(-1)
        total = sum(likely[place, token] for place, token in enumerate(tokens))
        totals.append(float(total))
        means.append(float(total) / len(option))
    return Choice(totals.index(max(totals)), means.index(max(means)))


def test_the_likeliest_option_is_chosen(tokenizer: PreTrainedTokenizerFast) -> None:
    """As a whole and by the character, whichever of the options is right."""
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
    task = task_of("options", *questions)
    # Of unequal lengths, so that some rows of a batch are padded.
    found = answers.predict(stepper, task, questions, tokenizer, cell(batch_size=7))
    assert found == wanted
    right = answers.is_right(task, found, questions)
    assert right == [
        w.likeliest == q.right_option for w, q in zip(wanted, questions, strict=True)
    ]
    assert answers.scores(task, found, questions)["accuracy"] == 0.25


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
    task = task_of("nq_open", *(sky(prompt=p) for p in prompts))
    alone = [
        answers._write(stepper, task, [q], tokenizer, cell()) for q in task.evaluation
    ]
    together = answers._write(stepper, task, task.evaluation, tokenizer, cell())
    assert [text for (text,) in alone] == together


class Speller:
    """What `generate` returns, without a model: it writes the same tokens to all, and
    stops where requested."""

    def __init__(self, tokens: list[int]) -> None:
        self.tokens = tokens
        self.config = LlamaConfig(vocab_size=len(WORDS), pad_token_id=0)
        self.task_of: dict[str, Any] = {}
        self.read: list[list[int]] = []

    def eval(self) -> None:
        pass

    def generate(self, input_ids: torch.Tensor, **task_of: Any) -> torch.Tensor:
        self.task_of, self.read = task_of, input_ids.tolist()
        new = torch.tensor([self.tokens] * len(input_ids))
        return torch.cat([input_ids, new], dim=1)


def test_an_answer_ends_at_the_end_token(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    """What stands behind it is padding, even if that is a word."""
    stepper = writer()
    stepper.model = Speller([6, 1, 7, 7])
    task = task_of("nq_open", sky())
    found = answers.predict(stepper, task, task.evaluation, tokenizer, cell())
    assert found == ["blue"]
    assert stepper.model.task_of["eos_token_id"] == 1
    assert stepper.model.task_of["pad_token_id"] == 0
    assert stepper.model.task_of["do_sample"] is False
    assert stepper.model.task_of["use_cache"] is True


def test_prompts_are_padded_on_the_left_and_padding_is_masked(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    """A decoder goes on from the right end."""
    stepper = writer()
    stepper.model = Speller([1])
    task = task_of("nq_open", sky(prompt="Answer:"), sky(prompt="sky ? Answer:"))
    answers.predict(stepper, task, task.evaluation, tokenizer, cell())
    assert stepper.model.read == [[0, 0, 4], [5, 8, 4]]
    assert stepper.model.task_of["attention_mask"].tolist() == [[0, 0, 1], [1, 1, 1]]


def test_special_tokens_are_no_text(tokenizer: PreTrainedTokenizerFast) -> None:
    """Wherever a model writes them."""
    stepper = writer()
    stepper.model = Speller([6, 2, 0, 7, 1])
    task = task_of("nq_open", sky())
    found = answers.predict(stepper, task, task.evaluation, tokenizer, cell())
    assert found == ["blue red"]


def test_a_likelihood_is_that_of_the_tokens_that_count() -> None:
    """Summed per row; token 0 counts like any other, and nothing that is ignored."""
    logits = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0))
    targets = torch.tensor([[0, 3, IGNORED], [IGNORED, 4, 1]])
    likely = logits.log_softmax(-1)
    wanted = [likely[0, 0, 0] + likely[0, 1, 3], likely[1, 1, 4] + likely[1, 2, 1]]
    torch.testing.assert_close(
        answers._log_likelihood(logits, targets), torch.stack(wanted)
    )


def test_rows_of_a_batch_are_of_like_lengths() -> None:
    """The shortest first, so that there is the least padding."""
    rows = [
        Example(token_ids=[5] * n, segment_ids=[0] * n, label=0) for n in (3, 1, 4, 2)
    ]
    assert answers._by_length(rows, 3) == [[1, 3, 0], [2]]


def test_an_answer_ends_where_the_next_prompt_begins(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    """For a model that writes no end token; the next question is no part of it."""
    stepper = writer()
    stepper.model = Speller([6, 7, 3, 5, 8, 4, 6])
    for metric in ("nq_open", "trivia_qa", "squad", "gsm8k"):
        task = task_of(metric, sky())
        found = answers.predict(stepper, task, task.evaluation, tokenizer, cell())
        assert found == ["blue red "]
        assert stepper.model.task_of["stop_strings"] == ["Question:"]


def endless(next_word: dict[int, int]) -> Any:
    """A stepper whose model writes, after each word, the one that `next_word` names,
    and never an end token."""
    stepper = writer()
    model = stepper.model
    size = len(WORDS)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.model.embed_tokens.weight[:, :size].copy_(torch.eye(size))
        model.model.norm.weight.fill_(1.0)
        for word, following in next_word.items():
            model.lm_head.weight[following, word] = 1.0
    return stepper


def test_generation_stops_where_the_next_prompt_begins(
    tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After three words and not after the twenty that there is room for; each row of a
    batch by itself."""
    # sky: blue, red, then the next question; "?": blue, then itself without end.
    stepper = endless({4: 6, 6: 7, 7: 3, 3: 5, 5: 8, 8: 8})
    lengths = []
    generate = stepper.model.generate

    def watched(input_ids: torch.Tensor, **task_of: Any) -> torch.Tensor:
        out: torch.Tensor = generate(input_ids=input_ids, **task_of)
        lengths.append(out.shape[1] - input_ids.shape[1])
        return out

    monkeypatch.setattr(stepper.model, "generate", watched)
    task = task_of("gsm8k", sky(), sky(prompt="?"), max_new_tokens=20)
    (first, _), here = task.evaluation, cell(seq_len=32)
    assert answers.predict(stepper, task, [first], tokenizer, here) == ["blue red "]
    assert lengths == [3]
    found = answers.predict(stepper, task, task.evaluation, tokenizer, here)
    assert found == ["blue red ", " ".join(["?"] * 20)]
    assert lengths == [3, 20]


def marking() -> PreTrainedTokenizerFast:
    """A tokenizer that marks the beginning of words and of texts, as LLaMA's does."""
    words = [
        "[PAD]",
        "[END]",
        "[UNK]",
        "\u2581",
        "\u2581Answer:",
        "\u2581blue",
        "\u2581red",
    ]
    model = Tokenizer(WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    model.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    model.pre_tokenizer = pre_tokenizers.Split("\u2581", "merged_with_next")
    return PreTrainedTokenizerFast(
        tokenizer_object=model, pad_token="[PAD]", eos_token="[END]", unk_token="[UNK]"
    )


def test_an_answer_is_tokenised_as_in_its_text() -> None:
    """Alone, it would begin with a token that marks the beginning of a text."""
    assert marking()(" blue")["input_ids"] == [3, 5]
    question = sky(prompt="Answer:")
    (example,) = answers.examples(
        task_of("nq_open", question, max_new_tokens=3), marking(), cell(seq_len=8)
    ).train
    assert isinstance(example, Example)
    assert example.token_ids == [4, 5, 1]
    assert example.label == [IGNORED, 5, 1]


def test_options_are_tokenised_as_in_their_text(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """So that the likelihood is that of the tokens that training taught."""
    stepper = writer()
    seen = []

    def look(**inputs: torch.Tensor) -> Any:
        seen.append(inputs["input_ids"].tolist())
        kept = inputs["logits_to_keep"]
        return SimpleNamespace(logits=torch.zeros(2, len(kept), len(WORDS)))

    monkeypatch.setattr(stepper.model, "forward", look)
    question = sky(prompt="Answer:")
    answers.log_likelihoods(stepper, [question], marking(), cell())
    assert seen == [[[4, 6], [4, 5]]]


def test_an_answer_that_is_cut_is_not_said_to_end(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    """Nor is its first token lost: one of the prompt stands before it."""
    long = sky(answer=" blue red blue red")
    task = task_of("nq_open", long, max_new_tokens=2)
    (cut,) = answers.examples(task, tokenizer, cell(seq_len=4)).train
    assert isinstance(cut, Example)
    assert cut.token_ids == [4, 6, 7, 6]
    assert cut.label == [IGNORED, 6, 7, 6]


def test_an_answer_without_an_end_token_is_learned_as_it_is(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    """Some tokenizers have none; the next prompt ends the answer then."""
    tokenizer.eos_token = None
    task = task_of("nq_open", sky(), max_new_tokens=2)
    (example,) = answers.examples(task, tokenizer, cell(seq_len=8)).train
    assert isinstance(example, Example)
    assert example.token_ids == [3, 5, 8, 4, 6]


@pytest.mark.parametrize("split", ["validation", "evaluation"])
def test_an_option_without_room_is_refused(
    split: str, tokenizer: PreTrainedTokenizerFast
) -> None:
    """Before anything trains: of an option that is cut, the rest would be scored."""
    fits, long = sky(), sky(options=("blue", "blue red sky"))
    task = task_of("options", fits, **{"evaluation": (), split: (fits, long)})
    words = "`seq_len` is 3, but an option of task 'made up' has 3 tokens"
    with pytest.raises(ValueError, match=words):
        answers.examples(task, tokenizer, cell(seq_len=3))
    answers.examples(task, tokenizer, cell(seq_len=4))


def test_a_prompt_that_is_too_long_to_continue_loses_its_beginning(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    """It has `seq_len` tokens left, whatever the length of the answer to come."""
    stepper = writer()
    stepper.model = Speller([6, 1])
    task = task_of("nq_open", sky(), max_new_tokens=20)
    for seq_len, wanted in ((3, [5, 8, 4]), (8, [3, 5, 8, 4])):
        here = cell(seq_len=seq_len)
        answers.predict(stepper, task, task.evaluation, tokenizer, here)
        assert stepper.model.read == [wanted]
        assert stepper.model.task_of["max_new_tokens"] == 20


@pytest.mark.parametrize("family", ["bert", "bart", "vit"])
def test_questions_need_a_model_that_generates(family: str) -> None:
    """Nor of a second stack, which scoring does not know."""
    chosen = cell(backbone=f"random:{family}-tiny", task="nq-open")
    words = (
        f"'nq-open' wants a language model of .*llama, mistral, .*opt, .* '{family}'"
    )
    with pytest.raises(ValueError, match=words):
        backbones.load(chosen, None, Source())
