"""Which values make a step, and which are refused."""

import copy
import math
from typing import Any

import pytest
import torch

from library.adam_tables import FORMS, ROWS, SOURCE, USUAL, WIDTH, forms, table
from meft.errors import ConfigError
from meft.sparse.schedule import Schedule

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "nan": ({"lr": math.nan}, "`lr` of this step is nan"),
    "infinite": ({"lr": math.inf}, "`lr` of this step is inf"),
    "negative": ({"lr": -1e-3}, "not negative"),
    "decay": ({"lr": 2.0, "weight_decay": 0.5}, r"lr \* weight_decay is 2 \* 0.5 = 1"),
    "endless decay": ({"weight_decay": math.inf}, "`weight_decay` of this step is inf"),
    "beta": ({"betas": (1.0, 0.999)}, r"`betas\[0\]` of this step is 1.0"),
    "growing": ({"betas": (0.9, 0.8)}, 'update="lazy"'),
    "no eps": ({"eps": 0.0}, "`eps` of this step is 0"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_values_that_make_no_step_are_refused(case: str) -> None:
    """Before anything has changed, the count of steps included."""
    values, message = REFUSED[case]
    schedule = Schedule()
    with pytest.raises(ConfigError, match=message):
        schedule.add(**USUAL | {"lr": 1e-3} | values)
    assert schedule == Schedule()


EDGES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "lr": ({"lr": 0.0}, {"lr": -5e-324}),
    "weight_decay": ({"weight_decay": 0.0}, {"weight_decay": -5e-324}),
    "both": (
        {"lr": 0.5, "weight_decay": math.nextafter(2.0, 0.0)},
        {"lr": 0.5, "weight_decay": 2.0},
    ),
    "beta1": ({"betas": (0.0, 0.999)}, {"betas": (-5e-324, 0.999)}),
    "beta2": (
        {"betas": (0.9, math.nextafter(1.0, 0.0))},
        {"betas": (0.9, 1.0)},
    ),
    "fading": (
        {"betas": (0.5, math.nextafter(0.25, 1.0))},
        {"betas": (0.5, 0.25)},
    ),
    "eps": ({"eps": 1e-15}, {"eps": math.nextafter(1e-15, 0.0)}),
}


@pytest.mark.parametrize("edge", EDGES)
def test_the_last_value_inside_a_bound_makes_a_step(edge: str) -> None:
    """And the next floating-point number, outside of it, does not."""
    inside, outside = EDGES[edge]
    schedule = Schedule()
    schedule.add(**USUAL | {"lr": 1e-3} | inside)
    assert schedule.step == 1
    before = copy.copy(schedule)
    with pytest.raises(ConfigError):
        schedule.add(**USUAL | {"lr": 1e-3} | outside)
    assert schedule == before


@forms
def test_the_lazy_update_takes_values_that_idle_steps_could_not(form: str) -> None:
    """With both betas and eps 0, AdamW's step is lr in the direction of the gradient's
    sign, whatever the gradient's size, in every step."""
    made, schedule = table(), Schedule(idle=False)
    wanted = made.rows.clone()
    gradient = torch.full((ROWS, WIDTH), 2.0**-20)
    gradient[:, ::2] = -(2.0**20)
    for _ in range(3):
        schedule.add(lr=2.0**-7, betas=(0.0, 0.0), eps=0.0, weight_decay=0.0)
        FORMS[form].advance(made, SOURCE, gradient, schedule, idle=False)
        wanted -= 2.0**-7 * gradient.sign()
        assert torch.equal(made.rows, wanted)
