"""One process of tests/distributed/test_ddp.py: trains a few steps and writes what it saw to RANK.json and RANK.pt."""

import json
import pathlib
import sys

import torch
import torch.distributed as dist

from dllm.models.auto import load_model, load_tokenizer
from memdlm import MemDLMConfig, MemDLMTrainer


def main() -> None:
    checkpoint, output, settings = sys.argv[1], pathlib.Path(sys.argv[2]), json.loads(sys.argv[3])
    num_eval_rows = settings.pop("num_eval_rows", 12)
    args = MemDLMConfig(output_dir=str(output), use_cpu=True, disable_tqdm=True, save_strategy="no", **settings)
    generator = torch.Generator().manual_seed(5)
    rows = []
    for index in range(12):
        ids = torch.randint(20, 200, (20,), generator=generator).tolist()
        rows.append({"input_ids": ids, "labels": [-100] * 8 + ids[8:], "example_id": index})
    trainer = MemDLMTrainer(
        model=load_model(checkpoint, dtype="float32"),
        args=args,
        processing_class=load_tokenizer(checkpoint),
        train_dataset=rows,
        eval_dataset=rows[:num_eval_rows],
    )
    written = []
    if trainer.memory is not None:
        fast = trainer.memory.fast
        original = fast.set

        def remember(flat):
            if flat is not None and not flat.requires_grad:
                written.append(flat.clone())
            original(flat)

        fast.set = remember
    trainer.train()
    metrics = trainer.evaluate()
    seen = {
        "world_size": args.world_size,
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "weights": {name: value.double().sum().item() for name, value in trainer.lm.state_dict().items()},
        "written": [flat.double().sum().item() for flat in written],
        "mem_change": [entry["mem_change"] for entry in trainer.state.log_history if "mem_change" in entry],
        "metrics": {name: value for name, value in metrics.items() if name.startswith("eval_")},
        "eval_nll": metrics["eval_nll"],
    }
    rank = dist.get_rank() if dist.is_initialized() else 0
    torch.save(written, output / f"{rank}.pt")  # every phi_K, flat float32
    (output / f"{rank}.json").write_text(json.dumps(seen))
    if dist.is_initialized():
        # Leaving without this aborts at random.
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
