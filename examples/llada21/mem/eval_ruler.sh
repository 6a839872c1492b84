#!/usr/bin/env bash
# ../eval_ruler.sh with a memory written from each prompt (Parametric Memory), in its published setting.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../_eval.sh"
evaluate "${ruler[@]}" "${memory[@]}" --output_path runs/eval/llada21-ruler-memory -- "$@"
