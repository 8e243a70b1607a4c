"""What a block is made of: two halves, each described by names of its modules.

    half(x) = outside(x + chain(before(x)))

`before` is the norm of a pre-norm block and `outside` that of a post-norm one; without
a name, a step is left out. A chain is modules that are called one after the other, the
first of them with the arguments that the model's loop passes. In it, `~name` is dropout
with the probability `block.name`, `*name` a product with the number `block.name`, and
`+name` at the start a module that adds its argument `residual`, for which it gets 0:

    Half("input_layernorm", "self_attn")                        attention of LLaMA
    Half("", "fc1 activation_fn ~activation_dropout fc2 ~dropout", "final_layer_norm")
                                                                feed-forward of BART
    Half("post_attention_layernorm", "+mlp")                    feed-forward of BLOOM

Where one module is the whole half, its input and a norm included, `inside` names the
module in it at whose output the chain would end:

    Half(chain="attention", inside="attention.output_dropout")  attention of ALBERT

In a parallel block both halves read the input of the block:

    block(x) = x + attention chain(before(x)) + mlp chain(before(x))

Adapters are placed as in the paper (Liao et al., NeurIPS 2023, and their code): that of
attention is sequential with its own skip connection, at the end of the chain; that of
the feed-forward runs in parallel with the chain, on the same input.
"""

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from operator import attrgetter
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn
from torch.nn import functional

from meft.errors import UnsupportedCallError
from meft.shapes import Hidden

Adapter = Callable[[Tensor], Tensor]
"""A function that is added in parallel with or after a half."""


@runtime_checkable
class Beginning(Protocol):
    """An adapter in parallel that fetches what it needs while the chain computes."""

    def __call__(self, hidden: Tensor) -> Tensor:
        """Return the output; equal to `begin(hidden)()`."""

    def begin(self, hidden: Tensor) -> Callable[[], Tensor]:
        """Start, without waiting, and return the function that computes the output."""


def begin(adapter: Adapter, hidden: Tensor) -> Callable[[], Tensor]:
    """Start an adapter where it can be, and return what computes its output."""
    if isinstance(adapter, Beginning):
        return adapter.begin(hidden)
    return functools.partial(adapter, hidden)


_OF_THE_ENCODER = (
    "encoder_hidden_states",
    "encoder_attention_mask",
    "encoder_decoder_position_bias",
)
"""Arguments of cross-attention."""
_WITHOUT_EFFECT = ("use_cache",)
"""Arguments of a block that no module inside it reads."""


@dataclass(frozen=True, slots=True)
class Half:
    """One half of a block: `outside(x + chain(before(x)))`.

    Attributes:
        before: name of the module that the chain's input passes through first.
        chain: names of the modules of the chain, separated by spaces.
        outside: name of the module that the sum passes through.
        inside: name of the module after which the adapter of attention runs, inside the
            only module of the chain, which adds its input itself.
    """

    before: str = ""
    chain: str = ""
    outside: str = ""
    inside: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """The halves of a block.

    Attributes:
        attention: the half that mixes tokens.
        mlp: the position-wise layers.
        cross: attention to an encoder, which belongs to the half that mixes tokens; in
            blocks that are given no encoder's output it is left out.
        is_parallel: whether both halves read the input of the block.
        adds_input_last: whether a parallel block adds its input to the sum of both
            chains, and not the chains to its input one by one, which is rounded
            differently.
        renamed: names of arguments of the block, each with the name under which
            attention takes it.
        returns: the number of values in the tuple that a block returns, of which the
            first is the hidden states and the others are None; 0 if it returns no
            tuple.
        tensors: positions in this tuple at which there is another tensor than the
            hidden states, which must not be read (`is_opaque`).
    """

    attention: Half
    mlp: Half
    cross: Half | None = None
    is_parallel: bool = False
    adds_input_last: bool = False
    renamed: tuple[tuple[str, str], ...] = ()
    returns: int = 0
    tensors: tuple[int, ...] = ()

    @property
    def is_opaque(self) -> bool:
        """Whether the halves are unknown, and a block can only be called itself."""
        return not self.attention.chain

    @property
    def is_post_norm(self) -> bool:
        """Whether the block ends in a norm, which limits the size of the streams."""
        return bool(self.mlp.outside)

    @property
    def in_parts(self) -> tuple[str, ...]:
        """Names of modules inside the block that hold modules of the halves.

        They are never called themselves.
        """
        owners = [name.split(".")[:-1] for name in self.modules]
        found = (
            ".".join(owner[:end])
            for owner in owners
            for end in range(1, len(owner) + 1)
        )
        return tuple(dict.fromkeys(found))

    @property
    def modules(self) -> list[str]:
        """Names of the modules that the halves call."""
        return [step.lstrip("+") for step in self._steps if step[0] not in "~*"]

    @property
    def _steps(self) -> list[str]:
        halves = [half for half in (self.attention, self.cross, self.mlp) if half]
        steps = [
            step
            for half in halves
            for step in (half.before, *half.chain.split(), half.outside)
        ]
        return [step for step in steps if step]

    def missing(self, block: nn.Module) -> list[str]:
        """Return the names of modules and numbers that a block does not have.

        Those of cross-attention are not needed.
        """
        return [n for n in replace(self, cross=None)._steps if not _has(block, n)]

    def unused(self, block: nn.Module) -> list[str]:
        """Return the names of what a block has and the halves do not use.

        These are modules with parameters, and parameters and buffers of its own.
        """
        starts = {name.split(".")[0] for name in self.modules}
        modules = [
            name
            for name, child in block.named_children()
            if name not in starts and any(True for _ in child.parameters())
        ]
        own = [name for name, _ in block.named_parameters(recurse=False)]
        return modules + own + [name for name, _ in block.named_buffers(recurse=False)]

    @property
    def _besides(self) -> str:
        """Describe what a block returns besides hidden states."""
        if not self.returns:
            return "no tuple"
        kinds = range(1, self.returns)
        found = ["a tensor" if i in self.tensors else "None" for i in kinds]
        return f"in a tuple with {', '.join(found) or 'nothing else'}"

    @property
    def norm(self) -> str:
        """Name of a norm in the block, whose weight is as wide as the stream."""
        return self.mlp.before or self.mlp.outside or self.mlp.chain.split()[-1]

    def hidden_of(self, block: nn.Module, hidden: Hidden, output: Any) -> Hidden:
        """Return the hidden states of what a call of a block has returned.

        Args:
            block: the block.
            hidden: what it was given, `batch seq hidden`.
            output: what it has returned.

        Raises:
            UnsupportedCallError: an opaque block has returned something of another form
                than before.
        """
        found = _first(output)
        if not self.is_opaque:
            return found
        others = output[1:] if isinstance(output, tuple) else ()
        tensors = tuple(i for i, t in enumerate(others, 1) if isinstance(t, Tensor))
        returns = len(output) if isinstance(output, tuple) else 0
        is_alike = (returns, tensors) == (self.returns, self.tensors)
        if not is_alike or found.shape != hidden.shape or found.dtype != hidden.dtype:
            raise UnsupportedCallError(
                f"a {type(block).__name__} has returned {_described(output)} for "
                f"hidden states of {hidden.dtype} and shape {tuple(hidden.shape)}: all "
                "blocks of a reversible stack have to return hidden states of the same "
                "dtype and shape, and besides them what the first block has returned, "
                f"{self._besides}"
            )
        return found

    def returned(self, hidden: Hidden) -> Any:
        """Return what a block returns that has computed these hidden states."""
        rest = [None] * (self.returns - 1)
        return (hidden, *rest) if self.returns else hidden

    def attention_half(
        self, block: nn.Module, hidden: Hidden, adapter: Adapter | None, call: Any
    ) -> Hidden:
        """Run the half that mixes tokens.

        Args:
            block: the block.
            hidden: `batch seq hidden`.
            adapter: runs after self-attention, if given.
            call: the arguments other than the hidden states that the model's loop
                passes to the block, by name.

        Returns:
            The result, of the shape of `hidden`.

        Raises:
            UnsupportedCallError: the block has no module that takes an argument.
        """
        call = _of_modules(call)
        source, mask, bias = (call.pop(name, None) for name in _OF_THE_ENCODER)
        if source is not None and self.cross is None:
            raise UnsupportedCallError(
                f"a {type(block).__name__} was given `encoder_hidden_states`, and is "
                "not known to attend to an encoder"
            )
        renamed = self._renamed(call)
        out = _run(self.attention, block, hidden, renamed, after=adapter)
        if source is None or self.cross is None:
            return out
        call |= {"attention_mask": mask, "key_value_states": source}
        if "position_bias" in call:
            call["position_bias"] = bias
        return _run(self.cross, block, out, self._renamed(call))

    def _renamed(self, call: Mapping[str, Any]) -> dict[str, Any]:
        names = dict(self.renamed)
        return {names.get(name, name): value for name, value in call.items()}

    def mlp_half(
        self,
        block: nn.Module,
        hidden: Hidden,
        adapter: Adapter | None,
        after: Adapter | None = None,
    ) -> Hidden:
        """Run the position-wise layers.

        Args:
            block: the block.
            hidden: `batch seq hidden`.
            adapter: runs on the input of the chain, if given.
            after: runs at the end of the chain, with a skip connection of its own.

        Returns:
            The result, of the shape of `hidden`. That of a parallel block does not
            contain `hidden`, and has to be added to that of the other half.
        """
        if self.is_parallel:
            return _update(self.mlp, block, hidden, {}, after, adapter)
        return _run(self.mlp, block, hidden, {}, after, adapter)

    def whole(
        self,
        block: nn.Module,
        hidden: Hidden,
        call: Mapping[str, Any],
        parallel: Adapter | None = None,
        after: Adapter | None = None,
        after_mlp: Adapter | None = None,
    ) -> Hidden:
        """Run both halves.

        Args:
            block: the block.
            hidden: `batch seq hidden`.
            call: the arguments other than the hidden states, by name.
            parallel: an adapter in parallel with the chain of the feed-forward.
            after: an adapter that runs after self-attention.
            after_mlp: an adapter that runs after the feed-forward.

        Returns:
            The hidden states that the block returns, of the shape of `hidden`.
        """
        if self.adds_input_last:
            mixed = _update(self.attention, block, hidden, _of_modules(call), after)
            return mixed + self.mlp_half(block, hidden, parallel, after_mlp) + hidden
        mixed = self.attention_half(block, hidden, after, call)
        if self.is_parallel:
            return mixed + self.mlp_half(block, hidden, parallel, after_mlp)
        return self.mlp_half(block, mixed, parallel, after_mlp)


OPAQUE = Layout(attention=Half(), mlp=Half())
"""Of blocks whose halves are unknown."""


def _of_modules(call: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a block that modules inside it may read."""
    return {n: v for n, v in call.items() if n not in _WITHOUT_EFFECT}


def _run(
    half: Half,
    block: nn.Module,
    hidden: Hidden,
    call: Mapping[str, Any],
    after: Adapter | None = None,
    parallel: Adapter | None = None,
) -> Hidden:
    """Compute one half; arguments are those of `_update`."""
    if half.inside:
        with _adapter_after(block, half.inside, after):
            return _called(block, half.chain, hidden, call)
    summed: Tensor = hidden + _update(half, block, hidden, call, after, parallel)
    return block.get_submodule(half.outside)(summed) if half.outside else summed


def _update(
    half: Half,
    block: nn.Module,
    hidden: Hidden,
    call: Mapping[str, Any],
    after: Adapter | None = None,
    parallel: Adapter | None = None,
) -> Hidden:
    """Compute what one half adds to the hidden states.

    Args:
        half: its description.
        block: the block.
        hidden: `batch seq hidden`.
        call: arguments of the first module of the chain.
        after: adapter at the end of the chain, with a skip connection of its own.
        parallel: adapter in parallel with the chain.

    Returns:
        The result, of the shape of `hidden`.
    """
    inner = block.get_submodule(half.before)(hidden) if half.before else hidden
    finish = None if parallel is None else begin(parallel, inner)
    first, *rest = half.chain.split()
    added = {"residual": hidden.new_zeros(())} if first[0] == "+" else {}
    update = _called(block, first.lstrip("+"), inner, {**call, **added})
    for step in rest:
        update = _step(block, step, update)
    if after is not None:
        update = update + after(update)
    return update if finish is None else update + finish()


def _called(
    block: nn.Module, name: str, hidden: Tensor, call: Mapping[str, Any]
) -> Tensor:
    """Call a module with what it takes of the arguments of a block."""
    module = block.get_submodule(name)
    accepted = _accepted(block, module, call)
    if _takes_position(type(module).forward):
        return _first(module(hidden, **accepted))
    # As modules of peft that wrap attention.
    return _first(module(hidden_states=hidden, **accepted))


@contextlib.contextmanager
def _adapter_after(
    block: nn.Module, name: str, adapter: Adapter | None
) -> Iterator[None]:
    """Run the body with an adapter, and its skip connection, after a module."""
    if adapter is None:
        yield
        return

    def add(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return output + adapter(output)

    with block.get_submodule(name).register_forward_hook(add):
        yield


def _described(output: Any) -> str:
    """Describe what a block has returned, for an error message."""
    if isinstance(output, Tensor):
        return f"{output.dtype} of shape {tuple(output.shape)}"
    if isinstance(output, tuple):
        return f"({', '.join(map(_described, output))})"
    return type(output).__name__


def _has(block: nn.Module, step: str) -> bool:
    """Return whether a block has the module or number that a step of a half names."""
    try:
        return attrgetter(step.lstrip("~*+"))(block) is not None
    except AttributeError:
        return False


def _step(block: nn.Module, step: str, hidden: Tensor) -> Tensor:
    if step[0] == "~":
        probability = attrgetter(step[1:])(block)
        return functional.dropout(hidden, probability, block.training)
    if step[0] == "*":
        product: Tensor = hidden * attrgetter(step[1:])(block)
        return product
    return _first(block.get_submodule(step)(hidden))


def _first(output: Any) -> Tensor:
    """Return the first of several outputs; attention also returns its weights."""
    found: Tensor = output[0] if isinstance(output, tuple) else output
    return found


def _accepted(
    block: nn.Module, module: nn.Module, call: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the arguments that a module takes; others must be None."""
    names = _names(type(module).forward)
    taken = {n: v for n, v in call.items() if names is None or n in names}
    left = [n for n, v in call.items() if n not in taken and v is not None]
    if left:
        raise UnsupportedCallError(
            f"a {type(block).__name__} was given `{left[0]}`, which its "
            f"{type(module).__name__} does not take"
        )
    return taken


@functools.cache
def _takes_position(forward: Callable[..., Any]) -> bool:
    """Return whether a method takes an argument parallels `self` by its position."""
    _, *parameters = inspect.signature(forward).parameters.values()
    by_name = (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.VAR_KEYWORD)
    return any(parameter.kind not in by_name for parameter in parameters)


@functools.cache
def _names(forward: Callable[..., Any]) -> frozenset[str] | None:
    """Return the names of a function's arguments; None if it takes any."""
    parameters = inspect.signature(forward).parameters
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return None
    return frozenset(parameters)
