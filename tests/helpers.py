"""What several test files share: a tiny configuration, models in float64 whose every parameter
matters, random prompts, and slow one-row-at-a-time references."""
import copy
import random
from types import SimpleNamespace

import torch
import torch.nn.functional as F

from evaluate import PromptBatch
from model import GPT, GPTConfig
from pm import ScalarModel
from rollout import Rollouts
from run import rng, torch_rng

# With 16 tokens, about half of the responses of up to 10 tokens end by themselves.
CFG = GPTConfig(n_layer=2, n_head=2, d_model=32, vocab_size=16, context=64)
END, END_OF_CONTEXT, R = 9, 15, 10
OPENING = 14  # ends a StubPrompts prompt and is nowhere else in it, as "Assistant:" opens a reply


def shaken(net, seed: int, size: float = 1.0):
    """A copy in which every parameter matters: a fresh model's biases are 0, its LayerNorms 1."""
    net, generator = copy.deepcopy(net), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in net.parameters():
            scale = size * (0.3 if p.dim() == 1 else 0.1)
            p += scale * torch.randn(p.shape, generator=generator)
    return net


def doubled(net):
    """A copy that computes in float64 from end to end."""
    return copy.deepcopy(net).double()


def random_prompts(n: int, seed: int, longest: int = 20) -> list[list[int]]:
    """Prompts of all lengths, some of which contain the end-of-turn token."""
    rng, prompts = random.Random(seed), []
    for _ in range(n):
        length = rng.randrange(1, longest + 1)
        prompts.append([rng.randrange(CFG.vocab_size) for _ in range(length)])
    return prompts


def random_uniforms(n: int, r: int, seed: int):
    return torch.rand(n, r, generator=torch.Generator().manual_seed(seed))


def float64(x):
    return torch.tensor(x, dtype=torch.float64)


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def flat(tensors):
    """Many tensors, such as a model's parameters, as one vector."""
    return torch.cat([x.flatten() for x in tensors])


def exact_logits(net64: GPT, row) -> torch.Tensor:
    """(T, V) logits of one row, read alone: no pads, no batch, no cache. `net64` is in float64."""
    return F.linear(net64(torch.as_tensor(row)[None])[0], net64.embed.weight)


def exact_response(net64: GPT, prompt, ro: Rollouts, n: int, temperature=1.0):
    """(r,) log-probs and (r,) entropies of response n, differentiable, token by token."""
    row = ro.tokens[n, :ro.prompt_len[n] + ro.response_len[n]].tolist()
    assert row[:len(prompt)] == prompt
    logits = exact_logits(net64, row) / temperature
    logps, entropies = [], []
    for t in range(len(prompt), len(row)):
        logp = logits[t - 1].log_softmax(0)  # from the position before
        logps.append(logp[row[t]])
        entropies.append(-(logp.exp() * logp).sum())
    return torch.stack(logps), torch.stack(entropies)


def exact_score(pm64: ScalarModel, row: list[int]) -> float:
    """A preference model's score of one row, read alone and without pads."""
    hidden = pm64.trunk(torch.tensor([row]))[0, -1]
    return (hidden @ pm64.head.weight[0] + pm64.head.bias - pm64.mean).item()


def exact_values(critic64: ScalarModel, ro: Rollouts, n: int):
    """(r,) values of response n, differentiable: number t is read one position before token t."""
    start, r = int(ro.prompt_len[n]), int(ro.response_len[n])
    hidden = critic64.trunk(ro.tokens[n:n + 1, :start + r])[0]
    value = hidden @ critic64.head.weight[0] + critic64.head.bias - critic64.mean
    return value[start - 1:start - 1 + r]


def exact_gae(rewards: list[float], v: list[float], gamma: float, lam: float) -> list[float]:
    """The definition for one response: a double sum over its tokens."""
    n, advantages = len(rewards), []
    for t in range(n):
        total = 0.0
        for s in range(t, n):
            next_value = v[s + 1] if s + 1 < n else 0.0
            total += (gamma * lam) ** (s - t) * (rewards[s] + gamma * next_value - v[s])
        advantages.append(total)
    return advantages


class StubRun:
    """What a Learner, `fit` or `evaluate` needs of a run; options set or replace attributes. It
    remembers which random numbers it was asked for."""
    tok = SimpleNamespace(end_of_turn=END, end_of_context=END_OF_CONTEXT)
    device, toy, context, subsets = torch.device("cpu"), False, CFG.context, None

    def __init__(self, **options):
        self.names, self.prepared = [], []
        vars(self).update(options)

    def prepare(self, model):
        self.prepared.append(model)
        return model.requires_grad_(True)

    def rng(self, *name):
        self.names.append(name)
        return rng(0, *name)

    def torch_rng(self, *name):
        self.names.append(name)
        return torch_rng(0, *name)


class StubPrompts:
    """Random prompts that are named like those of evaluate.Prompts."""

    def __init__(self):
        self.calls = []

    def draw(self, n, *name, held_out):
        self.calls.append((n, name, held_out))
        batch = PromptBatch([], [], [])
        for prompt in random_prompts(n, random.Random(repr(name)).getrandbits(30), longest=8):
            batch.ids.append([token % OPENING for token in prompt] + [OPENING])
        return batch


def max_difference(a, b) -> float:
    """The largest difference of two tensors, which must have the same shape."""
    assert a.shape == b.shape, f"{tuple(a.shape)} is not {tuple(b.shape)}"
    return (a.double() - b.double()).abs().max().item() if a.numel() else 0.0
