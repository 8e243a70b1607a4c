"""A record: a cell, its status, its measurement and its environment.

Schema history
  1  first version

Quantities are integers in bytes (`_bytes`), floats in seconds (`_seconds`) and counts
(`num_`). A quantity that was not measured is None, never 0 or a placeholder.
docs/numbers.md defines every field and how it is measured.
"""

import dataclasses
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from meft_bench.shared.cell import Cell

SCHEMA_VERSION = 1


class Status(StrEnum):
    """How a cell ended."""

    OK = "ok"
    OOM = "oom"
    TIMEOUT = "timeout"
    KILLED = "killed"
    ERROR = "error"
    SKIPPED = "skipped"


@dataclass(frozen=True, kw_only=True, slots=True)
class Measurement:
    """The measurements of one cell. Every field may be None: not measured."""

    num_parameters: int | None = None
    num_trainable_parameters: int | None = None
    num_blocks: int | None = None
    saved_bytes: int | None = None
    """Distinct storage kept for backward, parameters excluded; exact, any device."""
    resting_bytes: int | None = None
    """Parameters, gradients, optimizer state and buffers held between two steps."""
    peak_allocated_bytes: int | None = None
    """Peak tensor memory during one step, model state included."""
    peak_reserved_bytes: int | None = None
    """Peak memory taken from the driver during one step (CUDA only)."""
    peak_host_bytes: int | None = None
    """`VmHWM` of the child process: its highest resident memory, including imports."""
    nvml_process_bytes: int | None = None
    """Device memory NVML attributes to the child (CUDA only)."""
    pcie_rx_bytes: int | None = None
    """Hardware counter: bytes the device received over the link in one step."""
    pcie_tx_bytes: int | None = None
    """Hardware counter: bytes the device sent over the link in one step."""
    step_seconds: float | None = None
    """Median over the steps after warm-up."""
    step_seconds_iqr: float | None = None
    """Interquartile range of the same steps."""
    all_step_seconds: list[float] | None = None
    """Every step in order, warm-up first."""
    rival_step_seconds: float | None = None
    """Median step of the cell's `rival`, whose steps alternate with this method's."""
    step_ratio: float | None = None
    """Median over those turns of this method's step time divided by its `rival`'s."""
    step_ratio_iqr: float | None = None
    """Interquartile range of the same ratios."""
    num_steps: int | None = None
    """Number of optimizer steps done; early stopping may end below `max_steps`."""
    loss_curve: list[float | None] | None = None
    """Training loss, one value per step; None where it was not finite."""
    loss_mean: str | None = None
    """The unit over which the loss of a step is the mean.

    `labels`, or `tokens` of a language model. None in records from before micro-batches
    were weighted by their tokens.
    """
    score_name: str | None = None
    score: float | None = None
    """Metric on the evaluation split at the selected weights."""
    majority_score: float | None = None
    """The same metric for always answering the most frequent training label."""
    second_score_name: str | None = None
    second_score: float | None = None
    """Second value of the task's metric: F1 of MRPC and of SQuAD."""
    second_majority_score: float | None = None
    third_score_name: str | None = None
    third_score: float | None = None
    """Third value of the task's metric: containment of short answers."""
    third_majority_score: float | None = None
    right_rows: list[int] | None = None
    """For each evaluated row, in order: 1 where the answer is right, else 0."""
    h2d_bytes: int | None = None
    """Rows and their metadata, host to device, in one optimizer step."""
    d2h_bytes: int | None = None
    """Gradients of rows and their metadata, device to host, in one optimizer step."""
    h2d_forward_bytes: list[int] | None = None
    h2d_backward_bytes: list[int] | None = None
    h2d_update_bytes: list[int] | None = None
    d2h_forward_bytes: list[int] | None = None
    d2h_backward_bytes: list[int] | None = None
    d2h_update_bytes: list[int] | None = None
    """Both directions by phase, per block, lowest first."""
    paper_transfer_bytes: int | None = None
    """Both directions by the paper's accounting, for the same batches."""
    dense_transfer_bytes: int | None = None
    """Both directions if all rows and all gradients were transferred in every batch."""
    union_fraction: list[float] | None = None
    """Share of each block's neurons that a batch activates, the mean over batches."""
    routing_recall: list[float] | None = None
    """Recall of the router per block.

    It is the share of the neurons that tokens would keep if all were scored which they
    also keep with the router.
    """
    activation_curve: list[float] | None = None
    """Mean activations of neurons by size, as shares of the largest; 64 positions."""
    cache_hit_fraction: float | None = None
    """Share of the requested rows that were on the device."""
    num_prefetched_rows: int | None = None
    row_store_bytes: int | None = None
    """Rows and their optimizer state, in the memory where they are stored."""
    row_device_bytes: int | None = None
    """Slots for rows and their gradients on the device."""
    peak_staging_bytes: int | None = None
    """Peak of the bytes in transfer in one copy."""
    num_train_rows: int | None = None
    num_eval_rows: int | None = None
    start_deviation: float | None = None
    """Relative deviation of the last hidden state from the backbone's, before training.

    Measured without dropout: the change due to the method itself.
    """
    reconstruction_error: list[float | None] | None = None
    """Relative error of each block's rebuilt input, lowest block first.

    None where it was not finite.
    """
    gradient_error: list[float | None] | None = None
    """Relative error of each block's gradients against the stored twin.

    The lowest block is first; None where the error was not finite.
    """
    repeat_error: list[float | None] | None = None
    """Relative error of each block's gradients between two runs of the stored twin.

    It is due to kernels that sum in varying order.
    """


@dataclass(frozen=True, kw_only=True, slots=True)
class Environment:
    """The environment of a cell. Fields that the child could not report are None."""

    versions: dict[str, str]
    """Versions of Python and of the packages that can change a result."""
    commit: str | None
    dirty: bool | None
    """True when tracked files differ from `commit`; None outside a checkout."""
    code_sha256: str
    """Digest of the sources of `meft` and `meft_bench` that ran."""
    machine: str
    """Class of machine: processor or GPU model. Two classes are never compared."""
    platform: str
    cpu: str
    num_threads: int
    """Number of threads each child may use."""
    num_slots: int
    """Number of parallel cells; times are comparable between equal numbers only."""
    device_name: str | None = None
    prediction: str | None = None
    """How the numbers of a virtual GPU were predicted, and how they were validated.

    States whether they were compared with a real GPU; None where they were measured.
    """
    weights_origin: str | None = None
    """Package and version, directory, hub name, or `random weights`."""
    weights_sha256: str | None = None
    """Digest of the file of weights.

    For random weights, of the config file they were made from, if it was given by its
    path.
    """
    data_origin: str | None = None
    """Origin of the rows and which splits they are."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """Cell + status + measurement + environment; one line of JSON."""

    sweep: str
    cell: Cell
    status: Status
    message: str
    """Reason in one line; when ok empty, unless the loss was not finite."""
    started_at: str
    """UTC, ISO 8601."""
    wall_seconds: float
    measurement: Measurement
    environment: Environment

    def to_json(self) -> dict[str, Any]:
        """Return a JSON object, with its schema version and the cell's id."""
        fields = dataclasses.asdict(self)
        return {"schema_version": SCHEMA_VERSION, "cell_id": self.cell.id, **fields}

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> "Record":
        """Make a record from the result of `to_json`.

        Raises:
            ValueError: the record is of another schema version.
        """
        version = fields.get("schema_version")
        if version != SCHEMA_VERSION:
            raise ValueError(
                f"record of schema version {version!r}; this harness reads "
                f"version {SCHEMA_VERSION}"
            )
        return cls(
            sweep=fields["sweep"],
            cell=Cell.from_json(fields["cell"]),
            status=Status(fields["status"]),
            message=fields["message"],
            started_at=fields["started_at"],
            wall_seconds=fields["wall_seconds"],
            measurement=Measurement(**fields["measurement"]),
            environment=Environment(**fields["environment"]),
        )
