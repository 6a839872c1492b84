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

import functools
import sys
from dataclasses import dataclass, field

from dllm import utils
from dllm.core.trainers.fine_tune import find_choice, fine_tune
from memdlm import MemDLMTrainer, relay

OBJECTIVES = {
    "mdlm": (MemDLMTrainer, MemDLMTrainer.MemDLMConfig),
    "relay": (relay.MemRelayTrainer, relay.MemRelayConfig),
}


@dataclass
class ModelArguments(utils.ModelArguments):
    model_name_or_path: str = field(
        default="inclusionAI/LLaDA-MoE-7B-A1B-Base",
        metadata=utils.ModelArguments.__dataclass_fields__["model_name_or_path"].metadata,
    )


@dataclass
class DataArguments(utils.DataArguments):
    dataset_args: str = field(
        default="Yukang/LongAlpaca-12k",
        metadata=utils.DataArguments.__dataclass_fields__["dataset_args"].metadata,
    )


@dataclass
class ObjectiveArguments:
    training_objective: str = field(default="mdlm", metadata={"help": f"Objective, one of {', '.join(OBJECTIVES)}."})


def main() -> None:
    trainer_class, config = find_choice(
        sys.argv[1:], "training_objective", OBJECTIVES, ObjectiveArguments.training_objective
    )
    model_args, data_args, training_args, _ = utils.parse_args(
        ModelArguments, DataArguments, config, ObjectiveArguments
    )
    load_model = utils.get_model
    if issubclass(trainer_class, relay.RelayTrainer):
        load_model = functools.partial(relay.load_model, relay=training_args.relay())
    fine_tune(trainer_class, model_args, data_args, training_args, load_model)


if __name__ == "__main__":
    with utils.one_line_errors():
        main()
