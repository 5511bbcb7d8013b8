"""Tests of model.py. Expected values are computed here in float64, row by row, or by hand."""
import math
from functools import lru_cache

import pytest
import torch

import model
from model import GPT, SIZES, GPTConfig, KVCache, sample, token_logprobs

CFG = GPTConfig(n_layer=2, n_head=4, d_model=32, vocab_size=61, context=24)
ROWS = [[5, 1, 60, 7, 7, 3, 2, 9, 11], [4], [8, 0, 30, 31, 32], [13, 12], [0, 0, 0, 0, 0, 0, 0]]


@pytest.fixture(scope="module")
def gpt() -> GPT:
    """A small model whose every parameter matters: a fresh one has zero biases and LayerNorm weights of one."""
    torch.manual_seed(0)
    net = GPT(CFG).eval().requires_grad_(False)
    for p in net.parameters():
        p += torch.randn_like(p) * (0.3 if p.dim() == 1 else 0.1)
    return net


def padded(rows, pad=0, width=None):
    width = width or max(map(len, rows))
    return torch.tensor([row + [pad] * (width - len(row)) for row in rows])


@lru_cache
def read(gpt, row: tuple):
    return gpt.logits(gpt(torch.tensor([row])))[0]


def alone(gpt, row):
    """(T, V) logits of one row, read at once, without pads or a cache. Remembered: `gpt` never changes."""
    return read(gpt, tuple(row))


def close(a, b, tolerance):
    assert a.shape == b.shape
    assert (a.double() - b.double()).abs().max().item() < tolerance


# --- sizes -----------------------------------------------------------------------------

def count(cfg: GPTConfig) -> int:
    with torch.device("meta"):  # shapes without memory: the 52B model would need 200 GB
        return sum(p.numel() for p in GPT(cfg).parameters())


@pytest.mark.parametrize("cfg", [CFG, GPTConfig(1, 1, 8, 10, 5), GPTConfig(2, 3, 12, 7, 64), *SIZES.values()])
def test_n_params_counts_the_parameters(cfg):
    assert cfg.n_params() == count(cfg)


@pytest.mark.parametrize("name, published", [("gpt2", 124_439_808), ("gpt2-medium", 354_823_168),
                                             ("gpt2-large", 774_030_080), ("gpt2-xl", 1_557_611_200)])
def test_gpt2_has_the_published_sizes(name, published):
    size = SIZES[name]
    assert count(GPTConfig(size.n_layer, size.n_head, size.d_model, 50257, 1024)) == published
    assert size.d_model // size.n_head == 64 and size.context == 1024
    assert size.vocab_size >= 50257 + 1 and size.vocab_size % 64 == 0  # room for <|endofcontext|>


@pytest.mark.parametrize("name", ["13M", "42M", "197M", "810M", "2.7B", "13B", "52B"])
def test_the_papers_sizes_are_named_by_their_parameters_without_embeddings(name):
    cfg = SIZES[name]
    named = float(name[:-1]) * {"M": 1e6, "B": 1e9}[name[-1]]
    bare = cfg.n_params() - (cfg.vocab_size + cfg.context) * cfg.d_model
    assert abs(bare / named - 1) < 0.04
    assert cfg.d_model % cfg.n_head == 0 and cfg.d_model == 128 * cfg.n_layer


def test_the_output_layer_is_the_embedding(gpt):
    assert not any("head" in name for name, _ in gpt.named_parameters())
    net = GPT(CFG)
    hidden = torch.randn(2, 32)
    close(net.logits(hidden), hidden @ net.embed.weight.T, 1e-5)
    net.logits(hidden).sum().backward()
    assert net.embed.weight.grad.abs().sum() > 0
    with torch.no_grad():
        net.embed.weight[17] = 0
    assert (net.logits(hidden)[:, 17] == 0).all()


# --- the forward pass ------------------------------------------------------------------

def reference_logits(gpt: GPT, row: list[int]) -> torch.Tensor:
    """GPT-2's equations in float64, one head and one query at a time. (T, V)"""
    w = {name: p.double() for name, p in gpt.state_dict().items()}
    cfg = gpt.cfg
    size = cfg.d_model // cfg.n_head

    def norm(x, name):
        centred = x - x.mean(-1, keepdim=True)
        variance = (centred ** 2).mean(-1, keepdim=True)
        return centred / (variance + 1e-5).sqrt() * w[f"{name}.weight"] + w[f"{name}.bias"]

    def linear(x, name):
        return torch.einsum("ti,oi->to", x, w[f"{name}.weight"]) + w[f"{name}.bias"]

    x = torch.stack([w["embed.weight"][token] + w["positions.weight"][t] for t, token in enumerate(row)])
    for i in range(cfg.n_layer):
        block = f"blocks.{i}"
        qkv = linear(norm(x, f"{block}.ln_1"), f"{block}.qkv")
        q, k, v = (qkv[:, n * cfg.d_model:(n + 1) * cfg.d_model] for n in range(3))
        mixed = torch.zeros_like(x)
        for h in range(cfg.n_head):
            part = slice(h * size, (h + 1) * size)
            for t in range(len(row)):
                scores = torch.einsum("d,sd->s", q[t, part], k[:t + 1, part]) / math.sqrt(size)
                weights = (scores - scores.max()).exp()
                mixed[t, part] = torch.einsum("s,sd->d", weights / weights.sum(), v[:t + 1, part])
        x = x + linear(mixed, f"{block}.attn_out")
        m = linear(norm(x, f"{block}.ln_2"), f"{block}.mlp_in")
        m = 0.5 * m * (1 + torch.tanh(math.sqrt(2 / math.pi) * (m + 0.044715 * m ** 3)))
        x = x + linear(m, f"{block}.mlp_out")
    return torch.einsum("td,vd->tv", norm(x, "ln_f"), w["embed.weight"])


@pytest.mark.parametrize("row", ROWS)
def test_logits_equal_a_reference_from_the_equations(gpt, row):
    expected = reference_logits(gpt, row)
    close(alone(gpt, row), expected, 1e-4)
    assert expected.std() > 0.5  # else 1e-4 would say nothing


def test_the_gelu_is_the_tanh_one(gpt):
    """The two GELUs differ by up to 5e-4, so check that the test above can tell them apart."""
    x = torch.randn(1, 9, 32, dtype=torch.double) * 2
    block = gpt.blocks[0]
    m = block.mlp_in(block.ln_2(x.float())).double()
    tanh = 0.5 * m * (1 + torch.tanh(math.sqrt(2 / math.pi) * (m + 0.044715 * m ** 3)))
    erf = 0.5 * m * (1 + torch.erf(m / math.sqrt(2)))
    assert (tanh - erf).abs().max() > 1e-4
    close(torch.nn.functional.gelu(m.float(), approximate="tanh"), tanh, 1e-5)


def test_no_token_sees_what_comes_after_it(gpt):
    row = torch.tensor([ROWS[0]])
    before = gpt(row)
    T = row.shape[1]
    changed = row.repeat(T, 1)  # in row t of the batch, token t is another
    changed[range(T), range(T)] = (row[0] + 1) % CFG.vocab_size
    moved = (gpt(changed) - before).abs().amax(-1)  # (T, T)
    for t in range(T):
        assert (moved[t, :t] < 1e-6).all()
        assert (moved[t, t:] > 1e-4).all()  # and each later token sees it


def test_gradients_do_not_flow_back_in_time(gpt):
    """The same leak, seen from the other side: the state at t has no derivative by later inputs."""
    x = torch.randn(1, 6, 32, requires_grad=True)
    y = gpt.blocks[0](x)
    for t in range(6):
        (by_input,) = torch.autograd.grad(y[0, t].sum(), x, retain_graph=True)
        size = by_input[0].abs().sum(-1)
        assert (size[t + 1:] == 0).all() and (size[:t + 1] > 0).all()


def test_a_row_is_the_same_alone_and_among_padded_rows(gpt):
    generator = torch.Generator().manual_seed(1)
    for width in (9, 24):
        ids = padded(ROWS, width=width)
        real = torch.arange(width) < torch.tensor([[len(row)] for row in ROWS])
        garbage = torch.where(real, ids, torch.randint(0, CFG.vocab_size, ids.shape, generator=generator))
        assert (garbage != ids).any()
        for batch in (ids, garbage):
            logits = gpt.logits(gpt(batch))
            for i, row in enumerate(ROWS):
                close(logits[i, :len(row)], alone(gpt, row), 1e-5)


def test_a_row_longer_than_the_context_is_refused(gpt):
    gpt(torch.zeros(1, 24, dtype=torch.long))
    with pytest.raises(AssertionError, match="25 tokens.*24"):
        gpt(torch.zeros(1, 25, dtype=torch.long))


def test_every_parameter_gets_a_gradient():
    torch.manual_seed(2)
    net = GPT(CFG)
    net.logits(net(padded(ROWS, width=24))).logsumexp(-1).mean().backward()
    for name, p in net.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all(), name
        assert p.grad.abs().sum() > 0, name


def test_a_fresh_model_is_almost_uniform_and_its_residual_stream_does_not_grow_with_depth():
    torch.manual_seed(3)
    spread = {}
    for n_layer in (1, 12):
        net = GPT(GPTConfig(n_layer, 4, 64, 200, 16)).requires_grad_(False)
        ids = torch.randint(200, (4, 16))
        logp = net.logits(net(ids)).log_softmax(-1)
        entropy = -(logp.exp() * logp).sum(-1).mean()
        assert math.log(200) - 1 < entropy < math.log(200)
        x = net.embed(ids)
        for block in net.blocks:
            x = block(x)
        spread[n_layer] = x.std().item()
    assert 0.6 < spread[12] / spread[1] < 1.6  # without the scaling by depth it is 3 and more


def test_parity_with_transformers():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(4)
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=61, n_positions=24, n_embd=32, n_layer=2, n_head=4)).eval().requires_grad_(False)
    for p in theirs.parameters():
        p += torch.randn_like(p) * 0.2
    state = theirs.state_dict()
    ours = GPT(CFG).eval()
    names = {"ln_1": "ln_1", "ln_2": "ln_2", "qkv": "attn.c_attn", "attn_out": "attn.c_proj", "mlp_in": "mlp.c_fc",
             "mlp_out": "mlp.c_proj"}
    new = {"embed.weight": state["transformer.wte.weight"], "positions.weight": state["transformer.wpe.weight"]}
    for kind in ("weight", "bias"):
        new[f"ln_f.{kind}"] = state[f"transformer.ln_f.{kind}"]
        for i in range(CFG.n_layer):
            for our, their in names.items():
                tensor = state[f"transformer.h.{i}.{their}.{kind}"]
                # GPT-2's "Conv1D" computes x @ W, nn.Linear x @ W.T.
                new[f"blocks.{i}.{our}.{kind}"] = tensor.T if tensor.dim() == 2 else tensor
    ours.load_state_dict(new)  # strict: nothing is missing and nothing is left over
    for row in ROWS:
        close(alone(ours, row), theirs(torch.tensor([row])).logits[0], 1e-4)


# --- the cache -------------------------------------------------------------------------

def decode(gpt, prompts, continuations, cache, pad=0):
    """Prefill padded prompts, then feed a token of each row a step, as a rollout does.

    -> per row (len(continuation) + 1, V): the logits at the last prompt token and after each fed token."""
    B = torch.arange(len(prompts))
    lengths = torch.tensor([len(p) for p in prompts])
    start = cache.lengths.clone()
    hidden = gpt(padded(prompts, pad), cache)[B, lengths - 1]
    cache.lengths = start + lengths
    steps = [gpt.logits(hidden)]
    for column in torch.tensor(continuations).T:
        hidden = gpt(column[:, None], cache)[:, 0]
        cache.lengths += 1
        steps.append(gpt.logits(hidden))
    return torch.stack(steps, 1)


NEXT = [[9, 1, 2, 50], [60, 7, 8, 0], [1, 1, 1, 3], [0, 59, 2, 0], [33, 34, 35, 36]]


def expected_steps(gpt, prompts, continuations):
    return torch.stack([alone(gpt, p + c)[len(p) - 1:] for p, c in zip(prompts, continuations)])


def test_cached_logits_equal_the_full_forward(gpt):
    expected = expected_steps(gpt, ROWS, NEXT)
    for size, pad in ((13, 0), (40, 60)):  # 9 + 4 tokens just fit
        close(decode(gpt, ROWS, NEXT, KVCache(CFG, len(ROWS), size), pad), expected, 1e-4)


def test_the_cache_holds_a_row_token_by_token_from_nothing(gpt):
    cache = KVCache(CFG, 1, 9)
    for t, token in enumerate(ROWS[0]):
        assert cache.lengths.tolist() == [t]
        logits = gpt.logits(gpt(torch.tensor([[token]]), cache))[0, 0]
        cache.lengths += 1
        close(logits, alone(gpt, ROWS[0])[t], 1e-4)


def test_a_prompt_may_be_read_in_pieces(gpt):
    whole = alone(gpt, ROWS[0])
    for cut in (1, 4, 8):
        cache = KVCache(CFG, 1, 12)
        first = gpt(torch.tensor([ROWS[0][:cut]]), cache)
        cache.lengths += cut
        second = gpt(torch.tensor([ROWS[0][cut:]]), cache)
        close(gpt.logits(torch.cat([first, second], 1))[0], whole, 1e-4)


def test_what_lies_beyond_the_lengths_does_not_matter(gpt):
    poison = 1e4
    cache, clean = (KVCache(CFG, len(ROWS), 20) for _ in range(2))
    cache.k.fill_(poison)
    cache.v.fill_(poison)
    assert torch.equal(decode(gpt, ROWS, NEXT, cache), decode(gpt, ROWS, NEXT, clean))
    for i, row in enumerate(ROWS):  # what was read is kept, and nothing else was written
        used = len(row) + len(NEXT[i])
        assert torch.equal(cache.k[:, i, :, :used], clean.k[:, i, :, :used])
        assert (cache.k[:, i, :, max(9, used):] == poison).all()


def test_poison_within_the_lengths_does_matter(gpt):
    """Else the test above could pass because a cache is not read at all."""
    cache = KVCache(CFG, 1, 12)
    gpt(torch.tensor([ROWS[2]]), cache)
    cache.lengths += 5
    seen = gpt(torch.tensor([[3]]), cache)
    for t in (0, 4):
        spoilt = KVCache(CFG, 1, 12)
        spoilt.k, spoilt.v, spoilt.lengths = cache.k.clone(), cache.v.clone(), cache.lengths.clone()
        spoilt.v[:, :, :, t] += 10
        assert (gpt(torch.tensor([[3]]), spoilt) - seen).abs().max() > 1e-3


def test_a_slot_can_be_used_again(gpt):
    """Rows of an earlier occupant stay in the cache; setting the length to 0 is enough to forget them."""
    cache = KVCache(CFG, len(ROWS), 20)
    decode(gpt, ROWS, NEXT, cache)
    cache.lengths = torch.zeros(len(ROWS), dtype=torch.long)
    again, tails = ROWS[::-1], NEXT[::-1]
    close(decode(gpt, again, tails, cache), expected_steps(gpt, again, tails), 1e-4)


def test_rows_of_different_age_share_a_step(gpt):
    """Row 0 starts two steps after row 1, as a slot that was refilled. Neither notices."""
    cache = KVCache(CFG, 2, 12)
    late, early = [4, 5, 6], [9, 8, 7, 6, 5]
    got = {0: [], 1: []}
    for step, token in enumerate(early):
        if step == 2:
            cache.lengths[0] = 0  # row 0 held junk until here
        ids = torch.tensor([[late[step - 2] if step >= 2 else 55], [token]])
        logits = gpt.logits(gpt(ids, cache))[:, 0]
        cache.lengths += 1
        for row in (0, 1):
            got[row].append(logits[row])
    close(torch.stack(got[0][2:]), alone(gpt, late), 1e-4)
    close(torch.stack(got[1]), alone(gpt, early), 1e-4)


# --- log-probs -------------------------------------------------------------------------

def exact(logits, targets, temperature=1.0):
    """Log-probs and entropies in float64, from the definition."""
    z = logits.double() / temperature
    logp = z - z.max(-1, keepdim=True).values
    logp = logp - logp.exp().sum(-1, keepdim=True).log()
    entropy = -torch.where(logp.exp() > 0, logp.exp() * logp, 0.0).sum(-1)
    return logp[torch.arange(len(targets)), targets], entropy


def batch_of_states(n, scale=1.0, seed=5):
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(n, 32, generator=generator),
            torch.randint(0, CFG.vocab_size, (n,), generator=generator))


@pytest.mark.parametrize("temperature", [1.0, 0.7, 2.5])
@pytest.mark.parametrize("scale", [0.01, 1.0, 10.0])
def test_token_logprobs_equal_float64(gpt, temperature, scale):
    hidden, targets = batch_of_states(40, scale)
    logits = hidden.double() @ gpt.embed.weight.double().T
    logp, entropy = token_logprobs(gpt, hidden, targets, temperature, entropies=True)
    assert torch.equal(token_logprobs(gpt, hidden, targets, temperature), logp)
    expected = exact(logits, targets, temperature)
    assert logp.shape == entropy.shape == (40,) and logp.dtype == entropy.dtype == torch.float32
    close(logp, expected[0], 1e-4)
    close(entropy, expected[1], 1e-4)


def test_large_logits_stay_exact_and_finite(gpt):
    """Log-probs of -1e4 and probabilities that underflow: log(softmax(x)) would give -inf here."""
    hidden, targets = batch_of_states(40, 5e3)
    logits = gpt.logits(hidden)  # float32, so that only the log-softmax is under test
    assert logits.abs().max() > 1e4
    logp, entropy = token_logprobs(gpt, hidden, targets, entropies=True)
    expected = exact(logits, targets)
    assert logp.isfinite().all() and entropy.isfinite().all() and logp.min() < -1e3
    assert ((logp - expected[0]).abs() <= 1e-6 * expected[0].abs() + 1e-5).all()
    close(entropy, expected[1], 1e-5)


def test_log_softmax_is_float32_under_bf16(gpt):
    hidden, targets = batch_of_states(40, 5.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = gpt.logits(hidden)
        logp, entropy = token_logprobs(gpt, hidden, targets, entropies=True)
    assert logits.dtype == logp.dtype == entropy.dtype == torch.float32
    close(logits, hidden @ gpt.embed.weight.T, 1e-4)  # the matrix product was not in bf16
    expected = exact(logits, targets)
    close(logp, expected[0], 1e-5)
    close(entropy, expected[1], 1e-5)


def test_entropy_by_hand():
    net = GPT(GPTConfig(1, 1, 4, vocab_size=4, context=4))
    with torch.no_grad():
        net.embed.weight.copy_(torch.eye(4))  # the logits are the hidden state
    hidden = torch.tensor([[0., 0, 0, 0], [100, 0, 0, 0], [50, 50, 0, 0], [0, math.log(3), -100, -100]])
    logp, entropy = token_logprobs(net, hidden, torch.tensor([2, 0, 1, 1]), entropies=True)
    close(entropy, torch.tensor([math.log(4), 0, math.log(2), math.log(4) - 0.75 * math.log(3)]), 1e-6)
    close(logp, torch.tensor([-math.log(4), 0, -math.log(2), math.log(0.75)]), 1e-6)


def with_gradients(gpt, hidden, targets, weight, max_logits, entropies):
    """Log-probs, their gradients by the states and the embedding, and the entropies where they are asked for."""
    hidden = hidden.clone().requires_grad_()
    gpt.embed.weight.requires_grad_()
    try:
        found = token_logprobs(gpt, hidden, targets, 0.7, max_logits=max_logits, entropies=entropies)
        logp, *rest = found if entropies else (found,)
        assert logp.requires_grad and not any(entropy.requires_grad for entropy in rest)
        return logp.detach(), *torch.autograd.grad((weight * logp).sum(), (hidden, gpt.embed.weight)), *rest
    finally:
        gpt.embed.weight.requires_grad_(False)


def test_chunks_change_neither_values_nor_gradients(gpt):
    hidden, targets = batch_of_states(40)
    weight = torch.linspace(-1, 2, 40)
    whole = with_gradients(gpt, hidden, targets, weight, 2**24, entropies=True)
    assert len(whole) == 4
    double = GPT(CFG).double().requires_grad_(False)
    double.load_state_dict(gpt.state_dict())
    x, e = hidden.double().requires_grad_(), double.embed.weight.requires_grad_()
    logp, entropy = exact(x @ e.T, targets, 0.7)
    gradients = torch.autograd.grad((weight * logp).sum(), (x, e))
    for got, expected in zip(whole, (logp, *gradients, entropy)):
        close(got, expected, 2e-5)
    for max_logits in (1, 61 * 7, 61 * 40 - 1, 61 * 40):  # a row at a time; not a divisor; all but one; all
        for entropies in (False, True):
            chunked = with_gradients(gpt, hidden, targets, weight, max_logits, entropies)
            assert len(chunked) == 3 + entropies
            for got, expected in zip(chunked, whole):
                close(got, expected, 1e-5)
        with torch.no_grad():
            close(token_logprobs(gpt, hidden, targets, 0.7, max_logits=max_logits), whole[0], 1e-6)
            logp, entropy = token_logprobs(gpt, hidden, targets, 0.7, max_logits=max_logits, entropies=True)
            close(logp, whole[0], 1e-6)
            close(entropy, whole[3], 1e-6)


@pytest.mark.parametrize("entropies", [False, True])
def test_chunks_never_hold_all_logits(gpt, monkeypatch, entropies):
    hidden, targets = batch_of_states(100)
    sizes, saved = [], []
    make = gpt.logits

    def watched(h):
        logits = make(h)
        sizes.append(logits.numel())
        return logits
    monkeypatch.setattr(gpt, "logits", watched)
    hidden.requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        found = token_logprobs(gpt, hidden, targets, max_logits=61 * 10, entropies=entropies)
        loss = (found[0] if entropies else found).sum()
    assert max(saved, default=0) <= 100 * 32  # the states at most, never (N, V)
    forward = len(sizes)
    loss.backward()
    assert max(sizes) <= 61 * 10 and forward == (20 if entropies else 10)
    assert len(sizes) == forward + 10  # made again in the backward pass, but for the entropies


def test_no_tokens_give_no_logprobs(gpt):
    nothing = torch.zeros(0, 32), torch.zeros(0, dtype=torch.long)
    assert token_logprobs(gpt, *nothing).shape == (0,)
    logp, entropy = token_logprobs(gpt, *nothing, entropies=True)
    assert logp.shape == entropy.shape == (0,)


# --- sampling --------------------------------------------------------------------------

N = 100_000
LOGITS = torch.tensor([1.0, -2.0, 0.3, 2.2, -0.5, 0.0, 1.7, -4.0, 0.9, 1.1])


def softmax64(logits, temperature):
    weights = ((logits.double() - logits.max()) / temperature).exp()
    return weights / weights.sum()


def frequencies(logits, uniform, temperature):
    ids, _ = sample(logits.expand(len(uniform), -1), uniform, temperature)
    return torch.bincount(ids, minlength=len(logits)).double()


@pytest.mark.parametrize("temperature", [1.0, 0.7, 3.0])
def test_samples_follow_the_softmax(temperature):
    expected = N * softmax64(LOGITS, temperature)
    counts = frequencies(LOGITS, torch.rand(N, generator=torch.Generator().manual_seed(6)), temperature)
    freedom = len(LOGITS) - 1
    chi_square = ((counts - expected) ** 2 / expected).sum().item()
    assert chi_square < freedom + 5 * math.sqrt(2 * freedom)  # mean + 5 standard deviations
    # Numbers at even distances leave no chance: each token gets its share to within one.
    even = (torch.arange(N, dtype=torch.double) + 0.5) / N
    assert (frequencies(LOGITS, even.float(), temperature) - expected).abs().max() < 2


def test_the_temperature_of_the_test_above_matters():
    expected = N * softmax64(LOGITS, 0.7)
    counts = frequencies(LOGITS, torch.rand(N, generator=torch.Generator().manual_seed(6)), 1.0)
    assert ((counts - expected) ** 2 / expected).sum() > 1000


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_returned_logprob_is_that_of_the_sampled_distribution(gpt, temperature):
    hidden, _ = batch_of_states(200, 3.0)
    logits = gpt.logits(hidden)
    ids, logp = sample(logits, torch.rand(200, generator=torch.Generator().manual_seed(7)), temperature)
    assert ids.dtype == torch.long and logp.dtype == torch.float32 and len(set(ids.tolist())) > 10
    close(logp, exact(logits, ids, temperature)[0], 1e-5)
    close(logp, token_logprobs(gpt, hidden, ids, temperature), 1e-5)  # what PPO takes its ratio with


def test_sampling_inverts_the_cumulative_distribution():
    p = torch.tensor([0.1, 0.2, 0.3, 0.4])
    uniform = torch.tensor([0.0, 0.05, 0.0999, 0.1001, 0.2999, 0.3001, 0.5999, 0.6001, 0.9999])
    ids, logp = sample(p.log().expand(9, -1), uniform)
    assert ids.tolist() == [0, 0, 0, 1, 1, 2, 2, 3, 3]
    close(logp, p[ids].log(), 1e-6)


@pytest.mark.parametrize("vocab", [2, 10, 300, 50304])
def test_the_ends_of_the_unit_interval_give_tokens_that_can_be_drawn(vocab):
    """Ids that can't be drawn stand at both ends. (The embedding's unused rows are such ids at the right end.)"""
    first, last = 0.0, 1 - 2.0**-24  # what torch.rand can return
    uniform = torch.tensor([first, 2.0**-24, last])
    assert uniform[2] < 1
    generator = torch.Generator().manual_seed(8)
    for tail in (-60.0, -math.inf):
        for spread in (0.0, 1.0, 8.0):
            logits = spread * torch.randn(vocab + 20, generator=generator)
            logits[:10], logits[-10:] = -math.inf, tail
            ids, logp = sample(logits.expand(3, -1), uniform)
            assert (ids >= 10).all() and (ids < vocab + 10).all()
            assert logp.isfinite().all()
            assert ids[0] <= ids[1] <= ids[2]


def test_one_certain_token_is_always_drawn():
    logits = torch.full((3, 7), -1e4)
    logits[:, 4] = 0
    ids, logp = sample(logits, torch.tensor([0.0, 0.5, 1 - 2.0**-24]))
    assert ids.tolist() == [4, 4, 4] and (logp == 0).all()


def test_a_row_is_sampled_by_its_own_number_alone():
    generator = torch.Generator().manual_seed(9)
    logits, uniform = 2 * torch.randn(50, 40, generator=generator), torch.rand(50, generator=generator)
    ids, logp = sample(logits, uniform)
    order = torch.randperm(50, generator=generator)
    assert torch.equal(sample(logits[order], uniform[order])[0], ids[order])
    for i in range(50):
        one = sample(logits[i:i + 1], uniform[i:i + 1])
        assert one[0].item() == ids[i].item()
        close(one[1], logp[i:i + 1], 1e-6)
    assert torch.equal(sample(logits + 100, uniform)[0], ids)  # logits are known up to a constant


def test_autocast_leaves_the_cpu_in_float32():
    with model.autocast(torch.device("cpu")):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32
    with model.autocast("cpu"):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32
