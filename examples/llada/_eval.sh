# Sourced by eval_run.sh, eval_ruler.sh, eval_longbench.sh and their twins under mem/, which only choose defaults. See
# ../_eval.sh.

adapter=llada
source "$(dirname "${BASH_SOURCE[0]}")/../_eval.sh"

# The published settings of each benchmark.
babilong=(
    --tasks babilong_longctx
    --metadata '{"max_seq_lengths": "1k"}'
    --max_length 4096 --max_new_tokens 16 --steps 16 --block_size 16
)
# Answers as long as each task asks for, one token per step.
ruler=(
    --tasks niah_multivalue,ruler_vt,ruler_cwe
    --metadata '{"max_seq_lengths": [4096, 8192]}'
    --max_length 8192
)
# The tasks of the paper's table. Their texts are often longer than the model's window, so they are cut on the left;
# decoded greedily, though these tasks ask for sampling at temperature 1.
longbench=(
    --tasks "$(printf 'longbench_%s,' triviaqa passage_retrieval_en passage_retrieval_zh multifieldqa_en multifieldqa_zh \
        2wikimqa dureader multi_news trec samsum lcc)longbench_repobench-p"
    --max_length 8192 --max_new_tokens 256 --steps 128 --block_size 128
    --extra_model_args truncation=left,temperature=0
)
