#!/usr/bin/env bash
# The published setting (arXiv 2605.22967): 300,000 steps of 512 puzzles for each of four arms and three seeds, on one GPU.
#   TRAIN=train.csv TEST=test.csv bash examples/sudoku/run_paper.sh [any flag of python -m memdlm.studies.sudoku]
# TRAIN has columns Puzzle and Solution (or Question and Answer); its stated solutions are believed. Of TEST 20,000 puzzles are used.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

exec python -m memdlm.studies.sudoku \
    --preset paper \
    --output "${OUTPUT_DIR:-runs/sudoku-paper}" \
    --train_puzzles "${TRAIN:?name a file of training puzzles}" \
    --prove_train False \
    --puzzles "${TEST:?name a file of test puzzles}" \
    --num_test 20000 \
    "$@"
