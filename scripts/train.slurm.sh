#!/usr/bin/env bash
#SBATCH --job-name=memdlm
#SBATCH --ntasks-per-node=1
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@120
# Train on one or many nodes of a Slurm cluster, one accelerate launch per node. From the repository's root:
#
#   sbatch --nodes 2 --gpus-per-node 8 scripts/train.slurm.sh --accelerate_config fsdp2 \
#       --script_path examples/llada/sft.py --output_dir runs/big [any flag of the script]
#
# 120 seconds before the time limit (longer: sbatch --signal=B:USR1@600) the run writes a checkpoint at the end of its
# step, and the job is put back into the queue. A job that finds checkpoints in OUTPUT_DIR goes on from the newest whole
# one. Where Slurm preempts jobs, PreemptParameters=send_user_signal makes it send the same signal before it does.
set -euo pipefail

die() {
    echo "error: $1" >&2
    exit 2
}

# The processes below $1 that catch SIGUSR1: those that train. Launchers and their helpers would die of it.
trainers_below() {
    local child mask
    for child in $(pgrep -P "$1"); do
        mask="$(awk '/^SigCgt/ {print $2}' "/proc/$child/status" 2>/dev/null)" || continue
        if (((16#${mask:-0} >> 9) & 1)); then
            echo "$child"
        fi
        trainers_below "$child"
    done
}

# The value of --$1 among the other arguments, empty where it is not given.
value_of() {
    local flag="--$1" found=""
    shift
    while (($#)); do
        case "$1" in
            "$flag") found="${2:-}" ;;
            "$flag="*) found="${1#*=}" ;;
        esac
        shift
    done
    echo "$found"
}

# Waits for a process that this shell started, however many signals come in between; gives its exit code.
wait_for() {
    local code=0
    while true; do
        code=0
        wait "$1" || code=$?
        kill -0 "$1" 2>/dev/null || return "$code"
    done
}

# On every node: start accelerate (the arguments), and hand signals on to the processes that train.
run_on_node() {
    local launcher trainers="" trainer code=0
    # Slurm may send the signal to launchers too.
    (trap '' USR1 && exec accelerate launch --machine_rank "$SLURM_NODEID" "$@") &
    launcher=$!
    # A run that does not train yet, or any more, has nothing to save.
    trap 'trainers="$(trainers_below "$launcher")"; kill -USR1 $trainers 2>/dev/null || kill -TERM "$launcher"' USR1 TERM
    wait_for "$launcher" || code=$?
    # A launcher may end before those it has started.
    for trainer in $trainers; do
        while kill -0 "$trainer" 2>/dev/null; do sleep 1; done
    done
    return "$code"
}

if [[ "${1:-}" == "--on_node" ]]; then
    shift
    run_on_node "$@"
    exit
fi

[[ -n "${SLURM_JOB_ID:-}" ]] || die "this is a Slurm job: sbatch --nodes N --gpus-per-node G scripts/train.slurm.sh ..."
# Slurm runs a copy of this file, from a folder of its own.
cd "${SLURM_SUBMIT_DIR:-.}"
[[ -f scripts/train.slurm.sh ]] || die "$PWD is not the repository's root: call sbatch there"
command -v accelerate >/dev/null || export PATH="$PWD/.venv/bin:$PATH"

config="" script="" arguments=()
while (($#)); do
    case "$1" in
        --accelerate_config) config="${2:-}" && shift ;;
        --script_path) script="${2:-}" && shift ;;
        *) arguments+=("$1") ;;
    esac
    shift
done
known="$(for file in scripts/accelerate_configs/*.yaml; do basename "$file" .yaml; done | paste -sd ' ')"
config_file="scripts/accelerate_configs/$config.yaml"
[[ "$config" == *.yaml ]] && config_file="$config"
[[ -f "$config_file" ]] || die "--accelerate_config '$config' is unknown; one of: $known (or the path of a .yaml)"
[[ -f "$script" ]] || die "--script_path '$script' is no file; e.g. examples/llada/sft.py"
output_dir="$(value_of output_dir ${arguments[@]+"${arguments[@]}"})"
[[ -n "$output_dir" ]] || die "give --output_dir: a job that is started again looks there for its checkpoints"

mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
gpus="${SLURM_GPUS_ON_NODE:-${SLURM_GPUS_PER_NODE:-0}}"
per_node="${gpus##*:}" # h200:8
if grep -q '^use_cpu: true' "$config_file"; then
    per_node="$(awk '/^num_processes:/ {print $2}' "$config_file")"
fi
((per_node > 0)) || die "this job has no GPUs: sbatch --gpus-per-node N, or a configuration for CPUs (cpu, cpu_ddp)"

if compgen -G "$output_dir/checkpoint-[0-9]*" >/dev/null &&
    [[ -z "$(value_of resume_from_checkpoint "${arguments[@]}")" ]]; then
    arguments+=(--resume_from_checkpoint True)
fi
launch=(
    --config_file "$config_file"
    --num_machines "${#hosts[@]}"
    --num_processes "$((${#hosts[@]} * per_node))"
    --main_process_ip "${hosts[0]}"
    --main_process_port "$((20000 + SLURM_JOB_ID % 20000))" # jobs that share a node do not meet
)
# Otherwise accelerate would start the other nodes by itself, over ssh.
if grep -q '^distributed_type: DEEPSPEED' "$config_file"; then
    launch+=(--deepspeed_multinode_launcher standard)
fi

# How long torchrun lets processes save after SIGTERM, in seconds; its own 30 are soon over.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-600}"
echo "job $SLURM_JOB_ID, start $((${SLURM_RESTART_COUNT:-0} + 1)), on ${hosts[*]}:"
echo "  accelerate launch ${launch[*]} $script ${arguments[*]}"
srun --nodes "${#hosts[@]}" --ntasks "${#hosts[@]}" --ntasks-per-node 1 --kill-on-bad-exit=1 \
    ${SLURM_CPUS_PER_TASK:+--cpus-per-task "$SLURM_CPUS_PER_TASK"} \
    bash scripts/train.slurm.sh --on_node "${launch[@]}" "$script" "${arguments[@]}" &
step=$!
stopping=0
trap 'stopping=1; kill -USR1 "$step"' USR1
# scancel: the processes of the step get it too, and save if Slurm's KillWait suffices; the job does not come back.
trap ':' TERM
code=0
wait_for "$step" || code=$?
if ((stopping && code)); then
    # Also after a failure that came with the signal: the next start goes on from the newest whole checkpoint.
    echo "job $SLURM_JOB_ID ended after the signal (exit code $code): back into the queue"
    exec scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
