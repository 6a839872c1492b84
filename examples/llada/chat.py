"""Chat with LLaDA and LLaDA-MoE in the terminal: `python -m memdlm.chat`, which explains itself.

python examples/llada/chat.py --model_name_or_path GSAI-ML/LLaDA-8B-Instruct --block_size 32
"""

from dllm.utils.parsing import one_line_errors
from memdlm.chat import main

if __name__ == "__main__":
    with one_line_errors():
        main()
