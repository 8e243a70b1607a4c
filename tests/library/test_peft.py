"""peft and meft on one model: both train and are saved, or a message says what is not.

The reference of every gradient is the stored twin, which runs peft's layers under
ordinary autograd.
"""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.version import parse
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel, Trainer, TrainingArguments
from transformers.integrations.peft import MIN_PEFT_VERSION

import meft
from library.models import batch, classifier
from library.sparse import plain_model, randomise
from marks import slow_but_for
from meft.reversible.blocks import find_stacks

peft = pytest.importorskip("peft")

transformers_takes_this_peft = pytest.mark.skipif(
    parse(peft.__version__) < parse(MIN_PEFT_VERSION),
    reason=f"`add_adapter` of this transformers needs peft {MIN_PEFT_VERSION}",
)

REVERSIBLE = meft.ReversibleConfig(variant="meft1", bottleneck_size=3)
SPARSE = meft.SparseConfig(
    num_neurons=32, top_k_neurons=4, num_experts=8, top_k_experts=2
)


def lora(**options: Any) -> Any:
    fields = {"task_type": "SEQ_CLS", "target_modules": ["query", "value"], "r": 2}
    return peft.LoraConfig(**fields | options)


def moved(model: nn.Module, seed: int = 5) -> nn.Module:
    """The model with trainable parameters away from their start: LoRA starts at 0."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and ".parallel_adapter." not in name:
                parameter.add_(0.05 * torch.randn_like(parameter))
    randomise(model)
    return model


def tuned(config: Any = None, seed: int = 5, dropout: float = 0.0) -> nn.Module:
    """A reversible PeftModel, peft first."""
    inner = peft.get_peft_model(classifier(2, dropout), config or lora())
    torch.manual_seed(1)
    return moved(meft.make_reversible(inner, REVERSIBLE), seed).train()


def trainable(model: nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad}


def gradients(model: nn.Module, inputs: dict[str, torch.Tensor]) -> dict[str, Any]:
    model.zero_grad()
    torch.manual_seed(3)
    model(**inputs).loss.backward()
    # peft makes some parameters that a batch does not reach.
    return {n: p.grad for n, p in model.named_parameters() if p.requires_grad}


def assert_twins(model: nn.Module, inputs: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Every gradient equals the stored twin's in every bit, and none is missing."""
    seen = []
    for backward in ("rebuild", "store"):
        for stack in find_stacks(model).values():
            stack.backward_pass = backward
        seen.append(gradients(model, inputs))
    rebuilt, stored = seen
    for name, expected in stored.items():
        got = rebuilt[name]
        assert (got is None) == (expected is None), name
        assert got is None or torch.equal(got, expected), name
    return rebuilt


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        out: torch.Tensor = model.eval()(**batch()).logits
    model.train()
    return out


# Trained together ----------------------------------------------------------------


@pytest.mark.parametrize("convert", ["reversible", "sparse", "both"])
def test_peft_first_keeps_its_parameters_trainable(convert: str) -> None:
    """LoRA and the head's trainable copy stay trainable, adapters are so in addition,
    and the head's original and the backbone stay frozen."""
    model = peft.get_peft_model(classifier(2), lora())
    before = trainable(model)
    if convert != "reversible":
        meft.add_sparse_adapters(model, SPARSE)
    if convert != "sparse":
        meft.make_reversible(model, REVERSIBLE)
    added = trainable(model) - before
    assert before < trainable(model)
    assert all(".adapters." in n or ".parallel_adapter." in n for n in added)
    for part in ("lora_A", "lora_B", "modules_to_save"):
        assert any(part in name for name in before)
    assert_twins(moved(model).train(), batch())


def lm_batch() -> dict[str, torch.Tensor]:
    rows = batch()
    return rows | {"labels": rows["input_ids"]}


CAUSAL = "CAUSAL_LM"
TUNERS: dict[str, Callable[[], Any]] = {
    "lora everywhere, dropout": lambda: peft.LoraConfig(
        task_type=CAUSAL, target_modules="all-linear", lora_dropout=0.1
    ),
    "lora on embeddings": lambda: peft.LoraConfig(
        task_type=CAUSAL, target_modules=["embed_tokens", "down_proj"]
    ),
    "dora": lambda: peft.LoraConfig(target_modules=["k_proj", "o_proj"], use_dora=True),
    "rslora": lambda: peft.LoraConfig(target_modules=["up_proj"], use_rslora=True),
    "trainable tokens": lambda: peft.LoraConfig(
        target_modules=["q_proj"], trainable_token_indices=[1, 2]
    ),
    "ia3": lambda: peft.IA3Config(task_type=CAUSAL),
    "prompt tuning": lambda: peft.PromptTuningConfig(
        task_type=CAUSAL, num_virtual_tokens=3
    ),
    "p-tuning": lambda: peft.PromptEncoderConfig(
        task_type=CAUSAL, num_virtual_tokens=3
    ),
    "adaption prompt": lambda: peft.AdaptionPromptConfig(
        task_type=CAUSAL, adapter_len=2, adapter_layers=1
    ),
    "layer norms": lambda: peft.LNTuningConfig(
        task_type=CAUSAL, target_modules=["input_layernorm"]
    ),
    "vera": lambda: peft.VeraConfig(target_modules=["q_proj"]),
    "oft": lambda: peft.OFTConfig(target_modules=["q_proj"], oft_block_size=4),
    "loha": lambda: peft.LoHaConfig(target_modules=["q_proj"]),
}


@pytest.mark.parametrize(
    "name",
    slow_but_for(TUNERS, "lora everywhere, dropout", "dora", "ia3", "prompt tuning"),
)
@pytest.mark.parametrize("variant", slow_but_for(["meft1", "meft3"], "meft1"))
# peft warns that it does not know `LlamaRMSNorm`; the gradients are the twin's.
@pytest.mark.filterwarnings("ignore:Unsupported layer type:UserWarning")
def test_gradients_with_a_tuner_inside_are_the_twins(name: str, variant: str) -> None:
    """Whatever peft puts into a block trains with the stored twin's gradients, as do
    the adapters; at least one parameter of peft's gets one that is not zero."""
    model = peft.get_peft_model(plain_model(2), TUNERS[name]())
    config = meft.ReversibleConfig(variant=variant, bottleneck_size=3)
    before = trainable(model)
    meft.make_reversible(model, config)
    found = assert_twins(moved(model).train(), lm_batch())
    assert any(found[n] is not None and found[n].any() for n in before)
    assert any(found[n].any() for n in found.keys() - before)


@pytest.mark.parametrize("convert", ["reversible", "sparse"])
def test_peft_last_says_what_it_froze_and_how_to_choose(convert: str) -> None:
    """`get_peft_model` freezes adapters that were there before; the first training
    forward says so, once, and evaluation says nothing. Unfrozen by the advice, both
    train, with the twin's gradients."""
    model = classifier(2)
    if convert == "reversible":
        meft.make_reversible(model, REVERSIBLE)
    else:
        meft.add_sparse_adapters(model, SPARSE)
    names = {name for name, p in model.named_parameters() if p.requires_grad}
    model = peft.get_peft_model(model, lora()).train()
    logits(model)
    with pytest.warns(meft.FrozenWarning, match="peft was applied after") as seen:
        model(**batch())
    assert "get_peft_model(model, peft_config), config)" in str(seen[0].message)
    model(**batch())
    part = ".adapters." if convert == "reversible" else ".parallel_adapter."
    assert part in str(seen[0].message)
    for name, parameter in model.named_parameters():
        if part in name:
            parameter.requires_grad_(True)
    assert {f"base_model.model.{n}" for n in names if part in n} <= trainable(model)
    assert_twins(moved(model), batch())


def test_lora_on_the_adapters_does_not_hide_that_they_are_frozen() -> None:
    """`all-linear` puts LoRA on the adapters as well, whose own weights are frozen."""
    model = meft.make_reversible(classifier(2), REVERSIBLE)
    model = peft.get_peft_model(model, lora(target_modules="all-linear")).train()
    assert any(".adapters." in name for name in trainable(model))
    with pytest.warns(meft.FrozenWarning, match="it froze the adapters"):
        model(**batch())


@pytest.mark.parametrize(
    "freeze",
    [
        lambda model: peft.prepare_model_for_kbit_training(model),
        lambda model: peft.get_peft_model(model, TUNERS["prompt tuning"]()),
        lambda model: model.requires_grad_(False),
    ],
    ids=["prepare_model_for_kbit_training", "prompt tuning", "by hand"],
)
def test_frozen_adapters_are_reported_whoever_froze_them(
    freeze: Callable[[nn.Module], nn.Module],
) -> None:
    """Without a layer of peft's in the blocks it cannot be known who has frozen the
    adapters; the warning names both possibilities."""
    model = freeze(meft.make_reversible(plain_model(2), REVERSIBLE)).train()
    with pytest.warns(meft.FrozenWarning, match="Ignore this if you have"):
        model(**lm_batch())


def test_a_second_adapter_leaves_ours_as_they_are() -> None:
    """`add_adapter` and `set_adapter` of a PeftModel choose among peft's own; one of
    the tuners and all of ours train, with the twin's gradients."""
    model: Any = tuned()
    ours = {name for name in trainable(model) if ".adapters." in name}
    model.add_adapter("second", lora())
    model.set_adapter("second")
    assert ours < trainable(model)
    found = assert_twins(moved(model), batch())
    assert any("lora_A.second" in name and g.any() for name, g in found.items())
    assert not any("lora_A.default" in name for name in found)


@transformers_takes_this_peft
def test_transformers_add_adapter_comes_last_too() -> None:
    """`add_adapter` of a transformers model freezes like `get_peft_model`."""
    model: Any = meft.make_reversible(classifier(2), REVERSIBLE).train()
    model.add_adapter(lora(task_type=None))
    with pytest.warns(meft.FrozenWarning, match="peft was applied after"):
        model(**batch())


def test_prefix_tuning_is_refused() -> None:
    """It passes a cache that holds tokens, which a recompute would extend again."""
    config = peft.PrefixTuningConfig(task_type=CAUSAL, num_virtual_tokens=3)
    model = peft.get_peft_model(plain_model(2), config)
    meft.make_reversible(model, REVERSIBLE).train()
    with pytest.raises(meft.UnsupportedCallError, match="prefix tuning"):
        model(**lm_batch())


def test_lora_on_bare_parameters_is_refused() -> None:
    """`target_parameters` replaces a weight during each forward, by the versions of the
    parameters another one than the backward sees."""
    config = peft.LoraConfig(
        target_modules=[], target_parameters=["mlp.up_proj.weight"]
    )
    model = peft.get_peft_model(plain_model(2), config)
    meft.make_reversible(model, REVERSIBLE).train()
    with pytest.raises(meft.UnsupportedCallError, match="changed or replaced"):
        model(**lm_batch()).loss.backward()


# Chosen by hand ------------------------------------------------------------------


def test_a_choice_made_by_hand_is_kept() -> None:
    """Biases and the head unfrozen, the rest frozen (BitFit): the same parameters train
    afterwards, and the adapters in addition, with the twin's gradients."""
    model = classifier(2)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.endswith(".bias") or "classifier" in name)
    before = trainable(model)
    meft.make_reversible(model, REVERSIBLE).train()
    assert before == {n for n in trainable(model) if ".adapters." not in n}
    assert len(trainable(model)) > len(before)
    assert_twins(model, batch())


@pytest.mark.parametrize("flag", [True, False])
def test_no_choice_means_adapters_and_a_new_head(flag: bool) -> None:
    """A model whose parameters are all trainable, as `from_pretrained` leaves it, or
    all frozen: adapters and head train, nothing else."""
    model = classifier(2).requires_grad_(flag)
    meft.make_reversible(model, REVERSIBLE)
    others = {name for name in trainable(model) if ".adapters." not in name}
    assert others == {"classifier.weight", "classifier.bias"}


def test_what_a_module_around_the_model_has_is_kept(tmp_path: Path) -> None:
    """A head of one's own on an encoder stays trainable, and is saved and loaded with
    the adapters."""

    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = classifier(2).bert
            self.top = nn.Linear(16, 2)

    model = moved(meft.make_reversible(Own(), REVERSIBLE))
    others = {name for name in trainable(model) if ".adapters." not in name}
    assert others == {"top.weight", "top.bias"}
    meft.save_adapters(model, tmp_path)
    loaded = meft.load_adapters(Own(), tmp_path)
    expected = model.state_dict()
    assert all(torch.equal(t, expected[n]) for n, t in loaded.state_dict().items())


def test_quantised_weights_are_not_a_choice() -> None:
    """Integer storage cannot require gradients; norms and embeddings of a quantised
    model, which do after loading, are frozen as in any other model."""
    model: Any = classifier(2)
    dense = model.bert.encoder.layer[0].intermediate.dense
    dense.weight = nn.Parameter(torch.zeros(4, dtype=torch.uint8), requires_grad=False)
    meft.make_reversible(model, REVERSIBLE)
    assert not any(".LayerNorm." in name for name in trainable(model))
    adapters = find_stacks(model)["bert.encoder.layer"].adapters.parameters()
    assert {p.dtype for p in adapters} == {torch.float32}


def test_a_head_that_was_frozen_is_reported() -> None:
    """LoRA without a task type freezes the new head; the conversion keeps that, says
    so, and names both remedies."""
    model = peft.get_peft_model(classifier(2), lora(task_type=None))
    with pytest.warns(meft.FrozenWarning, match=r"modules_to_save=\['classifier'\]"):
        meft.make_reversible(model, REVERSIBLE)
    assert not any("classifier" in name for name in trainable(model))


# What a PeftModel can do -----------------------------------------------------------


def test_peft_methods_on_a_reversible_model() -> None:
    """`disable_adapter` gives the model without LoRA, `merge_and_unload` the same
    function without peft's layers, and `set_adapter` changes nothing of ours."""
    model: Any = tuned()
    expected = logits(model)
    with model.disable_adapter():
        assert not torch.equal(logits(model), expected)
    model.set_adapter("default")
    assert torch.equal(logits(model), expected)
    assert any(".adapters." in name for name in trainable(model))
    merged = model.merge_and_unload()
    torch.testing.assert_close(logits(merged), expected)
    assert not any("lora" in name for name, _ in merged.named_parameters())
    assert_twins(merged, batch())


def test_a_chunked_loss_goes_inside() -> None:
    """On the PeftModel it is refused with the way; on the model inside it gives LoRA
    and adapters the gradients of the whole loss, up to the order of sums."""
    model: Any = peft.get_peft_model(
        plain_model(2), lora(task_type=CAUSAL, target_modules=["q_proj"])
    )
    moved(meft.make_reversible(model, REVERSIBLE)).train()
    expected = assert_twins(model, lm_batch())
    with pytest.raises(meft.UnsupportedModelError, match="LlamaForCausalLM inside"):
        meft.chunk_loss(model)
    meft.chunk_loss(model.get_base_model(), chunk_tokens=4)
    for name, gradient in assert_twins(model, lm_batch()).items():
        torch.testing.assert_close(gradient, expected[name])


@pytest.mark.parametrize("how", ["disable_adapter", "merge_adapter"])
def test_a_tuner_changed_before_the_backward_is_refused(how: str) -> None:
    """The recompute would run with other weights than the forward."""
    model: Any = tuned()
    if how == "disable_adapter":
        with model.disable_adapter():
            loss = model(**batch()).loss
    else:
        loss = model(**batch()).loss
        model.merge_adapter()
    with pytest.raises(meft.MeftError, match="between"):
        loss.backward()


@pytest.mark.parametrize("convert", ["reversible", "sparse"])
def test_a_saved_peft_model_comes_back_whole(convert: str, tmp_path: Path) -> None:
    """`save_pretrained` writes the files of both; `load_adapters` after
    `PeftModel.from_pretrained`, or after `get_peft_model`, gives the same bits."""

    def made() -> Any:
        model = peft.get_peft_model(classifier(2), lora())
        if convert == "sparse":
            return meft.add_sparse_adapters(model, SPARSE)
        return meft.make_reversible(model, REVERSIBLE)

    model: Any = moved(made())
    expected = logits(model)
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(classifier(2), tmp_path)
    assert not torch.equal(logits(loaded), expected)
    for target in (loaded, peft.get_peft_model(classifier(2), lora()), moved(made())):
        assert torch.equal(logits(meft.load_adapters(target, tmp_path)), expected)
        assert trainable(target) == trainable(model)
    with pytest.raises(meft.AdapterFileError, match=r"PeftModel.from_pretrained"):
        meft.load_adapters(classifier(2), tmp_path)


def test_another_file_of_peft_is_refused(tmp_path: Path) -> None:
    """LoRA is in both files; one that was replaced would be overwritten."""
    model: Any = tuned(seed=5)
    model.save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = {name: 2 * tensor for name, tensor in load_file(path).items()}
    save_file(tensors, path, {"format": "pt"})
    loaded = peft.PeftModel.from_pretrained(classifier(2), tmp_path)
    with pytest.raises(meft.AdapterFileError, match="files of two saves were mixed"):
        meft.load_adapters(loaded, tmp_path)


def test_a_merged_model_is_saved_with_its_adapters(tmp_path: Path) -> None:
    """`merge_and_unload` returns the inner model, which saves adapters as well."""
    model: Any = tuned()
    merged = model.merge_and_unload()
    merged.save_pretrained(tmp_path)
    plain = type(merged).from_pretrained(tmp_path)
    assert torch.equal(
        logits(meft.load_adapters(plain, tmp_path)), logits(copy.deepcopy(merged))
    )


def test_load_adapter_of_a_peft_model_loads_ours_too(tmp_path: Path) -> None:
    """Under a name that the model has: LoRA and adapters are those of the file. Under
    a new name: refused, since a model has one set of adapters. A directory without
    ours: LoRA alone, as ever."""
    model: Any = tuned(seed=5)
    expected = logits(model)
    model.save_pretrained(tmp_path / "both")
    other: Any = tuned(seed=6)
    other.load_adapter(tmp_path / "both", "default", is_trainable=True)
    assert torch.equal(logits(other), expected)
    with pytest.raises(meft.UnsupportedCallError, match="not under 'second'"):
        other.load_adapter(tmp_path / "both", "second")
    assert "second" not in other.peft_config
    peft.get_peft_model(classifier(2), lora()).save_pretrained(tmp_path / "lora")
    other.load_adapter(tmp_path / "lora", "second")
    assert "second" in other.peft_config


def test_the_trainer_resumes_and_restores_the_best_peft_model(tmp_path: Path) -> None:
    """`Trainer` loads a PeftModel by `load_adapter`. Resumed half-way, it ends in the
    bits of an uninterrupted run; the best checkpoint is restored whole."""
    rows = batch(rows=12, padded=False)
    dataset = [{name: tensor[i] for name, tensor in rows.items()} for i in range(12)]

    def trained(**options: Any) -> tuple[Trainer, dict[str, torch.Tensor]]:
        arguments = TrainingArguments(
            output_dir=str(tmp_path),
            max_steps=4,
            per_device_train_batch_size=3,
            learning_rate=0.5,
            eval_strategy="steps",
            eval_steps=2,
            save_steps=2,
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
            dataloader_pin_memory=False,
            **options,
        )
        model: Any = tuned()
        trainer = Trainer(
            model=model, args=arguments, train_dataset=dataset, eval_dataset=dataset
        )
        resume = str(tmp_path / "checkpoint-2") if "seed" in options else None
        trainer.train(resume_from_checkpoint=resume)
        return trainer, {n: p.detach().clone() for n, p in model.named_parameters()}

    trainer, whole = trained()
    _, resumed = trained(seed=42)
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)
    trainer, best = trained(load_best_model_at_end=True)
    chosen = Path(str(trainer.state.best_model_checkpoint))
    loaded = peft.PeftModel.from_pretrained(classifier(2), chosen)
    meft.load_adapters(loaded, chosen)
    assert all(torch.equal(best[n], p) for n, p in loaded.named_parameters())
    losses = {
        e["step"]: e["eval_loss"] for e in trainer.state.log_history if "eval_loss" in e
    }
    assert chosen.name == f"checkpoint-{min(losses, key=losses.__getitem__)}"


@transformers_takes_this_peft
def test_transformers_own_lora_is_kept_as_well(tmp_path: Path) -> None:
    """`add_adapter` of a transformers model puts LoRA in without a PeftModel."""
    model: PreTrainedModel = classifier(2)
    model.add_adapter(lora(task_type=None))
    before = trainable(model)
    with pytest.warns(meft.FrozenWarning, match="classifier"):
        meft.make_reversible(model, REVERSIBLE)
    assert before < trainable(model)
    assert_twins(moved(model).train(), batch())
    with pytest.warns(meft.SavingWarning):
        model.save_pretrained(tmp_path)
    again = classifier(2)
    again.load_adapter(str(tmp_path))
    assert torch.equal(
        logits(meft.load_adapters(again, tmp_path)), logits(copy.deepcopy(model))
    )
