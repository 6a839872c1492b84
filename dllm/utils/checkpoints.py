"""Checkpoint folders on disk: whether one is whole, who wrote it, and which one a run goes on from.

A checkpoint is written below `.saving`, gets its manifest last, and takes its name in one rename, so a folder
`checkpoint-N` is complete. What a crash of the machine tears all the same is found by sizes and headers.
"""

import json
import os
import pathlib
import re
import shutil
import zipfile
from collections.abc import Sequence
from typing import Any

from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError, safe_open
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from dllm.utils.distributed import is_main_process, world_size
from dllm.utils.logging import get_default_logger
from dllm.utils.parsing import InputError

logger = get_default_logger(__name__)

MANIFEST_FILE = "manifest.json"
TRAINER_STATE_NAME = "trainer_state.json"
SCHEDULER_NAME = "scheduler.pt"
_ADAPTER_CONFIG_NAME = "adapter_config.json"
_INDEX_NAME = "model.safetensors.index.json"
STAGING_FOLDER = ".saving"
_OLD = ".old"


def write_manifest(folder: pathlib.Path, settings: dict[str, Any]) -> None:
    """Writes manifest.json: `settings`, and name and size in bytes of every file that the folder holds now."""
    files = {path.relative_to(folder).as_posix(): path.stat().st_size for path in _files(folder)}
    (folder / MANIFEST_FILE).write_text(json.dumps({**settings, "files": files}, indent=2) + "\n")


def read_manifest(checkpoint: str | pathlib.Path) -> dict[str, Any]:
    """The manifest of a whole checkpoint, {} where it has none (one of the plain transformers.Trainer)."""
    path = pathlib.Path(checkpoint) / MANIFEST_FILE
    return json.loads(path.read_text()) if path.is_file() else {}


def _files(folder: pathlib.Path) -> list[pathlib.Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def publish(staging: pathlib.Path, folder: pathlib.Path) -> None:
    """Gives a finished folder below `.saving` its name, in one rename, once all its bytes are on the disk.

    What had the name before is removed afterwards.
    """
    for path in [*_files(staging), *(path for path in staging.rglob("*") if path.is_dir()), staging]:
        _to_disk(path)
    before = staging.with_name(folder.name + _OLD)
    if folder.exists():
        folder.rename(before)
    staging.rename(folder)
    _to_disk(folder.parent)
    shutil.rmtree(before, ignore_errors=True)
    if not any(staging.parent.iterdir()):
        staging.parent.rmdir()


def _to_disk(path: pathlib.Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def clear_staging(output_dir: pathlib.Path) -> None:
    """Removes what a run that was killed while saving has left; a folder that it was replacing gets its name back."""
    give_back_names(output_dir)
    if (output_dir / STAGING_FOLDER).is_dir():
        shutil.rmtree(output_dir / STAGING_FOLDER)


def give_back_names(output_dir: pathlib.Path) -> None:
    """Gives folders that a killed run was about to replace, now below `.saving` only, their names back."""
    for before in (output_dir / STAGING_FOLDER).glob(f"*{_OLD}"):
        name = output_dir / before.name.removesuffix(_OLD)
        if not name.exists():
            before.rename(name)


def find_damage(checkpoint: str | pathlib.Path) -> str | None:
    """What is wrong with a checkpoint folder, in a few words, or None for a whole one.

    The files that the manifest names must have their sizes. With or without a manifest, safetensors files must hold
    what their headers say, files of torch.save must have their end, JSON must parse, and shards must be there.
    """
    folder = pathlib.Path(checkpoint)
    try:
        expected = read_manifest(folder).get("files", {})
    except ValueError:
        return f"{MANIFEST_FILE} cannot be read"
    for name, size in expected.items():
        found = (folder / name).stat().st_size if (folder / name).is_file() else None
        if found != size:
            return f"{name} is missing" if found is None else f"{name} has {found} of {size} bytes"
    if not (folder / TRAINER_STATE_NAME).is_file():
        return f"{TRAINER_STATE_NAME} is missing"
    # Without it Trainer would begin a new optimizer, without a word.
    if (folder / "optimizer.pt").is_file() and not (folder / SCHEDULER_NAME).is_file():
        return f"{SCHEDULER_NAME} is missing"
    return next((damage for path in _files(folder) if (damage := _damage_of_file(path, folder))), None)


def _damage_of_file(path: pathlib.Path, folder: pathlib.Path) -> str | None:
    name = path.relative_to(folder).as_posix()
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, framework="pt"):
                return None
        except (SafetensorError, OSError, ValueError):  # the latter two: files of no bytes
            return f"{name} is cut off"
    if path.suffix in (".pt", ".pth", ".bin"):  # of torch.save: a zip archive, whose directory stands at its end
        return None if zipfile.is_zipfile(path) else f"{name} is cut off"
    if name not in (TRAINER_STATE_NAME, _INDEX_NAME):
        return None
    try:
        content = json.loads(path.read_text())
    except ValueError:
        return f"{name} is cut off"
    shards = sorted(set(content["weight_map"].values())) if name == _INDEX_NAME else []
    return next((f"{shard} is missing" for shard in shards if not (folder / shard).is_file()), None)


_ENGINE_FILES = {
    "deepspeed": ("global_step*", "zero_pp_rank_*", "*/*optim_states.pt"),
    "fsdp": ("pytorch_model_fsdp*", "optimizer_[0-9]*", "optimizer.bin"),
    "ddp": ("optimizer.pt",),
}


def _family(engine: str) -> str:
    return engine.rstrip("0123456789").replace("zero", "deepspeed")


def _engine_by_files(folder: pathlib.Path) -> str | None:
    for engine, patterns in _ENGINE_FILES.items():
        if any(found for pattern in patterns for found in folder.glob(pattern)):
            return engine
    return None


def check_engine(checkpoint: str | pathlib.Path, engine: str, num_processes: int) -> None:
    """Nothing, if a run under `engine` ("ddp", "fsdp", "fsdp2", "zero1" to "zero3") can go on from the checkpoint.

    "ddp" is also the run of one process. A checkpoint without a manifest tells its engine by its files.

    Raises:
        InputError: another engine saved it, or DeepSpeed with another number of processes.
    """
    folder = pathlib.Path(checkpoint)
    manifest = read_manifest(folder)
    saved = manifest.get("engine") or _engine_by_files(folder)
    if saved is not None and saved != engine and (manifest or saved != _family(engine)):
        raise InputError(
            f"{checkpoint} was saved under {saved}, and this run uses {engine}: launch it with the settings of "
            f"{saved} to go on, or {_anew(folder)}"
        )
    processes = manifest.get("num_processes", num_processes)
    if _family(engine) == "deepspeed" and processes != num_processes:
        raise InputError(
            f"{checkpoint} was saved by {processes} processes under {engine}, which cannot go on with "
            f"{num_processes}: launch {processes}, or {_anew(folder)}"
        )


def _anew(checkpoint: pathlib.Path) -> str:
    flag = "adapter_model" if (checkpoint / _ADAPTER_CONFIG_NAME).is_file() else "model"
    return f"begin a new run with its weights: --{flag}_name_or_path {checkpoint}"


def _has_optimizer(checkpoint: pathlib.Path) -> bool:
    return _engine_by_files(checkpoint) is not None


def list_checkpoints(output_dir: str | pathlib.Path) -> list[pathlib.Path]:
    """The folders checkpoint-N of a run, the newest first."""
    numbered = re.compile(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)")
    found = [(match, path) for path in pathlib.Path(output_dir).glob("*") if (match := numbered.fullmatch(path.name))]
    return [path for match, path in sorted(found, key=lambda pair: -int(pair[0][1])) if path.is_dir()]


_RUN_TRACES = (
    "checkpoint-*",
    "trainer_state.json",
    "model*.safetensors",
    "adapter_model*.safetensors",
    "pytorch_model*.bin",
    f"{STAGING_FOLDER}/*{_OLD}",
)


def _traces_of_a_run(folder: pathlib.Path) -> list[str]:
    return sorted(found.name for pattern in _RUN_TRACES for found in folder.glob(pattern))


def _newest_whole(checkpoints: Sequence[pathlib.Path]) -> pathlib.Path:
    damages = []
    for checkpoint in checkpoints:
        damage = find_damage(checkpoint)
        if damage is None:
            if damages:
                logger.warning(f"torn: {', '.join(damages)}; going on from {checkpoint}")
            return checkpoint
        damages.append(f"{checkpoint} ({damage})")
    raise InputError(
        f"--resume_from_checkpoint True, but every checkpoint is torn: {', '.join(damages)}: start anew in a new "
        "--output_dir"
    )


def resolve_checkpoint(output_dir: str, resume_from_checkpoint: str | bool | None) -> str | None:
    """Folder of the checkpoint to go on from, or None for a run that starts anew.

    Args:
        output_dir: the run's folder; need not exist.
        resume_from_checkpoint: None / False: start anew. True: the newest whole checkpoint of output_dir; a line names
            torn ones that were passed over. Else a path.

    Raises:
        InputError: the folder holds another run and nothing says to resume it; or nothing whole to resume from.
    """
    folder = pathlib.Path(output_dir)
    wanted = "" if resume_from_checkpoint is None else str(resume_from_checkpoint)
    if wanted.lower() in ("", "false", "no", "0"):
        traces = _traces_of_a_run(folder)
        if traces:
            raise InputError(
                f"{folder} holds another run ({traces[0]}): give a new --output_dir, or "
                "--resume_from_checkpoint True to go on with that run"
            )
        return None
    if wanted.lower() in ("true", "yes", "1"):
        checkpoints = list_checkpoints(folder)
        if not checkpoints:
            raise InputError(
                f"--resume_from_checkpoint True, but {folder} holds no checkpoint-N: give the checkpoint's "
                "path, or drop the flag to start anew"
            )
        return _with_optimizer_state(_newest_whole(checkpoints))
    checkpoint = pathlib.Path(wanted)
    if not (checkpoint / TRAINER_STATE_NAME).is_file():
        raise InputError(
            f"--resume_from_checkpoint {wanted} is no checkpoint (it has no trainer_state.json): give a "
            "checkpoint-N folder, or True for the newest in --output_dir"
        )
    damage = find_damage(checkpoint)
    if damage is not None:
        raise InputError(
            f"--resume_from_checkpoint {wanted} is torn ({damage}): give an older one, or True for the newest whole "
            "one in --output_dir"
        )
    return _with_optimizer_state(checkpoint)


def _with_optimizer_state(checkpoint: pathlib.Path) -> str:
    if not _has_optimizer(checkpoint):
        raise InputError(
            f"{checkpoint} holds the model only (--save_only_model True), so the run cannot be continued: start a new "
            f"one from it with --model_name_or_path {checkpoint}"
        )
    return str(checkpoint)


def resolve_for_all(output_dir: str, resume_from_checkpoint: str | bool | None) -> str | None:
    """`resolve_checkpoint` on the main process, whose answer (or error) all processes take.

    A checkpoint that a killed run was about to replace has its name again before that.

    Nodes see a shared folder at different times, and must not go on from different checkpoints.
    """
    if world_size() == 1:
        give_back_names(pathlib.Path(output_dir))
        return resolve_checkpoint(output_dir, resume_from_checkpoint)
    found: list[str | None] = [None, None]
    if is_main_process():
        give_back_names(pathlib.Path(output_dir))
        try:
            found[0] = resolve_checkpoint(output_dir, resume_from_checkpoint)
        except InputError as error:
            found[1] = str(error)
    broadcast_object_list(found)
    if found[1] is not None:
        raise InputError(found[1])
    return found[0]
