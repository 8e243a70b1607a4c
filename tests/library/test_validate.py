"""Every field of both configs checks type and range, and keeps plain values."""

import copy
import dataclasses
import inspect
import math
import pickle
import pydoc
import re
from typing import Any

import numpy as np
import pytest
import torch

import meft
from meft.reversible import config as reversible
from meft.sparse import config as sparse

CONFIGS: dict[type[Any], dict[str, Any]] = {
    meft.ReversibleConfig: {"variant": "meft1"},
    meft.SparseConfig: {},
}
FIELDS = [(kind, field.name) for kind in CONFIGS for field in dataclasses.fields(kind)]
OPTIONAL = {
    "folder",
    "fraction_bits",
    "scale_1",
    "scale_2",
    "coupling",
    "span",
    "num_experts",
    "transfer_dtype",
}
INTEGERS = {
    "bottleneck_size": meft.ReversibleConfig,
    "lost_bits": meft.ReversibleConfig,
    "fraction_bits": meft.ReversibleConfig,
    "mlp_chunks": meft.ReversibleConfig,
    "num_neurons": meft.SparseConfig,
    "top_k_neurons": meft.SparseConfig,
    "num_experts": meft.SparseConfig,
    "top_k_experts": meft.SparseConfig,
    "device_bytes": meft.SparseConfig,
}


def made(kind: type[Any], **fields: Any) -> Any:
    """As `kind(**fields)`, without the type checker that these tests run under, which
    would refuse values of other types itself."""
    config = object.__new__(kind)
    for field in dataclasses.fields(kind):
        value = (CONFIGS[kind] | fields).get(field.name, field.default)
        object.__setattr__(config, field.name, value)
    config.__post_init__()
    return config


def refused(kind: type[Any], name: str, value: Any) -> str:
    options = {"arithmetic": "float"} if name.startswith("scale") else {}
    with pytest.raises(meft.ConfigError, match=f"^`{name}` must be ") as error:
        made(kind, **options, **{name: value})
    return str(error.value)


def test_every_field_has_an_expectation() -> None:
    """In the order of the fields."""
    for kind, module in (
        (meft.ReversibleConfig, reversible),
        (meft.SparseConfig, sparse),
    ):
        names = [field.name for field in dataclasses.fields(kind)]
        assert list(module._EXPECTED) == names


@pytest.mark.parametrize(("kind", "name"), FIELDS)
def test_values_of_other_types_are_refused(kind: type[Any], name: str) -> None:
    """The message begins with the field and has the value and what is expected."""
    for value in (object(), [], {}, "yes", "8", 2.5, math.nan, float("inf"), (1,)):
        if name.startswith("scale") and value == 2.5:
            continue
        if name == "folder" and isinstance(value, str):
            continue
        message = refused(kind, name, value)
        assert f"got {value!r}" in message
    if name in ("variant", "adapter", "lost_bits"):  # None stands for another value
        assert "None" in refused(kind, name, object())
    elif name in OPTIONAL:
        options = {"arithmetic": "float"} if name.startswith("scale") else {}
        assert getattr(made(kind, **options, **{name: None}), name) is None
        assert "None is allowed" in refused(kind, name, object())
    else:
        assert "got None" in refused(kind, name, None)


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_misspelt_field_is_named_with_the_nearest(kind: Any) -> None:
    """By the class, `dataclasses.replace` and `from_json`. Where no field is near, the
    message lists them all."""
    for field in dataclasses.fields(kind):
        name = field.name
        message = f"has no field '{name}x'; did you mean '{name}'?"
        with pytest.raises(TypeError, match=re.escape(message)):
            kind(**CONFIGS[kind], **{f"{name}x": 3})
        with pytest.raises(TypeError, match=re.escape(message)):
            dataclasses.replace(kind(**CONFIGS[kind]), **{f"{name}x": 3})
        with pytest.raises(meft.ConfigError, match=f"did you mean '{name}'"):
            kind.from_json(kind(**CONFIGS[kind]).to_json() | {f"{name}x": 3})
    with pytest.raises(TypeError, match=r"no field 'qqq'; expected one of \['"):
        kind(**CONFIGS[kind], qqq=3)
    with pytest.raises(TypeError, match="positional"):
        kind(3)


@pytest.mark.parametrize("kind", CONFIGS)
def test_configs_are_ordinary_dataclasses(kind: Any) -> None:
    """Signature, help, copies, pickles, equality and what is frozen."""
    config = kind(**CONFIGS[kind])
    parameters = inspect.signature(kind).parameters
    assert [*parameters] == [field.name for field in dataclasses.fields(kind)]
    for field in dataclasses.fields(kind):
        assert parameters[field.name].kind is inspect.Parameter.KEYWORD_ONLY
        default = parameters[field.name].default
        assert default == field.default or field.default is dataclasses.MISSING
        assert parameters[field.name].annotation == field.type
    assert f"{kind.__name__}(*, {next(iter(parameters))}: " in pydoc.render_doc(kind)
    for copied in (
        pickle.loads(pickle.dumps(config)),
        copy.deepcopy(config),
        dataclasses.replace(config),
        kind.from_json(config.to_json()),
    ):
        assert copied == config
        assert hash(copied) == hash(config)
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(config, next(iter(parameters)), 3)
    assert not hasattr(config, "__dict__")


@pytest.mark.parametrize("name", INTEGERS)
def test_integers_of_every_kind_become_ints(name: str) -> None:
    """Of numpy and torch too; floats and bools do not, nor do strings."""
    kind: Any = INTEGERS[name]
    default = 8 if name != "num_experts" else 320
    options = {"top_k_neurons": 8} if name == "num_neurons" else {}
    options |= {"num_experts": 0} if name == "num_neurons" else {}
    for value in (np.int64(default), np.uint16(default), torch.tensor(default)):
        config = made(kind, **options, **{name: value})
        assert type(getattr(config, name)) is int
        assert config == made(kind, **options, **{name: default})
        assert kind.from_json(config.to_json()) == config
    for wrong in (float(default), np.float64(default), str(default), True, np.True_):
        assert "must be an integer" in refused(kind, name, wrong)


def test_numbers_strings_and_booleans_become_plain() -> None:
    config = made(meft.ReversibleConfig, arithmetic="float", scale_1=np.float32(0.5))
    assert type(config.scale_1) is float
    assert (
        type(made(meft.ReversibleConfig, arithmetic="float", scale_2=1).scale_2)
        is float
    )
    assert type(made(meft.SparseConfig, prefetch=np.False_).prefetch) is bool
    assert type(made(meft.ReversibleConfig, variant=np.str_("meft2")).variant) is str
    for wrong in (0, 1, "yes", "False", None):
        assert "True or False" in refused(meft.SparseConfig, "prefetch", wrong)


def test_a_span_is_two_integers() -> None:
    """A list, as JSON has it, becomes a tuple."""
    for span in ([1, 2], (np.int64(1), 2), np.array([1, 2])):
        config = made(meft.ReversibleConfig, span=span)
        assert config.span == (1, 2)
        assert type(config.span[0]) is int
        assert hash(config) == hash(made(meft.ReversibleConfig, span=(1, 2)))
    for wrong in (2, (0,), (0, 1, 2), (0.0, 2.0), "02", (2, 2), (-1, 2), (3, 1)):
        assert "first < end" in refused(meft.ReversibleConfig, "span", wrong)
