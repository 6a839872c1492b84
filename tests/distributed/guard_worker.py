"""One process of tests/distributed/test_guard_ddp.py: the loss of one rank is not a number in one step."""

import json
import pathlib
import sys

import torch
import torch.distributed as dist

from dllm.core.trainers import MDLMConfig, MDLMTrainer
from dllm.core.trainers.guard import NonFiniteLoss
from dllm.core.trainers.meters import BatchCounts
from dllm.models.auto import load_model, load_tokenizer

BAD_RANK, BAD_CALL = 1, 4  # of two micro-batches per step: the second one of step 2


class Spoiled(MDLMTrainer):
    """The loss of one micro-batch of one rank is not a number."""

    num_calls = 0

    def compute_loss(self, *args, **kwargs):
        loss = super().compute_loss(*args, **kwargs)
        self.num_calls += 1
        return loss * torch.nan if (dist.get_rank(), self.num_calls) == (BAD_RANK, BAD_CALL) else loss


def main() -> None:
    checkpoint, output = sys.argv[1], pathlib.Path(sys.argv[2])
    args = MDLMConfig(
        output_dir=str(output / "run"),
        use_cpu=True,
        disable_tqdm=True,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=2,
        max_steps=3,
        save_steps=1,
        logging_steps=1,
        learning_rate=0.01,
        warmup_steps=0,
    )
    rows = [
        {"input_ids": list(range(20, 30 + i)), "labels": list(range(20, 30 + i)), "example_id": i} for i in range(12)
    ]
    tokens, read = [], BatchCounts.read

    def remember(self, gather):
        counts = read(self, gather)
        tokens.append(counts["num_tokens"])
        return counts

    BatchCounts.read = remember
    trainer = Spoiled(
        model=load_model(checkpoint, dtype="float32"),
        args=args,
        processing_class=load_tokenizer(checkpoint),
        train_dataset=rows,
    )
    try:
        trainer.train()
        message = ""
    except NonFiniteLoss as error:
        message = str(error)
    seen = {
        "world_size": args.world_size,
        "message": message,
        "num_calls": trainer.num_calls,
        "tokens": tokens,
        "finite": all(bool(weight.isfinite().all()) for weight in trainer.lm.parameters()),
    }
    (output / f"{dist.get_rank()}.json").write_text(json.dumps(seen))
    # Leaving without this aborts at random.
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
