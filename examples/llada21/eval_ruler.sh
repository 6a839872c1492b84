#!/usr/bin/env bash
# RULER: multi-value needles, variable tracking, common words, at 4k and 8k tokens. --help lists the flags. Offline, on a CPU:
#   bash examples/llada21/eval_ruler.sh --model_name_or_path runs/tiny2 --num_gpu 0 --tasks memdlm_ruler
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_eval.sh"
evaluate "${ruler[@]}" --output_path runs/eval/llada21-ruler -- "$@"
