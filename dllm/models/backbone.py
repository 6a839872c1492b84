"""One decoder loop for all our families. A family supplies embedding, layers, norms and head; this file runs them.

Shapes: B rows, L positions, P cached positions, D hidden, V vocabulary, E experts, T = B * L, N chosen positions.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch
from accelerate.utils import extract_model_from_parallel
from peft import PeftModel
from torch import nn
from torch.nn.attention.flex_attention import BlockMask
from torch.utils.checkpoint import checkpoint as run_checkpointed
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils.generic import ModelOutput

from dllm.core.attention import prepare_mask
from dllm.core.carry import Carry
from dllm.core.split import LayerInputs, SplitCallback, SplitState
from dllm.models.layers import RMSNorm, RotaryEmbedding, pick
from dllm.models.moe import Router, RouterRecorder, RouterScores, load_balancing_loss
from dllm.models.relay_norm import RELAY_NORM, RelayKeys, RelayNorm, relay_keys

Mask = torch.Tensor | BlockMask


@dataclass
class BackboneOutput(ModelOutput):
    """Result of `Backbone.forward`.

    last_hidden_state: after the final norm, [B, L, D].
    hidden_states: if asked for; entry i is the input of layer i, the last entry is `last_hidden_state`.
    router_logits, router_choices: if asked for; one [T, E] and one int64 [T, k] per MoE layer.
    """

    last_hidden_state: torch.Tensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    router_logits: tuple[torch.Tensor, ...] | None = None
    router_choices: tuple[torch.Tensor, ...] | None = None


@dataclass
class DiffusionLMOutput(ModelOutput):
    """Result of `DiffusionLM.forward`.

    logits: [B, L, V], or [N, V] with `logit_positions`.
    hidden_states, router_logits: if asked for, as in `BackboneOutput`.
    aux_loss: load-balancing loss, unweighted, a scalar; set together with `router_logits`.
    """

    logits: torch.Tensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    router_logits: tuple[torch.Tensor, ...] | None = None
    aux_loss: torch.Tensor | None = None


class FamilyModel(PreTrainedModel):
    """What backbones and language models share: capabilities and the initialisation of weights."""

    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _skip_keys_device_placement = ["past_key_values"]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        # The functions of `init` skip parameters that a checkpoint has already filled.
        std = self.config.initializer_range
        if isinstance(module, (nn.Linear, nn.Embedding, Router)):
            init.normal_(module.weight, mean=0.0, std=std)
        if isinstance(module, nn.Linear) and module.bias is not None:
            init.zeros_(module.bias)
        if isinstance(module, nn.Embedding) and module.padding_idx is not None:
            self._zero_padding_row(module)
        if isinstance(module, RMSNorm):
            init.ones_(module.weight)
        if isinstance(module, RelayNorm):
            init.constant_(module.weight, 0.0 if module.gate == "zero" else 1.0)
            init.zeros_(module.bias)

    @staticmethod
    def _zero_padding_row(embedding: nn.Embedding) -> None:
        # A slice has lost the flag that says "filled from a checkpoint", so it is looked up on the whole weight.
        if not embedding.weight.__dict__.get("_is_hf_initialized", False):
            init.zeros_(embedding.weight[embedding.padding_idx])


class Backbone(FamilyModel):
    """Embedding, layers, final norm.

    A family sets `rotary_emb` and provides `embedding`, `layers` and `final_norm`; a layer is called as
    `layer(hidden, **layer_inputs)` and returns one tensor [B, L, D] (in a replay also as `layer(..., wanted=...)`, see
    `run_layers`). Its configuration has `initializer_range` and `output_router_logits`.
    """

    rotary_emb: RotaryEmbedding
    layers: nn.ModuleList
    embedding: nn.Embedding
    final_norm: RMSNorm | nn.LayerNorm
    relay_layer_norm: nn.Module | None  # memdlm.relay; under PEFT a wrapper around it

    def __init__(self, config) -> None:
        super().__init__(config)
        # Set by dllm.core.split.at_layer.
        self.split_layer: int = -1
        self.split_callback: SplitCallback | None = None
        # Set by dllm.core.carry.carrying.
        self.carry: Carry | None = None
        self.register_module(RELAY_NORM, None)

    def post_init(self) -> None:
        """As in transformers, after the relay's norm has been built where the configuration asks for one."""
        keys = relay_keys(self.config)
        if keys is not None:
            self._build_relay_norm(keys)
        super().post_init()

    def add_relay_norm(self, keys: RelayKeys) -> None:
        """Gives the model a new relay norm, in the dtype and on the device of the embedding, and notes it in the
        configuration.

        Raises:
            ValueError: it has one.
        """
        if self.relay_layer_norm is not None:
            raise ValueError("the model has a relay norm already: nothing is to be added")
        weight = self.embedding.weight
        self._build_relay_norm(keys).to(weight.device, weight.dtype)
        for name, value in keys.as_config().items():
            setattr(self.config, name, value)

    def _build_relay_norm(self, keys: RelayKeys) -> RelayNorm:
        norm = RelayNorm(self.config.hidden_size, self.final_norm.eps, keys.gate)
        self.relay_layer_norm = norm
        return norm

    def scale_embeddings(self, hidden: torch.Tensor) -> torch.Tensor:
        """What a family does to the embeddings [B, L, D] before the first layer; nothing unless it says otherwise."""
        return hidden

    def get_input_embeddings(self) -> nn.Embedding:
        """The token embedding."""
        return self.embedding

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: Mask | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool = False,
        output_hidden_states: bool = False,
        output_router_logits: bool = False,
        stop_at: int | None = None,
    ) -> BackboneOutput | SplitState:
        """Hidden states after the final norm; with `stop_at` = i the state before layer i, computing nothing above it.

        Args:
            input_ids: int64 [B, L]; or `inputs_embeds`, [B, L, D].
            attention_mask: see `dllm.core.attention.prepare_mask`.
            position_ids: int64 [B or 1, L]; None counts on from the cache: P, P + 1, ...
            past_key_values: keys and values of P positions before these; the new ones are appended to it.
            use_cache: start an empty cache when none is given.
            output_hidden_states, output_router_logits: what else to return.
            stop_at: 0 (the embeddings) to num_layers.

        Raises:
            ValueError: both or neither of input_ids and inputs_embeds; a cache together with a split point, or with
                activation checkpointing in training; recorded outputs together with stop_at; no router to record.
        """
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache()
        self._check_request(past_key_values, stop_at, output_hidden_states or output_router_logits)
        hidden = self.embed(input_ids, inputs_embeds)
        recorder = RouterRecorder() if output_router_logits else None
        layer_inputs = self._layer_inputs(hidden, attention_mask, position_ids, past_key_values, recorder)
        states: list[torch.Tensor] = []
        for index, layer in enumerate(self.layers):
            if index == stop_at:
                return SplitState(hidden, for_replay(layer_inputs))
            if index == self.split_layer:
                hidden = self._call_back(hidden, layer_inputs)
            if output_hidden_states:
                states.append(hidden)
            hidden = layer(hidden, **layer_inputs)
            if self.carry is not None and stop_at is None:
                self.carry.take(index, hidden)
        if stop_at is not None:
            return SplitState(hidden, for_replay(layer_inputs))
        hidden = self.final_norm(hidden)
        if self.carry is not None:
            self.carry.take(len(self.layers), hidden)
        logits, choices = recorder.close() if recorder is not None else (None, None)
        if recorder is not None and not logits:
            raise ValueError("the model has no routed experts: drop output_router_logits")
        return BackboneOutput(
            last_hidden_state=hidden,
            past_key_values=past_key_values,
            hidden_states=(*states, hidden) if output_hidden_states else None,
            router_logits=logits,
            router_choices=choices,
        )

    def run_layers(
        self,
        hidden: torch.Tensor,
        layer_inputs: LayerInputs,
        start: int,
        checkpoint: bool = False,
        wanted: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Layers `start` and up and the final norm: [B, L, D], or [R, n, D] at the positions `wanted`.

        Feeds no cache, recorder or split callback.

        Args:
            hidden: input of layer `start`, [B, L, D].
            layer_inputs: as a `SplitState` or a split callback brings them.
            start: 0 to num_layers (the final norm alone).
            checkpoint: recompute each layer in backward instead of keeping its activations, whatever the model's own
                activation checkpointing and train / eval mode say; False keeps them.
            wanted: int64 [R, n], flat indices into [B * L]. Nothing above the last attention mixes positions, so what
                comes after it is computed for these only; the last layer's feed-forward part sees them as R rows.

        Raises:
            ValueError: no such layer.
        """
        self._check_layer(start, "start")
        if start == len(self.layers):
            return self.final_norm(pick(hidden, wanted))
        inputs = for_replay(layer_inputs)
        for index in range(start, len(self.layers)):
            is_last = index == len(self.layers) - 1
            run = _plain_call(self.layers[index], {**inputs, "wanted": wanted if is_last else None})
            if checkpoint and torch.is_grad_enabled():
                hidden = run_checkpointed(run, hidden, use_reentrant=False)
            else:
                hidden = run(hidden)
        return self.final_norm(hidden)

    def embed(self, input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None = None) -> torch.Tensor:
        """Input of the first layer, [B, L, D], from ids or from embeddings."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("pass exactly one of input_ids and inputs_embeds")
        embedded = inputs_embeds
        if embedded is None:
            embedded = self.embedding(input_ids)
        if self.carry is not None:
            if input_ids is None:
                raise ValueError("a state carried between forwards is added by token: pass input_ids")
            embedded = self.carry.add(input_ids, embedded)
        return self.scale_embeddings(embedded)

    def _layer_inputs(self, hidden, attention_mask, position_ids, past_key_values, recorder) -> LayerInputs:
        if position_ids is None:
            past = 0 if past_key_values is None else past_key_values.get_seq_length()
            position_ids = torch.arange(past, past + hidden.shape[1], device=hidden.device)[None]  # [1, L]
        return {
            "attention_mask": prepare_mask(self.config, hidden, attention_mask, past_key_values),
            "position_embeddings": self.rotary_emb(hidden, position_ids),
            "past_key_values": past_key_values,
            "recorder": recorder,
        }

    def _call_back(self, hidden: torch.Tensor, layer_inputs: LayerInputs) -> torch.Tensor:
        # Taken away while it runs: a teacher's forward inside the callback must not start another inner loop.
        callback, self.split_callback = self.split_callback, None
        layer, self.split_layer = self.split_layer, -1
        assert callback is not None
        try:
            return callback(hidden, for_replay(layer_inputs))
        finally:
            self.split_layer, self.split_callback = layer, callback

    def _check_layer(self, index: int, name: str) -> None:
        if not 0 <= index <= len(self.layers):
            raise ValueError(f"{name}={index}: choose 0 to {len(self.layers)} (the number of layers)")

    def _check_request(self, past_key_values: Cache | None, stop_at: int | None, records: bool) -> None:
        if stop_at is not None:
            self._check_layer(stop_at, "stop_at")
            if records:
                raise ValueError("output_hidden_states and output_router_logits need the whole network: drop stop_at")
        if past_key_values is None:
            return
        if stop_at is not None or self.split_callback is not None:
            raise ValueError("a split point and a KV cache exclude each other: run without past_key_values / use_cache")
        if self.training and any(_checkpoints_itself(layer) for layer in self.layers):
            raise ValueError(
                "a KV cache and activation checkpointing exclude each other: call model.eval() or drop the cache"
            )


class DiffusionLM(FamilyModel):
    """A backbone and a head. A family sets `model` and provides `head`."""

    model: Backbone
    router_scores: RouterScores = "softmax"  # how a family turns router logits into scores

    @property
    def backbone(self) -> Backbone:
        """The network below the head."""
        return self.model

    def head(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits [..., V] of hidden states [..., D] taken after the final norm."""
        raise NotImplementedError(f"{type(self).__name__} must define head(hidden)")

    def get_input_embeddings(self) -> nn.Embedding:
        """The token embedding."""
        return self.model.embedding

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: Mask | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool = False,
        logit_positions: torch.Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_router_logits: bool | None = None,
        labels: None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
    ) -> DiffusionLMOutput:
        """Logits at every position, or at `logit_positions` only (full-vocabulary logits of long rows are gigabytes).

        Args:
            logit_positions: int64 [N], flat indices into [B * L]; the result then holds logits [N, V]. None: [B, L, V].
            output_hidden_states, output_router_logits: None means what the configuration says.
            labels, output_attentions, return_dict: here only because PEFT passes them along (as None, False, True).
            Everything else as in `Backbone.forward`.

        Raises:
            ValueError: labels, output_attentions or return_dict=False asked for; and those of `Backbone.forward`.
        """
        _refuse_unsupported(labels, output_attentions, return_dict)
        wants_router = self.config.output_router_logits if output_router_logits is None else output_router_logits
        wants_states = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        output = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_hidden_states=wants_states,
            output_router_logits=wants_router,
        )
        hidden = output.last_hidden_state
        aux_loss = None
        if output.router_logits:
            aux_loss = load_balancing_loss(
                output.router_logits,
                output.router_choices,
                _token_mask(attention_mask, hidden.shape[1]),
                self.router_scores,
            )
        return DiffusionLMOutput(
            logits=self.head(hidden if logit_positions is None else hidden.flatten(0, 1)[logit_positions]),
            past_key_values=output.past_key_values,
            hidden_states=output.hidden_states,
            router_logits=output.router_logits,
            aux_loss=aux_loss,
        )

    @classmethod
    def can_generate(cls) -> bool:
        """False: there is no left-to-right generation, see dllm.core.samplers."""
        return False

    def prepare_inputs_for_generation(self, *_args, **_kwargs):
        """Not available; PEFT only wants to see the method on a causal-LM adapter's base.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError("a diffusion LM does not generate left to right: use dllm.core.samplers")


def for_replay(layer_inputs: LayerInputs) -> LayerInputs:
    """`layer_inputs` without cache and recorder: a replayed layer must not feed them a second time."""
    return {**layer_inputs, "past_key_values": None, "recorder": None}


def unwrap(model: Any) -> DiffusionLM:
    """The language model inside DDP, DeepSpeed, FSDP, torch.compile and PEFT wrappers.

    Raises:
        TypeError: there is none of this library's families inside.
    """
    inner = extract_model_from_parallel(model, keep_torch_compile=False) if isinstance(model, nn.Module) else model
    if isinstance(inner, PeftModel):
        inner = inner.get_base_model()
    if not isinstance(inner, DiffusionLM):
        raise TypeError(f"{type(inner).__name__} is no model of dllm.models: load it with dllm.utils.get_model")
    return inner


def _plain_call(layer: nn.Module, inputs: LayerInputs) -> Callable[[torch.Tensor], torch.Tensor]:
    def run(hidden: torch.Tensor) -> torch.Tensor:
        # Inside the checkpointed function, so that the recomputation takes the same path as the first run.
        with _without_own_checkpointing(layer):
            return layer(hidden, **inputs)

    return run


def _checkpoints_itself(layer: nn.Module) -> TypeGuard[GradientCheckpointingLayer]:
    return isinstance(layer, GradientCheckpointingLayer) and layer.gradient_checkpointing


@contextlib.contextmanager
def _without_own_checkpointing(layer: nn.Module) -> Iterator[None]:
    if not _checkpoints_itself(layer):
        yield
        return
    layer.gradient_checkpointing = False
    try:
        yield
    finally:
        layer.gradient_checkpointing = True


def _refuse_unsupported(labels, output_attentions, return_dict) -> None:
    if labels is not None:
        raise ValueError("the model computes no loss: drop `labels`; the losses are in dllm.core.losses")
    if output_attentions:
        raise ValueError("attention weights are not returned: drop `output_attentions`")
    if return_dict is False:
        raise ValueError("results are always a DiffusionLMOutput: drop `return_dict=False`")


def _token_mask(attention_mask: Mask | None, length: int) -> torch.Tensor | None:
    """Which of the T new tokens are real: bool [T] from a padding mask; None where the mask does not say."""
    if not isinstance(attention_mask, torch.Tensor) or attention_mask.dim() != 2:
        return None
    return attention_mask[:, -length:].flatten().bool()
