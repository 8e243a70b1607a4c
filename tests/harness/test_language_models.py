"""Language models trained on random tokens: the same methods, another head."""

from pathlib import Path
from typing import Any

import pytest
import torch

from harness.tiny import cell
from marks import slow_but_for
from meft.testing import tolerance
from meft_bench.child import backbones
from meft_bench.child.backbones.classifier import LANGUAGE_MODELS
from meft_bench.child.tasks import synthetic
from meft_bench.child.tasks.batches import Batch, full_batches
from meft_bench.child.training import prepare
from meft_bench.child.training.steps import Stepper
from meft_bench.child.worker import run
from meft_bench.parent.fields import check_together
from meft_bench.shared import methods
from meft_bench.shared.backbones import TABLE
from meft_bench.shared.cell import Cell
from meft_bench.shared.options import ChildOptions
from meft_bench.shared.registry import METHODS, load
from meft_bench.shared.source import MissingError, Source
from meft_bench.virtual.prediction.plan import MemoryPlan, plan

HERE = Source()
without_gpu = pytest.mark.skipif(
    torch.cuda.is_available(), reason="there is a real GPU, which is left alone"
)


def lm_cell(family: str = "llama", **changes: object) -> Cell:
    """A cell of that family's tiny shape, whose vocabulary is of full size."""
    fields: dict[str, object] = {"backbone": f"random:{family}-tiny", "max_steps": 3}
    fields |= {"task": "synthetic-lm", "num_neurons": 64, "top_k_neurons": 8}
    if TABLE[family].has_eager_attention_only:
        fields["attention"] = "eager"
    return cell(**(fields | changes))


def made(chosen: Cell) -> Stepper:
    torch.manual_seed(0)
    model = backbones.load(chosen, None, HERE).model
    return Stepper(load(METHODS[chosen.method])(model, chosen), chosen)


def batch_of(stepper: Stepper, chosen: Cell) -> Batch:
    rows = synthetic.causal_lm_examples(chosen, stepper.model.config.vocab_size)
    return stepper.to_device(full_batches(rows, chosen)[0])


@pytest.mark.parametrize("family", LANGUAGE_MODELS)
def test_every_token_is_a_target(family: str) -> None:
    """The loss is that of all of them, from logits over the whole vocabulary."""
    stepper = made(lm_cell(family))
    batch = batch_of(stepper, lm_cell(family))
    assert torch.equal(batch["labels"], batch["input_ids"])
    assert batch["input_ids"].shape == (4, 8)
    stepper.model.eval()
    out = stepper.model(**batch)
    assert out.logits.shape == (4, 8, stepper.model.config.vocab_size)
    # A decoder alone sees the token whose place it is in; the input of one with an
    # encoder is shifted.
    ahead = 0 if family in ("bart", "mbart", "t5") else 1
    logits, labels = out.logits[:, : 8 - ahead], batch["labels"][:, ahead:]
    wanted = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
    # How many rows a kernel sums decides in which order it does.
    allowed = tolerance(torch.float32, depth=1) * float(wanted.detach())
    assert abs(float((out.loss - wanted).detach())) <= allowed


@pytest.mark.parametrize(
    "method",
    slow_but_for([m for m in METHODS if m != "head"], "full", "lora", "meft1-exact"),
)
def test_every_method_trains_a_language_model(method: str) -> None:
    """A step moves what trains and nothing else, the head only with all of it."""
    if method.startswith("bitfit"):
        pytest.skip("LLaMA has no biases, and another test sees the refusal")
    chosen = lm_cell(method=method)
    try:
        stepper = made(chosen)
    except MissingError as error:
        pytest.skip(str(error))  # a package or CUDA that is not here
    before = {n: p.detach().clone() for n, p in stepper.model.named_parameters()}
    stepper.model.train()
    stepper.step([batch_of(stepper, chosen)], learning_rate=1e-2)
    for name, parameter in stepper.model.named_parameters():
        if not parameter.requires_grad:
            assert torch.equal(parameter, before[name]), name
        elif parameter.ndim > 1:  # decay moves every matrix
            assert not torch.equal(parameter, before[name]), name
    head = stepper.model.get_parameter("lm_head.weight")
    assert head.requires_grad == methods.TABLE[method].trains_backbone


@pytest.mark.parametrize("family", slow_but_for(LANGUAGE_MODELS, "llama"))
@pytest.mark.parametrize(
    ("method", "device"),
    [
        ("meft1-exact", "cpu"),
        ("lora-exact", "cpu"),
        pytest.param("full", "virtual-H200", marks=without_gpu),
        pytest.param("lora-exact", "virtual-H200", marks=without_gpu),
        pytest.param("lora-checkpointing", "virtual-H200", marks=without_gpu),
        ("lora-checkpointing-offload", "cpu"),
        pytest.param("lora-checkpointing-offload", "virtual-H200", marks=without_gpu),
    ],
)
def test_a_cell_of_a_language_model_is_measured(
    method: str, device: str, family: str
) -> None:
    """Whole, by the worker: on a CPU, and on a GPU that is not there."""
    seen: Any = run(lm_cell(family, method=method, device=device), ChildOptions())
    assert seen["status"] == "ok", seen["message"]
    measured = seen["measurement"]
    assert 0 < measured["saved_bytes"] < measured["peak_allocated_bytes"]
    assert measured["score"] is None
    if method.endswith("-exact") and device == "cpu":
        assert measured["gradient_error"] == [0.0] * measured["num_blocks"]
        # Adapters at random, and 4 lost bits instead of 8.
        most = 0.3 if method == "meft1-exact" else 0.05
        assert measured["start_deviation"] < most
        assert measured["reconstruction_error"] == [0.0] * measured["num_blocks"]


def planned(family: str, task: str) -> MemoryPlan:
    sizes = {"batch_size": 8, "seq_len": 128, "method": "lora-checkpointing"}
    return plan(lm_cell(family, task=task, device="virtual-H200", **sizes), HERE, 0.05)


@without_gpu
@pytest.mark.parametrize("family", slow_but_for(LANGUAGE_MODELS, "llama"))
def test_logits_are_most_of_what_a_small_stack_takes(family: str) -> None:
    """The peak is where their gradient is made, of 4 bytes a place, next to the
    logarithms that it is made of, and nothing of the kind in a classifier."""
    if "classifier" not in TABLE[family].models:
        pytest.skip("transformers has no classifier of it")
    large, small = (planned(family, task) for task in ("synthetic-lm", "synthetic"))
    assert large.by_operator is not None
    assert small.by_operator is not None
    config, _ = backbones.load_config(lm_cell(family), HERE)
    num_bytes = 8 * 128 * config.vocab_size * 4
    assert "_log_softmax_backward_data" in large.where
    names = ("aten._log_softmax.default", "aten._log_softmax_backward_data.default")
    for name in names:
        assert 0.99 * num_bytes < large.by_operator[name] <= num_bytes
        assert small.by_operator.get(name, 0) < 10_000


@pytest.mark.parametrize(
    ("family", "method", "words"),
    [
        ("bert", "full", r"'synthetic-lm' wants a language model of bart, .*llama, m"),
        ("roberta", "full", r"random:roberta-tiny is of model_type 'roberta': take"),
        ("vit", "full", r"random:vit-tiny is of model_type 'vit': take one of these"),
        ("llama", "head", r"'head' trains a new head.*keeps the one it has: take anot"),
    ],
)
def test_what_has_no_such_head_is_refused(family: str, method: str, words: str) -> None:
    """With what to do instead."""
    with pytest.raises(ValueError, match=words):
        made(lm_cell(family, method=method))


def test_a_directory_may_hold_barts_language_model(tmp_path: Path) -> None:
    """Its head is read with its other weights."""
    model = backbones.load(lm_cell("bart"), None, HERE).model
    model.save_pretrained(tmp_path)
    stored = lm_cell(backbone=f"dir:{tmp_path}")
    loaded = backbones.load(stored, None, HERE).model.state_dict()
    for name, weight in model.state_dict().items():
        assert torch.equal(loaded[name], weight), name


def test_a_row_of_one_token_is_refused() -> None:
    """It has no target, and the mean over none is no number."""
    seen: Any = run(lm_cell(seq_len=1), ChildOptions())
    assert seen["status"] == "error"
    assert "`seq_len` is 1, but a language model predicts each token" in seen["message"]


@pytest.mark.parametrize("method", ["lora", "lora-exact", "lora-checkpointing"])
def test_a_loss_in_chunks_is_the_same_loss(method: str) -> None:
    """Of 5 tokens at a time, next to one of all of them."""
    found = []
    for chunk_tokens in (0, 5):
        chosen = lm_cell(method=method, loss_chunk_tokens=chunk_tokens)
        torch.manual_seed(0)
        backbone = backbones.load(chosen, None, HERE)
        stepper = prepare.apply_method(backbone, chosen)
        stepper.model.train()
        found.append(stepper.step([batch_of(stepper, chosen)], learning_rate=1e-2))
    assert found[0] == pytest.approx(found[1], rel=1e-5)


def test_a_classifier_has_no_loss_in_chunks() -> None:
    """It is refused before anything runs; the message names the field."""
    with pytest.raises(ValueError, match=r"`loss_chunk_tokens` = 5 with `task` = 'syn"):
        check_together(lm_cell(task="synthetic", loss_chunk_tokens=5))


@pytest.mark.parametrize(
    "device", ["cpu", pytest.param("virtual-H200", marks=without_gpu)]
)
@pytest.mark.parametrize("method", ["meft1-exact", "lora-exact"])
def test_lost_bits_on_the_host_are_counted(method: str, device: str) -> None:
    """Those of all blocks but the first, whose streams are equal: there and back."""
    seen: Any = run(
        lm_cell(method=method, device=device, side_buffer="host"), ChildOptions()
    )
    assert seen["status"] == "ok", seen["message"]
    measured = seen["measurement"]
    chosen = lm_cell()
    tokens = chosen.batch_size * chosen.seq_len
    config, _ = backbones.load_config(chosen, HERE)
    lost = (
        (measured["num_blocks"] - 1)
        * tokens
        * config.hidden_size
        * chosen.lost_bits
        // 8
    )
    assert measured["d2h_bytes"] == measured["h2d_bytes"] == lost
    elsewhere: Any = run(lm_cell(method=method, device=device), ChildOptions())
    assert elsewhere["measurement"]["h2d_bytes"] is None
