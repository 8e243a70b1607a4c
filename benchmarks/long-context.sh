#!/usr/bin/env bash
# The longest sequence of each method on GPUs that are not there, as records. What is in the
# file already is not looked for again, so an interrupted run goes on with the same command.
#
#   benchmarks/long-context.sh runs/long-context.jsonl H100 RTX4090 RTX3090
set -euo pipefail
# As PyTorch advises where lengths leave room that cannot be reused; for all methods alike.
export PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True
out=$1
shift

# fit GPU WEIGHTS BACKBONE METHODS... -- FIELDS...
fit() {
    local gpu=$1 weights=$2 backbone=$3 methods=()
    shift 3
    while [ "$1" != -- ]; do
        methods+=("$1")
        shift
    done
    shift
    # Exit code 4: nothing fits, which is an answer.
    python -m meft_bench fit "$backbone" --method "${methods[@]}" --gpu "$gpu" \
        --maximize seq --multiple 1024 --batch 1 --padding none --dtype bf16 --weights-dtype "$weights" \
        --set loss_chunk_tokens=1024 "$@" -o "$out" || [ $? -eq 4 ]
}

# nf4: linear layers in 4 bits, as transformers loads them with bitsandbytes.
for weights in bf16 nf4; do
    for gpu in "$@"; do
        for backbone in llama-3.1-8b-1m qwen3-8b-1m; do
            fit "$gpu" "$weights" "$backbone" lora lora-checkpointing lora-checkpointing-offload --
            fit "$gpu" "$weights" "$backbone" lora-checkpointing lora-checkpointing-offload -- mlp_chunks=8
            fit "$gpu" "$weights" "$backbone" meft1-exact lora-exact -- mlp_chunks=8 gradient_dtype=bf16
            fit "$gpu" "$weights" "$backbone" meft1-exact lora-exact -- mlp_chunks=8 gradient_dtype=bf16 \
                side_buffer=host
        done
    done
done
