"""lm-eval adapter of LLaDA2.0 and LLaDA2.1, with or without memory.

python -m memdlm.eval.llada21 --tasks memdlm_babilong --model_args pretrained=FOLDER,preset=quality --device cpu
accelerate launch memdlm/eval/llada21.py --tasks ... --model_args ...
"""

import sys

from lm_eval.api.registry import register_model

from dllm.core.eval.launch import launch
from memdlm.eval.harness import MemoryBlockHarness


@register_model("llada21")
class LLaDA21Harness(MemoryBlockHarness):
    """Any block-causal family, and with `block_size` given any family trained by block diffusion, decoded by
    `BlockSampler`; `mem_enabled=True` writes a memory per prompt (docs/evaluation.md lists the model arguments)."""


if __name__ == "__main__":
    sys.exit(launch("llada21"))
