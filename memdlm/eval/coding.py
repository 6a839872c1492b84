"""Greedy pass@1 and forwards per problem on HumanEval and MBPP.

    python -m memdlm.eval.coding --model_name_or_path runs/tiny --task humaneval --data HumanEval.jsonl.gz \
        --max_new_tokens 256 --output runs/code/humaneval.json --allow_code_execution True

Generated programs are not run unless --allow_code_execution True says so: then in the sandbox that
docs/code_evaluation.md describes, or by evalplus where HUMANEVAL_OVERRIDE_PATH or MBPP_OVERRIDE_PATH names its data
file. Answers are kept as they come: the same command goes on where an earlier one stopped. `--help` lists every flag.
"""

from __future__ import annotations

import hashlib
import pathlib
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from rich.console import Console
from tqdm.auto import tqdm

from dllm.coding import evalplus
from dllm.coding.extract import build_program
from dllm.coding.problems import Problem, PromptKind, Task, load_problems
from dllm.coding.results import Result, ResultFile, summarise, table
from dllm.coding.sandbox import Limits, check_sandbox, run_programs
from dllm.core.samplers import BaseSampler, BaseSamplerConfig
from dllm.models.stamp import checkpoint_stamp
from dllm.utils.parsing import InputError, one_line_errors, parse_args
from memdlm.decoding import (
    Decoder,
    LoadFlags,
    MemoryFlags,
    SamplerFlags,
    find_sampler,
    memory_config,
    refuse_idle_memory,
    sampler_config,
)
from memdlm.sample import prompt_ids

MAX_NEW_TOKENS = 512  # where no flag and no preset says otherwise


def _option(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass
class CodeOptions:
    """What is evaluated, and how programs are run.

    Raises:
        InputError: a number out of its range, or a flag that has no effect beside the others.
    """

    task: Task = field(metadata={"help": "humaneval or mbpp."})
    output: str = field(metadata={"help": "JSON file of the results; one of the same settings is gone on with."})
    data: str | None = _option(None, "The benchmark's file, .jsonl or .jsonl.gz. None: evalplus's, by its variable.")
    all_rows: bool = _option(False, "mbpp: all rows of the file. False: those of the test split, 11 to 510.")
    prompt: PromptKind = _option("chat", "chat: asked in the chat template; raw: code to go on with.")
    limit: int | None = _option(None, "Only the first so many problems, at least 1. None: all.")
    batch_size: int = _option(8, "Problems decoded at a time, at least 1.")
    allow_code_execution: bool = _option(False, "Run the generated programs. False: the answers are kept, not judged.")
    num_workers: int = _option(2, "Programs that run at a time, at least 1.")
    timeout: float = _option(10.0, "Seconds that a program may take, above 0.")
    memory_mb: int = _option(1024, "Memory that a program may take, in MiB, at least 128.")

    def __post_init__(self) -> None:
        for name in ("limit", "batch_size", "num_workers"):
            value = vars(self)[name]
            if value is not None and value < 1:
                raise InputError(f"--{name} must be at least 1, got {value}")
        self.limits()
        variable, found = evalplus.OVERRIDES[self.task], evalplus.data_file(self.task)
        if self.data is not None and found is not None:
            raise InputError(f"--data {self.data} and {variable}={found} name two data files: drop one of them")
        if self.data is None and found is None:
            raise InputError(f"no data: give --data FILE of {self.task}, or set {variable} to a file of evalplus")
        if self.all_rows and (self.task != "mbpp" or self.data is None):
            raise InputError("--all_rows has an effect on mbpp with --data alone: drop it")
        if found is not None:
            evalplus.check_installed()

    def limits(self) -> Limits:
        """Of a program."""
        return Limits(seconds=self.timeout, memory_mb=self.memory_mb)

    def problems(self) -> list[Problem]:
        """What is asked."""
        if self.data is None:
            found = evalplus.load_plus_problems(self.task, str(evalplus.data_file(self.task)))
        else:
            found = load_problems(self.task, self.data, self.all_rows)
        return found[: self.limit]

    def identity(self) -> dict[str, Any]:
        """What decides the questions. Not: how many are asked, how many at a time, how programs are run."""
        path = self.data or str(evalplus.data_file(self.task))
        digest = hashlib.sha256(pathlib.Path(path).read_bytes()).hexdigest()
        return {"task": self.task, "data_sha256": digest, "all_rows": self.all_rows, "prompt": self.prompt}

    def execution(self) -> dict[str, Any]:
        """What decides the verdicts."""
        if self.data is None:
            return {"runner": "evalplus"}
        return {"runner": "dllm.coding.sandbox", **asdict(self.limits())}


def full_config(
    options: CodeOptions, load_flags: Any, config: BaseSamplerConfig, sampler_class: type[BaseSampler], memory: Any
) -> dict[str, Any]:
    """All that decides an answer.

    Args:
        options: of the evaluation.
        load_flags: a LoadFlags.
        config: of the sampler.
        sampler_class: what decodes.
        memory: a MemoryFlags.
    """
    loading = {name: value for name, value in vars(load_flags).items() if name != "device"}
    names = [value for name, value in loading.items() if name.endswith("name_or_path") and value is not None]
    return {
        **options.identity(),
        **loading,
        "checkpoints": [checkpoint_stamp(name) for name in names],
        "sampler": sampler_class.__name__,
        **{f"sampler_{name}": value for name, value in vars(config).items() if name != "histories"},
        "memory": asdict(memory_config(memory)) if memory.mem_enabled else None,
    }


def answer_all(
    decoder: Decoder, problems: Sequence[Problem], config: BaseSamplerConfig, options: CodeOptions, with_memory: bool
):
    """Results of `problems` without verdicts, batch by batch; the longest prompts first.

    Args:
        decoder: the model.
        problems: to be answered.
        config: of the sampler.
        options: kind of prompt, batch size.
        with_memory: write a memory from every prompt.

    Raises:
        InputError: a prompt that does not fit (the problem is named), or no chat template.
    """
    is_chat = options.prompt == "chat"
    if is_chat and decoder.tokenizer.chat_template is None:
        raise InputError("the tokenizer has no chat template: give --prompt raw")
    asked = [problem.chat_prompt() if is_chat else problem.raw_prompt() for problem in problems]
    jobs = [(prompt_ids(decoder, text, is_chat), problem) for text, problem in zip(asked, problems, strict=True)]
    jobs.sort(key=lambda job: -len(job[0]))
    with tqdm(total=len(jobs), desc=options.task, unit="problem") as bar:
        for start in range(0, len(jobs), options.batch_size):
            batch = jobs[start : start + options.batch_size]
            try:
                decoded = decoder.answer([ids for ids, _ in batch], config, with_memory=with_memory)
            except InputError as error:
                raise InputError(f"{batch[0][1].task_id}: {error}") from None
            yield _results(decoder, [problem for _, problem in batch], decoded, options.prompt)
            bar.update(len(batch))


def _results(decoder: Decoder, problems: Sequence[Problem], decoded: Any, kind: PromptKind) -> list[Result]:
    output = decoded.output
    counts = zip(*(count.tolist() for count in (output.nfe, output.cache_forwards, output.num_committed)), strict=True)
    seconds = (decoded.seconds + decoded.memory_seconds) / len(problems)
    made = []
    for problem, ids, (nfe, cache_forwards, num_tokens) in zip(problems, output.answers.tolist(), counts, strict=True):
        answer = decoder.text(ids)
        program = build_program(problem, answer, kind)
        made.append(Result(problem.task_id, answer, program, nfe, cache_forwards, num_tokens, seconds))
    return made


def judge(options: CodeOptions, problems: Sequence[Problem], file: ResultFile, console: Console) -> None:
    """Runs the programs that have no verdict yet, or all if earlier ones were run in another way.

    Raises:
        InputError: this machine cannot confine programs, or evalplus fails.
    """
    if file.execution != options.execution():
        file.execution = options.execution()
        file.add([_without_verdict(result) for result in file.results.values()])
    waiting = [problem for problem in problems if file.results[problem.task_id].passed is None]
    if not waiting:
        return
    if options.data is None:
        programs = {problem.task_id: file.results[problem.task_id].program for problem in waiting}
        verdicts = evalplus.evaluate(options.task, programs, str(evalplus.data_file(options.task)), options.num_workers)
        for name, (base, plus) in verdicts.items():
            result = file.results[name]
            result.passed, result.passed_plus = base, plus
            result.reason = None if base else "evalplus: a test failed"
        file.write()
        return
    console.print(check_sandbox(options.limits()), highlight=False)
    _run_all(options, waiting, file)


def _run_all(options: CodeOptions, waiting: Sequence[Problem], file: ResultFile) -> None:
    size = 8 * options.num_workers
    with tqdm(total=len(waiting), desc="running", unit="program") as bar:
        for start in range(0, len(waiting), size):
            part = waiting[start : start + size]
            pairs = [(file.results[problem.task_id].program, problem.tests) for problem in part]
            outcomes = run_programs(pairs, options.limits(), num_workers=options.num_workers)
            for problem, outcome in zip(part, outcomes, strict=True):
                result = file.results[problem.task_id]
                result.passed, result.reason = outcome.passed, outcome.reason
            file.write()
            bar.update(len(part))


def _without_verdict(result: Result) -> Result:
    result.passed = result.reason = result.passed_plus = None
    return result


def evaluate(
    options: CodeOptions, load_flags: Any, sampler_flags: Any, memory_flags: Any, console: Console
) -> dict[str, Any]:
    """Answers, judges, writes the result file, and returns the summary.

    Args:
        options: what is evaluated.
        load_flags, sampler_flags, memory_flags: see `memdlm.decoding`.
        console: for what is told on the way.

    Raises:
        InputError: whatever cannot be used: data, output, model, settings, this machine's sandbox.
    """
    refuse_idle_memory(memory_flags)
    sampler_class = find_sampler(load_flags, sampler_flags)
    config = sampler_config(sampler_flags, sampler_class, max_new_tokens=MAX_NEW_TOKENS, early_stop=True)
    problems = options.problems()
    file = ResultFile(options.output, full_config(options, load_flags, config, sampler_class, memory_flags))
    missing = [problem for problem in problems if problem.task_id not in file.results]
    known = len(problems) - len(missing)
    console.print(f"{options.task}: {len(missing)} problems to answer, {known} answered before", highlight=False)
    if missing:
        file.write()  # an output that cannot be written is told before anything is decoded
        decoder = Decoder.from_flags(load_flags, memory_flags, sampler_class)
        for results in answer_all(decoder, missing, config, options, memory_flags.mem_enabled):
            file.add(results)
    if options.allow_code_execution:
        judge(options, problems, file, console)
    results = [file.results[problem.task_id] for problem in problems]
    summary = summarise(results)
    file.write(summary=summary)
    reasons = Counter(result.reason.split(":")[0] for result in results if result.reason is not None)
    for reason, count in reasons.most_common(5):
        console.print(f"{count} failed: {reason}", markup=False, highlight=False)
    return summary


def main() -> None:
    """The command line."""
    options, load_flags, sampler_flags, memory_flags = parse_args(CodeOptions, LoadFlags, SamplerFlags, MemoryFlags)
    console = Console()
    summary = evaluate(options, load_flags, sampler_flags, memory_flags, console)
    console.print(table(options.task, summary), markup=False, highlight=False, soft_wrap=True, end="")
    if summary["pass@1"] is None:
        line = "the programs were not run: --allow_code_execution True runs those of this output, confined"
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    console.print(f"answers and verdicts are in {options.output}", markup=False, highlight=False, soft_wrap=True)


if __name__ == "__main__":
    try:
        with one_line_errors():
            main()
    except KeyboardInterrupt:
        print("interrupted: the same command goes on from the answers that are kept", file=sys.stderr)
        raise SystemExit(130) from None
