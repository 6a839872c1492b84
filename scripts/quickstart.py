"""The quickstart: a tiny LLaDA-MoE, real text, plain training and training with memory from the same start, one table.

Everything runs through the commands that a user would type; each is printed. Results lie in runs/quickstart/, or in the
folder given.
"""

import json
import pathlib
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass, field

import matplotlib
import torch
from rich.console import Console
from rich.table import Table

from dllm import data, utils
from dllm.core.samplers import MDLMSampler, MDLMSamplerConfig
from memdlm import MemDLMConfig, MemDLMTrainer

matplotlib.use("Agg")
from matplotlib import pyplot as plt

DATASET = "builtin:docstrings?context=300"
MAX_LENGTH = 256  # tokens; longer rows are dropped
SIZES = {"hidden_size": 128, "num_experts": 4, "expert_intermediate_size": 96}
RUNS = {"MDLM": "plain", "MemDLM": "memory"}
console = Console()


@dataclass
class Options:
    """Sizes of the quickstart."""

    steps: int = field(default=300, metadata={"help": "Optimizer steps of each run, at least 10."})
    num_train: int = field(default=2000, metadata={"help": "Training rows, at least 1."})
    num_test: int = field(default=48, metadata={"help": "Held-out rows, at least 1."})
    output_dir: str = field(default="runs/quickstart", metadata={"help": "Folder of the results."})

    def __post_init__(self) -> None:
        if self.steps < 10 or self.num_train < 1 or self.num_test < 1:
            raise utils.InputError("--steps must be at least 10 (one log entry), --num_train and --num_test at least 1")


def run(*words: str) -> None:
    """Runs a command in the foreground, shown first; stops here if it fails."""
    console.print(f"\n[bold]$ {shlex.join(words)}[/bold]", highlight=False, soft_wrap=True)
    finished = subprocess.run([sys.executable, *words[1:]] if words[0] == "python" else list(words))
    if finished.returncode:
        raise SystemExit(f"quickstart stopped: the command above failed with exit code {finished.returncode}")


def prepare(folder: pathlib.Path, num_train: int, num_test: int) -> None:
    """A tiny checkpoint and the tokenised data set."""
    sizes = [word for name, value in SIZES.items() for word in (f"--{name}", str(value))]
    run("python", "-m", "dllm.models.tiny", "--family", "llada_moe", "--output", f"{folder}/base", *sizes)
    run(
        *("python", "-m", "dllm.tools.preprocess_sft_dataset", "--model_name_or_path", f"{folder}/base"),
        *("--dataset_args", f"{DATASET}[train:{num_train},test:{num_test}]", "--output_dir", f"{folder}/data"),
    )


def train(folder: pathlib.Path, name: str, steps: int) -> None:
    """One run of examples/llada/sft.py: same start, data order and masks for both."""
    run(
        *("accelerate", "launch", "--config_file", "scripts/accelerate_configs/cpu.yaml", "examples/llada/sft.py"),
        *("--model_name_or_path", f"{folder}/base", "--dataset_args", f"{folder}/data[train]"),
        *("--load_preprocessed_data", "True", "--max_length", str(MAX_LENGTH)),
        *("--truncation", "filter", "--use_cpu", "True"),
        *("--max_steps", str(steps), "--per_device_train_batch_size", "8", "--learning_rate", "2e-3"),
        *("--logging_steps", "10", "--save_strategy", "no", "--output_dir", f"{folder}/{RUNS[name]}"),
        *("--mem_enabled", str(name == "MemDLM")),
    )


def held_out_losses(folder: pathlib.Path, model, tokenizer, rows) -> dict[str, float]:
    """Loss of held-out rows without memory, and with a memory written from each batch's own labels."""
    args = MemDLMConfig(
        output_dir=str(folder / "eval"), per_device_eval_batch_size=8, use_cpu=True, disable_tqdm=True, mem_enabled=True
    )
    metrics = MemDLMTrainer(model=model, args=args, processing_class=tokenizer, eval_dataset=rows).evaluate()
    return {"loss_without_memory": metrics["eval_loss"], "loss_with_memory": metrics["eval_memory_loss"]}


def fill_in(model, tokenizer, row) -> str:
    """The answer of `row`, masked and filled in one token per step, without memory; special tokens are not proposed."""
    ids = torch.tensor([row["input_ids"]])
    ids[:, row["prompt_len"] :] = tokenizer.mask_token_id
    steps = ids.shape[1] - row["prompt_len"]
    config = MDLMSamplerConfig(steps=steps, suppress_tokens=tuple(tokenizer.all_special_ids))
    filled = MDLMSampler(model.eval(), tokenizer).infill(ids, config).sequences
    return tokenizer.decode(filled[0, row["prompt_len"] :], skip_special_tokens=True)


def training_log(folder: pathlib.Path, name: str) -> list[dict]:
    """The logged training steps of one run."""
    state = json.loads((folder / RUNS[name] / "trainer_state.json").read_text())
    return [entry for entry in state["log_history"] if "loss" in entry]


def draw_losses(folder: pathlib.Path) -> None:
    """A PNG: the loss curves of both runs, and what the memory takes off the loss of a batch."""
    figure, (losses, gap) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    logs = {name: training_log(folder, name) for name in RUNS}
    steps = [entry["step"] for entry in logs["MDLM"]]
    losses.plot(steps, [entry["loss"] for entry in logs["MDLM"]], label="MDLM")
    losses.plot(steps, [entry["loss"] for entry in logs["MemDLM"]], ":", label="MemDLM, memory in place")
    losses.set(xlabel="optimizer step", ylabel="training loss", title="Tiny LLaDA-MoE on builtin:docstrings")
    losses.legend()
    gap.plot(steps, [entry["memory_gap"] for entry in logs["MemDLM"]], "o", markersize=3)
    gap.axhline(0, color="grey", linewidth=0.8)
    gap.set(xlabel="optimizer step", ylabel="loss without memory - loss with it", title="MemDLM: memory gap of a batch")
    figure.savefig(folder / "loss.png", dpi=120)


def report(folder: pathlib.Path, num_test: int) -> list[dict]:
    """Evaluates both models; prints the filled-in answers; gives the table's rows."""
    rows = data.load_sft_dataset(f"{folder}/data[test:{num_test}]", True)
    limits = utils.DataArguments(dataset_args="held-out rows", max_length=MAX_LENGTH, truncation="filter")
    rows = data.post_process_dataset(rows, limits)["test"]
    example = min(rows, key=lambda row: len(row["input_ids"]) - row["prompt_len"])
    table, answers = [], {}
    for name, run_name in RUNS.items():
        path = str(folder / run_name / "checkpoint-final")
        tokenizer = utils.get_tokenizer(model_name_or_path=path)
        model = utils.get_model(model_name_or_path=path)
        log = training_log(folder, name)
        steady = sorted(entry["step_seconds"] for entry in log)[len(log) // 2]
        answers[name] = fill_in(model, tokenizer, example)
        table.append(
            {
                "training": name,
                **held_out_losses(folder, model, tokenizer, rows),
                "seconds_per_step": steady,
                "peak_memory_mib": max(entry["peak_memory_mib"] for entry in log),
            }
        )
    prompt = tokenizer.decode(example["input_ids"][: example["prompt_len"]], skip_special_tokens=True)
    truth = tokenizer.decode(example["input_ids"][example["prompt_len"] :], skip_special_tokens=True)
    console.print(
        f"\n[bold]A held-out question[/bold]\n{prompt}\n[bold]its answer[/bold]: {truth.strip()}", markup=True
    )
    for name, answer in answers.items():
        console.print(f"[bold]filled in by {name}[/bold]: {answer.strip()}")
    return table


def print_table(rows: list[dict]) -> None:
    """The results, one row per training."""
    table = Table("training", title="Held-out rows of builtin:docstrings")
    for heading in ("loss without memory", "loss with memory", "seconds per step", "peak memory, MiB"):
        table.add_column(heading, justify="right")
    for row in rows:
        name, without, with_memory, seconds, memory = row.values()
        table.add_row(name, f"{without:.3f}", f"{with_memory:.3f}", f"{seconds:.3f}", f"{memory:.0f}")
    console.print(table)
    console.print(
        "The memory of a row is written from that row's own labels, so the loss with memory is no evidence of "
        "learning; compare the losses without memory. One seed of a tiny model proves nothing: docs/memory.md."
    )


def main() -> None:
    (options,) = utils.parse_args(Options)
    folder = pathlib.Path(options.output_dir)
    began = time.perf_counter()
    if folder.exists():
        kept = folder.with_name(f"{folder.name}-{time.strftime('%Y%m%d-%H%M%S')}")
        folder.rename(kept)
        console.print(f"the results of the quickstart before this one are kept in {kept}")
    prepare(folder, options.num_train, options.num_test)
    for name in RUNS:
        train(folder, name, options.steps)
    rows = report(folder, options.num_test)
    print_table(rows)
    (folder / "table.json").write_text(json.dumps(rows, indent=2) + "\n")
    draw_losses(folder)
    seconds = time.perf_counter() - began
    console.print(f"{seconds:.0f} s; table.json, loss.png and the checkpoints are in {folder}/")


if __name__ == "__main__":
    main()
