"""Attention masks in the form that the chosen attention implementation takes.

Shapes: B rows, L query positions, P cached positions, S = P + L key positions, H heads.
"""

from __future__ import annotations

import torch
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from transformers import Cache, PreTrainedConfig
from transformers.masking_utils import create_bidirectional_mask


def block_causal_mask(
    length: int, block_size: int, past_length: int = 0, device: torch.device | str | None = None
) -> torch.Tensor:
    """Boolean mask [1, 1, length, past_length + length]: position i sees j when j // block_size <= i // block_size.

    With `past_length` the queries are positions past_length, past_length + 1, ... of a sequence whose start is cached.

    Raises:
        ValueError: block_size below 1.
    """
    if block_size < 1:
        raise ValueError(f"block_size must be at least 1, got {block_size}")
    keys = torch.arange(past_length + length, device=device) // block_size  # [S]
    return (keys[None, :] <= keys[past_length:, None])[None, None]


def prepare_mask(
    config: PreTrainedConfig,
    hidden: torch.Tensor,
    attention_mask: torch.Tensor | BlockMask | None,
    past_key_values: Cache | None = None,
) -> torch.Tensor | BlockMask | None:
    """The mask that every layer gets, for the attention implementation that `config` names; None means full attention.

    Equal masks in different forms give equal attention. A query that sees no key gets finite, meaningless values.

    Args:
        config: the model's configuration.
        hidden: embedded input [B, L, D]; gives shape, dtype and device.
        attention_mask: None; or [B, S] with 1 / True at the keys to see; or 4-D [B or 1, H or 1, L, S], boolean
            (True = see) or of any float dtype (added to the scores: 0 = see, very negative = do not see); or a
            BlockMask (flex only).
        past_key_values: the cache that holds the first P keys.

    Raises:
        ValueError: a mask of another shape or dtype, or one that the attention implementation cannot take.
    """
    if attention_mask is None:
        return None
    implementation = config._attn_implementation or "eager"
    if isinstance(attention_mask, BlockMask):
        if implementation != "flex_attention":
            raise ValueError(
                f"a BlockMask needs attn_implementation='flex_attention', the model has {implementation!r}"
            )
        return attention_mask
    num_rows, length = hidden.shape[:2]
    num_keys = length + (0 if past_key_values is None else past_key_values.get_seq_length())
    shape = tuple(attention_mask.shape)
    if attention_mask.dim() == 2:
        if shape != (num_rows, num_keys):
            raise ValueError(
                f"attention_mask has shape {shape}, expected {(num_rows, num_keys)} (rows, cached + new positions)"
            )
        # Never skipped where it happens to be all ones: finding that out would make the host wait for the device.
        return create_bidirectional_mask(
            config=config,
            inputs_embeds=hidden,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            allow_is_bidirectional_skip=False,
        )
    num_heads = config.num_attention_heads
    broadcasts = attention_mask.dim() == 4 and shape[0] in (1, num_rows) and shape[1] in (1, num_heads)
    if not broadcasts or shape[2:] != (length, num_keys):
        raise ValueError(
            f"attention_mask has shape {shape}, expected {(num_rows, num_keys)} or "
            f"({num_rows} or 1, {num_heads} or 1, {length}, {num_keys})"
        )
    return _prepare_4d(implementation, hidden, attention_mask.to(hidden.device))


def _prepare_4d(implementation: str, hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor | BlockMask:
    is_bool = mask.dtype == torch.bool
    if not is_bool and not mask.is_floating_point():
        raise ValueError(f"a 4-D attention_mask must be boolean or float, got {mask.dtype}: use mask.bool()")
    if "flash" in implementation:
        raise ValueError(
            "flash attention takes only 2-D padding masks: load with attn_implementation='sdpa' or 'flex_attention'"
        )
    if is_bool and implementation == "flex_attention":
        return _dense_block_mask(mask)
    if is_bool and implementation == "sdpa":
        return mask
    lowest = torch.finfo(hidden.dtype).min
    if is_bool:
        return torch.zeros_like(mask, dtype=hidden.dtype).masked_fill(~mask, lowest)
    # Clamped before the cast: the lowest float32 would become -inf in bfloat16, and a row of -inf gives nan.
    wide = mask.to(torch.promote_types(mask.dtype, hidden.dtype))
    return wide.clamp(min=lowest).to(hidden.dtype)


def _dense_block_mask(mask: torch.Tensor) -> BlockMask:
    num_rows, num_heads, length, num_keys = mask.shape

    def sees(row, head, query, key):
        return mask[row, head, query, key]

    # A size-1 axis is shared by all rows or heads, which flex calls None.
    return create_block_mask(
        _broadcast(sees, num_rows == 1, num_heads == 1),
        None if num_rows == 1 else num_rows,
        None if num_heads == 1 else num_heads,
        length,
        num_keys,
        device=mask.device,
    )


def _broadcast(sees, one_row: bool, one_head: bool):
    def mask_mod(row, head, query, key):
        return sees(row * 0 if one_row else row, head * 0 if one_head else head, query, key)

    return mask_mod
