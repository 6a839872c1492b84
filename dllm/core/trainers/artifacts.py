"""What lies beside the weights of a saved model: how it was trained, and a model card. Text only, no pickle."""

from __future__ import annotations

import json
import os
import pathlib
from typing import Any

import transformers
from huggingface_hub import ModelCardData
from peft import PeftModel
from transformers import PreTrainedModel

from dllm.models.checkpoint import find_file
from dllm.models.quant import quantised_share
from dllm.models.spec import spec_of
from dllm.utils.parsing import InputError

RECORD_FILE = "training_args.json"
CARD_FILE = "README.md"
_PICKLE = "training_args.bin"  # what Trainer writes
_NO_METRIC = ("_runtime", "_per_second")  # endings of what an evaluation logs about itself
_SHOWN = ("learning_rate", "lr_scheduler_type", "seed")

_CARD = """---
{metadata}
---

# {name}

{description} It was trained with {trainer} of memdlm (family {family}) for {steps} steps. It fills masked positions;
it does not generate from left to right.

## Use

```python
from dllm.utils import get_model, get_tokenizer

model = get_model(model_name_or_path="{name}")  # the folder, or its name on the Hub
tokenizer = get_tokenizer(model_name_or_path="{name}", model=model)
```

## Evaluation

{metrics}

## Training

{settings}

All settings are in {record}.
"""


class KeepConfig(transformers.TrainerCallback):
    """Takes back what Trainer writes into a model's configuration, so that a saved config.json is that of the base:
    `use_cache`, which no family reads, and ids of tokens that the tokenizer names and the configuration does not.

    Args:
        config: of the unwrapped model, as it was loaded.
    """

    FIELDS = ("use_cache", "bos_token_id", "eos_token_id", "pad_token_id")

    def __init__(self, config: transformers.PreTrainedConfig) -> None:
        self.config = config
        self.stored = {name: value for name, value in vars(config).items() if name in self.FIELDS}

    def restore(self) -> None:
        """Sets the fields to what they were."""
        for name in self.FIELDS:
            vars(self.config).pop(name, None)
        vars(self.config).update(self.stored)

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        """Trainer has just matched the tokens."""
        self.restore()


def save_record(folder: str | os.PathLike[str], trainer: transformers.Trainer, lm: PreTrainedModel) -> None:
    """Writes training_args.json, in place of the pickle of the same settings that Trainer has just written.

    Args:
        folder: of a model that was saved.
        trainer: whose settings; tokens are left out.
        lm: the unwrapped model.
    """
    record = {
        "trainer": type(trainer).__name__,
        "base_model": lm.name_or_path,
        "base_in_4bit": quantised_share(lm)[0] > 0,
        "arguments": trainer.args.to_dict(),
    }
    (pathlib.Path(folder) / RECORD_FILE).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    (pathlib.Path(folder) / _PICKLE).unlink(missing_ok=True)


def trained_over_4bit(name_or_path: str) -> bool | None:
    """Whether the base of a saved adapter was in 4-bit while it was trained; None: no record says so.

    Raises:
        InputError: the record is damaged.
    """
    path = find_file(name_or_path, RECORD_FILE)
    if path is None:
        return None
    try:
        return bool(json.loads(path.read_bytes())["base_in_4bit"])
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is damaged ({error}): fetch or copy it again, or delete it") from error


def save_model_card(
    folder: str | os.PathLike[str],
    trainer: transformers.Trainer,
    lm: PreTrainedModel,
    *,
    model_name: str | None = None,
    finetuned_from: str | None = None,
    tags: str | list[str] | None = None,
    **metadata: Any,
) -> None:
    """Writes README.md: what the model is, how to load it, its last evaluation, the main settings.

    Args:
        folder: of a model that was saved.
        trainer: what it was trained with.
        lm: the unwrapped model.
        model_name: its name; None: that of the folder.
        finetuned_from: its base; None: what `lm` was loaded from.
        tags: further tags.
        metadata: license, language, datasets and whatever else a card's head may hold.
    """
    base = finetuned_from or str(lm.name_or_path or "")
    is_adapter = isinstance(trainer.accelerator.unwrap_model(trainer.model), PeftModel)
    # The Hub refuses a card whose base is a folder of somebody's disk.
    on_hub = base if base and not os.path.isabs(base) and not os.path.isdir(base) else None
    family = spec_of(lm).name
    own_tags = ["masked-diffusion", family, *(["lora"] if is_adapter else [])]
    head = ModelCardData(
        library_name="peft" if is_adapter else "transformers",
        base_model=on_hub,
        tags=[*own_tags, *([tags] if isinstance(tags, str) else tags or [])],
        **metadata,
    )
    shown = f"`{on_hub or pathlib.Path(base).name or 'random weights'}`"
    text = _CARD.format(
        metadata=head.to_yaml(),
        name=model_name or pathlib.Path(folder).resolve().name,
        description=f"A PEFT adapter of {shown}." if is_adapter else f"A masked-diffusion model made from {shown}.",
        trainer=type(trainer).__name__,
        family=family,
        steps=trainer.state.global_step,
        metrics=_table(_last_metrics(trainer.state.log_history)) or "None yet.",
        settings=_table(_main_settings(trainer.args)),
        record=RECORD_FILE,
    )
    (pathlib.Path(folder) / CARD_FILE).write_text(text, encoding="utf-8")


def _last_metrics(log_history: list[dict[str, Any]]) -> dict[str, Any]:
    metrics: dict[str, Any] = {}
    for entry in log_history:  # later values win
        found = {name: value for name, value in entry.items() if name.startswith("eval_")}
        metrics.update({name: f"{value:.4g}" for name, value in found.items() if not name.endswith(_NO_METRIC)})
    return metrics


def _main_settings(args: transformers.TrainingArguments) -> dict[str, Any]:
    batch = args.train_batch_size * args.world_size * args.gradient_accumulation_steps
    values = args.to_dict()
    length = "max_steps" if args.max_steps > 0 else "num_train_epochs"
    return {"rows per step": batch, length: values[length], **{name: values[name] for name in _SHOWN}}


def _table(values: dict[str, Any]) -> str:
    rows = [f"| {name} | {value} |" for name, value in values.items()]
    return "\n".join(["| | |", "|---|---|", *rows]) if rows else ""
