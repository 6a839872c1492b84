"""The quickstart, end to end, with a handful of steps."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_quickstart_writes_its_table_and_picture(tmp_path) -> None:
    environment = {
        **os.environ,
        "PATH": f"{pathlib.Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    folder = tmp_path / "quickstart"
    command = [sys.executable, "scripts/quickstart.py", "--steps", "10", "--num_train", "100", "--num_test", "16"]
    done = subprocess.run(
        [*command, "--output_dir", str(folder)], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    table = json.loads((folder / "table.json").read_text())
    assert [row["training"] for row in table] == ["MDLM", "MemDLM"]
    assert all(value > 0 for row in table for key, value in row.items() if key != "training")
    assert (folder / "loss.png").stat().st_size > 5000
    for run in ("plain", "memory"):
        assert (folder / run / "checkpoint-final" / "model.safetensors").is_file()
