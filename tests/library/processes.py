"""What several processes run, in a module that each of them can import."""

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.fsdp import fully_shard

import gloo_group
import meft
from library.families import CASES, objective

KINDS = ("lora", "full", "bottleneck")
CASE = next(case for case in CASES if case.kind == "LlamaForCausalLM")


def model_of(kind: str, backward: str | None = "rebuild", **config: Any) -> Any:
    """A model of three blocks; not converted if `backward` is None."""
    model: Any = CASE.build()
    if kind == "lora":
        torch.manual_seed(1)
        lora = LoraConfig(
            target_modules=["q_proj", "v_proj"],
            r=4,
            init_lora_weights=False,
            lora_dropout=0.1,
        )
        model = get_peft_model(model, lora)
    if backward is None:
        return model
    torch.manual_seed(2)
    own = {"variant": "meft1", "bottleneck_size": 3}
    options = (own if kind == "bottleneck" else {"adapter": None}) | config
    return meft.make_reversible(
        model, meft.ReversibleConfig(backward=backward, **options)
    )


def layers(model: Any) -> list[nn.Module]:
    inner = getattr(model, "base_model", model)
    causal = getattr(inner, "model", inner)
    return list(getattr(causal, "model", causal).layers)


def shard(model: Any, mesh: Any) -> Any:
    for block in layers(model):
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def whole(tensor: Tensor) -> Tensor:
    found: Any = tensor
    return found.full_tensor() if hasattr(found, "full_tensor") else tensor


def gradients(model: Any, rows: int = 3, steps: int = 1) -> dict[str, Tensor]:
    """Loss and gradients of all parameters after some micro-batches."""
    loss = torch.zeros(())
    for step in range(steps):
        torch.manual_seed(5 + step)
        batch = {name: x[:rows] for name, x in CASE.batch().items()}
        loss = objective(model(**batch, use_cache=False))
        loss.backward()
    named = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {n: whole(g) for n, g in named.items()} | {"loss": loss.detach()}


def in_each_process(
    rank: int, world: int, folder: str, kind: str, rows: str, how: str
) -> None:
    with gloo_group.member(rank, world, folder):
        model: Any = model_of(kind)
        if how == "fsdp":
            model = shard(model, dist.device_mesh.init_device_mesh("cpu", (world,)))
        else:
            model = nn.parallel.DistributedDataParallel(model)
        own = 3 if rows == "same" else 1 + rank
        optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
        found = unwrapped(gradients(model, own))
        torch.save(found, Path(folder) / f"gradients-{rank}.pt")
        optimizer.step()
        optimizer.zero_grad()
        weights = {n: whole(p).detach() for n, p in model.named_parameters()}
        torch.save(unwrapped(weights), Path(folder) / f"weights-{rank}.pt")


def unwrapped(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix("module."): t for name, t in tensors.items()}
