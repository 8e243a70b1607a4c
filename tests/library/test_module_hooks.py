"""Which hooks of modules run, how often, and which are refused."""

import copy
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.modules import module as torch_module

import meft
from library.families import CASES, Case, cases
from library.families import gradients as family_gradients
from library.families import reversible as reversible_case
from library.models import batch, classifier, gradients, only_stack, reversible
from library.sparse import batches, config
from meft.backbone.families import FAMILIES
from meft.backbone.find import find_blocks
from meft.reversible.blocks import ReversibleBlocks, find_stacks

KINDS: dict[str, Callable[[Any, Callable[..., Any]], Any]] = {
    "forward pre-hook": lambda m, f: m.register_forward_pre_hook(f),
    "forward hook": lambda m, f: m.register_forward_hook(f),
    "full backward pre-hook": lambda m, f: m.register_full_backward_pre_hook(f),
    "backward hook": lambda m, f: m.register_full_backward_hook(f),
}
INSIDE = (
    "attention.self",
    "attention.self.query",
    "attention.output.dense",
    "attention.output.LayerNorm",
    "intermediate",
    "intermediate.dense",
    "output.dense",
    "output.LayerNorm",
)
"""Modules of a BERT block that are called."""

Counts = dict[str, list[int]]


def counts(model: Any, modules: dict[str, nn.Module]) -> Counts:
    """How often hooks ran in one step, for each module in the order of `KINDS`."""
    seen: Counter[tuple[str, str]] = Counter()
    handles = []
    for name, module in modules.items():
        for kind, register in KINDS.items():

            def note(*_: Any, key: Any = (name, kind)) -> None:
                seen[key] += 1

            handles.append(register(module, note))
    model(**batch()).loss.backward()
    for handle in handles:
        handle.remove()
    return {name: [seen[name, kind] for kind in KINDS] for name in modules}


def inside(model: Any, block: int) -> dict[str, nn.Module]:
    owner = model.bert.encoder.layer[block]
    return {name: owner.get_submodule(name) for name in INSIDE}


def whole(**options: Any) -> Any:
    model = reversible(2, variant="meft1", **options)
    model.requires_grad_(True)
    return model


def test_hooks_run_as_often_as_under_checkpointing() -> None:
    """In a module inside a block: once in the forward and once in the recompute;
    backward hooks once. With `mlp_chunks=3` those of what treats tokens alone, once a
    chunk instead. The twin runs everything once."""
    plain = classifier(2).train()
    plain.activation_checkpointing_enable({"use_reentrant": False})
    under_checkpointing = counts(plain, inside(plain, 0))
    # Checkpointing stops its recompute before the last norm has returned.
    assert under_checkpointing.pop("output.LayerNorm") == [2, 1, 1, 1]

    for options in ({}, {"arithmetic": "float"}):
        model = whole(**options)
        counts(model, {})  # the first batch of this shape, see below
        found = counts(model, inside(model, 0))
        assert found.pop("output.LayerNorm") == [2, 2, 1, 1]
        assert found == under_checkpointing
        adapter = only_stack(model).adapters_of(0)["feed_forward"]
        assert counts(model, {"adapter": adapter})["adapter"] == [2, 2, 1, 1]
        stack = only_stack(model)
        assert counts(model, {"stack": stack})["stack"] == [1, 1, 1, 1]

    model = whole(mlp_chunks=3)
    counts(model, {})
    found = counts(model, inside(model, 0))
    for name in ("attention.self", "attention.output.LayerNorm"):
        assert found[name] == [2, 2, 1, 1]
    for name in ("intermediate", "output.dense"):
        assert found[name] == [6, 6, 3, 3]

    only_stack(model).backward_pass = "store"
    assert counts(model, inside(model, 0))["attention.self"] == [1, 1, 1, 1]


def test_the_first_batch_of_a_shape_runs_forward_hooks_once_more() -> None:
    """With `fixed` streams every branch is first run twice. Backward hooks run once all
    the same; in floats there is no trial."""
    model = whole()
    assert counts(model, inside(model, 0))["output.dense"] == [3, 3, 1, 1]
    assert counts(model, inside(model, 0))["output.dense"] == [2, 2, 1, 1]
    floats = whole(arithmetic="float")
    assert counts(floats, inside(floats, 0))["output.dense"] == [2, 2, 1, 1]

    # Values that need wider streams: the forward runs once more.
    model = whole()
    with torch.no_grad():
        model.bert.encoder.layer[0].output.LayerNorm.bias.fill_(1e6)
    assert counts(model, inside(model, 0))["output.dense"] == [4, 4, 1, 1]
    assert counts(model, inside(model, 0))["output.dense"] == [2, 2, 1, 1]

    model = whole()
    seen = []

    def differ(module: nn.Module, args: Any, out: Tensor) -> Tensor:
        seen.append(torch.is_grad_enabled())
        return out + 1 if torch.is_grad_enabled() else out

    model.bert.encoder.layer[0].output.dense.register_forward_hook(differ)
    model(**batch()).loss.backward()
    assert seen == [True, True, True]


@cases("Model")
def test_what_is_called_in_a_block(case: Case) -> None:
    """Of the modules that a block of each family calls, all but the block itself and
    those that the family says it runs in parts are called by its halves too."""
    seen: set[nn.Module] = set()

    def note(module: nn.Module, args: Any) -> None:
        seen.add(module)

    model = case.build().eval()
    lists = {found.name: found for found in find_blocks(model)}
    handle = torch_module.register_module_forward_pre_hook(note)
    try:
        with torch.no_grad():
            model(**case.batch())
            # The first of a stack is compared with its own forward.
            called = {name: _called(f.blocks[-1], seen) for name, f in lists.items()}
            seen.clear()
            reversible_model = reversible_case(case).eval()
            reversible_model(**case.batch())
    finally:
        handle.remove()
    for name, stack in find_stacks(reversible_model).items():
        missing = called[name] - _called(stack[-1], seen)
        in_parts = {"", *lists[name].family.layout(stack[-1]).in_parts}
        assert missing == in_parts & called[name]  # lists are never called


def _called(block: nn.Module, seen: set[nn.Module]) -> set[str]:
    return {name for name, module in block.named_modules() if module in seen}


@pytest.mark.parametrize("backward", ["rebuild", "store"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["", "attention", "attention.output", "output"])
def test_a_hook_that_would_never_run_is_refused(
    name: str, kind: str, backward: str
) -> None:
    """On a block or on a container in it that is run in parts, by a message that says
    where hooks do run; in evaluation too, whether put there before the conversion or
    after it. Removed, everything is as before."""

    def log_norm(*_: Any) -> None:
        raise AssertionError("called")

    model = classifier(2)
    block = model.bert.encoder.layer[1]
    handle = KINDS[kind](block.get_submodule(name), log_norm)
    # A block is called as a whole only without chunks.
    chunks = 1 if name else 2
    meft.make_reversible(
        model,
        meft.ReversibleConfig(variant="meft1", backward=backward, mlp_chunks=chunks),
    )
    owner = f"`{name}` of block 1" if name else "block 1"
    says = rf"^{owner} has a {kind} \(`.*log_norm`\).*`output.dense`"
    for _ in model.train(), model.eval():
        if name.startswith("attention"):
            says = says.replace("`output.dense`", "`attention.output.dense`")
        with pytest.raises(meft.UnsupportedCallError, match=says):
            model(**batch())
    handle.remove()
    model(**batch())


def test_a_block_with_hooks_is_called() -> None:
    """As often as under checkpointing: twice if it is rebuilt, and once if not."""
    model = reversible(3, variant="meft1", span=(1, 2)).requires_grad_(True)
    blocks = {str(index): only_stack(model)[index] for index in range(3)}
    counts(model, blocks)  # the first batch of this shape
    found = counts(model, blocks)
    assert found == {"0": [1, 1, 1, 1], "1": [2, 2, 1, 1], "2": [1, 1, 1, 1]}


def _is_parallel(stack: ReversibleBlocks) -> bool:
    """Whether blocks add three terms, in another order when they run in one part."""
    return stack.family.layout(stack[0]).is_parallel


@pytest.mark.parametrize("config", [{"variant": "meft1"}, {"variant": "meft2"}, {}])
@cases("Model")
def test_hooks_on_blocks_change_nothing(case: Case, config: dict[str, Any]) -> None:
    """They see hidden states of the whole block, and gradients are as without them;
    a hook that changes what a block returns does so in the twin too."""
    options: Any = {"adapter": None} if not config else {"bottleneck_size": 3} | config
    models = []
    for _ in range(3):
        torch.manual_seed(1)
        made = meft.make_reversible(case.build(), meft.ReversibleConfig(**options))
        models.append(made.train().requires_grad_(True))
    plain, hooked, twin = models
    for stack in find_stacks(twin).values():
        stack.backward_pass = "store"
    shapes = set()

    def look(block: nn.Module, args: Any, out: Any) -> None:
        shapes.add((out[0] if isinstance(out, tuple) else out).shape)

    for model in (hooked, twin):
        for stack in find_stacks(model).values():
            for block in stack:
                block.register_forward_hook(look)
    # In evaluation: the dropout of a block that runs in one part has other masks than
    # that of one in two.
    for model in (plain, hooked):
        model.eval()
    expected, found = (family_gradients(m, case.batch()) for m in (plain, hooked))
    assert expected.keys() == found.keys()
    if not any(_is_parallel(stack) for stack in find_stacks(plain).values()):
        assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert {len(shape) for shape in shapes} == {3}

    def double(block: nn.Module, args: Any, out: Any) -> Any:
        return (2 * out[0], *out[1:]) if isinstance(out, tuple) else 2 * out

    for model in (hooked, twin):
        for stack in find_stacks(model).values():
            stack[1].register_forward_hook(double)
        model.train()
    found, stored = (family_gradients(m, case.batch()) for m in (hooked, twin))
    assert found.keys() == stored.keys()
    assert all(torch.equal(found[name], stored[name]) for name in found)


def test_the_blocks_of_every_family_refuse() -> None:
    """A hook on the last block of each, where halves are apart."""
    models = [case for case in CASES if case.kind.endswith("Model")]
    assert {case.family for case in models} == {family.name for family in FAMILIES}
    for case in models:
        model = reversible_case(case, variant="meft3")
        for stack in find_stacks(model).values():
            stack[-1].register_forward_hook(lambda *_: None)
        with pytest.raises(
            meft.UnsupportedCallError,
            match=r"block . has a forward hook.*a stack calls blocks as a whole with",
        ):
            model(**case.batch())


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
def test_a_compiled_block_is_called() -> None:
    """Without adapters; its own graph has no break."""
    model = meft.make_reversible(
        classifier(2), meft.ReversibleConfig(adapter=None)
    ).train()
    twin = copy.deepcopy(model)
    for each in (model, twin):
        for block in only_stack(each):
            block.compile(backend="aot_eager", fullgraph=True)
    only_stack(twin).backward_pass = "store"
    found, stored = (gradients(each, batch()) for each in (model, twin))
    assert all(torch.equal(found[name], stored[name]) for name in stored)
    graphs = torch._dynamo.utils.counters["stats"]
    before = graphs["unique_graphs"]
    gradients(model, batch())
    assert graphs["unique_graphs"] == before > 0  # a second step compiles nothing
    in_parts = reversible(2, variant="meft1")
    only_stack(in_parts)[0].compile(backend="aot_eager")
    with pytest.raises(meft.UnsupportedCallError, match="compiled"):
        in_parts(**batch())


def test_hooks_of_transformers_itself_are_none_of_ours() -> None:
    """A call with `output_hidden_states=True` leaves hooks on all blocks, refused or
    not. They collect nothing otherwise, so training goes on."""
    model = classifier(2)
    with torch.no_grad():
        model(**batch(), output_hidden_states=True)
    assert model.bert.encoder.layer[0]._forward_hooks
    meft.make_reversible(model, meft.ReversibleConfig(variant="meft1"))
    model(**batch()).loss.backward()
    with pytest.raises(meft.UnsupportedCallError, match="output_hidden_states"):
        model(**batch(), output_hidden_states=True)
    model(**batch()).loss.backward()


def test_a_replaced_forward_of_a_block_is_refused() -> None:
    """As accelerate does where the blocks of a model are on several devices."""
    accelerate = pytest.importorskip("accelerate")
    model = reversible(2, variant="meft1")
    block = only_stack(model)[0]
    accelerate.hooks.add_hook_to_module(block, accelerate.hooks.ModelHook())
    with pytest.raises(meft.UnsupportedCallError, match="block 0 has a `forward` that"):
        model(**batch())
    accelerate.hooks.remove_hook_from_module(block)
    model(**batch())


def test_a_wrapped_block_is_refused() -> None:
    """Its wrapper would be passed over."""

    class Wrapper(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

    model = reversible(2, variant="meft1")
    stack = only_stack(model)
    setattr(stack, "0", Wrapper(stack[0]))
    with pytest.raises(meft.UnsupportedCallError, match="replaced by a Wrapper"):
        model(**batch())


def test_fsdp_around_a_stack_is_refused(one_process: Any) -> None:
    """Its blocks have to be gathered one by one."""
    model: Any = reversible(2, variant="meft1")
    fully_shard(only_stack(model), mesh=one_process)
    fully_shard(model, mesh=one_process)
    with pytest.raises(meft.UnsupportedCallError, match="is sharded by FSDP"):
        model(**batch())


def test_fsdp_around_the_whole_model_gives_its_gradients(one_process: Any) -> None:
    """All weights are gathered before the blocks run."""
    model: Any = reversible(2, variant="meft1").requires_grad_(True)
    plain = copy.deepcopy(model)
    fully_shard(model, mesh=one_process)
    for each in (model, plain):
        torch.manual_seed(0)
        each(**batch()).loss.backward()
    for one, other in zip(model.parameters(), plain.parameters(), strict=True):
        if other.grad is None:
            assert one.grad is None
        else:
            assert torch.equal(one.grad.full_tensor(), other.grad)


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[Any]:
    """A mesh of this process alone."""
    group = torch.distributed
    group.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    yield group.device_mesh.init_device_mesh("cpu", (1,))
    group.destroy_process_group()


def test_containers_next_to_a_sparse_adapter_are_refused() -> None:
    """A block that carries one is called, and its containers are not."""
    model = classifier(2)
    meft.add_sparse_adapters(model, config())
    block: Any = model.bert.encoder.layer[1]
    assert counts(model, {"block": block})["block"][:2] == [1, 1]
    block.output.register_forward_hook(lambda *_: None)
    with pytest.raises(
        meft.UnsupportedCallError, match=r"`output` of a BertLayer .* the block"
    ):
        model(**batch())


def test_hooks_of_all_modules_see_those_that_are_called() -> None:
    """Global hooks of torch, as profilers use them: every module but those that are run
    in parts, for which there is no call to see."""
    model = reversible(2, variant="meft1")
    names = {module: name for name, module in only_stack(model).named_modules()}
    seen: set[str] = set()

    def note(module: nn.Module, args: Any, out: Any) -> None:
        seen.add(names.get(module, "outside"))

    handle = torch_module.register_module_forward_hook(note)
    try:
        model(**batch())
    finally:
        handle.remove()
    assert {"", "1.attention.self", "1.output.dense", "adapters.1.feed_forward"} <= seen
    assert not {"1", "1.attention", "1.attention.output", "1.output"} & seen


def _twice(module: nn.Module, d_in: Any, d_out: Any) -> Any:
    return (2 * d_in[0],)


def _negated(module: nn.Module, d_out: Any) -> Any:
    return (-d_out[0],)


def _first_negated(module: nn.Module, d_in: Any, d_out: Any) -> Any:
    return (-d_in[0], *d_in[1:])


@pytest.mark.parametrize("num_chunks", [1, 3])
def test_a_hook_that_changes_what_passes_it(num_chunks: int) -> None:
    """Inputs, outputs and gradients, elementwise: as for the twin, bit for bit."""
    model = whole(mlp_chunks=num_chunks)
    plain = gradients(model, batch())
    for module in inside(model, 1).values():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(lambda m, args: (args[0] * 1.5,))
            module.register_forward_hook(lambda m, args, out: out.tanh())
            module.register_full_backward_hook(_twice)
            module.register_full_backward_pre_hook(_negated)
    stack = only_stack(model)
    stack.register_forward_hook(lambda m, args, out: out * 0.5)
    stack.register_full_backward_hook(_first_negated)
    rebuilt = gradients(model, batch())
    stack.backward_pass = "store"
    stored = gradients(model, batch())
    assert not [n for n in rebuilt if not torch.equal(rebuilt[n], stored[n])]
    name = "bert.encoder.layer.0.output.dense.weight"
    assert not torch.equal(plain[name], rebuilt[name])


def test_a_hook_that_acts_differently_each_time_is_refused() -> None:
    """In the forward if it does so from the start, in the backward if it begins then:
    the recompute would see another activation."""
    model = whole()
    dense = model.bert.encoder.layer[0].output.dense
    noise = torch.Generator().manual_seed(0)
    handle = dense.register_forward_hook(
        lambda m, args, out: out + torch.rand(out.shape, generator=noise)
    )
    with pytest.raises(meft.UnsupportedCallError, match=r"block 0 .* same bits"):
        model(**batch())
    handle.remove()
    loss = model(**batch()).loss
    dense.register_forward_hook(lambda m, args, out: out + 1)
    with pytest.raises(meft.ReconstructionError, match="block 0"):
        loss.backward()


def test_a_sparse_adapter_runs_its_hooks() -> None:
    """Inside a reversible stack too, as a module of the block."""
    from library.sparse import plain_model

    model = plain_model()
    meft.add_sparse_adapters(model, config())
    meft.make_reversible(
        model, meft.ReversibleConfig(variant="meft1", bottleneck_size=3)
    )
    seen: list[int] = []
    adapter: Any = only_stack(model)[0].parallel_adapter
    adapter.register_forward_hook(lambda *_: seen.append(1))
    first, second = batches(2)
    model(**first).loss.backward()
    assert len(seen) == 3
    model(**second).loss.backward()
    assert len(seen) == 5
