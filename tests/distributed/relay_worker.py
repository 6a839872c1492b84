"""Trains the scenarios that tests/distributed/test_relay_ddp.py names, all in one process (start-up takes longest).

Started as one of two processes it writes what it saw to RANK.json; the test starts it alone for the run in one process.
"""

import json
import pathlib
import sys
from typing import Any

import torch
import torch.distributed as dist

from dllm.models.auto import load_tokenizer
from dllm.models.backbone import unwrap
from dllm.utils.args import ModelArguments
from memdlm.relay import MemRelayConfig, MemRelayTrainer, RelayBD3LMConfig, RelayBD3LMTrainer, RelayConfig, load_model

TRAINERS: dict[str, Any] = {
    "llada": (MemRelayConfig, MemRelayTrainer),
    "fast_dllm_v2": (RelayBD3LMConfig, RelayBD3LMTrainer),
}


def make_rows(uneven: bool) -> list[dict]:
    """Sixteen rows of 20 tokens, 12 of them to predict; uneven: the second process gets rows with 3."""
    generator = torch.Generator().manual_seed(5)
    ids = [torch.randint(20, 200, (20,), generator=generator).tolist() for _ in range(16)]
    known = [17 if uneven and index % 4 >= 2 else 8 for index in range(16)]
    return [{"input_ids": row, "labels": [-100] * k + row[k:]} for row, k in zip(ids, known, strict=True)]


def train(
    family: str, checkpoint: str, output: str, lora: bool, uneven: bool, settings: dict[str, Any]
) -> dict[str, Any]:
    """What one process saw of a training run."""
    config_class, trainer_class = TRAINERS[family]
    arguments = ModelArguments(checkpoint, lora=lora, lora_dropout=0.0 if lora else 0.05)
    trainer = trainer_class(
        model=load_model(arguments, RelayConfig(gate="default"), dtype="float32"),
        args=config_class(output_dir=output, use_cpu=True, disable_tqdm=True, save_strategy="no", **settings),
        processing_class=load_tokenizer(checkpoint),
        train_dataset=make_rows(uneven),
    )
    trainer.train()
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    norm = trainer.channel.norm
    return {
        "world_size": trainer.accelerator.num_processes,
        "losses": [entry["loss"] for entry in history],
        "grad_norms": [entry["grad_norm"] for entry in history],
        "shares": [entry["relay_gradient_share"] for entry in history],
        "taken": trainer.buffer.num_refilled,
        "examples": trainer.buffer.rows.example_id.tolist(),
        "relay": [norm.weight.tolist(), norm.bias.tolist()],
        "weights": {name: float(p.sum()) for name, p in unwrap(trainer.model).named_parameters() if p.requires_grad},
    }


def main() -> None:
    output, scenarios = pathlib.Path(sys.argv[1]), json.loads(pathlib.Path(sys.argv[2]).read_text())
    seen = {name: train(output=str(output / name), **scenario) for name, scenario in scenarios.items()}
    rank = dist.get_rank() if dist.is_initialized() else 0
    (output / f"{rank}.json").write_text(json.dumps(seen))
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
