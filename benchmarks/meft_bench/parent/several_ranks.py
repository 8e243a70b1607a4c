"""Which cells several ranks can train together, checked before any child starts."""

from meft_bench.shared import methods, registry
from meft_bench.shared.cell import Cell

OPTIMIZERS = ("adamw", "adamw-fused", "sgd")
"""Optimizers that read gradients once they are averaged over ranks, and no earlier."""


def check(cell: Cell) -> None:
    """Raise `ValueError` unless the ranks of a cell can train it, or it has one."""
    if cell.ranks == 1:
        if cell.parallel != "ddp":
            raise ValueError(
                f"`parallel` = {cell.parallel!r} with `ranks` = 1 shards nothing: set "
                "`ranks` to 2 or more, or leave it out"
            )
        return
    if cell.batch_size % cell.ranks:
        more = cell.batch_size + -cell.batch_size % cell.ranks
        raise ValueError(
            f"`batch_size` = {cell.batch_size} with `ranks` = {cell.ranks}, each of "
            f"which trains on an equal part of it: take a multiple, such as {more}"
        )
    if cell.device.startswith(registry.VIRTUAL):
        raise ValueError(
            f"`ranks` = {cell.ranks} on device {cell.device!r}, which predicts cells "
            "of one process: leave it out, or predict a script with `--ranks`"
        )
    _check_method(cell)
    if cell.optimizer not in OPTIMIZERS:
        raise ValueError(
            f"`optimizer` = {cell.optimizer!r} with `ranks` = {cell.ranks}: no test "
            "shows that it waits for gradients to be averaged; take "
            f"{', '.join(map(repr, OPTIMIZERS))}, or leave `ranks` out"
        )
    _check_options(cell)


def _check_options(cell: Cell) -> None:
    one_process = [
        ("reference", bool(cell.reference), "leave it out"),
        ("blocks", cell.blocks != "eager", "take 'eager'"),
        ("weights_dtype", cell.is_quantised, f"take {cell.dtype!r}"),
    ]
    not_sharded = [
        ("mlp_chunks", cell.mlp_chunks > 1, "take 1"),
        ("loss_chunk_tokens", cell.loss_chunk_tokens > 0, "take 0"),
        ("dtype", cell.dtype == "fp16", "take 'bf16'"),
    ]
    rules = [(*rule, "`ranks` = 1") for rule in one_process]
    if cell.parallel == "fsdp2":
        rules += [(*rule, "`parallel` = 'ddp'") for rule in not_sharded]
    for name, is_refused, remedy, other in rules:
        if is_refused:
            raise ValueError(
                f"`{name}` = {getattr(cell, name)!r} with `ranks` = {cell.ranks} and "
                f"`parallel` = {cell.parallel!r}, which do not go together: {remedy}, "
                f"or {other}"
            )


def _check_method(cell: Cell) -> None:
    ways = methods.of(cell.method).parallel
    if cell.parallel in ways:
        return
    able = [n for n, m in methods.TABLE.items() if cell.parallel in m.parallel]
    other = (
        f"take `parallel` = {ways[0]!r}, or" if ways else "leave `ranks` out, or take"
    )
    raise ValueError(
        f"`method` = {cell.method!r} with `ranks` = {cell.ranks} and `parallel` = "
        f"{cell.parallel!r}, which cannot train it: {other} a method such as "
        f"{', '.join(able[:3])}"
    )
