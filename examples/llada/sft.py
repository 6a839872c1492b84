"""Fine-tune LLaDA or LLaDA-MoE on instructions: masked diffusion, or Relay; each with or without Parametric Memory.

    accelerate launch --config_file scripts/accelerate_configs/cpu.yaml examples/llada/sft.py \
        --model_name_or_path runs/tiny --dataset_args "builtin:docstrings?context=300[train:500,test:50]" \
        --max_length 512 --output_dir runs/first --use_cpu True --mem_enabled True

`--training_objective mdlm` (the default) denoises random masks. `relay` goes through the states of decoding and carries
the hidden state along; `--relay_arm` names what it is compared with. `--help` lists the flags of the objective that is
named beside it: the memory's are the fields of memdlm.MemoryConfig with the prefix `mem_`, the relay's those of
memdlm.relay.RelayConfig with `relay_`. The run ends with the model in OUTPUT_DIR/checkpoint-final and, if the data has
a test split, with OUTPUT_DIR/eval_results.json.
"""

from dllm import utils
from memdlm import MemDLMTrainer, relay
from memdlm.fine_tune import run_script

OBJECTIVES = {
    "mdlm": (MemDLMTrainer, MemDLMTrainer.MemDLMConfig),
    "relay": (relay.MemRelayTrainer, relay.MemRelayConfig),
}


def main() -> None:
    run_script(OBJECTIVES, "mdlm", model="inclusionAI/LLaDA-MoE-7B-A1B-Base", data="Yukang/LongAlpaca-12k")


if __name__ == "__main__":
    with utils.one_line_errors():
        main()
