"""Weights go with the function that they were trained for: a state dictionary that was
saved under another config is refused, whoever loads it, and everything else that people
do with state dictionaries works as before."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from transformers import (
    BertForSequenceClassification,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
)

import meft
from library.models import batch, reversible
from library.sparse import batches, config, plain_model, randomise

State = dict[str, Tensor]


def of_reversible(**fields: Any) -> Any:
    return reversible(2, **{"variant": "meft1", **fields})


def of_sparse(save_backbone: bool = False, **fields: Any) -> Any:
    model = meft.add_sparse_adapters(
        plain_model(2), config(**fields), save_backbone=save_backbone
    )
    randomise(model)
    return model


def entries(state: State) -> list[str]:
    return [name for name in state if name.endswith("._extra_state")]


OTHERS: dict[str, tuple[Callable[..., Any], dict[str, Any], str, str]] = {
    "lost_bits": (of_reversible, {"lost_bits": 1}, "`lost_bits=4`", "`lost_bits=1`"),
    "variant": (of_reversible, {"variant": "meft2"}, "'meft1'`", "`variant='meft2'`"),
    "span": (of_reversible, {"span": (0, 1)}, r"`span=\[0, 2\]`", r"`span=\[0, 1\]`"),
    "bottleneck_size": (of_reversible, {"bottleneck_size": 4}, "size=3`", "size=4`"),
    "float": (of_reversible, {"arithmetic": "float"}, "'fixed'`", "`scale_1=0.1`"),
    "top_k_neurons": (of_sparse, {"top_k_neurons": 5}, "neurons=6`", "neurons=5`"),
    "top_k_experts": (of_sparse, {"top_k_experts": 3}, "experts=4`", "experts=3`"),
    "num_neurons": (of_sparse, {"num_neurons": 256}, "neurons=64`", "neurons=256`"),
    "gate": (of_sparse, {"gate": "softmax"}, "`gate='logit'`", "`gate='softmax'`"),
}


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("name", OTHERS)
def test_a_state_dict_of_another_config_is_refused(name: str, strict: bool) -> None:
    """The message has the fields that differ, with both values; also where sizes of
    tensors differ, it comes first."""
    make, fields, saved, given = OTHERS[name]
    model = make(**fields)
    with pytest.raises(meft.AdapterFileError, match=f"{saved}.*, but .*{given}"):
        model.load_state_dict(make().state_dict(), strict=strict)


def run(
    model: Any, directory: Path, resume: Path | None = None, **options: Any
) -> Trainer:
    """Four steps with a checkpoint after each two."""
    if isinstance(model, LlamaForCausalLM):
        rows = next(batches(1, rows=8))
    else:
        rows = batch(rows=8, padded=False)
    dataset = [{name: tensor[i] for name, tensor in rows.items()} for i in range(8)]
    arguments = TrainingArguments(
        output_dir=str(directory),
        max_steps=4,
        per_device_train_batch_size=2,
        save_steps=2,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
        **options,
    )
    own = isinstance(model, LlamaForCausalLM)
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=dataset,
        optimizer_cls_and_kwargs=(
            meft.optimizer_cls_and_kwargs(arguments) if own else None
        ),
    )
    trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    return trainer


@pytest.mark.parametrize("save_only_model", [False, True])
@pytest.mark.parametrize("name", ["lost_bits", "variant", "top_k_neurons"])
def test_trainer_does_not_resume_under_another_config(
    name: str, save_only_model: bool, tmp_path: Path
) -> None:
    """Refused before the first step, by what differs and not by sizes of groups."""
    make, fields, saved, given = OTHERS[name]
    options: Any = {"save_only_model": save_only_model}
    run(make(), tmp_path, **options)
    model = make(**fields)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    with pytest.raises(meft.AdapterFileError, match=f"{saved}.*, but .*{given}"):
        run(model, tmp_path, tmp_path / "checkpoint-2", **options)
    ours = {n: t for n, t in before.items() if "adapter" in n}
    assert all(torch.equal(model.get_parameter(n), t) for n, t in ours.items())


@pytest.mark.parametrize("make", [of_reversible, of_sparse])
def test_shards_and_pickled_dictionaries_of_another_config_are_refused(
    make: Any, tmp_path: Path
) -> None:
    """`load_sharded_checkpoint`, and a file of `torch.save` in place of safetensors."""
    from transformers.trainer_utils import load_sharded_checkpoint

    other = {"lost_bits": 1} if make is of_reversible else {"top_k_neurons": 5}
    make(save_backbone=True).save_pretrained(tmp_path / "shards", max_shard_size="5KB")
    load_sharded_checkpoint(make(), str(tmp_path / "shards"), strict=False)
    with pytest.raises(meft.AdapterFileError, match="another function"):
        load_sharded_checkpoint(make(**other), str(tmp_path / "shards"), strict=False)
    torch.save(make().state_dict(), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt")
    make().load_state_dict(state)
    with pytest.raises(meft.AdapterFileError, match="another function"):
        make(**other).load_state_dict(state)


def test_how_the_function_is_computed_does_not_matter() -> None:
    """Nor does a default that is written out."""
    state = of_reversible().state_dict()
    of_stack: list[dict[str, Any]] = [
        {"backward": "store", "mlp_chunks": 2, "gradient_dtype": "bfloat16"},
        {"side_buffer": "host", "on_mismatch": "redo"},
        {"coupling": "difference", "span": (0, 2)},
    ]
    for fields in of_stack:
        of_reversible(**fields).load_state_dict(state)
    state = of_sparse().state_dict()
    of_rows: list[dict[str, Any]] = [
        {"placement": "resident", "device_bytes": 10**6, "update": "lazy"},
        {"cache": "off", "prefetch": False, "transfer_dtype": "bfloat16"},
        {"num_experts": 32},
    ]
    for fields in of_rows:
        of_sparse(**fields).load_state_dict(state)


@pytest.mark.parametrize("make", [of_reversible, of_sparse])
def test_dictionaries_without_the_entry_load_as_before(make: Any) -> None:
    """Of parameters alone, or saved by an earlier release; nothing else is missing."""
    model, other = make(), make()
    parameters = dict(model.named_parameters()) | dict(model.named_buffers())
    other.load_state_dict(
        {n: t for n, t in model.state_dict().items() if n in parameters}
    )
    assert not other.load_state_dict(parameters, strict=False).missing_keys
    missing = other.load_state_dict({}, strict=False).missing_keys
    assert not entries(dict.fromkeys(missing, torch.empty(0)))


AVERAGES: dict[str, Callable[[State, State], State]] = {
    "decaying": lambda a, b: {n: 0.9 * a[n] + 0.1 * b[n] for n in a},
    "in place": lambda a, b: {
        n: a[n].clone().mul_(0.999).add_(b[n], alpha=1e-3) for n in a
    },
    "of 7": lambda a, b: {n: sum([a[n]] * 6, b[n]) / 7 for n in a},
    "lerp": lambda a, b: {n: torch.lerp(a[n], b[n], 0.3) for n in a},
    "bfloat16": lambda a, b: {n: (a[n].bfloat16() + b[n].bfloat16()) / 2 for n in a},
    "half": lambda a, b: {n: a[n].half() for n in a},
}


@pytest.mark.parametrize("name", AVERAGES)
@pytest.mark.parametrize("make", [of_reversible, of_sparse])
def test_averages_of_every_entry_load_and_are_checked(make: Any, name: str) -> None:
    """The config comes through arithmetic on every entry, over and over."""
    model = make()
    first, second = copy.deepcopy(model.state_dict()), model.state_dict()
    for _ in range(50):
        first = AVERAGES[name](first, second)
    make().load_state_dict(first)
    other = {"lost_bits": 1} if make is of_reversible else {"top_k_neurons": 5}
    with pytest.raises(meft.AdapterFileError, match="another function"):
        make(**other).load_state_dict(first)


def test_numbers_that_are_no_config_are_named_with_the_remedy() -> None:
    """Differences of two dictionaries, say; without the entry they load."""
    model = of_reversible()
    state = {name: t - t for name, t in model.state_dict().items()}
    with pytest.raises(meft.AdapterFileError, match="end in `_extra_state`"):
        model.load_state_dict(state)
    for name in entries(state):
        del state[name]
    model.load_state_dict(state)


@pytest.mark.parametrize("make", [of_reversible, of_sparse])
def test_an_averaged_model_carries_the_config(make: Any) -> None:
    model = make()
    averaged = AveragedModel(model, use_buffers=True)
    averaged.update_parameters(model)
    AveragedModel(make()).load_state_dict(averaged.state_dict())
    make().load_state_dict(averaged.module.state_dict())


@pytest.mark.parametrize("make", [of_reversible, of_sparse])
def test_a_plain_backbone_takes_what_it_knows(make: Any, tmp_path: Path) -> None:
    """`from_pretrained` reports the entry among the adapters, which it leaves out."""
    model = make(save_backbone=True)
    model.save_pretrained(tmp_path)
    kind: Any = (
        BertForSequenceClassification if make is of_reversible else LlamaForCausalLM
    )
    plain, report = kind.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    assert all("adapter" in name for name in report["unexpected_keys"])
    assert not entries(plain.state_dict())
    meft.load_adapters(plain, tmp_path)


def test_accelerate_refuses_another_config(tmp_path: Path) -> None:
    """`load_checkpoint_in_model`, before the adapters are overwritten."""
    from accelerate import Accelerator, load_checkpoint_in_model

    accelerator = Accelerator(cpu=True)
    accelerator.save_model(of_reversible(), str(tmp_path / "weights"))
    load_checkpoint_in_model(of_reversible(), str(tmp_path / "weights"))
    with pytest.raises(meft.AdapterFileError, match="`lost_bits=4`"):
        load_checkpoint_in_model(of_reversible(lost_bits=1), str(tmp_path / "weights"))


def test_a_device_map_of_accelerate_does_not_take_the_entry(tmp_path: Path) -> None:
    """It sets tensors one by one, of parameters and buffers only, and says so; without
    a `device_map` the same file loads."""
    from accelerate import Accelerator, load_checkpoint_in_model

    model = of_reversible()
    Accelerator(cpu=True).save_model(model, str(tmp_path))
    with pytest.raises(ValueError, match="buffer named _extra_state"):
        load_checkpoint_in_model(model, str(tmp_path), device_map={"": "cpu"})


def test_entries_are_on_the_cpu_whatever_the_default_device_is() -> None:
    model: nn.Module = of_reversible()
    with torch.device("meta"):
        state = model.state_dict()
    (name,) = entries(state)
    assert state[name].device.type == "cpu"
    model.load_state_dict({n: t.to("meta") for n, t in state.items()}, assign=True)
