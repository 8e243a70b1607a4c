"""Methods of a user: any config of PEFT, any function, on any model of text."""

import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from harness.own_files import LORA, SHAPE, model_in, tokenizer
from marks import slow_but_for
from meft_bench.child import backbones
from meft_bench.child.backbones import any_family
from meft_bench.child.backbones.bart import BartClassifier
from meft_bench.child.backbones.unwrapped import base_of, num_prepended
from meft_bench.child.tasks.synthetic import load, load_lm
from meft_bench.child.tasks.task import Task
from meft_bench.child.training import prepare
from meft_bench.child.training.steps import Stepper, seed_everything
from meft_bench.shared.cell import Cell
from meft_bench.shared.registry import METHODS_OF_ANY_MODEL
from meft_bench.shared.source import Source

pytestmark = [
    # peft 0.21 on transformers 5.23.
    pytest.mark.filterwarnings("ignore:.* is deprecated .* v6:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.* will be removed in v6:FutureWarning"),
    # Of layer norms, which PEFT's LN_TUNING wraps.
    pytest.mark.filterwarnings("ignore:Unsupported layer type:UserWarning"),
]
HERE = Source()
CLASSES, TOKENS = load(Cell(method="full"), HERE), load_lm(Cell(method="full"), HERE)
NUMBERS = dataclasses.replace(CLASSES, num_labels=1)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for model_type in ("bert", "ernie", "llama", "olmo"):
        model_in(folder / model_type, model_type)
    (folder / "lora.json").write_text(json.dumps(LORA))
    return folder


def stepper_of(made: Path, model: str, task: Task, **changes: Any) -> Stepper:
    fields: dict[str, Any] = {"batch_size": 4, "seq_len": 8, "method": "full"}
    is_lm = task.num_labels is None
    fields |= {"task": "synthetic-lm" if is_lm else "synthetic"}
    fields |= {"backbone": f"dir:{made / model}", **changes}
    cell = Cell(**fields)
    return prepare.apply_method(prepare.load_backbone(cell, task, HERE), cell)


def batch(task: Task, index: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(index)
    ids = torch.randint(3, 16, (4, 8), generator=generator)
    labels = ids.clone()
    if task.num_labels is not None:
        labels = ids[:, 0] % 2
    if task.num_labels == 1:
        labels = labels.float()
    return {
        "input_ids": ids,
        "token_type_ids": (torch.arange(8) > 3).long().expand(4, 8),
        "attention_mask": torch.ones_like(ids),
        "labels": labels,
    }


def losses(stepper: Stepper, task: Task, count: int = 4) -> list[float]:
    stepper.model.train()
    seed_everything(0)
    return [stepper.step([batch(task, n)], 1e-2) for n in range(count)]


def trained(stepper: Stepper) -> set[str]:
    return {n for n, p in stepper.model.named_parameters() if p.requires_grad}


def config_file(made: Path, **fields: Any) -> str:
    content = json.dumps(fields)
    path = made / f"{abs(hash(content))}.json"
    path.write_text(content)
    return f"peft:{path}"


def function(made: Path, body: str) -> str:
    path = made / f"f{abs(hash(body))}.py"
    path.write_text(f"def method(model, cell):\n{body}")
    return f"python:{path}:method"


def test_a_config_of_lora_is_the_method_lora(made: Path) -> None:
    """In every bit of every loss, with dropout, and with as many trained numbers."""
    config = f"peft:{made / 'lora.json'}"
    ours, peft = (stepper_of(made, "bert", CLASSES, method=m) for m in ("lora", config))
    count = (
        prepare.count(one.model)["num_trainable_parameters"] for one in (ours, peft)
    )
    assert len({*count}) == 1
    assert losses(ours, CLASSES) == losses(peft, CLASSES)


@pytest.mark.parametrize(
    "fields",
    [
        {
            "peft_type": "IA3",
            "target_modules": ["key", "value"],
            "feedforward_modules": [],
        },
        {"peft_type": "LN_TUNING", "target_modules": ["LayerNorm"]},
        {"peft_type": "VERA", "target_modules": ["query", "value"], "r": 4},
        {"peft_type": "LORA", "target_modules": ["query"], "use_dora": True},
        {"peft_type": "HRA", "target_modules": ["query"], "r": 4},
        {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 3},
        {"peft_type": "P_TUNING", "num_virtual_tokens": 3, "encoder_hidden_size": 8},
    ],
    ids=lambda fields: fields["peft_type"],
)
def test_every_config_trains_adapters_and_the_head(
    made: Path, fields: dict[str, Any]
) -> None:
    """The loss falls; the backbone and PEFT's frozen copy of the head do not change."""
    stepper = stepper_of(made, "bert", CLASSES, method=config_file(made, **fields))
    names = trained(stepper)
    assert any("classifier" in name for name in names)
    assert not any("original_module" in name for name in names)
    assert len(names) > 2
    before = {
        name: p.clone()
        for name, p in stepper.model.named_parameters()
        if name not in names
    }
    stepper.model.train()
    seen = [stepper.step([batch(CLASSES)], 1e-2) for _ in range(12)]
    assert min(seen[6:]) < seen[0]
    for name, parameter in stepper.model.named_parameters():
        if name in before:
            assert torch.equal(parameter, before[name]), name


def test_segments_reach_a_model_inside_of_peft(made: Path) -> None:
    """PEFT's own signature does not have `token_type_ids`."""
    stepper = stepper_of(made, "bert", CLASSES, method=f"peft:{made / 'lora.json'}")
    stepper.model.eval()
    inputs = stepper.to_device(batch(CLASSES))
    assert "token_type_ids" in inputs
    other = inputs | {"token_type_ids": torch.zeros_like(inputs["input_ids"])}
    logits = [stepper.model(**one).logits for one in (inputs, other)]
    assert not torch.equal(*logits)


@pytest.mark.parametrize("method", slow_but_for(METHODS_OF_ANY_MODEL, "head", "lora"))
@pytest.mark.parametrize("model", ["ernie", "olmo"])
def test_a_model_of_another_family_learns(made: Path, model: str, method: str) -> None:
    """With its own weights, a head that depends on the seed, and less loss."""
    task = TOKENS if model == "olmo" else CLASSES
    if (model, method) == ("olmo", "head"):
        with pytest.raises(ValueError, match="'head' trains a new head"):
            stepper_of(made, model, task, method=method)
        return
    if method.endswith("offload"):
        pytest.skip("needs a GPU")
    stepper = stepper_of(made, model, task, method=method)
    stepper.model.train()
    seen = [stepper.step([batch(task)], 1e-2) for _ in range(6)]
    assert min(seen[3:]) < seen[0]
    names = trained(stepper)
    if method == "head":
        assert names == {"classifier.weight", "classifier.bias"}
    if method == "full":
        assert len(names) == len([*stepper.model.parameters()])


def test_regression_of_any_model(made: Path) -> None:
    """One number per row, the mean squared error as loss."""
    for model in ("bert", "ernie"):
        stepper = stepper_of(made, model, NUMBERS)
        stepper.model.eval()
        inputs = stepper.to_device(batch(NUMBERS))
        out = stepper.model(**inputs)
        assert out.logits.shape == (4, 1)
        wanted = torch.nn.functional.mse_loss(out.logits[:, 0], inputs["labels"])
        assert torch.equal(out.loss, wanted)


def test_regression_of_bart() -> None:
    """Whose classifier is of the harness."""
    fields = SHAPE | {"num_labels": 1, "problem_type": "regression"}
    config = CONFIG_MAPPING["bart"](**fields)
    model: Any = BartClassifier.from_config(config)
    model.eval()
    inputs = {name: t for name, t in batch(NUMBERS).items() if name[0] != "t"}
    out = model(**inputs)
    wanted = torch.nn.functional.mse_loss(out.logits[:, 0], inputs["labels"])
    assert torch.equal(out.loss, wanted)


def test_weights_are_those_of_the_directory(made: Path) -> None:
    """And the head is not: it is new, and depends on the seed only."""
    heads = []
    for seed in (0, 0, 1):
        stepper = stepper_of(made, "ernie", CLASSES, seed=seed)
        model = base_of(stepper.model)
        loaded = type(model).from_pretrained(made / "ernie")
        name = "ernie.encoder.layer.1.output.dense.weight"
        assert torch.equal(model.get_parameter(name), loaded.get_parameter(name))
        heads.append(model.classifier.weight)
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])


def test_blocks_of_another_family_are_counted_and_cut(made: Path) -> None:
    """Deeper than the weights is refused: nothing says how to repeat the blocks."""
    assert backbones.num_blocks_of(stepper_of(made, "ernie", CLASSES).model) == 2
    cut = stepper_of(made, "ernie", CLASSES, depth=1)
    assert len(base_of(cut.model).ernie.encoder.layer) == 1
    with pytest.raises(ValueError, match=r"`depth` is 3, but .* has 2 blocks"):
        stepper_of(made, "ernie", CLASSES, depth=3)


@pytest.mark.parametrize(
    ("model", "task", "changes", "words"),
    [
        ("ernie", CLASSES, {"method": "meft1"}, "'meft1' needs a family"),
        (
            "ernie",
            CLASSES,
            {"blocks": "compiled"},
            "`blocks` = 'compiled' needs a family",
        ),
        ("ernie", CLASSES, {"mlp_chunks": 2}, "`mlp_chunks` = 2 needs a family"),
        ("ernie", CLASSES, {"seq_len": 41}, "positions for 40 tokens"),
        ("olmo", TOKENS, {"loss_chunk_tokens": 4}, "leave out `loss_chunk_tokens` = 4"),
    ],
)
def test_what_needs_a_family_is_refused(
    made: Path, model: str, task: Task, changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        stepper_of(made, model, task, **changes)


def test_text_needs_a_causal_model(made: Path) -> None:
    """A masked one would see the token that it should predict."""
    chosen = Cell(
        method="full", backbone=f"dir:{made / 'ernie'}", task="data:x", seq_len=8
    )
    with pytest.raises(ValueError, match="sees the tokens that task 'data:x'"):
        backbones.load(chosen, None, HERE)
    with pytest.raises(ValueError, match=r"no causal language model of .*'mpnet'"):
        any_family.factory_name(CONFIG_MAPPING["mpnet"](), chosen, None)


@pytest.mark.parametrize("name", ["config", "function", "full", "head", "lora"])
def test_mlps_in_parts_are_the_same_function(made: Path, name: str) -> None:
    """For every method that leaves blocks as they are; the gradients are equal, too."""
    methods = {
        "config": config_file(made, **LORA | {"lora_dropout": 0.0}),
        "function": function(made, "    return model\n"),
    }
    method = methods.get(name, name)
    seen = []
    for num_parts in (1, 3):
        stepper = stepper_of(made, "bert", CLASSES, method=method, mlp_chunks=num_parts)
        stepper.model.eval()  # without dropout, whose masks have other shapes
        steps = [stepper.step([batch(CLASSES, n)], 1e-2) for n in range(3)]
        seen.append(torch.tensor(steps))
        kinds = {type(m).__name__ for m in stepper.model.modules()}
        assert ("ChunkedBlock" in kinds) == (num_parts > 1)
    torch.testing.assert_close(*seen)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("    model.gradient_checkpointing_enable()\n    return model\n", "checkpoint"),
        (
            "    import torch\n"
            "    model.bert.encoder.layer = torch.nn.ModuleList(\n"
            "        [*model.bert.encoder.layer][:1])\n"
            "    return model\n",
            "replaces the blocks",
        ),
    ],
)
def test_parts_of_blocks_that_are_others_are_refused(
    made: Path, body: str, words: str
) -> None:
    with pytest.raises(ValueError, match=f"`mlp_chunks` = 2 with .*{words}"):
        stepper_of(made, "bert", CLASSES, method=function(made, body), mlp_chunks=2)


@pytest.mark.parametrize(
    "fields", [None, {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 3}]
)
def test_the_loss_in_chunks_is_the_same(
    made: Path, fields: dict[str, Any] | None
) -> None:
    """For LoRA and for tokens that PEFT puts before a row."""
    lora = LORA | {"lora_dropout": 0.0, "target_modules": ["q_proj"]}
    method = config_file(made, **fields or lora)
    seen = []
    for chunk in (0, 4):
        stepper = stepper_of(
            made, "llama", TOKENS, method=method, loss_chunk_tokens=chunk
        )
        seen.append(torch.tensor(losses(stepper, TOKENS)))
    torch.testing.assert_close(*seen)


@pytest.mark.parametrize("model", ["llama", "olmo"])
@pytest.mark.parametrize("kind", ["LORA", "PROMPT_TUNING", "PREFIX_TUNING"])
def test_logits_at_places_are_those_of_all_places(
    made: Path, model: str, kind: str
) -> None:
    """Counted in the row's own tokens, whatever a method puts before them."""
    fields: dict[str, Any] = {"peft_type": kind}
    fields |= (
        {"target_modules": ["q_proj"]} if kind == "LORA" else {"num_virtual_tokens": 3}
    )
    stepper = stepper_of(made, model, TOKENS, method=config_file(made, **fields))
    stepper.model.eval()
    inputs = batch(TOKENS)
    del inputs["labels"]
    places = torch.tensor([2, 5])
    with torch.no_grad():
        found = stepper.logits_at(inputs, places)
        every = stepper.model(**stepper.to_device(inputs)).logits
    begin = num_prepended(stepper.model)
    assert begin == (3 if kind == "PROMPT_TUNING" else 0)
    assert every.shape[1] == 8 + begin
    torch.testing.assert_close(found, every[:, begin + places])


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("    pass\n", "returned NoneType, expected the model"),
        ("    import torch\n    return torch.nn.Linear(1, 1)\n", "without `config`"),
        ("    model.requires_grad_(False)\n    return model\n", "nothing is trained"),
    ],
)
def test_a_function_returns_a_model_that_learns(
    made: Path, body: str, words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        stepper_of(made, "bert", CLASSES, method=function(made, body))


def test_a_function_has_the_fields_of_the_cell(made: Path) -> None:
    body = "    model.rank = cell.lora_rank\n    return model\n"
    stepper = stepper_of(
        made, "ernie", CLASSES, method=function(made, body), lora_rank=3
    )
    assert stepper.model.rank == 3


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"peft_type": "LRA"}, r"has no type 'LRA'; did you mean 'LORA'\?"),
        (
            {"peft_type": "LORA", "target_modules": ["nothing"]},
            "PEFT refuses .*No modules were targeted",
        ),
        ({"peft_type": "LORA", "rank": 4}, "PEFT refuses .*rank"),
        (LORA | {"task_type": "CAUSAL_LM"}, "`task_type` = 'CAUSAL_LM', .* 'SEQ_CLS'"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(
    made: Path, fields: dict[str, Any], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        stepper_of(made, "bert", CLASSES, method=config_file(made, **fields))


def test_checkpointing_of_peft_saves_less_and_learns_the_same(made: Path) -> None:
    """Through transformers, as its users do it."""
    config = config_file(made, **LORA | {"lora_dropout": 0.0}).removeprefix("peft:")
    plain, checkpointed = (
        stepper_of(made, "bert", CLASSES, method=f"{begin}:{config}")
        for begin in ("peft", "peft-checkpointing")
    )
    assert base_of(checkpointed.model).is_gradient_checkpointing
    for one in (plain, checkpointed):
        for module in one.model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
    assert losses(plain, CLASSES) == pytest.approx(losses(checkpointed, CLASSES))


def test_the_tokenizer_of_the_tests_has_a_token_for_each_word() -> None:
    made = tokenizer()
    assert len(made) == 16
    assert made("film red?")["input_ids"] == [3, 13, 15]
    assert [*itertools.chain(made("none such")["input_ids"])] == [1, 1]
