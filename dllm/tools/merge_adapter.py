"""Write a PEFT adapter into the weights of its base: a checkpoint that needs neither PEFT nor the base.

    python -m dllm.tools.merge_adapter --adapter_model_name_or_path runs/first/checkpoint-final --output_dir runs/merged

The base is loaded in full precision, whatever the adapter was trained over. The merged checkpoint is read back, and its
logits on a probe batch must be those of base + adapter; only then does the folder appear under its name.
"""

from __future__ import annotations

import pathlib
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dllm.core.modes import evaluating
from dllm.core.noising import make_generator
from dllm.core.trainers.artifacts import trained_over_4bit
from dllm.models.auto import DTYPES, load_model, load_tokenizer
from dllm.models.backbone import unwrap
from dllm.models.checkpoint import one_line
from dllm.models.lora import is_adapter
from dllm.utils.args import ModelArguments, resolve_with_base_env
from dllm.utils.folders import new_folder
from dllm.utils.logging import get_default_logger
from dllm.utils.parsing import InputError, one_line_errors, parse_args
from dllm.utils.tokens import token_id

logger = get_default_logger("dllm.tools.merge_adapter")

# Largest norm of the difference over the norm of the logits. Merged weights are rounded once to their type, by 2^-24,
# 2^-11 and 2^-8 of their size at most, and an expert that wins by less than that may lose.
TOLERANCES = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
PROBE_ROWS, PROBE_LENGTH = 4, 32


@dataclass
class MergeArguments:
    """What to merge, to where."""

    adapter_model_name_or_path: str = field(metadata={"help": "PEFT adapter: a folder or a Hub name."})
    output_dir: str = field(metadata={"help": "New folder for the merged checkpoint; must be empty or absent."})
    base_model_name_or_path: str | None = field(
        default=None, metadata=dict(ModelArguments.__dataclass_fields__["base_model_name_or_path"].metadata)
    )
    dtype: str = field(default="auto", metadata={"help": "Type of the merged weights: auto (as in the base), ..."})

    def __post_init__(self) -> None:
        if self.dtype != "auto" and self.dtype not in DTYPES:
            raise InputError(f"--dtype {self.dtype} is unknown; allowed: auto, {', '.join(DTYPES)}")


@dataclass(frozen=True)
class Comparison:
    """How far the merged model is from base + adapter, on the probe batch; norms are relative to the logits' own.

    largest: largest difference of one logit.
    relative: norm of the difference.
    effect: norm of what the adapter changes.
    """

    largest: float
    relative: float
    effect: float


def merge_adapter(args: MergeArguments) -> Comparison:
    """Merges, checks, saves, and returns what the check found.

    Raises:
        InputError: the folder is taken or cannot be made; no adapter, or one of another base or of a kind that cannot
            be merged; the merged model computes something else.
    """
    adapter = resolve_with_base_env(args.adapter_model_name_or_path, "BASE_MODELS_DIR")
    if not is_adapter(adapter):
        raise InputError(f"{adapter} is no PEFT adapter (adapter_config.json and no config.json): nothing to merge")
    with new_folder(pathlib.Path(args.output_dir), "--output_dir") as folder:
        base, comparison = _merge(adapter, args, folder)
    logger.info(
        f"{args.output_dir}: {base} with {adapter} merged into it; on {PROBE_ROWS} x {PROBE_LENGTH} tokens its logits "
        f"differ from base + adapter by at most {comparison.largest:.2e}, {comparison.relative:.1e} of their norm (the "
        f"adapter changes {comparison.effect:.1e})"
    )
    return comparison


def _merge(adapter: str, args: MergeArguments, folder: pathlib.Path) -> tuple[str, Comparison]:
    """Fills `folder`: (base, what the check found)."""
    model = load_model(adapter, base_model_name_or_path=args.base_model_name_or_path, dtype=args.dtype)
    assert isinstance(model, PeftModel)
    tokenizer = load_tokenizer(adapter, base_model_name_or_path=args.base_model_name_or_path, model=model)
    base, dtype = str(unwrap(model).name_or_path), unwrap(model).dtype
    _warn_of_4bit(adapter, base)
    probe = _probe_batch(tokenizer)
    expected = _outputs(model, probe)
    with model.disable_adapter():
        before = _outputs(model, probe)
    merged = _merged(model, adapter)
    merged.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    del model, merged  # two models at once might not fit
    found = _outputs(load_model(str(folder)), probe)
    comparison = _compare(found, expected, before)
    if not comparison.relative <= TOLERANCES[dtype]:  # also where it is not a number
        raise InputError(
            f"merged into {base}, {adapter} computes something else: logits differ by {comparison.relative:.1e} of "
            f"their norm, more than {TOLERANCES[dtype]:.0e}; nothing was written: try --dtype float32, or load base "
            "and adapter together"
        )
    return base, comparison


def _merged(model: PeftModel, adapter: str) -> PreTrainedModel:
    _untie_adapted(model, adapter)
    try:
        merged = model.merge_and_unload(safe_merge=True)  # pyright: ignore[reportCallIssue] (forwarded to the tuner)
    except (ValueError, NotImplementedError) as error:
        raise InputError(f"{adapter} cannot be merged: {one_line(error)}") from error
    assert isinstance(merged, PreTrainedModel)
    return merged


def _untie_adapted(model: PeftModel, adapter: str) -> None:
    """Gives embedding and head a weight each where they share one and the adapter changes one of them: merged into the
    shared weight, the change would reach both.

    Raises:
        InputError: the family has no place for a second weight.
    """
    lm = unwrap(model)
    embedding, head = lm.get_input_embeddings(), lm.get_output_embeddings()
    wrappers = (BaseTunerLayer, AuxiliaryTrainingWrapper)
    if not lm.config.tie_word_embeddings or not any(isinstance(table, wrappers) for table in (embedding, head)):
        return
    if head is None:
        raise InputError(
            f"{adapter} changes an embedding that is the head too, and cannot be merged: load base and adapter together"
        )
    if not isinstance(head, AuxiliaryTrainingWrapper):  # whose head is trained whole, and a copy already
        inner: Any = head.get_base_layer() if isinstance(head, BaseTunerLayer) else head
        inner.weight = nn.Parameter(inner.weight.detach().clone())
    lm.config.tie_word_embeddings = False


def _warn_of_4bit(adapter: str, base: str) -> None:
    over_4bit = trained_over_4bit(adapter)
    if over_4bit is False:
        return
    condition = "the adapter was trained" if over_4bit else "if the adapter was trained"
    logger.warning(
        f"{condition} over a 4-bit base, whose rounding it has learned to live with: merged into the full-precision "
        f"{base} its logits differ from those that training saw; evaluate the merged model itself"
    )


def _probe_batch(tokenizer: PreTrainedTokenizerBase) -> torch.Tensor:
    """Token ids [B, L] with every fourth position masked; the same at every call."""
    ids = torch.randint(0, len(tokenizer), (PROBE_ROWS, PROBE_LENGTH), generator=make_generator("merge"))
    ids[:, ::4] = token_id(tokenizer, "mask_token")
    return ids


@torch.no_grad()
def _outputs(model: PreTrainedModel | PeftModel, probe: torch.Tensor) -> list[torch.Tensor]:
    """Logits in float32, and of a relay, which they do not depend on, what its norm makes of given states."""
    lm = unwrap(model)
    with evaluating(model):
        outputs = [model(input_ids=probe).logits.float()]
        norm = lm.backbone.relay_layer_norm
        if isinstance(norm, nn.Module):
            states = torch.randn(PROBE_LENGTH, lm.config.hidden_size, generator=make_generator("relay"))
            outputs.append(norm(states.to(lm.dtype)).float())
    return outputs


def _compare(found: list[torch.Tensor], expected: list[torch.Tensor], before: list[torch.Tensor]) -> Comparison:
    pairs = list(zip(found, expected, strict=True))
    return Comparison(
        largest=max(float((a - b).abs().max()) for a, b in pairs),
        relative=max(float((a - b).norm() / b.norm()) for a, b in pairs),
        effect=float((before[0] - expected[0]).norm() / expected[0].norm()),
    )


def main() -> None:
    """The command line."""
    (args,) = parse_args(MergeArguments)
    with one_line_errors():
        merge_adapter(args)


if __name__ == "__main__":
    main()
