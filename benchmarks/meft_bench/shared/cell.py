"""A cell: one point of a sweep, with exactly the fields needed to run it.

A cell is plain data. Two cells with equal fields are the same cell, on any machine;
`Cell.id` is its readable name and `Cell.key` its join key. This module imports no heavy
dependency, so that the parent process can use cells without torch.
"""

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from typing import Any

from meft_bench.shared import quantisations


@dataclass(frozen=True, kw_only=True, slots=True)
class Cell:
    """One point of a sweep: method x workload x options.

    Fields with their default values are not in `id`, except the workload's shape.
    """

    method: str
    """Method of fine-tuning, one of `meft_bench.shared.registry.METHODS`.

    It may be of the user, like backbone and task (`meft_bench.shared.own`).
    """
    backbone: str = "minilm-l6"
    """A packaged name, `dir:PATH`, `hub:NAME`, or `random:CONFIG`."""
    depth: int = 0
    """Number of blocks; the backbone's are truncated or repeated; 0 keeps their number.

    BART's encoder and decoder each get this number.
    """
    dtype: str = "fp32"
    """Compute dtype: `fp32`, or `bf16`/`fp16`, autocast over float32 parameters."""
    weights_dtype: str = "fp32"
    """Dtype of the backbone's parameters: `fp32`, the compute dtype, or a quantisation.

    The compute dtype needs no autocast. Parameters that a method adds, and the new
    head, stay float32. A quantisation is one of `quantisations.TABLE`; it applies to
    linear layers, and the other parameters have the compute dtype.
    """
    batch_size: int = 16
    """Number of rows per micro-batch, of all ranks together."""
    seq_len: int = 128
    """Number of tokens per row.

    It is exact for random input, the truncation length for a real task, and for images
    the number of tokens that the backbone makes of one.
    """
    padding: str = "none"
    """`none`, or `some`: the last token of the last row of a batch is padding.

    Of the batches of full length, by which memory is measured, and of random input.
    Kernels of attention with a mask can take more memory. Batches of real rows are
    padded as their lengths require.
    """
    task: str = "synthetic"
    """A task of `meft_bench.shared.registry.TASKS`.

    `synthetic` and `synthetic-lm` have random input and no score.
    """
    seed: int = 0
    """Seed of the head, the adapters, dropout, and the order of the rows."""
    device: str = "cpu"
    """`cpu`, `cuda`, or a virtual GPU: `virtual-NAME`, `virtual-PATH.json`."""
    optimizer: str = "adamw"
    """The optimizer, one of `meft_bench.shared.registry.OPTIMIZERS`."""
    learning_rate: float = 5e-4
    """Peak of the linear schedule."""
    max_steps: int = 5
    """Maximum number of optimizer steps (warm-up steps included)."""
    warmup_steps: int = 2
    """Number of first steps that are recorded but not included in `step_seconds`."""
    eval_every: int = 0
    """Number of steps between two validations; 0 trains all `max_steps` without any."""
    patience: int = 0
    """Number of validations without improvement before training stops; 0: no limit."""
    train_rows: int = 0
    """Number of rows drawn by `seed`; 0 draws all.

    A tenth of them is used to select weights.
    """
    eval_rows: int = 0
    """Number of rows to score, the first of the split; 0 takes all."""
    guard_texts: int = 0
    """Number of texts that have nothing to do with the task, of a language model.

    Their perplexity is measured before and after training; 0 measures none.
    """
    bottleneck_size: int = 8
    """Inner width of every bottleneck adapter."""
    lora_rank: int = 8
    """Rank of every LoRA pair, and of the projections of GaLore."""
    num_neurons: int = 1024
    """Number of neurons per block of the `dense` and `sparse` methods."""
    top_k_neurons: int = 64
    """Number of these that a token keeps."""
    num_experts: int = 0
    """Number of groups of neurons of the `sparse-experts` methods.

    0 takes the authors' number, 4 times the square root of `num_neurons`.
    """
    top_k_experts: int = 8
    """Number of these that a token uses."""
    row_budget_bytes: int = 2**30
    """Maximum number of bytes of sparse adapters' rows on the device.

    It applies to all blocks together.
    """
    active_fraction: float = 1.0
    """Assumed share of a block's neurons that a batch activates on a virtual GPU.

    A virtual GPU has no values from which to derive it. The number is at most what the
    batch's tokens could keep.
    """
    accumulation: int = 1
    """Number of micro-batches whose gradients one optimizer step accumulates."""
    lost_bits: int = 4
    """k of the small scale 2^-k of the `-exact` methods."""
    reversible_blocks: int = 0
    """Number of lowest blocks that MEFT rebuilds; 0 rebuilds all.

    The blocks above are stored. Applies to BART's encoder and decoder each.
    """
    mlp_chunks: int = 1
    """Number of parts of the tokens in which an MLP is run and differentiated.

    Norms that compute in float32 are, too. MEFT, the methods with checkpointing, full
    fine-tuning, LoRA and methods of the user have it; others are refused. MEFT
    differentiates a part as soon as it is recomputed; the others take one more forward
    of the MLP for it.
    """
    side_buffer: str = "device"
    """Where the `-exact` methods keep their lost bits until the backward.

    `device`, or `host`: in host memory, to and from which they are copied.
    """
    gradient_dtype: str = "fp32"
    """Dtype of the gradients of the streams of the `-exact` methods, `fp32` or `bf16`.
    """
    loss_chunk_tokens: int = 0
    """Number of tokens whose logits exist at a time in the loss of a language model.

    0 computes the loss from all logits, as transformers does. Any method can have it.
    """
    attention: str = "sdpa"
    """Attention kernel, one of `meft_bench.shared.registry.ATTENTIONS`."""
    blocks: str = "eager"
    """`eager`, or `compiled` by `torch.compile`."""
    scored_on: str = "evaluation"
    """Rows that give the score: `evaluation`, or `validation`, which are set aside.

    Trials that choose a learning rate use the latter.
    """
    reference: str = ""
    """A method whose steps are timed interleaved with this one's, in one process."""
    ranks: int = 1
    """Number of processes that train together, each on an equal part of every batch.

    On `cuda` each has a GPU.
    """
    parallel: str = "ddp"
    """How several ranks train: `ddp`, each with the whole model, or `fsdp2`, in shards.
    """

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
    def is_quantised(self) -> bool:
        """Whether linear layers of the backbone have quantised weights."""
        return self.weights_dtype in quantisations.TABLE

    @property
    def unquantised_dtype(self) -> str:
        """Dtype of the backbone's parameters that are not quantised."""
        return self.dtype if self.is_quantised else self.weights_dtype

    @property
    def key(self) -> str:
        """Join key: sha256 of the fields as canonical JSON."""
        text = json.dumps(self.to_json(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    def to_json(self) -> dict[str, Any]:
        """Return the fields as a JSON object."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> "Cell":
        """Make a cell from the result of `to_json`."""
        return cls(**fields)
