"""Attention masks in the form that the chosen attention implementation takes.

Shapes: B rows, L query positions, P cached positions, S = P + L key positions, H heads.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from transformers import Cache, PreTrainedConfig
from transformers.masking_utils import create_bidirectional_mask

from dllm.utils.parsing import InputError


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


def two_halves_mask(
    length: int,
    block_size: int,
    padding: torch.Tensor | None = None,
    device: torch.device | str | None = None,
) -> torch.Tensor:
    """Boolean mask [1 or B, 1, 2L, 2L] of the input [x_t ; x_0], the noised state and behind it the clean tokens.

    The noised half sees its own block of itself and the blocks before it of the clean half; the clean half sees itself
    block-causally and nothing of the noised one. So the noised block b is what a forward on [clean blocks < b, noised
    block b] makes of it, for all blocks at once (BD3-LM, arXiv 2503.09573, figure 3). The last block may be shorter.

    Args:
        length: L.
        block_size: positions of a block.
        padding: None, or [B, L] with 1 / True at the positions that may be seen, in both halves.
        device: where to make it; of `padding` if that is given.

    Raises:
        ValueError: block_size below 1, or padding of another length.
    """
    _check_halves(length, block_size, padding)
    block = torch.arange(length, device=device if padding is None else padding.device) // block_size  # [L]
    query, key = block[:, None], block[None, :]
    noised = torch.cat([query == key, query > key], dim=1)
    clean = torch.cat([torch.zeros_like(query == key), query >= key], dim=1)
    mask = torch.cat([noised, clean])[None, None]
    return mask if padding is None else mask & torch.cat([padding, padding], dim=1).bool()[:, None, None]


def two_halves_block_mask(
    length: int,
    block_size: int,
    padding: torch.Tensor | None = None,
    device: torch.device | str = "cpu",
) -> BlockMask:
    """The mask of `two_halves_mask` in the form that flex attention takes; arguments and errors as there."""
    _check_halves(length, block_size, padding)
    rule = two_halves_rule(length, block_size)
    if padding is None:
        return create_block_mask(rule, None, None, 2 * length, 2 * length, device=device)
    seen = torch.cat([padding, padding], dim=1).bool()

    def sees(row, head, query, key):
        return rule(row, head, query, key) & seen[row, key]

    return create_block_mask(sees, len(padding), None, 2 * length, 2 * length, device=padding.device)


def two_halves_rule(length: int, block_size: int) -> Callable[..., torch.Tensor]:
    """The rule of `two_halves_mask` as a flex mask_mod: (row, head, query, key) -> bool, of index tensors."""

    def sees(row, head, query, key):
        query_block, key_block = query % length // block_size, key % length // block_size
        query_is_noised, key_is_noised = query < length, key < length
        own = query_is_noised & key_is_noised & (query_block == key_block)
        before = query_is_noised & ~key_is_noised & (key_block < query_block)
        within_clean = ~query_is_noised & ~key_is_noised & (key_block <= query_block)
        return own | before | within_clean

    return sees


def has_two_halves(length: int, block_size: int | None) -> bool:
    """Whether block diffusion needs the clean half: not for rows of a single block, nor without blocks (None)."""
    return block_size is not None and length > block_size


def two_halves_inputs(
    implementation: str | None,
    length: int,
    block_size: int,
    padding: torch.Tensor | None,
    device: torch.device,
) -> dict[str, Any]:
    """Mask and position ids of the input [x_t ; x_0], as keyword arguments of a model's forward.

    Both halves have the positions 0 .. L - 1.

    Args:
        implementation: attention implementation of the model; flex_attention gets a BlockMask, all others a boolean
            mask.
        length, block_size, padding: see `two_halves_mask`.
        device: of the input.
    """
    make = two_halves_block_mask if implementation == "flex_attention" else two_halves_mask
    positions = torch.arange(length, device=device)
    return {
        "attention_mask": make(length, block_size, padding, device),
        "position_ids": torch.cat([positions, positions])[None],
    }


def in_two_halves(positions: torch.Tensor, length: int) -> torch.Tensor:
    """Flat indices into [B * L] as those of the same places in the noised half of [B * 2L]."""
    return positions + positions // length * length


def document_mask(segment_ids: torch.Tensor) -> torch.Tensor:
    """Boolean mask [B, 1, L, L] of packed rows: position i sees j where both stand in the same document.

    L * L bytes per row: 1 GiB at 32,768 positions. flex attention needs next to none (`document_block_mask`).

    Args:
        segment_ids: number of each position's document, int64 [B, L].
    """
    return (segment_ids[:, :, None] == segment_ids[:, None, :])[:, None]


def document_block_mask(segment_ids: torch.Tensor, block_size: int = 128) -> BlockMask:
    """The mask of `document_mask` in the form that flex attention takes, made without an L x L tensor.

    Two blocks of positions have something to see in each other where the ranges of their documents overlap, and
    everything where both lie within one document.

    Args:
        segment_ids: as in `document_mask`, not falling along a row.
        block_size: positions of a block of the kernel.
    """
    length, end = segment_ids.shape[1], segment_ids[:, -1:]
    behind = (end + 1).expand(-1, -length % block_size)  # fills the last block with what is no document
    blocks = torch.cat([segment_ids, behind], dim=1).unflatten(1, (-1, block_size))  # [B, blocks, block_size]
    first, last = blocks[:, :, 0], torch.minimum(blocks[:, :, -1], end)
    meets = (first[:, :, None] <= last[:, None, :]) & (first[:, None, :] <= last[:, :, None])
    whole = blocks[:, :, 0] == blocks[:, :, -1]
    full = (first[:, :, None] == first[:, None, :]) & whole[:, :, None] & whole[:, None, :]

    def sees(row, head, query, key):
        return segment_ids[row, query] == segment_ids[row, key]

    return BlockMask.from_kv_blocks(
        *_block_lists(meets & ~full),
        *_block_lists(full),
        BLOCK_SIZE=block_size,
        mask_mod=sees,
        seq_lengths=(length, length),
    )


def _block_lists(chosen: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(how many key blocks each query block has, int32 [B, 1, blocks]; their indices first, [B, 1, blocks, blocks])."""
    counts, order = chosen.sum(dim=-1), chosen.to(torch.int8).argsort(dim=-1, descending=True, stable=True)
    return counts[:, None].to(torch.int32), order[:, None].to(torch.int32).contiguous()


def check_document_masks(implementation: str | None) -> None:
    """Nothing, if an attention implementation takes a mask between documents.

    Raises:
        InputError: flash attention.
    """
    if implementation is not None and "flash" in implementation:
        raise InputError(
            f"packing needs a mask between documents, which {implementation} does not take: load with "
            "--attn_implementation sdpa or flex_attention"
        )


def document_inputs(
    implementation: str | None, segment_ids: torch.Tensor, position_ids: torch.Tensor
) -> dict[str, Any]:
    """Mask and position ids of packed rows, as keyword arguments of a model's forward.

    Args:
        implementation: attention implementation of the model; flex_attention gets a BlockMask, eager and sdpa a boolean
            mask.
        segment_ids: see `document_mask`.
        position_ids: int64 [B, L], from 0 in each document.

    Raises:
        InputError: flash attention.
    """
    check_document_masks(implementation)
    make = document_block_mask if implementation == "flex_attention" else document_mask
    return {"attention_mask": make(segment_ids), "position_ids": position_ids}


def _check_halves(length: int, block_size: int, padding: torch.Tensor | None) -> None:
    if block_size < 1:
        raise ValueError(f"block_size must be at least 1, got {block_size}")
    if padding is not None and padding.shape[1:] != (length,):
        raise ValueError(f"padding has shape {list(padding.shape)}, expected [B, {length}]")


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
        if attention_mask.is_floating_point() or attention_mask.is_complex():
            raise ValueError(
                f"a 2-D attention_mask must be boolean or integer (1 = see), got {attention_mask.dtype}: an additive "
                "mask must be 4-D"
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
