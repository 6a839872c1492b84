#!/usr/bin/env bash
# Relay on Fast-dLLM v2 as published: K = 2 forwards per step over the model's own rollouts, threshold 0.85 in blocks of 32 (the
# defaults of sft.py). First: bash examples/fast_dllm_v2/data_process.sh
#   NUM_GPU=2 bash examples/fast_dllm_v2/run_relay.sh [any flag of sft.py; it wins over the ones below]
# What it is compared with, on the same rows: --relay_arm relay_sg, rollout, or mask_uniform --complementary_masks True (plain fine-tuning).
# The published checkpoints are those of step 200 of this schedule of 3 epochs. NUM_GPU=0 runs on the CPU. MODEL and DATASET name another
# model and data set.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

gpus="${NUM_GPU:-1}"
launch=(--quiet --num_processes "$((gpus > 1 ? gpus : 1))" --num_machines 1 --mixed_precision no --dynamo_backend no)
device=(--bf16 True)
((gpus > 1)) && launch+=(--multi_gpu)
((gpus == 0)) && launch+=(--cpu) && device=(--use_cpu True)

exec accelerate launch "${launch[@]}" examples/fast_dllm_v2/sft.py \
    --training_objective relay \
    --relay_arm relay \
    --model_name_or_path "${MODEL:-Efficient-Large-Model/Fast_dLLM_v2_1.5B}" \
    --dataset_args "${DATASET:-data/mix/c40m60}" \
    --max_length 2048 \
    --truncation left \
    --train_on_fill False \
    --dtype float32 \
    --num_train_epochs 3 \
    --learning_rate 5e-6 \
    --lr_scheduler_type cosine \
    --warmup_steps 0.03 \
    --max_grad_norm 1.0 \
    --weight_decay 0 \
    --per_device_train_batch_size 2 \
    --gradient_accumulation_steps 16 \
    --gradient_checkpointing True \
    --save_steps 200 \
    --output_dir "${OUTPUT_DIR:-runs/fast-dllm-v2-relay}" \
    "${device[@]}" "$@"
