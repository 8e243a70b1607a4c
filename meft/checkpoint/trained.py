"""Which tensors of a converted model are saved: all that is trained."""

from collections.abc import Mapping

from torch import Tensor, nn
from transformers import PreTrainedModel

from meft.backbone.heads import new_heads
from meft.errors import AdapterFileError, UnsupportedCallError
from meft.reversible.blocks import find_stacks
from meft.sparse.adapter import sparse_adapters
from meft.sparse.divided_rows import DividedRows

_VERSIONS = "_meft_versions_at_conversion"
"""Attribute of a converted model."""


def trained_tensors(
    model: nn.Module, state_dict: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """Return the tensors that `save_adapters` writes.

    These are the adapters, all other trainable parameters, and buffers; and parameters
    that were trained and then frozen, whose values have changed since the conversion.

    Args:
        model: a converted model.
        state_dict: values to use instead of the model's own, such as averages. If it
            contains none of these names, the result is empty.

    Raises:
        AdapterFileError: `state_dict` has some of the names but not all.
    """
    adapters = adapter_names(model)
    parameters = {
        name: parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad or name in adapters or _has_changed(model, name)
    }
    own: dict[str, Tensor] = parameters | _buffers_of_trained(model)
    names = list(own)
    if state_dict is not None:
        missing = [name for name in names if name not in state_dict]
        if parameters.keys() <= set(missing):
            return {}
        if missing:
            raise AdapterFileError(
                f"`state_dict` has {len(names) - len(missing)} of the "
                f"{len(names)} tensors that were trained, but not {missing[0]!r}: "
                "pass all of them, or none to save the backbone alone"
            )
    values = state_dict if state_dict is not None else own | _gathered(model)
    return {name: _on_host(values[name].detach()) for name in names}


def refuse_without_values(trained: Mapping[str, Tensor]) -> None:
    """Refuse to write divided rows in a process that has not gathered them.

    Args:
        trained: the result of `trained_tensors`.

    Raises:
        UnsupportedCallError: some tensor has no values.
    """
    name = next((name for name, tensor in trained.items() if tensor.is_meta), None)
    if name is not None:
        raise UnsupportedCallError(
            f"{name!r} is divided among processes, and gathered in the first one: save "
            "the model in that process (`if torch.distributed.get_rank() == 0:` inside "
            "of `with meft.gathered_rows(model):`)"
        )


def _gathered(model: nn.Module) -> dict[str, Tensor]:
    """Return rows that are divided among processes, as they have been gathered."""
    return {
        f"{name}.neurons": adapter.rows.whole()
        for name, adapter in sparse_adapters(model).items()
        if isinstance(adapter.rows, DividedRows)
    }


def _on_host(tensor: Tensor) -> Tensor:
    return tensor if tensor.is_meta else tensor.cpu().contiguous()


def note_values(model: nn.Module) -> None:
    """Note which values parameters have, by the number of their changes so far.

    Args:
        model: a model that has just been converted.
    """
    versions = {name: _version(p) for name, p in model.named_parameters()}
    vars(model).setdefault(_VERSIONS, versions)


def forget_values(model: nn.Module) -> None:
    """Undo `note_values`."""
    vars(model).pop(_VERSIONS, None)


def _has_changed(model: nn.Module, name: str) -> bool:
    """Return whether a parameter was changed in place since the conversion."""
    noted: dict[str, int] = vars(model).get(_VERSIONS, {})
    return name in noted and _version(model.get_parameter(name)) > noted[name]


def _version(parameter: Tensor) -> int:
    return 0 if parameter.is_inference() else parameter._version


def adapter_names(model: nn.Module) -> set[str]:
    """Return the names of all parameters of adapters, trainable or not."""
    stacks, sparse = find_stacks(model), sparse_adapters(model)
    modules = [*(stack.adapters for stack in stacks.values()), *sparse.values()]
    adapters = {id(p) for module in modules for p in module.parameters()}
    return {name for name, p in model.named_parameters() if id(p) in adapters}


def _buffers_of_trained(model: nn.Module) -> dict[str, Tensor]:
    """Return buffers that belong to trained parameters, such as batch norm statistics.

    They are in task heads, in modules around the transformers models, and in modules
    with a trainable parameter of their own. All others count as part of the backbone.
    """
    heads = {
        id(module)
        for head in new_heads(model).values()
        if isinstance(head, nn.Module)
        for module in head.modules()
    }
    inside = [m for m in model.modules() if isinstance(m, PreTrainedModel)]
    pretrained = {id(m) for each in inside for m in each.modules()} - heads
    found: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        own = module.parameters(recurse=False)
        if id(module) in pretrained and not any(p.requires_grad for p in own):
            continue
        found |= persistent_buffers(name, module)
    return found


def persistent_buffers(name: str, module: nn.Module) -> dict[str, Tensor]:
    """Return the buffers of `module` itself, without those that torch does not save."""
    return {
        f"{name}.{own}".lstrip("."): buffer
        for own, buffer in module.named_buffers(recurse=False)
        if own not in module._non_persistent_buffers_set
    }
