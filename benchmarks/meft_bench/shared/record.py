"""A record: a cell, its status, its measurement and its environment.

Schema history
  1  first version
  2  `rival`, `rival_step_seconds` and `resting_bytes` are called `reference`,
     `reference_step_seconds` and `model_state_bytes`

Quantities are integers in bytes (`_bytes`), floats in seconds (`_seconds`) and counts
(`num_`). A quantity that was not measured is None, never 0 or a placeholder.
docs/numbers.md defines every field and how it is measured.
"""

import dataclasses
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from meft_bench.shared import breakdown, json_types
from meft_bench.shared.cell import Cell
from meft_bench.shared.measurement import FIELDS, Measurement

SCHEMA_VERSION = 2


class Status(StrEnum):
    """How a cell ended."""

    OK = "ok"
    OOM = "oom"
    TIMEOUT = "timeout"
    KILLED = "killed"
    ERROR = "error"
    SKIPPED = "skipped"


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
    """Number of threads that each child, or each rank of one, may use."""
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
    project_commit: str | None = None
    """Commit of the checkout of the folder in which the command ran.

    It is that of a project that uses an installed suite; `commit` is the suite's own.
    """
    project_dirty: bool | None = None
    """True when tracked files differ from `project_commit`; None outside a checkout."""
    is_forked: bool = False
    """Whether the child was a fork of a process with all imports done.

    Its resident memory then lacks pages of libraries that it did not use.
    """
    is_gpu_shared: bool = False
    """Whether another cell of the run was on its GPU while it ran.

    Its times are then not those of the GPU, and compared with no others.
    """


@dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """Cell + status + measurement + environment; one line of JSON."""

    sweep: str
    cell: Cell
    status: Status
    message: str
    """Reason in one line; when ok a warning, or empty.

    Warnings are of a loss that was not finite, of a score that is undefined, and of
    other processes on the GPU.
    """
    started_at: str
    """UTC, ISO 8601."""
    wall_seconds: float
    measurement: Measurement
    environment: Environment
    sweep_question: str | None = None
    """The question that the sweep answers; None in records of older code."""
    sweep_caveats: str | None = None
    """What the sweep says that a reader must know, one sentence or two per line.

    None in records of older code.
    """
    log_tail: str | None = None
    """End of what the child printed, with short paths; None in records of older code.
    """
    memory_breakdown: dict[str, Any] | None = None
    """What the peak of a step consists of, as `meft_bench.shared.breakdown` defines it.

    None where there is none.
    """
    aliases: dict[str, str] | None = None
    """Short names of a method, backbone or task of the user, by what the cell holds.

    None where the user gave none.
    """

    def to_json(self) -> dict[str, Any]:
        """Return a JSON object, with its schema version and the cell's id."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {
            "schema_version": SCHEMA_VERSION,
            "cell_id": self.cell.id,
            **fields,
            "cell": self.cell.to_json(),
            "measurement": self.measurement.to_json(),
            "environment": dataclasses.asdict(self.environment),
        }

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> "Record":
        """Make a record from the result of `to_json`.

        Raises:
            ValueError: the record is of another schema version, or a field is of
                another type.
        """
        version = fields.get("schema_version")
        if version != SCHEMA_VERSION or type(version) is not int:
            raise ValueError(
                f"record of schema version {version!r}; this harness reads version "
                f"{SCHEMA_VERSION}: run the cell again into another file"
            )
        json_types.check(fields, _OWN_TYPES)
        json_types.check(fields["cell"], _types(Cell))
        json_types.check(fields["measurement"], FIELDS)
        json_types.check(fields["environment"], _types(Environment))
        if fields.get("memory_breakdown") is not None:
            breakdown.check(fields["memory_breakdown"])
        return cls(
            sweep=fields["sweep"],
            cell=Cell.from_json(fields["cell"]),
            status=Status(fields["status"]),
            message=fields["message"],
            started_at=fields["started_at"],
            wall_seconds=fields["wall_seconds"],
            measurement=Measurement(**fields["measurement"]),
            environment=Environment(**fields["environment"]),
            sweep_question=fields.get("sweep_question"),
            sweep_caveats=fields.get("sweep_caveats"),
            log_tail=fields.get("log_tail"),
            memory_breakdown=fields.get("memory_breakdown"),
            aliases=fields.get("aliases"),
        )


def _types(cls: type[Cell] | type[Environment]) -> dict[str, Any]:
    return {field.name: field.type for field in dataclasses.fields(cls)}


_OWN_TYPES = {
    "sweep": str,
    "sweep_question": str | None,
    "sweep_caveats": str | None,
    "log_tail": str | None,
    "aliases": dict[str, str] | None,
    "status": str,
    "message": str,
    "started_at": str,
    "wall_seconds": float,
    "cell": dict[str, Any],
    "measurement": dict[str, Any],
    "environment": dict[str, Any],
}
"""Types of the fields of a record in JSON."""
