"""Fine-tune Fast-dLLM v2 on instructions: plain block diffusion, or Relay; each with or without Parametric Memory.

    python -m dllm.models.tiny --family fast_dllm_v2 --output runs/tiny-fast
    accelerate launch --config_file scripts/accelerate_configs/cpu.yaml examples/fast_dllm_v2/sft.py \
        --model_name_or_path runs/tiny-fast --dataset_args "builtin:docstrings[train,test:50]" --max_length 512 \
        --output_dir runs/first --use_cpu True

`--training_objective bd3lm` (the default) denoises each block given the clean blocks before it; with uniform weights
and complementary masks, as published; memory and editing go without the latter. `relay` goes through the states of
decoding and carries the hidden state along; `--relay_arm` names what it is compared with. `--help` lists the flags of
the objective that is named beside it: the memory's have the prefix `mem_`, the relay's `relay_`. The run ends with the
model in OUTPUT_DIR/checkpoint-final and, if the data has a test split, with OUTPUT_DIR/eval_results.json.
"""

from dataclasses import dataclass, field

from dllm import utils
from dllm.core.losses import WeightType
from dllm.core.trainers import BD3LMConfig, MDLMConfig
from memdlm import MemBD3LMTrainer, relay
from memdlm.fine_tune import run_script


@dataclass
class BD3LMArguments(MemBD3LMTrainer.MemDLMConfig):
    loss_weight_type: WeightType = field(
        default="uniform", metadata=MDLMConfig.__dataclass_fields__["loss_weight_type"].metadata
    )
    complementary_masks: bool | None = field(
        default=None,
        metadata={
            "help": f"{BD3LMConfig.__dataclass_fields__['complementary_masks'].metadata['help']} None: True, unless "
            "--mem_enabled True, --edit_ratio or --loss_weight_type scheduler excludes it."
        },
    )

    def __post_init__(self) -> None:
        if self.complementary_masks is None:
            is_excluded = self.mem_enabled or self.edit_ratio or self.loss_weight_type != "uniform"
            self.complementary_masks = not is_excluded
        super().__post_init__()


OBJECTIVES = {
    "bd3lm": (MemBD3LMTrainer, BD3LMArguments),
    "relay": (relay.MemRelayBD3LMTrainer, relay.MemRelayBD3LMConfig),
}


def main() -> None:
    run_script(OBJECTIVES, "bd3lm", model="Efficient-Large-Model/Fast_dLLM_v2_1.5B", data="tatsu-lab/alpaca")


if __name__ == "__main__":
    with utils.one_line_errors():
        main()
