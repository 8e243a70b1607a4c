"""The table of facts: every column of the frame, once.

Where a value lies in a record, its dtype, its unit, whether lower is better and what
it means are said here and nowhere else. The reader, the tables, the page's legend and
the thresholds of `check` all look things up in `COLUMNS`. The harness's own account of
how each number is measured is docs/numbers.md.
"""

from dataclasses import dataclass
from typing import Literal

from meft_reports.errors import UnknownName

SCHEMA_VERSION = 1
"""The version of the record format that this table describes."""

Section = Literal["", "cell", "measurement", "environment", "versions", "derived"]
Dtype = Literal["string", "Int64", "Float64", "boolean", "list"]
Unit = Literal["", "bytes", "seconds", "count", "fraction"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Column:
    """What is known of one column before any record is read."""

    name: str
    section: Section
    """Part of the record that holds the value; "" for its top level."""
    dtype: Dtype
    """pandas nullable dtype; `list` holds lists of floats in an object column."""
    unit: Unit = ""
    lower_is_better: bool | None = None
    """None where neither direction is an improvement."""
    required: bool = False
    """A record without a value here is refused."""
    default: str | int | None = None
    """What older records meant, which lack the field."""
    meaning: str

    @property
    def key(self) -> str:
        """The name of the value inside its section."""
        return self.name.removesuffix("_version") if self.versioned else self.name

    @property
    def versioned(self) -> bool:
        """Whether the value is one entry of the environment's `versions`."""
        return self.section == "versions"

    @property
    def short_name(self) -> str:
        """The name without its unit: `peak_allocated` for `peak_allocated_bytes`."""
        return self.name.removesuffix("_bytes")


def _top(name: str, dtype: Dtype, meaning: str, unit: Unit = "") -> Column:
    return Column(
        name=name, section="", dtype=dtype, unit=unit, required=True, meaning=meaning
    )


def _cell(name: str, dtype: Dtype, meaning: str, unit: Unit = "") -> Column:
    return Column(
        name=name,
        section="cell",
        dtype=dtype,
        unit=unit,
        required=True,
        meaning=meaning,
    )


def _later_cell(
    name: str, dtype: Dtype, meaning: str, default: str | int, unit: Unit = ""
) -> Column:
    return Column(
        name=name,
        section="cell",
        dtype=dtype,
        unit=unit,
        default=default,
        meaning=meaning,
    )


def _seen(
    name: str,
    dtype: Dtype,
    meaning: str,
    unit: Unit = "",
    lower_is_better: bool | None = None,
) -> Column:
    return Column(
        name=name,
        section="measurement",
        dtype=dtype,
        unit=unit,
        lower_is_better=lower_is_better,
        meaning=meaning,
    )


def _where(name: str, dtype: Dtype, meaning: str, required: bool = False) -> Column:
    return Column(
        name=name,
        section="environment",
        dtype=dtype,
        required=required,
        meaning=meaning,
    )


def _version(package: str) -> Column:
    return Column(
        name=f"{package}_version",
        section="versions",
        dtype="string",
        meaning=f"version of {package}",
    )


def _derived(
    name: str,
    dtype: Dtype,
    meaning: str,
    unit: Unit = "",
    lower_is_better: bool | None = None,
) -> Column:
    return Column(
        name=name,
        section="derived",
        dtype=dtype,
        unit=unit,
        lower_is_better=lower_is_better,
        meaning=meaning,
    )


COLUMNS: tuple[Column, ...] = (
    _top("cell_id", "string", "readable name of the cell; the join key"),
    _top("sweep", "string", "the declared set of cells it belongs to"),
    _top("status", "string", "ok, oom, timeout, killed, error or skipped"),
    _top("message", "string", "why, in one line, when the status is not ok"),
    _top("started_at", "string", "UTC, ISO 8601"),
    _top("wall_seconds", "Float64", "the whole child process, imports in", "seconds"),
    _derived("source", "string", "`measured`: the cell was really run"),
    _cell("method", "string", "way of fine-tuning"),
    _cell("backbone", "string", "the pre-trained model that is fine-tuned"),
    _cell("depth", "Int64", "blocks asked for; 0 takes the backbone's own", "count"),
    _cell("dtype", "string", "compute dtype"),
    _later_cell("weights_dtype", "string", "dtype of the backbone's weights", "fp32"),
    _cell("batch_size", "Int64", "rows per step", "count"),
    _cell("seq_len", "Int64", "tokens per row, or where rows are truncated", "count"),
    _cell("task", "string", "labelled text to learn; `synthetic` has shapes only"),
    _cell("seed", "Int64", "seeds the head, adapters, dropout and order of rows"),
    _cell("device", "string", "cpu or cuda"),
    _cell("learning_rate", "Float64", "peak of the linear schedule"),
    _cell("max_steps", "Int64", "optimizer steps at most, warm-up in", "count"),
    _cell("warmup_steps", "Int64", "first steps, not in `step_seconds`", "count"),
    _cell("eval_every", "Int64", "steps between validations; 0 for none", "count"),
    _cell("patience", "Int64", "validations without gain before stopping", "count"),
    _cell("train_rows", "Int64", "rows to train on; 0 takes all", "count"),
    _cell("eval_rows", "Int64", "rows to score on; 0 takes all", "count"),
    _cell("bottleneck_size", "Int64", "inner width of each adapter", "count"),
    _cell("lora_rank", "Int64", "rank of each LoRA pair", "count"),
    _later_cell("lost_bits", "Int64", "k of the scale 2^-k, exact methods", 4, "count"),
    _later_cell(
        "reversible_blocks",
        "Int64",
        "lowest blocks that MEFT rebuilds, the others store; 0 rebuilds all",
        0,
        "count",
    ),
    _later_cell("mlp_chunks", "Int64", "parts that MEFT runs an MLP in", 1, "count"),
    _later_cell("attention", "string", "kernel of attention", "sdpa"),
    _later_cell("blocks", "string", "eager, or compiled by torch.compile", "eager"),
    _later_cell("rival", "string", "method timed in turn with this one", ""),
    _seen("num_parameters", "Int64", "all parameters", "count"),
    _seen("num_trainable_parameters", "Int64", "those that train", "count", True),
    _derived(
        "trainable_fraction", "Float64", "share of parameters that train", "fraction"
    ),
    _seen("num_blocks", "Int64", "transformer layers of the model that ran", "count"),
    _seen(
        "saved_bytes",
        "Int64",
        "distinct storage kept for backward, parameters excluded; exact",
        "bytes",
        True,
    ),
    _seen(
        "resting_bytes",
        "Int64",
        "parameters, gradients, optimizer state, buffers held between two steps",
        "bytes",
        True,
    ),
    _seen(
        "peak_allocated_bytes",
        "Int64",
        "highest tensor memory during one step, resting memory included",
        "bytes",
        True,
    ),
    _derived(
        "peak_activation_bytes",
        "Int64",
        "what that step needed above `resting_bytes`",
        "bytes",
        True,
    ),
    _seen(
        "peak_reserved_bytes",
        "Int64",
        "highest memory taken from the driver during one step (CUDA only)",
        "bytes",
        True,
    ),
    _seen(
        "peak_host_bytes",
        "Int64",
        "highest resident memory of the child process (VmHWM), all imports in",
        "bytes",
        True,
    ),
    _seen(
        "nvml_process_bytes",
        "Int64",
        "device memory that NVML attributes to the child (CUDA only)",
        "bytes",
        True,
    ),
    _seen(
        "pcie_rx_bytes",
        "Int64",
        "hardware counter: received over the link in one step (CUDA only)",
        "bytes",
        True,
    ),
    _seen(
        "pcie_tx_bytes",
        "Int64",
        "hardware counter: sent over the link in one step (CUDA only)",
        "bytes",
        True,
    ),
    _seen(
        "step_seconds",
        "Float64",
        "one optimizer step: median over the steps after warm-up",
        "seconds",
        True,
    ),
    _seen(
        "step_seconds_iqr",
        "Float64",
        "distance between the quartiles of the same steps",
        "seconds",
        True,
    ),
    _seen("all_step_seconds", "list", "every step in order, warm-up first", "seconds"),
    _seen(
        "rival_step_seconds",
        "Float64",
        "one step of the rival: median over its turns",
        "seconds",
    ),
    _seen(
        "step_ratio",
        "Float64",
        "step by the rival's step: median over their turns",
        "fraction",
        True,
    ),
    _seen(
        "step_ratio_iqr",
        "Float64",
        "distance between the quartiles of the same ratios",
        "fraction",
        True,
    ),
    _seen("num_steps", "Int64", "optimizer steps done", "count"),
    _seen("loss_curve", "list", "training loss, one value a step"),
    _seen("score_name", "string", "the metric behind `score`"),
    _seen(
        "score",
        "Float64",
        "metric on the evaluation split at the selected weights",
        "fraction",
        False,
    ),
    _seen(
        "majority_score",
        "Float64",
        "same metric for always answering the most frequent training label",
        "fraction",
    ),
    _seen("second_score_name", "string", "the metric behind `second_score`"),
    _seen(
        "second_score",
        "Float64",
        "what the task's metric reports beside its score",
        "fraction",
        False,
    ),
    _seen(
        "second_majority_score",
        "Float64",
        "second score of always answering the most frequent training label",
        "fraction",
    ),
    _seen("num_train_rows", "Int64", "rows trained on", "count"),
    _seen("num_eval_rows", "Int64", "rows scored on", "count"),
    _seen(
        "start_deviation",
        "Float64",
        "relative deviation of the last hidden state from the backbone's at the start",
        "fraction",
        True,
    ),
    _seen(
        "reconstruction_error",
        "list",
        "relative error of each block's rebuilt input, lowest block first",
        "fraction",
    ),
    _seen(
        "gradient_error",
        "list",
        "relative error of each block's gradients against the stored twin",
        "fraction",
    ),
    _version("python"),
    _version("torch"),
    _version("transformers"),
    _version("peft"),
    _version("numpy"),
    _derived("versions", "string", "all versions, as a JSON object"),
    _where("commit", "string", "commit of the checkout that ran"),
    _where("dirty", "boolean", "whether tracked files differed from the commit"),
    _where("code_sha256", "string", "digest of the sources that ran", True),
    _where("machine", "string", "class of machine: processor or GPU model", True),
    _where("platform", "string", "operating system", True),
    _where("cpu", "string", "processor", True),
    _where("num_threads", "Int64", "threads each child may use", True),
    _where("num_slots", "Int64", "cells run side by side", True),
    _where("device_name", "string", "the accelerator; empty on cpu"),
    _where("weights_origin", "string", "package, directory, hub, or random weights"),
    _where("weights_sha256", "string", "digest of the weights file"),
    _where("data_origin", "string", "where the rows came from, and the splits"),
)
"""Every column, in the order of the frame."""

BY_NAME = {column.name: column for column in COLUMNS}
CELL_FIELDS = tuple(column.name for column in COLUMNS if column.section == "cell")
MEASURED = tuple(
    column
    for column in COLUMNS
    if column.section in ("measurement", "derived")
    and column.dtype in ("Int64", "Float64")
)
"""The columns that `check` compares: one number per cell. What is derived from others
is not in a record, so `baseline` reports what it is derived from."""


def find_measured(name: str) -> Column:
    """The measured column called `name`, in full or without `_bytes`.

    Raises:
        UnknownName: no column of numbers is called so.
    """
    for column in MEASURED:
        if name in (column.name, column.short_name):
            return column
    raise UnknownName("column", name, [column.short_name for column in MEASURED])
