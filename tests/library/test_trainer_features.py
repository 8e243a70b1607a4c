"""What people switch on in `Trainer`, and do to a model, with a reversible model.

Features of `Trainer` are compared with the stored twin: losses, gradient norms, trained
weights and the evaluation's loss, in every digit.
"""

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm
from torch.nn.utils.prune import l1_unstructured
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import PreTrainedModel, Trainer, TrainingArguments

import meft
from library.models import batch, classifier, gradients, only_stack, reversible
from library.sparse import plain_model
from marks import slow_but_for

REVERSIBLE = meft.ReversibleConfig(variant="meft1", bottleneck_size=3)


def moved(model: PreTrainedModel, seed: int = 5) -> Any:
    """The model with trainable parameters away from their start."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def bert() -> Any:
    return moved(reversible(2, dropout=0.1, variant="meft1"))


def llama() -> Any:
    torch.manual_seed(1)
    return moved(meft.make_reversible(plain_model(2), REVERSIBLE))


def lm_batch() -> dict[str, Tensor]:
    rows = batch(rows=12, padded=False)
    return rows | {"labels": rows["input_ids"]}


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        out: Tensor = model.eval()(**batch()).logits
    model.train()
    return out


def assert_twins(model: Any, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Every gradient has the bits of the stored twin's."""
    stack = only_stack(model)
    rebuilt = gradients(model, inputs)
    stack.backward_pass = "store"
    stored = gradients(model, inputs)
    stack.backward_pass = "rebuild"
    assert all(torch.equal(rebuilt[name], stored[name]) for name in stored)
    assert any(tensor.any() for tensor in rebuilt.values())
    return rebuilt


# Trainer ---------------------------------------------------------------------------


def run(model: Any, directory: Path, inputs: dict[str, Tensor], **options: Any) -> Any:
    """Four steps and an evaluation."""
    dataset = [{name: t[i] for name, t in inputs.items()} for i in range(12)]
    fields: dict[str, Any] = {
        "output_dir": str(directory),
        "max_steps": 4,
        "per_device_train_batch_size": 3,
        "learning_rate": 2e-2,
        "logging_steps": 1,
        "report_to": "none",
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    trainer = Trainer(
        model=model,
        args=TrainingArguments(**fields | options),
        train_dataset=dataset,
        eval_dataset=dataset,
    )
    trainer.train()
    loss = trainer.evaluate()["eval_loss"]
    log = trainer.state.log_history
    numbers = [(entry["loss"], entry["grad_norm"]) for entry in log if "loss" in entry]
    weights = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
    return numbers, loss, weights


FEATURES: dict[str, dict[str, Any]] = {
    "label_smoothing_factor": {"label_smoothing_factor": 0.1},
    "neftune_noise_alpha": {"neftune_noise_alpha": 5.0},
    "auto_find_batch_size": {"auto_find_batch_size": True},
    "group_by_length": {"train_sampling_strategy": "group_by_length"},
    "dataloader_num_workers": {"dataloader_num_workers": 1},
    "average_tokens_across_devices": {"average_tokens_across_devices": True},
    "include_num_input_tokens_seen": {"include_num_input_tokens_seen": "all"},
    "gradient_accumulation_steps": {"gradient_accumulation_steps": 3},
    "bf16": {"bf16": True},
    "bf16_full_eval": {"bf16_full_eval": True},
    "fp16_full_eval": {"fp16_full_eval": True},
    "torch_empty_cache_steps": {"torch_empty_cache_steps": 1},
    "cosine": {"lr_scheduler_type": "cosine", "warmup_steps": 2},
    "eval_accumulation_steps": {"eval_accumulation_steps": 1},
    "adafactor": {"optim": "adafactor"},
    "adagrad": {"optim": "adagrad"},
    "rmsprop": {"optim": "rmsprop"},
    "sgd": {"optim": "sgd"},
    "adamw_torch": {"optim": "adamw_torch"},
}


@pytest.mark.parametrize(
    "name",
    slow_but_for(
        FEATURES, "label_smoothing_factor", "neftune_noise_alpha", "bf16_full_eval"
    ),
)
@pytest.mark.parametrize("family", ["bert", "llama"])
# A worker of torch's loader forks, which some versions of Python warn of.
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_features_of_the_trainer_give_the_twins_numbers(
    family: str, name: str, tmp_path: Path
) -> None:
    """With the feature on, training and evaluation go the twin's way in every digit."""
    inputs = batch(rows=12, padded=False) if family == "bert" else lm_batch()
    seen = []
    for backward in ("rebuild", "store"):
        model = bert() if family == "bert" else llama()
        only_stack(model).backward_pass = backward
        seen.append(run(model, tmp_path, inputs, **FEATURES[name]))
    (numbers, loss, weights), (expected, expected_loss, expected_weights) = seen
    assert numbers == expected
    assert len(numbers) == 4
    assert loss == expected_loss
    assert all(torch.equal(weights[n], t) for n, t in expected_weights.items())


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is:FutureWarning")
@pytest.mark.parametrize("name", ["gradient_checkpointing", "activation_checkpointing"])
def test_checkpointing_by_the_trainer_names_the_argument(
    name: str, tmp_path: Path
) -> None:
    """Under both of its names, before the first step."""
    with pytest.raises(meft.UnsupportedCallError, match=f"`{name}=False`.*SFTConfig"):
        run(bert(), tmp_path, batch(rows=12, padded=False), **{name: True})


# Done to the model -----------------------------------------------------------------


def _saved_and_loaded(model: nn.Module) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


copies = pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model)), _saved_and_loaded],
    ids=["deepcopy", "pickle", "torch.save"],
)


@copies
def test_a_copy_is_a_model_of_its_own(copied: Callable[[Any], Any]) -> None:
    """Same outputs, gradients of its own with the twin's bits, and what it saves is its
    own as well."""
    model = bert()
    before = logits(model)
    other = copied(model)
    assert torch.equal(logits(other), before)
    assert_twins(other, batch())
    assert all(parameter.grad is None for parameter in model.parameters())
    moved(other, seed=6)
    assert torch.equal(logits(model), before)
    assert other.save_pretrained.model is other


def _with_sparse_adapters() -> Any:
    sparse = meft.SparseConfig(num_neurons=16, top_k_neurons=2)
    return meft.make_reversible(
        meft.add_sparse_adapters(classifier(2), sparse), REVERSIBLE
    ).train()


@copies
@pytest.mark.parametrize(
    "build",
    [
        bert,
        lambda: reversible(2, variant="meft2", arithmetic="float"),
        lambda: reversible(2, variant="meft3", side_buffer="host", span=(1, 2)),
        lambda: meft.chunk_loss(llama()),
        _with_sparse_adapters,
    ],
    ids=["fixed", "float", "host", "chunked loss", "sparse"],
)
def test_a_model_that_has_trained_can_be_copied(
    build: Callable[[], Any], copied: Callable[[Any], Any]
) -> None:
    """What a forward and backward leave in a model does not keep it from being copied:
    the copy gives the same gradients, and shares no tensor with the original."""
    model = build()
    rows = lm_batch() if "Causal" in type(model).__name__ else batch()
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        gradients(model, rows)
    other = copied(model)
    expected = gradients(model, rows)
    for name, gradient in gradients(other, rows).items():
        assert torch.equal(gradient, expected[name]), name
    ours = {p.data_ptr() for p in model.parameters()}
    assert ours.isdisjoint(p.data_ptr() for p in other.parameters())


def test_a_state_dict_brings_everything_back() -> None:
    """All keys match, and the logits are those of the moment when it was copied."""
    model = bert()
    state, before = copy.deepcopy(model.state_dict()), logits(model)
    moved(model, seed=6)
    assert not torch.equal(logits(model), before)
    model.load_state_dict(state)
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("decay", [None, 0.5])
def test_averages_are_of_every_trained_parameter(decay: float | None) -> None:
    """`AveragedModel`, by mean and by a moving average of equal weights: the model of
    the mean of two, which trains with the twin's gradients."""
    model = bert()
    update = None if decay is None else get_ema_multi_avg_fn(decay)
    averaged = AveragedModel(model, multi_avg_fn=update)
    averaged.update_parameters(model)
    one = copy.deepcopy(model)
    moved(model, seed=6)
    averaged.update_parameters(model)
    pairs = zip(one.parameters(), model.parameters(), strict=True)
    expected = copy.deepcopy(model)
    with torch.no_grad():
        for parameter, (a, b) in zip(expected.parameters(), pairs, strict=True):
            parameter.copy_((a + b) / 2)
    torch.testing.assert_close(logits(averaged), logits(expected))
    assert_twins(averaged.module, batch())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_cast_after_the_conversion(dtype: torch.dtype) -> None:
    """`model.half()`, `bfloat16()` and `double()` cast adapters too; gradients are the
    twin's in that dtype."""
    model = bert()
    cast = {torch.bfloat16: "bfloat16", torch.float16: "half"}.get(dtype, "double")
    getattr(model, cast)()
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert_twins(model, batch())


def test_resized_and_tied_embeddings() -> None:
    """New tokens after the conversion can be read and predicted; `tie_weights` changes
    nothing in a model without ties; gradients are the twin's."""
    model = llama()
    with torch.no_grad():
        model.resize_token_embeddings(model.config.vocab_size + 8, mean_resizing=False)
    model.tie_weights()
    inputs = lm_batch()
    inputs = inputs | {"input_ids": inputs["input_ids"] + 8}
    assert_twins(model, inputs | {"labels": inputs["input_ids"]})
    assert model(**inputs).logits.shape[-1] == model.config.vocab_size


def test_inputs_that_require_gradients() -> None:
    """`enable_input_require_grads`, as peft and TRL call it, changes no gradient."""
    model, inputs = llama(), lm_batch()
    before = assert_twins(model, inputs)
    model.enable_input_require_grads()
    after = assert_twins(model, inputs)
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_pruning_and_reparametrising_a_block() -> None:
    """A weight that is computed from others before each forward: the recompute computes
    it too, and the gradients of the others are the twin's."""
    model = bert()
    block: Any = only_stack(model)[0]
    l1_unstructured(block.attention.self.query, "weight", 0.5)
    block.attention.self.query.weight_orig.requires_grad_(True)
    norm = weight_norm(block.output.dense)
    norm.requires_grad_(True)
    found = assert_twins(model, batch())
    assert any("weight_orig" in name and g.any() for name, g in found.items())
    assert any("parametrizations" in name and g.any() for name, g in found.items())
