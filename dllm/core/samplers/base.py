"""What every sampler has: a configuration, an output, a model to ask.

Shapes: B rows, L columns of what is decoded, W columns of a forward.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import nn

from dllm.core.noising import derive_seed
from dllm.models.backbone import DiffusionLMOutput, unwrap
from dllm.models.relay_norm import warn_idle_relay
from dllm.models.spec import spec_of
from dllm.utils.parsing import InputError
from dllm.utils.tokens import token_id

Prompt = Sequence[int] | torch.Tensor
Observer = Callable[[torch.Tensor], None]


def check_count(name: str, value: Any, least: int = 1) -> None:
    """Nothing, if the setting `name` is a whole number, not below `least`.

    Raises:
        InputError: it is another one, or something else.
    """
    if type(value) is not int or value < least:
        raise InputError(f"{name} must be at least {least} and a whole number, got {value!r}")


@dataclass
class BaseSamplerConfig:
    """Settings that all samplers share.

    Raises:
        InputError: a value out of its range.
    """

    max_new_tokens: int = 128  # length of the answer that `sample` makes, at least 1
    block_size: int | None = None  # positions decoded before the next ones are begun, at least 1; None: all at once
    steps: int | None = None  # most denoising steps in all, at least one per block; None: one per masked token
    temperature: float = 0.0  # of the Gumbel noise; 0 takes the likeliest token and draws nothing
    seed: int = 0  # of every draw, together with the prompt (see `sample`)
    suppress_tokens: tuple[int, ...] = ()  # ids that are never proposed; the mask token never is
    early_stop: bool = False  # a row ends with its first end-of-text token
    histories: bool = False  # keep the state after every step

    def __post_init__(self) -> None:
        check_count("max_new_tokens", self.max_new_tokens)
        for name in ("block_size", "steps"):
            if getattr(self, name) is not None:
                check_count(name, getattr(self, name))
        if not 0 <= self.temperature < math.inf:
            raise InputError(f"temperature must be at least 0 and finite, got {self.temperature}")


@dataclass(frozen=True)
class BaseSamplerOutput:
    """What a sampler made, on the model's device."""

    # [B, L] int64. `infill`: the filled-in ids. `sample`: prompt, answer, then padding of the shorter rows.
    sequences: torch.Tensor
    # [B, G] int64, `sample` alone: the answers; with early_stop, padding after the end-of-text token.
    answers: torch.Tensor | None = None
    # [B] int64: denoising forwards of a row, those in which it had something to fill in (or to edit); one with
    # classifier-free guidance counts twice. Forwards that only other rows of the batch needed do not count.
    nfe: torch.Tensor | None = None
    # [B] int64: what a row needed besides. Forwards that fill a cache and nothing else; with shifted logits those over
    # a finished block, which give the first token of the next one (in blocks of one token they are all there is: nfe).
    cache_forwards: torch.Tensor | None = None
    # int64, no dimensions: denoising forwards of the batch, those that at least one row needed.
    batch_forwards: torch.Tensor | None = None
    # [B] int64: tokens that were committed, those behind an end-of-text not counted.
    num_committed: torch.Tensor | None = None
    # State after every step, each laid out as `sequences`; only if asked for.
    histories: list[torch.Tensor] | None = None

    @property
    def tokens_per_forward(self) -> torch.Tensor:
        """num_committed / nfe, float32 [B]; 0 for a row that needed no forward."""
        assert self.num_committed is not None and self.nfe is not None
        return torch.where(self.nfe > 0, self.num_committed / self.nfe.clamp(min=1), 0.0)

    @property
    def batch_nfe(self) -> torch.Tensor:
        """batch_forwards + 1, the count published for Sudoku (Relay, arXiv 2605.22967), int64 without dimensions.

        One number for all rows, finished or not, so it depends on which rows share the batch. The published decoder
        always takes one more forward at the end, which this one does not need; it is counted to keep numbers
        comparable.
        """
        assert self.batch_forwards is not None
        return self.batch_forwards + 1


@dataclass(frozen=True)
class Visit:
    """What a forward of a sampler is for: all that whoever carries a state per row from one denoising step to the next
    (`BaseSampler.run_model`) needs to know. Row b of every forward of a call is row b of what is decoded.

    A carried state belongs to (pass_index, row, column). It is read and replaced at `columns` in the rows that are
    `active`, and in no others: then a batch of B decodes like B singles. At the columns that are `settled` nothing
    carried is added to the input: their keys and values outlive the step, and must be those of the tokens alone.
    Columns behind a row's own block of a block-causal model may be visited too, depending on the other rows and the
    cache: what is carried there must be forgotten when `start` changes.
    """

    columns: torch.Tensor  # int64 [B, W], where each input token stands, 0 to L - 1
    active: torch.Tensor  # bool [B], rows with something to fill in (or to edit) by the logits of this forward
    start: torch.Tensor  # int64 [B], first column of the block that the row is in
    width: int  # L, so that a state [B, L, D] can be made
    reveals: bool = True  # False: no row is active, the forward only fills a cache
    # bool [B or 1, W]; None: none. Finished blocks of a block-causal model, cached or not; with an approximate cache
    # what its first forward keeps outside the window, tokens of later blocks (still masked) among them.
    settled: torch.Tensor | None = None
    pass_index: int = 0  # with classifier-free guidance 0 sees the given tokens and 1 does not


class BaseSampler(ABC):
    """Fills in mask tokens with a masked-diffusion LM.

    Args:
        model: a model of `dllm.models`, plain or wrapped. It is called in the mode it is in: put it in eval mode. If it
            has a relay and the sampler carries no state, one line says so.
        tokenizer: gives the mask, padding and end-of-text tokens.
    """

    config_class: type[BaseSamplerConfig] = BaseSamplerConfig
    presets: Mapping[str, Mapping[str, Any]] = {}  # published settings by name
    # Whether `run_model` adds to the input something that it carries from step to step. Keys and values of a block are
    # then computed once more when it is finished, though its last step may have changed none of its tokens.
    carries_state: bool = False

    def __init__(self, model: nn.Module, tokenizer: transformers.PreTrainedTokenizerBase) -> None:
        self.model = model
        self.mask_token_id = token_id(tokenizer, "mask_token")
        self.pad_token_id = token_id(tokenizer, "pad_token")
        self.eos_token_id = token_id(tokenizer, "eos_token")
        self.lm = unwrap(model)
        self.spec = spec_of(self.lm)
        if self.lm.backbone.relay_layer_norm is not None and not self.carries_state:
            warn_idle_relay(self.lm, "no hidden state is carried from step to step (samplers of memdlm.relay carry it)")
        turn = tokenizer.get_vocab().get(self.spec.end_of_turn_token)
        # What ends an answer: the end of the text, or of the turn in a chat.
        self.end_token_ids = sorted({self.eos_token_id, *([] if turn is None else [turn])})

    def begin(self, num_rows: int, width: int) -> None:  # noqa: B027 (a hook that need not be overridden)
        """Called before the first forward of every `sample` and `infill`, with B and L; does nothing here."""

    def run_model(self, visit: Visit, **inputs: Any) -> DiffusionLMOutput:
        """The model's output on `inputs` (as in `DiffusionLM.forward`): every forward of a sampler goes through here.

        Args:
            visit: what the forward is for; a subclass that carries a state between denoising steps goes by it.
        """
        return self.model(**inputs)

    @abstractmethod
    def sample(
        self,
        prompts: Sequence[Prompt],
        config: BaseSamplerConfig | None = None,
        *,
        seeds: Sequence[int] | None = None,
        on_step: Observer | None = None,
    ) -> BaseSamplerOutput:
        """An answer of `max_new_tokens` tokens to every prompt.

        A batch of B prompts, of whatever lengths, gives what B calls with one prompt give: row by row the same tokens
        (up to rounding: products of other sizes round in another way).

        Args:
            prompts: token ids of each prompt, at least one token each. Mask tokens among them stay as they are.
            config: settings of this sampler; None takes the defaults.
            seeds: of the draws of each row. None: a row's draws follow from config.seed and its prompt, so one prompt
                always gives one answer; give other seeds to sample it more than once.
            on_step: called after every step with the state [B, L], laid out as `sequences`.

        Raises:
            InputError: no prompt, an empty one, one with unknown tokens, or more tokens than the model has positions;
                fewer steps than blocks; a setting that does not fit the model.
        """

    @abstractmethod
    def infill(
        self,
        noised_ids: torch.Tensor,
        config: BaseSamplerConfig | None = None,
        attention_mask: torch.Tensor | None = None,
        *,
        seeds: Sequence[int] | None = None,
        on_step: Observer | None = None,
    ) -> BaseSamplerOutput:
        """`noised_ids` [B, L] with a token in the place of every mask; blocks are counted from the first position.

        Args:
            noised_ids: int64 [B, L].
            config: settings of this sampler; `max_new_tokens` and `early_stop` do not matter here.
            attention_mask: [B, L], 1 at real tokens; padding stands at the end of rows. None: all are real.
            seeds, on_step: as in `sample`.

        Raises:
            InputError: ids or mask of another shape, padding elsewhere, unknown tokens, too long rows, early_stop; a
                first token that is masked where the model cannot predict it.
        """

    def checked_config(self, config: BaseSamplerConfig | None) -> BaseSamplerConfig:
        """`config`, or the defaults.

        Raises:
            InputError: the settings of another sampler; suppressed tokens that the model does not know, or all.
        """
        settings = self.config_class() if config is None else config
        if not isinstance(settings, self.config_class):
            raise InputError(
                f"{type(self).__name__} takes a {self.config_class.__name__}, got a {type(settings).__name__}"
            )
        size = self.lm.backbone.embedding.num_embeddings
        wrong = [token for token in settings.suppress_tokens if not 0 <= token < size]
        if wrong:
            raise InputError(f"suppress_tokens holds {wrong[0]}, the model knows 0 to {size - 1}: drop it")
        if len({self.mask_token_id, *settings.suppress_tokens}) >= size:
            raise InputError("suppress_tokens leaves no token to propose: drop some")
        return settings

    def check_room(self, length: int, made_of: str) -> None:
        """Nothing, if the model has `length` positions.

        Raises:
            InputError: it has fewer.
        """
        most = self.lm.config.max_position_embeddings
        if length > most:
            raise InputError(
                f"{made_of} need {length} positions and the model has {most}: shorten the text or lower max_new_tokens"
            )

    def checked_infill(
        self, noised_ids: torch.Tensor, attention_mask: torch.Tensor | None, config: BaseSamplerConfig
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(ids [B, L], which are real, which are to be filled in; bool [B, L]) on the model's device; see `infill`."""
        if config.early_stop:
            raise InputError("early_stop has no effect on infilling: drop it")
        if noised_ids.dim() != 2 or noised_ids.numel() == 0:
            raise InputError(f"infilling takes ids of shape [rows, length], got {list(noised_ids.shape)}")
        if attention_mask is not None and attention_mask.shape != noised_ids.shape:
            raise InputError(
                f"attention_mask has shape {list(attention_mask.shape)}, expected {list(noised_ids.shape)}"
            )
        ids = noised_ids.to(self.lm.backbone.device)
        real = (
            torch.ones_like(ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool().to(ids.device)
        )
        if bool((real[:, 1:] & ~real[:, :-1]).any()):
            raise InputError("infilling takes padding at the end of rows only: set padding_side='right'")
        self._check_known(int(ids.min()), int(ids.max()))
        self.check_room(ids.shape[1], "the rows")
        is_masked = (ids == self.mask_token_id) & real
        if self.spec.logit_shift and bool(is_masked[:, : self.spec.logit_shift].any()):
            raise InputError("the first token of a row is masked, which this model cannot predict: begin with a token")
        return ids, real, is_masked

    def _check_known(self, lowest: int, highest: int) -> None:
        size = self.lm.backbone.embedding.num_embeddings
        if lowest < 0 or highest >= size:
            raise InputError(
                f"there are token ids from {lowest} to {highest}, the model knows 0 to {size - 1}: use the tokenizer "
                "that belongs to the model"
            )

    def token_lists(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        """The prompts as lists.

        Raises:
            InputError: there is none, an empty one, or one with unknown tokens.
        """
        rows = [[int(token) for token in prompt] for prompt in prompts]
        if not rows or not all(rows):
            raise InputError("a prompt needs at least one token: drop the empty ones, or begin them with the bos token")
        self._check_known(min(map(min, rows)), max(map(max, rows)))
        return rows

    def check_seeds(self, seeds: Sequence[int] | None, num_rows: int) -> None:
        """Nothing, if there is a seed for each row, or none at all.

        Raises:
            InputError: another number.
        """
        if seeds is not None and len(seeds) != num_rows:
            raise InputError(f"{len(seeds)} seeds for {num_rows} rows: give one for each")

    def row_keys(self, seed: int, seeds: Sequence[int] | None, rows: Sequence[Sequence[int]]) -> torch.Tensor:
        """Keys of the rows' draws (see `dllm.core.reveal.hashed_uniform`), int64 [B], on the model's device.

        Args:
            seed: config.seed.
            seeds: one for each row; None: its tokens.
            rows: the tokens.
        """
        parts = rows if seeds is None else [[own] for own in seeds]
        return torch.tensor([derive_seed(seed, *part) for part in parts], device=self.lm.backbone.device)

    def is_end(self, ids: torch.Tensor) -> torch.Tensor:
        """Which tokens end an answer, bool."""
        # Compared one by one: a tensor of them would be copied to the device in every step.
        found = torch.zeros_like(ids, dtype=torch.bool)
        for token in self.end_token_ids:
            found |= ids == token
        return found

    def behind_the_end(self, answers: torch.Tensor) -> torch.Tensor:
        """Which positions of the answers [B, G] stand behind their first end token, bool [B, G]."""
        ends = self.is_end(answers)
        return (ends.cumsum(dim=1) - ends.long()) > 0

    def is_complete(self, ids: torch.Tensor, masked: torch.Tensor, first: torch.Tensor | int) -> torch.Tensor:
        """Which answers have an end token with no mask before it, bool [B]: what stands behind it does not matter.

        Args:
            ids: int64 [B, L].
            masked: bool [B, L], positions still to be filled in.
            first: int64 [B], or one for all: the column in which each answer begins.
        """
        columns = torch.arange(ids.shape[1], device=ids.device)
        begins = first[:, None] if isinstance(first, torch.Tensor) else first
        return (self.is_end(ids) & (columns >= begins) & (masked.cumsum(dim=1) == 0)).any(dim=1)

    def banned(self, config: BaseSamplerConfig) -> torch.Tensor:
        """Ids that are never proposed, int64, on the model's device."""
        return torch.tensor([self.mask_token_id, *config.suppress_tokens], device=self.lm.backbone.device)
