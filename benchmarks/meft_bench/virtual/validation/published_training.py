"""Training steps whose memory others measured, as their programs run them.

PEFT's method comparison, fms-acceleration's runs of the Trainer and a run of litgpt.
Models are made from their configs.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import peft
import torch
import transformers
from torch import nn
from torch.nn import functional

from meft_bench.shared.published import Published
from meft_bench.virtual.prediction.training_code import TrainingMemory, virtual_gpu
from meft_bench.virtual.validation.training_steps import LLAMA_3B

LLAMA_7B = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "vocab_size": 32000,
}
MISTRAL_7B = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 32001,  # fms-hf-tuning adds a token for padding
}
SANTACODER = {
    "n_embd": 2048,
    "n_layer": 24,
    "n_head": 16,
    "n_inner": 8192,
    "n_positions": 2048,
    "multi_query": True,
    "vocab_size": 49280,
}


def method_comparison(rows: Sequence[Published]) -> Iterator[int]:
    """Yield the predictions of a run of PEFT's method comparison.

    Llama-3.2-3B in BF16, batches of four padded rows, AdamW, clipping. What its loop
    holds from one step to the next (outputs, loss and batch) is held here. The first
    row is what is allocated after steps of the mean length; each of the others is read
    after one longer step, before which the cache is emptied, as every few steps there.
    """
    settings = rows[0].settings
    with virtual_gpu(rows[0].gpu):
        model = _causal(transformers.LlamaConfig(**LLAMA_3B))
        if config := settings.get("peft"):
            model = peft.get_peft_model(
                model,
                peft.get_peft_config({**config}),
                autocast_adapter_dtype=settings.get("autocast_adapter_dtype", True),
            )
        optimizer = _optimizer(model, settings)
        if config:
            with model.disable_adapter():  # it evaluates before it trains
                pass
        model.train()
        held: dict[str, Any] = {}
        mean = rows[0].size
        for row in rows:
            if row.metric == "memory_allocated":
                _hold_step(held, model, optimizer, row.size)
            else:
                _hold_step(held, model, optimizer, mean)
                torch.cuda.empty_cache()
            _hold_step(held, model, optimizer, row.size)
            yield int(getattr(torch.cuda, row.metric)())
        held.clear()


def _optimizer(model: Any, settings: Mapping[str, Any]) -> torch.optim.Optimizer:
    named: dict[str, Any] = {"lr": 1e-4, "weight_decay": 0.1}
    if settings.get("optimizer") == "lora-fa":
        from peft.optimizers import create_lorafa_optimizer

        config = settings["peft"]
        made: torch.optim.Optimizer = create_lorafa_optimizer(
            model=model, r=config["r"], lora_alpha=config["lora_alpha"], **named
        )
        return made
    return torch.optim.AdamW(model.parameters(), **named)


def _hold_step(
    held: dict[str, Any], model: Any, optimizer: torch.optim.Optimizer, tokens: int
) -> None:
    """Run a step, and hold what its loop holds until the next one replaces it."""
    ids = torch.ones(4, tokens, dtype=torch.long, device="cuda")
    held["batch"] = {"input_ids": ids, "attention_mask": ids.clone()}
    held["batch"]["labels"] = ids.clone()
    optimizer.zero_grad()
    held["outputs"] = model(**held["batch"], num_items_in_batch=4 * tokens)
    held["loss"] = held["outputs"].loss
    held["loss"].backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    if getattr(model, "peft_type", None) == peft.PeftType.ADALORA:
        model.base_model.update_and_allocate(1)  # as AdaLoRA wants after every step


def full_and_lora(rows: Sequence[Published]) -> Iterator[int]:
    """Yield the predictions of a run of fms-acceleration's benchmark.

    Weights in BF16, reentrant checkpointing, packed batches, AdamW, as the Trainer of
    transformers 4.48 runs them: its loss casts logits to float32, but for santacoder,
    whose model computed its own; a contiguous copy is made of all but the last token's.
    The outputs are held until backward has ended.
    """
    row = rows[0]
    is_santacoder = row.program.startswith("santacoder")
    with virtual_gpu(row.gpu, padding=False, enforce_memory=False) as gpu:
        model = _causal(
            transformers.GPTBigCodeConfig(**SANTACODER)  # type: ignore[arg-type]
            if is_santacoder
            else transformers.MistralConfig(**MISTRAL_7B)  # type: ignore[arg-type]
        )
        model.config.use_cache = False
        if config := row.settings.get("peft"):
            model = peft.get_peft_model(model, peft.get_peft_config({**config}))
            model.enable_input_require_grads()
        checkpoint(model)
        model.train()
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained)
        for _ in range(3):
            shape = (row.settings["batch_size"], row.size)
            ids = torch.ones(shape, dtype=torch.long, device="cuda")
            outputs = model(input_ids=ids, attention_mask=torch.ones_like(ids))
            logits = outputs.logits if is_santacoder else outputs.logits.float()
            shifted = logits[:, :-1].contiguous().flatten(0, 1)
            loss = functional.cross_entropy(shifted, ids[:, 1:].flatten())
            del logits, shifted
            loss.backward()
            del outputs
            nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            del loss
        yield from _read(rows, gpu)


def lora_of_7b(rows: Sequence[Published]) -> Iterator[int]:
    """Yield the prediction of litgpt's LoRA of Llama-2-7B.

    BF16, one row, no checkpointing; with the model of transformers and LoRA of PEFT.
    """
    row = rows[0]
    with virtual_gpu(row.gpu, padding=False) as gpu:
        model = peft.get_peft_model(
            _causal(transformers.LlamaConfig(**LLAMA_7B)),  # type: ignore[arg-type]
            peft.get_peft_config({**row.settings["peft"]}),
            autocast_adapter_dtype=False,
        )
        model.train()
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained)
        for _ in range(3):
            ids = torch.ones(1, row.size, dtype=torch.long, device="cuda")
            logits = model(input_ids=ids).logits.float()
            functional.cross_entropy(logits[0, :-1], ids[0, 1:]).backward()
            optimizer.step()
            optimizer.zero_grad()
            del logits
        yield from _read(rows, gpu)


def _causal(config: transformers.PreTrainedConfig) -> Any:
    with torch.device("cuda"):
        return transformers.AutoModelForCausalLM.from_config(
            config, dtype=torch.bfloat16
        )


def checkpoint(model: Any) -> None:
    """Keep the inputs of blocks alone, and recompute the rest by reentrant autograd."""
    # The first name is that of transformers 5.23 and later.
    name = "activation_checkpointing_enable"
    if not hasattr(model, name):
        name = "gradient_checkpointing_enable"
    getattr(model, name)({"use_reentrant": True})


def _read(rows: Sequence[Published], gpu: TrainingMemory) -> Iterator[int]:
    """Yield what the functions of `torch.cuda` and `nvidia-smi` show at the end."""
    for row in rows:
        if row.metric == "nvidia-smi":
            plan = gpu.plan()
            assert plan.process_bytes is not None
            yield plan.process_bytes
        else:
            yield int(getattr(torch.cuda, row.metric)())
