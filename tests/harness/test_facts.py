"""Facts made from a seed: how they are made, learned by heart, scored and guarded."""

import dataclasses
import math
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from harness.tiny import cell, classifier
from meft.sparse.adapter import sparse_adapters
from meft_bench.child.measuring import guard, probes
from meft_bench.child.measuring.partial_result import PartialResult
from meft_bench.child.meters import memory
from meft_bench.child.methods import hashed_experts
from meft_bench.child.scoring import recall
from meft_bench.child.tasks.batches import IGNORED, Example, collate
from meft_bench.child.tasks.formats import facts
from meft_bench.child.tasks.recall import Fact, RecallTask
from meft_bench.child.training.steps import Stepper
from meft_bench.child.worker import run
from meft_bench.parent import fields
from meft_bench.shared.cell import Cell
from meft_bench.shared.options import ChildOptions
from meft_bench.shared.registry import METHODS, TASKS, load
from meft_bench.shared.source import MissingError, Source
from meft_bench.shared.tasks.facts_random import NUM_SYMBOLS, NUM_TOKENS

WORDS = ["[PAD]", "[END]", "[UNK]", "is:", *(f"w{n}" for n in range(12)), "abcdef"]


def load_task(name: str, **changes: object) -> Any:
    return load(TASKS[name])(cell(task=name, **changes), Source())


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    """Words, and nothing put around them."""
    words = {word: index for index, word in enumerate(WORDS)}
    model = Tokenizer(WordLevel(words, unk_token="[UNK]"))
    model.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=model, pad_token="[PAD]", eos_token="[END]", unk_token="[UNK]"
    )


def language_model(blocks: int = 2) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=blocks,
        num_attention_heads=2,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=1,
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config)


def made(method: str, **changes: object) -> tuple[Stepper, Cell]:
    chosen = cell(
        method=method, num_neurons=64, num_experts=8, top_k_experts=2, **changes
    )
    return Stepper(load(METHODS[method])(language_model(), chosen), chosen), chosen


def task_of(*codes: tuple[int, ...]) -> RecallTask:
    rows = tuple(
        Fact(prompt=f"w{n} w{n + 1} is:", symbols=code) for n, code in enumerate(codes)
    )
    return RecallTask(
        name="made up",
        train=rows,
        validation=rows,
        evaluation=rows,
        num_symbols=8,
        metric="recall",
        origin="made up",
    )


# How facts are made


def test_a_fact_has_as_many_bits_as_its_tokens_have() -> None:
    """24 of 4,096 symbols each; all facts and names are different."""
    task = load_task("facts-random", train_rows=300)
    assert NUM_TOKENS * math.log2(NUM_SYMBOLS) == 288
    assert {len(fact.symbols) for fact in task.train} == {24}
    symbols = [one for fact in task.train for one in fact.symbols]
    assert (min(symbols) >= 0, max(symbols) < NUM_SYMBOLS) == (True, True)
    assert len({fact.symbols for fact in task.train}) == 300
    assert len({fact.prompt for fact in task.train}) == 300
    # Each symbol is as likely as another one: 7,200 draws meet 4,096 * (1 - e^-1.76).
    assert len(set(symbols)) == pytest.approx(3_390, rel=0.03)


@pytest.mark.parametrize("name", ["facts-random", "facts-paraphrase"])
def test_facts_are_those_of_their_seed(name: str) -> None:
    """The same ones every time, and of another seed others, as those of trials are."""
    first, again, other = (
        load_task(name, train_rows=20, seed=seed) for seed in (0, 0, 1000)
    )
    assert first == again
    assert not {f.prompt for f in first.train} & {f.prompt for f in other.train}


def test_what_is_trained_is_what_is_scored() -> None:
    """None is set aside; the first ones are scored where the cell says how many."""
    task = load_task("facts-random", train_rows=30)
    assert task.train == task.validation == task.evaluation
    task = load_task("facts-random", train_rows=30, eval_rows=10)
    assert len(task.train) == 30
    assert task.train[:10] == task.evaluation
    wanted = "made from the seed of the cell; train 30 made facts, score 10 of 30"
    assert wanted in task.origin


def test_biographies_are_asked_in_words_that_training_does_not_have() -> None:
    """The answers are those that training has given for the same person."""
    task = load_task("facts-paraphrase", train_rows=40)
    assert (len(task.train), len(task.evaluation)) == (40 * 15, 40 * 5)
    assert not {q.prompt for q in task.train} & {q.prompt for q in task.evaluation}
    for values, wordings in facts.ATTRIBUTES:
        assert len(set(values)) == 16
        assert len(set(wordings)) == 4
        assert all(wording.count("{name}") == 1 for wording in wordings)
    # Three wordings of an attribute, then the held-out one of it.
    for index, asked in enumerate(task.evaluation):
        known = task.train[3 * index : 3 * index + 3]
        assert {q.accepted for q in known} == {asked.accepted}


def test_no_more_people_than_names() -> None:
    with pytest.raises(ValueError, match="331776 names can be made: lower it"):
        load_task("facts-random", train_rows=facts.NUM_NAMES + 1)


@pytest.mark.parametrize("name", ["facts-random", "facts-paraphrase"])
def test_a_number_of_facts_is_required(name: str) -> None:
    """Before anything runs."""
    chosen = cell(task=name, backbone="smollm2-135m", seq_len=48)
    with pytest.raises(ValueError, match="`train_rows` says, and that is 0: set it"):
        fields.check_together(chosen)


# How they are scored


def test_recall_is_what_greedy_generation_writes(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    """Of facts that a model writes itself, and the same with one token changed."""
    model, alphabet = language_model(), recall.alphabet(tokenizer, 8)
    others = [n for n in range(len(WORDS)) if n not in alphabet]
    with torch.no_grad():  # so that it writes symbols, as one that has learned facts
        model.lm_head.weight[others] = 0

    def written(prompt: str) -> tuple[int, ...]:
        ids = torch.tensor([tokenizer(prompt)["input_ids"]])
        out = model.generate(ids, max_new_tokens=5, do_sample=False, eos_token_id=None)
        return tuple(out[0, ids.shape[1] :].tolist())

    prompts = [f"w{n} w{m} is:" for n in range(12) for m in range(n)]
    known = [prompt for prompt in prompts if {*written(prompt)} <= {*alphabet}][:5]
    assert len(known) == 5
    facts_of_model = []
    for place, prompt in enumerate(known):
        symbols = [alphabet.index(token) for token in written(prompt)]
        facts_of_model.append(Fact(prompt=prompt, symbols=tuple(symbols)))
        symbols[place] = (symbols[place] + 1) % 8
        facts_of_model.append(Fact(prompt=prompt, symbols=tuple(symbols)))
    task = dataclasses.replace(task_of((0,)), evaluation=tuple(facts_of_model))
    rows = recall.examples(task, tokenizer, cell()).evaluation
    stepper = Stepper(model, cell())
    found = recall.predict(stepper, task, rows, tokenizer, cell(batch_size=3))
    wanted = [
        written(fact.prompt) == tuple(alphabet[n] for n in fact.symbols)
        for fact in task.evaluation
    ]
    assert wanted == [True, False] * 5
    assert recall.is_right(task, found, rows) == wanted
    assert [one.num_right for one in found[::2]] == [5] * 5


def test_scores_are_the_shares_of_facts_tokens_and_bits(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    """A guess among all symbols has no bits; half of the loss has half of them."""
    task = task_of((1, 2, 3), (4, 5, 6))
    rows = recall.examples(task, tokenizer, cell()).evaluation
    one, two = (recall.Recalled(num_right=n, loss=math.log(8) / 2) for n in (3, 1))
    found = recall.scores(task, [one, two], rows)
    assert found == {
        "exact_recall": 0.5,
        "token_accuracy": pytest.approx(4 / 6),
        "share_of_bits": pytest.approx(0.5),
    }
    assert recall.recalled_bits(task, [one, two], rows) == 9
    guess = recall.Recalled(num_right=0, loss=math.log(50))
    assert recall.scores(task, [guess, guess], rows)["share_of_bits"] == 0
    assert recall.majority(task)["exact_recall"] == 0.5


def test_only_the_symbols_are_learned(tokenizer: PreTrainedTokenizerFast) -> None:
    """They are tokens of the vocabulary, without special ones, and all different."""
    (row,) = recall.examples(task_of((7, 0, 7)), tokenizer, cell()).train
    assert isinstance(row, Example)
    alphabet = recall.alphabet(tokenizer, 8)
    assert len(set(alphabet)) == 8
    assert not set(alphabet) & {0, 1, 2}
    answer = [alphabet[7], alphabet[0], alphabet[7]]
    assert row.token_ids == [*tokenizer("w0 w1 is:")["input_ids"], *answer]
    assert row.label == [IGNORED] * 3 + answer


def test_what_does_not_fit_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ValueError, match="has 6 tokens: set it to 6 or more"):
        recall.examples(task_of((7, 0, 7)), tokenizer, cell(seq_len=5))
    with pytest.raises(ValueError, match="take a backbone with a larger vocabulary"):
        recall.alphabet(tokenizer, 100)


# Experts by a hash


def test_a_hash_gives_a_token_different_experts_in_every_block() -> None:
    """As many as requested, ascending, the same every time, and all of them in use."""
    ids = torch.arange(4096)
    first, again, other = (hashed_experts.experts_of(ids, b, 20, 3) for b in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert (first.diff(dim=1) > 0).all()
    counts = first.flatten().bincount(minlength=20)
    assert len(counts) == 20
    assert counts.min() > 0.8 * counts.float().mean()
    # Blocks do not share their choice: 3 experts of 6 or 7 each agree by chance.
    assert float((first == other).float().mean()) == pytest.approx(0.15, abs=0.03)


def test_hashed_experts_do_not_depend_on_what_a_token_means() -> None:
    """Other values of the backbone, the same experts; padding chooses none."""
    stepper, _ = made("sparse-experts-random")
    seen: list[Any] = []
    for adapter in sparse_adapters(stepper.model).values():
        assert adapter.router is None
        original = adapter._experts_of

        def note(tokens: Any, early: None, original: Any = original) -> Any:
            seen.append(original(tokens, early)[0])
            return original(tokens, early)

        adapter._experts_of = note  # type: ignore[method-assign,assignment]
    ids = torch.tensor([[5, 6, 7, 8], [8, 7, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    for _ in range(2):
        stepper.model(input_ids=ids, attention_mask=mask)
        with torch.no_grad():
            stepper.model.model.embed_tokens.weight.neg_()
    first, second, again, _ = seen
    assert torch.equal(first, again)
    assert not torch.equal(first, second)
    assert len(first) == 6
    assert torch.equal(first[2:4], first[[5, 4]])  # tokens 7 and 8 in both rows


def test_hashed_experts_are_those_of_new_tokens_in_generation() -> None:
    """With a cache, whose forward sees the last token only, and padding on the left."""
    stepper, _ = made("sparse-experts-random")
    model = stepper.model.eval()
    with torch.no_grad():
        for adapter in sparse_adapters(model).values():
            adapter.neurons.copy_(torch.randn(adapter.neurons.shape) / 4)
    ids = torch.tensor([[4, 5, 6, 7], [0, 0, 8, 9]])
    inputs = {"input_ids": ids, "attention_mask": (ids > 0).long()}
    cached, plain = (
        model.generate(
            **inputs,
            max_new_tokens=6,
            do_sample=False,
            eos_token_id=None,
            use_cache=use_cache,
        )
        for use_cache in (True, False)
    )
    assert torch.equal(cached, plain)
    assert cached.shape == (2, 10)


def test_hashed_experts_need_the_tokens_of_every_block() -> None:
    """Those of a decoder are others than those of the encoder; embeddings are none."""
    with pytest.raises(ValueError, match=r"not all blocks of \w+ see these tokens"):
        hashed_experts.replace_routers(classifier("bart"))
    stepper, _ = made("sparse-experts-random")
    embeddings = stepper.model.get_input_embeddings()(torch.tensor([[4, 5]]))
    with pytest.raises(ValueError, match="called without: give it tokens"):
        stepper.model(inputs_embeds=embeddings)


@pytest.mark.parametrize("method", ["sparse-experts-frozen", "sparse-experts-random"])
def test_a_selection_that_does_not_learn_trains_rows_alone(method: str) -> None:
    """A loss falls, and the router, if there is one, stays as it was, in 16 bits."""
    stepper, _ = made(method)
    routers = [a.router for a in sparse_adapters(stepper.model).values()]
    before = [None if r is None else r.clone() for r in routers]
    rows = [
        Example(
            token_ids=[4, 5, 3, 6 + n], segment_ids=[0] * 4, label=[-100] * 3 + [6 + n]
        )
        for n in range(4)
    ]
    losses = [stepper.step([collate(rows[:1], 0)], 0.03) for _ in range(20)]
    assert losses[-1] < 0.5 * losses[0]
    for router, value in zip(routers, before, strict=True):
        if router is not None:
            assert value is not None
            assert router.dtype == torch.bfloat16
            assert not router.requires_grad
            assert torch.equal(router, value)


# Bytes on the device


def device_bytes(method: str, **changes: object) -> tuple[int, Stepper]:
    stepper, _ = made(method, **changes)
    row = Example(token_ids=[4, 5, 6], segment_ids=[0] * 3, label=[4, 5, 6])

    def step() -> None:
        stepper.step([collate([row], 0)], 0.0)

    step()
    found = memory.trainable_device_bytes(stepper.model, stepper.optimizer, step)
    return found, stepper


@pytest.mark.parametrize("method", ["lora-all", "dense"])
def test_adamw_takes_four_numbers_for_each_parameter(method: str) -> None:
    """The parameter, its gradient and two moments, besides the steps' counters."""
    found, stepper = device_bytes(method)
    count = sum(p.numel() for p in stepper.trained)
    assert found == 16 * count + 4 * len(stepper.trained)


def test_an_update_during_backward_has_one_gradient_at_a_time() -> None:
    """The largest one."""
    found, stepper = device_bytes("lora-all", optimizer="adamw-in-backward")
    sizes = [p.numel() for p in stepper.trained]
    assert found == 12 * sum(sizes) + 4 * len(sizes) + 4 * max(sizes)


def test_rows_on_the_host_take_what_their_slots_take() -> None:
    """And the router: 2 bytes a number of a frozen one, 16 of one that learns."""
    names = ("sparse-experts-frozen", "sparse-experts-random", "sparse-experts")
    frozen, random, learned = (
        device_bytes(n, row_budget_bytes=8_000)[0] for n in names
    )
    router = 2 * 8 * 32  # blocks, experts, width
    assert 0 < random <= 7_000
    assert frozen == random + 2 * router
    # And the counter of steps of each router.
    assert learned == random + 16 * router + 2 * 4


# The guard


def test_the_guard_is_the_perplexity_of_other_text(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    """exp of the mean loss over tokens, the same for every size of batches."""
    stepper = Stepper(language_model(), cell())
    rows = [
        Example(token_ids=ids, segment_ids=[0] * len(ids), label=ids)
        for ids in ([4, 5, 6, 7, 8], [9, 10, 11], [5, 4, 5, 4])
    ]
    losses = []
    for row in rows:
        ids = torch.tensor([row.token_ids])
        with torch.no_grad():
            likely = stepper.model(ids).logits[0, :-1].log_softmax(-1)
        losses += [-float(likely[n, t]) for n, t in enumerate(row.token_ids[1:])]
    wanted = math.exp(sum(losses) / len(losses))
    for size in (1, 2, 3):
        found = guard.perplexity(stepper, rows, cell(batch_size=size))
        assert found == pytest.approx(wanted, rel=1e-4)


def test_texts_of_the_guard_are_as_long_as_each_other(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    try:
        rows = guard.texts(cell(guard_texts=3), Source(), tokenizer)
    except MissingError as error:
        pytest.skip(str(error))
    assert [len(row.token_ids) for row in rows] == [guard.NUM_TOKENS] * 3
    with pytest.raises(
        ValueError, match=r"there are \d+ texts of 128 tokens: lower it"
    ):
        guard.texts(cell(guard_texts=10_000), Source(), tokenizer)


@pytest.mark.parametrize("task", ["synthetic-lm", "bbc-news"])
def test_a_guard_is_of_language_models_that_read_text(task: str) -> None:
    chosen = cell(task=task, guard_texts=3)
    with pytest.raises(ValueError, match="take a task such as 'facts-random'"):
        fields.check_together(chosen)


def test_the_bytes_are_noted_with_those_of_the_model_state() -> None:
    """What trains is a part of the model state but for its gradients."""
    stepper, chosen = made("lora-all")
    partial = PartialResult()
    row = Example(token_ids=[4, 5, 6], segment_ids=[0] * 3, label=[4, 5, 6])
    probes.probe_memory(stepper, chosen, [collate([row], 0)], partial)
    count = sum(p.numel() for p in stepper.trained)
    found = partial.measurement
    frozen = sum(p.nbytes for p in stepper.model.parameters() if not p.requires_grad)
    state = found.trainable_device_bytes - 4 * count
    assert 0 <= found.model_state_bytes - frozen - state <= 4_096  # buffers


# The whole of a cell


@pytest.mark.slow
@pytest.mark.parametrize("name", ["facts-random", "facts-paraphrase"])
def test_a_cell_of_facts_has_scores_bits_bytes_and_a_guard(name: str) -> None:
    """With real weights, of which one block is left; a trial scores the same facts."""
    chosen = cell(
        **{"method": "lora-all", "backbone": "smollm2-135m", "depth": 1, "task": name},
        **{"seq_len": 48, "train_rows": 4, "max_steps": 3, "warmup_steps": 1},
        **{"guard_texts": 2, "scored_on": "validation"},
    )
    seen: Any = run(chosen, ChildOptions())
    if seen["status"] == "skipped":
        pytest.skip(seen["message"])
    assert seen["status"] == "ok", seen["message"]
    found = seen["measurement"]
    is_random = name == "facts-random"
    assert found["score_name"] == ("exact_recall" if is_random else "exact_match")
    assert found["num_eval_rows"] == (4 if is_random else 20)
    assert found["num_train_rows"] == (4 if is_random else 60)
    assert found["recalled_bits"] == (0 if is_random else None)
    count = found["num_trainable_parameters"]
    assert 16 * count < found["trainable_device_bytes"] < 16.1 * count
    assert found["guard_start_perplexity"] > 1
    assert found["guard_perplexity"] != found["guard_start_perplexity"]
