"""A store's rows, and what is kept of them while they are read, written and saved."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from library.adam_tables import (
    ROWS,
    SOURCE,
    STEPS,
    USUAL,
    WIDTH,
    gradients,
    now,
    start,
    wild,
)
from meft.errors import ConfigError
from meft.sparse import adam, idle
from meft.sparse.schedule import Schedule
from meft.sparse.store import RowStore


def store(update: str = "catchup", wire: torch.dtype = torch.bfloat16) -> RowStore:
    return RowStore(start(), wire, update)


def take_steps(
    mine: RowStore,
    first: int = 0,
    last: int = STEPS,
    look: Callable[[int, RowStore], object] = lambda step, mine: None,
) -> RowStore:
    for step, (ids, gradient) in enumerate(gradients()):
        if first <= step < last:
            if mine.schedule is None:
                mine.schedule = Schedule(idle=mine.update != "lazy")
            mine.schedule.add(**wild(step))
            mine.step(ids, gradient)
            look(step, mine)
    return mine


def contents(mine: RowStore) -> list[Tensor]:
    """State and values, in all forms."""
    state = [t for t in mine.state().values() if isinstance(t, Tensor)]
    return [*(t.clone() for t in state), mine.read(SOURCE), mine.settled().clone()]


def some_ids(step: int) -> Tensor:
    return SOURCE[(SOURCE + step) % 3 == 0]


LOOKS: dict[str, Callable[[int, RowStore], object]] = {
    "some rows, often": lambda step, mine: mine.read(some_ids(step)),
    "all keys, sometimes": lambda step, mine: step % 7 or mine.keys(),
    "master rows, sometimes": lambda step, mine: step % 11 or mine.settled(),
    "all, always": lambda step, mine: (mine.settled(), mine.read(SOURCE)),
}


@pytest.mark.parametrize("wire", [torch.float32, torch.bfloat16, torch.float16])
def test_it_makes_no_difference_when_rows_are_read(wire: torch.dtype) -> None:
    """Nor whether the update is `dense` or `catchup`: every bit of state and value."""
    wanted = contents(take_steps(store(wire=wire)))
    others = [take_steps(store(wire=wire), look=look) for look in LOOKS.values()]
    others.append(take_steps(store("dense", wire)))
    for other in others:
        for found, expected in zip(contents(other), wanted, strict=True):
            assert torch.equal(found, expected)


def test_every_way_to_read_gives_one_value() -> None:
    """`read`, `keys` and `settled`, in every step."""

    def look(step: int, mine: RowStore) -> None:
        few = mine.read(some_ids(step))
        wide = now(adam, mine._table())
        assert torch.equal(few, wide[some_ids(step)].bfloat16())
        assert torch.equal(mine.keys(), wide[:, : WIDTH // 2].bfloat16())
        assert torch.equal(mine.settled(), wide)
        assert torch.equal(mine.read(SOURCE), wide.bfloat16())

    take_steps(store(), last=120, look=look)


def test_a_version_changes_whenever_the_value_does() -> None:
    seen: dict[str, Any] = {"versions": None, "values": None, "same": 0}

    def look(step: int, mine: RowStore) -> None:
        versions, values = mine.version(SOURCE).clone(), mine.settled().clone()
        if seen["versions"] is not None:
            same = versions == seen["versions"]
            assert torch.equal(values[same], seen["values"][same])
            seen["same"] += int(same.sum())
        seen["versions"], seen["values"] = versions, values

    mine = take_steps(store(wire=torch.float32), look=look)
    assert seen["same"] > 0
    before = mine.version(SOURCE)
    changes: list[Callable[[], None]] = [lambda: mine.replace(start()), mine.begin]
    for change in changes:
        change()
        assert not (mine.version(SOURCE) == before).any()
        before = mine.version(SOURCE)


def copied(state: dict[str, Any]) -> dict[str, Any]:
    """As after saving and loading."""
    return {
        name: value.clone() if isinstance(value, Tensor) else value
        for name, value in state.items()
    }


@pytest.mark.parametrize("update", ["catchup", "lazy"])
@pytest.mark.parametrize("at", [3, 150, 249])
def test_a_store_goes_on_from_its_state(update: str, at: int) -> None:
    """Saved and loaded on the way, also just after someone has read it all."""
    whole = take_steps(store(update))
    first = take_steps(store(update), last=at)
    first.settled()
    second = store(update)
    second.assign(first.settled())
    second.refuse(first.state())
    second.load(copied(first.state()))
    take_steps(second, first=at)
    for found, wanted in zip(contents(second), contents(whole), strict=True):
        assert torch.equal(found, wanted)


def written_to(wire: torch.dtype) -> tuple[RowStore, RowStore]:
    """Two stores after some steps, in one of which rows 4 to 7 are set to 0."""
    plain, written = (take_steps(store(wire=wire), last=100) for _ in range(2))
    written.settled()[4:8] = 0
    written.assign(written.rows)
    return plain, written


def test_rows_that_are_written_to_keep_their_moments() -> None:
    """And the others every bit, also later: as if the table had not been changed."""
    plain, written = written_to(torch.bfloat16)
    assert (written.read(SOURCE[4:8]) == 0).all()
    for mine in (plain, written):
        take_steps(mine, first=100)
    others = (SOURCE < 4) | (SOURCE > 7)
    for one, other in zip(contents(plain), contents(written), strict=True):
        if len(one) == ROWS:
            assert torch.equal(one[others], other[others])
    assert torch.equal(plain.moments[1][7].ne(0), written.moments[1][7].ne(0))
    assert not torch.equal(plain.settled()[7], written.settled()[7])


@pytest.mark.slow
def test_a_row_that_is_set_to_0_moves_on_as_torchs_does() -> None:
    """By the moments that it had."""
    options = USUAL | {"lr": 1e-3, "weight_decay": 0.1}
    mine = store(wire=torch.float32)
    mine.schedule = Schedule()
    parameter = torch.nn.Parameter(start().double())
    optimizer = torch.optim.AdamW([parameter], foreach=False, **options)
    for step in range(30):
        ids = SOURCE[step % 5 :: 5] if step < 20 else SOURCE[:0]
        parameter.grad = torch.zeros(ROWS, WIDTH, dtype=torch.double)
        parameter.grad[ids] = 1e-3
        optimizer.step()
        mine.schedule.add(**options)
        mine.step(ids, torch.full((len(ids), WIDTH), 1e-3))
        if step == 22:
            with torch.no_grad():
                parameter.zero_()
            mine.settled().zero_()
            mine.assign(mine.rows)
    wanted = parameter.detach().float()
    assert wanted.abs().amin() > 1e-4
    torch.testing.assert_close(mine.settled(), wanted, rtol=1e-5, atol=1e-7)


def test_a_state_goes_with_other_rows_too() -> None:
    """Moments of the state, rows of the model, as with torch's optimizers."""
    source = take_steps(store(), last=100)
    mine = store()
    mine.assign(torch.ones(ROWS, WIDTH))
    mine.load(copied(source.state()))
    assert (mine.read(SOURCE) == 1).all()
    same = take_steps(store(), last=100)
    same.assign(torch.ones(ROWS, WIDTH))
    for one in (mine, same):
        take_steps(one, first=100, last=130)
    assert torch.equal(mine.settled(), same.settled())


@pytest.mark.parametrize(("saved", "given"), [("lazy", "catchup"), ("dense", "lazy")])
def test_the_state_of_another_update_is_refused(saved: str, given: str) -> None:
    state = take_steps(store(saved), last=5).state()
    with pytest.raises(ConfigError, match=f"update='{saved}'") as error:
        store(given).refuse(state)
    assert f"update='{given}'" in str(error.value)


@pytest.mark.parametrize("name", ["update", "factors"])
def test_the_state_of_an_earlier_release_is_refused(name: str) -> None:
    state = take_steps(store(), last=5).state()
    del state[name]
    with pytest.raises(ConfigError, match="earlier release"):
        store().refuse(state)


def test_a_state_does_not_grow_with_the_run() -> None:
    """At most tensors of the table's size, and the last step."""
    state = take_steps(store()).state()
    held = sum(value.nbytes for value in state.values() if isinstance(value, Tensor))
    assert held <= (3 * WIDTH * 4 + idle.NUM_FACTORS * 8 + 8 + 8) * ROWS
    assert all(isinstance(value, int | float) for value in state["schedule"].values())


def test_a_block_without_a_gradient_takes_no_step() -> None:
    """As torch's AdamW passes over a parameter whose `grad` is None: the steps of a
    store are its own."""
    options = USUAL | {"lr": 1e-3, "weight_decay": 0.1}
    mine = store(wire=torch.float32)
    mine.schedule = Schedule(idle=mine.update != "lazy")
    parameter = torch.nn.Parameter(start().double())
    optimizer = torch.optim.AdamW([parameter], foreach=False, **options)
    for step, (ids, gradient) in enumerate(gradients(share=0.3, steps=60)):
        parameter.grad = None
        if step % 3:
            parameter.grad = torch.zeros(ROWS, WIDTH, dtype=torch.double)
            parameter.grad[ids] = gradient.double()
            mine.schedule.add(**options)
            mine.step(ids, gradient)
        optimizer.step()
    wanted = parameter.detach().float()
    torch.testing.assert_close(mine.settled(), wanted, rtol=1e-5, atol=1e-6)
