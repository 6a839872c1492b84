"""Answers of LLaDA and LLaDA-MoE to prompts, and texts filled in: `python -m memdlm.sample`, which explains itself.

    python examples/llada/sample.py --model_name_or_path GSAI-ML/LLaDA-8B-Instruct --block_size 32 \
        --prompt "def add(a, b):" --max_new_tokens 64
"""

from dllm.utils.parsing import one_line_errors
from memdlm.sample import main

if __name__ == "__main__":
    with one_line_errors():
        main()
