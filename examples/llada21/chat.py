"""Chat with LLaDA2.0 and LLaDA2.1 in the terminal: `python -m memdlm.chat`, which explains itself.

python examples/llada21/chat.py --model_name_or_path inclusionAI/LLaDA2.1-mini --preset quality
"""

from dllm.utils.parsing import one_line_errors
from memdlm.chat import main

if __name__ == "__main__":
    with one_line_errors():
        main()
