"""Written memories that outlive a prompt: kept for reuse (`MemoryStore`), or as a file.

A memory file is one safetensors file: the matrices by name, and under the metadata key `memdlm_memory` a JSON object
with the fields of `MemoryHeader`. Shapes: P numbers in one memory.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import pathlib
import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin, get_type_hints

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedConfig

from dllm.models.checkpoint import one_line, some_of
from dllm.utils.parsing import InputError
from memdlm.memory.config import FLAG_PREFIX, MemoryConfig
from memdlm.memory.prompts import Prompt, WrittenMemory, check_batch_size, token_ids

if TYPE_CHECKING:
    from memdlm.memory.parametric import ParametricMemory

METADATA_KEY = "memdlm_memory"
FORMAT_VERSION = 1
# Settings that say which matrices there are and what they mean; the others only say how they were written.
SHAPING_SETTINGS = (
    "inner_adapter_type",
    "inner_rank",
    "inner_alpha",
    "inner_target_modules",
    "inner_layer_fraction",
)
# Fields of a configuration that change no hidden state.
_OUTER_FIELDS = ("use_cache", "output_router_logits", "router_aux_loss_coef")
_SAMPLE = 4096  # weights of one tensor that enter its fingerprint
_LINEAR_SAMPLE = 64  # likewise of a linear, of which there are thousands


@dataclass(frozen=True)
class MemoryHeader:
    """What a memory file says of itself.

    base_model: `name_or_path` of the model without adapter.
    config_sha256: of the fields of its configuration that its own class declares, less token ids.
    weights_sha256: of a sample of its embedding and final norm, in bfloat16, so that the dtype does not matter.
    linears_sha256: of a sample of the layers' linears, likewise; None if they were quantised.
    adapter: name of the PEFT adapter, as it was given; None: not given, or no adapter.
    adapter_sha256: of a sample of the adapter's weights; None: no adapter.
    memory_config: fields of `MemoryConfig`.
    num_tokens, losses: see `WrittenMemory`.
    values_sha256: of the matrices, one after the other.
    """

    format_version: int
    base_model: str
    config_sha256: str
    weights_sha256: str
    linears_sha256: str | None
    adapter: str | None
    adapter_sha256: str | None
    memory_config: dict[str, Any]
    num_tokens: int
    losses: list[float]
    values_sha256: str

    def settings(self) -> MemoryConfig:
        """The settings that the memory was written with.

        Raises:
            InputError: this version does not know one of them; a value of another type; those of `MemoryConfig`.
        """
        known = [field.name for field in dataclasses.fields(MemoryConfig)]
        unknown = [name for name in self.memory_config if name not in known]
        if unknown:
            raise InputError(
                f"it was written with {', '.join(unknown)}, which this version does not know: use a newer version"
            )
        _check_types(self.memory_config, MemoryConfig)
        return MemoryConfig(**self.memory_config)


class MemoryStore:
    """Writes the memory of each distinct prompt once and keeps the latest ones, for its answer choices and further
    questions.

    The values lie on the CPU: those of a model with 64 experts per layer take 150 MB a prompt. What failed is kept like
    the rest and not tried again while it is.

    Args:
        memory: where to write; `get` needs it attached.
        batch_size: prompts per pass of the inner loop (see `ParametricMemory.write_prompts`).
        capacity: most memories that are kept, the least recently used going first; at least 1.

    Attributes:
        num_written: prompts that were written, failed ones included.
        num_reused: prompts that were asked for and needed no writing.
        seconds: spent on writing.

    Raises:
        InputError: a capacity or a batch_size below 1; a batch_size above 1 with scope batch.
    """

    def __init__(self, memory: ParametricMemory, *, batch_size: int = 1, capacity: int = 16) -> None:
        if capacity < 1:
            raise InputError(f"the capacity of a MemoryStore is {capacity} but must be at least 1")
        check_batch_size(memory, batch_size)
        self.memory = memory
        self.batch_size = batch_size
        self.capacity = capacity
        self.num_written = 0
        self.num_reused = 0
        self.seconds = 0.0
        self._failures: dict[str, tuple[str, str]] = {}  # by the whole digest of the prompt
        self._kept: OrderedDict[tuple[int, ...], WrittenMemory] = OrderedDict()

    @property
    def failures(self) -> list[tuple[str, str]]:
        """(digest of the prompt and number of its tokens, why) of each prompt that could not be written, once each
        however often that was tried."""
        return list(self._failures.values())

    def get(self, prompts: Sequence[Prompt]) -> list[WrittenMemory]:
        """The memory of each prompt, in order; nothing is left in place (see `ParametricMemory.place`).

        Raises:
            as `ParametricMemory.write_prompts`.
        """
        self.memory.reset()
        keys = [tuple(token_ids(prompt)) for prompt in prompts]
        distinct = list(dict.fromkeys(keys))
        found = {key: self._kept[key] for key in distinct if key in self._kept}
        missing = [key for key in distinct if key not in found]
        if missing:
            began = time.perf_counter()
            written = self.memory.write_prompts(missing, batch_size=self.batch_size)
            self.seconds += time.perf_counter() - began
            found.update(zip(missing, map(self._on_cpu, written), strict=True))
        self.num_written += len(missing)
        self.num_reused += len(keys) - len(missing)
        for key in missing:
            reason = found[key].failure
            if reason is not None:
                digest = _digest(repr(key).encode())
                self._failures[digest] = (f"{digest[:12]} ({len(key)} tokens)", reason)
        for key in distinct:
            self._kept[key] = found[key]
            self._kept.move_to_end(key)
        while len(self._kept) > self.capacity:
            self._kept.popitem(last=False)
        return [found[key] for key in keys]

    def _on_cpu(self, written: WrittenMemory) -> WrittenMemory:
        if written.failure is not None:
            return written  # takes no memory
        phi = written.phi.cpu()
        # A row of a pass of several would keep the whole pass alive.
        return dataclasses.replace(written, phi=phi.clone() if phi.untyped_storage().nbytes() > phi.nbytes else phi)


def save_memory(
    memory: ParametricMemory, written: WrittenMemory, path: str | os.PathLike[str], adapter: str | None = None
) -> None:
    """Writes a memory file, whole or not at all; see `ParametricMemory.save`."""
    target = pathlib.Path(path)
    if written.failure is not None:
        raise InputError(f"there is no memory to save: {written.failure}")
    check_target(target)
    tensors = memory.fast.named(written.phi.cpu())
    header = MemoryHeader(
        **_identity(memory),
        adapter=adapter,
        memory_config=dataclasses.asdict(memory.config),
        num_tokens=written.num_tokens,
        losses=written.losses.tolist(),
        values_sha256=_digest_of(list(tensors.values())),
    )
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            save_file(tensors, partial, metadata={METADATA_KEY: json.dumps(dataclasses.asdict(header))})
            partial.chmod(0o644)  # safetensors' files are private
            os.replace(partial, target)
        finally:
            partial.unlink(missing_ok=True)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{target} cannot be written: {one_line(error)}") from error


def check_target(path: str | os.PathLike[str]) -> None:
    """Nothing, if a memory may be saved at `path`: nothing is there, or another memory, which it would replace.

    Raises:
        InputError: something else is there.
    """
    if not pathlib.Path(path).exists():
        return
    try:
        read_header(path)
    except InputError as error:
        raise InputError(f"{path} exists and is no memory file that could be replaced: give another name") from error


def read_header(path: str | os.PathLike[str]) -> MemoryHeader:
    """What a memory file says of itself; its matrices are not read.

    Raises:
        InputError: no such file; it is cut short, damaged, no memory file, or of a later format.
    """
    if not pathlib.Path(path).is_file():
        raise InputError(f"{path}: there is no such file; write one with `python -m memdlm.recall write` or save()")
    try:
        with safe_open(path, framework="pt") as stored:
            metadata = stored.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise InputError(
            f"{path} is cut short, damaged or no memory file ({one_line(error)}): write it again"
        ) from error
    if METADATA_KEY not in metadata:
        raise InputError(f"{path} is a safetensors file but no memory file: give one that memory.save() wrote")
    try:
        fields = json.loads(metadata[METADATA_KEY])
        version = fields["format_version"]
        if version != FORMAT_VERSION:
            raise InputError(f"it has format {version}, this version reads {FORMAT_VERSION}; write it again")
        header = MemoryHeader(**fields)
        _check_types(fields, MemoryHeader)
        header.settings()  # whoever reads the header needs them
        return header
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise InputError(f"the header of {path} is damaged ({one_line(error)}): write it again") from error
    except InputError as error:
        raise InputError(f"{path} cannot be used: {error}") from error


def _check_types(fields: dict[str, Any], declared: type) -> None:
    """Refuses `fields`, as JSON gave them, whose types are not those of the dataclass."""
    hints = get_type_hints(declared)
    for name, value in fields.items():
        if not _fits(value, hints[name]):
            raise InputError(f"its {name} is {repr(value)[:40]}, which is no value for it; write it again")


def _fits(value: Any, hint: Any) -> bool:
    if get_origin(hint) is Literal:
        return isinstance(value, str)  # which one is for the dataclass to say
    if get_origin(hint) is list:
        return isinstance(value, list) and all(_fits(one, *get_args(hint)) for one in value)
    if get_origin(hint) is dict:
        return isinstance(value, dict)
    if get_args(hint):  # a union
        return any(_fits(value, one) for one in get_args(hint))
    if hint in (int, float):
        return isinstance(value, (int, hint)) and not isinstance(value, bool)
    return isinstance(value, hint)


def load_memory(memory: ParametricMemory, path: str | os.PathLike[str]) -> WrittenMemory:
    """The memory in a file, on the CPU; see `ParametricMemory.load`. Nothing is put in place."""
    header = read_header(path)
    _check_settings(memory, header, path)
    _check_model(memory, header, path)
    phi = torch.empty(memory.fast.numel)
    wanted = memory.fast.named(phi)
    damaged = f"{path} is damaged: %s; write it again"
    try:
        with safe_open(path, framework="pt") as stored:
            names = set(stored.keys())
            wrong = sorted(names ^ set(wanted))
            if wrong:
                raise InputError(damaged % f"it lacks, or has too much, {some_of(wrong)}")
            for name, view in wanted.items():
                tensor = stored.get_tensor(name)
                if tensor.shape != view.shape or tensor.dtype != view.dtype:
                    raise InputError(damaged % f"{name} is {tensor.dtype} {list(tensor.shape)}")
                view.copy_(tensor)
    except (SafetensorError, OSError) as error:
        raise InputError(damaged % one_line(error)) from error
    if _digest_of(list(wanted.values())) != header.values_sha256:
        raise InputError(damaged % "its values are not those that were saved")
    return WrittenMemory(phi, header.num_tokens, torch.tensor(header.losses))


def _check_settings(memory: ParametricMemory, header: MemoryHeader, path: str | os.PathLike[str]) -> None:
    theirs, ours = header.settings(), memory.config
    for name in SHAPING_SETTINGS:
        stored, own = getattr(theirs, name), getattr(ours, name)
        same = set(theirs.target_roles) == set(ours.target_roles) if name == "inner_target_modules" else stored == own
        if not same:
            raise InputError(
                f"{path} was written with {FLAG_PREFIX}{name}={stored}, this memory has {FLAG_PREFIX}{name}={own}: "
                "use the same settings, or write it again"
            )


def _check_model(memory: ParametricMemory, header: MemoryHeader, path: str | os.PathLike[str]) -> None:
    own = _identity(memory)
    theirs, ours = f"{header.base_model or 'a model'}", f"{own['base_model'] or 'the model at hand'}"
    if header.config_sha256 != own["config_sha256"]:
        raise InputError(
            f"{path} was written for {theirs} (configuration {header.config_sha256[:8]}), not for {ours} "
            f"(configuration {own['config_sha256'][:8]}): load that model, or write the memory again"
        )
    if header.adapter_sha256 != own["adapter_sha256"]:
        with_what = "without an adapter"
        if header.adapter_sha256 is not None:
            with_what = f"with the adapter {header.adapter or ''} ({header.adapter_sha256[:8]})".replace("  ", " ")
        at_hand = "none" if own["adapter_sha256"] is None else f"({own['adapter_sha256'][:8]})"
        raise InputError(
            f"{path} was written for {theirs} {with_what}, the adapter on {ours} is {at_hand}: load the model in the "
            "same way, or write the memory again"
        )
    # Linears cannot be compared where one side is quantised.
    linears = header.linears_sha256, own["linears_sha256"]
    if header.weights_sha256 != own["weights_sha256"] or (None not in linears and linears[0] != linears[1]):
        raise InputError(
            f"{path} was written for {theirs}, whose weights are not those of {ours} though the configuration is the "
            "same: load that model, or write the memory again"
        )


def _identity(memory: ParametricMemory) -> dict[str, Any]:
    """The fields of MemoryHeader that follow from the model."""
    backbone = memory.backbone
    inherited = {field.name for field in dataclasses.fields(PreTrainedConfig)}
    values = memory.lm.config.to_dict()
    own = [field.name for field in dataclasses.fields(memory.lm.config) if field.name not in inherited]
    architecture = {
        name: values[name] for name in sorted(own) if name not in _OUTER_FIELDS and not name.endswith("_token_id")
    }
    linears = [part.weight for part in _plain_linears(backbone.layers)]
    is_quantised = any(not weight.is_floating_point() for weight in linears)
    adapter = _adapter_weights(backbone)
    return {
        "format_version": FORMAT_VERSION,
        "base_model": memory.lm.name_or_path,
        "config_sha256": _digest(json.dumps([memory.spec.name, architecture], sort_keys=True).encode()),
        "weights_sha256": _fingerprint([backbone.embedding.weight, *backbone.final_norm.parameters()], _SAMPLE),
        "linears_sha256": None if is_quantised else _fingerprint(linears, _LINEAR_SAMPLE),
        "adapter_sha256": _fingerprint(adapter, _SAMPLE) if adapter else None,
    }


def _plain_linears(layers: nn.ModuleList) -> list[nn.Linear]:
    """The model's own linears in order: those of adapters left out."""
    adapters = {
        id(part)
        for module in layers.modules()
        if isinstance(module, BaseTunerLayer)
        for name, part in module.named_modules()
        if name and not name.startswith("base_layer")
    }
    return [part for part in layers.modules() if isinstance(part, nn.Linear) and id(part) not in adapters]


def _adapter_weights(backbone: nn.Module) -> list[torch.Tensor]:
    return [
        weight
        for module in backbone.modules()
        if isinstance(module, BaseTunerLayer)
        for name, weight in module.named_parameters()
        if not name.startswith("base_layer.")
    ]


def _fingerprint(tensors: Sequence[torch.Tensor], most: int) -> str:
    """Digest of evenly spaced values of each tensor, rounded to bfloat16."""
    samples = []
    for tensor in tensors:
        flat = tensor.detach().reshape(-1)
        samples.append(flat[:: max(1, flat.numel() // most)][:most].to(torch.bfloat16))
    return _digest_of([torch.cat(samples).view(torch.int16).cpu()])


def _digest_of(tensors: Sequence[torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.contiguous().numpy().data)
    return digest.hexdigest()


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
