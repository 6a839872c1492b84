"""Answers of LLaDA2.0 and LLaDA2.1 to prompts, and texts filled in: `python -m memdlm.sample`, which explains itself.

    python examples/llada21/sample.py --model_name_or_path inclusionAI/LLaDA2.1-mini --preset quality \
        --prompt "def add(a, b):" --max_new_tokens 64
"""

from dllm.utils.parsing import one_line_errors
from memdlm.sample import main

if __name__ == "__main__":
    with one_line_errors():
        main()
