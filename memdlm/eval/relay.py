"""lm-eval adapters of models with a relay, with or without memory: `relay` for those that decode block by block,
`relay_llada` for the others.

python -m memdlm.eval.relay --tasks memdlm_babilong --model_args pretrained=FOLDER,preset=relay --device cpu
python -m memdlm.eval.relay --model relay_llada --tasks ... --model_args pretrained=FOLDER,threshold=0.85
accelerate launch memdlm/eval/relay.py --tasks ... --model_args ...
"""

import sys

from lm_eval.api.registry import register_model

from dllm.core.eval.launch import launch
from memdlm.eval.harness import RelayBlockHarness, RelayMDLMHarness


@register_model("relay")
class RelayAdapter(RelayBlockHarness):
    """What the adapter `llada21` evaluates (Fast-dLLM v2, LLaDA2), with its relay unless `relay=False`;
    `relay_zeroed=True` is the control without what it carries, `preset=relay` the published decoding."""


@register_model("relay_llada")
class RelayLLaDAAdapter(RelayMDLMHarness):
    """What the adapter `llada` evaluates (LLaDA, LLaDA-MoE), with its relay likewise."""


if __name__ == "__main__":
    sys.exit(launch("relay"))
