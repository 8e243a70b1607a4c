"""`torch.compile`, `torch.func`, recorded programs: right, or refused with a remedy."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.exc import Unsupported
from transformers import Trainer, TrainingArguments

import meft
from library.models import batch, classifier, gradients, only_stack, reversible
from library.sparse import batches, sparse_model
from marks import slow_but_for

Inputs = dict[str, Tensor]

pytestmark = [
    # Both from inside torch's compiler.
    pytest.mark.filterwarnings("ignore:`torch.jit"),
    pytest.mark.filterwarnings("ignore:The .grad attribute"),
    # `torch.jit.trace` looks at every attribute of a model.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),
]
BATCH = batch()


@pytest.fixture(autouse=True)
def _forget_what_was_compiled() -> None:
    torch._dynamo.reset()


def gradients_by(call: Callable[..., Any], model: nn.Module) -> Inputs:
    """Of the trainable parameters of `model`, by a call of what wraps it."""
    model.zero_grad()
    torch.manual_seed(3)
    call(**BATCH).loss.backward()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def assert_close(one: Inputs, other: Inputs) -> None:
    assert one.keys() == other.keys()
    for name, expected in other.items():
        torch.testing.assert_close(one[name], expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "backend", slow_but_for(["eager", "aot_eager", "inductor"], "eager")
)
@pytest.mark.parametrize("in_place", slow_but_for([True, False], False))
def test_a_compiled_model_trains_and_evaluates_as_it_did(
    in_place: bool, backend: str
) -> None:
    """By `torch.compile(model)` and `model.compile()`. The stack itself runs eagerly,
    so that its bits are those of a model that is not compiled; embeddings and head are
    compiled and may round differently."""
    model = reversible(2, dropout=0.1, variant="meft1")
    # Compiled, these draw other masks.
    model.bert.embeddings.dropout.p = model.dropout.p = 0.0
    model.bert.embeddings.requires_grad_(True)
    expected = gradients(model, BATCH)
    logits = model.eval()(**BATCH).logits
    model.train()
    call: Any = model
    if in_place:
        model.compile(backend=backend)
    else:
        call = torch.compile(model, backend=backend)
    assert_close(gradients_by(call, model), expected)
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(call(**BATCH).logits, logits)


def test_one_graph_is_refused() -> None:
    """`fullgraph=True` cannot be had; the message says what can."""
    compiled = torch.compile(
        reversible(2, variant="meft1"), backend="eager", fullgraph=True
    )
    with pytest.raises(Unsupported, match=r"stack runs eagerly(.|\n)*module.compile"):
        compiled(**BATCH)


def test_compiled_before_the_conversion() -> None:
    """A model that was compiled in place, and used, is converted as any other. Blocks
    that `torch.compile` has wrapped are refused, as they have to be taken apart."""
    model = classifier(2).train()
    model.compile(backend="eager")
    model(**BATCH)
    torch.manual_seed(1)
    meft.make_reversible(
        model, meft.ReversibleConfig(variant="meft1", bottleneck_size=3)
    )
    found = gradients_by(model, model)
    assert_close(found, gradients(reversible(2, variant="meft1"), BATCH))

    model = classifier(2)
    blocks: Any = model.bert.encoder.layer
    blocks[0] = torch.compile(blocks[0], backend="eager")
    with pytest.raises(meft.UnsupportedModelError, match="convert the plain model"):
        meft.make_reversible(model, meft.ReversibleConfig(variant="meft1"))


def test_modules_inside_blocks_can_be_compiled() -> None:
    """The way that the messages name: rebuilt in the bits of the twin, hooks on
    parameters included."""
    model = reversible(2, variant="meft1", mlp_chunks=2)
    model.requires_grad_(True)
    for block in only_stack(model).blocks:
        for name in ("attention.self", "intermediate"):
            block.get_submodule(name).compile(backend="aot_eager")
    for parameter in model.parameters():
        parameter.register_hook(lambda g: 2 * g)
    rebuilt = gradients_by(model, model)
    only_stack(model).backward_pass = "store"
    stored = gradients_by(model, model)
    assert rebuilt.keys() == stored.keys()
    assert not [n for n in stored if not torch.equal(rebuilt[n], stored[n])]


@pytest.mark.slow
def test_a_trainer_with_torch_compile(tmp_path: Path) -> None:
    """Two steps of `Trainer(torch_compile=True)` end at the weights of two without."""
    rows = [{n: x[i] for n, x in BATCH.items()} for i in range(3)] * 2
    after = []
    for torch_compile in (False, True):
        model = reversible(2, variant="meft1")
        arguments = TrainingArguments(
            str(tmp_path),
            max_steps=2,
            per_device_train_batch_size=3,
            learning_rate=1e-2,
            torch_compile=torch_compile,
            torch_compile_backend="aot_eager" if torch_compile else None,
            report_to="none",
            save_strategy="no",
            use_cpu=True,
            disable_tqdm=True,
            dataloader_pin_memory=False,
        )
        Trainer(model, arguments, train_dataset=rows).train()
        after.append({n: p.detach() for n, p in model.named_parameters()})
    assert_close(after[1], after[0])


def _grad(model: Any, parameters: Inputs) -> Any:
    def loss(parameters: Inputs) -> Tensor:
        out: Tensor = torch.func.functional_call(model, parameters, (), BATCH).loss
        return out

    return torch.func.grad(loss)(parameters)


def _vmap(model: Any, parameters: Inputs) -> Any:
    ids = BATCH["input_ids"]
    return torch.vmap(lambda row: model(input_ids=row[None]).logits)(ids)


def _jvp(model: Any, parameters: Inputs) -> Any:
    x = torch.randn(2, 3, 16)
    return torch.func.jvp(lambda x: model(inputs_embeds=x).logits, (x,), (x,))


@pytest.mark.parametrize("do", [_grad, _vmap, _jvp])
@pytest.mark.parametrize("backward", ["rebuild", "store"])
@pytest.mark.parametrize("training", [True, False])
def test_torch_func_is_refused(
    do: Callable[[Any, Inputs], Any], backward: str, training: bool
) -> None:
    """At the forward, by a message of ours."""
    model = reversible(2, variant="meft1", backward=backward).train(training)
    parameters = {n: p.detach() for n, p in model.named_parameters()}
    with pytest.raises(meft.UnsupportedCallError, match=r"torch.func.*autograd.grad"):
        do(model, parameters)


def test_functional_call_of_other_weights_is_refused_in_the_backward() -> None:
    """The weights that it put in are gone by then; evaluation is right."""
    model, other = reversible(2, variant="meft1"), reversible(2, variant="meft1")
    parameters = {n: 2 * p.detach() for n, p in model.named_parameters()}
    other.load_state_dict(parameters, strict=False)
    with torch.no_grad():
        found = torch.func.functional_call(model.eval(), parameters, (), BATCH)
        assert torch.equal(found.logits, other.eval()(**BATCH).logits)
    trained = {n: p.requires_grad_() for n, p in parameters.items()}
    loss = torch.func.functional_call(model.train(), trained, (), BATCH).loss
    with pytest.raises(meft.UnsupportedCallError, match="`functional_call`"):
        loss.backward()


@pytest.mark.parametrize("is_training", [True, False])
def test_recorded_programs_are_refused(is_training: bool) -> None:
    """`torch.export` and `torch.jit.trace`: the forward reads its values, to see
    whether they fit into its streams."""
    model = reversible(2, variant="meft1").train(is_training)
    ids = BATCH["input_ids"]
    with torch.set_grad_enabled(is_training):
        with pytest.raises(meft.UnsupportedCallError, match="values of the batch"):
            torch.export.export(model, (ids,))
        with pytest.raises(meft.UnsupportedCallError, match="values of the batch"):
            torch.jit.trace(model, (ids,), strict=False)


@pytest.mark.slow
@pytest.mark.parametrize("what", ["sparse_adapters", "chunked_loss"])
def test_what_else_the_library_puts_into_a_compiled_model(what: str) -> None:
    """With sparse adapters, routers and rows move as in a model that is not compiled; a
    chunked loss has its gradients. In a process of its own: torch's compiler cannot
    trace the types that are checked in this one."""
    subprocess.run(
        [sys.executable, "-m", "library.workers.compiled", what],
        check=True,
        cwd=Path(__file__).parents[1],
    )


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_what_a_sparse_adapter_refuses() -> None:
    """Second derivatives, `torch.func`, and recorded programs, in which the choice of
    neurons would be that of the recorded batch."""
    model = sparse_model(2)
    rows = next(batches(1))
    with pytest.raises(meft.UnsupportedCallError, match="create_graph"):
        model(**rows).loss.backward(create_graph=True)
    with pytest.raises(meft.UnsupportedCallError, match=r"torch\.func"):
        torch.vmap(lambda ids: model(input_ids=ids[None]).logits)(rows["input_ids"])
    model.eval()
    with torch.no_grad(), pytest.raises(meft.UnsupportedCallError, match="the batch"):
        torch.export.export(model, (rows["input_ids"],))
    with torch.no_grad(), pytest.raises(meft.UnsupportedCallError, match="the batch"):
        torch.jit.trace(model, (rows["input_ids"],), strict=False)
