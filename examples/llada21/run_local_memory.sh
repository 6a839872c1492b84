#!/usr/bin/env bash
# run_local.sh with Parametric Memory (MemDLM) in its published setting. Flags and variables as there.
set -euo pipefail

export OUTPUT_DIR="${OUTPUT_DIR:-runs/llada21-sft-memory}"
exec bash "$(dirname "${BASH_SOURCE[0]}")/run_local.sh" \
    --mem_enabled True \
    --mem_masking_strategy pmc \
    --mem_num_inner_steps 2 \
    --mem_inner_loss_type ce \
    --mem_inner_lr 0.1 \
    --mem_inner_rank 32 \
    --mem_inner_alpha 64 \
    --mem_inner_layer_fraction 0.1 \
    "$@"
