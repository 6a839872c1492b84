#!/usr/bin/env bash
# The mixture of code and mathematics that Relay was trained on ("c40m60"), to data/mix/c40m60: 60,000 rows from the Hub, streamed.
#   BENCHMARKS="HumanEval.jsonl.gz mbpp.jsonl" bash examples/fast_dllm_v2/data_process.sh [any flag of dllm.tools.mix_data]
# Then: DATASET=data/mix/c40m60 bash examples/fast_dllm_v2/run_local.sh
# Local files instead, filtered in the same way:  --source "code.jsonl:2400" --source "maths.jsonl:3600"
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

read -ra benchmarks <<<"${BENCHMARKS:-}"
if ((${#benchmarks[@]})); then
    benchmarks=(--benchmarks "${benchmarks[@]}")
else
    echo "BENCHMARKS is not set: rows that repeat problems of a benchmark are kept" >&2
fi

exec python -m dllm.tools.mix_data \
    --preset c40m60 \
    --model_name_or_path "${MODEL:-Efficient-Large-Model/Fast_dLLM_v2_1.5B}" \
    --output "${OUTPUT:-data/mix/c40m60}" \
    --shuffle_buffer 100000 \
    ${benchmarks[@]+"${benchmarks[@]}"} "$@"
