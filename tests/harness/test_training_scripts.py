"""`meft_bench.virtual_gpu` and `plan --script` where training code is unlike others."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import meft_bench
from meft_bench.parent import cli
from meft_bench.virtual.prediction.plan import MemoryPlan

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="there is a real GPU, which is left alone"
)
MIB = 2**20


def linear(rows: int = 64, *, width: int = 512, num_steps: int = 2) -> None:
    layer = nn.Linear(width, width).to("cuda")
    optimizer = torch.optim.AdamW(layer.parameters())
    for _ in range(num_steps):
        layer(torch.zeros(rows, width, device="cuda")).sum().backward()
        optimizer.step()
        optimizer.zero_grad()


def plan_of(code: Any, **named: Any) -> MemoryPlan:
    with meft_bench.virtual_gpu("T4", **named) as memory:
        code()
    return memory.plan()


def test_code_that_stays_on_the_host_is_not_planned() -> None:
    """Operators of the host have no workspace on the GPU, and do none of its work."""

    def train() -> None:
        layer = nn.Linear(768, 768)
        for _ in range(2):
            out = layer(torch.zeros(4096, 768))
            nn.functional.softmax(out, -1).sum(0).sum().backward()
            layer.zero_grad()

    plan = plan_of(train)
    assert plan.verdict == "unknown"
    assert "nothing was put on the GPU" in plan.message
    assert not plan.num_flops
    assert not plan.bytes_touched


def test_what_is_saved_is_of_one_micro_batch() -> None:
    """However many a step accumulates."""
    saved = {}
    for accumulation in (1, 4):

        def train(number: int = accumulation) -> None:
            model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
            model = model.to("cuda")
            optimizer = torch.optim.SGD(model.parameters())
            for _ in range(2):
                for _ in range(number):
                    model(torch.zeros(256, 64, device="cuda")).sum().backward()
                optimizer.step()
                optimizer.zero_grad()

        saved[accumulation] = plan_of(train).saved_by_block
    assert saved[1]
    assert saved[4] == saved[1]


def test_one_step_is_said_to_be_too_few() -> None:
    said = "assumed: one step is enough"
    assert said in plan_of(lambda: linear(num_steps=1)).prediction
    two = plan_of(linear)
    assert said not in two.prediction
    assert two.num_steps == 2
    one = plan_of(lambda: linear(num_steps=1))
    assert one.num_flops
    assert two.num_flops == 2 * one.num_flops


def test_what_crosses_the_link_has_the_dtype_of_the_other_side() -> None:
    """A change of dtype is on the host, or on the GPU if the copy is not waited for."""
    sizes = {}
    for waits in (True, False):

        def move(wait: bool = waits) -> None:
            host = torch.zeros(1024, 1024)
            there = host.to("cuda", torch.bfloat16, non_blocking=not wait)
            there.to("cpu", torch.float32, non_blocking=not wait)

        plan = plan_of(move)
        sizes[waits] = (plan.h2d_bytes, plan.d2h_bytes)
    assert sizes == {True: (2 * MIB, 2 * MIB), False: (4 * MIB, 4 * MIB)}


def test_memory_that_is_missing_in_forward_is_of_forward() -> None:
    """Nothing is saved for a backward that has not begun."""
    memories = []

    def train() -> None:
        with meft_bench.virtual_gpu("T4") as memory:
            memories.append(memory)
            layers = nn.Sequential(*(nn.Linear(4096, 4096) for _ in range(20))).cuda()
            layers(torch.zeros(2**17, 4096, device="cuda"))

    with pytest.raises(torch.OutOfMemoryError, match="alive: forward"):
        train()
    assert "enforce_memory=False" in memories[0].plan().message


def test_a_text_is_generated_in_inference_mode_too() -> None:
    """With a cache of keys and values, and the memory of `no_grad`."""
    plans = []
    for context in (torch.no_grad, torch.inference_mode):

        def generate(context: Any = context) -> None:
            config = transformers.LlamaConfig(
                hidden_size=64,
                intermediate_size=128,
                num_hidden_layers=2,
                num_attention_heads=4,
                vocab_size=512,
            )
            model: Any = transformers.LlamaForCausalLM(config)
            model = model.to("cuda", torch.bfloat16)
            ids = torch.ones(2, 8, dtype=torch.long, device="cuda")
            with context():
                model.generate(ids, max_new_tokens=4, pad_token_id=0)

        plans.append(plan_of(generate))
    assert plans[0].allocated_bytes == plans[1].allocated_bytes
    assert plans[0].h2d_bytes == plans[1].h2d_bytes


def test_every_tensor_has_an_address_of_its_own() -> None:
    """Code that moves each storage once tells them apart by address."""
    with meft_bench.virtual_gpu("T4"):
        x, y = torch.zeros(8, device="cuda"), torch.zeros(8, device="cuda")
        assert x.data_ptr() != y.data_ptr()
        assert x[2:].data_ptr() == x.data_ptr() + 8
        storage = x.untyped_storage()
        assert storage.data_ptr() == x[2:].untyped_storage().data_ptr()
        assert storage.data_ptr() != y.untyped_storage().data_ptr()
    assert torch.zeros(8).data_ptr()


def test_copies_take_memory() -> None:
    """Of tensors, layers, weights and optimizer state, as for averages of weights."""
    with meft_bench.virtual_gpu("T4") as memory:
        x = torch.zeros(1024, 1024, device="cuda")
        before = torch.cuda.memory_allocated()
        y = copy.deepcopy(x)
        assert torch.cuda.memory_allocated() - before == 4 * MIB
        assert y.data_ptr() != x.data_ptr()
        layer = nn.Linear(1024, 1024, bias=False, device="cuda")
        before = torch.cuda.memory_allocated()
        kept = [copy.deepcopy(layer), copy.deepcopy(layer.state_dict())]
        assert torch.cuda.memory_allocated() - before == 8 * MIB
        average = torch.optim.swa_utils.AveragedModel(layer)
        assert torch.cuda.memory_allocated() - before >= 12 * MIB
        del average, kept
    assert memory.plan().allocated_bytes


def test_inference_between_steps_leaves_kinds_and_phases() -> None:
    """Operators that arrive as a whole are recorded by their parts."""
    plans = []
    for context in (torch.no_grad, torch.inference_mode):

        def train(context: Any = context) -> None:
            layer = nn.Linear(512, 512).to("cuda")
            optimizer = torch.optim.AdamW(layer.parameters())
            x = torch.zeros(64, 512, device="cuda")
            for _ in range(3):
                layer(x).sum().backward()
                optimizer.step()
                optimizer.zero_grad()
                with context():
                    layer(x)
                    image = torch.zeros(1, 4, 8, 8, device="cuda")
                    nn.functional.interpolate(image, scale_factor=2, mode="bilinear")

        plans.append(plan_of(train))
    one, other = plans
    assert one.by_kind == other.by_kind
    assert one.by_phase == other.by_phase
    assert "update" in (other.by_phase or {})
    assert one.num_trainable_parameters == other.num_trainable_parameters == 262_656
    assert one.allocated_bytes == other.allocated_bytes


@pytest.mark.slow
@pytest.mark.parametrize("use_streams", [False, True])
def test_activations_are_offloaded_by_trl(use_streams: bool) -> None:
    """Its own context: each input of 12 layers goes down once, with its weight."""
    offloading = pytest.importorskip("trl.models.activation_offloading")

    def train() -> None:
        layers = nn.Sequential(*(nn.Linear(1024, 1024) for _ in range(12))).cuda()
        with offloading.OffloadActivations(use_streams=use_streams):
            x = torch.zeros(1024, 1024, device="cuda", requires_grad=True)
            layers(x).sum().backward()

    plan = plan_of(train)
    assert plan.d2h_bytes == 12 * 2 * 4 * MIB
    assert plan.h2d_bytes
    assert 12 * 4 * MIB <= plan.h2d_bytes - 12 * 4 * (MIB + 1024) <= plan.d2h_bytes


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (
            lambda: torch.distributed.init_process_group("gloo"),
            "`torch.distributed.init_process_group` is not modelled",
        ),
        (
            lambda: __import__("torch.distributed.fsdp").distributed.fsdp.fully_shard(
                nn.Linear(2, 2)
            ),
            "`torch.distributed.fsdp.fully_shard` is not modelled",
        ),
    ],
)
def test_several_processes_are_refused_by_name(code: Any, words: str) -> None:
    with (
        meft_bench.virtual_gpu("T4"),
        pytest.raises(NotImplementedError, match=words),
    ):
        code()


SCRIPT = """
import sys

import torch
from torch import nn


def catches():
    layer = nn.Linear(1024, 1024).cuda()
    rows = 2**23
    while True:
        try:
            layer(torch.empty(rows, 1024, device="cuda")).sum().backward()
            break
        except torch.OutOfMemoryError:
            rows //= 2
    torch.cuda.reset_peak_memory_stats()
    print("rows", rows)


def too_large():
    torch.empty(2**34, device="cuda")


def fails():
    assert torch.zeros(1, device="cuda").item() > 0, "loss is zero"


class Trainer:
    pass


def yields():
    yield torch.empty(8, device="cuda")


def of_batch(size):
    layer = nn.Linear(1024, 1024).cuda()
    layer(torch.empty(size * 4096, 1024, device="cuda")).sum().backward()
"""


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "train.py"
    path.write_text(SCRIPT)
    return path


@pytest.mark.slow
def test_a_script_may_catch_that_there_is_no_room(
    script: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """What it prints is shown, apart from the answer."""
    assert cli.main(["plan", "--script", f"{script}:catches", "--gpu", "T4"]) == 0
    out, err = capfd.readouterr()
    assert "fits" in out
    assert "rows" in err
    assert "rows" not in out.replace("tokens per row", "")
    assert cli.main(["plan", "--script", f"{script}:too_large", "--gpu", "T4"]) == 4
    out = capfd.readouterr().out
    assert "too large" in out
    assert "64.7 GiB" in out or "64.6 GiB" in out


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "function", "words"),
    [
        ("fit", "catches", "called as catches(batch_size); give it one parameter"),
        ("plan", "of_batch", "called as of_batch(); give it no parameter to fill"),
        (
            "plan",
            "fails",
            "loss is zero (train.py, line 26); on a virtual GPU a number",
        ),
        ("plan", "trainer", "has no function 'trainer'"),
        ("plan", "yields", "yields is a generator or a coroutine"),
    ],
)
def test_a_mistake_is_named(
    script: Path,
    capfd: pytest.CaptureFixture[str],
    command: str,
    function: str,
    words: str,
) -> None:
    given = [command, "--script", f"{script}:{function}", "--gpu", "T4"]
    assert cli.main(given) == 2
    err = capfd.readouterr().err
    assert words in " ".join(err.split())
    assert "Trainer" not in err.splitlines()[-1]


@pytest.mark.slow
def test_the_largest_batch_says_what_the_next_would_need(
    script: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    given = ["fit", "--script", f"{script}:of_batch", "--gpu", "T4"]
    assert cli.main(given) == 0
    out = capfd.readouterr().out
    assert "would need" in out
    assert "MiB that may be used" in out
