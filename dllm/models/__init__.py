"""Model families. Importing this package registers them with transformers' Auto classes."""

from dllm.models.backbone import Backbone, DiffusionLM, DiffusionLMOutput, unwrap
from dllm.models.fast_dllm_v2 import Fast_dLLM_QwenConfig, Fast_dLLM_QwenForCausalLM, Fast_dLLM_QwenModel
from dllm.models.llada import LLaDAConfig, LLaDAModel, LLaDAModelLM
from dllm.models.llada2_moe import LLaDA2MoeConfig, LLaDA2MoeModel, LLaDA2MoeModelLM
from dllm.models.llada_moe import LLaDAMoEConfig, LLaDAMoEModel, LLaDAMoEModelLM
from dllm.models.rotary_encoder import RotaryEncoderConfig, RotaryEncoderLM, RotaryEncoderModel
from dllm.models.spec import (
    ModelSpec,
    block_size_of,
    find_spec,
    get_spec,
    load_config,
    register_spec,
    registered_specs,
    spec_of,
)

# Contents are trimmed: the text behind a header then never starts with white space that could melt with the header's
# own, so that a prompt with its generation header is a prefix of the conversation that goes on with the answer.
LLADA_CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}"
    "{{ message['content'] | trim }}"
    "{{ '<|eot_id|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)

LLADA_MOE_CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<role>' + ({'user': 'HUMAN'}.get(message['role'], message['role'] | upper)) + '</role>' }}"
    "{{ message['content'] | trim }}"
    "{{ '<|role_end|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<role>ASSISTANT</role>' }}{% endif %}"
)

# ChatML; a conversation without a system message gets the published one.
FAST_DLLM_V2_CHAT_TEMPLATE = (
    "{% if messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}"
    "{% endif %}"
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{{ message['content'] | trim }}"
    "{{ '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

LLADA = ModelSpec(
    name="llada",
    model_types=("llada",),
    architectures=("LLaDAModelLM", "LLaDAModel"),
    config_class=LLaDAConfig,
    backbone_class=LLaDAModel,
    model_class=LLaDAModelLM,
    mask_token="<|mdm_mask|>",
    end_of_turn_token="<|eot_id|>",
    pad_token="<|endoftext|>",
    bos_token="<|startoftext|>",
    eos_token="<|endoftext|>",
    special_tokens=(
        "<|startoftext|>",
        "<|endoftext|>",
        "<|mdm_mask|>",
        "<|start_header_id|>",
        "<|end_header_id|>",
        "<|eot_id|>",
    ),
    chat_template=LLADA_CHAT_TEMPLATE,
    layers="model.transformer.blocks",
    final_norm="model.transformer.ln_f",
    head="model.transformer.ff_out",
    embedding="model.transformer.wte",
    linear_roles={
        "q_proj": "q_proj",
        "k_proj": "k_proj",
        "v_proj": "v_proj",
        "o_proj": "attn_out",
        "gate_proj": "ff_proj",
        "up_proj": "up_proj",
        "down_proj": "ff_out",
    },
)

LLADA_MOE = ModelSpec(
    name="llada_moe",
    model_types=("lladamoe",),
    architectures=("LLaDAMoEModelLM", "LLaDAMoEModel"),
    config_class=LLaDAMoEConfig,
    backbone_class=LLaDAMoEModel,
    model_class=LLaDAMoEModelLM,
    mask_token="<|mask|>",
    end_of_turn_token="<|role_end|>",
    pad_token="<|endoftext|>",
    bos_token="<|startoftext|>",
    eos_token="<|endoftext|>",
    special_tokens=("<|startoftext|>", "<|endoftext|>", "<|mask|>", "<role>", "</role>", "<|role_end|>"),
    chat_template=LLADA_MOE_CHAT_TEMPLATE,
    layers="model.layers",
    final_norm="model.norm",
    head="lm_head",
    embedding="model.embed_tokens",
    linear_roles={role: role for role in ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")},
)

LLADA2_MOE = ModelSpec(
    name="llada2_moe",
    model_types=("llada2_moe", "llada2_moe_21"),
    architectures=("LLaDA2MoeModelLM", "LLaDA2MoeModel"),
    config_class=LLaDA2MoeConfig,
    backbone_class=LLaDA2MoeModel,
    model_class=LLaDA2MoeModelLM,
    mask_token="<|mask|>",
    end_of_turn_token="<|role_end|>",
    pad_token="<|endoftext|>",
    bos_token="<|startoftext|>",
    eos_token="<|endoftext|>",
    special_tokens=("<|startoftext|>", "<|endoftext|>", "<|mask|>", "<role>", "</role>", "<|role_end|>"),
    chat_template=LLADA_MOE_CHAT_TEMPLATE,
    layers="model.layers",
    final_norm="model.norm",
    head="lm_head",
    embedding="model.word_embeddings",
    linear_roles={
        "qkv_proj": "query_key_value",
        "o_proj": "dense",
        "gate_proj": "gate_proj",
        "up_proj": "up_proj",
        "down_proj": "down_proj",
    },
    attention="block_causal",
    block_size=32,
    exact_block_cache=True,
)

FAST_DLLM_V2 = ModelSpec(
    name="fast_dllm_v2",
    model_types=("Fast_dLLM_Qwen",),
    architectures=("Fast_dLLM_QwenForCausalLM", "Fast_dLLM_QwenModel"),
    config_class=Fast_dLLM_QwenConfig,
    backbone_class=Fast_dLLM_QwenModel,
    model_class=Fast_dLLM_QwenForCausalLM,
    mask_token="|<MASK>|",
    end_of_turn_token="<|im_end|>",
    pad_token="<|im_end|>",
    bos_token="<|endoftext|>",
    eos_token="<|im_end|>",
    special_tokens=("<|endoftext|>", "<|im_start|>", "<|im_end|>", "|<MASK>|"),
    chat_template=FAST_DLLM_V2_CHAT_TEMPLATE,
    layers="model.layers",
    final_norm="model.norm",
    head="lm_head",
    embedding="model.embed_tokens",
    linear_roles={role: role for role in ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")},
    logit_shift=1,
    attention="block_causal",
    block_size=32,
    block_size_field="bd_size",
    exact_block_cache=True,
)

ROTARY_ENCODER = ModelSpec(
    name="rotary_encoder",
    model_types=("rotary_encoder",),
    architectures=("RotaryEncoderLM", "RotaryEncoderModel"),
    config_class=RotaryEncoderConfig,
    backbone_class=RotaryEncoderModel,
    model_class=RotaryEncoderLM,
    mask_token="[MASK]",
    end_of_turn_token="[EOS]",
    pad_token="[PAD]",
    bos_token="[BOS]",
    eos_token="[EOS]",
    special_tokens=("[PAD]", "[CLS]", "[MASK]", "[EOS]", "[BOS]", "[SEP]", "[UNK]"),
    # Not made for conversations: the turns one after the other.
    chat_template="{% for message in messages %}{{ message['content'] | trim }}{{ '[EOS]' }}{% endfor %}",
    layers="model.layers",
    final_norm="model.norm",
    head="lm_head",
    embedding="model.embed_tokens",
    linear_roles={role: role for role in ("q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj")},
    fast_weight_targets=("up_proj", "down_proj"),
)

for _spec in (LLADA, LLADA_MOE, LLADA2_MOE, FAST_DLLM_V2, ROTARY_ENCODER):
    register_spec(_spec)

__all__ = [
    "FAST_DLLM_V2",
    "LLADA",
    "LLADA2_MOE",
    "LLADA_MOE",
    "ROTARY_ENCODER",
    "Backbone",
    "DiffusionLM",
    "DiffusionLMOutput",
    "Fast_dLLM_QwenConfig",
    "Fast_dLLM_QwenForCausalLM",
    "Fast_dLLM_QwenModel",
    "LLaDA2MoeConfig",
    "LLaDA2MoeModel",
    "LLaDA2MoeModelLM",
    "LLaDAConfig",
    "LLaDAMoEConfig",
    "LLaDAMoEModel",
    "LLaDAMoEModelLM",
    "LLaDAModel",
    "LLaDAModelLM",
    "ModelSpec",
    "RotaryEncoderConfig",
    "RotaryEncoderLM",
    "RotaryEncoderModel",
    "block_size_of",
    "find_spec",
    "get_spec",
    "load_config",
    "register_spec",
    "registered_specs",
    "spec_of",
    "unwrap",
]
