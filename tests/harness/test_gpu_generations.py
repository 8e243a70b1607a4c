"""Differences of other generations of GPUs from the H200's, by PyTorch's sources."""

import dataclasses

import pytest
import torch

from meft_bench.virtual.device import attention, gpu, workspaces
from meft_bench.virtual.device.attention import Call

aten = torch.ops.aten


def call(dtype: torch.dtype, width: int = 64) -> Call:
    query, key, value = torch.empty(3, 2, 4, 16, width, dtype=dtype, device="meta")
    return Call(
        query=query,
        key=key,
        value=value,
        mask=None,
        dropout=0.0,
        is_causal=False,
        scale=None,
        enable_gqa=False,
    )


@pytest.mark.parametrize(
    ("name", "dtype", "width", "kernel"),
    [
        ("T4", torch.float16, 64, "efficient"),  # flash attention begins at 8.0
        ("T4", torch.bfloat16, 64, "math"),  # which no fused kernel of 7.5 reads
        ("V100-32GB", torch.float32, 66, "efficient"),  # no tensor cores, no alignment
        ("A10G", torch.float32, 66, "math"),
        ("A10G", torch.bfloat16, 64, "flash"),
        ("RTX5090-32GB", torch.float16, 64, "flash"),
        ("B200", torch.bfloat16, 64, "cudnn"),
        # The memory-efficient kernel has no greatest width.
        ("A10G", torch.float32, 256, "efficient"),
        ("H200", torch.float32, 512, "efficient"),
        ("T4", torch.float16, 256, "efficient"),
        ("A10G", torch.bfloat16, 512, "efficient"),
    ],
)
def test_a_generation_chooses_its_kernel_of_attention(
    name: str, dtype: torch.dtype, width: int, kernel: str
) -> None:
    assert attention.chosen(gpu.find(name), call(dtype, width)) == kernel


@pytest.mark.parametrize(
    ("width", "dropout", "kernel"),
    [
        (192, 0.1, "flash"),
        (224, 0.0, "efficient"),
        (256, 0.0, "flash"),
        (256, 0.1, "efficient"),
    ],
)
def test_wide_heads_train_by_flash_attention_where_its_backward_can(
    width: int, dropout: float, kernel: str
) -> None:
    """On consumer GPUs not between 192 and 224, nor above with dropout."""
    trained = call(torch.bfloat16, width)
    trained.query.requires_grad_()
    trained = dataclasses.replace(trained, dropout=dropout)
    for name in ("RTX3090-24GB", "RTX4090-24GB", "RTX5090-32GB"):
        assert attention.chosen(gpu.find(name), trained) == kernel
    assert attention.chosen(gpu.find("A100-80GB"), trained) == "flash"


def test_partial_sums_of_a_bias_gradient_follow_the_threads_of_a_gpu() -> None:
    """A GPU with fewer threads has fewer blocks that share an output."""
    rows = torch.empty(8192, 4096, dtype=torch.bfloat16, device="meta")
    num_bytes = {}
    for name in ("A100-80GB", "A10G", "T4"):
        work = workspaces.of(gpu.find(name))[aten.sum.dim_IntList]
        num_bytes[name] = work((rows, [0]), None)
    # A block has 128 threads and 32 blocks cover the outputs; of the blocks that run at
    # once on all multiprocessors, those beyond them share outputs.
    sharing = {
        "A100-80GB": 108 * (2048 // 128) // 32,
        "A10G": 80 * (1536 // 128) // 32,
        "T4": 40 * (1024 // 128) // 32,
    }
    one = num_bytes["T4"] // sharing["T4"]
    assert num_bytes == {name: one * count for name, count in sharing.items()}
