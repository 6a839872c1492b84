#!/usr/bin/env bash
# LongBench, the twelve tasks of the paper (from the Hub). --help lists the flags.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_eval.sh"
evaluate "${longbench[@]}" --output_path runs/eval/longbench -- "$@"
