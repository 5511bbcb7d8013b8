"""Tests of pm.py. Expected values are computed here in float64, row by row, or by hand."""
import copy
import math
import random

import pytest
import torch

from data import Comparison, pad
from model import GPT, GPTConfig
from pm import ScalarModel, ranking_loss, report, score_rows, wilson

CFG = GPTConfig(n_layer=2, n_head=2, d_model=32, vocab_size=64, context=64)


def random_gpt(seed: int) -> GPT:
    """A small model whose every parameter matters: a fresh one has zero biases and LayerNorm weights of one."""
    torch.manual_seed(seed)
    net = GPT(CFG).requires_grad_(False)
    for p in net.parameters():
        p += torch.randn_like(p) * (0.3 if p.dim() == 1 else 0.1)
    return net


@pytest.fixture
def pm() -> ScalarModel:
    net = ScalarModel(random_gpt(0)).requires_grad_(False)
    net.head.bias += 0.7
    return net


def random_rows(n: int, seed: int, longest: int = 40) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(64) for _ in range(rng.randrange(1, longest + 1))] for _ in range(n)]


def exact_score(pm: ScalarModel, row: list[int]) -> float:
    """The score of one row, read alone and without pads, in float64 from the trunk's last state on."""
    trunk = copy.deepcopy(pm.trunk).double()
    state = trunk(torch.tensor([row]))[0, len(row) - 1]
    return (state @ pm.head.weight[0].double() + pm.head.bias.double() - pm.mean.double()).item()


# --- the score -------------------------------------------------------------------------

def test_the_score_is_the_head_on_the_last_real_token(pm):
    rows = random_rows(12, 1)
    ids, lengths = pad(rows)
    scores = pm.score(ids, lengths)
    assert scores.shape == (12,) and scores.dtype == torch.float32
    for row, score in zip(rows, scores.tolist()):
        assert abs(score - exact_score(pm, row)) < 1e-4
    assert pm(ids).shape == ids.shape
    for b, row in enumerate(rows):  # the number at position t is that of the row cut after t
        for t in (0, len(row) // 2):
            assert abs(pm(ids)[b, t].item() - exact_score(pm, row[:t + 1])) < 1e-4


def test_pads_do_not_matter(pm):
    """Neither their number nor their ids, be they those of real tokens."""
    rows = random_rows(8, 2, longest=20)
    ids, lengths = pad(rows)
    expected = pm.score(ids, lengths)
    generator = torch.Generator().manual_seed(0)
    for width in (int(lengths.max()), 33, 64):
        for value in (0, 63, "random"):
            wide = torch.randint(64, (8, width), generator=generator)
            if value != "random":
                wide[:] = value
            for b, row in enumerate(rows):
                wide[b, :len(row)] = torch.tensor(row)
            assert (pm.score(wide, lengths) - expected).abs().max() < 1e-5


def test_only_tokens_up_to_the_scored_one_matter(pm):
    row = random_rows(1, 3)[0] + list(range(20))
    scored = len(row) - 8  # tokens row[scored:] come after the scored one
    ids, lengths = torch.tensor([row]), torch.tensor([scored])
    before = pm.score(ids, lengths)
    for t in range(len(row)):
        changed = ids.clone()
        changed[0, t] = (row[t] + 31) % 64
        difference = (pm.score(changed, lengths) - before).abs().item()
        assert difference < 1e-6 if t >= scored else difference > 1e-5, t


def test_score_rows_does_not_depend_on_how_rows_are_batched(pm):
    rows = random_rows(40, 4)
    expected = torch.tensor([exact_score(pm, row) for row in rows])
    for token_budget in (1, 64, 300, 8192):
        scores = score_rows(pm, rows, token_budget)
        assert scores.shape == (40,) and scores.dtype == torch.float32 and scores.device.type == "cpu"
        assert (scores - expected).abs().max() < 1e-4
    order = random.Random(0).sample(range(40), 40)
    assert (score_rows(pm, [rows[i] for i in order], 200) - expected[order]).abs().max() < 1e-4
    assert (score_rows(pm, rows[7:8]) - expected[7:8]).abs().max() < 1e-4
    assert score_rows(pm, []).shape == (0,)


def test_score_rows_keeps_to_the_token_budget_and_makes_no_graph(pm, monkeypatch):
    shapes = []
    score = ScalarModel.score

    def spy(self, ids, lengths):
        shapes.append(tuple(ids.shape))
        return score(self, ids, lengths)
    monkeypatch.setattr(ScalarModel, "score", spy)
    assert not score_rows(pm.requires_grad_(True), random_rows(40, 4), 100).requires_grad
    assert sum(rows for rows, _ in shapes) == 40 and len(shapes) > 5
    assert all(rows * width <= 100 or rows == 1 for rows, width in shapes)


def test_the_mean_shifts_every_score_and_is_saved(pm):
    rows = random_rows(10, 5)
    before = score_rows(pm, rows)
    pm.mean += 1.5
    after = score_rows(pm, rows)
    assert (before - after - 1.5).abs().max() < 1e-6
    assert "mean" in pm.state_dict() and "mean" not in dict(pm.named_parameters())
    other = ScalarModel(random_gpt(9))
    assert other.mean.item() == 0
    other.load_state_dict(pm.state_dict())
    assert torch.equal(score_rows(other, rows), after)


def test_scores_are_float32_under_autocast(pm):
    """In bf16 a score near 2 would move in steps of 1/64, and so would the critic's values."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert pm(torch.tensor([[1, 2, 3]])).dtype == torch.float32


# --- the model -------------------------------------------------------------------------

def test_a_pms_head_starts_small_and_random():
    torch.manual_seed(0)
    trunk = GPT(GPTConfig(1, 1, 512, vocab_size=8, context=4))
    head = ScalarModel(trunk).head
    assert abs(head.weight.std().item() * math.sqrt(513) - 1) < 0.1  # sampling error is 3%
    assert abs(head.weight.mean().item()) * math.sqrt(513) < 0.2 and head.bias.item() == 0
    # So initial scores have a standard deviation near 1: LayerNorm makes states of norm sqrt(D).
    small, ids = GPT(CFG), torch.tensor([[5, 6, 7]])
    scores = torch.stack([ScalarModel(small)(ids)[0, -1] for _ in range(300)])
    assert 0.85 < scores.std().item() < 1.15


def test_a_zero_head_gives_values_of_exactly_zero():
    critic = ScalarModel(random_gpt(0), zero_head=True)
    assert (critic(torch.randint(64, (5, 30))) == 0).all()
    critic(torch.randint(64, (5, 30))).sum().backward()  # and still learns
    assert critic.head.weight.grad.abs().sum() > 0


def test_the_trunk_is_a_copy():
    lm = random_gpt(0)
    before = copy.deepcopy(lm.state_dict())
    pm = ScalarModel(lm).requires_grad_(True)
    assert all(torch.equal(p, before[name]) for name, p in pm.trunk.state_dict().items())
    optimizer = torch.optim.SGD(pm.parameters(), lr=0.1)
    a, b = pm.score(torch.tensor([[1, 2, 3], [1, 2, 4]]), torch.tensor([3, 3]))
    ranking_loss(a[None], b[None]).backward()
    optimizer.step()
    assert all(torch.equal(p, before[name]) for name, p in lm.state_dict().items())
    assert all(p.grad is None for p in lm.parameters())
    assert not torch.equal(pm.trunk.embed.weight, lm.embed.weight)


# --- the loss --------------------------------------------------------------------------

def exact_loss(chosen, rejected, weights=None) -> float:
    """-log sigmoid(chosen - rejected), a weighted mean, from Python floats; for moderate margins only."""
    weights = weights or [1.0] * len(chosen)
    losses = [-math.log(1 / (1 + math.exp(-(c - r)))) for c, r in zip(chosen, rejected)]
    return sum(w * x for w, x in zip(weights, losses)) / sum(weights)


def random_scores(n: int, seed: int, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return (3 * torch.randn(2, n, generator=generator, dtype=torch.float64)).to(dtype)


def test_the_ranking_loss_is_minus_log_sigmoid_of_the_margin():
    chosen, rejected = random_scores(50, 0)
    expected = exact_loss(chosen.tolist(), rejected.tolist())
    assert abs(ranking_loss(chosen, rejected).item() - expected) < 1e-12
    assert abs(ranking_loss(chosen.float(), rejected.float()).item() - expected) < 1e-6
    assert abs(ranking_loss(torch.zeros(3), torch.zeros(3)).item() - math.log(2)) < 1e-7
    # Two units of margin, by hand: log(1 + e^-2) = 0.126928 and log(1 + e^2) = 2.126928.
    two, zero = torch.tensor([2.0]), torch.tensor([0.0])
    assert abs(ranking_loss(two, zero).item() - 0.126928) < 1e-6
    assert abs(ranking_loss(zero, two).item() - 2.126928) < 1e-6


@pytest.mark.parametrize("margin", [1e4, 110.0, -110.0, -1e4])
def test_the_ranking_loss_is_finite_at_any_margin(margin):
    chosen = torch.tensor([margin], requires_grad=True)
    loss = ranking_loss(chosen, torch.zeros(1))
    loss.backward()
    assert abs(loss.item() - max(-margin, 0.0)) < 1e-6 * abs(margin)
    assert abs(chosen.grad.item() - (-1.0 if margin < 0 else 0.0)) < 1e-6


def test_the_ranking_loss_sees_differences_only():
    chosen, rejected = random_scores(20, 1)
    for shift in (-7.5, 100.0):
        assert abs(ranking_loss(chosen + shift, rejected + shift) - ranking_loss(chosen, rejected)) < 1e-12


@pytest.mark.parametrize("weighted", [False, True])
def test_the_gradient_of_the_ranking_loss(weighted):
    """Against central differences, and against sigmoid(rejected - chosen): wrong pairs pull most."""
    chosen, rejected = random_scores(8, 2)
    weight = torch.tensor([1.0, 3, 1, 1, 3, 3, 1, 1] if weighted else [1.0] * 8, dtype=torch.float64)
    given = weight if weighted else None
    chosen.requires_grad_(True), rejected.requires_grad_(True)
    ranking_loss(chosen, rejected, given).backward()
    assert torch.allclose(chosen.grad, -rejected.grad, atol=1e-12)
    for i in range(8):
        c, r = chosen.tolist(), rejected.tolist()
        step = 1e-5
        up, down = (exact_loss(c[:i] + [c[i] + s] + c[i + 1:], r, weight.tolist()) for s in (step, -step))
        assert abs(chosen.grad[i].item() - (up - down) / (2 * step)) < 1e-8
        share = weight[i].item() / weight.sum().item()
        assert abs(chosen.grad[i].item() + share / (1 + math.exp(c[i] - r[i]))) < 1e-12


def test_a_weight_of_lambda_counts_a_comparison_lambda_times():
    chosen, rejected = random_scores(4, 3)
    weight = torch.tensor([1.0, 3.0, 0.0, 1.0], dtype=torch.float64)
    repeated = torch.tensor([0, 1, 1, 1, 3])  # what the weights say, spelled out
    loss = ranking_loss(chosen, rejected, weight)
    assert abs(loss - ranking_loss(chosen[repeated], rejected[repeated])) < 1e-12
    assert abs(loss.item() - exact_loss(chosen.tolist(), rejected.tolist(), weight.tolist())) < 1e-12
    assert abs(ranking_loss(chosen, rejected, 5 * weight) - loss) < 1e-12  # ratios matter, not the scale
    ones = torch.ones(4, dtype=torch.float64)
    assert abs(ranking_loss(chosen, rejected, ones) - ranking_loss(chosen, rejected)) < 1e-12


# --- what is measured ------------------------------------------------------------------

@pytest.mark.parametrize("hits, n, low, high", [
    (5, 10, 0.2366, 0.7634), (0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (1, 1, 0.2065, 1.0),
    (263, 400, 0.6097, 0.7023)])
def test_wilson_against_known_intervals(hits, n, low, high):
    """By hand: 0 of n gives z^2 / (n + z^2) as the upper end, with z^2 = 3.8415."""
    assert wilson(hits, n) == pytest.approx((low, high), abs=5e-5)


def test_wilson_solves_its_equation():
    """Both ends are proportions q at which the observed one is exactly z standard errors away."""
    for hits, n in [(1, 3), (17.5, 40), (999, 1000), (2, 2000), (650, 1000)]:
        low, high = wilson(hits, n)
        assert 0 < low < hits / n < high < 1
        for q in (low, high):
            assert abs(abs(hits / n - q) / math.sqrt(q * (1 - q) / n) - 1.959964) < 1e-6


def test_wilson_stays_inside_0_and_1():
    assert wilson(0, 0) == (0.0, 1.0)  # nothing is known
    for n in range(1, 400):
        for hits in (0, n):
            low, high = wilson(hits, n)
            assert -1e-12 < low < high < 1 + 1e-12
            assert (low < 1e-12) == (hits == 0) and (high > 1 - 1e-12) == (hits == n)


def comparison(chosen: str, rejected: str, p_chosen=None) -> Comparison:
    return Comparison("\n\nHuman: q\n\nAssistant:", chosen, rejected, "helpful", p_chosen)


def test_report_by_hand():
    pairs = [comparison(" long one", " short", 0.9), comparison(" same", " size", 0.3),
             comparison(" a", " bcd", 0.5), comparison(" ab", " cde", 0.6), comparison(" a", " bc", 1.0)]
    margins = torch.tensor([2.0, 0.0, -1.0, 0.5, 3.0])
    r = report(margins, pairs)
    assert r.n == 5
    assert r.accuracy == pytest.approx((1 + 0.5 + 0 + 1 + 1) / 5)  # a tie is half right
    assert (r.low, r.high) == wilson(3.5, 5)
    assert r.length_rule == pytest.approx((1 + 0.5 + 0 + 0 + 0) / 5)
    assert r.bayes == pytest.approx((0.9 + 0.7 + 0.5 + 0.6 + 1.0) / 5)  # the better of p and 1 - p
    # -log sigmoid of 2, 0, -1, 0.5, 3: 0.126928, 0.693147, 1.313262, 0.474077, 0.048587.
    assert r.loss == pytest.approx(2.656001 / 5, abs=1e-6)
    assert "accuracy 0.700" in str(r) and "n = 5" in str(r) and "ceiling 0.740" in str(r)
    # The ceiling is known only where it is known for every comparison.
    assert report(margins, pairs[:4] + [comparison(" a", " bc")]).bayes is None
    unknown = report(margins[:1], [comparison(" a", " b")])
    assert unknown.bayes is None and "ceiling" not in str(unknown)


def test_report_of_a_pm_that_knows_nothing_or_everything():
    pairs = [comparison(" a", " b", 1.0)] * 8
    nothing = report(torch.zeros(8), pairs)
    assert nothing.accuracy == 0.5 and nothing.loss == pytest.approx(math.log(2))
    sure = report(torch.full((8,), 1e4), pairs)
    assert sure.accuracy == 1.0 and sure.loss == 0.0 and sure.bayes == 1.0
    wrong = report(torch.full((8,), -1e4), pairs)
    assert wrong.accuracy == 0.0 and wrong.loss == pytest.approx(1e4)


# --- learning --------------------------------------------------------------------------

def easy_pairs(n: int, seed: int) -> tuple[list, list]:
    """Rows of any length that differ in one place: the chosen one has a 5 there, the rejected one a 6."""
    rng = random.Random(seed)
    chosen, rejected = [], []
    for _ in range(n):
        before, after = ([rng.randrange(10, 60) for _ in range(rng.randrange(1, 8))] for _ in "ab")
        chosen.append(before + [5] + after + [63])
        rejected.append(before + [6] + after + [63])
    return chosen, rejected


def test_a_pm_learns_an_easy_preference_and_scores_the_same_once_loaded(tmp_path):
    torch.manual_seed(0)
    pm = ScalarModel(GPT(CFG))
    optimizer = torch.optim.Adam(pm.parameters(), lr=3e-3)
    chosen, rejected = easy_pairs(60 * 32, 0)
    test = easy_pairs(200, 1)

    def accuracy(pm):
        margins = score_rows(pm, test[0]) - score_rows(pm, test[1])
        return report(margins, [comparison(" a", " b")] * 200)
    assert accuracy(pm).accuracy < 0.8
    for start in range(0, len(chosen), 32):
        ids, lengths = pad(chosen[start:start + 32] + rejected[start:start + 32])
        optimizer.zero_grad()
        ranking_loss(*pm.score(ids, lengths).chunk(2)).backward()
        optimizer.step()
    r = accuracy(pm)
    assert r.accuracy > 0.97 and r.loss < 0.2

    with torch.no_grad():
        pm.mean += torch.cat([score_rows(pm, rows) for rows in test]).mean()
    assert abs(torch.cat([score_rows(pm, rows) for rows in test]).mean()) < 1e-5
    torch.save(pm.state_dict(), tmp_path / "pm.pt")
    loaded = ScalarModel(GPT(CFG))
    loaded.load_state_dict(torch.load(tmp_path / "pm.pt", weights_only=True))
    for rows in test:
        assert torch.equal(score_rows(loaded, rows, 512), score_rows(pm, rows, 512))
    assert accuracy(loaded) == accuracy(pm) and accuracy(pm).accuracy == r.accuracy
