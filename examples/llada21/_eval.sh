# Sourced by eval_run.sh, eval_ruler.sh and their twins under mem/, which only choose defaults. See ../_eval.sh.

adapter=llada21
source "$(dirname "${BASH_SOURCE[0]}")/../_eval.sh"

# In the mode that the model card recommends, with token editing. For LLaDA2.0, which does not edit: preset=None.
decoding=(--steps 32 --block_size 32 --extra_model_args preset=quality)
babilong=(
    --tasks babilong_longctx
    --metadata '{"max_seq_lengths": "1k"}'
    --max_length 4096 --max_new_tokens 16
    "${decoding[@]}"
)
# Answers as long as each task asks for.
ruler=(
    --tasks niah_multivalue,ruler_vt,ruler_cwe
    --metadata '{"max_seq_lengths": [4096, 8192]}'
    --max_length 8192
    "${decoding[@]}"
)
