"""The reversible stack, which replaces a model's list of blocks.

    h -> plain frozen blocks -> (h, h) -> rebuilt span -> stored blocks -> read-out

transformers loops over a list of blocks and passes the hidden states through each. A
loop in a `forward` receives one stand-in per block (`stand_ins`), of which the last one
runs the whole stack. All other code, such as a loop that freezes some blocks, receives
the list of the original blocks. These keep their names, with the adapters next to them
(`adapters.N...`). They cannot be called alone: a call raises an error, because a loop
outside a `forward` that calls the blocks would bypass the stack. The module holds no
tensor between forward and backward, so several forwards can run before a backward.

Integer streams begin with 32 bits. If a number in a forward does not fit, the forward
is run again with 64 bits before it returns, and all later forwards use 64 bits. The
quantum stays the same, so the computed function does too. With a cache, which a second
run would fill again, streams have 64 bits from the start. A number that does not fit
into 64 bits raises an error.
"""

import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from types import FrameType
from typing import Any, cast, no_type_check

import torch
from torch import Tensor, nn

from meft.backbone.block_call import by_name
from meft.backbone.caches import cache_of
from meft.backbone.called import allowed, is_sharded
from meft.backbone.family import Family
from meft.backbone.find import is_checkpointing
from meft.backbone.layout import Layout
from meft.backbone.parallel import NAME as PARALLEL_ADAPTER
from meft.backbone.parallel import is_divided
from meft.backbone.proof import Proven, plain_class, prove
from meft.backbone.uncalled import (
    is_compiled,
    is_replaced,
    must_be_called,
    refuse_calls,
    refuse_sharded,
    refuse_what_would_not_run,
)
from meft.bottleneck import Bottleneck
from meft.errors import (
    LostGradientWarning,
    UnsupportedCallError,
    UnsupportedModelError,
)
from meft.reversible.arithmetic import arithmetic_of, too_large
from meft.reversible.call_arguments import (
    Arguments,
    kind_of,
    leave_cache_empty,
    refuse_empty_cache,
    refuse_outputs,
    take_apart,
)
from meft.reversible.config import ReversibleConfig
from meft.reversible.coupling import Arithmetic, Coupling
from meft.reversible.extremes import Extremes
from meft.reversible.fixed import Fixed
from meft.reversible.inverse_error import InverseErrorProbe, warning_text
from meft.reversible.read_out import read_out, read_out_of_both
from meft.reversible.recompute_check import Outside, RecomputeCheck, Repeatable
from meft.reversible.rng import draw_seed
from meft.reversible.stack import run_rebuilt
from meft.reversible.stand_ins import (
    BlockArguments,
    HiddenBetween,
    NotComputed,
    StandIn,
)
from meft.reversible.twin import Stack, Streams, enter, run
from meft.reversible.variants import CouplingOptions, couplings, fresh_stream
from meft.shapes import Hidden
from meft.trainable import has_peft_layers, warn_if_frozen
from meft.transfer import TransferLedger
from meft.transforms import refuse_func, refuse_recording

CHECKPOINTING_IS_ON = (
    "gradient checkpointing is on: a reversible stack rebuilds its activations "
    "already. Pass `gradient_checkpointing=False`, in newer versions also called "
    "`activation_checkpointing=False`, to `TrainingArguments` or to TRL's `SFTConfig`, "
    "where it is on by default, and `use_gradient_checkpointing=False` to peft's "
    "`prepare_model_for_kbit_training`; or call "
    "`model.activation_checkpointing_disable()`"
)
"""The start of an error message."""
_NOT_COMPILED = (
    "a reversible stack runs eagerly: its backward is not one graph, and rebuilds "
    "activations exactly only where forward and recompute run the same kernels. "
    "Use `torch.compile(model)` without `fullgraph=True` for what is around it, and "
    "`module.compile()` on modules inside its blocks, such as attention and MLP"
)


_BLOCKS_DIFFER = (
    "`torch.compile` of a reversible model whose blocks get different arguments, or "
    "return tuples, is not supported: compile modules inside its blocks, such as "
    "attention and MLP, by `module.compile()`"
)
_CHANGE_BEFORE = (
    "To train fewer, more or other blocks, change the list before "
    "`meft.make_reversible`"
)
_STRUCTURES_DIFFER = (
    "the blocks of this model are of several structures, which one stack cannot run in "
    "halves. Without adapters (`adapter=None`) and with `mlp_chunks=1` blocks are "
    "called as they are"
)
_UNCHANGEABLE = (
    "blocks of a reversible stack cannot be replaced or removed: each has adapters of "
    f"its own. {_CHANGE_BEFORE}"
)


class ReversibleBlocks(nn.Module):
    """Run blocks with two streams, in place of a `ModuleList`.

    Args:
        listed: the original list of blocks, which become submodules and are not copied.
        adapters: one `ModuleDict` of adapters per block from `span[0]` up.
        family: the structure of the blocks.
        config: the config of the reversible model.
        span: the blocks to rebuild, as (first, end).
        model_config: the config of the model that loops over the blocks.
    """

    rebuilds_blocks = True

    def __init__(
        self,
        listed: list[nn.Module],
        adapters: nn.ModuleDict,
        family: Family,
        config: ReversibleConfig,
        span: tuple[int, int],
        model_config: Any,
    ) -> None:
        super().__init__()
        for index, block in enumerate(listed):
            self.add_module(str(index), block)
        self._num_listed = len(listed)
        self._order = family.calls(model_config, len(listed))
        # Blocks below the span are called by the stack.
        for block in dict.fromkeys(self.blocks[span[0] :]):
            refuse_calls(block)
        self.adapters = adapters
        self.family = family
        self.reversible = config
        self.span = span
        self.backward_pass = config.backward
        self.probe: InverseErrorProbe | None = None
        """InverseErrorProbe of one forward and backward; `meft.testing` sets it."""
        self.ledger = TransferLedger()
        """Bytes copied to and from a side buffer in host memory so far."""
        self._model_config = model_config
        self.stream_dtype = torch.int32
        """Dtype of `fixed` streams: int64 once a forward has computed numbers that
        int32 cannot hold. Both dtypes give the same function. Set it to int64 to avoid
        running the first such forward twice.
        """
        self._prefix = family.prefix(model_config)
        kinds = set(getattr(model_config, "layer_types", ()) or ())
        returns = any(family.layout(block).returns for block in listed)
        self._blocks_differ = (
            len(kinds) > 1
            or returns
            or self._prefix > 0
            or family.is_guess
            or len(self._order) > len(listed)
        )
        """Whether a loop over the stack alone would be another loop."""
        self._described = family
        self._proven: Proven = {}
        self._repeatable: Repeatable = {}
        self._outside: Outside = {}
        self._first_step_is_over = False
        self._had_peft_layers = has_peft_layers(self)
        self._has_warned_of_frozen = False

    def __getstate__(self) -> dict[str, Any]:
        """Return the state to copy or pickle, without what is known about kernels.

        A copy may run on another device or under another version of torch, so it
        determines for itself which of its branches give the same bits when they are run
        again.
        """
        return {
            **self.__dict__,
            "_proven": {},
            "_repeatable": {},
            "_outside": {},
            "probe": None,
        }

    def __len__(self) -> int:
        return self._num_listed

    # A type checker that wraps calls, such as that of our tests, would be the caller.
    @no_type_check
    def __iter__(self) -> Iterator[Any]:
        """Iterate over stand-ins in a `forward`, otherwise over the original blocks.

        Only the function that contains the loop is examined, not its callers: code that
        freezes blocks may be called by the `forward` of another module.
        """
        in_forward = torch.compiler.is_compiling() or _is_forward(sys._getframe(1))
        return iter(self._for_a_loop() if in_forward else self._listed)

    @no_type_check
    def __getitem__(self, index: Any) -> Any:
        """Return stand-ins in a `forward`, otherwise original blocks.

        Raises:
            UnsupportedCallError: a slice in a `forward` leaves blocks out.
        """
        in_forward = torch.compiler.is_compiling() or _is_forward(sys._getframe(1))
        if not isinstance(index, slice):
            block = self._listed[index]
            is_apart = block in self._listed[: self._prefix]
            if not in_forward or torch.compiler.is_compiling() or is_apart:
                return block
            return self._stand_in(block)
        if not in_forward:
            return nn.ModuleList(self._listed[index])
        chosen = range(self._num_listed)[index]
        if chosen != range(self._num_listed):
            raise UnsupportedCallError(
                f"a loop takes {len(chosen)} of the {self._num_listed} blocks of a "
                "reversible stack, which runs as one (did `num_hidden_layers` of the "
                f"config change?). {_CHANGE_BEFORE}"
            )
        return self._for_a_loop()

    # torch.compile traces this, and could not trace a type checker that wraps calls.
    @no_type_check
    def _for_a_loop(self) -> list[Any]:
        """Return what a loop in a `forward` iterates over."""
        if not torch.compiler.is_compiling():
            _refuse_transforms()
            apart, blocks = self._listed[: self._prefix], self._listed[self._prefix :]
            return [*apart, *map(self._stand_in, blocks)]
        # Every stand-in would be a graph break.
        if self._blocks_differ:
            raise UnsupportedCallError(_BLOCKS_DIFFER)
        return [self]

    def _stand_in(self, block: nn.Module) -> StandIn:
        called = self.blocks[self._prefix :]
        return StandIn(called, block, self._run, self._extra_outputs)

    def __setitem__(self, index: Any, block: nn.Module) -> None:
        raise UnsupportedCallError(_UNCHANGEABLE)

    def __delitem__(self, index: Any) -> None:
        raise UnsupportedCallError(_UNCHANGEABLE)

    @property
    def blocks(self) -> list[nn.Module]:
        """Return the original blocks as they are run, lowest first.

        A block that the model's loop calls several times is there as often.
        """
        listed = self._listed
        return [listed[index] for index in self._order]

    @property
    def _listed(self) -> list[nn.Module]:
        """Return the original list of blocks."""
        return [self.get_submodule(str(index)) for index in range(self._num_listed)]

    def adapters_of(self, block: int) -> nn.ModuleDict:
        """Return the adapters of block number `block`, which is `span[0]` or higher."""
        found = self.adapters[str(block)] if str(block) in self.adapters else None
        return nn.ModuleDict() if found is None else cast(nn.ModuleDict, found)

    @torch.compiler.disable(reason=_NOT_COMPILED)  # type: ignore[untyped-decorator]
    def forward(
        self,
        hidden_states: Hidden,
        *args: Any,
        arguments_of_blocks: Sequence[BlockArguments] | None = None,
        **kwargs: Any,
    ) -> Hidden:
        """Run all blocks one after the other and return the read-out.

        Args:
            hidden_states: input of the lowest block, `batch seq hidden`.
            *args: positional arguments of every block.
            arguments_of_blocks: the arguments of each block, lowest first, in place of
                `args` and `kwargs`.
            **kwargs: keyword arguments of every block.

        Returns:
            The output of the stack, of the shape of `hidden_states`.
        """
        every = arguments_of_blocks or self._for_all(args, kwargs)
        stack, streams, couplings, finite = self._streams(hidden_states, every)
        fresh = fresh_stream(couplings)
        if self.reversible.arithmetic == "fixed":
            return read_out(stack, streams, fresh, finite)
        is_post_norm = self.family.layout(self.blocks[-1]).is_post_norm
        return read_out_of_both(stack, streams, fresh, is_post_norm)

    def streams(
        self, hidden_states: Hidden, *args: Any, **kwargs: Any
    ) -> tuple[Stack, Streams, list[Coupling], Tensor | None]:
        """Run all blocks and return the streams without reading them out.

        Args:
            hidden_states: input of the lowest block, `batch seq hidden`.
            *args: positional arguments of every block.
            **kwargs: keyword arguments of every block.

        Returns:
            Both streams after the top block; the rebuilt stack; all couplings; and, for
            each row, whether every value was finite (None for `float` streams).

        Raises:
            UnsupportedCallError: a block computes numbers that `fixed` streams of 64
                bits cannot hold, or the call requests an unsupported output or
                argument.
        """
        return self._streams(hidden_states, self._for_all(args, kwargs))

    def _run(self, hidden: Hidden, every: Sequence[BlockArguments]) -> Hidden:
        output: Hidden = self(hidden, arguments_of_blocks=every)
        return output

    def _extra_outputs(
        self, block: nn.Module, hidden: Hidden, arguments: BlockArguments
    ) -> tuple[BlockArguments, tuple[Any, ...] | None]:
        """Return the arguments of a block, and its other outputs."""
        if self.family.is_guess and not isinstance(hidden, HiddenBetween):
            # What it returns is known when it has been compared.
            self._prove_one(block, hidden, arguments, "the first block")
        layout = self.family.layout(block)
        if self.family.extra_outputs is None:
            return arguments, _others(layout) if layout.returns else None
        args, kwargs = arguments
        _, call = by_name(plain_class(block), (hidden, *args), kwargs)
        call, rest = self.family.extra_outputs(block, hidden, call)
        return BlockArguments((), call), rest

    def _prove_one(
        self, block: nn.Module, hidden: Hidden, arguments: BlockArguments, label: str
    ) -> None:
        args, kwargs = arguments
        plain = plain_class(block)
        _, call = by_name(plain, (hidden, *args), kwargs)
        refuse_outputs(call, self._model_config, not self._described.is_opaque)
        self.family = prove(
            self._proven, self._described, block, plain, hidden, call, label
        )

    def _for_all(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> list[BlockArguments]:
        if self._prefix:
            raise UnsupportedCallError(
                "the loop of this model works on hidden states after block "
                f"{self._prefix - 1}: call the model, or loop over blocks as it does"
            )
        return [BlockArguments(args, kwargs)] * len(self._order)

    def _streams(
        self, hidden: Hidden, every: Sequence[BlockArguments]
    ) -> tuple[Stack, Streams, list[Coupling], Tensor | None]:
        self._refuse_call()
        self._refuse_other_order()
        calls = self._by_name(hidden, every)
        first, end = self.span
        blocks = self.blocks
        below = zip(blocks[self._prefix : first], every, strict=False)
        for block, (args, kwargs) in below:
            with allowed(block):  # it may also be a block of the span
                output = block(hidden, *args, **kwargs)
            hidden = output[0] if isinstance(output, tuple) else output
        self._prove(hidden, calls)

        context, arguments = take_apart(calls)
        seed = draw_seed() if self.training else None
        cached = any(cache_of(call) is not None for call in calls)
        # Processes that send each other parameters have to run a forward equally often,
        # whatever the values of their batches.
        is_wide = cached or any(is_sharded(b) or is_divided(b) for b in blocks)
        is_rerun = False
        while True:
            dtype = torch.int64 if is_wide else self.stream_dtype
            arithmetic = arithmetic_of(self.reversible, hidden, dtype)
            extremes = Extremes(arithmetic)
            make = partial(self._stack, arguments, arithmetic, seed)
            lower, upper = make(first, end), make(end, len(blocks))
            if (
                torch.is_grad_enabled()
                and self.backward_pass == "rebuild"
                and not cached
            ):
                check = self._check(arithmetic, calls)
                streams = run_rebuilt(
                    lower,
                    hidden,
                    context,
                    check,
                    extremes,
                    self.reversible.on_mismatch,
                    self.ledger if self.reversible.side_buffer == "host" else None,
                )
                if check.found_outside and not is_rerun:
                    # Run once more with these parameters as inputs. (Parameters that
                    # are created anew in every run cannot be inputs: the backward
                    # refuses them.)
                    is_rerun = True
                    continue
            else:
                entered = enter(lower, hidden, extremes)
                streams = run(lower, entered, context, extremes)
                del entered
            streams = run(upper, streams, context, extremes)
            if extremes.fit():
                couplings = [*lower.couplings, *upper.couplings]
                return lower, streams, couplings, extremes.finite()
            if dtype == torch.int64:
                raise UnsupportedCallError(too_large(*extremes.first_too_large()))
            del streams
            self.stream_dtype = torch.int64

    def _prove(self, hidden: Hidden, calls: Sequence[Mapping[str, Any]]) -> None:
        """Compare blocks with their own forwards, once for those that are alike.

        Args:
            hidden: input of the lowest block in the span, `batch seq hidden`.
            calls: the arguments of all blocks.
        """
        if self.family.is_opaque and not self.family.is_guess:
            return  # its blocks are called, whatever they compute
        families: dict[Layout, Family] = {}
        for index, block in list(enumerate(self.blocks))[self.span[0] :]:
            if self.reversible.adapter is None and must_be_called(block):
                continue  # it is called, whatever it computes
            plain = plain_class(block)
            found = prove(
                self._proven,
                self._described,
                block,
                plain,
                hidden,
                calls[index],
                f"block {index}",
            )
            families[found.layout(block)] = found
        if len(families) > 1 and self._described.is_guess:
            # What calls blocks themselves is right for all of them.
            opaque = [found for found in families.values() if found.is_opaque]
            if not opaque:
                raise UnsupportedModelError(_STRUCTURES_DIFFER)
            families = {opaque[0].layouts[0]: opaque[0]}
        self.family = next(iter(families.values()), self.family)

    def _refuse_call(self) -> None:
        """Refuse unsupported changes to the blocks and unsupported contexts."""
        _refuse_transforms()
        refuse_sharded(self)
        for index, block in enumerate(self.blocks[self.span[0] :], self.span[0]):
            self._refuse_uncalled(block, f"block {index}")

    def _refuse_other_order(self) -> None:
        """Refuse a loop that calls its blocks in another order than at first."""
        order = self.family.calls(self._model_config, self._num_listed)
        if order != self._order:
            raise UnsupportedCallError(
                f"the config of the model says that {len(order)} blocks run, and the "
                f"stack was made for {len(self._order)}: each has adapters of its own. "
                f"{_CHANGE_BEFORE}"
            )

    def _refuse_uncalled(self, block: nn.Module, label: str) -> None:
        """Refuse code attached to a block that is not called, or replaced by ours."""
        config = self.reversible
        is_alike = config.variant != "meft3" and not hasattr(block, PARALLEL_ADAPTER)
        can_be_called = is_alike and config.mlp_chunks == 1
        if config.adapter is None and can_be_called and self.family.has(block):
            return
        if is_replaced(block) or is_compiled(block):
            can_be_called = False  # the call would run ours in place of it
        remedy = (
            "; a stack calls blocks as a whole with `adapter=None`, or `meft1` or "
            "`meft2`, and `mlp_chunks=1`, in models without sparse adapters"
        )
        if (is_sharded(block) or is_compiled(block)) and not can_be_called:
            raise UnsupportedCallError(
                f"{label} is sharded by FSDP2 or compiled, so it has to be called, and "
                f"this stack runs it in parts{remedy}; compiled ones only with "
                "`adapter=None`. Modules inside, such as attention and MLP, can be "
                "compiled in any stack"
            )
        refuse_what_would_not_run(self.family, block, label, can_be_called, remedy)

    def _by_name(
        self, hidden: Hidden, every: Sequence[BlockArguments]
    ) -> list[dict[str, Any]]:
        """Return the arguments of each block by name, and refuse unsupported ones."""
        if getattr(self, "_is_replica", False):
            raise UnsupportedCallError(
                "`nn.DataParallel` is not supported: its replicas have no parameters, "
                "so adapters would get no gradient. Start one process per device "
                "(`torchrun`, `accelerate launch`)"
            )
        blocks = self.blocks[self._prefix :]
        apart: list[dict[str, Any]] = [{} for _ in range(self._prefix)]
        calls = apart + [
            by_name(plain_class(block), (hidden, *args), kwargs)[1]
            for block, (args, kwargs) in zip(blocks, every, strict=True)
        ]
        for call in calls:
            refuse_outputs(call, self._model_config, not self.family.is_opaque)
        if self.training and is_checkpointing(self):
            raise UnsupportedCallError(f"{CHECKPOINTING_IS_ON} before training")
        trains = self.training and torch.is_grad_enabled()
        if trains:
            self._warn_if_frozen()
        for call in calls:
            refuse_empty_cache(call)
        if trains:
            for call in calls:
                leave_cache_empty(call)
        return calls

    def _warn_if_frozen(self) -> None:
        if len(self.adapters) and not self._has_warned_of_frozen:
            adapters = (m for m in self.adapters.modules() if isinstance(m, Bottleneck))
            self._has_warned_of_frozen = warn_if_frozen(
                [w for m in adapters for w in (m.down.weight, m.up.weight)],
                "meft.make_reversible",
                ".adapters.",
                peft_came_last=has_peft_layers(self) and not self._had_peft_layers,
            )

    def _stack(
        self,
        arguments: Sequence[Arguments],
        arithmetic: Arithmetic,
        seed: int | None,
        first: int,
        end: int,
    ) -> Stack:
        options = CouplingOptions(
            variant=self.reversible.variant,
            scales=self.reversible.scales,
            difference=self.reversible.is_difference,
            num_chunks=self.reversible.mlp_chunks,
        )
        blocks = {
            index: (block, self.adapters_of(index))
            for index, block in enumerate(self.blocks[first:end], first)
        }
        return Stack(
            couplings=list(couplings(options, self.family, blocks, arguments)),
            arithmetic=arithmetic,
            seed=seed,
            num_chunks=self.reversible.mlp_chunks,
        )

    def _check(
        self, arithmetic: Arithmetic, calls: Sequence[Mapping[str, Any]]
    ) -> RecomputeCheck:
        exact = isinstance(arithmetic, Fixed)
        probe = self.probe
        if probe is None and not exact and not self._first_step_is_over:
            dtype = arithmetic.gradient_dtype

            def report(probe: InverseErrorProbe) -> None:
                if not self._first_step_is_over:
                    self._first_step_is_over = True
                    _warn_if_lost(self.reversible, probe, dtype)

            probe = InverseErrorProbe(when_done=report)
        kinds = tuple(dict.fromkeys(map(kind_of, calls)))
        return RecomputeCheck(
            exact, self._repeatable, kinds, probe, outside=self._outside
        )


def _others(layout: Layout) -> tuple[Any, ...]:
    """Return what a block returns besides hidden states, without computing it."""
    return tuple(
        NotComputed(f"output {index} of a block") if index in layout.tensors else None
        for index in range(1, layout.returns)
    )


def _refuse_transforms() -> None:
    refuse_func("a reversible model")
    refuse_recording("how wide its streams are depends on the values of the batch")


def _is_forward(frame: FrameType) -> bool:
    # The second name is the one `torch.compile` gives to code after a graph break.
    name = frame.f_code.co_name
    return name == "forward" or name.startswith("torch_dynamo_resume_in_forward_at_")


def _warn_if_lost(
    config: ReversibleConfig, probe: InverseErrorProbe, dtype: torch.dtype
) -> None:
    errors = probe.estimated_errors()
    text = warning_text(probe.blocks(), errors, *config.scales, dtype)
    if text is not None:
        warnings.warn(text, LostGradientWarning, stacklevel=2)


def find_stacks(model: nn.Module) -> dict[str, ReversibleBlocks]:
    """Return the reversible stacks in `model` by name; the result may be empty."""
    named = model.named_modules()
    return {name: m for name, m in named if isinstance(m, ReversibleBlocks)}


def reversible_stacks(model: nn.Module) -> dict[str, ReversibleBlocks]:
    """Return the reversible stacks in `model` by name, of which there is at least one.

    Raises:
        UnsupportedModelError: `model` was not converted by `make_reversible()`.
    """
    stacks = find_stacks(model)
    if not stacks:
        raise UnsupportedModelError(
            f"this {type(model).__name__} is not reversible: call "
            "`meft.make_reversible(model, config)` first"
        )
    return stacks
