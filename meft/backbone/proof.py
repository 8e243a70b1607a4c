"""Comparison of the halves of a block with the block's own forward.

A layout says in names what a block computes. Whether that is still true in the
installed version of transformers, for this block with its config, is checked where it
is used first: the block is run once by its own `forward` and once in halves, on the
same input and with the same random numbers. Both must give the same bits. The halves of
a parallel block may be summed in another order than in its own forward, so it may
differ by the rounding of one sum.

Blocks of a listed class with transformers' own `forward` are compared on a few tokens
of one row, once for those that are alike. Of all others (derived, patched, guessed and
registered classes) nothing is known: every block is compared in every mode, for every
shape and kind of arguments, and the gradients of the input and of all parameters are
compared too, as a wrong description may give the right values before training.
"""

import contextlib
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from meft.backbone.caches import NAMES, cache_of, holds_tokens, is_cache
from meft.backbone.called import call_block, is_sharded
from meft.backbone.families import family_of
from meft.backbone.family import Family
from meft.backbone.layout import Layout
from meft.errors import MeftError, UnsupportedCallError, UnsupportedModelError
from meft.shapes import Hidden
from meft.transforms import is_recording

_TRANSFORMERS = Path(transformers.__file__).parent
_TOKENS = 64
"""Number of tokens that are compared of a longer row."""
_DIMS_OF_TOKENS = {
    "attention_mask": (-2, -1),
    "position_embeddings": (-2,),
    "position_ids": (-1,),
    "cache_position": (-1,),
}
"""Dimensions of arguments that count tokens. The first dimension may count rows."""
_COMPILED = "_compiled_call_impl"
"""torch's attribute of a module with compiled code."""
_SEED = 0x6D656674
_GREATEST = 60_000
"""Some blocks clamp float16 values close to its maximum of 65,504."""

Proven = dict[tuple[Any, ...], Family]
"""The family of blocks that have been compared, by what makes blocks alike."""


def prove(
    known: Proven,
    family: Family,
    block: nn.Module,
    plain: type[nn.Module],
    hidden: Hidden,
    call: Mapping[str, Any],
    label: str,
    *,
    is_running: bool = False,
) -> Family:
    """Compare a block with its own forward, unless one that is like it has been.

    Args:
        known: what has been compared; a new result is added.
        family: what the block is taken for.
        block: the block, in the mode in which it will run.
        plain: its class, without that of a parallel adapter.
        hidden: hidden states for it, `batch seq hidden`.
        call: its other arguments, by name.
        label: name of the block in error messages, `block 3`.
        is_running: whether this is inside of a call of the block, by which FSDP2 has
            gathered its parameters.

    Returns:
        `family`; for a guess, one with the layout that computes what the block does.

    Raises:
        UnsupportedModelError: the block computes something else.
        UnsupportedCallError: the family is a guess, and nothing can be said with these
            inputs.
    """
    is_known = _is_known(family, plain)
    alike = _likeness(block, plain)
    this_block = (id(block), *alike)
    if not is_known:
        alike = (*this_block, tuple(hidden.shape), *_kinds(call))
    if alike not in known:
        found = None
        if not is_recording():
            found = _compared(
                family, block, plain, hidden, call, label, is_known, is_running
            )
        if found is None and this_block in known:
            return known[this_block]  # compared before, as in a prefill
        if found is None and not is_known:
            raise UnsupportedCallError(
                f"a {plain.__name__} is not of a listed family: before it is used, it "
                "has to be compared with its own `forward`, on a batch without a "
                "filled cache and with finite hidden states, and not by "
                "`torch.compile`. Run one such batch first, in the same mode (training "
                "or evaluation)"
            )
        if found is None:
            return family
        known[alike] = known[this_block] = found
    return known[alike]


def plain_class(block: nn.Module) -> type[nn.Module]:
    """Return the class of a block, without those of sparse adapters and FSDP2."""
    kind: type[nn.Module] = getattr(block, "plain", type(block))
    bases = [base for base in kind.__bases__ if base.__name__ != "FSDPModule"]
    return bases[0] if len(bases) < len(kind.__bases__) else kind


def _is_known(family: Family, plain: type[nn.Module]) -> bool:
    """Return whether a class is listed, and its `forward` transformers' own."""
    if family.is_guess or family_of(plain) is not family:
        return False
    function: Any = plain.forward
    while function is not None:
        code = getattr(function, "__code__", None)
        if code is None or not Path(code.co_filename).is_relative_to(_TRANSFORMERS):
            return False
        function = getattr(function, "__wrapped__", None)
    return True


def _kinds(call: Mapping[str, Any]) -> list[Any]:
    """Return what a block may decide by: the arguments given, and their shapes."""
    return [
        (name, tuple(value.shape) if isinstance(value, Tensor) else type(value))
        for name, value in sorted(call.items())
    ]


def _likeness(block: nn.Module, plain: type[nn.Module]) -> tuple[Any, ...]:
    """Return what decides how a block computes, other than its parameters.

    Args:
        block: the block.
        plain: its class, without that of a parallel adapter.
    """
    # `training` is one of the attributes: dropout may be missing in a layout.
    simple = (int, float, str, bool, type(None))
    attributes = tuple(
        (name, value)
        for name, value in sorted(vars(block).items())
        if isinstance(value, simple) and not name.endswith(("idx", "id", "index"))
    )
    children = tuple((name, type(child)) for name, child in block.named_children())
    return plain, plain.forward, attributes, children


def _compared(
    family: Family,
    block: nn.Module,
    plain: type[nn.Module],
    hidden: Hidden,
    call: Mapping[str, Any],
    label: str,
    is_known: bool,
    is_running: bool,
) -> Family | None:
    """Return the family with the layout that computes what a block does.

    Args:
        family, block, plain, hidden, call, label, is_running: as for `prove`.
        is_known: whether the class of the block is listed.

    Returns:
        `family`, or for a guess one with a single layout; None if nothing can be said,
        because the block is given a cache with tokens or computes numbers that are not
        finite.

    Raises:
        UnsupportedModelError: the block computes something else.
    """
    if not family.is_opaque and _has_longer_keys(block, hidden, call):
        return None
    # A backward of the comparison must not free the graph of an argument.
    call = {n: _detached(v) for n, v in call.items() if not _is_cache(n, v)}
    hidden = hidden.detach()
    if is_known:
        hidden, call = _few_tokens(hidden, call)
    else:
        call = tree_map_only(Tensor, Tensor.clone, dict(call))
        hidden = hidden.clone()
    is_gathered = is_sharded(block)
    # A call gathers its parameters.
    runs = _Runs(block, plain, hidden, call, is_gathered and not is_running)
    with contextlib.nullcontext() if is_gathered else _without_hooks(block):
        own = runs.own() if is_known else _own_of_unlisted(runs, call, label)
        if not is_known and family.extra_outputs is None:
            _refuse_others(own, label, plain)
        if not family.is_opaque and not _is_comparable(own.hidden):
            return None
        reasons = []
        for layout in family.layouts if family.is_guess else (family.layout(block),):
            if family.is_guess:  # as many values as the block returns
                layout = replace(layout, returns=own.returns, tensors=own.tensors)
            if layout.is_opaque:
                _refuse_another_shape(own, hidden, label, plain)
                return family.with_layout(layout)
            try:
                reason = _difference(runs, own, layout, is_known)
            except MeftError as error:
                if not family.layouts[-1].is_opaque:
                    raise
                reason = str(error)
            if reason is None:
                return family.with_layout(layout) if family.is_guess else family
            reasons.append(reason)
    described = "similar models" if family.is_guess else family.name
    raise UnsupportedModelError(
        f"{label}, a {plain.__name__}, does not compute what the names of its modules "
        f"imply: its own `forward` and its two halves, as those of {described}, differ "
        f"on the same input: {reasons[0]}. "
        "The `forward` may have been replaced, or be that of another version of "
        "transformers. `meft.register_family` describes a class of blocks. Without "
        "adapters of ours, `adapter=None` with `mlp_chunks=1`, blocks are called as "
        "they are"
    )


def _own_of_unlisted(runs: "_Runs", call: Mapping[str, Any], label: str) -> "_Output":
    """Run the own forward of a block of a class that is not listed.

    Args:
        runs: runs of the block.
        call: its arguments other than the hidden states, by name.
        label: name of the block in error messages.

    Raises:
        UnsupportedModelError: it cannot be run by itself, or changes what it reads.
    """
    try:
        with _unchanged(runs.block, (runs.hidden, call), label):
            return runs.own()
    except MeftError:
        raise
    except Exception as error:
        raise UnsupportedModelError(
            f"{label}, a {runs.plain.__name__}, is not of a listed family, and its own "
            f"`forward` could not be run by itself: {error!r}"
        ) from error


@contextlib.contextmanager
def _unchanged(block: nn.Module, inputs: Any, label: str) -> Iterator[None]:
    """Run the body, after which neither inputs nor state of a block have changed.

    Buffers and tensors in attributes are put back.

    Args:
        block: the block.
        inputs: its input and other arguments.
        label: name of the block in error messages.

    Raises:
        UnsupportedModelError: a block that is run again would change them again.
    """
    leaves = tree_leaves(inputs)
    versions = [(leaf, leaf._version) for leaf in leaves if isinstance(leaf, Tensor)]
    buffers = [(name, b, b.clone()) for name, b in block.named_buffers()]
    state = [(module, dict(vars(module))) for module in block.modules()]
    changed = []
    try:
        yield
    finally:
        for name, buffer, before in buffers:
            if not _same(buffer, before):
                changed.append(name)
                with torch.no_grad():
                    buffer.copy_(before)
        for module, attributes in state:
            for name, value in attributes.items():
                if isinstance(value, Tensor) and vars(module).get(name) is not value:
                    vars(module)[name] = value
    if changed and block.training:
        raise UnsupportedModelError(
            f"{label}, a {type(block).__name__}, changes its buffer `{changed[0]}` in "
            "its `forward`, as batch norms do in training, and a recompute would "
            "change it again. Call `eval()` of that module, or freeze its statistics"
        )
    is_other = len(tree_leaves(inputs)) != len(leaves)
    if is_other or any(leaf._version != version for leaf, version in versions):
        raise UnsupportedModelError(
            f"{label}, a {type(block).__name__}, changes its input or another argument "
            "in place, and a recompute would change it again: compute a new tensor "
            "instead"
        )


def _same(one: Tensor, other: Tensor) -> bool:
    return torch.equal(one.nan_to_num(), other.nan_to_num())


def _is_cache(name: str, value: Any) -> bool:
    return name in NAMES and (value is None or is_cache(value))


def _detached(argument: Any) -> Any:
    return tree_map_only(Tensor, Tensor.detach, argument)


def _has_longer_keys(block: nn.Module, hidden: Tensor, call: Mapping[str, Any]) -> bool:
    """Return whether a block attends to more than the tokens that it is given."""
    cache, mask = cache_of(call), call.get("attention_mask")
    if cache is None:
        return False
    is_longer = isinstance(mask, Tensor) and mask.shape[-1] != hidden.shape[1]
    # Blocks below may have filled their part of the cache in this forward.
    layers = (getattr(module, "layer_idx", None) for module in block.modules())
    layer = next((index for index in layers if index is not None), 0)
    return is_longer or holds_tokens(cache, layer)


class _Output(NamedTuple):
    """What a run of a block has returned."""

    hidden: Tensor
    returns: int
    """Length of the tuple; 0 if it was none."""
    others: tuple[type, ...]
    """Types of what is in the tuple besides."""
    gradients: list[Tensor | None]
    """Of the input and of all parameters, if they were asked for."""
    kind: type | None = None
    """The class of the tuple; None if it was none."""

    @property
    def tensors(self) -> tuple[int, ...]:
        """Positions of other tensors in the tuple."""
        types = enumerate(self.others, 1)
        return tuple(index for index, kind in types if issubclass(kind, Tensor))


class _Runs:
    """Runs of one block on one input, with the same random numbers.

    Args:
        block: the block.
        plain: its class.
        hidden: `batch seq hidden`.
        call: its other arguments, by name.
        is_called: whether the block has to be called itself.
    """

    def __init__(
        self,
        block: nn.Module,
        plain: type[nn.Module],
        hidden: Hidden,
        call: Mapping[str, Any],
        is_called: bool,
    ) -> None:
        self.block, self.plain, self.hidden = block, plain, hidden
        self._call, self._is_called = call, is_called

    @property
    def device(self) -> torch.device:
        """Return the device of the input."""
        return self.hidden.device

    def own(self, with_gradients: bool = False) -> _Output:
        """Run the block's own forward."""

        def function(hidden: Tensor) -> Any:
            if self._is_called:
                return call_block(self.block, hidden, self._call)
            return self.plain.forward(self.block, hidden, **self._call)

        return self._run(function, with_gradients)

    def halves(self, layout: Layout, with_gradients: bool = False) -> _Output:
        """Run the halves of a layout."""

        def whole(hidden_states: Tensor, **others: Any) -> Tensor:
            return layout.whole(self.block, hidden_states, others)

        def function(hidden: Tensor) -> Any:
            if self._is_called:
                return call_block(self.block, hidden, self._call, whole)
            return whole(hidden, **self._call)

        return self._run(function, with_gradients)

    def _run(self, function: Callable[[Tensor], Any], with_gradients: bool) -> _Output:
        if not with_gradients:
            with torch.no_grad():
                output = _repeated(function, self.hidden)
            kind = type(output) if isinstance(output, tuple) else None
            return _Output(_first(output), _length(output), _others(output), [], kind)
        x = self.hidden.clone().requires_grad_()
        with _all_trained(self.block) as parameters, torch.enable_grad():
            out = _first(_repeated(function, x))
            weights = torch.linspace(-1, 1, out.numel(), device=out.device)
            found = torch.autograd.grad(
                out,
                [x, *parameters],
                weights.view_as(out).to(out.dtype),
                allow_unused=True,
            )
        return _Output(out.detach(), 0, (), list(found))


@contextlib.contextmanager
def _all_trained(block: nn.Module) -> Iterator[list[Tensor]]:
    """Run the body with every parameter in need of a gradient."""
    floating = [p for p in block.parameters() if p.is_floating_point() and p.is_leaf]
    frozen = [p for p in floating if not p.requires_grad]
    for parameter in frozen:
        parameter.requires_grad = True
    try:
        yield list(floating)
    finally:
        for parameter in frozen:
            parameter.requires_grad = False


def _first(output: Any) -> Tensor:
    found: Tensor = output[0] if isinstance(output, tuple) else output
    return found


def _others(output: Any) -> tuple[type, ...]:
    return tuple(map(type, output[1:])) if isinstance(output, tuple) else ()


def _refuse_others(own: _Output, label: str, plain: type[nn.Module]) -> None:
    """Refuse a block that returns other things than tensors and None."""
    if not isinstance(own.hidden, Tensor) or own.kind not in (None, tuple):
        found = type(own.hidden) if own.kind is None else own.kind
        raise UnsupportedModelError(
            f"{label}, a {plain.__name__}, returns a {found.__name__}, not hidden "
            "states or a tuple that starts with them"
        )
    known = (Tensor, type(None))
    others = [kind.__name__ for kind in own.others if not issubclass(kind, known)]
    if others:
        raise UnsupportedModelError(
            f"{label}, a {plain.__name__}, returns a value of type {others[0]} besides "
            "hidden states, which a stack that runs all blocks as one cannot. If it is "
            "blocks inside that should be run, name their class, "
            "`meft.register_family(Class)`, or convert a part of the model"
        )


def _refuse_another_shape(
    own: _Output, hidden: Tensor, label: str, plain: type[nn.Module]
) -> None:
    if own.hidden.shape != hidden.shape or own.hidden.dtype != hidden.dtype:
        raise UnsupportedModelError(
            f"{label}, a {plain.__name__}, returns {own.hidden.dtype} of shape "
            f"{tuple(own.hidden.shape)} for hidden states of {hidden.dtype} and shape "
            f"{tuple(hidden.shape)}: a reversible stack needs blocks that change "
            "neither. Convert a part of the model, `meft.make_reversible(part, config)`"
        )


def _length(output: Any) -> int:
    return len(output) if isinstance(output, tuple) else 0


@contextlib.contextmanager
def _without_hooks(block: nn.Module) -> Iterator[None]:
    """Run the body without forward hooks inside a block, and without its compiled code.

    Hooks may count calls, and compiled code rounds differently in another context.
    """
    changed = {"_forward_hooks": OrderedDict, "_forward_pre_hooks": OrderedDict}
    kept: list[tuple[nn.Module, str, Any]] = []
    for module in block.modules():
        for name, empty in changed.items():
            if getattr(module, name):
                kept.append((module, name, getattr(module, name)))
                setattr(module, name, empty())
        if vars(module).get(_COMPILED) is not None:
            kept.append((module, _COMPILED, vars(module)[_COMPILED]))
            vars(module)[_COMPILED] = None
    try:
        yield
    finally:
        for module, name, value in kept:
            module.__dict__[name] = value


def _repeated(function: Callable[[Tensor], Any], hidden: Tensor) -> Any:
    """Return what a function returns, with fixed random numbers."""
    devices = [hidden.device] if hidden.device.type == "cuda" else []
    caches = torch.is_autocast_cache_enabled()
    # A weight that autocast converts without grad would be used with grad later.
    torch.set_autocast_cache_enabled(False)
    try:
        with torch.random.fork_rng(devices=devices):
            torch.default_generator.manual_seed(_SEED)
            if devices:
                with torch.cuda.device(hidden.device):
                    torch.cuda.manual_seed(_SEED)
            return function(hidden)
    finally:
        torch.set_autocast_cache_enabled(caches)


def _is_comparable(own: Tensor) -> bool:
    """Return whether all values are finite, and none may have been clamped."""
    greatest = own.abs().amax()
    limit = _GREATEST if own.dtype == torch.float16 else torch.finfo(own.dtype).max
    return bool(greatest <= limit)


def _difference(
    runs: _Runs, own: _Output, layout: Layout, is_known: bool
) -> str | None:
    """Return in what the halves of a layout differ; None if in nothing."""
    if own.returns != layout.returns:
        return (
            f"the block returns {_values(own.returns)}, and the description "
            f"{_values(layout.returns)}; see `returns`"
        )
    try:
        halves = runs.halves(layout).hidden
    except MeftError:
        raise
    except Exception as error:
        if is_known:
            raise
        return f"the halves cannot be run, {error!r}"
    if not torch.equal(own.hidden, halves):
        greatest = own.hidden.abs().amax().double()
        difference = (own.hidden.double() - halves.double()).abs().amax() / greatest
        # Of the sum of three terms in two orders.
        allowed = 4 * torch.finfo(halves.dtype).eps if layout.is_parallel else 0.0
        if not bool(difference <= allowed):
            return f"by {float(difference):.1g} of the greatest value"
    if is_known or is_sharded(runs.block) or torch.is_inference_mode_enabled():
        return None
    return _difference_of_gradients(runs, layout)


def _values(number: int) -> str:
    return f"a tuple of {number}" if number else "no tuple"


def _difference_of_gradients(runs: _Runs, layout: Layout) -> str | None:
    names = ["the input"]
    names += [n for n, p in runs.block.named_parameters() if p.is_floating_point()]
    try:
        own = runs.own(with_gradients=True).gradients
        halves = runs.halves(layout, with_gradients=True).gradients
    except RuntimeError:  # weights that are quantised have no gradients
        return None
    norms = [0.0 if g is None else float(g.double().norm()) for g in own]
    for name, one, other, norm in zip(names, own, halves, norms, strict=True):
        zero = torch.zeros((), device=runs.device)
        one, other = (zero if g is None else g.double() for g in (one, other))
        if torch.equal(one, other):
            continue
        distance = float((one - other).norm())
        if distance > 0.05 * norm + 1e-4 * max(norms):
            return f"in the gradient of {name}"
    return None


def _few_tokens(
    hidden: Tensor, call: Mapping[str, Any]
) -> tuple[Tensor, Mapping[str, Any]]:
    """Return a few tokens of one row, where that is known to be possible."""
    rows, tokens, *_ = hidden.shape
    tensors = {n for n, v in call.items() if not isinstance(v, _ALIKE_FOR_ALL)}
    if hidden.dim() != 3 or not tensors <= _DIMS_OF_TOKENS.keys():
        return hidden, call

    def part(name: str, value: Any) -> Any:
        if isinstance(value, tuple | list):
            return type(value)(part(name, item) for item in value)
        if not isinstance(value, Tensor):
            return value
        for dim in _DIMS_OF_TOKENS[name]:
            if value.dim() >= -dim and value.shape[dim] == tokens:
                value = value.narrow(dim, 0, min(tokens, _TOKENS))
        if value.dim() > 1 and value.shape[0] == rows:
            value = value[:1]
        return value

    return hidden[:1, :_TOKENS], {n: part(n, v) for n, v in call.items()}


_ALIKE_FOR_ALL = (int, float, str, bool, type(None))
"""Types of arguments that do not depend on the tokens."""
