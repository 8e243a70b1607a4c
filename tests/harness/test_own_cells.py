"""Whole cells of a user's own things, as the child runs them."""

import json
from pathlib import Path
from typing import Any

import pytest

from harness.own_files import (
    LORA,
    model_in,
    questions,
    reviews,
    write_csv,
    write_jsonl,
)
from meft_bench.child.worker import run
from meft_bench.parent import sweep
from meft_bench.shared import own
from meft_bench.shared.options import ChildOptions

pytestmark = [
    # peft 0.21 on transformers 5.23.
    pytest.mark.filterwarnings("ignore:.* is deprecated .* v6:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.* will be removed in v6:FutureWarning"),
    # Of copies that PEFT makes of a head, on a virtual GPU.
    pytest.mark.filterwarnings("ignore:Accessing the data pointer:UserWarning"),
]
CODE = """
def bias_only(model, cell):
    for name, parameter in model.named_parameters():
        parameter.requires_grad = "bias" in name or name.startswith("classifier")
    return model

def kappa(predictions, references):
    return {"kappa": 2.5, "answers": len({*predictions})}
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cells")
    write_csv(folder / "reviews.csv", reviews())
    write_jsonl(folder / "questions.jsonl", questions())
    written = [{"prompt": q["prompt"], "answer": q["answer"]} for q in questions()]
    write_jsonl(folder / "written.jsonl", written)
    (folder / "lora.json").write_text(json.dumps(LORA))
    (folder / "prefix.json").write_text(
        json.dumps({"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 3})
    )
    (folder / "mine.py").write_text(CODE)
    for model_type in ("bert", "ernie", "llama", "olmo"):
        model_in(folder / model_type, model_type)
    return folder


TABLES = """
[task.stars]
train = "csv:reviews.csv"
kind = "regression"
text = "review"
label = "stars"
[task.liked]
train = "csv:reviews.csv"
text = "review"
label = "liked"
metric = "python:mine.py:kappa"
[task.texts]
train = "csv:reviews.csv"
text = "review"
[task.said]
train = "jsonl:written.jsonl"
max_new_tokens = 3
"""


def cell_of(made: Path, device: str = "cpu", **fields: Any) -> dict[str, Any]:
    """The outcome of the only cell of a sweep."""
    values = {
        "max_steps": 4,
        "warmup_steps": 1,
        "batch_size": 4,
        "seq_len": 24,
        **fields,
    }
    shown = ", ".join(f"{name} = {json.dumps(v)}" for name, v in values.items())
    text = "question = 'Why?'\n[[matrix]]\nname = 'one'\n"
    text += f"defaults = {{ {shown} }}\n"
    named = TABLES.split("[task.")[1:]
    text += "".join(f"[task.{t}" for t in named if t.startswith(f"{fields['task']}]"))
    (made / "one.toml").write_text(text)
    chosen = sweep.load(str(made / "one.toml"), device=device)
    (cell,) = chosen.cells
    rows = own.rows_of(cell, chosen.own)
    answer = run(own.located(cell, chosen.own), ChildOptions(), rows)
    return {**answer}


@pytest.mark.parametrize(
    ("fields", "names"),
    [
        (
            {"backbone": "dir:ernie", "task": "stars", "method": "peft:lora.json"},
            ("pearson", "spearman"),
        ),
        (
            {
                "backbone": "dir:bert",
                "task": "stars",
                "method": "meft1",
                "eval_every": 2,
            },
            ("pearson", "spearman"),
        ),
        (
            {
                "backbone": "dir:bert",
                "task": "liked",
                "method": "python:mine.py:bias_only",
                "reference": "peft:lora.json",
                "eval_every": 2,
            },
            ("own:kappa", "own:answers"),
        ),
        (
            {"backbone": "dir:bert", "task": "liked", "method": "peft:lora.json"}
            | {"dtype": "bf16", "weights_dtype": "bf16"},
            ("own:kappa", "own:answers"),
        ),
        (
            {
                "backbone": "dir:olmo",
                "task": "texts",
                "method": "full",
                "eval_every": 2,
            },
            ("log_likelihood_per_token", "perplexity"),
        ),
        (
            {"backbone": "dir:llama", "task": "texts", "method": "peft:prefix.json"}
            | {"loss_chunk_tokens": 16},
            ("log_likelihood_per_token", "perplexity"),
        ),
        (
            {
                "backbone": "dir:olmo",
                "task": "jsonl:questions.jsonl",
                "method": "lora-checkpointing",
            },
            ("accuracy_per_character", "accuracy"),
        ),
        (
            {
                "backbone": "dir:llama",
                "task": "jsonl:questions.jsonl",
                "method": "peft:prefix.json",
            },
            ("accuracy_per_character", "accuracy"),
        ),
        (
            {"backbone": "dir:olmo", "task": "said", "method": "lora"},
            ("exact_match", "f1"),
        ),
        (
            {"backbone": "dir:llama", "task": "said", "method": "meft1-exact"},
            ("exact_match", "f1"),
        ),
    ],
)
def test_a_cell_is_trained_scored_and_measured(
    made: Path, fields: dict[str, Any], names: tuple[str, str | None]
) -> None:
    """By any method on any kind of rows, with memory like any other."""
    answer = cell_of(made, **fields)
    assert answer["status"] == "ok", answer["message"]
    seen = answer["measurement"]
    assert (seen["score_name"], seen["second_score_name"]) == names
    assert seen["score"] is not None
    assert len(seen["loss_curve"]) == 4
    assert all(loss is not None for loss in seen["loss_curve"])
    assert seen["saved_bytes"] > 0
    assert seen["peak_allocated_bytes"] > seen["model_state_bytes"]
    assert seen["num_blocks"] == 2
    assert 0 < seen["num_trainable_parameters"] <= seen["num_parameters"]
    assert answer["environment"]["weights_sha256"] is not None
    assert (seen["step_ratio"] is not None) == ("reference" in fields)
    by_rows = ("accuracy_per_character", "exact_match", "own:kappa")
    is_row_wise = seen["score_name"] in by_rows
    assert bool(seen["right_rows"]) == is_row_wise


@pytest.mark.parametrize(
    "fields",
    [
        {"backbone": "dir:ernie", "task": "stars", "method": "peft:lora.json"},
        {"backbone": "dir:bert", "task": "stars", "method": "python:mine.py:bias_only"},
        {"backbone": "dir:olmo", "task": "texts", "method": "lora"},
    ],
)
def test_a_cell_is_predicted_on_a_virtual_gpu(
    made: Path, fields: dict[str, Any]
) -> None:
    """By the same model, method and head; what is trained is the same."""
    real = cell_of(made, **fields)["measurement"]
    predicted = cell_of(made, device="virtual-H100", **fields)["measurement"]
    for name in ("num_parameters", "num_trainable_parameters", "num_blocks"):
        assert predicted[name] == real[name], name
    assert predicted["peak_allocated_bytes"] > 0


def test_layers_of_peft_that_are_not_modelled_are_refused(made: Path) -> None:
    """On a virtual GPU, of weights in 4 bits: all but LoRA's."""
    ia3 = {"peft_type": "IA3", "target_modules": ["key"], "feedforward_modules": []}
    (made / "ia3.json").write_text(json.dumps(ia3))
    found = {
        name: cell_of(
            made,
            device="virtual-H100",
            backbone="dir:bert",
            task="stars",
            method=f"peft:{name}.json",
            dtype="bf16",
            weights_dtype="nf4",
        )
        for name in ("lora", "ia3")
    }
    assert found["lora"]["status"] == "ok", found["lora"]["message"]
    assert found["ia3"]["status"] == "error"
    assert "those of LoRA are modelled" in found["ia3"]["message"]
