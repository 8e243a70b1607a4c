"""One rank of several on a virtual GPU: FSDP2, DistributedDataParallel.

The twin is the same code on tensors with values on the CPU, in a process group of
torch's `fake` backend or of processes that exist: both take the same bytes.
"""

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FullyShardedDataParallel,
    MixedPrecisionPolicy,
    fully_shard,
)
from torch.nn.parallel import DistributedDataParallel

import meft
import meft_bench
from harness import sharded
from harness.sharded import NUM_BLOCKS, ROWS, WIDTH, Model, step
from meft_bench.parent import cli
from meft_bench.virtual.emulation import cpu_backend, replicas, virtual_gpu
from meft_bench.virtual.prediction.plan import MemoryPlan
from meft_bench.virtual.recording.ledger import Ledger

pytestmark = [
    pytest.mark.skipif(
        torch.cuda.is_available(), reason="there is a real GPU, which is left alone"
    ),
    # Names that older versions of transformers and torch have.
    pytest.mark.filterwarnings("ignore:.* will be removed in v6:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.torch.distributed.* is deprecated"),
]
NUMBERS = 4 * (4 * (NUM_BLOCKS + 1) + 2)
"""Bytes of a count of steps for each parameter, of the loss and of its gradient."""
BF16 = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
OPTIONS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "bf16": {"mp_policy": BF16},
    "not resharded": {"reshard_after_forward": False},
}


def predicted(num_ranks: int, checkpoints: bool, **options: Any) -> dict[str, int]:
    """The peak of the second step on a virtual GPU, in bytes by kind."""
    with meft_bench.virtual_gpu("H100", ranks=num_ranks) as gpu:
        return sharded.second_step(
            "cuda", num_ranks, gpu.ledger, checkpoints, **options
        )


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("checkpoints", [False, True])
@pytest.mark.parametrize("num_ranks", [2, 8])
def test_each_kind_takes_the_bytes_of_tensors_with_values(
    num_ranks: int, checkpoints: bool, options: str
) -> None:
    """Also where rows cannot be divided evenly among ranks, and shards are padded."""
    with sharded.group_of(num_ranks):
        found = sharded.with_values(num_ranks, checkpoints, **OPTIONS[options])
    assert predicted(num_ranks, checkpoints, **OPTIONS[options]) == found


@pytest.mark.parametrize("checkpoints", [False, True])
@pytest.mark.parametrize("num_ranks", [2, 8])
def test_the_peak_is_that_of_the_tracker_of_pytorch(
    num_ranks: int, checkpoints: bool
) -> None:
    """`FSDPMemTracker` counts by its own means, and the numbers in `NUMBERS` too."""
    with sharded.group_of(num_ranks):
        tracked = sharded.tracked(num_ranks, checkpoints)
    assert predicted(num_ranks, checkpoints)["total"] == tracked - NUMBERS


@pytest.mark.slow
@pytest.mark.parametrize("checkpoints", [False, True])
def test_two_processes_that_exist_take_the_same_bytes(
    checkpoints: bool, tmp_path: Path
) -> None:
    """Each by the ledger, and by PyTorch's tracker."""
    spawn: Any = torch.multiprocessing.spawn  # type: ignore[attr-defined]
    spawn(sharded.in_each_process, (2, str(tmp_path), checkpoints), nprocs=2)
    expected = predicted(2, checkpoints)
    for rank in (0, 1):
        found = torch.load(tmp_path / f"peaks-{rank}.pt")
        assert found["ledger"] == expected
        assert found["tracker"]["total"] - NUMBERS == expected["total"]


# Laws, on a model whose shards are whole.

CONFIG = transformers.LlamaConfig(
    hidden_size=256,
    intermediate_size=512,
    num_hidden_layers=4,
    num_attention_heads=4,
    vocab_size=512,
)
ELEMENT = 4
"""Bytes of a number in float32."""


def rounded(num_bytes: int) -> int:
    """As the allocator rounds a request."""
    return -(-num_bytes // 512) * 512


def shards_of(model: nn.Module, num_ranks: int) -> int:
    """Bytes of the largest shards of all parameters: rows are divided, and padded."""
    return sum(
        rounded(math.ceil(len(p) / num_ranks) * p[0].numel() * ELEMENT)
        for p in model.parameters()
    )


def whole_of(module: nn.Module, num_ranks: int = 1) -> int:
    """Bytes of the parameters when they are gathered, with padding."""
    return sum(
        rounded(math.ceil(len(p) / num_ranks) * num_ranks * p[0].numel() * ELEMENT)
        for p in module.parameters()
    )


def llama(kind: str = "plain") -> Any:
    model: Any = transformers.LlamaForCausalLM(CONFIG)
    if kind == "checkpointing":
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if kind.startswith("lora"):
        model = get_peft_model(model, LoraConfig(target_modules=["q_proj", "v_proj"]))
    reversible: dict[str, dict[str, Any]] = {
        "reversible": {"adapter": None},
        "lora-reversible": {"adapter": None},
        "meft1": {"variant": "meft1", "bottleneck_size": 8},
    }
    if kind in reversible:
        model = meft.make_reversible(model, meft.ReversibleConfig(**reversible[kind]))
    return model.to("cuda")


def layers_of(model: Any) -> list[nn.Module]:
    causal = model.base_model.model if hasattr(model, "peft_config") else model
    return list(causal.model.layers)


class Found:
    """What a rank of `llama` takes from its second step on.

    Args:
        num_ranks: number of ranks.
        kind: what is done to the model.
        rows: rows of the batch.
        options: those of `fully_shard`.
    """

    def __init__(
        self, num_ranks: int = 8, kind: str = "plain", rows: int = 2, **options: Any
    ) -> None:
        with meft_bench.virtual_gpu("H100", ranks=num_ranks) as gpu:
            self.model = model = llama(kind)
            blocks = layers_of(model)
            self.block_bytes = whole_of(blocks[0], num_ranks)
            self.whole_bytes = whole_of(model, num_ranks)
            self.shard_bytes = shards_of(model, num_ranks)
            self.num_trained = sum(
                p.numel() for p in model.parameters() if p.requires_grad
            )
            for block in blocks:
                fully_shard(block, **options)
            fully_shard(model, **options)
            trained = [p for p in model.parameters() if p.requires_grad]
            optimizer = torch.optim.AdamW(trained)
            for number in range(3):
                if number == 1:
                    torch.cuda.reset_peak_memory_stats()
                    start = gpu.ledger.mark()
                ids = torch.ones(rows, 64, dtype=torch.long, device="cuda")
                model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
                optimizer.step()
                optimizer.zero_grad()
            self.plan: MemoryPlan = gpu.plan()
            trace = gpu.ledger.trace()
        self.most: dict[str, int] = {}
        """The greatest sum of each kind at any time."""
        for time, _, _, kinds in trace.held("cuda"):
            if time >= start:
                for name, size in kinds.items():
                    self.most[name] = max(size, self.most.get(name, 0))
        self.allocated_bytes = self.plan.allocated_bytes or 0
        self.reserved_bytes = self.plan.reserved_bytes or 0


@pytest.mark.parametrize("num_ranks", [2, 3, 8])
def test_states_are_those_of_shards(num_ranks: int) -> None:
    """Parameters, gradients and both moments; with 3 ranks, rows are padded."""
    found = Found(num_ranks)
    assert found.most["parameters"] == found.shard_bytes
    moments = found.most["optimizer"] / 2
    # Padding is no part of gradients and moments.
    assert 0.98 * found.shard_bytes <= moments <= found.shard_bytes
    # A group's gradients are views of one buffer.
    assert abs(found.most["gradients"] - found.shard_bytes) < 0.02 * found.shard_bytes


def test_twice_the_ranks_halve_states() -> None:
    """What is gathered does not become smaller."""
    few, many = Found(4), Found(8)
    for kind in ("parameters", "optimizer"):
        assert abs(few.most[kind] - 2 * many.most[kind]) < 0.01 * few.most[kind]
    assert few.most["unsharded"] == many.most["unsharded"]
    assert few.most["communication"] == many.most["communication"]
    assert few.allocated_bytes > many.allocated_bytes


def test_one_block_and_the_root_are_whole_at_a_time() -> None:
    """And two buffers of a block: the next one is gathered while one is in use."""
    found = Found(8)
    root_bytes = found.whole_bytes - NUM_BLOCKS * found.block_bytes
    assert found.most["unsharded"] == root_bytes + found.block_bytes
    assert found.most["communication"] <= 2 * max(found.block_bytes, root_bytes)
    assert found.most["communication"] >= 2 * found.block_bytes


def test_without_resharding_all_parameters_are_whole() -> None:
    assert Found(8, reshard_after_forward=False).most["unsharded"] == (
        Found(8).whole_bytes
    )


def test_parameters_are_gathered_in_16_bits() -> None:
    """And gradients are reduced in 32."""
    full, half = Found(8), Found(8, mp_policy=BF16)
    assert half.most["unsharded"] == full.most["unsharded"] / 2
    assert half.most["parameters"] == full.most["parameters"]
    assert half.most["gradients"] == full.most["gradients"]
    assert half.most["communication"] < full.most["communication"]


@pytest.mark.parametrize(
    "kind",
    ["plain", "checkpointing", "lora", "reversible", "lora-reversible", "meft1"],
)
def test_the_peak_is_no_less_than_its_parts(kind: str) -> None:
    """And all parts that do not depend on the batch are there in each method."""
    found = Found(8, kind)
    weights = found.most.get("frozen", 0) + found.most["parameters"]
    assert weights == found.shard_bytes
    fixed = weights + found.most["optimizer"]
    assert found.allocated_bytes >= fixed + found.block_bytes
    assert found.reserved_bytes >= found.allocated_bytes
    assert found.plan.num_trainable_parameters == found.num_trained
    assert found.plan.by_kind is not None
    total = sum(found.plan.by_kind.values()) + (found.plan.unattributed_bytes or 0)
    assert total == found.allocated_bytes


@pytest.mark.parametrize(
    ("less", "more"),
    [
        ("checkpointing", "plain"),
        ("reversible", "plain"),
        ("lora-reversible", "lora"),
    ],
)
def test_methods_save_what_they_save_on_one_gpu(less: str, more: str) -> None:
    """What a block keeps for backward, with 32 rows."""
    low, high = Found(8, less, rows=32), Found(8, more, rows=32)
    assert low.most["saved"] < high.most["saved"]
    assert low.allocated_bytes < high.allocated_bytes


def test_a_mesh_of_two_dimensions_shards_along_one() -> None:
    """Two replicas of four shards take the states of four ranks."""
    with meft_bench.virtual_gpu("H100", ranks=8):
        mesh = init_device_mesh("cuda", (2, 4), mesh_dim_names=("replicas", "shards"))
        model = llama()
        expected = shards_of(model, 4)
        for block in layers_of(model):
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        found = torch.cuda.memory_allocated()
    assert expected <= found < 1.1 * expected


def offloaded() -> None:
    model = Model()
    for block in model.blocks:
        fully_shard(block, offload_policy=CPUOffloadPolicy())
    fully_shard(model, offload_policy=CPUOffloadPolicy())
    train(model)


def made_on_meta() -> None:
    with torch.device("meta"):
        model = Model()
    for block in model.blocks:
        fully_shard(block)
    fully_shard(model)
    train(model.to_empty(device="cuda"))


def clipped() -> None:
    model: Any = fully_shard(Model().to("cuda"))
    train(model, lambda: nn.utils.clip_grad_norm_(model.parameters(), 1.0))


def train(model: nn.Module, between: Callable[[], object] = lambda: None) -> None:
    optimizer = torch.optim.AdamW(model.parameters())
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.ones(ROWS, WIDTH, device="cuda")).square().sum().backward()
        between()
        optimizer.step()


@pytest.mark.parametrize("code", [offloaded, made_on_meta, clipped])
def test_ways_of_using_fsdp2_run(code: Callable[[], None]) -> None:
    """Twice, as torch keeps what it has found about distributed tensors."""
    found = []
    for _ in range(2):
        with meft_bench.virtual_gpu("H100", ranks=4) as gpu:
            code()
        found.append((gpu.plan().allocated_bytes, gpu.plan().reserved_bytes))
    assert found[0] == found[1]
    assert found[0][0]


def test_offloaded_states_are_not_on_the_gpu() -> None:
    with meft_bench.virtual_gpu("H100", ranks=4) as gpu:
        offloaded()
    kinds = gpu.plan().by_kind
    assert kinds is not None
    assert not kinds.keys() & {"parameters", "optimizer"}
    assert gpu.plan().h2d_bytes


def test_shapes_of_whole_tensors_take_no_memory() -> None:
    """torch derives them by an operator on tensors as large as all shards together."""
    with meft_bench.virtual_gpu("H100", ranks=8):
        layer: Any = fully_shard(nn.Linear(4096, 808, device="cuda"))
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        made = layer.weight.detach() * 2
        assert made.shape == (808, 4096)
        added = torch.cuda.max_memory_allocated() - before
    assert rounded(101 * 4096 * ELEMENT) <= added < 2 * 101 * 4096 * ELEMENT


def gathered(device: str, num_ranks: int, ledger: Ledger) -> int:
    """The peak in bytes while a whole tensor is made of the shards of a parameter."""
    model: Any = sharded.sharded(device, num_ranks, checkpoints=False)
    start = ledger.mark()
    whole = model.first.weight.full_tensor()
    assert whole.shape == (WIDTH, WIDTH)
    return sharded.peak_of(ledger.trace(), device, start)["total"]


@pytest.mark.parametrize("num_ranks", [2, 8])
def test_a_whole_tensor_takes_the_bytes_of_one_with_values(num_ranks: int) -> None:
    """Of a collective that is waited for, no copy is made."""
    with sharded.group_of(num_ranks), sharded.recorded() as ledger:
        expected = gathered("cpu", num_ranks, ledger)
    with meft_bench.virtual_gpu("H100", ranks=num_ranks) as gpu:
        assert gathered("cuda", num_ranks, gpu.ledger) == expected


FSDP2 = {"fsdp_version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}


@pytest.mark.parametrize("options", [{"fsdp": True, "fsdp_config": FSDP2}, {}])
def test_the_trainer_uses_several_ranks(
    options: dict[str, Any], tmp_path: Path
) -> None:
    """Without changes: with FSDP2 where its arguments request it, else with DDP."""
    row = torch.ones(32, dtype=torch.long)
    arguments: dict[str, Any] = {"max_steps": 2, "report_to": "none", **options}
    with meft_bench.virtual_gpu("H100", ranks=8) as gpu:
        trainer = transformers.Trainer(
            transformers.LlamaForCausalLM(CONFIG),
            transformers.TrainingArguments(
                str(tmp_path), save_strategy="no", disable_tqdm=True, **arguments
            ),
            train_dataset=[{"input_ids": row, "labels": row}] * 256,
        )
        trainer.train()
        optimizer: Any = trainer.optimizer
        numbers = [one["exp_avg"] for one in optimizer.state.values()]
        numel = sum(getattr(one, "_local_tensor", one).numel() for one in numbers)
    whole = sum(p.numel() for p in transformers.LlamaForCausalLM(CONFIG).parameters())
    assert numel == whole / (8 if options else 1)
    assert gpu.plan().num_steps == 2


# DistributedDataParallel.


def replicated(device: str, **options: Any) -> None:
    model = DistributedDataParallel(Model().to(device), **options)
    optimizer = torch.optim.AdamW(model.parameters(), foreach=True)
    for _ in range(2):
        step(model, optimizer, device)


@pytest.mark.parametrize("find_unused_parameters", [False, True])
@pytest.mark.parametrize("is_view", [False, True])
def test_buckets_are_as_large_as_gradients(
    is_view: bool, find_unused_parameters: bool
) -> None:
    """Gradients are views of them, if that is requested."""
    with meft_bench.virtual_gpu("H100", ranks=8) as gpu:
        distributed.init_process_group("nccl")
        replicated(
            "cuda",
            gradient_as_bucket_view=is_view,
            find_unused_parameters=find_unused_parameters,
        )
        kinds = gpu.ledger.trace().peak("cuda").by_kind
    buckets = ELEMENT * sum(p.numel() for p in Model().parameters())
    assert kinds["parameters"] == whole_of(Model())
    held = kinds.get("communication", 0) + kinds["gradients"]
    expected = rounded(buckets) if is_view else rounded(buckets) + whole_of(Model())
    assert abs(held - expected) <= 1024  # of what shows which parameters were used


# What is around it.


def test_code_finds_itself_to_be_rank_0() -> None:
    before = dict(os.environ)
    with meft_bench.virtual_gpu("H100", ranks=8) as gpu:
        assert os.environ["WORLD_SIZE"] == "8"
        distributed.init_process_group("nccl", rank=0, world_size=8)
        assert distributed.get_rank() == int(os.environ["RANK"]) == 0
        assert distributed.get_world_size() == 8
        total = torch.ones(4, device="cuda")
        distributed.all_reduce(total)
        distributed.barrier()
    assert not distributed.is_initialized()
    assert dict(os.environ) == before
    assert "rank 0 of 8" in gpu.plan().prediction
    assert "NCCL" in gpu.plan().prediction


def refused(code: Callable[[], object], **wants: Any) -> str:
    def run() -> None:
        with meft_bench.virtual_gpu("T4", **wants):
            code()

    with pytest.raises((NotImplementedError, ValueError)) as reported:
        run()
    return str(reported.value)


def hooked() -> None:
    distributed.init_process_group("nccl")
    model = DistributedDataParallel(nn.Linear(2, 2).to("cuda"))
    model.register_comm_hook(None, replicas._reduced)


@pytest.mark.parametrize(
    ("code", "ranks", "remedy"),
    [
        (lambda: None, 0, "expected 1 or more processes"),
        (lambda: distributed.init_process_group("gloo"), 1, "give `ranks`"),
        (lambda: fully_shard(nn.Linear(2, 2)), 1, "give `ranks`"),
        (lambda: DistributedDataParallel(nn.Linear(2, 2)), 1, "give `ranks`"),
        (
            lambda: distributed.init_process_group("nccl", world_size=2, rank=0),
            8,
            "give the same number to both",
        ),
        (
            lambda: distributed.init_process_group("nccl", world_size=8, rank=3),
            8,
            "read it from the variable `RANK`",
        ),
        (lambda: FullyShardedDataParallel(nn.Linear(2, 2)), 8, "leave it out"),
        (hooked, 8, "reduced in place"),
    ],
)
def test_what_is_not_modelled_says_so(
    code: Callable[[], object], ranks: int, remedy: str
) -> None:
    assert remedy in refused(code, ranks=ranks)


SCRIPT = """
import torch
from torch.distributed.fsdp import fully_shard

def step(batch_size=4):
    model = fully_shard(torch.nn.Linear(1024, 1024, device="cuda"))
    optimizer = torch.optim.AdamW(model.parameters())
    for _ in range(2):
        model(torch.ones(batch_size, 1024, device="cuda")).sum().backward()
        optimizer.step()
"""


def test_the_command_plans_a_rank(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """States are divided by the number of ranks, also where a batch is looked for."""
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    words = ["--script", f"{script}:step", "--gpu", "T4", "--json", "--ranks"]
    found = {}
    for number in ("2", "8"):
        assert cli.main(["plan", *words, number]) == 0
        (plan,) = json.loads(capsys.readouterr().out)
        assert f"rank 0 of {number}" in plan["prediction"]
        found[number] = plan["by_kind"]["optimizer"]
    assert abs(found["2"] / found["8"] - 4) < 0.01
    assert cli.main(["fit", *words, "8"]) == 0
    (fit,) = json.loads(capsys.readouterr().out)
    assert fit["largest"] > 1000


def test_cells_train_in_one_process(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", "bert-base", "--gpu", "T4", "--ranks", "8"]) == 2
    assert "give --script FILE:FUNCTION" in capsys.readouterr().err


def test_the_largest_batch_of_a_rank() -> None:
    """Shards leave more room than one process has."""

    def run(batch_size: int) -> None:
        layers = (nn.Linear(8192, 8192, device="cuda") for _ in range(8))
        model: nn.Module = nn.Sequential(*layers)
        if "WORLD_SIZE" in os.environ:
            for layer in model.children():
                fully_shard(layer)
            fully_shard(model)
        optimizer = torch.optim.SGD(model.parameters(), momentum=0.9)
        for _ in range(2):
            x = torch.ones(4096 * batch_size, 8192, device="cuda")
            model(x).sum().backward()
            optimizer.step()
            optimizer.zero_grad()

    alone = meft_bench.largest_batch(run, "T4", at_most=64)
    shared = meft_bench.largest_batch(run, "T4", at_most=64, ranks=8)
    assert shared.largest > alone.largest


def test_tensors_of_the_cpu_have_no_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several ranks are refused where a build of torch cannot be patched."""

    def enter(stack: Any) -> Any:
        stack.enter_context(cpu_backend.like_cuda())
        return cpu_backend.BACKEND

    monkeypatch.setattr(virtual_gpu, "_enter_backend", enter)
    assert "FSDP2 uses no streams" in refused(lambda: None, ranks=8)
