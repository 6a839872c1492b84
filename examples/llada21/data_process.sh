#!/usr/bin/env bash
# Tokenise the training data once, to data/sft/<model>/, where run_local.sh finds it. Any flag given here is passed on and wins.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

model="${MODEL:-inclusionAI/LLaDA2.1-mini}"
data="${DATASET:-Yukang/LongAlpaca-12k}"

python -m dllm.tools.preprocess_sft_dataset \
    --model_name_or_path "$model" \
    --dataset_args "$data" \
    --num_proc "${NUM_PROC:-8}" \
    "$@"
