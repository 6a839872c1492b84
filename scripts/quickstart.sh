#!/usr/bin/env bash
# From a bare machine (Python >= 3.10, git) to two trained tiny models: masked-diffusion training without and with memory.
#
#   bash scripts/quickstart.sh
#
# Makes .venv on the first call. After the install no network is used. Results: runs/quickstart/.
set -euo pipefail

source "$(dirname "${BASH_SOURCE[0]}")/_env.sh"
ensure_env

export HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 TOKENIZERS_PARALLELISM=false
# A second thread gains little on matrices this small, and loses ten times that while another program uses the core.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
exec "$VENV_PYTHON" scripts/quickstart.py "$@"
