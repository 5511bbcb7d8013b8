"""The key-value cache: read a row in parts, each token once.

`GPT.forward` reads whole rows from their beginning. Sampling adds one token at a time, and would
read the prompt again for each token. Here the keys and values of all tokens read so far are kept,
and only the new tokens pass through the network. Read it in this order:
  1. KVCache          what is kept
  2. forward_cached   `GPT.forward` for rows whose beginning is in the cache
  3. prefill          fills the cache with prompts, and computes nothing else

Legend:  B batch (rows, or slots)   T new tokens of each row   C cache length   D width   H heads
         L layers
"""
import copy

import torch
import torch.nn.functional as F

from model import GPT, Block, GPTConfig

# ---- 1. KVCache --------------------------------------------------------------


class KVCache:
    """Keys and values of all the tokens read so far, for B rows of up to C tokens.

    k, v (L, B, H, C, D/H) are allocated once and keep their shape. lengths (B,) says how many
    tokens each row holds; what lies beyond is never attended to."""

    def __init__(self, cfg: GPTConfig, rows: int, size: int, device="cpu", dtype=torch.float32):
        shape = (cfg.n_layer, rows, cfg.n_head, size, cfg.d_model // cfg.n_head)
        self.k = torch.zeros(shape, device=device, dtype=dtype)
        self.v = torch.zeros(shape, device=device, dtype=dtype)
        self.lengths = torch.zeros(rows, dtype=torch.long, device=device)

    def write(self, layer: int, positions, k, v):
        """Store keys and values (B, H, T, D/H) of T tokens of each row at `positions` (B, T)."""
        rows = torch.arange(len(positions), device=positions.device)[:, None]  # (B, 1)
        self.k[layer][rows, :, positions] = k.transpose(1, 2)
        self.v[layer][rows, :, positions] = v.transpose(1, 2)

    def part(self, rows: int, size: int) -> "KVCache":
        """The first `rows` rows and their first `size` positions. It shares this cache's memory."""
        part = copy.copy(self)
        part.k = self.k[:, :rows, :, :size]
        part.v = self.v[:, :rows, :, :size]
        part.lengths = self.lengths[:rows]
        return part


# ---- 2. forward_cached -------------------------------------------------------


def forward_cached(model: GPT, ids, cache: KVCache):
    """Read T new tokens of each row, ids (B, T) -> their hidden states (B, T, D).

    Row b's new tokens follow the cache.lengths[b] tokens that it already holds. The new tokens'
    keys and values are stored. The caller must then increase cache.lengths, by less than T where a
    row ends in pads."""
    positions, visible = positions_in(cache, ids)
    x = model.embed_at(ids, positions)  # (B, T, D)
    for layer, block in enumerate(model.blocks):
        x = cached_block(block, x, cache, layer, positions, visible)
    return model.ln_f(x)


def positions_in(cache: KVCache, ids):
    """The positions (B, T) of the new tokens, and visible (B, 1, T, C): which entries of the cache
    each of them attends to."""
    T, C = ids.shape[1], cache.k.shape[3]
    positions = cache.lengths[:, None] + torch.arange(T, device=ids.device)      # (B, T)
    # A token sees the cache up to and including itself. Entries further right are pads, or belong
    # to an earlier response of the slot. They are hidden, and overwritten when this row gets there.
    visible = torch.arange(C, device=ids.device) <= positions[:, None, :, None]  # (B, 1, T, C)
    return positions, visible


def cached_block(block: Block, x, cache: KVCache, layer: int, positions, visible):
    """`Block.forward` with the attention below in place of its own; x (B, T, D) -> (B, T, D)."""
    x = x + block.attn_out(cached_attention(block, block.ln_1(x), cache, layer, positions, visible))
    return x + block.mlp(block.ln_2(x))


def cached_attention(block: Block, x, cache: KVCache, layer: int, positions, visible):
    """`Block.attention` over all that the cache holds, the new tokens x (B, T, D) included."""
    q, k, v = block.queries_keys_values(x)  # each (B, H, T, D/H)
    cache.write(layer, positions, k, v)
    y = F.scaled_dot_product_attention(q, cache.k[layer], cache.v[layer], attn_mask=visible)
    return block.merge_heads(y)             # (B, T, D)


# ---- 3. prefill --------------------------------------------------------------


def prefill(model: GPT, ids, cache: KVCache):
    """Fill the cache as `forward_cached` does, but skip what the last block would do after its keys
    and values."""
    positions, visible = positions_in(cache, ids)
    x = model.embed_at(ids, positions)
    last = len(model.blocks) - 1
    for layer, block in enumerate(model.blocks[:last]):
        x = cached_block(block, x, cache, layer, positions, visible)
    _, k, v = model.blocks[last].queries_keys_values(model.blocks[last].ln_1(x))
    cache.write(last, positions, k, v)
