"""A record: a cell, how it ended, what was seen, and where.

Schema history
  1  first version

Quantities are integers in bytes (`_bytes`), floats in seconds (`_seconds`) and counts
(`num_`). A quantity that was not measured is None, never 0 and never a stand-in. What
every field means and how it is measured is in docs/numbers.md.
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
    """What the meters saw for one cell. Every field may be None: not measured."""

    num_parameters: int | None = None
    num_trainable_parameters: int | None = None
    num_blocks: int | None = None
    saved_bytes: int | None = None
    """Distinct storage kept for backward, parameters excluded; exact, any device."""
    resting_bytes: int | None = None
    """Parameters, gradients, optimizer state and buffers held between two steps."""
    peak_allocated_bytes: int | None = None
    """Highest tensor memory during one step, resting memory included."""
    peak_reserved_bytes: int | None = None
    """Highest memory taken from the driver during one step (CUDA only)."""
    peak_host_bytes: int | None = None
    """`VmHWM` of the child process: its highest resident memory, all imports in."""
    nvml_process_bytes: int | None = None
    """Device memory NVML attributes to the child (CUDA only)."""
    pcie_rx_bytes: int | None = None
    """Hardware counter: bytes the device received over the link in one step."""
    pcie_tx_bytes: int | None = None
    """Hardware counter: bytes the device sent over the link in one step."""
    step_seconds: float | None = None
    """Median over the steps after warm-up."""
    step_seconds_iqr: float | None = None
    """Distance between the quartiles of the same steps."""
    all_step_seconds: list[float] | None = None
    """Every step in order, warm-up first."""
    rival_step_seconds: float | None = None
    """Median step of the cell's `rival`, whose steps took turns with this method's."""
    step_ratio: float | None = None
    """Median over those turns of this method's step by its rival's."""
    step_ratio_iqr: float | None = None
    """Distance between the quartiles of the same ratios."""
    num_steps: int | None = None
    """Optimizer steps done, which early stopping may end below `max_steps`."""
    loss_curve: list[float | None] | None = None
    """Training loss, one value a step; None where it was not finite."""
    loss_mean: str | None = None
    """What the loss of a step is the mean over: `labels`, or `tokens` of a language
    model. None in records from before micro-batches were weighted by their tokens."""
    score_name: str | None = None
    score: float | None = None
    """Metric on the evaluation split at the selected weights."""
    majority_score: float | None = None
    """The same metric for always answering the most frequent training label."""
    second_score_name: str | None = None
    second_score: float | None = None
    """What the task's metric reports next to its score: F1 of MRPC, of SQuAD."""
    second_majority_score: float | None = None
    third_score_name: str | None = None
    third_score: float | None = None
    """Likewise: containment of short answers."""
    third_majority_score: float | None = None
    right_rows: list[int] | None = None
    """Of each evaluated row, in order: 1 where the answer is right, else 0."""
    h2d_bytes: int | None = None
    """Rows and what belongs to them, host to device, in one optimizer step."""
    d2h_bytes: int | None = None
    """Gradients of rows and what belongs to them, device to host, likewise."""
    h2d_forward_bytes: list[int] | None = None
    h2d_backward_bytes: list[int] | None = None
    h2d_update_bytes: list[int] | None = None
    d2h_forward_bytes: list[int] | None = None
    d2h_backward_bytes: list[int] | None = None
    d2h_update_bytes: list[int] | None = None
    """Both by phase, and per block, lowest first."""
    paper_transfer_bytes: int | None = None
    """Both directions by the paper's accounting, for the same batches."""
    dense_transfer_bytes: int | None = None
    """Both directions if all rows went up and all gradients down in every batch."""
    union_fraction: list[float] | None = None
    """Share of each block's neurons that a batch activates, the mean over batches."""
    routing_recall: list[float] | None = None
    """Per block: of the neurons that tokens would keep if all were scored, the share
    that the router led them to."""
    activation_curve: list[float] | None = None
    """Mean activations of neurons by size, as shares of the largest, at 64 places."""
    cache_hit_fraction: float | None = None
    """Of the rows asked for, those that were on the device."""
    num_prefetched_rows: int | None = None
    row_store_bytes: int | None = None
    """Rows and their optimizer state, where they live."""
    row_device_bytes: int | None = None
    """Slots for rows and their gradients on the device."""
    peak_staging_bytes: int | None = None
    """The most that was on its way in one copy."""
    num_train_rows: int | None = None
    num_eval_rows: int | None = None
    start_deviation: float | None = None
    """Relative deviation of the last hidden state from the backbone's, before training
    and without dropout: what the method itself changes."""
    reconstruction_error: list[float | None] | None = None
    """Relative error of each block's rebuilt input, lowest block first; None where it
    was not finite."""
    gradient_error: list[float | None] | None = None
    """Relative error of each block's gradients against the stored twin, likewise."""
    repeat_error: list[float | None] | None = None
    """Relative error of each block's gradients between two runs of the stored twin:
    what kernels that sum in varying order make of the same numbers."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Environment:
    """Where a cell ran. Fields the child could not report any more are None."""

    versions: dict[str, str]
    """Python and the packages that can change a number."""
    commit: str | None
    dirty: bool | None
    """True when tracked files differ from `commit`; None outside a checkout."""
    code_sha256: str
    """Digest of the sources of `meft` and `meft_bench` that ran."""
    machine: str
    """Class of machine: processor or GPU model. Records of two classes do not mix."""
    platform: str
    cpu: str
    num_threads: int
    """Threads each child may use."""
    num_slots: int
    """Cells run side by side; times are comparable between equal numbers only."""
    device_name: str | None = None
    prediction: str | None = None
    """How the numbers of a virtual GPU came to be, and whether a real one has been held
    against them; None where they were measured."""
    weights_origin: str | None = None
    """Package and version, directory, hub name, or `random weights`."""
    weights_sha256: str | None = None
    """Digest of the file of weights; for random weights, of the config file they were
    made from, if it was given by its path."""
    data_origin: str | None = None
    """Where the rows came from and which splits they are."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """Cell + status + measurement + environment; one line of JSON."""

    sweep: str
    cell: Cell
    status: Status
    message: str
    """One line that says why; when ok empty, unless the loss was not finite."""
    started_at: str
    """UTC, ISO 8601."""
    wall_seconds: float
    measurement: Measurement
    environment: Environment

    def to_json(self) -> dict[str, Any]:
        """The record as a JSON object, with its schema version and the cell's id."""
        fields = dataclasses.asdict(self)
        return {"schema_version": SCHEMA_VERSION, "cell_id": self.cell.id, **fields}

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> "Record":
        """The inverse of `to_json`.

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
