"""Saving and loading a converted model by the methods of transformers and peft.

`save_pretrained` of a converted model, which `Trainer` and `push_to_hub` call, writes
what was trained and the config of `meft.save_adapters`, and not the frozen backbone, as
peft does. The tensors are in `model.safetensors`, where `Trainer` looks for them when
it resumes or loads the best checkpoint. With `save_backbone=True` it writes the whole
model as transformers does, and the config next to it; so it does if nothing is frozen.
`load_adapter` of a PeftModel, which `Trainer` calls, also reads the adapters of meft.

Both methods are set on the instance, under the names that transformers and peft call:
classes do not change, and a copy of the model has them as well. A model around the
converted one does not have them: when its `save_pretrained` collects the weights, a
warning reports that the adapters' files are missing.
"""

import contextlib
import inspect
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any
from weakref import WeakSet

from torch import nn

from meft.checkpoint.files import CONFIG
from meft.checkpoint.save import write_adapters, write_trained
from meft.checkpoint.trained import (
    adapter_names,
    forget_values,
    note_values,
    trained_tensors,
)
from meft.errors import SavingWarning, UnsupportedCallError
from meft.sparse.adapter import sparse_adapters
from meft.sparse.row_shares import names_only

Load = Callable[[nn.Module, str | Path], nn.Module]
METHODS = ("save_pretrained", "load_adapter")
_IGNORED = "_keys_to_ignore_on_save"
"""transformers' attribute with names of tensors that are not saved, and that `Trainer`
does not miss when it loads a checkpoint.
"""
_WARNED: WeakSet[nn.Module] = WeakSet()
"""Models around a converted one that have warned that they save no adapters."""


def add_saving(
    model: nn.Module, converted: type[nn.Module], load: Load, save_backbone: bool
) -> None:
    """Make `model`, and models inside it that hold all adapters, save the adapters.

    Args:
        model: a converted model.
        converted: the class of the modules that a conversion has added.
        load: `meft.load_adapters`.
        save_backbone: whether `save_pretrained` also writes what is frozen.
    """
    number = _count(model, converted)
    is_peft = any(_is_peft_model(module) for module in model.modules())
    for module in model.modules():
        if isinstance(module, converted):
            module.register_state_dict_pre_hook(_warn_if_saved_from_outside)
        saves = hasattr(type(module), "save_pretrained")
        if saves and _count(module, converted) == number:
            # The model inside a PeftModel has weights of its own when it is merged.
            whole = save_backbone or (is_peft and not _is_peft_model(module))
            module.__dict__["save_pretrained"] = SavePretrained(module, whole)
            note_values(module)
            if not whole and not _is_peft_model(module):
                module.__dict__[_IGNORED] = _unsaved_names(module)
            if _is_peft_model(module):
                module.__dict__["load_adapter"] = LoadAdapter(module, load)


def remove_saving(model: nn.Module) -> None:
    """Undo `add_saving`."""
    for module in model.modules():
        saver = vars(module).get("save_pretrained")
        if isinstance(saver, SavePretrained):
            saver.restore_ignored()
        for name in METHODS:
            module.__dict__.pop(name, None)
        forget_values(module)
        hooks = module._state_dict_pre_hooks
        for key in [k for k, h in hooks.items() if h is _warn_if_saved_from_outside]:
            del hooks[key]


@contextlib.contextmanager
def without_saving(model: nn.Module) -> Iterator[None]:
    """Refuse `save_pretrained` in the body, in which adapters are not in the model."""
    savers = [vars(module).get("save_pretrained") for module in model.modules()]
    ours = [saver for saver in savers if isinstance(saver, SavePretrained)]
    for saver in ours:
        saver.is_refused = True
    try:
        yield
    finally:
        for saver in ours:
            saver.is_refused = False


class SavePretrained:
    """Write what was trained, or call `save_pretrained` of `model`; add the config.

    Args:
        model: a converted transformers model, or a PeftModel that holds one.
        save_backbone: whether to write what is frozen, too.
    """

    def __init__(self, model: nn.Module, save_backbone: bool) -> None:
        self.model = model
        self.save_backbone = save_backbone
        self.has_warned = False
        self.is_refused = False
        before = vars(model).get("save_pretrained")  # of the other method
        own = [vars(model)[_IGNORED]] if _IGNORED in vars(model) else []
        self.ignored: list[Any] = getattr(before, "ignored", own)
        """transformers' own value of its attribute of the instance, if it has one."""

    def restore_ignored(self) -> None:
        """Set transformers' attribute to what it was before the conversion."""
        vars(self.model).pop(_IGNORED, None)
        if self.ignored:
            vars(self.model)[_IGNORED] = self.ignored[0]

    def __call__(self, save_directory: str | Path, *args: Any, **kwargs: Any) -> Any:
        """Save the model; arguments and result are those of `save_pretrained`.

        Raises:
            UnsupportedCallError: the call would upload the directory before the
                adapters are in it, or would replace the weights of another model there.
            AdapterFileError: `state_dict` is given and contains only some of the
                adapters.

        Warns:
            SavingWarning: once per model, what `from_pretrained` omits.
        """
        if self.is_refused:
            raise UnsupportedCallError(
                "`save_pretrained` was called inside of `meft.disable_adapter`, where "
                "the adapters are not in the model: call it outside, or "
                "`meft.remove_adapters` to save the plain model"
            )
        plain: Any = type(self.model).save_pretrained  # type: ignore[attr-defined]
        call = inspect.signature(plain).bind(
            self.model, save_directory, *args, **kwargs
        )
        given = {**call.arguments, **call.arguments.get("kwargs", {})}
        if given.get("push_to_hub"):
            raise UnsupportedCallError(
                "`save_pretrained(push_to_hub=True)` would upload this model without "
                "the files of its adapters: call `model.push_to_hub(repo_id)`"
            )
        is_main_process = given.get("is_main_process", True)
        tensors = trained_tensors(self.model, given.get("state_dict"))
        has_frozen = not all(p.requires_grad for p in self.model.parameters())
        is_whole = self.save_backbone or not has_frozen or self._is_peft()
        if tensors and not is_whole:
            vars(self.model)[_IGNORED] = _unsaved_names(self.model)
            if is_main_process:
                write_trained(self.model, save_directory, tensors)
            return None
        self.restore_ignored()  # transformers writes frozen tensors, too
        out = plain(self.model, save_directory, *args, **kwargs)
        if tensors and is_main_process:
            write_adapters(self.model, save_directory, tensors, next_to_model=True)
            if adapter_names(self.model):
                self._warn()
        return out

    def _is_peft(self) -> bool:
        """Return whether the method of the class writes peft's adapters alone."""
        has_own = getattr(self.model, "_hf_peft_config_loaded", False)
        return bool(has_own) or _is_peft_model(self.model)

    def _warn(self) -> None:
        if self.has_warned:
            return
        self.has_warned = True
        kind, loaded = type(self.model).__name__, "directory"
        if _is_peft_model(self.model):
            kind, loaded = "PeftModel", "base_model, directory"
        warnings.warn(
            f"`{kind}.from_pretrained` loads what `save_pretrained` has written "
            "without the adapters of meft. To load all of it, call "
            f"`meft.load_adapters({kind}.from_pretrained({loaded}), directory)`",
            SavingWarning,
            stacklevel=3,
        )


class LoadAdapter:
    """Call `load_adapter` of a PeftModel, then `meft.load_adapters`.

    Args:
        model: a PeftModel that holds a converted model.
        load: `meft.load_adapters`.
    """

    def __init__(self, model: nn.Module, load: Load) -> None:
        self.model = model
        self._load = load

    def __call__(
        self, model_id: str | Path, adapter_name: str, *args: Any, **kwargs: Any
    ) -> Any:
        """Load adapters, with the arguments and result of the class's `load_adapter`.

        Args:
            model_id: the directory to load from.
            adapter_name: the name of the adapter in the PeftModel.
            *args: other positional arguments of `load_adapter`.
            **kwargs: other keyword arguments of `load_adapter`.

        Raises:
            UnsupportedCallError: `adapter_name` is new, and `model_id` contains
                adapters of meft, of which a model has one set.
            AdapterFileError: see `meft.load_adapters`.
        """
        model: Any = self.model
        has_ours = (Path(model_id) / CONFIG).is_file()
        if has_ours and adapter_name not in model.peft_config:
            known = ", ".join(map(repr, model.peft_config))
            raise UnsupportedCallError(
                f"{model_id} holds adapters of meft, of which a model has one set: "
                f"`load_adapter` can load it under a name that the model has already "
                f"({known}), not under {adapter_name!r}"
            )
        out = type(model).load_adapter(model, model_id, adapter_name, *args, **kwargs)
        if has_ours:
            self._load(model, model_id)
        return out


def _unsaved_names(model: nn.Module) -> list[str]:
    """Return the names in the state dict of `model` of what is not trained."""
    with names_only(adapter.rows for adapter in sparse_adapters(model).values()):
        saved, every = trained_tensors(model).keys(), model.state_dict().keys()
    state = (name for name in every if not name.endswith("_extra_state"))
    return [name for name in state if name not in saved]


def _warn_if_saved_from_outside(*unused: Any) -> None:
    """Warn if a `save_pretrained` that does not save adapters reads a state dict."""
    frame: FrameType | None = sys._getframe()
    savers: list[nn.Module] = []
    while frame is not None:
        if frame.f_code.co_name == "save_pretrained":
            saver = frame.f_locals.get("self")
            savers += [saver] if isinstance(saver, nn.Module) else []
        frame = frame.f_back
    if not savers or any("save_pretrained" in vars(saver) for saver in savers):
        return
    outer = savers[-1]
    if outer in _WARNED:
        return
    _WARNED.add(outer)
    kind = type(outer).__name__
    warnings.warn(
        f"`save_pretrained` of this {kind} does not write the files that "
        "`meft.load_adapters` reads: a model inside was converted, and not the "
        f"{kind} itself. Call `meft.save_adapters(model, directory)` as well, or "
        f"convert the {kind} before training",
        SavingWarning,
        stacklevel=2,
    )


def _is_peft_model(module: nn.Module) -> bool:
    kinds = type(module).__mro__
    return any(kind.__module__.startswith("peft.") for kind in kinds)


def _count(model: nn.Module, kind: type[nn.Module]) -> int:
    return sum(isinstance(module, kind) for module in model.modules())
