# Sourced by the evaluation scripts of every family, by way of FAMILY/_eval.sh, which sets `adapter`.
#
#   evaluate FLAG VALUE ... -- "$@"      # defaults of the script, then what the user typed (it wins)
#
# Runs from any folder, in the active Python environment, else in .venv of the repository; paths are relative to the
# repository.

cd "$(dirname "${BASH_SOURCE[0]}")/.."
if [[ -z "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" && -x .venv/bin/python ]]; then
    export PATH="$PWD/.venv/bin:$PATH"
fi
export TOKENIZERS_PARALLELISM=false

# Parametric Memory in its published setting.
memory=(
    --extra_model_args "mem_enabled=True,mem_masking_strategy=pmc,mem_num_inner_steps=2,mem_inner_loss_type=ce"
    --extra_model_args "mem_prompt_mask_ratio=0.2,mem_inner_lr=0.1,mem_inner_grad_clip=1.0"
    --extra_model_args "mem_inner_rank=32,mem_inner_alpha=64.0,mem_inner_layer_fraction=0.1"
)

evaluate() {
    exec python examples/_eval.py "$adapter" "$0" "$@"
}
