"""The key-value cache: read a row in parts, each token once.

`GPT.forward` reads whole rows from their beginning. Sampling adds one token at a time, and would
read the prompt again for each token. Here the keys and values of all tokens read so far are kept,
and only the new tokens pass through the network. Read it in this order:
  1. KVCache          what is kept
  2. forward_cached   `GPT.forward` for rows whose beginning is in the cache
  3. prefill          the keys and values of prompts, and nothing else

Legend:  B batch (rows, or slots)   T new tokens of each row   C cache length   D width   H heads
         L layers
"""
import copy

import torch
import torch.nn.functional as F

from model import GPT, GPTConfig

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

    def write(self, layer: int, rows, positions, k, v):
        """Store keys and values (B, H, T, D/H) of T tokens in each of `rows` (B, 1), at `positions`
        (B, T)."""
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
    (B, T), C = ids.shape, cache.k.shape[3]
    # What all layers share is made once: where the new tokens go, and what they may see.
    rows = torch.arange(B, device=ids.device)[:, None]                            # (B, 1)
    positions = cache.lengths[:, None] + torch.arange(T, device=ids.device)       # (B, T)
    # A token sees the cache up to and including itself. Entries further right are pads, or belong
    # to an earlier response of the slot. They are hidden, and overwritten when this row gets there.
    is_hidden = torch.arange(C, device=ids.device) > positions[:, None, :, None]  # (B, 1, T, C)
    mask = torch.zeros_like(is_hidden, dtype=cache.k.dtype).masked_fill(is_hidden, float("-inf"))
    x = model.embed_at(ids, positions)  # (B, T, D)
    for layer, block in enumerate(model.blocks):
        # `Block.forward`, with attention over all that the cache holds, new tokens included.
        q, k, v = block.queries_keys_values(block.ln_1(x))  # each (B, H, T, D/H)
        cache.write(layer, rows, positions, k, v)
        y = F.scaled_dot_product_attention(q, cache.k[layer], cache.v[layer], attn_mask=mask)
        x = x + block.attn_out(block.merge_heads(y))        # (B, T, D)
        x = x + block.mlp(block.ln_2(x))
    return model.ln_f(x)


# ---- 3. prefill --------------------------------------------------------------


def prefill(model: GPT, ids):
    """Yield each layer's keys and values (B, H, T, D/H) of whole prompts, ids (B, T), whose first
    token is at position 0. What the last block would do after its keys and values is skipped."""
    x = model.embed_at(ids, torch.arange(ids.shape[1], device=ids.device))  # (B, T, D)
    last = model.blocks[-1]
    for block in model.blocks:
        q, k, v = block.queries_keys_values(block.ln_1(x))                  # (B, H, T, D/H)
        yield k, v
        if block is not last:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)     # (B, H, T, D/H)
            x = x + block.attn_out(block.merge_heads(y))                    # (B, T, D)
            x = x + block.mlp(block.ln_2(x))
