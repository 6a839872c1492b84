"""lm-eval adapter of LLaDA and LLaDA-MoE, with or without memory.

python -m memdlm.eval.llada --tasks memdlm_babilong --model_args pretrained=FOLDER,mem_enabled=True --device cpu
accelerate launch memdlm/eval/llada.py --tasks ... --model_args ...
"""

import sys

from lm_eval.api.registry import register_model

from dllm.core.eval.launch import launch
from memdlm.eval.harness import MemoryMDLMHarness


@register_model("llada")
class LLaDAHarness(MemoryMDLMHarness):
    """Any family with bidirectional attention, decoded by `MDLMSampler`; `mem_enabled=True` writes a memory per prompt
    (docs/evaluation.md lists the model arguments)."""


if __name__ == "__main__":
    sys.exit(launch("llada"))
