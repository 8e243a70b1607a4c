import dataclasses
import functools
from typing import Any

import pytest
import torch

from harness.tiny import (
    BLOCKS,
    FAMILIES,
    HIDDEN,
    LABELS,
    batch,
    cell,
    classifier,
    num_lists,
)
from marks import slow_but_for
from meft.backbone.find import BlockList, find_blocks
from meft.backbone.heads import NEW_HEADS
from meft.errors import UnsupportedModelError
from meft.sparse.adapter import SparseAdapter, sparse_adapters
from meft.sparse.dense import DenseAdapter
from meft.testing import saved_bytes
from meft_bench.child.meters.routing import look
from meft_bench.child.meters.rows import TrafficMeter
from meft_bench.child.meters.transfers import ledgers_of
from meft_bench.child.methods.adapters import AdaptedBlock
from meft_bench.child.training.steps import Stepper
from meft_bench.shared.cell import Cell
from meft_bench.shared.methods import TABLE
from meft_bench.shared.registry import HAVE_ROWS, METHODS, load
from meft_bench.shared.source import MissingError

HEAD = HIDDEN * LABELS + LABELS
R = 4
BOTTLENECK = 2 * HIDDEN * R + HIDDEN + R


def block_of(width: int, inner: int) -> int:
    """Parameters of a block of BERT."""
    attention = 4 * (width * width + width) + 2 * width
    return attention + 2 * width * inner + inner + width + 2 * width


MLP = 64
ALL = sum(p.numel() for p in classifier().parameters())
LORA = HEAD + BLOCKS * 2 * 2 * HIDDEN * R
ADAPTERS = HEAD + BLOCKS * 2 * BOTTLENECK
LORA_ALL = HEAD + BLOCKS * R * (4 * 2 * HIDDEN + 2 * (HIDDEN + MLP))
DORA = LORA + BLOCKS * 2 * HIDDEN
PROMPT = 20 * HIDDEN
BITFIT = HEAD + BLOCKS * (7 * HIDDEN + MLP)
NEURONS, EXPERTS = 256, 64
SPARSE = [family for family in FAMILIES if family != "bart"]
"""Those that rows in host memory can be added to."""
PHASES = ("forward", "backward", "update")
ROWS = HEAD + BLOCKS * 2 * NEURONS * HIDDEN
ROUTED = ROWS + BLOCKS * EXPERTS * HIDDEN
FORMULAS = {
    "full": ALL,
    "checkpointing": ALL,
    "head": HEAD,
    "lora": LORA,
    "lora-checkpointing": LORA,
    "checkpointing-offload": ALL,
    "lora-checkpointing-offload": LORA,
    "adapters": ADAPTERS,
    "adapters-checkpointing": ADAPTERS,
    "meft1": ADAPTERS,
    "meft2": ADAPTERS,
    "meft3": ADAPTERS,
    "meft1-store": ADAPTERS,
    "meft2-store": ADAPTERS,
    "meft3-store": ADAPTERS,
    # Nothing would read a reversible adapter in the top block.
    "meft1-exact": ADAPTERS - BOTTLENECK,
    "meft2-exact": ADAPTERS,
    "meft3-exact": ADAPTERS,
    "meft1-exact-store": ADAPTERS - BOTTLENECK,
    "meft2-exact-store": ADAPTERS,
    "meft3-exact-store": ADAPTERS,
    "lora-exact": LORA,
    "lora-exact-store": LORA,
    "full-exact": ALL,
    "full-exact-store": ALL,
    "lora-all": LORA_ALL,
    "lora-all-checkpointing": LORA_ALL,
    "rslora": LORA,
    "dora": DORA,
    "dora-checkpointing": DORA,
    "lora-fa": HEAD + BLOCKS * 2 * HIDDEN * R,
    "vera": HEAD + BLOCKS * 2 * (256 + HIDDEN),
    # Keys, values, and what the last layer of attention and of the MLP read.
    "ia3": HEAD + BLOCKS * (3 * HIDDEN + MLP),
    # A skew-symmetric block of 32; eight blocks of 4, and a size for each output.
    "oft": HEAD + BLOCKS * 2 * (32 * 31 // 2),
    "boft": HEAD + BLOCKS * 2 * (8 * 4 * 4 + HIDDEN),
    "ln-tuning": HEAD + (2 * BLOCKS + 1) * 2 * HIDDEN,
    "prompt-tuning": HEAD + PROMPT,
    "p-tuning": HEAD + PROMPT + 3 * (HIDDEN * HIDDEN + HIDDEN),
    "bitfit": BITFIT,
    "bitfit-checkpointing": BITFIT,
    "houlsby": ADAPTERS,
    "houlsby-checkpointing": ADAPTERS,
    "pfeiffer": HEAD + BLOCKS * BOTTLENECK,
    "parallel-adapters": HEAD + BLOCKS * BOTTLENECK,
    "compacter": HEAD + 4**3 + BLOCKS * 2 * (2 * (HIDDEN + R) + HIDDEN + R),
    # Blocks of half the width, a layer for each input and one back, and gates.
    "lst": HEAD
    + BLOCKS * block_of(HIDDEN // 2, MLP // 2)
    + (BLOCKS + 1) * (HIDDEN * HIDDEN // 2 + HIDDEN // 2)
    + BLOCKS
    + (HIDDEN // 2 * HIDDEN + HIDDEN),
    "checkpointing-segments": ALL,
    "lora-checkpointing-segments": LORA,
    "save-on-cpu": ALL,
    "lora-save-on-cpu": LORA,
    "lisa": ALL,
    "mezo": ALL,
    "galore": ALL,
    "badam": HEAD + BLOCKS * block_of(HIDDEN, MLP),
    # Two lists of 16 keys for each of 4 heads, queries of as many numbers, and values.
    "pkm": HEAD + BLOCKS * (HIDDEN * 64 + 4 * 2 * 16 * 8 + NEURONS * HIDDEN),
    "dense": ROWS,
    "dense-offload": ROWS,
    "sparse": ROWS,
    "sparse-experts": ROUTED,
    # Without a gate the router cannot learn.
    "sparse-experts-union": ROWS,
    "sparse-experts-resident": ROUTED,
    "sparse-experts-lookahead": ROUTED,
    "sparse-experts-divided": ROUTED,
    "sparse-experts-frozen": ROWS,
    "sparse-experts-random": ROWS,
    "sparse-experts-no-cache": ROUTED,
    "sparse-experts-window": ROUTED,
    "sparse-experts-home": ROUTED,
    "sparse-experts-no-prefetch": ROUTED,
    "sparse-experts-wide": ROUTED,
    "sparse-experts-lazy": ROUTED,
    "sparse-experts-dense-update": ROUTED,
}


NO_BIAS = {"llama", "mistral", "qwen3"}
DECODERS = {"opt", "gpt_neox", *NO_BIAS}
REFUSED: dict[str, set[str]] = {
    "bitfit": NO_BIAS,
    "bitfit-checkpointing": NO_BIAS,
    "prompt-tuning": {"bart", *DECODERS},
    "p-tuning": {"bart", *DECODERS},
    "prefix-tuning": {*FAMILIES},
    "lst": {"bart"},
}
"""Families whose classifiers a method refuses."""
ELSEWHERE = ("streamed-offload", "lora-streamed-offload")
"""Methods that need a GPU."""
HERE = [name for name in METHODS if name in FORMULAS]
EXACT = [name for name, m in TABLE.items() if m.streams == "integer" and not m.twin_of]
"""Methods with an exact inverse."""


def made(method: str, family: str = "bert", **changes: object) -> Any:
    sizes = {"bottleneck_size": R, "lora_rank": R, "num_neurons": NEURONS}
    chosen = cell(method=method, **(sizes | changes))
    torch.manual_seed(5)
    return load(METHODS[method])(classifier(family), chosen)


def stepper_of(model: Any, chosen: Cell) -> Stepper:
    """Skips the test where a library of the method is missing."""
    try:
        return Stepper(model, chosen)
    except MissingError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize(
    ("method", "family"),
    [(method, family) for method in REFUSED for family in sorted(REFUSED[method])],
)
def test_what_a_method_cannot_train_is_refused(method: str, family: str) -> None:
    """When it is applied, with something to take instead."""
    with pytest.raises(ValueError, match=rf"method '{method}'.*: take|, or '"):
        made(method, family)


def loss_and_gradients(
    model: Any,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Of one training forward and backward, with dropout."""
    stepper = Stepper(model.train(), cell())
    torch.manual_seed(1)
    loss = stepper.loss(stepper.to_device(batch()))
    loss.backward()
    named = model.named_parameters()
    return loss.detach(), {n: p.grad for n, p in named if p.grad is not None}


def num_trained(model: torch.nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_every_method_that_classifiers_can_have_here_has_a_formula() -> None:
    assert set(METHODS) - set(FORMULAS) == {"prefix-tuning", *ELSEWHERE}


@pytest.mark.parametrize("method", HERE)
def test_a_method_trains_as_many_parameters_as_its_formula_says(method: str) -> None:
    """The head, and per block two bottlenecks or two LoRA pairs, and no more."""
    assert num_trained(made(method)) == FORMULAS[method]


@pytest.mark.parametrize("method", HERE)
def test_a_step_gives_a_gradient_to_what_trains_and_to_nothing_else(
    method: str,
) -> None:
    """Every trained parameter is reached by backward; frozen ones get no gradient."""
    model = made(method).train()
    model(**batch()).loss.backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name


STARTS = ["full", "head", "lora", "checkpointing", "lora-all", "rslora", "dora"]
STARTS += ["lora-fa", "vera", "ia3", "oft", "boft", "ln-tuning", "bitfit"]
STARTS += ["checkpointing-segments", "save-on-cpu", "lisa", "mezo", "galore", "badam"]


@pytest.mark.parametrize("method", STARTS)
def test_a_method_starts_at_the_function_of_the_backbone(method: str) -> None:
    """Nothing is added, or what is added starts as exactly zero."""
    with torch.no_grad():
        expected = classifier().eval()(**batch()).logits
        got = made(method).eval()(**batch()).logits
    assert torch.equal(got, expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_adapted_block_whose_adapters_output_zero_is_the_block(family: str) -> None:
    """Whatever the model's loop passes to it, by position or by name."""
    plain, adapted = classifier(family).eval(), made("adapters", family).eval()
    rows = {name: batch()[name] for name in ("input_ids", "attention_mask")}
    rows["attention_mask"][0, 5:] = 0
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "adapter.up" in name:
                parameter.zero_()
        assert torch.equal(adapted(**rows).logits, plain(**rows).logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_adapters_sit_where_meft3_has_them(family: str) -> None:
    """A block equals its family's two halves, given the same adapters."""
    plain, adapted = classifier(family), made("adapters", family)
    seen = []

    def compare(
        found: BlockList,
        module: torch.nn.Module,
        args: Any,
        kwargs: Any,
        output: torch.Tensor,
    ) -> None:
        assert isinstance(module, AdaptedBlock)
        # BERT's loop gives the mask by position, BART's what the encoder saw too.
        names = ("attention_mask", "encoder_hidden_states")
        call = kwargs | dict(zip(names, args[1:], strict=False))
        pair = module.attention_adapter, module.mlp_adapter
        family, block = found.family, found.blocks[1]
        if family.layout(block).is_parallel:
            expected = family.whole(block, args[0], *reversed(pair), **call)
        else:
            attended = family.attention_half(block, args[0], pair[0], **call)
            expected = family.mlp_half(block, attended, pair[1])
        seen.append(torch.equal(output, expected))

    adapted.eval()
    for found in find_blocks(plain.eval()):
        blocks = adapted.get_submodule(found.name)
        hook = functools.partial(compare, found)
        blocks[1].register_forward_hook(hook, with_kwargs=True)
    rows = {name: batch()[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        adapted(**rows)
    assert seen == [True] * num_lists(family)


EVERY = [
    (method, family)
    for method in HERE
    for family in (SPARSE if method in HAVE_ROWS else FAMILIES)
    if family not in REFUSED.get(method, ())
]
SAMPLE = [
    (method, family)
    for method, family in EVERY
    if family in ("bert", "llama") or method in ("full", "meft1-exact", "sparse")
]
"""Every method, every family, and not every method with every family."""


# The paper's arithmetic may lose gradients here, and says so.
@pytest.mark.filterwarnings("ignore::meft.LostGradientWarning")
@pytest.mark.parametrize(("method", "family"), slow_but_for(EVERY, *SAMPLE))
def test_every_method_trains_every_family(method: str, family: str) -> None:
    """A step moves what trains and nothing else; the head trains in every method."""
    model = made(method, family)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    stepper = stepper_of(model, cell(method=method))
    model.train()
    ids = {id(parameter) for parameter in stepper.trained}
    could = {name for name, p in model.named_parameters() if id(p) in ids}
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    stepper.step([batch()], learning_rate=1e-2)
    moved = {
        name for name, p in model.named_parameters() if not torch.equal(p, before[name])
    }
    # Decay moves every matrix; a vector stays if its gradient is zero, as that of a
    # bias on the keys is.
    matrices = {name for name in trained if before[name].ndim > 1}
    assert matrices <= moved <= trained
    names = {name.removeprefix("base_model.") for name in moved}  # of a prompt
    assert any(name.startswith(NEW_HEADS) for name in names)
    assert (could == set(before)) == (FORMULAS[method] == ALL)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("plain", "checkpointed"),
    [
        ("full", "checkpointing"),
        ("lora", "lora-checkpointing"),
        ("adapters", "adapters-checkpointing"),
        ("full", "checkpointing-offload"),
        ("lora", "lora-checkpointing-offload"),
    ],
)
def test_checkpointing_changes_no_gradient(
    plain: str, checkpointed: str, family: str
) -> None:
    """The recomputed blocks draw the same dropout masks: every gradient is equal."""
    loss, expected = loss_and_gradients(made(plain, family))
    again, got = loss_and_gradients(made(checkpointed, family))
    assert torch.equal(again, loss)
    assert len(got) == len(expected)
    for name, gradient in zip(expected, got.values(), strict=True):
        assert torch.equal(gradient, expected[name]), name


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "method",
    ["checkpointing", "lora-checkpointing-offload", "adapters-checkpointing"],
)
def test_an_mlp_in_parts_changes_no_gradient(method: str, family: str) -> None:
    """Without dropout, whose masks a part draws for itself; but for rounding."""
    found = []
    for num_chunks in (1, 3):
        model = made(method, family, mlp_chunks=num_chunks).eval()
        stepper = Stepper(model, cell())
        stepper.loss(stepper.to_device(batch())).backward()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        assert len(gradients) == sum(p.requires_grad for p in model.parameters())
        found.append(gradients)
    for whole, in_parts in zip(*found, strict=True):
        torch.testing.assert_close(in_parts, whole, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "method", ["checkpointing-offload", "lora-checkpointing-offload"]
)
def test_an_offloaded_checkpoint_is_copied_there_and_back(method: str) -> None:
    """The input of each block once each way, and nothing that is saved for backward
    stays on the device."""
    model = made(method).train()
    ledgers = ledgers_of(model)
    assert len(ledgers) == BLOCKS
    loss_and_gradients(model)
    stream_bytes = 4 * 8 * HIDDEN * torch.float32.itemsize
    mask_bytes = ledgers[0].d2h_bytes - stream_bytes  # BERT's loop gives it by position
    assert mask_bytes in (0, 4 * 8 * 8, 4 * 8 * 8 * 4)
    for one in ledgers:
        assert one.d2h_bytes == one.h2d_bytes == stream_bytes + mask_bytes
    assert saved_at(method, 5) == saved_at(method, 3)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", EXACT)
@pytest.mark.parametrize(
    "changes",
    slow_but_for(
        [{}, {"reversible_blocks": 2, "mlp_chunks": 2}],
        {"reversible_blocks": 2, "mlp_chunks": 2},
    ),
)
def test_exact_methods_equal_their_stored_twins(
    method: str, family: str, changes: dict[str, object]
) -> None:
    """In loss and in every gradient, to the last bit, in every family."""
    loss, expected = loss_and_gradients(made(f"{method}-store", family, **changes))
    rebuilt, got = loss_and_gradients(made(method, family, **changes))
    assert torch.equal(rebuilt, loss)
    assert set(got) == set(expected)
    for name, gradient in expected.items():
        assert torch.equal(got[name], gradient), name


@pytest.mark.parametrize("method", EXACT)
def test_lost_bits_on_the_host_change_no_gradient(method: str) -> None:
    """They are copied there and back, bit by bit."""
    loss, expected = loss_and_gradients(made(method))
    again, got = loss_and_gradients(made(method, side_buffer="host"))
    assert torch.equal(again, loss)
    for name, gradient in expected.items():
        assert torch.equal(got[name], gradient), name


@pytest.mark.parametrize(
    ("method", "plain"), [("lora-exact", "lora"), ("full-exact", "full")]
)
def test_each_lost_bit_halves_how_far_a_start_is_from_the_plain_method(
    method: str, plain: str
) -> None:
    """Without adapters, the scale is all that changes the function."""
    with torch.no_grad():
        expected = made(plain).eval()(**batch()).logits
        found = []
        for lost_bits in (2, 3, 8):
            got = made(method, lost_bits=lost_bits).eval()(**batch()).logits
            found.append(float((got - expected).norm() / expected.norm()))
    assert 0.4 < found[1] / found[0] < 0.6
    assert found[2] < 0.01


@pytest.mark.parametrize("method", ["meft1", "meft1-exact", "lora-exact"])
def test_a_cell_says_how_much_of_a_stack_is_rebuilt(method: str) -> None:
    """So many of the lowest blocks; 0 rebuilds all; more than there are is refused."""
    for requested, rebuilt in ((0, BLOCKS), (2, 2)):
        model = made(method, reversible_blocks=requested, mlp_chunks=2)
        stack = model.bert.encoder.layer
        assert stack.span == (0, rebuilt)
        assert stack.reversible.mlp_chunks == 2
    with pytest.raises(ValueError, match=r"`reversible_blocks` is 4.*has 3 blocks"):
        made(method, reversible_blocks=4)


@pytest.mark.parametrize("family", FAMILIES)
def test_lora_goes_to_queries_and_values(family: str) -> None:
    """Two pairs an attention, in the family's own words, or one where queries, keys and
    values are one projection; BART's decoder has two attentions."""
    model = made("lora", family)
    found = [n for n, _ in model.named_modules() if n.endswith("lora_A")]
    words = {name.split(".")[-2] for name in found}
    assert words in ({"query", "value"}, {"q_proj", "v_proj"}, {"query_key_value"})
    assert len(found) == len(words) * BLOCKS * (3 if family == "bart" else 1)


def saved_at(method: str, depth: int) -> int:
    model = load(METHODS[method])(
        classifier(num_hidden_layers=depth), cell(method=method)
    ).train()
    model(**batch()).loss.backward()  # the first step of a rebuilt stack is watched
    data = batch()
    exclude = [*model.parameters(), *model.buffers(), *data.values()]
    with saved_bytes(exclude) as counter:
        loss = model(**data).loss
        total = counter.total
    del loss
    return total


@pytest.mark.parametrize(
    ("method", "streams_per_block"),
    [
        ("checkpointing", 1),
        ("lora-checkpointing", 1),
        ("adapters-checkpointing", 1),
        ("meft1", 0),
        ("meft2", 0),
    ],
)
def test_a_block_more_keeps_its_input_or_nothing(
    method: str, streams_per_block: int
) -> None:
    """Checkpointing keeps one `batch seq hidden` tensor a block, MEFT none."""
    stream_bytes = 4 * 8 * HIDDEN * torch.float32.itemsize
    grown = saved_at(method, 5) - saved_at(method, 3)
    assert grown == 2 * streams_per_block * stream_bytes


@pytest.mark.parametrize("method", ["lora-exact", "full-exact"])
def test_a_block_more_keeps_its_lost_bits(method: str) -> None:
    """And, of each block, one number that the backward compares."""
    grown = saved_at(method, 5) - saved_at(method, 3)
    lost = 4 * 8 * HIDDEN * cell().lost_bits // 8
    assert lost <= grown // 2 <= lost + 16


@pytest.mark.parametrize("method", HAVE_ROWS)
def test_rows_in_a_decoder_that_reads_an_encoder_are_refused(method: str) -> None:
    """By the library, which says where they go."""
    with pytest.raises(
        UnsupportedModelError, match=r"transformers' BERT, RoBERTa, .*OPT"
    ):
        made(method, "bart")


@pytest.mark.parametrize("family", SPARSE)
def test_offloaded_dense_adapters_are_the_dense_ones(family: str) -> None:
    """Loss, and the gradients of the head: the same function, elsewhere."""
    found = []
    for method in ("dense", "dense-offload"):
        model = made(method, family).eval()
        generator = torch.Generator().manual_seed(7)
        rows = 0.3 * torch.randn(BLOCKS, NEURONS, 2 * HIDDEN, generator=generator)
        for index, adapter in enumerate(
            m for m in model.modules() if isinstance(m, DenseAdapter | SparseAdapter)
        ):
            if isinstance(adapter, SparseAdapter):
                adapter.rows.store.replace(rows[index])
                continue
            with torch.no_grad():
                adapter.keys.copy_(rows[index, :, :HIDDEN])
                adapter.values.copy_(rows[index, :, HIDDEN:])
        stepper = Stepper(model, cell())
        loss = stepper.loss(stepper.to_device(batch()))
        found.append(loss.detach())
    torch.testing.assert_close(*found)


def test_a_step_of_sparse_adapters_moves_their_rows() -> None:
    """Two batches a step; what they moved is counted, block by block."""
    model = made("sparse-experts").train()
    stepper = Stepper(model, cell(method="sparse-experts", accumulation=2))
    adapters = list(sparse_adapters(model).values())
    before = [a.rows.store.rows.clone() for a in adapters]
    stepper.step([batch(), batch()], learning_rate=1e-2)
    for adapter, rows in zip(adapters, before, strict=True):
        assert not torch.equal(adapter.rows.store.rows, rows)
    meter = TrafficMeter(adapters)
    stepper.step([batch(), batch()], learning_rate=1e-2)
    seen = meter.result()
    assert seen.h2d_bytes is not None
    assert seen.d2h_bytes is not None
    assert 0 < seen.d2h_bytes + seen.h2d_bytes < seen.dense_transfer_bytes
    by_block = dataclasses.asdict(seen)
    for way, total in (("h2d", seen.h2d_bytes), ("d2h", seen.d2h_bytes)):
        phases = [
            by_block[f"{way}_{p}_bytes"] for p in ("forward", "backward", "update")
        ]
        assert sum(map(sum, phases)) == total
        assert all(len(blocks) == BLOCKS for blocks in phases)
    # One row is 2 * HIDDEN numbers of 4 bytes; a batch activates whole rows.
    tokens = 2 * BLOCKS * 4 * 8
    active = sum(round(share * 2 * NEURONS) for share in seen.union_fraction)
    assert seen.paper_transfer_bytes == (4 * active + tokens) * HIDDEN * 4


def test_a_router_is_held_against_scores_of_all_neurons() -> None:
    """With every expert and no gate, it finds the best; with half of them, less."""
    found = []
    text = {name: batch()[name] for name in ("input_ids", "attention_mask")}
    for top_k in (EXPERTS, EXPERTS // 8):
        model = made("sparse-experts-union", top_k_experts=top_k, top_k_neurons=16)
        seen = look(model, functools.partial(model.eval(), **text))
        assert seen is not None
        assert seen.routing_recall is not None
        assert seen.activation_curve is not None
        assert len(seen.routing_recall) == BLOCKS
        curve = seen.activation_curve
        assert curve[0] == 1
        assert curve == sorted(curve, reverse=True)
        found.append(sum(seen.routing_recall) / BLOCKS)
    assert found[0] == 1
    assert 0 < found[1] < 1


def test_methods_without_neurons_have_no_routing() -> None:
    assert look(made("lora"), lambda: None) is None
