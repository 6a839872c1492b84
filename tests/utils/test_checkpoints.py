"""Which checkpoint a run goes on from: whole ones only, of its own engine; and how a folder gets its name."""

import json
import pathlib
import shutil

import pytest
import torch
from safetensors.torch import save_file

from dllm.utils import InputError, resolve_checkpoint
from dllm.utils.checkpoints import (
    STAGING_FOLDER,
    check_engine,
    clear_staging,
    find_damage,
    list_checkpoints,
    publish,
    resolve_for_all,
    write_manifest,
)

SHARDS = {"model-1.safetensors": ["a"], "model-2.safetensors": ["b", "c"]}


def touch(path: pathlib.Path, text: str = "{}") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def make_checkpoint(folder: pathlib.Path, manifest: dict | None = None) -> pathlib.Path:
    """A folder like one of Trainer, in shards; with a manifest if one is given."""
    touch(folder / "trainer_state.json", '{"global_step": 3, "epoch": 0.5}')
    for file, names in SHARDS.items():
        save_file({name: torch.arange(7.0) for name in names}, folder / file)
    table = {"weight_map": {name: file for file, names in SHARDS.items() for name in names}}
    touch(folder / "model.safetensors.index.json", json.dumps(table))
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        torch.save({"state": torch.arange(50.0)}, folder / name)
    if manifest is not None:
        write_manifest(folder, manifest)
    return folder


@pytest.mark.parametrize(
    "trace",
    [
        "checkpoint-7/trainer_state.json",
        "checkpoint-final/config.json",
        "trainer_state.json",
        "model.safetensors",
        "model-00001-of-00002.safetensors",
        "adapter_model.safetensors",
    ],
)
def test_a_folder_with_another_run_is_refused(tmp_path, trace):
    touch(tmp_path / trace)
    for resume in (None, False, "False"):
        with pytest.raises(InputError, match=r"holds another run .*new --output_dir, or --resume_from_checkpoint True"):
            resolve_checkpoint(str(tmp_path), resume)


def test_other_folders_are_free(tmp_path):
    touch(tmp_path / "data" / "notes.txt")
    touch(tmp_path / STAGING_FOLDER / "checkpoint-3" / "model.safetensors")  # killed while saving for the first time
    assert resolve_checkpoint(str(tmp_path), None) is None
    assert resolve_checkpoint(str(tmp_path / "data"), None) is None
    assert resolve_checkpoint(str(tmp_path / "new"), "False") is None


def test_what_to_resume_from(tmp_path):
    for missing in (tmp_path, tmp_path / "new"):
        with pytest.raises(InputError, match="holds no checkpoint-N: give the checkpoint's path, or drop the flag"):
            resolve_checkpoint(str(missing), "True")
    for step in (9, 10):
        make_checkpoint(tmp_path / f"checkpoint-{step}")
    (tmp_path / "checkpoint-11").write_text("a file")
    (tmp_path / "checkpoint-final").mkdir()
    newest, older = str(tmp_path / "checkpoint-10"), str(tmp_path / "checkpoint-9")
    assert [str(path) for path in list_checkpoints(tmp_path)] == [newest, older]
    assert resolve_checkpoint(str(tmp_path), True) == newest == resolve_checkpoint(str(tmp_path), "true")
    assert resolve_checkpoint(str(tmp_path), older) == older
    with pytest.raises(InputError, match=r"is no checkpoint \(it has no trainer_state.json\)"):
        resolve_checkpoint(str(tmp_path), str(tmp_path))


def test_a_checkpoint_of_the_model_alone_cannot_be_resumed(tmp_path):
    checkpoint = make_checkpoint(tmp_path / "checkpoint-7")
    (checkpoint / "optimizer.pt").unlink()
    for wanted in ("True", str(checkpoint)):
        with pytest.raises(InputError, match=r"holds the model only .* start a new one from it with --model_name"):
            resolve_checkpoint(str(tmp_path), wanted)


def cut(path: pathlib.Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) - 5])


FILES = (*SHARDS, "model.safetensors.index.json", "trainer_state.json", "optimizer.pt", "scheduler.pt", "rng_state.pth")


@pytest.mark.parametrize("manifest", [None, {}], ids=["plain", "manifest"])
@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_cut_off_or_empty_is_found(tmp_path, manifest, name):
    checkpoint = make_checkpoint(tmp_path / "checkpoint-2", manifest)
    assert find_damage(checkpoint) is None
    size = (checkpoint / name).stat().st_size
    cut(checkpoint / name)
    assert find_damage(checkpoint) == (
        f"{name} is cut off" if manifest is None else f"{name} has {size - 5} of {size} bytes"
    )
    (checkpoint / name).write_bytes(b"")
    assert name in str(find_damage(checkpoint))


@pytest.mark.parametrize("manifest", [None, {}], ids=["plain", "manifest"])
@pytest.mark.parametrize("name", ["model-2.safetensors", "trainer_state.json", "scheduler.pt"])
def test_a_missing_file_is_found(tmp_path, manifest, name):
    checkpoint = make_checkpoint(tmp_path / "checkpoint-2", manifest)
    (checkpoint / name).unlink()
    assert find_damage(checkpoint) == f"{name} is missing"


def test_a_manifest_finds_files_that_nothing_else_asks_for(tmp_path):
    checkpoint = make_checkpoint(tmp_path / "checkpoint-2")
    touch(checkpoint / "global_step2" / "part", "abc")
    write_manifest(checkpoint, {})
    touch(checkpoint / "ema.safetensors.partial", "written later, and no business of the manifest")
    assert find_damage(checkpoint) is None
    touch(checkpoint / "global_step2" / "part", "ab")
    assert find_damage(checkpoint) == "global_step2/part has 2 of 3 bytes"
    cut(checkpoint / "manifest.json")
    assert find_damage(checkpoint) == "manifest.json cannot be read"


def test_bytes_of_the_right_number_but_not_of_the_file_are_found(tmp_path):
    checkpoint = make_checkpoint(tmp_path / "checkpoint-2", {})
    for name in ("optimizer.pt", "model-1.safetensors"):
        path = checkpoint / name
        content = path.read_bytes()
        path.write_bytes(bytes(len(content)))  # what a crash of the machine leaves of a file that was not flushed
        assert find_damage(checkpoint) == f"{name} is cut off"
        path.write_bytes(content)


def test_a_torn_checkpoint_falls_back_to_the_one_before_and_says_so(tmp_path, caplog):
    for step in (2, 4, 10):
        make_checkpoint(tmp_path / f"checkpoint-{step}", {})
    cut(tmp_path / "checkpoint-10" / "optimizer.pt")
    (tmp_path / "checkpoint-4" / "model-2.safetensors").unlink()
    with caplog.at_level("WARNING"):
        assert resolve_checkpoint(str(tmp_path), True) == str(tmp_path / "checkpoint-2")
    (line,) = caplog.messages
    assert "\n" not in line and line.endswith(f"going on from {tmp_path}/checkpoint-2")
    assert "checkpoint-10 (optimizer.pt has " in line and "checkpoint-4 (model-2.safetensors is missing)" in line
    with pytest.raises(InputError, match=r"checkpoint-10 is torn \(optimizer.pt has .* give an older one") as caught:
        resolve_checkpoint(str(tmp_path), str(tmp_path / "checkpoint-10"))
    assert "\n" not in str(caught.value)
    cut(tmp_path / "checkpoint-2" / "trainer_state.json")
    with pytest.raises(InputError, match=r"every checkpoint is torn: .*checkpoint-2 \(trainer_state.json has"):
        resolve_checkpoint(str(tmp_path), True)


@pytest.mark.parametrize("engine", ["ddp", "fsdp", "fsdp2", "zero1", "zero2", "zero3"])
def test_an_engine_goes_on_from_its_own_checkpoints_only(tmp_path, engine):
    for saved in ("ddp", "fsdp", "fsdp2", "zero1", "zero2", "zero3"):
        checkpoint = make_checkpoint(tmp_path / saved / "checkpoint-2", {"engine": saved, "num_processes": 2})
        if saved == engine:
            check_engine(checkpoint, engine, 2)
            continue
        with pytest.raises(InputError) as caught:
            check_engine(checkpoint, engine, 2)
        line = str(caught.value)
        assert f"saved under {saved}, and this run uses {engine}" in line and "\n" not in line
        assert line.endswith(f"--model_name_or_path {checkpoint}")


@pytest.mark.parametrize(
    ("trace", "engine"),
    [
        ("global_step2/mp_rank_00_model_states.pt", "deepspeed"),
        ("global_step2/zero_pp_rank_0_mp_rank_00_optim_states.pt", "deepspeed"),
        ("pytorch_model_fsdp_0/.metadata", "fsdp"),
        ("optimizer_0/__0_0.distcp", "fsdp"),
        ("optimizer.bin", "fsdp"),
        ("optimizer.pt", "ddp"),
    ],
)
def test_without_a_manifest_the_files_tell_the_engine(tmp_path, trace, engine):
    touch(tmp_path / trace)
    touch(tmp_path / "adapter_config.json")
    for own in ("ddp", "fsdp", "fsdp2", "zero1", "zero3"):
        if {"f": "fsdp", "z": "deepspeed", "d": "ddp"}[own[0]] == engine:
            check_engine(tmp_path, own, 2)
            continue
        with pytest.raises(InputError, match=f"saved under {engine}, .* uses {own}: .*--adapter_model_name_or_path"):
            check_engine(tmp_path, own, 2)


def test_another_number_of_processes_is_refused_where_the_engine_cannot(tmp_path):
    for engine in ("ddp", "fsdp2"):
        checkpoint = make_checkpoint(tmp_path / engine, {"engine": engine, "num_processes": 2})
        check_engine(checkpoint, engine, 1)
    checkpoint = make_checkpoint(tmp_path / "zero2", {"engine": "zero2", "num_processes": 2})
    with pytest.raises(InputError, match="saved by 2 processes under zero2, which cannot go on with 1: launch 2"):
        check_engine(checkpoint, "zero2", 1)


def test_a_folder_gets_its_name_at_once_and_replaces_what_had_it(tmp_path):
    staging, folder = tmp_path / STAGING_FOLDER / "checkpoint-2", tmp_path / "checkpoint-2"
    touch(folder / "old" / "file", "old")
    touch(staging / "deep" / "file", "new")
    publish(staging, folder)
    assert (folder / "deep" / "file").read_text() == "new" and not (folder / "old").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-2"]


def test_what_a_killed_run_left_is_removed_and_what_it_was_replacing_comes_back(tmp_path, monkeypatch):
    staging, folder = tmp_path / STAGING_FOLDER / "checkpoint-2", tmp_path / "checkpoint-2"
    clear_staging(tmp_path)
    touch(folder / "file", "old")
    touch(staging / "file", "new")
    rename = pathlib.Path.rename

    def killed(path, target):
        if path == staging:
            raise KeyboardInterrupt
        return rename(path, target)

    monkeypatch.setattr(pathlib.Path, "rename", killed)
    with pytest.raises(KeyboardInterrupt):
        publish(staging, folder)
    assert not folder.exists()
    clear_staging(tmp_path)
    assert (folder / "file").read_text() == "old" and not staging.parent.exists()
    shutil.rmtree(folder)


def test_a_run_that_died_while_it_replaced_its_only_checkpoint_goes_on_from_it(tmp_path):
    checkpoint = tmp_path / "checkpoint-2"
    for wanted in (True, str(checkpoint)):
        make_checkpoint(tmp_path / STAGING_FOLDER / "checkpoint-2.old", {})
        with pytest.raises(InputError, match="holds another run"):
            resolve_checkpoint(str(tmp_path), None)
        assert resolve_for_all(str(tmp_path), wanted) == str(checkpoint)
        assert find_damage(checkpoint) is None
        shutil.rmtree(checkpoint)
