"""An lm-eval model for masked-diffusion LMs: what is asked, in which order, and what is kept of it.

Everything that lm-eval asks becomes jobs; equal ones are answered once, those that an earlier run answered are looked
up, and the rest goes to the model in batches, the longest first. Answers come back in the order of the requests.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar, get_type_hints

import torch
from lm_eval.api.instance import Instance
from torch import nn
from transformers import PreTrainedTokenizerBase

from dllm.core.eval.answers import Answer, AnswerStore, request_key
from dllm.core.eval.checkpoints import load, refuse_loading_arguments, stamps
from dllm.core.eval.config import BaseEvalConfig, parse_model_args, read_batch_size
from dllm.core.eval.generation import read_gen_kwargs
from dllm.core.eval.jobs import GenerationJob, Job, Kind, LikelihoodJob, decoding_batches
from dllm.core.eval.likelihood import Item, Scorer, item_states
from dllm.core.eval.processes import choose_device, device_name, join_processes
from dllm.core.eval.progress import Cost, Totals, interruptible, progress_bar, say
from dllm.core.eval.protocol import ProcessLM
from dllm.core.eval.scoring import Scoring
from dllm.core.eval.text import answer_text, encode, encode_pair, encode_prompt, fit, prefix_token_id, rolling_windows
from dllm.core.noising import derive_seed
from dllm.core.samplers import BaseSampler, BaseSamplerConfig
from dllm.models.backbone import unwrap

AnyJob = TypeVar("AnyJob", bound=Job)


class BaseEvalHarness(ProcessLM):
    """lm-eval's view of a masked-diffusion LM.

    A subclass names its model arguments (`config_class`), and these the sampler. Whatever must be in place while a
    prompt is decoded or scored (a memory, say) is put there by `context`.

    Args:
        batch_size: rows per forward, at least 1.
        max_batch_size: refused, since batch sizes are not searched for.
        device: where the model goes; None is cuda. Without CUDA it is the CPU, and one line says so.
        model, tokenizer: instead of loading `pretrained`; both, in eval mode and on their device.
        model_args: fields of `config_class`.

    Raises:
        InputError: an unknown or wrong argument, or whatever hinders loading (`dllm.models.auto.load_model`).
    """

    config_class: type[BaseEvalConfig] = BaseEvalConfig
    # Whether states of several contexts must not share a forward (see `context`).
    one_context_per_batch = False

    def __init__(
        self,
        *,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        device: str | None = None,
        model: nn.Module | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        **model_args: Any,
    ) -> None:
        super().__init__()
        if model is not None:
            model_args.setdefault("pretrained", unwrap(model).name_or_path or type(model).__name__)
        self.config = parse_model_args(self.config_class, model_args)
        self.batch_size = read_batch_size(batch_size, max_batch_size)
        if model is None:
            self._device = choose_device(device)
            join_processes(self._device)
            model, tokenizer = load(self.config, self._device)
        else:
            refuse_loading_arguments(self.config)
        assert tokenizer is not None, "model and tokenizer are given together"
        self.model, self.tokenizer = model, tokenizer
        self.lm = unwrap(model)
        self._join(self.lm.device)
        self.sampler = self.make_sampler(model, tokenizer)
        self.max_length = self.config.max_length or self.lm.config.max_position_embeddings
        self._answers = AnswerStore(self.config.answers_dir, self._rank)
        self._fingerprint: str | None = None
        self._totals = Totals()

    @classmethod
    def create_from_arg_obj(cls, arg_dict: dict[str, Any], additional_config: dict[str, Any] | None = None):
        """The harness from `--model_args` and the flags that lm-eval adds.

        Raises:
            InputError: a flag among the model arguments, or the errors of the constructor.
        """
        parse_model_args(cls.config_class, arg_dict)
        return super().create_from_arg_obj(arg_dict, additional_config)

    # What a subclass provides.

    def make_sampler(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> BaseSampler:
        """What decodes."""
        return self.config.sampler_class(model, tokenizer)

    def make_scorer(self) -> Scorer:
        """What likelihoods are computed with."""
        return Scorer(
            self.lm,
            self.sampler.mask_token_id,
            self.sampler.pad_token_id,
            self.guidance,
            self.config.mc_batch_size or self.batch_size,
            self.scoring_block_size,
        )

    def sampler_config(self, given: Mapping[str, Any]) -> BaseSamplerConfig:
        """The sampler's settings for a request (see `BaseEvalConfig.sampler_config`)."""
        return self.config.sampler_config(given)

    def decoding_cost(self, config: BaseSamplerConfig, prompt_length: int) -> tuple[int, int]:
        """(forwards, token-forwards) of decoding a row, both at most."""
        length = config.max_new_tokens
        forwards = length if config.steps is None else min(config.steps, length)
        return forwards, forwards * (prompt_length + length)

    def room(self, config: BaseSamplerConfig) -> int:
        """Most tokens of prompt and answer together, with these settings."""
        return self.max_length

    def draws(self, config: BaseSamplerConfig) -> bool:
        """Whether decoding with these settings depends on the seed."""
        return config.temperature > 0

    @property
    def guidance(self) -> float:
        """Scale of classifier-free guidance for likelihoods."""
        return 0.0

    @property
    def scoring_block_size(self) -> int | None:
        """Positions of a block where positions see no later block; None where they see each other."""
        return None

    @contextlib.contextmanager
    def context(self, prompts: Sequence[Sequence[int]], *, shared: bool = False) -> Iterator[list[str | None]]:
        """A block around the forwards over a batch of prompts; gives why a prompt goes without its memory, or None.

        Args:
            prompts: token ids, one per row; with `shared` one for all rows of whatever batch.
            shared: see there.
        """
        yield [None] * len(prompts)

    def forwards_per_write(self) -> float:
        """What `context` costs per prompt that it has not seen, in forwards over that prompt; 0 without memory."""
        return 0.0

    def fingerprint_parts(self) -> dict[str, Any]:
        """Everything, as JSON, that changes answers and is the same for all requests."""
        config = self.config
        return {
            "class": type(self).__name__,
            "checkpoints": stamps(config, self.lm.name_or_path),
            "dtype": str(self.lm.dtype),
            "attention": self.lm.config._attn_implementation,
            "load_in_4bit": config.load_in_4bit,
            "max_length": self.max_length,
            "truncation": config.truncation,
        }

    def counters(self) -> dict[str, Any]:
        """What this process did: numbers that add up over processes, and lists."""
        return dataclasses.asdict(self._totals)

    # Requests.

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """The answer to each request (context, generation settings), cut at its stop strings and end-of-text.

        Raises:
            InputError: an unknown setting, a prompt that is too long.
            Interrupted: Ctrl-C.
        """
        jobs = self._generation_jobs(requests)
        return self._run("generate_until", len(requests), jobs, self._generate)

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """(log-likelihood in nats, whether greedy decoding gives it) of each request (context, continuation).

        Raises:
            InputError: a request that is too long.
            Interrupted: Ctrl-C.
        """
        jobs: dict[str, LikelihoodJob] = {}
        for index, request in enumerate(requests):
            context, continuation = map(str, request.args)
            key = self._key("loglikelihood", context, continuation, self.config.check_greedy, *self._likelihood_key())
            if key not in jobs:
                before, target = encode_pair(self.tokenizer, context, continuation)
                before, dropped = self._fit(before, len(target), request, self.max_length)
                items = [Item(tuple(before), tuple(target))]
                jobs[key] = LikelihoodJob((context, continuation), key, num_dropped=dropped, items=items)
            jobs[key].requests.append(index)
        found = self._run("loglikelihood", len(requests), list(jobs.values()), self._score)
        return [(value, is_greedy) for value, is_greedy in found]

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        """The log-likelihood in nats of each text, block by block (see `rolling_windows`)."""
        jobs: dict[str, LikelihoodJob] = {}
        for index, request in enumerate(requests):
            text = str(request.args[0])
            key = self._key("loglikelihood_rolling", text, *self._likelihood_key())
            if key not in jobs:
                tokens = encode(self.tokenizer, text)
                windows = rolling_windows(tokens, prefix_token_id(self.tokenizer), self.max_length)
                items = [Item(tuple(context), tuple(block)) for context, block in windows]
                jobs[key] = LikelihoodJob((text,), key, items=items)
            jobs[key].requests.append(index)
        return self._run("loglikelihood_rolling", len(requests), list(jobs.values()), self._score_texts)

    def _generation_jobs(self, requests: Sequence[Instance]) -> list[GenerationJob]:
        hints = get_type_hints(self.config_class)
        hints = {name: hints[name] for name in self.config.sampler_fields}
        jobs: dict[str, GenerationJob] = {}
        seen: dict[int, int] = {}
        for index, request in enumerate(requests):
            text, gen_kwargs = _pair(request)
            until, given = read_gen_kwargs(gen_kwargs, hints)
            config = self.sampler_config(given)
            # lm-eval asks the same instance again for each further sample of it.
            repeat = seen[id(request)] = seen.get(id(request), -1) + 1
            if repeat and self.draws(config):
                config = dataclasses.replace(config, seed=derive_seed("repeat", config.seed, repeat))
            key = self._key("generate_until", text, until, dataclasses.asdict(config))
            if key not in jobs:
                prompt = encode_prompt(self.tokenizer, text)
                prompt, dropped = self._fit(prompt, config.max_new_tokens, request, self.room(config))
                job = GenerationJob((text, gen_kwargs), key, [], dropped, prompt, config, until)
                jobs[key] = job
            jobs[key].requests.append(index)
        return list(jobs.values())

    def _fit(self, context: list[int], num_behind: int, request: Instance, room: int) -> tuple[list[int], int]:
        what = f"{request.task_name or 'request'} document {request.doc_id}"
        return fit(context, num_behind, room, self.config.truncation, what)

    def _key(self, *parts: Any) -> str:
        if self.config.answers_dir is None:
            return request_key("", *parts)
        if self._fingerprint is None:
            self._fingerprint = request_key("", self.fingerprint_parts())
        return request_key(self._fingerprint, *parts)

    def _likelihood_key(self) -> tuple[Any, ...]:
        return self.config.mc_num, self.config.seed, self.guidance, self.scoring_block_size

    # Running them.

    def _run(
        self,
        kind: Kind,
        num_requests: int,
        jobs: Sequence[AnyJob],
        work: Callable[[Sequence[AnyJob]], Iterator[tuple[AnyJob, Answer]]],
    ) -> list[Any]:
        found = {job.key: answer for job in jobs if (answer := self._answers.get(job.key)) is not None}
        todo = [job for job in jobs if job.key not in found]
        self._totals.num_resumed += sum(len(job.requests) for job in jobs if job.key in found)
        self._totals.num_truncated += sum(len(job.requests) for job in jobs if job.num_dropped)
        cost = self._cost(kind, todo)
        cost.num_known = len(found)
        say(cost.line(kind, self._world_size))
        results: list[Any] = [None] * num_requests
        for job in jobs:
            if job.key in found:
                self._keep(kind, job, found[job.key], results)
        with interruptible(kind, results, self.config.answers_dir), progress_bar(len(todo), kind) as bar:
            for job, answer in work(todo):
                self._answers.add(job.key, answer)
                self._totals.fresh_tokens += answer.num_tokens
                self._keep(kind, job, answer, results)
                bar.update()
        if self._totals.without_memory:
            say(self._totals.failures_line())
        return results

    def _keep(self, kind: Kind, job: Job, answer: Answer, results: list[Any]) -> None:
        value = tuple(answer.value) if kind == "loglikelihood" else answer.value
        for index in job.requests:
            results[index] = value
        self.cache_hook.add_partial(kind, job.args, value)
        self._totals.num_requests += len(job.requests)
        self._totals.nfe += answer.nfe
        self._totals.cache_forwards += answer.cache_forwards
        self._totals.num_tokens += answer.num_tokens
        self._totals.num_answers += 1
        if answer.without_memory is not None:
            listed = {"request": str(job.args[0])[:60], "reason": answer.without_memory}
            self._totals.without_memory += [listed] * len(job.requests)

    def _cost(self, kind: Kind, jobs: Sequence[Job]) -> Cost:
        greedy = self.config.check_greedy and kind == "loglikelihood"
        twice = self.make_scorer().forwards_per_row
        cost = Cost(num_requests=len(jobs), num_truncated=sum(job.num_dropped > 0 for job in jobs))
        contexts: set[tuple[int, ...]] = set()
        for job in jobs:
            if isinstance(job, GenerationJob):
                contexts.add(tuple(job.prompt))
                cost.add(len(job.prompt), job.config.max_new_tokens, *self.decoding_cost(job.config, len(job.prompt)))
            elif isinstance(job, LikelihoodJob):
                for item in job.items:
                    contexts.add(item.context)
                    states = item_states(item, self.config.mc_num, self.scoring_block_size)
                    states = (states + greedy * len(item.target)) * twice
                    length = len(item.context) + len(item.target)
                    cost.add(len(item.context), len(item.target), states, states * length)
        per_write = self.forwards_per_write()
        if per_write:
            cost.num_written, cost.adapting = len(contexts), per_write * sum(map(len, contexts))
        return cost

    # The model at work.

    def _generate(self, jobs: Sequence[GenerationJob]) -> Iterator[tuple[GenerationJob, Answer]]:
        ends: list[Any] = self.sampler.end_token_ids
        for batch in decoding_batches(jobs, self.batch_size):
            prompts = [job.prompt for job in batch]
            with self.context(prompts) as failures:
                started = time.perf_counter()
                output = self.sampler.sample(prompts, batch[0].config)
                assert output.answers is not None and output.nfe is not None
                assert output.num_committed is not None and output.cache_forwards is not None
                answers = output.answers.tolist()
                self._totals.seconds += time.perf_counter() - started
            counts = torch.stack([output.nfe, output.num_committed, output.cache_forwards], dim=1).tolist()
            for job, answer, own, failure in zip(batch, answers, counts, failures, strict=True):
                nfe, committed, cache_forwards = own
                text = answer_text(self.tokenizer, answer, ends, job.until)
                yield job, Answer(text, nfe, committed, failure, cache_forwards)

    def _score(self, jobs: Sequence[LikelihoodJob]) -> Iterator[tuple[LikelihoodJob, Answer]]:
        return self._scoring().run(jobs, self.config.check_greedy)

    def _score_texts(self, jobs: Sequence[LikelihoodJob]) -> Iterator[tuple[LikelihoodJob, Answer]]:
        for job, answer in self._scoring().run(jobs, greedy=False):
            yield job, dataclasses.replace(answer, value=answer.value[0])

    def _scoring(self) -> Scoring:
        mc_num, seed = self.config.mc_num, self.config.seed
        return Scoring(self.make_scorer(), self.context, self.one_context_per_batch, mc_num, seed, self._totals)

    # Results.

    @property
    def eot_token_id(self) -> int:
        """Id of the end-of-text token, for lm-eval's report."""
        return self.sampler.eos_token_id

    def get_model_info(self) -> dict[str, Any]:
        """What lm-eval writes into the configuration of its results: settings, model, device, and what the run took."""
        total = self.all_counters()
        answers = max(total["num_answers"], 1)
        seconds = total["seconds"] / self._world_size
        return {
            "eval_config": dataclasses.asdict(self.config),
            "eval_batch_size": self.batch_size,
            "eval_max_length": self.max_length,
            "model_num_parameters": self.lm.num_parameters(),
            "model_dtype": str(self.lm.dtype),
            "model_device": device_name(self.lm.device),
            "model_attention": self.lm.config._attn_implementation,
            "num_processes": self._world_size,
            "num_requests": total["num_requests"],
            "num_resumed": total["num_resumed"],
            "num_truncated": total["num_truncated"],
            "mean_nfe": total["nfe"] / answers,
            "mean_cache_forwards": total["cache_forwards"] / answers,
            "tokens_per_forward": total["num_tokens"] / max(total["nfe"], 1),
            "tokens_per_second": total["fresh_tokens"] / seconds if seconds else 0.0,
            "decode_seconds": seconds,
        }


def _pair(request: Instance) -> tuple[str, dict[str, Any]]:
    text, gen_kwargs = request.args  # pyright: ignore[reportAssignmentType] (annotated as an empty tuple)
    return text, gen_kwargs
