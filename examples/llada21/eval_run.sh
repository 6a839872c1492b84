#!/usr/bin/env bash
# BABILong, qa1 to qa5 at 1k tokens (from the Hub). --help lists the flags. Without network and GPU:
#   bash examples/llada21/eval_run.sh --model_name_or_path runs/tiny2 --num_gpu 0 --tasks memdlm_babilong
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_eval.sh"
evaluate "${babilong[@]}" --output_path runs/eval/llada21-babilong -- "$@"
