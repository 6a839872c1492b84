#!/usr/bin/env bash
# Plain fine-tuning of Fast-dLLM v2 as published: every response token masked once per step, in one of two copies of its row.
#   NUM_GPU=2 bash examples/fast_dllm_v2/run_local.sh [any flag of sft.py; it wins over the ones below]
# NUM_GPU=0 runs on the CPU. MODEL and DATASET name another model and data set, such as one made by dllm.tools.convert_ar.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

gpus="${NUM_GPU:-1}"
launch=(--quiet --num_processes "$((gpus > 1 ? gpus : 1))" --num_machines 1 --mixed_precision no --dynamo_backend no)
device=(--bf16 True)
((gpus > 1)) && launch+=(--multi_gpu)
((gpus == 0)) && launch+=(--cpu) && device=(--use_cpu True)

exec accelerate launch "${launch[@]}" examples/fast_dllm_v2/sft.py \
    --training_objective bd3lm \
    --model_name_or_path "${MODEL:-Efficient-Large-Model/Fast_dLLM_v2_1.5B}" \
    --dataset_args "${DATASET:-tatsu-lab/alpaca}" \
    --max_length 2048 \
    --truncation left \
    --train_on_fill False \
    --dtype float32 \
    --num_train_epochs 3 \
    --learning_rate 5e-6 \
    --lr_scheduler_type cosine \
    --warmup_steps 0.03 \
    --per_device_train_batch_size 2 \
    --gradient_accumulation_steps 16 \
    --gradient_checkpointing True \
    --save_only_model True \
    --output_dir "${OUTPUT_DIR:-runs/fast-dllm-v2-sft}" \
    "${device[@]}" "$@"
