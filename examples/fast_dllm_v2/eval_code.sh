#!/usr/bin/env bash
# Greedy pass@1 and forwards per problem on HumanEval and MBPP, at the published settings of Relay. Any flag of memdlm.eval.coding wins.
#   bash examples/fast_dllm_v2/eval_code.sh humaneval --data HumanEval.jsonl.gz --allow_code_execution True
#   HUMANEVAL_OVERRIDE_PATH=HumanEvalPlus.jsonl bash examples/fast_dllm_v2/eval_code.sh humaneval      # judged by evalplus
# Generated programs run only with --allow_code_execution True: read docs/code_evaluation.md first. MODEL names another model.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

task="${1:-}"
if [[ "$task" != humaneval && "$task" != mbpp ]]; then
    echo "${BASH_SOURCE[0]}: the first word is the task, humaneval or mbpp; flags of memdlm.eval.coding follow" >&2
    exit 2
fi
shift

exec python -m memdlm.eval.coding \
    --task "$task" \
    --model_name_or_path "${MODEL:-Efficient-Large-Model/Fast_dLLM_v2_1.5B}" \
    --output "${OUTPUT:-runs/eval/code/$task.json}" \
    --block_size 32 \
    --sub_block_size 8 \
    --threshold 0.85 \
    --max_new_tokens 2048 \
    --batch_size 32 \
    "$@"
