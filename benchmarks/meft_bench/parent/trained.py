"""Backbones that a sweep trains first: their weights, and the cells that had others.

The weights of a run are next to its records, `runs/NAME.models/ALIAS-KEY`, as the child
has saved them, with their digest. Weights that are gone, or are not those that were
saved, are trained again. A cell that ran on other weights than those is not done.
"""

import dataclasses
import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path

from meft_bench.shared.cell import Cell
from meft_bench.shared.own import DIGEST_OF_WEIGHTS, Own
from meft_bench.shared.record import Record
from meft_bench.shared.registry import VIRTUAL

PIECE_BYTES = 1 << 20


def with_folders(
    own: Mapping[str, Own], trainings: Mapping[str, Cell], records: Path
) -> tuple[dict[str, Own], dict[Cell, Path]]:
    """Return things of the user that say where weights are, and folders by training.

    Args:
        own: things of the user, by what cells hold.
        trainings: cells that train backbones, by what other cells hold.
        records: the records file.
    """
    root = records.with_suffix(".models").resolve()
    placed, saves = dict(own), {}
    for value, cell in trainings.items():
        folder = root / f"{own[value].alias}-{cell.key[:16]}"
        saves[cell] = folder
        placed[value] = dataclasses.replace(
            own[value], trained_in=str(folder), trained_by=cell.id
        )
    return placed, saves


def digest_in(folder: Path) -> str | None:
    """Return the sha256 of the weights in a folder; None unless they were saved so."""
    whole = folder / "model.safetensors"
    shards = sorted(folder.glob("model-*-of-*.safetensors"))
    files = [whole] if whole.is_file() else shards
    total = hashlib.sha256()
    try:
        said = (folder / DIGEST_OF_WEIGHTS).read_text(encoding="ascii").strip()
        for path in files:
            with path.open("rb") as file:
                while piece := file.read(PIECE_BYTES):
                    total.update(piece)
        is_whole = (folder / "config.json").is_file()
    except (OSError, ValueError):
        return None
    return said if is_whole and said == total.hexdigest() else None


def on_other_weights(
    done: Mapping[Cell, Record],
    trainings: Mapping[str, Cell],
    saves: Mapping[Cell, Path],
) -> set[Cell]:
    """Return cells whose record has other weights than their backbone has now.

    Where there are no weights, every cell is as it should be.

    Args:
        done: cells with their records.
        trainings: cells that train backbones, by what other cells hold.
        saves: folders by the cell that trains.
    """
    used = {cell.backbone for cell in done if needs(cell, trainings)}
    now = {value: digest_in(saves[trainings[value]]) for value in used}
    return {
        cell
        for cell, record in done.items()
        if now.get(cell.backbone) not in (None, record.environment.weights_sha256)
        and needs(cell, trainings)
    }


def needs(cell: Cell, values: Iterable[str]) -> bool:
    """Return whether a cell needs the weights of one of some backbones."""
    return cell.backbone in values and not cell.device.startswith(VIRTUAL)
