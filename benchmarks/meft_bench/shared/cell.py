"""A cell: one point of a sweep, everything needed to run it and nothing else.

A cell is plain data. Two cells with equal fields are the same cell, on any machine;
`Cell.id` is its readable name and `Cell.key` its join key. This module imports nothing
heavy, so that the parent process can hold cells without torch.
"""

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True, slots=True)
class Cell:
    """One point of a sweep: method x workload x options.

    Fields left at their defaults do not show in `id`, except the workload's shape.
    """

    method: str
    """Way of fine-tuning, one of `meft_bench.shared.registry.METHODS`."""
    backbone: str = "minilm-l6"
    """A packaged name, `dir:PATH`, `hub:NAME`, or `random:CONFIG`."""
    depth: int = 0
    """Number of blocks, taken or repeated from the backbone's; 0 leaves it as it is.
    BART's encoder and decoder each get as many."""
    dtype: str = "fp32"
    """Compute dtype: `fp32`, or `bf16`/`fp16`, autocast over float32 parameters."""
    weights_dtype: str = "fp32"
    """Dtype of the backbone's parameters: `fp32`, or the compute dtype, which then
    needs no autocast. What a method adds, and the new head, stay float32."""
    batch_size: int = 16
    """Rows per step."""
    seq_len: int = 128
    """Tokens per row: exact for random input, the truncation length for a real task; of
    images, what the backbone makes of one."""
    task: str = "synthetic"
    """A task of `meft_bench.shared.registry.TASKS`; `synthetic` and `synthetic-lm` have
    random input, no score."""
    seed: int = 0
    """Seeds the head, the adapters, dropout, and the order of the rows."""
    device: str = "cpu"
    """`cpu`, `cuda`, or a virtual GPU: `virtual-NAME`, `virtual-PATH.json`."""
    optimizer: str = "adamw"
    """What steps the weights, one of `meft_bench.shared.registry.OPTIMIZERS`."""
    learning_rate: float = 5e-4
    """Peak of the linear schedule."""
    max_steps: int = 5
    """Optimizer steps, at most (warm-up steps included)."""
    warmup_steps: int = 2
    """First steps, recorded but left out of the summary of `step_seconds`."""
    eval_every: int = 0
    """Steps between two validations for early stopping; 0 trains all `max_steps`."""
    patience: int = 0
    """Validations without improvement before training stops; 0 never stops early."""
    train_rows: int = 0
    """Rows drawn by `seed`, a tenth of them to select weights with; 0 takes all."""
    eval_rows: int = 0
    """Rows to score on, the first of the split; 0 takes all."""
    bottleneck_size: int = 8
    """Inner width of every bottleneck adapter."""
    lora_rank: int = 8
    """Rank of every LoRA pair."""
    num_neurons: int = 1024
    """Neurons a block of the `dense` and `sparse` methods."""
    top_k_neurons: int = 64
    """Of these, kept by a token."""
    num_experts: int = 0
    """Groups of neurons of the `sparse-experts` methods; 0 takes the authors' number,
    4 times the root of `num_neurons`."""
    top_k_experts: int = 8
    """Of these, asked by a token."""
    row_budget_bytes: int = 2**30
    """What rows of sparse adapters may take on the device, all blocks together."""
    active_fraction: float = 1.0
    """Share of a block's neurons that a batch is said to activate on a virtual GPU,
    which has no values to tell; at most what its tokens could keep."""
    accumulation: int = 1
    """Batches whose gradients one optimizer step adds up."""
    lost_bits: int = 4
    """k of the small scale 2^-k of the `-exact` methods."""
    reversible_blocks: int = 0
    """Lowest blocks that MEFT rebuilds, those above store; 0 rebuilds all of them.
    Of BART's encoder and decoder each."""
    mlp_chunks: int = 1
    """Parts of the tokens in which MEFT runs and differentiates an MLP."""
    attention: str = "sdpa"
    """Kernel of attention, one of `meft_bench.shared.registry.ATTENTIONS`."""
    blocks: str = "eager"
    """`eager`, or `compiled` by `torch.compile`."""
    rival: str = ""
    """A method that is timed in turn with this one, in the same process."""

    @property
    def id(self) -> str:
        """Readable, stable name, e.g. `meft1/minilm-l6/b16-s128-fp32/sst2/seed0`."""
        shape = f"b{self.batch_size}-s{self.seq_len}-{self.dtype}"
        if self.depth:
            shape += f"-d{self.depth}"
        name = f"{self.method}/{self.backbone}/{shape}/{self.task}/seed{self.seed}"
        shown = {"method", "backbone", "depth", "dtype", "batch_size", "seq_len"}
        shown |= {"task", "seed"}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name not in shown and value != field.default:
                name += f"/{field.name}={value}"
        return name

    @property
    def key(self) -> str:
        """Join key: sha256 of the fields as canonical JSON."""
        text = json.dumps(self.to_json(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    def to_json(self) -> dict[str, Any]:
        """The fields as a JSON object."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> "Cell":
        """The inverse of `to_json`."""
        return cls(**fields)
