"""scripts/train.slurm.sh on a cluster of stand-ins: srun starts its tasks here, scontrol names hosts, notes requeue."""

import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import pytest

from dllm.models.tiny import make_tiny_checkpoint

ROOT = pathlib.Path(__file__).resolve().parents[2]

# As srun does, hands signals on to every task; a task that fails ends the others.
SRUN = """#!/usr/bin/env bash
echo "srun $*" >>"$CALLS"
while [[ "$1" == --* ]]; do
    case "$1" in
        --nodes) nodes="$2"; shift 2 ;;
        --kill-on-bad-exit=1) shift ;;
        *) shift 2 ;;
    esac
done
tasks=()
for ((node = 0; node < nodes; node++)); do
    SLURM_NODEID="$node" "$@" &
    tasks+=($!)
done
trap 'kill -USR1 "${tasks[@]}"' USR1
code=0
for task in "${tasks[@]}"; do
    while true; do
        wait "$task" || code=$?
        kill -0 "$task" 2>/dev/null || break
    done
done
exit "$code"
"""
SCONTROL = """#!/usr/bin/env bash
case "$1" in
    show) echo "$3" | tr , '\\n' ;;
    *) echo "scontrol $*" >>"$CALLS" ;;
esac
"""
ACCELERATE = """#!/usr/bin/env bash
echo "$*" >>"$CALLS.$SLURM_NODEID"
exit "${ACCELERATE_EXIT:-0}"
"""


class Cluster:
    """Programs in a folder that comes first on PATH."""

    def __init__(self, folder: pathlib.Path, **programs: str) -> None:
        self.folder, self.calls = folder, folder / "calls"
        for name, text in programs.items():
            (folder / name).write_text(text)
            (folder / name).chmod(0o755)

    def start(self, *flags: str, **variables: str) -> subprocess.Popen[str]:
        environment = {
            **os.environ,
            "PATH": os.pathsep.join([str(self.folder), str(pathlib.Path(sys.executable).parent), os.environ["PATH"]]),
            "CALLS": str(self.calls),
            "SLURM_SUBMIT_DIR": str(ROOT),
            "SLURM_JOB_ID": "1234567",
            "SLURM_JOB_NODELIST": "n01,n02",
            "OMP_NUM_THREADS": "1",
            **variables,
        }
        # As Slurm does, from a copy in another place.
        script = shutil.copy(ROOT / "scripts" / "train.slurm.sh", self.folder / "slurm_script")
        return subprocess.Popen(
            ["bash", str(script), *flags],
            cwd=self.folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, *flags: str, **variables: str) -> tuple[int, str, str]:
        process = self.start(*flags, **variables)
        out, err = process.communicate(timeout=120)
        return process.returncode, out, err

    def launched(self, node: int) -> str:
        """What accelerate was called with on a node, the last time."""
        return pathlib.Path(f"{self.calls}.{node}").read_text().splitlines()[-1]


@pytest.fixture
def cluster(tmp_path) -> Cluster:
    folder = tmp_path / "bin"
    folder.mkdir()
    return Cluster(folder, srun=SRUN, scontrol=SCONTROL, accelerate=ACCELERATE)


SFT = ("--script_path", "examples/llada/sft.py")


def test_two_nodes_of_eight_get_one_launch_each(cluster, tmp_path) -> None:
    out = str(tmp_path / "out")
    flags = ("--accelerate_config", "ddp", *SFT, "--output_dir", out, "--mem_enabled", "True")
    code, printed, err = cluster.run(*flags, SLURM_GPUS_ON_NODE="8", SLURM_CPUS_PER_TASK="16")
    assert code == 0, err
    for node in (0, 1):
        assert cluster.launched(node) == (
            f"launch --machine_rank {node} --config_file scripts/accelerate_configs/ddp.yaml --num_machines 2 "
            f"--num_processes 16 --main_process_ip n01 --main_process_port {20000 + 1234567 % 20000} "
            f"examples/llada/sft.py --output_dir {out} --mem_enabled True"
        )
    (step,) = cluster.calls.read_text().splitlines()
    assert step.startswith("srun --nodes 2 --ntasks 2 --ntasks-per-node 1 --kill-on-bad-exit=1 --cpus-per-task 16 bash")
    assert printed.startswith("job 1234567, start 1, on n01 n02:\n")


def test_gpus_may_have_a_kind_and_deepspeed_is_started_by_slurm_alone(cluster) -> None:
    flags = ("--accelerate_config", "scripts/accelerate_configs/zero3.yaml", *SFT, "--output_dir=out/x")
    code, _, err = cluster.run(*flags, SLURM_GPUS_PER_NODE="h200:4", SLURM_JOB_NODELIST="a7")
    assert code == 0, err
    words = cluster.launched(0)
    assert "zero3.yaml --num_machines 1 --num_processes 4 --main_process_ip a7" in words
    assert "--deepspeed_multinode_launcher standard examples/llada/sft.py --output_dir=out/x" in words


def test_on_cpus_the_configuration_says_how_many_processes_a_node_has(cluster) -> None:
    assert cluster.run("--accelerate_config", "cpu_ddp", *SFT, "--output_dir", "out/x")[0] == 0
    assert "--num_machines 2 --num_processes 4 " in cluster.launched(1)


@pytest.mark.parametrize(
    ("flags", "variables", "message"),
    [
        (("--accelerate_config", "fsdp9", *SFT), {}, "'fsdp9' is unknown; one of: cpu cpu_ddp "),
        (SFT, {}, "--accelerate_config '' is unknown"),
        (("--accelerate_config", "ddp", "--script_path", "no.py"), {}, "--script_path 'no.py' is no file"),
        (("--accelerate_config", "ddp", *SFT), {}, "give --output_dir"),
        (("--accelerate_config", "ddp", *SFT, "--output_dir", "x"), {}, "this job has no GPUs: sbatch --gpus-per-node"),
        ((), {"SLURM_JOB_ID": ""}, "this is a Slurm job: sbatch"),
        ((), {"SLURM_SUBMIT_DIR": "/"}, "is not the repository's root"),
    ],
)
def test_bad_input_is_one_line(cluster, flags, variables, message) -> None:
    code, out, err = cluster.run(*flags, **variables)
    assert code == 2 and out == "" and err.count("\n") == 1
    assert message in err and err.startswith("error: ")


def test_a_job_that_finds_a_checkpoint_goes_on_from_it(cluster, tmp_path) -> None:
    flags = ("--accelerate_config", "cpu", *SFT, "--output_dir", str(tmp_path / "out"))
    (tmp_path / "out" / "checkpoint-final").mkdir(parents=True)  # not one to go on from
    cluster.run(*flags)
    assert cluster.launched(0).endswith(f"--output_dir {tmp_path}/out")
    (tmp_path / "out" / "checkpoint-20").mkdir()
    cluster.run(*flags)
    assert cluster.launched(0).endswith(f"--output_dir {tmp_path}/out --resume_from_checkpoint True")
    cluster.run(*flags, "--resume_from_checkpoint", "False")
    assert cluster.launched(0).endswith("--resume_from_checkpoint False")


def test_a_failure_is_the_jobs_and_does_not_requeue_it(cluster) -> None:
    code, _, _ = cluster.run("--accelerate_config", "cpu", *SFT, "--output_dir", "x", ACCELERATE_EXIT="3")
    assert code == 3
    assert "requeue" not in cluster.calls.read_text()


def wait_until(process: subprocess.Popen[str], condition) -> None:
    for _ in range(1000):
        if condition():
            return
        assert process.poll() is None, process.communicate()
        time.sleep(0.1)
    raise AssertionError("it took too long")


def test_a_job_without_anything_to_save_ends_at_once_and_comes_back(cluster, tmp_path) -> None:
    (cluster.folder / "accelerate").write_text('#!/usr/bin/env bash\ntouch "$CALLS.began"\nexec sleep 60\n')
    process = cluster.start("--accelerate_config", "cpu", *SFT, "--output_dir", str(tmp_path / "out"))
    wait_until(process, lambda: pathlib.Path(f"{cluster.calls}.began").exists())
    process.send_signal(signal.SIGUSR1)
    printed, _ = process.communicate(timeout=30)
    assert "job 1234567 ended after the signal (exit code " in printed and "saved" not in printed
    assert cluster.calls.read_text().splitlines()[-1] == "scontrol requeue 1234567"


@pytest.mark.slow
def test_a_preempted_run_saves_goes_back_and_goes_on(cluster, tmp_path) -> None:
    (cluster.folder / "accelerate").unlink()  # the real one
    rows = [{"instruction": f"Count to {n}.", "output": " ".join(map(str, range(n)))} for n in range(3, 60)]
    (tmp_path / "count.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    model = make_tiny_checkpoint(tmp_path / "tiny", "llada", d_model=32, n_layers=2)
    out = tmp_path / "out"
    flags = ("--accelerate_config", "cpu", *SFT, "--use_cpu", "True", "--model_name_or_path", str(model))
    flags += ("--dataset_args", f"{tmp_path}/count.jsonl[train]", "--max_length", "128", "--output_dir", str(out))
    flags += ("--max_steps", "2000", "--save_steps", "10", "--logging_steps", "1", "--lora", "True")
    job = {"SLURM_JOB_NODELIST": "localhost", "HF_HUB_OFFLINE": "1"}
    process = cluster.start(*flags, **job)
    wait_until(process, lambda: (out / "checkpoint-10").exists())
    process.send_signal(signal.SIGUSR1)
    _, err = process.communicate(timeout=60)
    assert cluster.calls.read_text().splitlines()[-1] == "scontrol requeue 1234567"
    (line,) = [line for line in err.splitlines() if line.startswith("stopped by")]
    step = int(line.split()[5])
    assert line.startswith(f"stopped by SIGUSR1 at step {step} of 2000; saved {out}/checkpoint-{step}")
    flags = tuple(str(step + 5) if word == "2000" else word for word in flags)
    code, printed, err = cluster.run(*flags, **job, SLURM_RESTART_COUNT="1")
    assert code == 0, err
    assert "start 2, on localhost:" in printed and "--resume_from_checkpoint True" in printed
    state = json.loads((out / "trainer_state.json").read_text())
    steps = [entry["step"] for entry in state["log_history"] if "loss" in entry]
    assert steps == list(range(1, step + 6))
    assert (out / "checkpoint-final" / "adapter_model.safetensors").is_file()
