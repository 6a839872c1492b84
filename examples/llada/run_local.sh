#!/usr/bin/env bash
# Plain masked-diffusion fine-tuning (MDLM): 4-bit base + LoRA on the GPUs of this machine. First: bash examples/llada/data_process.sh
#   NUM_GPU=1 bash examples/llada/run_local.sh [any flag of sft.py; it wins over the ones below]
# NUM_GPU=0 runs on the CPU. MODEL and DATASET name another model and data set.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

gpus="${NUM_GPU:-1}"
launch=(--quiet --num_processes "$((gpus > 1 ? gpus : 1))" --num_machines 1 --mixed_precision no --dynamo_backend no)
device=()
((gpus > 1)) && launch+=(--multi_gpu)
((gpus == 0)) && launch+=(--cpu) && device=(--use_cpu True)

exec accelerate launch "${launch[@]}" examples/llada/sft.py \
    --model_name_or_path "${MODEL:-inclusionAI/LLaDA-MoE-7B-A1B-Base}" \
    --dataset_args "${DATASET:-Yukang/LongAlpaca-12k}" \
    --load_preprocessed_data True \
    --max_length 4096 \
    --truncation filter \
    --load_in_4bit True \
    --lora True \
    --num_train_epochs 1 \
    --learning_rate 2e-5 \
    --per_device_train_batch_size 2 \
    --gradient_accumulation_steps 4 \
    --gradient_checkpointing True \
    --save_only_model True \
    --output_dir "${OUTPUT_DIR:-runs/llada-sft}" \
    ${device[@]+"${device[@]}"} "$@"
