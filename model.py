"""The GPT-2 transformer in plain PyTorch.

Every model of this project is this one. The policy, its reference and the pretrained LM read logits
off the tied embedding (`GPT.logits`); the preference model and the critic have a scalar head on top
(pm.py).

Read it in this order:
  1. Shapes      GPTConfig, and the sizes that have a name
  2. GPT         a block, and the stack of them
  3. Log-probs   of given tokens, without holding all the logits; sampling a token

Legend:  B batch (rows)   T time (tokens in a row)   D width   H heads   L layers   V vocabulary
         n tokens of many rows, packed
Rows are padded on the RIGHT. Under causal attention a real token never sees a pad to its right, and
its position is its index, so the full forward pass needs no padding mask at all.
"""
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from run import logits_at_once

# ---- 1. Shapes ---------------------------------------------------------------


@dataclass(frozen=True)
class GPTConfig:
    n_layer: int
    n_head: int
    d_model: int
    vocab_size: int = 50304  # GPT-2's 50257, padded to a multiple of 64 (GPUs like round sizes)
    context: int = 1024      # longest row; each position has a learned vector

    def n_params(self) -> int:
        """Parameters, embeddings included. The output layer is tied to them, so it adds none."""
        per_block = 12 * self.d_model**2 + 13 * self.d_model  # D^2: 4 attention, 8 MLP
        return self.n_layer * per_block + (self.vocab_size + self.context + 2) * self.d_model


_PAPER = {"vocab_size": 2**16, "context": 8192}  # GL: 2^16 tokens, a context of 8,192
SIZES = {
    "toy": GPTConfig(2, 4, 128, context=192),
    "gpt2": GPTConfig(12, 12, 768), "gpt2-medium": GPTConfig(24, 16, 1024),
    "gpt2-large": GPTConfig(36, 20, 1280), "gpt2-xl": GPTConfig(48, 25, 1600),
    # HH's seven, named by their parameters without embeddings, 13M to 52B, each about 4 times the
    # one before (§3.1). The sizes between these two, and D = 128 L, are from GL. HH does not state
    # the number of heads: here a head is 64 wide as in GPT-2, and 128 wide from 2.7B on.
    "13M": GPTConfig(4, 8, 512, **_PAPER),
    "42M": GPTConfig(6, 12, 768, **_PAPER),
    "197M": GPTConfig(10, 20, 1280, **_PAPER),
    "810M": GPTConfig(16, 32, 2048, **_PAPER),
    "2.7B": GPTConfig(24, 24, 3072, **_PAPER),
    "13B": GPTConfig(40, 40, 5120, **_PAPER),
    "52B": GPTConfig(64, 64, 8192, **_PAPER),
}

# ---- 2. GPT ------------------------------------------------------------------


class Block(nn.Module):
    """Two residual steps: x + attention(LN(x)), then x + MLP(LN(x)). GPT-2 normalizes before each
    step and not after it, which leaves a clean residual path from the embedding to the output."""

    def __init__(self, cfg: GPTConfig):
        super().__init__()
        D = cfg.d_model
        self.n_head = cfg.n_head
        self.dropout = 0.0  # share of what a step adds that training drops; set by train_sft.py
        self.ln_1, self.ln_2 = nn.LayerNorm(D, eps=1e-5), nn.LayerNorm(D, eps=1e-5)
        self.qkv, self.attn_out = nn.Linear(D, 3 * D), nn.Linear(D, D)
        self.mlp_in, self.mlp_out = nn.Linear(D, 4 * D), nn.Linear(4 * D, D)

    def forward(self, x, at=None, mask=None):
        """x (B, T, D) -> (B, T, D); or (n, D), if only the positions `at` are wanted. mask: see
        `GPT.forward`."""
        y = self.attention(self.ln_1(x), mask)  # (B, T, D)
        if at is not None:
            x, y = x[at], y[at]                 # (n, D)
        x = x + self.drop(self.attn_out(y))
        return x + self.drop(self.mlp(self.ln_2(x)))

    def drop(self, y):
        return F.dropout(y, self.dropout, self.training)  # 0.0 changes nothing and draws nothing

    def attention(self, x, mask):
        """Self-attention without its last matrix, `attn_out`; causal unless a mask is given:
        x (B, T, D) -> (B, T, D)."""
        q, k, v = self.queries_keys_values(x)  # each (B, H, T, D/H)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
        return self.merge_heads(y)             # (B, H, T, D/H) -> (B, T, D)

    def mlp(self, x):
        hidden = F.gelu(self.mlp_in(x), approximate="tanh")  # (B, T, 4 D); GPT-2 has the tanh GELU
        return self.mlp_out(hidden)                          # (B, T, D)

    def queries_keys_values(self, x):
        """x (B, T, D) -> three tensors (B, H, T, D/H)."""
        B, T, _ = x.shape
        qkv = self.qkv(x).view(B, T, 3, self.n_head, -1)  # (B, T, 3, H, D/H)
        return qkv.permute(2, 0, 3, 1, 4)                 # (3, B, H, T, D/H)

    def merge_heads(self, y):
        """Put the heads side by side: y (B, H, T, D/H) -> (B, T, D). `attn_out` mixes them."""
        B, H, T, _ = y.shape
        return y.transpose(1, 2).reshape(B, T, -1)


class GPT(nn.Module):
    """The transformer up to its last LayerNorm, and the tied output layer (`logits`)."""

    def __init__(self, cfg: GPTConfig):
        super().__init__()
        self.cfg = cfg
        self.embed = nn.Embedding(cfg.vocab_size, cfg.d_model)
        self.positions = nn.Embedding(cfg.context, cfg.d_model)
        self.blocks = nn.ModuleList(Block(cfg) for _ in range(cfg.n_layer))
        self.ln_f = nn.LayerNorm(cfg.d_model, eps=1e-5)
        # If True, the backward pass recomputes each block from its input, which saves memory.
        self.recompute = False
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                # GPT-2 uses 0.02, about 0.55 / sqrt(D) at its width. At the toy's width 0.02
                # leaves attention flat for hundreds of steps (LOG.md).
                std = cfg.d_model ** -0.5
                if name.endswith(("attn_out.weight", "mlp_out.weight")):
                    # Each block adds two terms to the residual stream. GPT-2 scales them so that
                    # the stream's variance does not depend on depth.
                    std *= (2 * cfg.n_layer) ** -0.5
                nn.init.normal_(parameter, std=std)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(self, ids, at=None, positions=None, mask=None):
        """ids (B, T) -> hidden states after the last LayerNorm (B, T, D). The logits are a separate
        step, because most callers want them at a few positions only.

        `at` names the positions that the caller wants: a mask (B, T), or a pair of rows and
        columns, (n,) each. The result is then forward(ids)[at], (n, D), for less work: in the
        last block only these positions go through the MLP, and the others are only attended to.

        By default a token's position is its index, and it sees every token up to itself. Where a
        row holds several replies to one prompt (pm.score_branches), positions (B, T) and mask
        (B, 1, T, T) say otherwise; mask[b, 0, i, j] is whether token i sees token j."""
        if positions is None:
            T = ids.shape[1]
            assert T <= self.cfg.context, f"{T} tokens do not fit a context of {self.cfg.context}"
            positions = torch.arange(T, device=ids.device)  # (T,)
        x = self.embed_at(ids, positions)                   # (B, T, D)
        for block in self.blocks:
            block_at = at if block is self.blocks[-1] else None
            if self.recompute and torch.is_grad_enabled():
                x = checkpoint(block, x, block_at, mask, use_reentrant=False)
            else:
                x = block(x, block_at, mask)
        return self.ln_f(x)

    def logits(self, hidden):
        """(..., D) -> (..., V), through the tied embedding. Float32 also under autocast: near -100
        bf16 has steps of half a nat, and log-probs that far off turn ratio and KL into noise."""
        with torch.autocast(hidden.device.type, enabled=False):
            hidden = at_least_float32(hidden)
            return F.linear(hidden, self.embed.weight.to(hidden.dtype))

    def embed_at(self, ids, positions):
        """ids (B, T) at positions (T,) or (B, T) -> (B, T, D)."""
        return self.embed(ids) + self.positions(positions)


# ---- 3. Log-probs ------------------------------------------------------------


def at_least_float32(x):
    """bf16 becomes float32; float32 stays, and so does float64, which the tests compute in."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def log_softmax_at(logits, temperature=1.0):
    """(..., V) logits -> log-probs at this temperature."""
    if temperature != 1:  # dividing by 1 would copy the largest tensor of a step for nothing
        logits = logits / temperature
    return F.log_softmax(logits, dim=-1)


def token_logprobs(model: GPT, hidden, targets, temperature=1.0, max_logits=0):
    """Log-probs (n,) of given tokens, in nats, at least float32, differentiable.

    hidden (n, D): states at the positions BEFORE the tokens (token t is predicted at t - 1).
    targets (n,): the tokens. `temperature` must be that of sampling, or ratio and KL compare
    different distributions.
    max_logits: see `in_chunks`."""
    def of_chunk(hidden_chunk, target_chunk):
        logp = log_softmax_at(model.logits(hidden_chunk), temperature)  # (chunk, V)
        return logp.gather(1, target_chunk[:, None])                    # (chunk, 1)
    return in_chunks(of_chunk, model, hidden, targets, max_logits)[:, 0]


def token_logprobs_and_entropies(model: GPT, hidden, targets, temperature=1.0, max_logits=0):
    """`token_logprobs`, and from the same logits the entropies of the distributions, in nats: (n,)
    each. The entropies are for the log only and have no gradient."""
    def of_chunk(hidden_chunk, target_chunk):
        logp = log_softmax_at(model.logits(hidden_chunk), temperature)  # (chunk, V)
        chosen = logp.gather(1, target_chunk[:, None])                  # (chunk, 1)
        with torch.no_grad():
            entropy = -(logp.exp() * logp).sum(1, keepdim=True)         # (chunk, 1)
        return torch.cat((chosen, entropy), 1)                          # (chunk, 2)
    logp, entropy = in_chunks(of_chunk, model, hidden, targets, max_logits).unbind(1)
    return logp, entropy.detach()


def in_chunks(function, model: GPT, hidden, targets, max_logits):
    """Apply `function` to chunks of states and targets whose logits are at most `max_logits`
    numbers (0: run.logits_at_once), and join the results. If there are several chunks, each is
    recomputed in the backward pass: 16k tokens of GPT-2 would otherwise hold 16k x 50k floats =
    3.3 GB, several times over."""
    chunk = max(1, logits_at_once(max_logits, hidden.device) // model.cfg.vocab_size)
    if len(targets) <= chunk:
        return function(hidden, targets)
    parts = []
    for hidden_chunk, target_chunk in zip(hidden.split(chunk), targets.split(chunk)):
        parts.append(checkpoint(function, hidden_chunk, target_chunk, use_reentrant=False))
    return torch.cat(parts)


def sample(logits, uniform, temperature=1.0):
    """Sample one token from each row of logits (B, V) by the row's own random number in [0, 1),
    uniform (B,) -> ids (B,), log-probs (B,).

    Inverting the cumulative distribution takes one random number per token. So each response can
    bring its own numbers, and does not depend on what else is in the batch. There is no top-k or
    top-p: the log-probs that PPO uses must be those of the distribution that was sampled from.
    (HH fn 12: people, too, preferred RLHF samples drawn without top-p.)"""
    logp = log_softmax_at(at_least_float32(logits), temperature)  # (B, V)
    cdf = logp.exp().cumsum(-1)  # (B, V)
    threshold = uniform[:, None].to(cdf.dtype) * cdf[:, -1:]  # the last entry is 1 up to rounding
    ids = torch.searchsorted(cdf, threshold, right=True)      # (B, 1)
    ids = ids.clamp(max=logits.shape[-1] - 1)                 # a guard against rounding
    return ids[:, 0], logp.gather(1, ids)[:, 0]
