"""What a virtual GPU does not model says so; what it answers in place of a driver."""

import importlib
import importlib.util
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, library, nn
from torch.distributed import init_process_group
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from torch.profiler import ProfilerActivity, profile, schedule

import meft
import meft_bench
from meft_bench.shared.source import MissingError
from meft_bench.virtual.emulation.refusals import REFUSALS

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="there is a real GPU, which is left alone"
)


def refusal_of(code: Callable[[], object]) -> str:
    """The message of the error by which code ends inside a virtual GPU."""

    def run() -> None:
        with meft_bench.virtual_gpu("T4"):
            code()

    with pytest.raises((NotImplementedError, MissingError)) as reported:
        run()
    return str(reported.value)


def layer() -> nn.Module:
    return nn.Linear(2, 2).to("cuda")


def ones() -> Tensor:
    return torch.ones(2, 2, device="cuda")


@pytest.mark.parametrize("refused", REFUSALS, ids=lambda one: one.name)
def test_each_refusal_is_of_something_that_exists(refused: Any) -> None:
    """A new version of a package may have moved it."""
    if importlib.util.find_spec(refused.module.partition(".")[0]) is None:
        pytest.skip(f"{refused.module} is not installed")
    owner: Any = importlib.import_module(refused.module)
    for name in refused.function.split("."):
        owner = getattr(owner, name)
    assert callable(owner)


def captured() -> None:
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        ones()


def in_a_pool() -> None:
    with torch.cuda.use_mem_pool(torch.cuda.MemPool()):
        ones()


def sharded() -> None:
    torch.distributed.fsdp.fully_shard(layer())


def over_a_mesh() -> None:
    torch.distributed.device_mesh.init_device_mesh("cuda", (1,))


def quantised() -> None:
    config = transformers.BitsAndBytesConfig(load_in_4bit=True)
    quantizers: Any = transformers.quantizers
    quantizers.AutoHfQuantizer.from_config(config)


def by_flex_attention() -> None:
    module = importlib.import_module("torch.nn.attention.flex_attention")
    x = torch.zeros(1, 2, 128, 16, device="cuda")
    module.flex_attention(x, x, x)


def nested() -> None:
    torch.nested.nested_tensor([ones()], layout=torch.jagged)


@pytest.mark.parametrize(
    ("code", "name", "remedy"),
    [
        (lambda: torch.compile(layer()), "torch.compile", "in eager mode"),
        (lambda: layer().compile(), "Module.compile", "in eager mode"),
        (by_flex_attention, "flex_attention", "scaled_dot_product_attention"),
        (captured, "torch.cuda.CUDAGraph", "in eager mode"),
        (
            lambda: torch.cuda.make_graphed_callables(layer(), (ones(),)),
            "torch.cuda.make_graphed_callables",
            "in eager mode",
        ),
        (in_a_pool, "torch.cuda.MemPool", "with the default pool"),
        (
            lambda: nn.parallel.data_parallel(layer(), ones(), [0]),
            "torch.nn.parallel.data_parallel",
            "of one process",
        ),
        (
            lambda: init_process_group("gloo"),
            "torch.distributed.init_process_group",
            "of one process",
        ),
        (over_a_mesh, "torch.distributed.init_process_group", "of one process"),
        (sharded, "torch.distributed.fsdp.fully_shard", "of one process"),
        (nested, "torch.jagged", "pad its rows"),
        (quantised, "quantised weights of transformers", "load the weights in the"),
        (lambda: torch.cuda.utilization(), "torch.cuda.utilization", "leave it out"),
        (
            lambda: torch.cuda.memory._snapshot(),
            "torch.cuda.memory._snapshot",
            "memory_snapshot",
        ),
    ],
)
def test_what_is_not_modelled_is_named_with_a_remedy(
    code: Callable[[], object], name: str, remedy: str
) -> None:
    """Also by a name that was imported before."""
    message = refusal_of(code)
    assert name in message
    assert remedy in message


def test_a_process_group_from_before_is_refused() -> None:
    distributed: Any = torch.distributed
    store = distributed.HashStore()
    init_process_group("gloo", rank=0, world_size=1, store=store)
    try:
        assert "call `destroy_process_group()` before" in refusal_of(ones)
    finally:
        distributed.destroy_process_group()


def add_one(x: Tensor) -> Tensor:
    return x + 1


@pytest.mark.filterwarnings("ignore:Using `torch.compile\\(module\\)` when there")
def test_compiled_code_is_refused_where_it_runs() -> None:
    """It was compiled outside, or is a call of the compiler by another name."""
    module: Any = torch.compile(nn.Linear(2, 2), backend="eager")
    function: Any = torch.compile(add_one, backend="eager")
    for compiled in (module, function):

        def run(compiled: Any = compiled) -> None:
            compiled(torch.ones(2, 2, device="cuda"))

        assert "leave `torch.compile` out" in refusal_of(run)
    assert function(torch.ones(2)).tolist() == [2, 2]


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_a_scripted_module_is_not_moved() -> None:
    """One that was made on the GPU runs, as does one from outside."""

    def move() -> None:
        torch.jit.script(nn.Linear(2, 2)).cuda()

    assert "plan the module that was scripted" in refusal_of(move)
    scripted: Any = torch.jit.script(nn.Linear(2, 2))
    with meft_bench.virtual_gpu("T4"):
        for module in (scripted.cuda(), torch.jit.script(layer())):
            assert module(ones()).is_cuda


def test_a_reversible_model_inside_torch_func_is_refused_by_name() -> None:
    config = transformers.LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=512,
    )

    with meft_bench.virtual_gpu("T4"):
        plain = transformers.LlamaForCausalLM(config)
        model: Any = meft.make_reversible(plain, meft.ReversibleConfig(variant="meft1"))
        model = model.to("cuda")
        weights = {k: v.detach() for k, v in model.named_parameters()}

        def loss(weights: Any, ids: Tensor) -> Any:
            given = {"input_ids": ids, "labels": ids, "use_cache": False}
            return torch.func.functional_call(model, weights, (), given).loss

        ids = torch.ones(2, 8, dtype=torch.long, device="cuda")
        with pytest.raises(Exception, match=r"`torch.func` and `torch.vmap` are not"):
            torch.func.grad(loss)(weights, ids)


# Threads.


def test_another_thread_has_no_virtual_gpu() -> None:
    """Neither tensors that it makes nor a backward that it runs are counted."""

    def make() -> None:
        with ThreadPoolExecutor(1) as pool:
            pool.submit(ones).result()

    assert "as in another thread" in refusal_of(make)
    errors: list[str] = []
    with meft_bench.virtual_gpu("T4"):
        x = torch.zeros(8, device="cuda", requires_grad=True)
        loss = x.exp().sum()

        def backward() -> None:
            try:
                loss.backward()
            except NotImplementedError as error:
                errors.append(str(error))

        thread = threading.Thread(target=backward)
        thread.start()
        thread.join()
        assert x.grad is None
        loss.backward()
    assert len(errors) == 1
    assert "run it in the thread that has entered the virtual GPU" in errors[0]


def test_a_thread_may_work_on_the_host() -> None:
    with meft_bench.virtual_gpu("T4"), ThreadPoolExecutor(2) as pool:
        found = pool.map(lambda n: (torch.arange(4) + n).tolist(), range(2))
        assert [*found] == [[0, 1, 2, 3], [1, 2, 3, 4]]
        assert pool.submit(torch.cuda.is_available).result()


# Streams, scalers, profilers.


def test_streams_and_events_are_complete() -> None:
    with meft_bench.virtual_gpu("T4"):
        stream, event = torch.cuda.Stream(), torch.cuda.Event(enable_timing=True)
        with torch.cuda.stream(stream):
            x = ones()
        x.record_stream(stream)
        stream.wait_stream(torch.cuda.current_stream())
        event.record()
        assert stream.query()
        assert event.query()
        assert event.elapsed_time(torch.cuda.Event(enable_timing=True)) == 0.0
        assert isinstance(stream, torch.cuda.Stream)
        for other in (torch.Stream(device="cuda"), torch.Event(device="cuda")):
            assert other.query()
        assert torch.cuda.device_memory_used() > torch.cuda.memory_reserved()
        with torch.cuda.nvtx.range("step"), torch.cuda.profiler.profile():
            torch.cuda.synchronize()


@pytest.mark.filterwarnings("ignore:.*GradScaler.* is deprecated:FutureWarning")
@pytest.mark.parametrize(
    "scaler", [lambda: torch.amp.GradScaler("cuda"), torch.cuda.amp.GradScaler]
)
def test_a_scaled_loss_takes_two_numbers(scaler: Any) -> None:
    """Its scale and the count of steps; gradients are finite."""
    with meft_bench.virtual_gpu("T4"):
        model = layer()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        scale = scaler()
        loss = model(ones()).sum()
        before = torch.cuda.memory_allocated()
        scaled = scale.scale(loss)
        assert torch.cuda.memory_allocated() - before == 3 * 512
        scaled.backward()
        scale.unscale_(optimizer)
        norm = nn.utils.clip_grad_norm_(
            model.parameters(), 1.0, error_if_nonfinite=True
        )
        assert norm.device.type == "cuda"
        scale.step(optimizer)
        scale.update()
        scale.load_state_dict(scale.state_dict())


# A warning that is an error ends the process inside the profiler, also on the host.
@pytest.mark.filterwarnings("ignore")
def test_a_profiler_of_the_gpu_alone_runs() -> None:
    with meft_bench.virtual_gpu("T4"):
        steps = schedule(wait=0, warmup=1, active=1)
        with profile(activities=[ProfilerActivity.CUDA], schedule=steps) as found:
            for _ in range(3):
                ones().exp()
                found.step()


# Attention.


def test_the_order_of_kernels_is_that_of_the_code() -> None:
    """On an H200 cuDNN is first, in `sdpa_kernel` with `set_priority` what is named."""
    order = torch._C._get_sdp_priority_order()
    flash, efficient = SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION
    with meft_bench.virtual_gpu("H200") as memory:
        x = torch.zeros(2, 4, 32, 64, device="cuda", dtype=torch.bfloat16)
        counts = memory._device.attention_counts

        def kernel() -> str:
            counts.clear()
            scaled_dot_product_attention(x, x, x)
            (name,) = counts
            return name

        assert kernel() == "cudnn"
        with sdpa_kernel([efficient, flash], set_priority=True):
            assert kernel() == "efficient"
        with sdpa_kernel([flash, efficient], set_priority=True):
            assert kernel() == "flash"
        every = [flash, efficient, SDPBackend.MATH, SDPBackend.CUDNN_ATTENTION]
        with sdpa_kernel(every, set_priority=True):
            assert kernel() == "flash"
        with sdpa_kernel([efficient, flash]):
            assert kernel() == "flash"
        assert kernel() == "cudnn"
    assert torch._C._get_sdp_priority_order() == order


# Kernels of Triton.


def test_a_kernel_of_triton_in_an_operator_of_torch_is_not_launched() -> None:
    triton = pytest.importorskip("triton")

    @triton.jit  # type: ignore[untyped-decorator]
    def double(x: Any, out: Any, count: Any) -> None:
        pass

    def doubled(x: Tensor) -> Tensor:
        out = torch.empty_like(x)
        library.wrap_triton(double)[(1,)](x, out, x.numel())
        return out

    operator: Any = library.triton_op("meft_tests::doubled", mutates_args={})
    call = operator(doubled)
    with meft_bench.virtual_gpu("A100-80GB"):
        before = torch.cuda.memory_allocated()
        out = call(torch.zeros(1024, device="cuda"))
        assert torch.cuda.memory_allocated() - before == out.nbytes
        driver = triton.runtime.driver.active
        assert driver.get_current_target().arch == 80
        with pytest.raises(NotImplementedError, match="`utils` of Triton's driver"):
            driver.utils.get_device_properties(0)
