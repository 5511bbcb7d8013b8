"""The GPT-2 transformer, in plain PyTorch: pre-LayerNorm, learned positions, tanh GELU, tied embeddings.

Every model of this project is this one. The policy, its reference and the pretrained LM put the tied embedding
on top (`GPT.logits`); the preference model and the critic put a scalar head there (pm.py).

Read it in this order: GPTConfig and SIZES, Block, GPT, KVCache (how sampling avoids re-reading the prompt),
token_logprobs (how log-probs are taken without holding all the logits).

Legend:  B batch (rows, or slots)   T time (tokens in a row)   C cache length   D width   H heads   L layers
         V vocabulary               N tokens of many rows, packed
Rows are padded on the RIGHT. Under causal attention a real token never sees a pad to its right, and its position
is its index, so the full forward pass needs no padding mask at all.
"""
import copy
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint


@dataclass(frozen=True)
class GPTConfig:
    n_layer: int
    n_head: int
    d_model: int
    vocab_size: int = 50304  # GPT-2's 50257, padded to a multiple of 64 (matrix units like round sizes)
    context: int = 1024      # longest row; one learned position each

    def n_params(self) -> int:
        """Parameters, the embeddings included (the output layer is tied, so it adds none)."""
        per_block = 12 * self.d_model**2 + 13 * self.d_model  # 4 D^2 attention, 8 D^2 MLP; biases and LayerNorms
        return self.n_layer * per_block + (self.vocab_size + self.context + 2) * self.d_model


_PAPER = dict(vocab_size=2**16, context=8192)  # GL: 2^16 tokens, 8192-token context
SIZES = {
    "toy": GPTConfig(2, 4, 128, context=192),
    "gpt2": GPTConfig(12, 12, 768), "gpt2-medium": GPTConfig(24, 16, 1024),
    "gpt2-large": GPTConfig(36, 20, 1280), "gpt2-xl": GPTConfig(48, 25, 1600),
    # The paper's seven (13M to 52B by some 4x: §3.1; the others, and D = 128 L: GL), named by their parameters without
    # the embeddings. HH does not state the number of heads, so heads are 64 wide as in GPT-2 (128 from 2.7B on).
    "13M": GPTConfig(4, 8, 512, **_PAPER), "42M": GPTConfig(6, 12, 768, **_PAPER),
    "197M": GPTConfig(10, 20, 1280, **_PAPER), "810M": GPTConfig(16, 32, 2048, **_PAPER),
    "2.7B": GPTConfig(24, 24, 3072, **_PAPER), "13B": GPTConfig(40, 40, 5120, **_PAPER),
    "52B": GPTConfig(64, 64, 8192, **_PAPER),
}


class KVCache:
    """Keys and values of all the tokens read so far, for B rows of up to C tokens. The tensors keep their shape.

    k, v: (L, B, H, C, D/H). `lengths` (B,): tokens that each row holds; what lies beyond is never attended to."""

    def __init__(self, cfg: GPTConfig, rows: int, size: int, device="cpu", dtype=torch.float32):
        shape = (cfg.n_layer, rows, cfg.n_head, size, cfg.d_model // cfg.n_head)
        self.k = torch.zeros(shape, device=device, dtype=dtype)
        self.v = torch.zeros(shape, device=device, dtype=dtype)
        self.lengths = torch.zeros(rows, dtype=torch.long, device=device)

    def part(self, rows: int, size: int) -> "KVCache":
        """The first rows, and of those the first positions, as a cache that shares this one's memory."""
        part = copy.copy(self)
        part.k, part.v, part.lengths = self.k[:, :rows, :, :size], self.v[:, :rows, :, :size], self.lengths[:rows]
        return part


class Block(nn.Module):
    """x + attention(LN(x)), then x + MLP(LN(x)): GPT-2's pre-LN order, which keeps a clean residual path."""

    def __init__(self, cfg: GPTConfig):
        super().__init__()
        D = cfg.d_model
        self.n_head = cfg.n_head
        self.ln_1, self.ln_2 = nn.LayerNorm(D, eps=1e-5), nn.LayerNorm(D, eps=1e-5)
        self.qkv, self.attn_out = nn.Linear(D, 3 * D), nn.Linear(D, D)
        self.mlp_in, self.mlp_out = nn.Linear(D, 4 * D), nn.Linear(4 * D, D)

    def forward(self, x, kv=None, at=None, seen=None, fill_only=False):
        """x (B, T, D) -> (B, T, D). With kv = one layer's (k, v) of a cache, row b's tokens go to its positions
        at[b] (T), and attend to those that seen (B, 1, T, C) names. `fill_only` stops when the cache has them."""
        B, T, D = x.shape
        q, k, v = self.qkv(self.ln_1(x)).view(B, T, 3, self.n_head, -1).permute(2, 0, 3, 1, 4)  # 3 x (B, H, T, D/H)
        if kv is None:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)  # (B, H, T, D/H)
        else:
            rows = torch.arange(B, device=x.device)[:, None]  # (B, 1)
            kv[0][rows, :, at] = k.transpose(1, 2)
            kv[1][rows, :, at] = v.transpose(1, 2)
            if fill_only:
                return x
            y = F.scaled_dot_product_attention(q, kv[0], kv[1], attn_mask=seen)  # (B, H, T, D/H)
        x = x + self.attn_out(y.transpose(1, 2).reshape(B, T, D))
        return x + self.mlp_out(F.gelu(self.mlp_in(self.ln_2(x)), approximate="tanh"))  # GPT-2 has the tanh GELU


class GPT(nn.Module):
    def __init__(self, cfg: GPTConfig):
        super().__init__()
        self.cfg = cfg
        self.embed = nn.Embedding(cfg.vocab_size, cfg.d_model)
        self.positions = nn.Embedding(cfg.context, cfg.d_model)
        self.blocks = nn.ModuleList(Block(cfg) for _ in range(cfg.n_layer))
        self.ln_f = nn.LayerNorm(cfg.d_model, eps=1e-5)
        self.recompute = False  # keep only each block's input for the backward pass, and run the block again there
        for name, p in self.named_parameters():
            if p.dim() == 2:
                # Each block adds two terms to the residual stream; this keeps its variance independent of depth.
                scale = (2 * cfg.n_layer) ** -0.5 if name.endswith(("attn_out.weight", "mlp_out.weight")) else 1.0
                # GPT-2 has 0.02 here, which is about 0.55 / sqrt(D) at its width. At the toy's width 0.02 leaves
                # attention flat for hundreds of steps, and learning to copy a word takes more than twice as long.
                nn.init.normal_(p, std=scale * cfg.d_model ** -0.5)
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    def forward(self, ids, cache: KVCache | None = None, fill_only: bool = False):
        """ids (B, T) -> hidden states after the last LayerNorm (B, T, D). Logits are a step of their own, because
        most callers want them at a few positions only.

        With a cache, row b's tokens follow the cache.lengths[b] it holds, and are added to it; the caller then
        moves `lengths` on (by less than T where the row ends in pads). Without one, rows start at position 0.
        `fill_only`: nothing but the cache is wanted. What the last block does after its keys and values is left out
        (three quarters of its work), and the result means nothing."""
        T = ids.shape[1]
        assert T <= self.cfg.context, f"{T} tokens do not fit a context of {self.cfg.context}"
        at = torch.arange(T, device=ids.device)  # (T,) positions
        if cache is not None:
            at = cache.lengths[:, None] + at  # (B, T)
            # A token sees the cache up to and including itself. What lies further right are pads of a prefill or an
            # earlier row's tokens: not seen, and overwritten when the row gets there.
            seen = torch.arange(cache.k.shape[3], device=ids.device) <= at[:, None, :, None]  # (B, 1, T, C)
        x = self.embed(ids) + self.positions(at)  # (B, T, D)
        for i, block in enumerate(self.blocks):
            if cache is not None:
                x = block(x, (cache.k[i], cache.v[i]), at, seen, fill_only and i == len(self.blocks) - 1)
            elif self.recompute and torch.is_grad_enabled():
                x = checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x)
        return self.ln_f(x)

    def logits(self, hidden):
        """(..., D) -> (..., V) by the tied embedding, float32 also under autocast: a bf16 logit of -100 is rounded to
        half a nat, and log-probs that are off by that much make ratio and KL noise."""
        with torch.autocast(hidden.device.type, enabled=False):
            return F.linear(hidden.float(), self.embed.weight.float())


def autocast(device):
    """bf16 arithmetic on a GPU, plain float32 on the CPU. Log-softmax and losses are float32 in both."""
    kind = torch.device(device).type
    return torch.autocast(kind, dtype=torch.bfloat16, enabled=kind == "cuda")


def tokens_at_once(budget: int, device) -> int:
    """Tokens of one forward pass: `budget`, or for 0 what is fast. On a CPU activations should stay in its caches (the
    toy's PPO update took 0.8 of the time at 2,048 tokens that it took at 8,192); a GPU wants much work at once."""
    return budget or (2048 if torch.device(device).type == "cpu" else 16384)


def logits_at_once(budget: int, device) -> int:
    """Logits of one chunk: `budget`, or for 0 what is fast. On a CPU at most 32 MiB: what is larger the allocator gives back
    and fetches anew each time (with GPT-2's vocabulary distillation took 0.55 of the time that 64 MiB took)."""
    return budget or (2**23 if torch.device(device).type == "cpu" else 2**26)


def log_probs(logits, temperature=1.0):
    """(..., V) logits -> log-probs. Dividing by 1 would copy the largest tensor of a step for nothing."""
    return F.log_softmax(logits if temperature == 1 else logits / temperature, dim=-1)


def token_logprobs(model: GPT, hidden, targets, temperature=1.0, max_logits=0, entropies=False):
    """Log-probs of given tokens, in nats, float32.

    hidden (N, D): states at the positions BEFORE the tokens (token t is predicted at t - 1); targets (N,).
    -> (N,) log-probs, differentiable; with `entropies`, also the (N,) entropies of the distributions they are from,
    for the log line only, so without gradients.
    `temperature` must be that of sampling, or ratio and KL compare different distributions.
    The logits are made in chunks of at most `max_logits` numbers (0: logits_at_once), and made again in the backward
    pass: for GPT-2 a batch of 16k tokens would otherwise hold 16k x 50k floats = 3.3 GB, several times over."""

    def chunk(h, t):
        return log_probs(model.logits(h), temperature).gather(1, t[:, None])[:, 0]  # (n,)

    def chunk_entropy(h):
        logp = log_probs(model.logits(h), temperature)  # (n, V)
        return -(logp.exp() * logp).sum(1)  # (n,)

    n = max(1, logits_at_once(max_logits, hidden.device) // model.cfg.vocab_size)
    if len(targets) <= n:
        logp = chunk(hidden, targets)
    else:
        logp = torch.cat([checkpoint(chunk, h, t, use_reentrant=False)
                          for h, t in zip(hidden.split(n), targets.split(n))])
    if not entropies:
        return logp
    with torch.no_grad():
        return logp, torch.cat([chunk_entropy(h) for h in hidden.split(n)])


def sample(logits, uniform, temperature=1.0):
    """One token from each row of logits (B, V) by its own number in [0, 1), uniform (B,) -> ids (B,), log-probs (B,).

    Inverting the cumulative distribution takes one random number a token. So the numbers can belong to the
    sequence, and a response does not depend on what else is in the batch. No top-k or top-p: the log-probs that
    PPO uses must be those of the distribution sampled from (fn 12: RLHF samples were also preferred without)."""
    logp = log_probs(logits.float(), temperature)  # (B, V)
    cdf = logp.exp().cumsum(-1)  # (B, V); the last entry is 1 up to rounding, hence the scaling below
    ids = torch.searchsorted(cdf, uniform[:, None] * cdf[:, -1:], right=True).clamp(max=logits.shape[-1] - 1)  # (B, 1)
    return ids[:, 0], logp.gather(1, ids)[:, 0]
