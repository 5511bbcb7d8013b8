"""Tests of ppo.py, checks.py and train_rl.Learner. Expected values are computed by hand, or slowly:
response by response. Models are in float64, so two ways to compute a number agree to 1e-9."""
import copy
import math
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import train_rl
from checks import (averages, check_frozen, check_rewards, check_rollout, checksum, kl_estimates,
                    log_line, update_statistics)
from helpers import (CFG, END, END_OF_CONTEXT, OPENING, R, StubPrompts, StubRun, doubled, exact_gae,
                     exact_response, exact_score, exact_values, flat, float64, max_difference,
                     normal, random_prompts, random_uniforms, shaken)
from model import GPT
from pm import ScalarModel
from ppo import (Experience, PPOConfig, all_logprobs, all_values, gae, policy_loss, shaped_rewards,
                 update, value_loss, whiten)
from rollout import Rollouts, plain_rollout
from run import TrainingError, torch_rng
from train_rl import Learner, RLConfig

N, NAN = 24, float("nan")
OPEN = dict(max_grad_norm=math.inf)  # gradients as they are
COUNTS = 2e-6  # means of counts, 10 at most, are in float32: 10 x 2^-24 for each of three roundings


def ragged_mask(lengths, width=None):
    return torch.arange(width or max(lengths)) < torch.tensor(lengths)[:, None]


@pytest.fixture(scope="module")
def world():
    """Models and 24 ragged responses, some finished and some not. Tests that train use copies."""
    torch.manual_seed(0)
    policy = shaken(GPT(CFG), 1)
    policy, critic = doubled(policy), doubled(shaken(ScalarModel(policy), 4))
    critic.mean += 0.4
    prompts = random_prompts(N, 0)
    ro = plain_rollout(policy, prompts, random_uniforms(N, R, 0), END)
    assert 4 < ro.finished.sum() < 20 and len(set(ro.response_len.tolist())) > 4
    return SimpleNamespace(policy=policy, critic=critic, prompts=prompts, ro=ro)


def textbook(nets, ro: Rollouts, ex: Experience, cfg: PPOConfig, rows):
    """One step: leaves gradients in the policy and the critic -> its statistics."""
    policy, critic = nets
    names = ("policy_loss", "value_loss", "entropy", "approx_kl", "clip_fraction")
    sums = torch.zeros(5, dtype=torch.float64)
    for n in rows:
        kept, prompt = ro.mask[n], ro.tokens[n, :ro.prompt_len[n]].tolist()
        logp, entropy = exact_response(policy, prompt, ro, n, cfg.temperature)
        v = exact_values(critic, ro, n)
        a, old_v, target = ex.advantages[n][kept], ex.values[n][kept], ex.returns[n][kept]
        ratio = (logp - ex.logp[n][kept]).exp()
        limited = torch.where(a > 0, ratio.clamp(max=1 + cfg.clip), ratio.clamp(min=1 - cfg.clip))
        near = torch.minimum(torch.maximum(v, old_v - cfg.value_clip), old_v + cfg.value_clip)
        error = torch.maximum((v - target) ** 2, (near - target) ** 2)
        is_clipped = ((ratio - 1).abs() > cfg.clip).double()
        terms = (-limited * a, 0.5 * error, entropy, ratio - 1 - ratio.log(), is_clipped)
        sums = sums + torch.stack([term.sum() for term in terms])
    means = sums / ro.response_len[rows].sum()
    numbers = dict(zip(names, means.tolist()))
    for net in nets:
        net.zero_grad()
    (means[0] + means[1]).backward()
    numbers["grad_norm"] = gradients(policy).norm().item()
    numbers["critic_grad_norm"] = gradients(critic).norm().item()
    return numbers


def gradients(*nets):
    return flat([p.grad for net in nets for p in net.parameters()])


# ---- From rollouts to advantages, losses and checks --------------------------


def widened(ro: Rollouts, more: int) -> Rollouts:
    """The same responses in larger rectangles, with random tokens in place of pads."""
    shape = (N, ro.tokens.shape[1] + more)
    tokens = torch.randint(16, shape, generator=torch.Generator().manual_seed(0))
    for n, length in enumerate(ro.lengths.tolist()):
        tokens[n, :length] = ro.tokens[n, :length]
    return replace(ro, tokens=tokens, logp=F.pad(ro.logp, (0, more)))


@pytest.mark.parametrize("temperature, more, token_budget", [(1.0, 0, 10**6), (0.7, 9, 100)])
def test_log_probs_and_values_are_read_before_each_token(world, temperature, more, token_budget):
    cfg = PPOConfig(temperature=temperature, token_budget=token_budget)
    ro = widened(world.ro, more)
    logp, v = all_logprobs(world.policy, ro, cfg), all_values(world.critic, ro, cfg)
    assert not logp.requires_grad and (logp[~ro.mask] == 0).all() and (v[~ro.mask] == 0).all()
    for n, prompt in enumerate(world.prompts):
        expected, _ = exact_response(world.policy, prompt, world.ro, n, temperature)
        assert max_difference(logp[n][ro.mask[n]], expected) < 1e-9
        assert max_difference(v[n][ro.mask[n]], exact_values(world.critic, world.ro, n)) < 1e-9


def test_both_kl_estimates_are_unbiased():
    """Exactly, over four tokens and a uniform reference. With the sign of KL(pi || ref)."""
    pi, ref = float64([0.5, 0.3, 0.15, 0.05]), torch.full((4,), 0.25, dtype=torch.float64)
    k1, k3 = kl_estimates(pi.log(), ref.log())
    assert (pi * k1).sum().item() == pytest.approx(0.2442, abs=5e-5)
    assert (pi * k3).sum().item() == pytest.approx((pi * k1).sum().item(), abs=1e-12)
    assert (k3 >= 0).all() and (k1 < 0).any() and k1[0] > 0  # the token that pi likes more costs


@pytest.mark.parametrize("kl_coef", [0.0, PPOConfig().kl_coef, 2.0])
def test_the_score_lands_on_the_last_kept_token_once(kl_coef):
    """Responses of 1, 2, 5 and 6 of 6 tokens; nonzero log-probs in masked places do not count."""
    lengths, scores = [1, 2, 5, 6], float64([2.0, -1.0, 0.5, 3.0])
    mask, logp, ref = ragged_mask(lengths), normal(4, 6, seed=1), normal(4, 6, seed=2)
    rewards = shaped_rewards(scores, logp, ref, mask, kl_coef)
    for n, length in enumerate(lengths):
        expected = (-kl_coef * (logp[n, :length] - ref[n, :length])).tolist()
        expected[-1] += scores[n].item()
        assert rewards[n].tolist() == pytest.approx(expected + [0.0] * (6 - length), abs=1e-12)
    check_rewards(rewards, scores, logp, ref, mask, kl_coef, "here")
    rewards[2, 0] += 0.1
    with pytest.raises(TrainingError, match="here: rewards don't add up"):
        check_rewards(rewards, scores, logp, ref, mask, kl_coef, "here")


def mixture_of_k_steps(rewards, v, gamma, lam):
    """GAE as its docstring defines it: A_t(k) with the weights (1 - lam) lam^(k-1). After the end
    of the episode, A_t(k) stays what it is, and the weights of all larger k sum to lam^(k-1)."""
    n, result = len(rewards), []
    for t in range(n):
        earned, mixture = 0.0, 0.0
        for k in range(1, n - t + 1):
            earned += gamma ** (k - 1) * rewards[t + k - 1]
            is_end = t + k == n
            rest = 0.0 if is_end else gamma ** k * v[t + k]
            weight = lam ** (k - 1) * (1 if is_end else 1 - lam)
            mixture += weight * (earned + rest - v[t])
        result.append(mixture)
    return result


@pytest.mark.parametrize("poison", [NAN, math.inf, 1e6])
@pytest.mark.parametrize("gamma, lam", [(1, 0.95), (0.9, 0.8), (1, 0), (0.9, 0), (1, 1), (0.9, 1),
                                        (1, 0.5), (0.5, 0.5)])
def test_gae_is_the_double_sum_and_the_mixture(gamma, lam, poison):
    """Also with a poison in the masked places. At gamma = lam = 1, A is reward to go minus V."""
    lengths, width = [1, 2, 7, 12, 5], 12
    mask = ragged_mask(lengths)
    rewards = normal(5, width).masked_fill(~mask, poison)
    v = normal(5, width, seed=1).masked_fill(~mask, poison)
    advantages, returns = gae(rewards, v, mask, gamma, lam)
    for n, length in enumerate(lengths):
        row, row_v = rewards[n, :length].tolist(), v[n, :length].tolist()
        pads = [0.0] * (width - length)
        for expected in (exact_gae, mixture_of_k_steps):
            expected = expected(row, row_v, gamma, lam)
            assert advantages[n].tolist() == pytest.approx(expected + pads, abs=1e-9)
        expected = [a + x for a, x in zip(expected, row_v)]
        assert returns[n].tolist() == pytest.approx(expected + pads, abs=1e-9)


@pytest.mark.parametrize("poison", [NAN, math.inf, 1e6])
def test_whitening_is_over_all_valid_tokens(poison):
    mask, x = ragged_mask([3, 9, 1, 6]), 5 + 3 * normal(4, 9, seed=6)
    white = whiten(x.masked_fill(~mask, poison), mask)
    kept = x[mask]
    expected = (kept - kept.mean()) / ((kept - kept.mean()) ** 2).mean().sqrt()
    # 1e-8 beside a variance of about 9 changes a number by a share of 6e-10.
    assert max_difference(white[mask], expected) < 1e-8 and (white[~mask] == 0).all()
    assert white[0][mask[0]].mean().abs() > 0.05  # over the batch, not row by row
    # One token, or equal ones, become 0.
    assert (whiten(normal(2, 3), ragged_mask([1, 0], 3)) == 0).all()
    assert (whiten(torch.full((2, 3), 0.5), ragged_mask([3, 2])) == 0).all()


@pytest.mark.parametrize("advantage, ratio, moves", [
    (2.0, 1.5, False), (-2.0, 0.5, False),  # moved past the band where A points: enough
    (2.0, 0.5, True), (-2.0, 1.5, True),    # moved the wrong way: the way back is never blocked
    (2.0, 1.1, True), (-2.0, 0.9, True), (2.0, 0.9, True), (-2.0, 1.1, True),
    (2.0, 1.0, True), (-3.0, 1.0, True)])  # where both branches are equal, -A and not half of it
def test_where_the_policy_gradient_is_clipped(advantage, ratio, moves):
    old, clip = -1.0, 0.2
    logp = float64(old + math.log(ratio)).requires_grad_(True)
    found = policy_loss(logp, float64(old), float64(advantage), clip)
    found.backward()
    expected = -min(ratio * advantage, min(max(ratio, 1 - clip), 1 + clip) * advantage)
    assert found.item() == pytest.approx(expected, abs=1e-12)
    assert logp.grad.item() == pytest.approx(-advantage * ratio if moves else 0.0, abs=1e-12)


@pytest.mark.parametrize("old", [-0.3, 1.0])
@pytest.mark.parametrize("target", [-2.0, 0.05, 0.9, 1.3])
def test_value_loss_and_where_its_gradient_is_0(old, target):
    """0 where V lies outside the band around the OLD value and the clipped error is larger."""
    clip = 0.2
    for k in range(-8, 9):
        v = old + 0.07 * k
        x = float64(v).requires_grad_(True)
        found = value_loss(x, float64(old), float64(target), clip)
        found.backward()
        near = min(max(v, old - clip), old + clip)
        expected = 0.5 * max((v - target) ** 2, (near - target) ** 2)
        assert found.item() == pytest.approx(expected, abs=1e-12)
        is_blocked = abs(v - old) > clip and abs(near - target) > abs(v - target)
        assert x.grad.item() == pytest.approx(0.0 if is_blocked else v - target, abs=1e-12)


def test_a_rollout_that_does_not_fit_its_log_probs_stops_the_run(world):
    ro, cfg = world.ro, PPOConfig()
    logp = all_logprobs(world.policy, ro, cfg)
    not_sampled = ro.logp.masked_fill(~ro.mask, NAN)  # nobody's log-probs
    cancelling = logp.masked_scatter(ro.mask, logp[ro.mask].flip(0))  # errors whose mean is 0
    one_slot = ro.logp.clone()
    one_slot[5] += 0.0012  # in one response of 24, so the mean is 5e-5
    check_rollout(replace(ro, logp=not_sampled), logp, logp, END, "iteration 7", is_first=True)
    for sampled in (ro.logp.roll(1, 1), ro.logp + 0.001, ro.logp - 0.001, ro.logp * NAN,
                    cancelling, one_slot):
        with pytest.raises(TrainingError, match="iteration 7: log-probs while sampling"):
            check_rollout(replace(ro, logp=sampled), logp, logp, END, "iteration 7", False)
    # The KL must be 0 before the first update only.
    for other in (logp + 0.001, logp - 0.001, logp * NAN, cancelling):
        check_rollout(ro, logp, other, END, "iteration 7", is_first=False)
        with pytest.raises(TrainingError, match="iteration 7: the KL to the initial policy"):
            check_rollout(ro, logp, other, END, "iteration 7", is_first=True)


def test_a_response_that_does_not_end_with_its_end_of_turn_stops_the_run(world):
    ro = world.ro
    logp = all_logprobs(world.policy, ro, PPOConfig())
    n = int((ro.finished & (ro.response_len > 2)).nonzero()[0])
    unfinished = int((~ro.finished).nonzero()[0])
    last = int(ro.prompt_len[n] + ro.response_len[n] - 1)
    goes_on, never_ends, stops = ro.tokens.clone(), ro.tokens.clone(), ro.finished.clone()
    goes_on[n, last - 1] = END       # an action after the end of turn
    never_ends[n, last] = END + 1    # finished, without an end of turn
    stops[unfinished] = True         # the same, at the length limit
    for broken, words in ((replace(ro, tokens=goes_on), "goes on after its end-of-turn token"),
                          (replace(ro, tokens=never_ends), "does not end with the end-of-turn"),
                          (replace(ro, finished=stops), "does not end with the end-of-turn"),
                          (replace(ro, finished=~stops), "or vice versa")):
        with pytest.raises(TrainingError, match=f"iteration 7: .*{words}"):
            check_rollout(broken, logp, logp, END, "iteration 7", is_first=False)


def test_a_frozen_network_that_moves_stops_the_run(world):
    net = copy.deepcopy(world.policy)
    before = checksum(net)
    check_frozen([world.critic, net], [checksum(world.critic), before], "iteration 7")
    with torch.no_grad():
        net.blocks[1].mlp_in.bias[3] += 1e-3
    with pytest.raises(TrainingError, match="iteration 7: a frozen model, GPT, has changed"):
        check_frozen([world.critic, net], [checksum(world.critic), before], "iteration 7")


def test_the_log_line_names_each_number():
    names = ("tokens", "finished", "score", "truth", "kl", "kl_k3", "explained_variance",
             "entropy", "approx_kl", "clip_fraction", "value_loss", "grad_norm", "critic_grad_norm")
    statistics = dict(zip(names, range(1, 14)))
    line = log_line(20, statistics, 0.5)
    found = {}
    for name, number in re.findall(r"([A-Za-z]\w*) +([\d.]+)", line):
        found[name] = float(number)
    assert found == dict(it=20, len=1, fin=2, score=3, truth=4, KL=5, k3=6, ev=7, ent=8, appKL=9,
                         clip=10, vloss=11, grad=12)
    assert "grad 12.00 13.00 | 0.5 s" in line  # policy, critic
    del statistics["truth"]  # real data
    assert log_line(20, statistics, 0.5) == line.replace(" truth  4.00", "")


# ---- The update --------------------------------------------------------------


class Recorder(torch.optim.SGD):
    """Keeps each step's gradients and moves nothing, except for a shove after the first step."""

    def __init__(self, policy, critic, shove=0.0):
        super().__init__([*policy.parameters(), *critic.parameters()], lr=1.0)
        self.nets, self.shove, self.steps, self.shapes = (policy, critic), shove, [], []

    def step(self):
        self.steps.append(gradients(*self.nets))
        if self.shove and len(self.steps) == 1:
            with torch.no_grad():
                for seed, p in enumerate(self.param_groups[0]["params"]):
                    p += self.shove * normal(*p.shape, seed=seed)


def some_experience(world, cfg) -> Experience:
    """True log-probs and values of before the update; the rest is random, as if after GAE."""
    mask, old_values = world.ro.mask, all_values(world.critic, world.ro, cfg)
    return Experience(all_logprobs(world.policy, world.ro, cfg), old_values,
                      normal(N, R, seed=1) * mask, old_values + normal(N, R, seed=2) * mask)


def recorded(world, cfg, ex=None, ro=None, shove=0.0, seed=0, stale=0.0):
    """Run `update` on copies -> (Recorder, statistics). stale: what all gradients are before."""
    policy, critic = copy.deepcopy(world.policy), copy.deepcopy(world.critic)
    for p in [*policy.parameters(), *critic.parameters()]:
        p.grad = torch.full_like(p, stale)
    recorder = Recorder(policy, critic, shove)
    policy.register_forward_pre_hook(lambda _, inputs: recorder.shapes.append(inputs[0].shape))
    generator = torch.Generator().manual_seed(seed)
    statistics = update(policy, critic, recorder, ro or world.ro, ex or some_experience(world, cfg),
                        cfg, generator, "iteration 7")
    return recorder, statistics


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_gradient_is_the_textbook_one(world, temperature):
    """At ratio 1, and after a shove that clips many tokens (1 s: 48 single rows, twice)."""
    cfg = PPOConfig(passes=2, minibatch=N, temperature=temperature, value_clip=0.3, **OPEN)
    ex, expected = some_experience(world, cfg), []
    recorder, statistics = recorded(world, cfg, ex, shove=0.05)
    for found, nets in zip(recorder.steps, ((world.policy, world.critic), recorder.nets)):
        numbers = textbook(nets, world.ro, ex, cfg, range(N))
        assert max_difference(found, gradients(*nets)) < 1e-9
        assert min(numbers["grad_norm"], numbers["critic_grad_norm"]) > 0.01
        expected.append(numbers)
    assert expected[0]["clip_fraction"] == 0 and 0.1 < expected[1]["clip_fraction"] < 0.9
    assert statistics == pytest.approx(averages(expected), abs=COUNTS)
    assert averages([{"x": 1.0}, {"x": 4.0}]) == {"x": 2.5}
    ratios, zero = float64([0.7, 0.81, 1.1, 1.3]), float64(0)
    counts = update_statistics(zero, zero, zero, ratios.log(), torch.zeros(4), clip=0.2)
    assert counts["clip_fraction"] == 2  # log 0.81 is -0.21, but the ratio is what is clipped


def test_pieces_give_the_gradient_of_one_batch(world):
    """A small token budget cuts a minibatch of unequal lengths into many pieces."""
    cfg = PPOConfig(passes=2, minibatch=N, token_budget=10**6, **OPEN)
    whole, statistics = recorded(world, cfg, shove=0.03)
    for budget in (1, 45, 200):
        pieces, found = recorded(world, replace(cfg, token_budget=budget), shove=0.03)
        assert max_difference(torch.stack(pieces.steps), torch.stack(whole.steps)) < 1e-9
        assert found == pytest.approx(statistics, abs=COUNTS)
        assert len(pieces.shapes) > len(whole.shapes) == 2
        assert all(rows * width <= budget or rows == 1 for rows, width in pieces.shapes)


def test_pads_change_no_statistic_and_no_gradient(world):
    """Larger rectangles, random tokens after each response, a stray number where masked."""
    cfg, wide, poisoned = PPOConfig(passes=2, minibatch=N, **OPEN), widened(world.ro, 13), {}
    for name, x in vars(some_experience(world, cfg)).items():
        poisoned[name] = F.pad(x, (0, 13)).masked_fill(~wide.mask, -7.0)
    plain, statistics = recorded(world, cfg, shove=0.03)
    padded, found = recorded(world, cfg, Experience(**poisoned), wide, shove=0.03)
    assert max_difference(torch.stack(padded.steps), torch.stack(plain.steps)) < 1e-9
    assert found == pytest.approx(statistics, abs=COUNTS)


def test_each_response_is_used_once_a_pass(world):
    """In minibatches of 1, every gradient is that of one response over its own tokens, and holds
    nothing of earlier ones. Each pass has a random order of its own (1 s: 150 small steps)."""
    cfg, expected, nets = PPOConfig(passes=2, minibatch=1, **OPEN), [], (world.policy, world.critic)
    ex = some_experience(world, cfg)
    for n in range(N):
        textbook(nets, world.ro, ex, cfg, [n])
        expected.append(gradients(*nets))
    found = torch.stack(recorded(world, cfg, ex, stale=1e3)[0].steps)
    which = torch.cdist(found, torch.stack(expected)).argmin(1)
    assert max_difference(found, torch.stack(expected)[which]) < 1e-9
    first, second = which[:N].tolist(), which[N:].tolist()
    assert sorted(first) == sorted(second) == list(range(N))
    assert first != second and first != list(range(N))
    assert torch.equal(recorded(world, cfg, ex)[0].steps[0], found[0])
    assert not torch.equal(recorded(world, cfg, ex, seed=1)[0].steps[0], found[0])
    assert len(recorded(world, PPOConfig(minibatch=10))[0].steps) == 3  # the last one is small


def test_gradients_are_clipped_after_they_are_complete(world):
    """Each network to the norm by itself, in its own direction; the norm before it is reported."""
    cfg = PPOConfig(minibatch=N, token_budget=100)
    sizes = [flat(net.parameters()).numel() for net in (world.policy, world.critic)]
    raw = recorded(world, replace(cfg, **OPEN))[0].steps[0].split(sizes)
    norms = [part.norm().item() for part in raw]
    limit = min(norms) / 3
    recorder, statistics = recorded(world, replace(cfg, max_grad_norm=limit))
    assert [statistics["grad_norm"], statistics["critic_grad_norm"]] == pytest.approx(norms)
    for a, b, norm in zip(raw, recorder.steps[0].split(sizes), norms):
        # torch divides by norm + 1e-6, which makes the limit that much shorter.
        assert max_difference(b, a * limit / norm) < 2e-6 * limit / norm
    # A short gradient is left alone.
    unclipped, _ = recorded(world, replace(cfg, max_grad_norm=2 * max(norms)))
    assert torch.equal(unclipped.steps[0], flat(raw))


def fails(world, cfg, match, hook=lambda gradient: gradient, **change):
    """`update` must stop before its first step: the weights stay as they were."""
    policy, critic = copy.deepcopy(world.policy), copy.deepcopy(world.critic)
    policy.ln_f.bias.register_hook(hook)
    optimizer = torch.optim.SGD([*policy.parameters(), *critic.parameters()], lr=1.0)
    ex = replace(some_experience(world, cfg), **change)
    with pytest.raises(TrainingError, match=match):
        update(policy, critic, optimizer, world.ro, ex, cfg, torch.Generator(), "iteration 7")
    assert torch.equal(flat(policy.parameters()), flat(world.policy.parameters()))
    assert torch.equal(flat(critic.parameters()), flat(world.critic.parameters()))


def test_a_first_ratio_that_is_not_1_stops_the_run(world):
    cfg = PPOConfig(token_budget=60)
    for gap in (0.01, -0.01):
        logp = some_experience(world, cfg).logp
        fails(world, cfg, "iteration 7.*ratio", logp=logp + gap)
        logp[17, 0] += gap  # one token is enough
        fails(world, PPOConfig(), "iteration 7.*ratio", logp=logp)


@pytest.mark.parametrize("bad", [NAN, math.inf])
def test_numbers_that_are_not_finite_stop_the_run(world, bad):
    cfg = PPOConfig(token_budget=60)
    for field in ("advantages", "returns", "values", "logp"):
        x = getattr(some_experience(world, cfg), field)
        x[3, 0] = bad
        fails(world, cfg, "iteration 7.*(loss is|ratio)", **{field: x})
    fails(world, cfg, "iteration 7: the grad norm", hook=lambda gradient: gradient * bad)


def test_an_update_asks_the_device_few_questions(world, monkeypatch):
    """A piece asks once where its tokens are and once how wide it is; a minibatch asks once
    for all its statistics and once for its norms, and counts its tokens on the CPU; the whole
    update asks for lengths, and for the first ratio."""
    counts = Counter()

    def count(name):
        method = getattr(torch.Tensor, name)
        monkeypatch.setattr(torch.Tensor, name, lambda x, *args, **options: (
            counts.update([name]), method(x, *args, **options))[1])
    cfg = PPOConfig(minibatch=4, token_budget=10**6)
    experience = some_experience(world, cfg)
    for name in ("item", "tolist", "nonzero", "__int__", "__bool__", "cpu"):
        count(name)
    recorded(world, cfg, experience)
    n = -(-N // 4)
    assert counts["nonzero"] == n and counts["__int__"] == n and counts["tolist"] == 3 * n
    assert counts["cpu"] == 2 and counts["item"] == n + 1 and counts["__bool__"] == 0


# ---- The Learner: the loop that ships ----------------------------------------


def exact_experience(nets, ro: Rollouts, cfg: PPOConfig):
    """Steps 3 to 5 of an iteration, response by response -> (Experience, statistics)."""
    policy, reference, critic, pm = nets
    lists, scores, kls, k3s, rows = [], [], [], [], ro.responses()
    for n, response in enumerate(rows):
        prompt = ro.tokens[n, :ro.prompt_len[n]].tolist()
        score = exact_score(pm, prompt + response + [END_OF_CONTEXT])
        scores.append(score if response[-1] == END else score - cfg.unfinished_penalty)
        logp = exact_response(policy, prompt, ro, n, cfg.temperature)[0].tolist()
        ref_logp = exact_response(reference, prompt, ro, n, cfg.temperature)[0].tolist()
        v = exact_values(critic, ro, n).tolist()
        gaps = [a - b for a, b in zip(logp, ref_logp)]
        kls.append(sum(gaps))
        k3s.append(sum(math.exp(-gap) - 1 + gap for gap in gaps))
        rewards = [-cfg.kl_coef * gap for gap in gaps]
        rewards[-1] += scores[-1]
        lists.append((logp, v, exact_gae(rewards, v, cfg.gamma, cfg.gae_lambda)))
    old_logp, old_values, advantages = [float64(sum(column, [])) for column in zip(*lists)]  # (n,)
    returns = advantages + old_values          # of advantages that are not whitened yet
    white = (advantages - advantages.mean()) / advantages.std(correction=0)
    rectangles = []
    for x in (old_logp, old_values, white, returns):
        rectangles.append(torch.zeros_like(ro.logp).masked_scatter(ro.mask, x))
    unexplained, n_rows = (returns - old_values).var() / returns.var(), len(rows)
    return Experience(*rectangles), {
        "score": sum(scores) / n_rows, "kl": sum(kls) / n_rows, "kl_k3": sum(k3s) / n_rows,
        "reward": (sum(scores) - cfg.kl_coef * sum(kls)) / n_rows,
        "tokens": len(old_logp) / n_rows, "explained_variance": 1 - unexplained.item(),
        "finished": sum(row[-1] == END for row in rows) / n_rows}


def test_three_iterations_are_the_textbook_ones(monkeypatch):
    """Everything that a Learner passes on, at a temperature other than 1: statistics and weights
    are those of an RLHF that is written out here with a model of its own for each role."""
    cfg = RLConfig(batch=12, minibatch=12, max_response=R, temperature=0.7, gamma=0.9, warmup=2,
                   max_grad_norm=0.05, unfinished_penalty=1.5, slots=4, token_budget=100,
                   passes=2, clip=0.003, value_clip=0.002)  # both clip in the second pass
    torch.manual_seed(0)
    reference = doubled(shaken(GPT(CFG), 1)).requires_grad_(False)
    pm = doubled(ScalarModel(shaken(GPT(CFG), 3))).requires_grad_(False)
    pm.mean += 0.4
    policy, critic = copy.deepcopy(reference), copy.deepcopy(pm)
    for x in (critic.head.weight, critic.head.bias, critic.mean):
        x.zero_()
    frozen = [*reference.parameters(), *pm.parameters()]
    before = flat(frozen)
    optimizers = []
    for net in (policy.requires_grad_(True), critic.requires_grad_(True)):
        optimizers.append(torch.optim.Adam(net.parameters(), betas=(0.9, 0.95), eps=1e-5))

    run, prompts = StubRun(), StubPrompts()
    learner = Learner(run, replace(cfg), reference, pm)
    learner.critic.double()  # in place, hence the same parameters that the optimizer knows
    assert run.prepared == [learner.policy, learner.critic] and learner.sampler.wanted_slots == 4
    trained = [*learner.policy.parameters(), *learner.critic.parameters()]
    addresses = [p.untyped_storage().data_ptr() for p in frozen + trained]
    assert len(set(addresses)) == len(addresses)  # no two networks share any

    for iteration, rate in enumerate((0.5, 1.0, 1.0)):  # of the peak
        statistics = learner.iterate(prompts, iteration)
        ids = StubPrompts().draw(12, "train", iteration, held_out=False).ids
        uniforms = torch.rand(12, R, generator=torch_rng(0, "rollout", iteration))
        ro = plain_rollout(policy, ids, uniforms, END, cfg.temperature)
        ex, expected = exact_experience((policy, reference, critic, pm), ro, cfg)
        steps = []
        for _ in range(cfg.passes):
            steps.append(textbook((policy, critic), ro, ex, cfg, range(12)))
            for optimizer, peak in zip(optimizers, (cfg.lr, cfg.critic_lr)):
                group = optimizer.param_groups[0]
                group["lr"] = peak * rate
                torch.nn.utils.clip_grad_norm_(group["params"], cfg.max_grad_norm)
                optimizer.step()
        assert statistics == pytest.approx(expected | averages(steps), abs=COUNTS)
        assert statistics["clip_fraction"] > 0.1
        assert 0 < statistics["finished"] < 1
        assert min(statistics["grad_norm"], statistics["critic_grad_norm"]) > cfg.max_grad_norm
        expected = [*policy.parameters(), *critic.parameters()]
        assert max_difference(flat(trained), flat(expected)) < 1e-9
    assert torch.equal(flat(frozen), before)
    assert prompts.calls == [(12, ("train", i), False) for i in range(3)]
    assert run.names[::2] == [("rollout", i) for i in range(3)]
    assert run.names[1::2] == [("minibatches", i) for i in range(3)]
    learner.cfg.warmup = 0
    learner.set_learning_rates(0)
    assert [group["lr"] for group in learner.optimizer.param_groups] == [cfg.lr, cfg.critic_lr]
    # A policy that is not the reference at iteration 0 stops the run.
    with pytest.raises(TrainingError, match="RLHF iteration 0: the KL to the initial policy"):
        learner.iterate(prompts, 0)
    # So do rewards that are not the score less the penalty.
    monkeypatch.setattr(train_rl, "shaped_rewards", lambda *args: 1.1 * shaped_rewards(*args))
    with pytest.raises(TrainingError, match="RLHF iteration 3: rewards don't add up"):
        learner.iterate(prompts, 3)
    # So do log-probs of a sampler that are not those of the full forward pass.
    sampler = learner.sampler

    def other_sampler(ids, uniforms):
        ro = sampler(ids, uniforms)
        return replace(ro, logp=ro.logp + 0.001)
    learner.sampler = other_sampler
    with pytest.raises(TrainingError, match="RLHF iteration 3: log-probs while sampling"):
        learner.iterate(prompts, 3)


def test_defaults_are_those_of_the_papers():
    """clip, gamma and K of HH App. B.1; OpenAI's where HH is silent; the README's lambda_KL."""
    cfg = RLConfig()
    assert (cfg.clip, cfg.gamma, cfg.passes) == (0.2, 1.0, 1)
    assert (cfg.value_clip, cfg.gae_lambda, cfg.temperature) == (0.2, 0.95, 1.0)
    readme = Path(train_rl.__file__).with_name("README.md").read_text()
    assert re.findall(r"λ_KL\W+is ([\d.]+) here", readme) == [str(cfg.kl_coef)]


class LikesSevens(ScalarModel):
    """A preference model that counts the sevens of a reply, which begins after OPENING."""

    def score(self, ids, lengths):
        at = torch.arange(ids.shape[1])
        start = (ids == OPENING).int().argmax(1)
        is_reply = (at > start[:, None]) & (at < lengths[:, None] - 1)
        return ((ids == 7) & is_reply).sum(1).float()


def learn(pm, iterations, **knobs):
    """The shipped loop, at the shipped defaults but for `knobs` -> (Learner, statistics)."""
    torch.manual_seed(0)
    learner = Learner(StubRun(), RLConfig(**knobs), GPT(CFG).requires_grad_(False), pm)
    prompts, log = StubPrompts(), []
    for iteration in range(iterations):
        log.append(learner.iterate(prompts, iteration))
    return learner, log


def test_ppo_learns_and_the_kl_penalty_holds_it_back():
    """At the shipped defaults, but for fewer responses of 8 tokens (a second for each of the three
    trainings). 8 sevens are worth 7, and 8 log 16 = 22 nats away from a uniform policy."""
    score, kl = {}, {}
    for kl_coef in (0.0, 0.5, 100.0):
        pm, knobs = LikesSevens(GPT(CFG)), dict(batch=128, minibatch=32, max_response=8)
        _, log = learn(pm, 11, kl_coef=kl_coef, **knobs)
        score[kl_coef], kl[kl_coef] = log[-1]["score"], log[-1]["kl"]
        assert log[0]["score"] < 0.3 and abs(log[0]["kl"]) < 1e-5
    assert score[0.0] > 3 and score[100.0] < 0.5
    assert 30 > kl[0.0] > 1.5 * kl[0.5] > 3 * kl[100.0]


def test_a_constant_score_leaves_the_policy_alone_and_teaches_the_critic():
    """With gamma = lambda = 1, no penalty and a critic of zeros, every token's advantage is the
    same constant, and 0 once whitened. So the policy does not change by a bit, and the critic
    learns the constant. (In later iterations only the critic's small errors are left to whiten.)"""
    pm = ScalarModel(GPT(CFG), zero_head=True).requires_grad_(False)
    pm.head.bias += 1
    learner, log = learn(pm, 1, batch=64, minibatch=32, max_response=8, passes=10, kl_coef=0.0,
                         gae_lambda=1.0, unfinished_penalty=0.0, value_clip=10.0, critic_lr=1e-2,
                         warmup=1)
    assert torch.equal(flat(learner.reference.parameters()), flat(learner.policy.parameters()))
    assert log[0]["explained_variance"] == 1  # returns without variance leave nothing unexplained
    assert log[0]["grad_norm"] == 0 and log[0]["policy_loss"] == 0 and log[0]["approx_kl"] < 1e-8
    ids = StubPrompts().draw(64, "new", held_out=False).ids
    ro = plain_rollout(learner.policy, ids, random_uniforms(64, 8, 1), END)
    v = all_values(learner.critic, ro, PPOConfig())[ro.mask]
    assert 0.8 < v.mean().item() < 1.2 and v.std().item() < 0.2
