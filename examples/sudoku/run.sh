#!/usr/bin/env bash
# Four arms of one Sudoku solver, side by side: table, picture and models in OUTPUT_DIR. Twelve runs of three minutes on one core.
#   bash examples/sudoku/run.sh [any flag of python -m memdlm.studies.sudoku; it wins over the ones below]
# The same command goes on where an interrupted one stopped.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

# More threads than idle cores slow so small a model down.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
exec python -m memdlm.studies.sudoku \
    --preset tiny \
    --output "${OUTPUT_DIR:-runs/sudoku}" \
    --arms all \
    --seeds 1,2,3 \
    --device cpu \
    "$@"
