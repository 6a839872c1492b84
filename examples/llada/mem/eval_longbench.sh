#!/usr/bin/env bash
# ../eval_longbench.sh with a memory written from each prompt (Parametric Memory), in its published setting.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../_eval.sh"
evaluate "${longbench[@]}" "${memory[@]}" --output_path runs/eval/longbench-memory -- "$@"
