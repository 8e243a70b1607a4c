"""Every module, function and argument of ours that a text mentions exists."""

import ast
import dataclasses
import importlib
import inspect
import re
from collections.abc import Callable
from typing import Any

import meft
import meft.testing
import meft_bench
from harness.texts import ROOT, mentions, unknown
from meft_bench.parent.own import packages
from meft_bench.shared.cell import Cell


def test_every_dotted_name_can_be_imported() -> None:
    """Of a module, or of what is in one."""
    pattern = (
        r"(?<![\w/.@-])(?:meft|meft_bench|meft_reports)(?:\.[A-Za-z_]\w*)+\b(?![/*])"
    )
    found = mentions(pattern)
    assert len(found) > 50
    groups = {*packages.GROUPS.values()}  # of entry points
    assert (
        unknown(
            found,
            lambda name: name.endswith(".py") or name in groups or _resolves(name),
        )
        == []
    )


def _resolves(name: str) -> bool:
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        try:
            thing: Any = importlib.import_module(".".join(parts[:end]))
        except ModuleNotFoundError:
            continue
        except ImportError:  # there, and in need of what is not
            return True
        for part in parts[end:]:
            if not hasattr(thing, part):
                return False
            thing = getattr(thing, part)
        return True
    return False


def test_what_is_public_exists() -> None:
    """A message that says `meft.something` means what users may import."""
    public = {f"meft.{name}" for name in meft.__all__}
    public |= {f"meft.testing.{name}" for name in dir(meft.testing)}
    found = mentions(r"(?<=`)meft\.\w+(?:\.\w+)?(?=[`(])")
    modules = {name for name in found if (ROOT / name.replace(".", "/")).is_dir()}
    modules |= {n for n in found if (ROOT / f"{n.replace('.', '/')}.py").is_file()}
    assert unknown(found, (public | modules).__contains__) == []


def test_every_call_can_be_made() -> None:
    """In code, of a function or class of ours, with arguments it has."""
    public = _public()
    calls = mentions(
        rf"(?<=`)(?:meft\.)?(?:testing\.)?(?:{'|'.join(public)})\([^`]*\)(?=`)"
    )
    assert len(calls) > 3

    def can_be_made(text: str) -> bool:
        call = ast.parse(re.sub(r"\.\.\.|\0", "x", text), mode="eval").body
        assert isinstance(call, ast.Call)
        name = ast.unparse(call.func).rpartition(".")[2]
        known = inspect.signature(public[name]).parameters
        return {keyword.arg for keyword in call.keywords} <= set(known)

    assert unknown(calls, can_be_made) == []


FOREIGN_ARGUMENTS = {
    "assign": "torch's load_state_dict",
    "add_cross_attention": "a field of transformers' configs",
    "drop_path_rate": "a field of transformers' configs",
    "final_logit_softcapping": "a field of transformers' configs",
    "hidden_dropout": "a field of transformers' configs",
    "is_decoder": "a field of transformers' configs",
    "router_jitter_noise": "a field of transformers' configs",
    "use_parallel_residual": "a field of transformers' configs",
    "output_hidden_states": "an argument of transformers' models",
    "output_router_logits": "an argument of transformers' models",
    "create_graph": "torch.autograd.grad",
    "fullgraph": "torch.compile",
    "modules_to_save": "peft's LoraConfig",
    "activation_checkpointing": "transformers' TrainingArguments",
    "gradient_checkpointing": "transformers' TrainingArguments",
    "use_gradient_checkpointing": "peft's prepare_model_for_kbit_training",
}


def test_every_argument_exists() -> None:
    """What a message sets, in code: an argument, or a field of a config or a cell."""
    known = {field.name for field in dataclasses.fields(Cell)}
    for thing in _public().values():
        known |= set(inspect.signature(thing).parameters)
    found = mentions(r"(?<=`)[a-z_]+(?= ?=[^=])", ".py")
    assert unknown(found, (known | set(FOREIGN_ARGUMENTS)).__contains__) == []


def _public() -> dict[str, Callable[..., Any]]:
    """Functions and configs that users may call, by name."""
    names = {name: getattr(meft, name) for name in meft.__all__}
    names |= {name: getattr(meft.testing, name) for name in dir(meft.testing)}
    names |= {name: getattr(meft_bench, name) for name in meft_bench.__all__}
    return {
        name: thing
        for name, thing in names.items()
        if getattr(thing, "__module__", "").startswith("meft")
        and not (isinstance(thing, type) and issubclass(thing, BaseException))
    }
