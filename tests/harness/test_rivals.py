"""What every method must do, and each rival against its library or by hand.

The first tests take every method of the table, so that a new one is covered.
"""

import copy
import dataclasses
import importlib.util
import itertools
import math
import random
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from peft.optimizers import create_lorafa_optimizer
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import meft
from harness.test_methods import ELSEWHERE, HERE, block_of, made, stepper_of
from harness.tiny import BLOCKS, FAMILIES, HIDDEN, SHAPE, batch, cell, classifier
from marks import slow_but_for
from meft_bench.child import backbones
from meft_bench.child.backbones import blocks_of, heads_of
from meft_bench.child.backbones.unwrapped import base_of
from meft_bench.child.meters import memory
from meft_bench.child.meters.clock import StepClock
from meft_bench.child.meters.transfers import ledgers_of
from meft_bench.child.methods import badam, galore, lisa, mezo
from meft_bench.child.methods.compacter import HypercomplexLinear
from meft_bench.child.methods.memory_layers import ProductKeyMemory
from meft_bench.child.tasks.batches import Example
from meft_bench.child.training import optimizers
from meft_bench.child.training.steps import Stepper, train
from meft_bench.child.worker import run
from meft_bench.parent import fields
from meft_bench.shared import protocol
from meft_bench.shared.backbones import TABLE as FAMILY_TABLE
from meft_bench.shared.cell import Cell
from meft_bench.shared.methods import TABLE
from meft_bench.shared.options import ChildOptions
from meft_bench.shared.registry import (
    FLOATS_ONLY,
    IN_BACKWARD,
    METHODS,
    OPTIMIZERS,
    READ_IN_BACKWARD,
    load,
)
from meft_bench.shared.source import MissingError, Source
from meft_bench.virtual.prediction.plan import plan

R = 4
PLAIN = [n for n in HERE if not TABLE[n].streams and not TABLE[n].neurons]
"""Methods of ordinary autograd; reversible and sparse ones have tests of their own."""
RATES = {"mezo": 1e-3, "lora-all": 2e-3, "lora-all-checkpointing": 2e-3}
RATES |= {"ln-tuning": 5e-2, "ia3": 5e-2, "vera": 5e-2, "bitfit": 5e-2}
RATES |= {"p-tuning": 1e-4}
"""Learning rates of methods that learn a tiny model with another one than most."""
without_gpu = pytest.mark.skipif(
    torch.cuda.is_available(), reason="there is a real GPU, which is left alone"
)


def of(method: str, **changes: object) -> Cell:
    return cell(method=method, bottleneck_size=R, lora_rank=R, **changes)


def stepper(method: str, family: str = "bert", **changes: object) -> Stepper:
    return stepper_of(made(method, family), of(method, **changes))


def loss_of(one: Stepper) -> float:
    one.model.eval()
    with torch.no_grad():
        return float(one.loss(one.to_device(batch())))


def gradients(model: Any) -> dict[str, Tensor]:
    """Of a forward without dropout, by name."""
    model.eval().zero_grad()
    model(**batch()).loss.backward()
    named = model.named_parameters()
    return {name: p.grad for name, p in named if p.grad is not None}


@pytest.mark.parametrize("method", PLAIN)
def test_every_method_lowers_the_loss(method: str) -> None:
    """Of a batch that it sees again and again; MeZO only a little in so few steps."""
    one = stepper(method)
    before = loss_of(one)
    one.model.train()
    for _ in range(40):
        one.step([batch()], RATES.get(method, 1e-2))
    assert loss_of(one) < before


IN_FRONT = ["prompt-tuning", "p-tuning", "prefix-tuning"]
REAL = ["lora-all", "vera", "prompt-tuning", "bitfit", "compacter", "lst", "lisa"]


@pytest.mark.parametrize("method", slow_but_for(PLAIN, *REAL))
def test_every_method_lowers_the_loss_of_real_weights(method: str) -> None:
    """MiniLM's, of two sentences that it learns by heart.

    Vectors in front take hundreds of steps; in a few, the label of both is learnt.
    """
    chosen = of(method, backbone="minilm-l6", seq_len=8)
    try:
        model = backbones.load(chosen, 2, Source()).model
    except MissingError as error:
        pytest.skip(str(error))
    torch.manual_seed(0)
    one = stepper_of(load(METHODS[method])(model, chosen), chosen)
    words = torch.tensor([[101, 2204, 3185, 102], [101, 2919, 3185, 102]])
    rows = {"input_ids": words, "attention_mask": words * 0 + 1}
    rows["labels"] = torch.tensor([1, int(method in IN_FRONT)])

    def loss() -> float:
        one.model.eval()
        with torch.no_grad():
            return float(one.loss(rows))

    before = loss()
    one.model.train()
    for _ in range(6):
        one.step([rows], 1e-6 if method == "mezo" else 1e-3)
    assert loss() < before


@pytest.mark.parametrize("method", PLAIN)
def test_every_method_leaves_the_weights_of_the_best_step(method: str) -> None:
    """The first validation is the best: later steps are undone, and nothing else."""
    one = stepper(method, eval_every=1, max_steps=4, learning_rate=1e-2)
    rows = [
        Example(token_ids=[2 + n, 3, 4, 5], segment_ids=[0] * 4, label=n % 2)
        for n in range(4)
    ]
    seen: list[Tensor] = []

    def validate() -> float:
        one.model.eval()
        with torch.no_grad():
            seen.append(one.model(**one.to_device(batch())).logits)
        return -float(len(seen))

    clock = StepClock(0, "cpu")
    assert len(list(train(one, one_cell(one), itertools.repeat(rows), clock, validate)))
    one.model.eval()
    with torch.no_grad():
        logits = one.model(**one.to_device(batch())).logits
    assert torch.equal(logits, seen[0])
    assert not torch.equal(logits, seen[-1])


def one_cell(one: Stepper) -> Cell:
    return cell(eval_every=1, max_steps=4, learning_rate=1e-2, warmup_steps=0)


EXACT = [n for n in PLAIN if TABLE[n].kind == "exact" and not TABLE[n].optimizer]


@pytest.mark.parametrize("method", [*EXACT, "dora"])
def test_an_exact_method_has_the_gradient_of_its_loss(method: str) -> None:
    """As the difference quotient along a random direction says, in float64.

    DoRA's, which takes a norm for a constant, is another one. A memory reads all of its
    values here, because a choice that changes is a step of the loss.
    """
    torch.manual_seed(3)
    model = made(method, top_k_neurons=256).double().eval()
    torch.manual_seed(4)
    trained = [p for p in model.parameters() if p.requires_grad]
    with torch.no_grad():
        for parameter in trained:  # away from matrices that are zero at the start
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    model(**batch()).loss.backward()
    directions = [torch.randn_like(p) for p in trained]
    slope = sum(
        float((p.grad * d).sum()) for p, d in zip(trained, directions, strict=True)
    )
    step, losses = 1e-5, []
    for sign in (1, -2):
        with torch.no_grad():
            for parameter, direction in zip(trained, directions, strict=True):
                parameter.add_(direction, alpha=sign * step)
            losses.append(float(model(**batch()).loss))
    quotient = (losses[0] - losses[1]) / (2 * step)
    assert (abs(slope - quotient) < 1e-5 * max(1, abs(quotient))) == (method in EXACT)


def saved(method: str) -> int:
    """Bytes that a forward saves for backward."""
    one = stepper(method)
    one.model.train()
    one.step([batch()], 0.0)
    return memory.saved_by_forward(one.model, batch(), one.loss)


LESS: dict[str, str] = {
    "head": "bitfit",
    "lora": "lora-all",
    "lora-fa": "lora",
    "ln-tuning": "lora-all",
    "bitfit": "full",
    "bitfit-checkpointing": "bitfit",
    "pfeiffer": "houlsby",
    "parallel-adapters": "houlsby",
    "lst": "adapters",
    "lora-checkpointing": "lora",
    "lora-all-checkpointing": "lora-all",
    "dora-checkpointing": "dora",
    "houlsby-checkpointing": "houlsby",
    "adapters-checkpointing": "adapters",
    "checkpointing": "full",
    "save-on-cpu": "checkpointing",
    "checkpointing-segments": "full",
    "lora-checkpointing-segments": "lora",
    "checkpointing-offload": "checkpointing",
    "lora-checkpointing-offload": "lora-checkpointing",
    "lora-save-on-cpu": "lora-checkpointing",
    "badam": "full",
    "lisa": "full",
    "mezo": "head",
}
"""What saves less for backward than another method."""
EQUAL = {"rslora": "lora", "galore": "full"}
"""What saves as much as another method."""
MORE = {
    "dora": "lora",
    "vera": "lora-fa",
    "ia3": "head",
    "oft": "head",
    "boft": "head",
    "compacter": "pfeiffer",
    "pkm": "parallel-adapters",
    "prompt-tuning": "head",
    "p-tuning": "prompt-tuning",
    "houlsby": "pfeiffer",
    "adapters": "parallel-adapters",
    "full": "lora",
    "lora-all": "lora",
}
"""What saves more than another method."""


def test_every_method_has_a_relation_of_saved_bytes() -> None:
    assert {*LESS, *EQUAL, *MORE} == {*PLAIN}


@pytest.mark.parametrize("method", PLAIN)
def test_a_method_saves_less_or_more_than_another(method: str) -> None:
    """As the table says; the smaller of the two is named first."""
    if method in EQUAL:
        assert saved(method) == saved(EQUAL[method])
    elif method in LESS:
        assert saved(method) < saved(LESS[method])
    else:
        assert saved(method) > saved(MORE[method])


PLANNED = ["lora-all", "vera", "lst", "checkpointing-segments", "mezo", "bitfit"]


@without_gpu
@pytest.mark.parametrize(
    "method", slow_but_for([*PLAIN, "prefix-tuning", *ELSEWHERE], *PLANNED)
)
def test_every_method_can_be_planned(method: str) -> None:
    """On a GPU that is not there, as a classifier or as a language model."""
    if TABLE[method].optimizer and TABLE[method].package in ("badam", "galore-torch"):
        stepper(method)  # is skipped where the library is missing
    is_lm = method == "prefix-tuning"
    here = of(
        method,
        device="virtual-H200",
        backbone=f"random:{'llama' if is_lm else 'bert'}-tiny",
        task="synthetic-lm" if is_lm else "synthetic",
    )
    found = plan(here, Source(), 0.0)
    is_refused = f"method '{method}' cannot be planned: " in found.message
    assert is_refused == (method in ELSEWHERE)
    assert is_refused or found.verdict == "fits", found.message


@without_gpu
def test_a_plan_of_lisa_trains_a_few_blocks() -> None:
    """On a virtual GPU, where torch draws no numbers."""
    here = of("lisa", device="virtual-H200", backbone="random:bert-tiny", depth=5)
    full = dataclasses.replace(here, method="full")
    found, whole = (
        plan(one, Source(), 0.0).num_trainable_parameters or 0 for one in (here, full)
    )
    assert whole - found == 3 * block_of(128, 512)


TARGETS: dict[str, Any] = {"target_modules": ["query", "value"]}
LINEAR = r".*layer\.\d+\..*(query|key|value|dense)"
ALPHA: dict[str, Any] = {"r": R, "lora_alpha": 2 * R, "lora_dropout": 0.1}
OF_PEFT: dict[str, Callable[[], Any]] = {
    "lora": lambda: peft.LoraConfig(**ALPHA, **TARGETS),
    "lora-all": lambda: peft.LoraConfig(**ALPHA, target_modules=LINEAR),
    "rslora": lambda: peft.LoraConfig(**ALPHA, **TARGETS, use_rslora=True),
    "dora": lambda: peft.LoraConfig(**ALPHA, **TARGETS, use_dora=True),
    "vera": lambda: peft.VeraConfig(**TARGETS),
    "ia3": lambda: peft.IA3Config(),
    "oft": lambda: peft.OFTConfig(**TARGETS),
    "boft": lambda: peft.BOFTConfig(**TARGETS),
    "ln-tuning": lambda: peft.LNTuningConfig(target_modules=r".*LayerNorm"),
    "prompt-tuning": lambda: peft.PromptTuningConfig(num_virtual_tokens=20),
    "p-tuning": lambda: peft.PromptEncoderConfig(num_virtual_tokens=20),
}
"""As a user of peft writes them for BERT."""


@pytest.mark.filterwarnings("ignore:.*:UserWarning")
@pytest.mark.parametrize("method", OF_PEFT)
def test_a_method_of_peft_is_that_of_peft(method: str) -> None:
    """Loss and gradients are those of the model that peft makes of its own config."""
    config = OF_PEFT[method]()
    config.task_type = "SEQ_CLS"
    theirs = peft.get_peft_model(classifier(), config)
    ours = made(method)
    mine = [p for _, p in sorted(ours.named_parameters()) if p.requires_grad]
    kept = {tuple(p.shape) for p in mine}
    assert kept == {tuple(p.shape) for p in theirs.parameters() if p.requires_grad}
    # Random starts are drawn in another order; what is drawn is put in one order here.
    for model in (ours, theirs):
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                torch.manual_seed(sum(map(ord, _plain(name))))
                noise = torch.randn(parameter.shape) * 0.05
                parameter.data = parameter.data * 0 + noise
    _same_projections(ours, theirs)
    found, expected = gradients(ours), gradients(theirs)
    expected = {_plain(name): gradient for name, gradient in expected.items()}
    assert {_plain(name) for name in found} == set(expected)
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[_plain(name)])


def _plain(name: str) -> str:
    """A parameter's name without what peft wraps a model and a head in."""
    for part in ("base_model.model.", "base_model.", "modules_to_save.default."):
        name = name.replace(part, "")
    return name


def _same_projections(ours: nn.Module, theirs: nn.Module) -> None:
    """VeRA's shared matrices, which are random."""
    buffers = {_plain(n): b for n, b in theirs.named_buffers() if "vera_" in n}
    for name, buffer in ours.named_buffers():
        if "vera_" in name:
            buffer.copy_(buffers[_plain(name)])


def test_lora_fa_steps_as_peft_does() -> None:
    """With its optimizer on its model, from the same A, without decay."""
    theirs = peft.get_peft_model(
        classifier(), peft.LoraConfig(**ALPHA | {"lora_dropout": 0.0}, **TARGETS)
    )
    ours = stepper("lora-fa")
    for group in ours.optimizer.param_groups:
        group["weight_decay"] = 0.0
    heads_of(ours.model)[0].requires_grad_(False)
    named = {_plain(name): p for name, p in ours.model.named_parameters()}
    for name, parameter in theirs.named_parameters():
        parameter.data.copy_(named[_plain(name)].detach())
    optimizer = create_lorafa_optimizer(theirs, r=R, lora_alpha=2 * R, lr=1e-2)
    for group in optimizer.param_groups:
        group |= {"betas": protocol.ADAM_BETAS, "eps": protocol.ADAM_EPSILON}
    for model, one in ((ours.model, ours.optimizer), (theirs, optimizer)):
        model.eval()
        for _ in range(3):
            for group in one.param_groups:
                group["lr"] = 1e-2
            model(**batch()).loss.backward()
            one.step()
            one.zero_grad()
    for name, parameter in theirs.named_parameters():
        torch.testing.assert_close(named[_plain(name)], parameter)


def prompted(method: str, family: str) -> Any:
    """A language model with vectors in front, whose weights are far from zero."""
    sizes: dict[str, Any] = SHAPE | FAMILIES[family] | {"max_position_embeddings": 100}
    config = CONFIG_MAPPING[family](**sizes)
    config.pad_token_id, config.eos_token_id = 1, None
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(8)
    return load(METHODS[method])(model, of(method)).eval()


LMS = ["opt", "llama", "qwen3", "gpt_neox"]


@pytest.mark.parametrize("family", LMS)
@pytest.mark.parametrize("method", IN_FRONT)
def test_a_prompt_changes_neither_targets_nor_places(method: str, family: str) -> None:
    """Each token after the first is predicted, from logits that are the same."""
    model = prompted(method, family)
    ids = batch()["input_ids"]
    mask = torch.ones_like(ids)
    logits = model(input_ids=ids, attention_mask=mask).logits[:, -ids.shape[1] :]
    loss = model(input_ids=ids, attention_mask=mask, labels=ids).loss
    pairs = logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()
    wanted = functional.cross_entropy(*pairs)
    torch.testing.assert_close(loss, wanted)
    places = torch.tensor([2, 5])
    kept = model(input_ids=ids, attention_mask=mask, logits_to_keep=places).logits
    torch.testing.assert_close(kept, logits[:, places])
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained
    assert all(name.startswith("prompt_encoder.") for name in trained)


@pytest.mark.parametrize("family", LMS)
@pytest.mark.parametrize("method", IN_FRONT[:2])
def test_a_prompted_model_writes_the_likeliest_tokens(method: str, family: str) -> None:
    """One after the other, with and without padding, as it would without a cache."""
    model = prompted(method, family)
    ids = batch()["input_ids"][:2].clamp(min=2)
    mask = torch.ones_like(ids)
    mask[0, :3], ids[0, :3] = 0, 1
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 1}
    out = model.generate(
        input_ids=ids, attention_mask=mask, use_cache=True, eos_token_id=None, **options
    )
    assert torch.equal(out[:, :8], ids)
    for row, is_token, written in zip(ids, mask.bool(), out[:, 8:], strict=True):
        tokens = row[is_token][None]
        for _ in range(5):
            logits = model(input_ids=tokens, attention_mask=tokens * 0 + 1).logits
            tokens = torch.cat([tokens, logits[:, -1:].argmax(-1)], dim=1)
        assert torch.equal(tokens[0, -5:], written)


@pytest.mark.parametrize("method", [*IN_FRONT, "lst", "lora-all"])
def test_a_loss_in_chunks_is_the_loss(method: str) -> None:
    """Also where peft wraps the model, or a side network makes the hidden states."""
    model = prompted(method, "llama")
    ids = batch()["input_ids"]
    rows = {"input_ids": ids, "attention_mask": ids * 0 + 1, "labels": ids}
    found = []
    for tokens in (0, 5):
        if tokens:
            meft.chunk_loss(base_of(model), tokens)
        model.zero_grad()
        loss = model(**rows).loss
        loss.backward()
        trained = [p.grad for p in model.parameters() if p.requires_grad]
        found.append([loss.detach(), *trained])
    for whole, in_chunks in zip(*found, strict=True):
        torch.testing.assert_close(in_chunks, whole)


def tiny_lm(method: str, dtype: str) -> Stepper:
    chosen = of(
        method,
        backbone="random:llama-tiny",
        task="synthetic-lm",
        dtype="bf16",
        weights_dtype=dtype,
    )
    model = backbones.load(chosen, None, Source()).model
    return stepper_of(load(METHODS[method])(model, chosen), chosen)


OF_LMS = [n for n in PLAIN if n != "head" and not n.startswith("bitfit")]


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("method", [*OF_LMS, "prefix-tuning"])
def test_every_method_trains_a_language_model_in_bf16(method: str, dtype: str) -> None:
    """Under autocast or with weights in BF16; what is added to them stays in FP32."""
    if method == "mezo" and dtype == "bf16":
        pytest.skip("MeZO is refused with narrow weights, by another test")
    one = tiny_lm(method, dtype)
    rows = torch.arange(32).reshape(4, 8)
    given = {"input_ids": rows, "attention_mask": rows * 0 + 1, "labels": rows}
    one.model.train()
    losses = [one.step([given], 1e-3) for _ in range(2)]
    assert all(map(math.isfinite, losses))
    kinds = {parameter.dtype for parameter in one.trained}
    is_own = TABLE[method].trains_backbone or method == "ln-tuning"
    is_narrow = dtype == "bf16" and is_own
    assert kinds == {torch.bfloat16 if is_narrow else torch.float32}


def test_a_prefix_refuses_to_write() -> None:
    with pytest.raises(ValueError, match="'prefix-tuning' cannot write answers"):
        prompted("prefix-tuning", "llama").generate(input_ids=batch()["input_ids"])


@pytest.mark.parametrize("method", ["ia3", "boft"])
def test_vectors_that_multiply_do_not_decay(method: str) -> None:
    """As the weights of norms, which begin at one, too; matrices do."""
    one = stepper(method)
    decays, others = (group["params"] for group in one.optimizer.param_groups)
    for parameter in decays:
        assert not torch.equal(parameter, torch.ones_like(parameter))
    ones = [p for p in others if torch.equal(p, torch.ones_like(p))]
    assert len(ones) == {"ia3": 4 * BLOCKS, "boft": 2 * BLOCKS}[method]


def test_vectors_need_positions() -> None:
    """As many as there are, beyond those of the tokens."""
    with pytest.raises(ValueError, match=r"`seq_len` is 30 .* lower it to at most 20"):
        load(METHODS["prompt-tuning"])(classifier(), of("prompt-tuning", seq_len=30))


def test_a_head_is_trained_and_not_copied() -> None:
    """peft would keep a frozen one next to it."""
    for method in OF_PEFT:
        names = [n for n, _ in base_of(made(method)).named_parameters()]
        assert [n for n in names if "classifier" in n] == [
            "classifier.weight",
            "classifier.bias",
        ]


@pytest.mark.parametrize("method", ["houlsby", "pfeiffer", "parallel-adapters"])
def test_adapters_are_where_their_papers_have_them(method: str) -> None:
    """A block of BERT, written out."""
    adapted = made(method).eval().bert.encoder.layer[1]
    block = adapted.block
    hidden = torch.randn(2, 8, HIDDEN, generator=torch.Generator().manual_seed(0))
    mixed = block.attention.output.dense(block.attention.self(hidden)[0])
    if method == "houlsby":
        mixed = mixed + adapted.attention_adapter(mixed)
    attended = block.attention.output.LayerNorm(hidden + mixed)
    update = block.output.dense(block.intermediate(attended))
    if method == "parallel-adapters":
        update = update + adapted.mlp_adapter(attended)
    else:
        update = update + adapted.output_adapter(update)
    expected = block.output.LayerNorm(attended + update)
    found = adapted(hidden)
    found = found[0] if isinstance(found, tuple) else found
    torch.testing.assert_close(found, expected)


def test_a_hypercomplex_layer_by_hand() -> None:
    """Two products of 2 by 2 matrices and of a column and a row."""
    one = [[1.0, 0.0], [0.0, 1.0]]
    two = [[0.0, 1.0], [-1.0, 0.0]]
    layer = HypercomplexLinear(4, 2, nn.Parameter(torch.tensor([one, two])))
    with torch.no_grad():
        layer.left.copy_(torch.tensor([[[2.0]], [[3.0]]]))
        layer.right.copy_(torch.tensor([[[1.0, 5.0]], [[7.0, 11.0]]]))
        layer.bias.copy_(torch.tensor([100.0, 200.0]))
    # 2 (1, 5) on the diagonal, 3 (7, 11) above it, and -3 (7, 11) below it.
    expected = torch.tensor([[2.0, 10.0, 21.0, 33.0], [-21.0, -33.0, 2.0, 10.0]])
    assert torch.equal(layer.weight(), expected)
    assert torch.equal(layer(torch.eye(4)), expected.T + layer.bias)


def test_adapters_of_compacter_share_their_rules() -> None:
    """One parameter, which sizes that are no multiples refuse."""
    model = made("compacter")
    layers = [m for m in model.modules() if isinstance(m, HypercomplexLinear)]
    assert len(layers) == 4 * BLOCKS
    assert len({id(layer.rules) for layer in layers}) == 1
    with pytest.raises(ValueError, match="`bottleneck_size` = 6, which is no multiple"):
        made("compacter", bottleneck_size=6)


def test_a_memory_reads_the_best_of_all_pairs() -> None:
    """As if the sums of all pairs of keys were sorted."""
    torch.manual_seed(0)
    one = ProductKeyMemory(HIDDEN, num_keys=5, top_k=3, std=0.1)
    x = torch.randn(7, HIDDEN)
    half = HIDDEN // 4
    queries = one.query(x).view(7, 4, 2, half)
    queries = functional.layer_norm(queries, (half,))
    expected = torch.zeros(7, HIDDEN)
    for token, head in itertools.product(range(7), range(4)):
        first, second = (one.keys[head, n] @ queries[token, head, n] for n in (0, 1))
        sums = (first[:, None] + second).flatten()
        best = sums.argsort(descending=True)[:3]
        expected[token] += sums[best].softmax(0) @ one.values[best]
    torch.testing.assert_close(one(x), expected)
    with pytest.raises(ValueError, match="which is no square: take 225 or 256"):
        made("pkm", num_neurons=250)


def test_a_ladder_by_hand() -> None:
    """From the hidden states of the plain backbone, block by block."""
    model = made("lst").eval()
    side = model.ladder_side
    with torch.no_grad():
        side.gates.copy_(torch.tensor([-0.1, 0.0, 0.2]))
        rows = {n: batch()[n] for n in ("input_ids", "attention_mask")}
        states = classifier().eval().bert(**rows, output_hidden_states=True)
        states = states.hidden_states
        state = side.down[-1](states[0])
        for index, gate in enumerate([0.26894142, 0.5, 0.88079708]):
            mixed = gate * side.down[index](states[index + 1]) + (1 - gate) * state
            state = side.blocks[index](mixed)
            state = state[0] if isinstance(state, tuple) else state
        expected = model.bert.pooler(side.up(state)) if model.bert.pooler else None
        found = model.bert(**rows)
    torch.testing.assert_close(found.last_hidden_state, side.up(state))
    if expected is not None:
        torch.testing.assert_close(found.pooler_output, expected)


def of_family(method: str, family: str) -> Stepper:
    """A classifier or language model of any family of the harness."""
    is_lm = "classifier" not in FAMILY_TABLE[family].models
    chosen = of(
        method,
        backbone=f"random:{family}-tiny",
        task="synthetic-lm" if is_lm else "synthetic",
        attention="eager" if FAMILY_TABLE[family].has_eager_attention_only else "sdpa",
    )
    model = backbones.load(chosen, None if is_lm else 2, Source()).model
    return Stepper(load(METHODS[method])(model, chosen), chosen)


@pytest.mark.parametrize(
    ("method", "family", "words"),
    [
        ("lst", "albert", "calls a block several times: take"),
        ("checkpointing-segments", "albert", "calls a block several times: take"),
        ("checkpointing-segments", "t5", "more than hidden states to the next: take"),
        ("oft", "gpt2", "peft refuses method 'oft' .* Take another method"),
        ("boft", "gpt2", "peft refuses method 'boft' .* Take another method"),
        ("ia3", "phi3", "of which peft does not know what to multiply: take"),
    ],
)
def test_a_structure_that_does_not_fit_is_refused(
    method: str, family: str, words: str
) -> None:
    """When the method is applied."""
    with pytest.raises(ValueError, match=words):
        of_family(method, family)


@pytest.mark.parametrize("family", ["bloom", "mpnet", "deberta"])
def test_a_ladder_refuses_positions_of_the_width_of_the_backbone(family: str) -> None:
    """At the first forward, which shows what blocks are given."""
    one = of_family("lst", family)
    ids = torch.ones(2, 8, dtype=torch.long)
    with pytest.raises(ValueError, match="of the size of the backbone: take a model"):
        one.model(input_ids=ids, attention_mask=ids)


@pytest.mark.parametrize("method", ["adapters", "houlsby", "compacter", "pkm"])
def test_blocks_that_are_called_again_share_their_adapters(method: str) -> None:
    """ALBERT's, as they share their weights: every adapter has a gradient."""
    one = of_family(method, "albert")
    rows = {n: t for n, t in batch().items() if n != "token_type_ids"}
    one.model(**rows).loss.backward()
    assert all(parameter.grad is not None for parameter in one.trained)


def test_a_ladder_writes_without_a_cache() -> None:
    """Its side network keeps no keys and values: each step runs all tokens."""
    model = prompted("lst", "llama")
    ids = batch()["input_ids"][:1].clamp(min=2)
    options = {"max_new_tokens": 4, "do_sample": False, "use_cache": True}
    out = model.generate(
        input_ids=ids, attention_mask=ids * 0 + 1, eos_token_id=None, **options
    )
    tokens = ids
    for _ in range(4):
        logits = model(input_ids=tokens, attention_mask=tokens * 0 + 1).logits
        tokens = torch.cat([tokens, logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(out, tokens)


@pytest.mark.parametrize("family", slow_but_for(FAMILIES, "bert", "llama"))
@pytest.mark.parametrize(
    ("plain", "other"),
    [
        ("full", "checkpointing-segments"),
        ("lora", "lora-checkpointing-segments"),
        ("full", "save-on-cpu"),
        ("lora", "lora-save-on-cpu"),
        ("lora-all", "lora-all-checkpointing"),
        ("houlsby", "houlsby-checkpointing"),
    ],
)
def test_memory_that_is_saved_changes_no_gradient(
    plain: str, other: str, family: str
) -> None:
    """With dropout: the same masks are drawn."""
    found = []
    for method in (plain, other):
        model = made(method, family).train()
        one = Stepper(model, cell())
        torch.manual_seed(1)
        one.loss(one.to_device(batch())).backward()
        found.append([p.grad for p in model.parameters() if p.grad is not None])
    for expected, got in zip(*found, strict=True):
        assert torch.equal(expected, got)


def test_segments_keep_a_stream_for_the_root_of_the_depth() -> None:
    """Nine blocks are three segments, sixteen are four: one input more."""
    found = []
    for depth in (9, 16):
        model = load(METHODS["checkpointing-segments"])(
            classifier(num_hidden_layers=depth), of("checkpointing-segments")
        )
        one = Stepper(model, cell())
        model.train()
        one.step([batch()], 0.0)
        found.append(memory.saved_by_forward(model, batch(), one.loss))
    assert found[1] - found[0] == 4 * 8 * HIDDEN * torch.float32.itemsize


def test_what_is_saved_on_the_cpu_is_booked() -> None:
    """All that a block saves, once each way, weights among it."""
    model = made("save-on-cpu").train()
    ledgers = ledgers_of(model)
    assert len(ledgers) == BLOCKS
    Stepper(model, cell()).step([batch()], 0.0)
    for ledger, block in zip(ledgers, model.bert.encoder.layer, strict=True):
        assert ledger.d2h_bytes == ledger.h2d_bytes
        matrices = [p for p in block.parameters() if p.ndim > 1]
        assert ledger.d2h_bytes > sum(p.nbytes for p in matrices)


@pytest.mark.parametrize("method", ELSEWHERE)
def test_what_needs_a_stream_is_skipped_on_a_cpu(method: str) -> None:
    """The record says why, and what to take."""
    tiny = of(method, backbone="random:bert-tiny", max_steps=3)
    found = run(tiny, ChildOptions())
    assert found["status"] == "skipped"
    assert "take 'save-on-cpu'" in str(found["message"])


def test_lisa_trains_a_few_blocks_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Others are drawn after an interval, and frozen ones have no state."""
    monkeypatch.setattr(lisa, "NUM_BLOCKS", 1)
    monkeypatch.setattr(lisa, "INTERVAL", 2)
    one = stepper("lisa")
    one.model.train()
    blocks = blocks_of(one.model)
    outside = [p for n, p in one.model.named_parameters() if ".layer." not in n]
    met = set()
    for _ in range(30):
        before = [copy.deepcopy(block.state_dict()) for block in blocks]
        active = [n for n, b in enumerate(blocks) if next(b.parameters()).requires_grad]
        assert len(active) == 1
        met |= {*active}
        one.step([batch()], 1e-2)
        for index, (block, state) in enumerate(zip(blocks, before, strict=True)):
            name, weight = next(iter(block.named_parameters()))
            assert torch.equal(weight, state[name]) == (index not in active)
        assert all(parameter.requires_grad for parameter in outside)
        held = {id(p) for p, state in one.optimizer.state.items() if state}
        assert held <= {id(p) for p in one.trained if p.requires_grad}
    assert met == {*range(BLOCKS)}


def test_lisa_with_all_blocks_is_adamw(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lisa, "NUM_BLOCKS", BLOCKS)
    found = []
    for method in ("lisa", "full"):
        one = stepper(method)
        one.model.eval()
        for _ in range(3):
            one.step([batch()], 1e-2)
        found.append([p.detach() for p in one.model.parameters()])
    for got, expected in zip(*found, strict=True):
        assert torch.equal(got, expected)


def test_mezo_by_hand() -> None:
    """On a parabola: the slope along z is exact, and the step goes along z."""
    weight = nn.Parameter(torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64))
    model = nn.Linear(1, 1)
    groups = [{"params": [weight], "weight_decay": 0.0}]
    one = mezo.Mezo(groups, model, seed=5)  # type: ignore[arg-type]
    one.param_groups[0]["lr"] = 0.1
    start = weight.detach().clone()
    loss = one.step(lambda: float((weight**2).sum()))
    seed = random.Random(5).randrange(2**31)
    z = torch.empty_like(start).normal_(generator=torch.Generator().manual_seed(seed))
    slope = float((2 * start * z).sum())
    torch.testing.assert_close(weight.detach(), start - 0.1 * slope * z)
    assert loss == pytest.approx(float((start**2).sum()), rel=1e-4)


def test_mezo_saves_nothing_and_has_no_gradients() -> None:
    """Its memory is that of a forward."""
    one = stepper("mezo")
    one.step([batch()], 1e-3)
    assert saved("mezo") == 0
    assert all(parameter.grad is None for parameter in one.model.parameters())
    assert memory.model_state_bytes(one.model, one.optimizer) == sum(
        tensor.nbytes for tensor in (*one.model.parameters(), *one.model.buffers())
    )


def test_mezo_weighs_micro_batches_as_other_methods_do() -> None:
    """The loss of two halves of a batch is that of the batch."""
    halves = [{n: t[start::2] for n, t in batch().items()} for start in (0, 1)]
    losses = [stepper("mezo").step(given, 0.0) for given in ([batch()], halves)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_galore_projects_the_matrices_of_blocks() -> None:
    """Their moments have the rank of the projection, which meters of memory see."""
    one = stepper("galore")
    one.model.train()
    one.step([batch()], 1e-2)
    inside = {id(p) for b in blocks_of(one.model) for p in b.parameters() if p.ndim > 1}
    for parameter in one.trained:
        state = one.optimizer.state[parameter]
        if id(parameter) not in inside:
            assert state["exp_avg"].shape == parameter.shape
            continue
        longer, shorter = max(parameter.shape), min(parameter.shape)
        assert sorted(state["exp_avg"].shape) == [R, longer]
        assert sorted(state["projection"].shape) == [R, shorter]
    assert galore.INTERVAL > 1


def test_badam_trains_one_block_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """And the head; its copy in FP32 is part of the state that is measured."""
    monkeypatch.setattr(badam, "INTERVAL", 2)
    one = stepper("badam")
    one.model.train()
    blocks = blocks_of(one.model)
    met = set()
    for _ in range(3 * BLOCKS):
        active = [n for n, b in enumerate(blocks) if next(b.parameters()).requires_grad]
        assert len(active) == 1
        met |= {*active}
        before = [p.detach().clone() for p in one.model.parameters()]
        one.step([batch()], 1e-2)
        moved = [
            name
            for (name, p), old in zip(one.model.named_parameters(), before, strict=True)
            if not torch.equal(p, old)
        ]
        assert all(f".layer.{active[0]}." in n or "classifier" in n for n in moved)
        assert moved
    trained = sum(p.nbytes for p in one.model.parameters() if p.requires_grad)
    state = memory.model_state_bytes(one.model, one.optimizer)
    state -= sum(t.nbytes for t in (*one.model.parameters(), *one.model.buffers()))
    assert state == 0 or state >= 3 * trained
    assert met == {*range(BLOCKS)}


def test_the_optimizers_are_those_of_the_registry() -> None:
    assert tuple(optimizers.MAKERS) == OPTIMIZERS
    assert {*IN_BACKWARD} <= {*OPTIMIZERS}


OF_EVERY_KIND = ["full", "lora", "checkpointing", "compacter", "meft1-exact"]
"""Backbones of every kind, and a parameter that several blocks share."""


def trained_by(optimizer: str, method: str, rate: float) -> list[Tensor]:
    """Weights after a few steps without dropout."""
    one = stepper(method, optimizer=optimizer)
    one.model.eval()
    for _ in range(3):
        one.step([batch()], rate)
        assert all(parameter.grad is None for parameter in one.trained)
    return [parameter.detach() for parameter in one.trained]


@pytest.mark.parametrize("method", OF_EVERY_KIND)
def test_an_update_in_backward_is_adamws(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where nothing is clipped."""
    monkeypatch.setattr(protocol, "MAX_GRADIENT_NORM", 1e9)
    found = trained_by("adamw-in-backward", method, 1e-3)
    expected = trained_by("adamw", method, 1e-3)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)


def test_an_update_in_backward_leaves_no_gradient() -> None:
    """When the next one exists, the one before is gone."""
    one = stepper("full", optimizer="adamw-in-backward")
    held = []

    def count(parameter: Tensor) -> None:
        held.append(sum(p.grad is not None for p in one.trained))

    for parameter in one.trained:
        parameter.register_post_accumulate_grad_hook(count)
    one.loss(batch()).backward()
    assert len(held) == len(one.trained)
    assert not any(held)


@pytest.mark.parametrize("method", OF_EVERY_KIND)
def test_lomo_is_sgd_in_backward(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nothing is clipped."""
    pytest.importorskip("lomo_optim")
    monkeypatch.setattr(protocol, "MAX_GRADIENT_NORM", 1e9)
    monkeypatch.setattr(protocol, "WEIGHT_DECAY", 0.0)
    found = trained_by("lomo", method, 1e-1)
    torch.testing.assert_close(found, trained_by("sgd", method, 1e-1))


@pytest.mark.parametrize(
    ("optimizer", "changes", "words"),
    [
        *((name, {"accumulation": 2}, "take 1") for name in IN_BACKWARD),
        *((name, {"dtype": "fp16"}, "take 'bf16'") for name in READ_IN_BACKWARD),
    ],
)
def test_what_needs_all_gradients_is_refused(
    optimizer: str, changes: dict[str, object], words: str
) -> None:
    """Before anything runs."""
    with pytest.raises(ValueError, match=rf"`optimizer` = '{optimizer}'.*{words}"):
        fields.check_together(of("lora", optimizer=optimizer, **changes))


@without_gpu
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_optimizer_can_be_planned(optimizer: str) -> None:
    """Or says why not; with a state of less than AdamW's, but for AdamW itself."""
    here = of("full", device="virtual-H200", backbone="random:bert-tiny")
    found = plan(dataclasses.replace(here, optimizer=optimizer), Source(), 0.0)
    if "is not installed" in found.message:
        pytest.skip(found.message)
    is_refused = "cannot be planned: torchao compiles the step" in found.message
    assert is_refused == (optimizer in ("adamw-8bit", "adamw-4bit"))
    if not is_refused:
        adamw = plan(here, Source(), 0.0)
        assert found.verdict == "fits", found.message
        assert found.allocated_bytes is not None
        assert adamw.allocated_bytes is not None
        assert found.allocated_bytes <= adamw.allocated_bytes


@pytest.mark.parametrize("method", [n for n, m in TABLE.items() if m.optimizer])
def test_a_method_with_an_optimizer_takes_no_other(method: str) -> None:
    with pytest.raises(ValueError, match="has an optimizer of its own: take 'adamw'"):
        fields.check_together(of(method, optimizer="sgd"))


@pytest.mark.parametrize("method", FLOATS_ONLY)
def test_a_method_of_floats_takes_no_quantised_weights(method: str) -> None:
    """peft has no layers for them, or layers that fail."""
    with pytest.raises(ValueError, match="whose layers take no quantised weights"):
        fields.check_together(of(method, dtype="bf16", weights_dtype="nf4"))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_moments_of_8_bits_are_counted_as_such() -> None:
    """A byte for each number and four bytes for each 256; AdamW has four for each."""
    pytest.importorskip("torchao.optim")
    found = []
    for name in ("adamw", "adamw-8bit"):
        parameter = nn.Parameter(torch.zeros(64, 256))
        groups = [{"params": [parameter], "weight_decay": 0.0}]
        model: Any = nn.ParameterList([parameter])
        optimizer = optimizers.make(model, groups, of("full", optimizer=name))
        parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        optimizer.zero_grad()
        found.append(memory.model_state_bytes(model, optimizer))
    numbers = 64 * 256
    assert found[0] == 3 * 4 * numbers + 4
    maps = 2 * 256 * 4  # what each of 256 codes stands for
    assert found[1] == 4 * numbers + 2 * (numbers + 4 * numbers // 256) + maps + 4


LIBRARIES = [
    ({"method": "galore"}, "pip install galore-torch"),
    ({"method": "badam"}, "pip install badam"),
    ({"optimizer": "lomo"}, "pip install lomo-optim"),
    ({"optimizer": "adamw-8bit"}, "pip install torchao"),
    ({"optimizer": "adamw-4bit"}, "pip install torchao"),
]


@pytest.mark.parametrize(("changes", "words"), LIBRARIES)
def test_a_missing_library_is_a_skipped_record(
    changes: dict[str, Any], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the reason and the command that installs it."""
    there = importlib.util.find_spec
    names = ("galore_torch", "badam", "lomo_optim", "torchao")
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *rest: None if name in names else there(name, *rest),
    )
    fields_of = {"method": "full", "backbone": "random:bert-tiny", "max_steps": 3}
    found = run(cell(**fields_of | changes), ChildOptions())
    assert found["status"] == "skipped", found["message"]
    assert words in str(found["message"])


@pytest.mark.parametrize("optimizer", ["adamw-offload", "adalomo"])
def test_what_needs_cuda_is_a_skipped_record(optimizer: str) -> None:
    tiny = of("full", backbone="random:bert-tiny", max_steps=3, optimizer=optimizer)
    found = run(tiny, ChildOptions())
    assert found["status"] == "skipped"
    assert "needs CUDA" in str(found["message"])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("optimizer", ["adamw-8bit", "adamw-4bit"])
def test_quantised_moments_are_near_those_of_adamw(optimizer: str) -> None:
    """torchao does not quantise small parameters: these are all equal."""
    pytest.importorskip("torchao.optim")
    found = []
    for name in ("adamw", optimizer):
        one = stepper("lora", optimizer=name)
        one.model.eval()
        for _ in range(2):
            one.step([batch()], 1e-2)
        found.append([p.detach() for p in one.trained])
    for got, expected in zip(*found, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_the_memory_between_steps_is_the_same_after_a_draw() -> None:
    """LISA has moments of the blocks that train, also of those just drawn."""
    its = made("lisa")
    here = cell(method="lisa")
    stepper = Stepper(its, here)
    sizes = set()
    for _ in range(2 * lisa.INTERVAL + 3):
        stepper.step([batch()], 1e-3)
        sizes.add(memory.model_state_bytes(stepper.model, stepper.optimizer))
    assert len(sizes) == 1


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_mezo_needs_weights_that_return(dtype: str) -> None:
    """Narrow weights would walk at a learning rate of 0."""
    with pytest.raises(ValueError, match="take 'fp32'"):
        mezo.mezo(
            classifier("bert"), cell(method="mezo", dtype=dtype, weights_dtype=dtype)
        )
