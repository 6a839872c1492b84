"""What the benchmarks share: a model of random weights whose sizes are flags, and what is said about the machine."""

import json
import pathlib
import statistics
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import torch
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from dllm import utils
from dllm.models import ModelSpec, get_spec
from dllm.models.auto import DTYPES
from dllm.models.layers import set_dropout

# Sizes that only one family has, with their defaults.
FAMILY_SIZES = {
    "llada_moe": {"num_experts": 8, "num_experts_per_tok": 2, "expert_intermediate_size": 256},
    "llada": {"mlp_hidden_size": 768},
    "fast_dllm_v2": {"mlp_hidden_size": 768},
    "llada2": {"num_experts": 8, "num_experts_per_tok": 2, "expert_intermediate_size": 256, "mlp_hidden_size": 768},
}
# What the flags are called in each family's configuration, where it is another name; "llada2" is short for llada2_moe.
SPEC_NAMES = {"llada2": "llada2_moe"}
OWN_NAMES = {
    "llada2": {"expert_intermediate_size": "moe_intermediate_size", "mlp_hidden_size": "intermediate_size"},
    "fast_dllm_v2": {"mlp_hidden_size": "intermediate_size"},
}


def option(default: Any, help: str) -> Any:
    """A dataclass field that is a flag."""
    return field(default=default, metadata={"help": help})


@dataclass
class ModelOptions:
    """The model and the measurement."""

    family: Literal["llada_moe", "llada", "llada2", "fast_dllm_v2"] = option("llada_moe", "Family of the model.")
    hidden_size: int = option(256, "Width of the hidden states, a multiple of 2 * num_heads.")
    num_layers: int = option(16, "Number of layers, at least 1.")
    num_heads: int = option(8, "Attention heads, at least 1.")
    num_experts: int | None = option(None, "Experts of a layer, at least 1. None: 8 (MoE families).")
    num_experts_per_tok: int | None = option(None, "Experts of a token, at least 1. None: 2 (MoE families).")
    expert_intermediate_size: int | None = option(None, "Width of an expert, at least 1. None: 256 (MoE families).")
    mlp_hidden_size: int | None = option(
        None, "Width of the dense feed-forward part, at least 1. None: 768 (llada, llada2, fast_dllm_v2)."
    )
    vocab_size: int = option(32000, "Tokens, special ones included, at least 16.")
    device: Literal["cpu", "cuda"] = option("cpu", "Where to run.")
    dtype: Literal["float32", "bfloat16"] = option("float32", "Type of the weights.")
    threads: int = option(1, "CPU threads, at least 1.")
    rounds: int = option(10, "Timed rounds (each side once), at least 1.")
    warmup_rounds: int = option(2, "Rounds before them that do not count, at least 0.")
    seed: int = option(0, "Seed of weights, tokens and masks, at least 0.")
    json: str | None = option(None, "File for all numbers. None: they are only printed.")

    def __post_init__(self) -> None:
        own_sizes = FAMILY_SIZES[self.family]
        for name in {name for sizes in FAMILY_SIZES.values() for name in sizes}:
            if name in own_sizes and getattr(self, name) is None:
                setattr(self, name, own_sizes[name])
            elif name not in own_sizes and getattr(self, name) is not None:
                raise utils.InputError(f"--{name} has no effect with --family {self.family}: drop it")
        least = {"vocab_size": 16, "prompt_length": 0, "warmup_rounds": 0, "seed": 0}
        for name, value in asdict(self).items():
            if type(value) is int and value < least.get(name, 1):
                raise utils.InputError(f"--{name} must be at least {least.get(name, 1)}, got {value}")
        if self.hidden_size % (2 * self.num_heads):
            raise utils.InputError(f"--hidden_size must be a multiple of {2 * self.num_heads} (2 * num_heads)")
        if self.family == "llada2" and (self.num_experts or 0) % 4:
            raise utils.InputError("--num_experts must be a multiple of 4 with --family llada2 (groups of two)")
        if (self.num_experts_per_tok or 0) > (self.num_experts or 0):
            raise utils.InputError(f"--num_experts_per_tok must be at most --num_experts {self.num_experts}")
        if self.json is not None and not pathlib.Path(self.json).absolute().parent.is_dir():
            raise utils.InputError(f"--json {self.json}: its folder does not exist, make it first")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise utils.InputError("torch finds no CUDA device: use --device cpu")


def spec_of_family(options: ModelOptions) -> ModelSpec:
    """The family."""
    return get_spec(SPEC_NAMES.get(options.family, options.family))


def make_tokenizer(spec: ModelSpec) -> PreTrainedTokenizerFast:
    """The special tokens of the family and nothing else: the rows are made of random ids behind them."""
    core = Tokenizer(models.WordLevel({token: i for i, token in enumerate(spec.special_tokens)}))
    return PreTrainedTokenizerFast(
        tokenizer_object=core, mask_token=spec.mask_token, pad_token=spec.pad_token, eos_token=spec.eos_token
    )


def make_model(options: ModelOptions) -> Any:
    """Random weights, without dropout, on the CPU."""
    spec = spec_of_family(options)
    sizes = {
        "vocab_size": options.vocab_size,
        "hidden_size": options.hidden_size,
        "num_hidden_layers": options.num_layers,
        "num_attention_heads": options.num_heads,
        **{name: getattr(options, name) for name in FAMILY_SIZES[options.family]},
    }
    own_names = {**spec.config_class.attribute_map, **OWN_NAMES.get(options.family, {})}
    if options.family == "llada2":
        sizes |= {"n_group": options.num_experts // 2, "topk_group": 2}
    if options.family in ("llada2", "fast_dllm_v2"):
        sizes["num_key_value_heads"] = options.num_heads
    mask_token_id = list(spec.special_tokens).index(spec.mask_token)
    config = spec.config_class(
        **{own_names.get(name, name): size for name, size in sizes.items()}, mask_token_id=mask_token_id
    )
    torch.manual_seed(options.seed)
    model = spec.model_class(config).to(DTYPES[options.dtype])
    set_dropout(model, 0.0)
    return model


def synchronize(device: torch.device | str) -> None:
    """Waits for the device."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()


def describe_machine(model: torch.nn.Module, device: torch.device | str) -> dict[str, Any]:
    """What ran, and on what."""
    name = "unknown CPU"
    if torch.device(device).type == "cuda":
        name = torch.cuda.get_device_name()
    elif (info := pathlib.Path("/proc/cpuinfo")).is_file():
        names = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if "model name" in line]
        name = names[0] if names else name
    return {
        "machine": name,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "parameters": sum(p.numel() for p in model.parameters()),
    }


def ratio_to(times: list[float], reference: list[float]) -> dict[str, float]:
    """Time over that of the reference: of the medians, and the least and the largest of a round."""
    by_round = [one / other for one, other in zip(times, reference, strict=True)]
    of_medians = statistics.median(times) / statistics.median(reference)
    return {"ratio": of_medians, "smallest": min(by_round), "largest": max(by_round)}


def print_machine(machine: dict[str, Any]) -> None:
    """One line."""
    print(", ".join(f"{name.replace('_', ' ')} {value}" for name, value in machine.items()))


def write_json(path: str | None, results: dict[str, Any]) -> None:
    """All numbers, if a file was asked for."""
    if path is not None:
        pathlib.Path(path).write_text(json.dumps(results, indent=2) + "\n")
