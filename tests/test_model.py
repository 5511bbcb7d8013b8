"""Tests of model.py and cache.py. Expected values come from GPT-2's equations, written out here for
one row, one head and one query at a time, or are computed by hand. Nearly everything runs in
float64, where two ways to compute the same thing agree to 1e-9 on any machine."""
import copy
import math
from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode

from cache import KVCache, forward_cached, prefill
from helpers import doubled, exact_logits, max_difference, shaken
from model import GPT, SIZES, GPTConfig, sample, token_logprobs, token_logprobs_and_entropies

CFG = GPTConfig(n_layer=2, n_head=4, d_model=32, vocab_size=61, context=24)
D, V = CFG.d_model, CFG.vocab_size
ROWS = [[5, 1, 60, 7, 7, 3, 2, 9, 11], [4], [8, 0, 30, 31, 32], [13, 12], [0, 0, 0, 0, 0, 0, 0]]
NEXT = [[9, 1, 2, 50], [60, 7, 8, 0], [1, 1, 1, 3], [0, 59, 2, 0], [33, 34, 35, 36]]
LAST_UNIFORM = 1 - 2.0**-24  # the largest number that torch.rand returns


@pytest.fixture(scope="module")
def gpt() -> GPT:
    """A small model in float64 whose every parameter matters. No test changes it."""
    torch.manual_seed(0)
    return doubled(shaken(GPT(CFG), 1)).eval().requires_grad_(False)


def padded(rows, pad=0, width=0):
    width = width or max(len(row) for row in rows)
    return torch.tensor([row + [pad] * (width - len(row)) for row in rows])


# ---- Sizes -------------------------------------------------------------------


@pytest.mark.parametrize("cfg", [CFG, GPTConfig(2, 3, 12, 7, 64), *SIZES.values()])
def test_n_params_counts_the_parameters(cfg):
    # Shapes without memory: the 52B model would need 200 GB. The first use imports for seconds.
    with torch.device("meta"):
        assert cfg.n_params() == sum(p.numel() for p in GPT(cfg).parameters())


def test_the_sizes_are_those_of_gpt2_and_of_the_paper():
    """GPT-2's published parameter counts. The paper names its models by their parameters without
    embeddings, in round numbers."""
    for name, published in (("gpt2", 124_439_808), ("gpt2-medium", 354_823_168),
                            ("gpt2-large", 774_030_080), ("gpt2-xl", 1_557_611_200)):
        cfg = SIZES[name]
        assert replace(cfg, vocab_size=50257).n_params() == published and cfg.context == 1024
        assert cfg.d_model == 64 * cfg.n_head
        assert cfg.vocab_size > 50257 and cfg.vocab_size % 64 == 0  # room for <|endofcontext|>
    for name in ("13M", "42M", "197M", "810M", "2.7B", "13B", "52B"):
        cfg = SIZES[name]
        named = float(name[:-1]) * {"M": 1e6, "B": 1e9}[name[-1]]
        without_embeddings = cfg.n_params() - (cfg.vocab_size + cfg.context) * cfg.d_model
        assert abs(without_embeddings / named - 1) < 0.04
        assert cfg.d_model % cfg.n_head == 0 and cfg.d_model == 128 * cfg.n_layer
        assert (cfg.vocab_size, cfg.context) == (65536, 8192)


def test_initial_weights_have_the_stated_spread():
    """Standard deviations of 1 / sqrt(D), smaller by sqrt(2 L) where a block writes to the residual
    stream. A deviation estimated from n numbers has a relative standard error of 1 / sqrt(2 n)."""
    torch.manual_seed(3)
    for name, p in GPT(GPTConfig(5, 4, 64, 200, 16)).named_parameters():
        if p.dim() == 1:
            assert (p == (1 if name.endswith("weight") else 0)).all(), name
        else:
            ends_a_block = "attn_out" in name or "mlp_out" in name
            expected = 64 ** -0.5 * (10 ** -0.5 if ends_a_block else 1)
            assert abs(p.std().item() / expected - 1) < 5 / math.sqrt(2 * p.numel()), name
            assert abs(p.mean().item()) < 5 * expected / math.sqrt(p.numel()), name


# ---- The forward pass --------------------------------------------------------


def reference_logits(gpt: GPT, row: list[int]) -> torch.Tensor:
    """GPT-2's equations in float64, one head and one query at a time: (T, V)."""
    w, size = gpt.state_dict(), gpt.cfg.d_model // gpt.cfg.n_head

    def norm(x, name):
        centered = x - x.mean(-1, keepdim=True)
        variance = (centered ** 2).mean(-1, keepdim=True)
        return centered / (variance + 1e-5).sqrt() * w[f"{name}.weight"] + w[f"{name}.bias"]

    def linear(x, name):
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    x = w["embed.weight"][row] + w["positions.weight"][:len(row)]
    for i in range(gpt.cfg.n_layer):
        block = f"blocks.{i}"
        q, k, v = linear(norm(x, f"{block}.ln_1"), f"{block}.qkv").split(gpt.cfg.d_model, dim=1)
        mixed = torch.zeros_like(x)
        for start in range(0, gpt.cfg.d_model, size):
            head = slice(start, start + size)
            for t in range(len(row)):
                scores = (k[:t + 1, head] @ q[t, head] / math.sqrt(size)).exp()
                mixed[t, head] = scores @ v[:t + 1, head] / scores.sum()
        x = x + linear(mixed, f"{block}.attn_out")
        m = linear(norm(x, f"{block}.ln_2"), f"{block}.mlp_in")
        m = 0.5 * m * (1 + torch.tanh(math.sqrt(2 / math.pi) * (m + 0.044715 * m ** 3)))
        x = x + linear(m, f"{block}.mlp_out")
    return norm(x, "ln_f") @ w["embed.weight"].T


@pytest.mark.parametrize("row", ROWS)
def test_logits_equal_a_reference_from_the_equations(gpt, row):
    logits = gpt.logits(gpt(torch.tensor([row])))[0]
    assert max_difference(logits, reference_logits(gpt, row)) < 1e-9
    assert logits.std() > 0.5 and max_difference(logits, exact_logits(gpt, row)) < 1e-9


def test_a_row_is_the_same_alone_and_among_padded_rows(gpt):
    generator = torch.Generator().manual_seed(1)
    for width in (9, 24):
        ids = padded(ROWS, width=width)
        is_real = torch.arange(width) < torch.tensor([[len(row)] for row in ROWS])
        noise = torch.randint(0, V, ids.shape, generator=generator)
        for batch in (ids, torch.where(is_real, ids, noise)):
            logits = gpt.logits(gpt(batch))
            for i, row in enumerate(ROWS):
                assert max_difference(logits[i, :len(row)], exact_logits(gpt, row)) < 1e-9


def test_a_row_longer_than_the_context_is_refused(gpt):
    gpt(torch.zeros(1, 24, dtype=torch.long))
    with pytest.raises(AssertionError, match="25 tokens.*24"):
        gpt(torch.zeros(1, 25, dtype=torch.long))


def test_every_parameter_gets_a_gradient_with_and_without_recomputation():
    """Recomputation runs each block again in the backward pass, to the same gradients."""
    torch.manual_seed(2)
    net, calls, gradients = doubled(shaken(GPT(CFG), 1)), [], {}
    for block in net.blocks:
        block.ln_1.register_forward_hook(lambda *_: calls.append(1))
    for recompute in (False, True):
        net.recompute = recompute
        net.zero_grad()
        calls.clear()
        net.logits(net(padded(ROWS, width=24))).logsumexp(-1).mean().backward()
        assert len(calls) == (4 if recompute else 2)
        for name, p in net.named_parameters():
            assert p.grad.isfinite().all() and p.grad.abs().sum() > 0, name
            gradients[name, recompute] = p.grad.clone()
    for name, _ in net.named_parameters():
        assert max_difference(gradients[name, True], gradients[name, False]) < 1e-9


def test_logits_are_float32_under_bf16(gpt):
    """A sum of n float32 products is off by at most n eps times the sum of their sizes, with
    eps = 2^-24, where bf16 would be off by 2^-9. Twice that, to leave nothing to the constant."""
    net = copy.deepcopy(gpt).float()
    hidden = 5 * torch.randn(40, D, generator=torch.Generator().manual_seed(5))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for states in (hidden, hidden.bfloat16()):
            logits = net.logits(states)
            assert logits.dtype == torch.float32
            terms = states.double()[:, None] * net.embed.weight.double()  # (n, V, D)
            bound = 2 * D * 2.0**-24 * terms.abs().sum(-1)
            assert ((logits.double() - terms.sum(-1)).abs() <= bound).all()
            assert ((logits.bfloat16() - terms.sum(-1)).abs() > bound).any()  # so it can fail
        targets = torch.zeros(40, dtype=torch.long)
        assert token_logprobs(net, hidden, targets).dtype == torch.float32
        for numbers in token_logprobs_and_entropies(net, hidden, targets):
            assert numbers.dtype == torch.float32


# ---- The cache ---------------------------------------------------------------


def new_cache(rows: int, size: int) -> KVCache:
    return KVCache(CFG, rows, size, dtype=torch.float64)


def decode(gpt, prompts, continuations, cache, pad=0, is_prefilled=False):
    """Read padded prompts, then feed one token of each row a step, as a rollout does. With
    `is_prefilled`, the prompts' last tokens are fed, too. -> the logits (B, n, V) at the last
    prompt token and after each token of the continuations."""
    lengths, rows = torch.tensor([len(p) for p in prompts]), torch.arange(len(prompts))
    columns = list(torch.tensor(continuations).T)
    ids, steps = padded(prompts, pad), []
    if is_prefilled:
        for layer, (k, v) in enumerate(prefill(gpt, ids[:, :-1])):
            cache.k[layer, :, :, :k.shape[2]], cache.v[layer, :, :, :k.shape[2]] = k, v
        cache.lengths += lengths - 1
        columns = [ids[rows, lengths - 1]] + columns
    else:
        steps.append(gpt.logits(forward_cached(gpt, ids, cache)[rows, lengths - 1]))
        cache.lengths += lengths
    for column in columns:
        steps.append(gpt.logits(forward_cached(gpt, column[:, None], cache)[:, 0]))
        cache.lengths += 1
    return torch.stack(steps, 1)


@pytest.mark.parametrize("is_prefilled", [False, True])
@pytest.mark.parametrize("size, pad", [(13, 0), (40, 60)])  # 9 + 4 tokens just fit into 13
def test_cached_logits_equal_the_full_forward_also_in_slots_that_were_used(
        gpt, size, pad, is_prefilled):
    """An earlier occupant stays in the cache; a length of 0 is enough to forget it."""
    cache = new_cache(len(ROWS), size)
    for prompts, continuations in ((ROWS, NEXT), (ROWS[::-1], NEXT[::-1])):
        cache.lengths.zero_()
        steps = decode(gpt, prompts, continuations, cache, pad, is_prefilled)
        for i, prompt in enumerate(prompts):
            expected = exact_logits(gpt, prompt + continuations[i])[len(prompt) - 1:]
            assert max_difference(steps[i], expected) < 1e-9


@pytest.mark.parametrize("pieces", [(1,) * 9, (1, 8), (4, 5), (8, 1), (2, 3, 4)])
def test_a_prompt_may_be_read_in_pieces(gpt, pieces):
    cache, states = new_cache(1, 12), []
    for piece in torch.tensor([ROWS[0]]).split(pieces, dim=1):
        states.append(forward_cached(gpt, piece, cache))
        cache.lengths += piece.shape[1]
    logits = gpt.logits(torch.cat(states, 1))[0]
    assert max_difference(logits, exact_logits(gpt, ROWS[0])) < 1e-9


def test_what_lies_beyond_the_lengths_does_not_matter_and_what_lies_within_does(gpt):
    poison, cache, clean = 1e4, new_cache(len(ROWS), 20), new_cache(len(ROWS), 20)
    cache.k.fill_(poison)
    cache.v.fill_(poison)
    assert max_difference(decode(gpt, ROWS, NEXT, cache), decode(gpt, ROWS, NEXT, clean)) < 1e-9
    for i, row in enumerate(ROWS):  # what was read is kept, and nothing else was written
        used = len(row) + len(NEXT[i])
        assert max_difference(cache.k[:, i, :, :used], clean.k[:, i, :, :used]) < 1e-9
        assert (cache.v[:, i, :, max(9, used):] == poison).all()
    for t in (0, 4):
        spoiled = copy.deepcopy(clean)
        spoiled.v[:, :, :, t] += 10
        one_more = torch.ones(len(ROWS), 1, dtype=torch.long)
        change = forward_cached(gpt, one_more, spoiled) - forward_cached(gpt, one_more, clean)
        assert (change.abs().amax((1, 2)) > 1e-3).all()


@pytest.mark.parametrize("recompute", [False, True])
def test_only_the_positions_that_are_asked_for_pass_through_the_last_block(gpt, recompute):
    """States and gradients are those of the full forward pass at these positions."""
    ids = padded(ROWS, 60)
    mask = torch.rand(ids.shape, generator=torch.Generator().manual_seed(9)) < 0.4
    results, widths = [], {}
    for at in (None, mask, mask.nonzero(as_tuple=True)):
        net = copy.deepcopy(gpt).requires_grad_()
        net.recompute = recompute
        for layer, block in enumerate(net.blocks):
            block.mlp_in.register_forward_pre_hook(
                lambda _, args, layer=layer: widths.update({layer: args[0].shape[:-1].numel()}))
        hidden = net(ids)[mask] if at is None else net(ids, at)
        weight = torch.linspace(-1, 2, hidden.numel()).double()
        gradients = torch.autograd.grad(weight @ hidden.flatten(), list(net.parameters()))
        results.append((hidden, *gradients))
    *others, last = widths.values()
    assert last == mask.sum() < ids.numel() and set(others) == {ids.numel()}
    for full, *both in zip(*results):
        assert max(max_difference(states, full) for states in both) < 1e-9


def test_a_step_makes_indices_and_mask_once_and_not_for_each_layer(gpt):
    def operations(n_layer):
        net, counts = GPT(replace(CFG, n_layer=n_layer)), Counter()

        class Count(TorchDispatchMode):
            def __torch_dispatch__(self, function, types, args=(), kwargs=None):
                counts[function.overloadpacket.__name__] += 1
                return function(*args, **(kwargs or {}))
        with torch.no_grad(), Count():
            forward_cached(net, torch.ones(3, 1, dtype=torch.long), KVCache(net.cfg, 3, 8))
        return counts
    few, many = operations(1), operations(4)
    for name in ("arange", "masked_fill", "gt", "where"):
        assert few[name] == many[name], name
    assert many["index_put_"] == 4 * few["index_put_"] == 8


# ---- Log-probs ---------------------------------------------------------------


def exact(logits, targets, temperature=1.0):
    """Log-probs and entropies in float64, from the definition."""
    z = logits.double() / temperature
    logp = z - z.max(-1, keepdim=True).values
    logp = logp - logp.exp().sum(-1, keepdim=True).log()
    entropy = -torch.where(logp.exp() > 0, logp.exp() * logp, 0.0).sum(-1)
    return logp[torch.arange(len(targets)), targets], entropy


def random_states(n, scale=1.0, seed=5):
    generator = torch.Generator().manual_seed(seed)
    hidden = scale * torch.randn(n, D, generator=generator).double()
    return hidden, torch.randint(0, V, (n,), generator=generator)


@pytest.mark.parametrize("temperature", [1.0, 0.7, 2.5])
@pytest.mark.parametrize("scale", [0.01, 1.0, 5e3])
def test_logprobs_and_entropies_equal_the_definition(gpt, temperature, scale):
    """At a scale of 5,000 probabilities underflow, and log(softmax(x)) would be -inf."""
    hidden, targets = random_states(40, scale)
    logp, entropy = exact(hidden @ gpt.embed.weight.T, targets, temperature)
    assert max_difference(token_logprobs(gpt, hidden, targets, temperature), logp) < 1e-9
    both = token_logprobs_and_entropies(gpt, hidden, targets, temperature)
    assert max_difference(both[0], logp) < 1e-9 and max_difference(both[1], entropy) < 1e-9
    assert logp.min() < (-1e3 if scale == 5e3 else -1)


@pytest.mark.parametrize("max_logits", [1, V * 7, V * 40 - 1, V * 40, 0])
def test_chunks_change_neither_values_nor_gradients(gpt, max_logits):
    """A row at a time, seven (not a divisor of 40), all but one, all, and the default."""
    hidden, targets = random_states(40)
    weight = torch.linspace(-1, 2, 40).double()
    results = []
    for name in ("definition", "chunks", "chunks with entropies"):
        net, x = copy.deepcopy(gpt).requires_grad_(), hidden.clone().requires_grad_()
        if name == "definition":
            logp, entropy = exact(x @ net.embed.weight.T, targets, 0.7)
        elif name == "chunks":
            logp = token_logprobs(net, x, targets, 0.7, max_logits)
        else:
            logp, entropy = token_logprobs_and_entropies(net, x, targets, 0.7, max_logits)
            assert not entropy.requires_grad
        results.append((logp, entropy, *torch.autograd.grad(weight @ logp, (x, net.embed.weight))))
    for expected, *both in zip(*results):
        assert max(max_difference(got, expected) for got in both) < 1e-9


@pytest.mark.parametrize("function", [
    token_logprobs, lambda *args, **options: token_logprobs_and_entropies(*args, **options)[0]])
def test_chunks_never_hold_all_logits(gpt, function, monkeypatch):
    """Neither does the backward pass, which makes the logits of each chunk again. The entropies
    need no logits of their own."""
    hidden, targets = random_states(100)
    hidden.requires_grad_()
    made, kept, logits = [], [], gpt.logits

    def watched(states):
        made.append(len(states))
        return logits(states)

    def keep(tensor):
        kept.append(tensor.numel())
        return tensor
    monkeypatch.setattr(gpt, "logits", watched)
    with saved_tensors_hooks(keep, lambda tensor: tensor):
        logp = function(gpt, hidden, targets, max_logits=V * 10 + 9)
    assert made == [10] * 10 and max(kept, default=0) <= 100 * D
    logp.sum().backward()
    assert made == [10] * 20


def test_no_tokens_give_no_logprobs(gpt):
    hidden, targets = random_states(0)
    assert token_logprobs(gpt, hidden, targets).shape == (0,)
    assert [x.shape for x in token_logprobs_and_entropies(gpt, hidden, targets)] == [(0,), (0,)]


# ---- Sampling ----------------------------------------------------------------

N = 100_000
LOGITS = torch.tensor([1.0, -2.0, 0.3, 2.2, -0.5, 0.0, 1.7, -4.0, 0.9, 1.1]).double()


@pytest.mark.parametrize("temperature", [1.0, 0.7, 3.0])
def test_samples_follow_the_softmax(temperature):
    """Chi-squared within 5 standard deviations; and numbers at even distances, which leave nothing
    to chance, give each token its share to within one."""
    expected = N * torch.softmax(LOGITS / temperature, 0)
    counts, even = [], (torch.arange(N).double() + 0.5) / N
    for uniform in (torch.rand(N, generator=torch.Generator().manual_seed(6)), even):
        ids, _ = sample(LOGITS.expand(N, -1), uniform, temperature)
        counts.append(torch.bincount(ids, minlength=len(LOGITS)).double())
    chi_square, freedom = ((counts[0] - expected) ** 2 / expected).sum(), len(LOGITS) - 1
    assert chi_square < freedom + 5 * math.sqrt(2 * freedom)
    assert (counts[1] - expected).abs().max() < 1 + 1e-6


def test_sampling_inverts_the_cumulative_distribution():
    p = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
    uniform = torch.tensor([0.0, 0.05, 0.0999, 0.1001, 0.2999, 0.3001, 0.5999, 0.6001, 0.9999])
    ids, logp = sample(p.log().expand(9, -1), uniform)
    assert ids.tolist() == [0, 0, 0, 1, 1, 2, 2, 3, 3]
    assert max_difference(logp, p[ids].log()) < 1e-9
    almost_one = torch.tensor([1 - 2.0**-53], dtype=torch.float64)  # 1 in float32
    assert sample(p.log().float()[None], almost_one)[0].tolist() == [3]
    ids, logp = sample(p.log().bfloat16().expand(9, -1), uniform)
    assert logp.dtype == torch.float32  # at least: bf16 sums up to 1 in steps of 1/256


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_a_row_is_sampled_by_its_own_number_alone_with_the_log_prob_that_ppo_will_use(
        gpt, temperature):
    hidden, _ = random_states(50, 3.0)
    logits, uniform = gpt.logits(hidden), torch.rand(50, generator=torch.Generator().manual_seed(7))
    ids, logp = sample(logits, uniform, temperature)
    assert ids.dtype == torch.long and len(set(ids.tolist())) > 10
    assert max_difference(logp, exact(logits, ids, temperature)[0]) < 1e-9
    assert max_difference(logp, token_logprobs(gpt, hidden, ids, temperature)) < 1e-9
    for i in range(50):
        assert sample(logits[i:i + 1] + 100, uniform[i:i + 1], temperature)[0].item() == ids[i]


@pytest.mark.parametrize("vocab", [2, 10, 300, 50304])
def test_the_ends_of_the_unit_interval_give_tokens_that_can_be_drawn(vocab):
    """In float32, with ids that cannot be drawn at both ends, like the embedding's unused rows."""
    uniform = torch.tensor([0.0, 2.0**-24, LAST_UNIFORM])
    generator = torch.Generator().manual_seed(8)
    for tail in (-60.0, -math.inf):
        for spread in (0.0, 1.0, 8.0):
            logits = spread * torch.randn(vocab + 20, generator=generator)
            logits[:10], logits[-10:] = -math.inf, tail
            ids, logp = sample(logits.expand(3, -1), uniform)
            assert (ids >= 10).all() and (ids < vocab + 10).all() and logp.isfinite().all()
            assert ids[0] <= ids[1] <= ids[2]
