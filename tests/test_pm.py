"""Tests of pm.py, and of train_pm.fit, which trains the PM. Expected values are computed by hand,
or row by row on models in float64, where two ways to compute a number agree to 1e-9."""
import copy
import math
import random

import pytest
import torch

from data import Comparison, pad
from helpers import (CFG, END_OF_CONTEXT, StubRun, doubled, exact_score, flat, float64,
                     max_difference, normal, shaken)
from model import GPT, GPTConfig
from pm import ScalarModel, ranking_loss, report, score_branches, score_rows, shared_length, wilson
from train_pm import EncodedPairs, PMConfig, fit


@pytest.fixture
def pm() -> ScalarModel:
    torch.manual_seed(0)
    net = doubled(shaken(ScalarModel(GPT(CFG)), 1)).requires_grad_(False)
    net.mean += 0.4
    return net


def random_rows(n: int, seed: int, longest: int = 40) -> list[list[int]]:
    rng, rows = random.Random(seed), []
    for _ in range(n):
        length = rng.randrange(1, longest + 1)
        rows.append([rng.randrange(16) for _ in range(length)])
    return rows


# ---- The model ---------------------------------------------------------------


def test_the_score_is_the_head_on_the_last_real_token(pm):
    """The number at position t is the score of the row that is cut after t."""
    rows = random_rows(12, 1)
    ids, lengths = pad(rows)
    scores, numbers = pm.score(ids, lengths), pm(ids)
    for b, row in enumerate(rows):
        assert scores[b].item() == pytest.approx(exact_score(pm, row), abs=1e-9)
        for t in (0, len(row) // 2):
            expected = exact_score(pm, row[:t + 1])
            assert numbers[b, t].item() == pytest.approx(expected, abs=1e-9)


def test_pads_do_not_matter(pm):
    """Neither their number nor their ids, be they those of real tokens."""
    rows, generator = random_rows(8, 2, longest=20), torch.Generator().manual_seed(0)
    ids, lengths = pad(rows)
    for width in (int(lengths.max()), 33, 64):
        wide = torch.randint(16, (8, width), generator=generator)
        for b, row in enumerate(rows):
            wide[b, :len(row)] = torch.tensor(row)
        assert max_difference(pm.score(wide, lengths), pm.score(ids, lengths)) < 1e-9


@pytest.mark.parametrize("n_shared, lengths", [(0, (1, 1)), (5, (3, 9)), (30, (1, 7, 20)), (7, (8,))])
def test_branches_score_like_separate_rows(pm, n_shared, lengths):
    """Three comparisons in one batch: K rows that begin alike, some of them equal, and gradients
    that are those of separate rows. Together the rows may be longer than the context."""
    rng, comparisons = random.Random(n_shared), []
    for more in (0, 3, 11):
        shared = [rng.randrange(16) for _ in range(n_shared + more)]
        comparisons.append([shared + [rng.randrange(16) for _ in range(n)] for n in lengths])
    comparisons[1][0] = list(comparisons[1][-1])  # as if both replies were the same
    expected = [[exact_score(pm, row) for row in rows] for rows in comparisons]
    scores = score_branches(pm.requires_grad_(True), comparisons, "cpu")
    assert max_difference(scores.detach(), torch.tensor(expected, dtype=torch.float64)) < 1e-9
    (scores ** 2).sum().backward()
    together = flat(p.grad for p in pm.parameters())
    pm.zero_grad()
    separate = [pm.score(*pad([row])) for rows in comparisons for row in rows]
    (torch.cat(separate) ** 2).sum().backward()
    assert max_difference(together, flat(p.grad for p in pm.parameters())) < 1e-9 * together.norm()


def test_the_shared_part_by_hand():
    assert shared_length([[1, 2, 3], [1, 2, 4, 5]]) == 2 and shared_length([[1], [2]]) == 0
    assert shared_length([[1, 2], [1, 2, 3], [1, 2, 4]]) == 1  # of each row one id is left over
    assert shared_length([[7, 8, 9]]) == 2


@pytest.mark.parametrize("token_budget", [1, 64, 300, 8192])
def test_score_rows_does_not_depend_on_how_rows_are_batched(pm, token_budget, monkeypatch):
    rows, shapes, score = random_rows(40, 4), [], ScalarModel.score
    expected = float64([exact_score(pm, row) for row in rows])

    def spy(self, ids, lengths):
        shapes.append(tuple(ids.shape))
        return score(self, ids, lengths)
    monkeypatch.setattr(ScalarModel, "score", spy)
    scores = score_rows(pm.requires_grad_(True), rows, token_budget)
    assert max_difference(scores, expected) < 1e-9 and not scores.requires_grad
    assert sum(n for n, _ in shapes) == 40
    assert all(n * width <= token_budget or n == 1 for n, width in shapes)
    assert score_rows(pm, []).shape == (0,)


def test_the_mean_shifts_every_score_and_is_saved(pm):
    rows = random_rows(10, 5)
    before = score_rows(pm, rows)
    pm.mean += 1.5
    after = score_rows(pm, rows)
    assert max_difference(before - 1.5, after) < 1e-9
    assert "mean" not in dict(pm.named_parameters())
    other = ScalarModel(GPT(CFG)).double()
    assert other.mean.item() == 0
    other.load_state_dict(pm.state_dict())
    assert torch.equal(score_rows(other, rows), after)


def test_scores_are_float32_under_autocast(pm):
    """In bf16 a score near 2 would move in steps of 1/64, and so would the critic's values."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scores = pm.float()(torch.tensor([[1, 2, 3]]))
    assert scores.dtype == torch.float32
    assert not torch.equal(scores, scores.bfloat16().float())  # nor rounded to bf16 on the way


def test_a_pms_head_starts_small_and_random():
    torch.manual_seed(0)
    heads = [ScalarModel(GPT(GPTConfig(1, 1, 512, vocab_size=8, context=4))).head for _ in range(8)]
    weights = torch.cat([head.weight[0] for head in heads]) * math.sqrt(513)
    # 4,096 draws: the standard error of the mean is 1/64, that of the deviation 1/90.
    assert abs(weights.mean()) < 4 / 64 and abs(weights.std() - 1) < 4 / 90
    assert all(head.bias.item() == 0 for head in heads)


def test_a_critic_starts_at_zero_and_still_learns():
    torch.manual_seed(0)
    critic, ids = ScalarModel(shaken(GPT(CFG), 0), zero_head=True), torch.randint(16, (5, 30))
    assert (critic(ids) == 0).all()
    critic(ids).sum().backward()
    assert critic.head.weight.grad.abs().sum() > 0


def test_the_trunk_is_a_copy(pm):
    trunk = ScalarModel(pm.trunk).trunk
    for mine, theirs in zip(trunk.parameters(), pm.trunk.parameters(), strict=True):
        assert torch.equal(mine, theirs) and mine.data_ptr() != theirs.data_ptr()


# ---- The loss, the report and training ---------------------------------------


def test_the_ranking_loss_and_its_gradient():
    """-log sigmoid(chosen - rejected) of each pair; wrong pairs pull most."""
    chosen, rejected = normal(50).requires_grad_(True), normal(50, seed=1).requires_grad_(True)
    losses = ranking_loss(chosen, rejected)
    losses.sum().backward()
    for n in range(50):
        p = 1 / (1 + math.exp(rejected[n].item() - chosen[n].item()))
        assert losses[n].item() == pytest.approx(-math.log(p), abs=1e-12)
        assert chosen.grad[n].item() == pytest.approx(p - 1, abs=1e-12)
        assert rejected.grad[n].item() == pytest.approx(1 - p, abs=1e-12)


@pytest.mark.parametrize("margin", [1e4, 110.0, -110.0, -1e4])
def test_the_ranking_loss_is_finite_at_any_margin(margin):
    chosen = torch.tensor([margin], requires_grad=True)
    loss = ranking_loss(chosen, torch.zeros(1))
    loss.backward()  # a margin of 110 leaves e^-110, which is below 1e-47
    assert loss.item() == pytest.approx(max(-margin, 0.0))
    assert chosen.grad.item() == pytest.approx(-1.0 if margin < 0 else 0.0)


def test_wilson_solves_its_equation():
    """Both ends are proportions q at which the observed one is z standard errors away. By hand, 0
    of n gives z^2 / (n + z^2) as the upper end, with z^2 = 3.8415."""
    for hits, n in [(1, 3), (17.5, 40), (999, 1000), (2, 2000), (650, 1000)]:
        low, high = wilson(hits, n)
        assert 0 < low < hits / n < high < 1
        for q in (low, high):
            errors = abs(hits / n - q) / math.sqrt(q * (1 - q) / n)
            assert errors == pytest.approx(1.959964, abs=1e-6)
    assert wilson(0, 0) == (0.0, 1.0)  # nothing is known
    for n in range(1, 400):  # rounding must not leave [0, 1]
        (a, b), (c, d) = wilson(0, n), wilson(n, n)
        assert 0 <= a < 1e-12 and 1 - 1e-12 < d <= 1
        assert b == pytest.approx(3.8415 / (n + 3.8415), abs=1e-5) and c == pytest.approx(1 - b)


def comparison(chosen: str, rejected: str, p_chosen=None) -> Comparison:
    return Comparison("\n\nHuman: q\n\nAssistant:", chosen, rejected, "helpful", p_chosen)


def test_report_by_hand():
    pairs = [comparison(" long one", " short", 0.9), comparison(" same", " size", 0.3),
             comparison(" a", " bcd", 0.5), comparison(" ab", " cde", 0.6),
             comparison(" a", " bc", 1.0)]
    margins = torch.tensor([2.0, 0.0, -1.0, 0.5, 3.0])
    r = report(margins, pairs)
    assert r.n == 5
    assert r.accuracy == pytest.approx((1 + 0.5 + 0 + 1 + 1) / 5)  # a tie is half right
    assert (r.low, r.high) == wilson(3.5, 5)
    assert r.length_rule == pytest.approx((1 + 0.5 + 0 + 0 + 0) / 5)
    assert r.bayes == pytest.approx((0.9 + 0.7 + 0.5 + 0.6 + 1.0) / 5)  # the better of p and 1 - p
    # -log sigmoid of 2, 0, -1, 0.5, 3: 0.126928, 0.693147, 1.313262, 0.474077, 0.048587.
    assert r.loss == pytest.approx(2.656001 / 5, abs=1e-6)
    for words in (f"accuracy 0.700 [{r.low:.3f}, {r.high:.3f}]", "n = 5", "loss 0.531",
                  "is-better 0.300", "ceiling 0.740"):
        assert words in str(r)
    # The ceiling is known only where it is known for every comparison.
    unknown = report(margins, pairs[:4] + [comparison(" a", " bc")])
    assert unknown.bayes is None and "ceiling" not in str(unknown)
    nothing = report(torch.zeros(0), [])
    assert (nothing.accuracy, nothing.low, nothing.high, nothing.bayes) == (0.0, 0.0, 1.0, None)


class StubStage:
    """Passes steps on, and keeps what each step logs."""
    name = "pm"

    def __init__(self):
        self.lines = []
        self.start, self.resumed_note = dict, str  # nothing to restore, nothing to say

    def steps(self, items, save_every):
        return enumerate(items)

    def log(self, step, every, **numbers):
        self.lines.append(numbers)


def test_a_step_is_weighed_once_in_pieces_and_clipped(pm):
    """Two steps against a gradient that is written out: the sum of weight x loss over the sum of
    the weights, one of which is 0. The rate warms up to its peak."""
    cfg = PMConfig(batch=6, warmup=2, max_grad_norm=0.05, token_budget=100)
    chosen, rejected = random_rows(12, 1, longest=30), random_rows(12, 2, longest=30)
    weights = torch.tensor([1.0, 3, 1, 1, 0, 3, 3, 1, 1, 3, 1, 1])
    copied, stage, run = copy.deepcopy(pm), StubStage(), StubRun()
    fit(run, stage, cfg, pm.requires_grad_(True), EncodedPairs([], chosen, rejected), weights)
    optimizer = torch.optim.AdamW(copied.requires_grad_(True).parameters(), betas=(0.9, 0.95),
                                  weight_decay=0.0)
    order = torch.randperm(12, generator=StubRun().torch_rng("pm batches")).split(6)
    for batch, rate, line in zip(order, (0.5, 1.0), stage.lines, strict=True):
        losses, hits, kept = [], 0, [n for n in batch.tolist() if weights[n] > 0]
        for n in kept:
            a, b = pad([chosen[n], rejected[n]])
            a, b = copied.score(a, b)
            losses.append(weights[n] * -torch.log(torch.sigmoid(a - b)))
            hits += int(a > b)
        loss = torch.stack(losses).sum() / weights[kept].double().sum()
        optimizer.zero_grad()
        loss.backward()
        assert torch.nn.utils.clip_grad_norm_(copied.parameters(), 0.05) > 0.05
        optimizer.param_groups[0]["lr"] = cfg.lr * rate
        optimizer.step()
        assert line == pytest.approx({"loss": loss.item(), "accuracy": hits / len(kept)}, abs=1e-6)
    assert max_difference(flat(pm.parameters()), flat(copied.parameters())) < 1e-9
    assert run.names == [("pm batches",)] and not pm.training


def test_a_pm_learns_an_easy_preference():
    """Rows of any length that differ in one place: a 5 is better than a 6 (takes 2 seconds)."""
    rng, chosen, rejected = random.Random(0), [], []
    for row in random_rows(1200, 0, longest=12):
        at = rng.randrange(len(row) + 1)
        chosen.append(row[:at] + [5] + row[at:] + [END_OF_CONTEXT])
        rejected.append(row[:at] + [6] + row[at:] + [END_OF_CONTEXT])
    torch.manual_seed(0)
    pm = ScalarModel(GPT(CFG))
    pairs = EncodedPairs([], chosen[200:], rejected[200:])
    fit(StubRun(), StubStage(), PMConfig(lr=3e-3), pm, pairs, torch.ones(1000))
    margins = score_rows(pm, chosen[:200]) - score_rows(pm, rejected[:200])
    assert report(margins, [comparison(" a", " b")] * 200).accuracy > 0.95
