"""Fine-tune LLaDA2.1 (or LLaDA2.0) on instructions, with token editing, with or without Parametric Memory.

    accelerate launch --config_file scripts/accelerate_configs/cpu.yaml examples/llada21/sft.py \
        --training_objective bd3lm --model_name_or_path runs/tiny2 --dataset_args "builtin:docstrings[train,test:50]" \
        --max_length 512 --output_dir runs/first --use_cpu True

`--training_objective mdlm` (the default, as published for MemDLM) denoises the whole sequence under full attention,
`bd3lm` each block given the clean blocks before it, as the model decodes. `--help` lists the flags of the objective
that is named beside it; the memory's have the prefix `mem_`. `--edit_ratio 0` leaves editing out. The run ends with the
model in OUTPUT_DIR/checkpoint-final and, if the data has a test split, with OUTPUT_DIR/eval_results.json.
"""

from dataclasses import dataclass, field
from typing import Any

from dllm import utils
from dllm.core.editing import EditSettings
from memdlm import MemBD3LMTrainer, MemDLMTrainer
from memdlm.fine_tune import run_script


def _edit_ratio() -> Any:
    return field(default=0.1, metadata=EditSettings.__dataclass_fields__["edit_ratio"].metadata)


@dataclass
class MDLMArguments(MemDLMTrainer.MemDLMConfig):
    edit_ratio: float = _edit_ratio()  # LLaDA2.1 edits, and should go on doing so


@dataclass
class BD3LMArguments(MemBD3LMTrainer.MemDLMConfig):
    edit_ratio: float = _edit_ratio()


OBJECTIVES = {"mdlm": (MemDLMTrainer, MDLMArguments), "bd3lm": (MemBD3LMTrainer, BD3LMArguments)}


def main() -> None:
    run_script(OBJECTIVES, "mdlm", model="inclusionAI/LLaDA2.1-mini", data="Yukang/LongAlpaca-12k")


if __name__ == "__main__":
    with utils.one_line_errors():
        main()
