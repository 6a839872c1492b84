#!/usr/bin/env bash
# Pretraining on plain text (LLaDA's objective), float32 weights under bfloat16 autocast, on the GPUs of this machine.
#   NUM_GPU=8 DATASET=texts.jsonl bash examples/llada/run_pt.sh --from_scratch True [any flag of pt.py; it wins over the ones below]
# NUM_GPU=0 runs on the CPU. MODEL names a folder or Hub model: config.json, tokenizer and, without --from_scratch, weights.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

gpus="${NUM_GPU:-1}"
launch=(--quiet --num_processes "$((gpus > 1 ? gpus : 1))" --num_machines 1 --mixed_precision no --dynamo_backend no)
device=(--bf16 True)
((gpus > 1)) && launch+=(--multi_gpu)
((gpus == 0)) && launch+=(--cpu) && device=(--use_cpu True)

exec accelerate launch "${launch[@]}" examples/llada/pt.py \
    --model_name_or_path "${MODEL:-inclusionAI/LLaDA-MoE-7B-A1B-Base}" \
    --dataset_args "${DATASET:-HuggingFaceFW/fineweb-edu?config=sample-10BT[train]}" \
    --streaming True \
    --max_length 4096 \
    --max_steps 10000 \
    --dtype float32 \
    --learning_rate 4e-4 \
    --weight_decay 0.1 \
    --warmup_steps 2000 \
    --per_device_train_batch_size 2 \
    --gradient_accumulation_steps 8 \
    --gradient_checkpointing True \
    --output_dir "${OUTPUT_DIR:-runs/llada-pt}" \
    "${device[@]}" "$@"
