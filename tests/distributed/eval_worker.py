"""One process of tests/distributed/test_eval_ddp.py: evaluates local tasks; rank 0 writes what came out to a file."""

import json
import pathlib
import sys

from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager
from lm_eval.utils import handle_non_serializable

from dllm.core.eval.processes import leave_processes
from memdlm.eval.harness import MemoryMDLMHarness

TASKS = {
    "made": """
output_type: generate_until
doc_to_text: "{{text}}"
doc_to_target: "x"
generation_kwargs: {max_gen_toks: 4, until: []}
metric_list: [{metric: exact_match}]
""",
    "chosen": """
output_type: multiple_choice
doc_to_text: "{{text}}"
doc_to_choice: [" the sea", " x", " a b"]
doc_to_target: 1
metric_list: [{metric: acc}]
""",
    "read": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: word_perplexity}, {metric: bits_per_byte}]
""",
}


def write_tasks(folder: pathlib.Path, texts: list[str]) -> None:
    data = folder / "data.json"
    data.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    for name, body in TASKS.items():
        head = f"task: {name}\ndataset_path: json\ntest_split: train\nnum_fewshot: 0\n"
        files = f"dataset_kwargs: {{data_files: {json.dumps(str(data))}}}"
        (folder / f"{name}.yaml").write_text(head + files + body)


def evaluate(folder: pathlib.Path, arguments: dict) -> dict | None:
    """Results on rank 0, None elsewhere."""
    results = simple_evaluate(
        MemoryMDLMHarness(device="cpu", **arguments),
        tasks=list(TASKS),
        task_manager=TaskManager(include_path=str(folder), include_defaults=False),
        bootstrap_iters=0,
    )
    if results is None:
        return None
    kept = {name: results[name] for name in ("results", "samples", "config")}
    return json.loads(json.dumps(kept, default=handle_non_serializable))


def main() -> None:
    folder, output, arguments = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]), json.loads(sys.argv[3])
    results = evaluate(folder, arguments)
    if results is not None:
        output.write_text(json.dumps(results))
    leave_processes()


if __name__ == "__main__":
    main()
