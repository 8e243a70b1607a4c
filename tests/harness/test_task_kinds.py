"""A cell of every kind of task, from files of rows to the numbers of its record."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import BertTokenizer, LlamaConfig, LlamaForCausalLM

from harness import options_model
from harness.tiny import cell, classifier
from meft_bench.child.worker import run
from meft_bench.shared.options import ChildOptions

NUM_ROWS = 40


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a tiny BERT and its tokenizer."""
    place = tmp_path_factory.mktemp("encoder")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefgh"]
    (place / "vocab.txt").write_text("\n".join(words))
    BertTokenizer(str(place / "vocab.txt")).save_pretrained(place)
    classifier().save_pretrained(place)
    return place


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a tiny LLaMA and a tokenizer of bytes."""
    place = tmp_path_factory.mktemp("decoder")
    options_model.tokenizer().save_pretrained(place)
    config = LlamaConfig(
        vocab_size=257,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=256,
        pad_token_id=0,
        eos_token_id=0,
        bos_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(place)
    return place


def write(root: Path, folder: str, files: dict[str, str]) -> None:
    (root / folder).mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (root / folder / name).write_text(text)


def table(header: str, row: str, labels: tuple[str, ...]) -> str:
    """Rows of two texts; the label is that of the first text's word."""
    lines = [
        row.format(
            "abc"[n % len(labels)] * 3, "d" * (1 + n % 5), labels[n % len(labels)]
        )
        for n in range(NUM_ROWS)
    ]
    return "\n".join([header, *lines]) + "\n"


def measured(backbone: Path | str, data: Path, **changes: Any) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "max_steps": 3,
        "seq_len": 16,
        "eval_rows": 12,
        "learning_rate": 1e-3,
    }
    name = f"dir:{backbone}" if isinstance(backbone, Path) else backbone
    chosen = cell(**fields | {"backbone": name} | changes)
    outcome: dict[str, Any] = run(chosen, ChildOptions(data_dir=str(data)))
    assert outcome["status"] == "ok", outcome["message"]
    found: dict[str, Any] = outcome["measurement"]
    found |= {"message": outcome["message"]} | outcome["environment"]
    return found


@pytest.mark.parametrize(
    ("method", "dtype", "weights_dtype"),
    [
        ("full", "fp32", "fp32"),
        ("meft1-exact", "fp32", "fp32"),
        ("lora", "bf16", "fp32"),
        ("meft1-exact", "bf16", "bf16"),
    ],
)
def test_regression(
    method: str, dtype: str, weights_dtype: str, encoder: Path, tmp_path: Path
) -> None:
    """Pearson selects the weights, Spearman is beside it; no row is right or wrong."""
    rows = table("sentence1\tsentence2\tscore", "{}\t{}\t{}", ("0.5", "2.25", "5.0"))
    write(tmp_path, "glue/STS-B", {"train.tsv": rows, "dev.tsv": rows})
    its: dict[str, Any] = {"dtype": dtype, "weights_dtype": weights_dtype}
    its |= {"method": method, "eval_every": 1, "max_steps": 4}
    found = measured(encoder, tmp_path, task="stsb", **its)
    assert (found["score_name"], found["second_score_name"]) == ("pearson", "spearman")
    assert -1 <= found["score"] <= 1
    assert found["majority_score"] is None  # a constant correlates with nothing
    assert found["right_rows"] is None
    assert found["loss_mean"] == "labels"
    assert found["num_eval_rows"] == 12


def test_a_constant_regression_says_that_its_score_is_undefined(
    encoder: Path, tmp_path: Path
) -> None:
    """Here because all true numbers are equal."""
    rows = table("sentence1\tsentence2\tscore", "{}\t{}\t{}", ("3.0",))
    write(tmp_path, "glue/STS-B", {"train.tsv": rows, "dev.tsv": rows})
    found = measured(encoder, tmp_path, task="stsb")
    assert found["score"] is None
    assert found["message"].startswith("pearson is undefined: all predictions, or all")


def test_pairs(encoder: Path, tmp_path: Path) -> None:
    """Accuracy is the share of the right rows, F1 is beside it."""
    header = "Quality\t#1 ID\t#2 ID\t#1 String\t#2 String"
    rows = table(header, "{2}\t1\t2\t{0}\t{1}", ("0", "1"))
    write(tmp_path, "glue/MRPC", {"train.tsv": rows, "dev.tsv": rows})
    found = measured(encoder, tmp_path, task="mrpc")
    assert (found["score_name"], found["second_score_name"]) == ("accuracy", "f1")
    assert found["score"] == pytest.approx(sum(found["right_rows"]) / 12)
    assert found["majority_score"] == 0.5


def test_three_classes_in_matched_and_mismatched_rows(
    encoder: Path, tmp_path: Path
) -> None:
    """The score is of the matched rows; each part has its own number of them."""
    header = "index\tsentence1\tsentence2\tgold_label"
    classes = ("entailment", "neutral", "contradiction")
    rows = table(header, "0\t{}\t{}\t{}", classes)
    other = table(header, "0\t{}\t{}\t{}", classes[:1])
    files = {"train.tsv": rows, "dev_matched.tsv": rows, "dev_mismatched.tsv": other}
    write(tmp_path, "glue/MNLI", files)
    found = measured(encoder, tmp_path, task="mnli")
    assert found["score_name"] == "accuracy"
    assert found["second_score_name"] == "accuracy_mismatched"
    assert found["majority_score"] == pytest.approx(1 / 3)
    assert found["second_majority_score"] in (0.0, 1.0)
    assert len(found["right_rows"]) == 12
    assert (
        "score 12 of 40 official matched dev rows and 12 of 40 mismatched ones"
        in (found["data_origin"])
    )


def test_options(decoder: Path, tmp_path: Path) -> None:
    """Both rules are scored."""
    row = {"goal": "To do it,", "sol1": "do it", "sol2": "let it be"}
    lines = "".join(json.dumps(row) + "\n" for _ in range(NUM_ROWS))
    labels = "".join(f"{n % 2}\n" for n in range(NUM_ROWS))
    for part in ("train", "valid"):
        files = {f"{part}.jsonl": lines, f"{part}-labels.lst": labels}
        write(tmp_path, "piqa", files)
    found = measured(decoder, tmp_path, task="piqa", seq_len=64)
    assert found["score_name"] == "accuracy_per_character"
    assert found["second_score_name"] == "accuracy"
    assert found["score"] == 0.5  # the same question each time, two answers
    assert found["loss_mean"] == "tokens"


def test_words(decoder: Path, tmp_path: Path) -> None:
    """Answers are generated, and scored by the rules of the data set."""
    rows = "".join(
        json.dumps({"question": f"who {n}", "answer": ["ab", "cd"]}) + "\n"
        for n in range(NUM_ROWS)
    )
    for name in ("NQ-open.train.jsonl", "NQ-open.dev.jsonl"):
        write(tmp_path, "nq-open", {name: rows})
    found = measured(decoder, tmp_path, task="nq-open", seq_len=64, eval_rows=3)
    names = [found[f"{rank}score_name"] for rank in ("", "second_", "third_")]
    assert names == ["exact_match", "f1", "contains"]
    assert found["majority_score"] == 1.0
    assert found["num_eval_rows"] == 3


@pytest.mark.parametrize("method", ["full", "meft1-exact"])
def test_images(method: str, tmp_path: Path) -> None:
    """A ViT of random weights is trained on real digits and is scored on others."""
    found = measured(
        *("random:vit-tiny", tmp_path),
        task="digits",
        method=method,
        seq_len=17,
        batch_size=32,
        max_steps=6,
        eval_rows=0,
    )
    assert found["score_name"] == "accuracy"
    assert found["num_eval_rows"] == 360
    assert found["num_train_rows"] == 1294
    assert found["majority_score"] < 0.12
    assert found["loss_curve"][-1] < found["loss_curve"][0]
    assert "CC BY 4.0" in found["data_origin"]
    assert "there is no official split" in found["data_origin"]
