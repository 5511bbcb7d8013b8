"""Tests of what pm.py measures. Expected values come from brute force in plain Python, from finite differences, from
simulation, or by hand."""
import itertools
import math
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from model import GPT, GPTConfig
from pm import (ELO, auroc, best_of_n, best_of_n_kl, calibration_curve, elo_error, elo_to_win_rate,
                expected_calibration_error, features, fit_elo, fit_gao, fit_gaussian, fit_scaling, least_squares,
                line_fit, log_loss, logistic_fit, mahalanobis, outlier_exposure, threshold_curve, win_rate_to_elo)


def randn(*shape, seed: int):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rand(*shape, seed: int):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


# --- calibration -----------------------------------------------------------------------

def test_a_calibration_curve_by_hand():
    """|d| in order: 0, 0.5 | 1, 2, 3. The tie is half right, -1 is wrong."""
    predicted, observed, n = calibration_curve(torch.tensor([3.0, -1.0, 0.5, 2.0, 0.0]), bins=2)
    # 5 pairs in 2 bins: the first has 3 of them (0, 0.5, -1).
    assert n.tolist() == [3, 2]
    assert predicted.tolist() == pytest.approx([(0.5 + sigmoid(0.5) + sigmoid(1)) / 3, (sigmoid(2) + sigmoid(3)) / 2])
    assert observed.tolist() == pytest.approx([1.5 / 3, 1.0])
    by_truth = calibration_curve([3.0, -1.0, 0.5, 2.0, 0.0], 2, p_chosen=[0.9, 0.8, 0.7, 0.6, 0.4])[1]
    assert by_truth.tolist() == pytest.approx([(0.5 + 0.7 + 0.2) / 3, (0.6 + 0.9) / 2])


def test_a_calibration_curve_against_brute_force():
    margins = (2 * randn(103, seed=0)).tolist()
    for bins in (1, 2, 7, 10, 103):
        predicted, observed, n = calibration_curve(torch.tensor(margins), bins)
        pairs = sorted((abs(d), d > 0) for d in margins)
        sizes = [103 // bins + (b < 103 % bins) for b in range(bins)]
        assert n.tolist() == sizes
        expected_error = 0.0
        for b, size in enumerate(sizes):
            part = pairs[sum(sizes[:b]):sum(sizes[:b + 1])]
            mean = sum(sigmoid(d) for d, _ in part) / size
            right = sum(r for _, r in part) / size
            assert (predicted[b].item(), observed[b].item()) == pytest.approx((mean, right), abs=1e-6)
            expected_error += size / 103 * abs(mean - right)
        assert expected_calibration_error(torch.tensor(margins), bins) == pytest.approx(expected_error, abs=1e-6)
    assert len(calibration_curve(margins[:3], bins=10)[2]) == 3  # never an empty bin


def test_a_calibrated_pm_has_no_error_and_a_stretched_one_has():
    gaps = 1.5 * randn(20000, seed=1)  # true preferences are sigmoid(gap)
    labels = torch.where(rand(20000, seed=2) < torch.sigmoid(gaps), 1.0, -1.0).double()
    margins = labels * gaps  # chosen minus rejected
    p_chosen = torch.sigmoid(margins)
    assert expected_calibration_error(margins, 10, p_chosen) < 1e-12  # without the noise of the labels, exactly 0
    noise = 0.8 * math.sqrt(0.2 * 10 / 20000)  # the docstring's, with p (1 - p) about 0.2
    assert noise / 3 < expected_calibration_error(margins) < 2 * noise
    predicted, observed, _ = calibration_curve(margins / 3)  # under-confident
    assert (observed > predicted).all() and expected_calibration_error(margins / 3) > 0.1
    predicted, observed, _ = calibration_curve(margins * 3)  # over-confident
    assert (observed < predicted).all() and expected_calibration_error(margins * 3) > 0.1


def test_the_log_loss_and_its_floor():
    margins, p_chosen = [2.0, -1.0, 0.3, -4.0], [0.9, 0.6, 0.5, 0.05]
    loss = [-(p * math.log(sigmoid(d)) + (1 - p) * math.log(1 - sigmoid(d))) for d, p in zip(margins, p_chosen)]
    floor = [-(p * math.log(p) + (1 - p) * math.log(1 - p)) for p in p_chosen]
    assert log_loss(margins, p_chosen) == pytest.approx((sum(loss) / 4, sum(floor) / 4))
    # Who knows the truth is at the floor, and any other margin is above it.
    truth = [math.log(p / (1 - p)) for p in p_chosen]
    assert log_loss(truth, p_chosen)[0] == pytest.approx(sum(floor) / 4)
    for i in range(4):
        for off in (-0.01, 0.01):
            assert log_loss(truth[:i] + [truth[i] + off] + truth[i + 1:], p_chosen)[0] > sum(floor) / 4 + 1e-7
    assert log_loss([1e4, 0.0], [1.0, 0.0]) == pytest.approx((math.log(2) / 2, 0.0))  # sure labels: no NaN


def test_a_threshold_curve_against_brute_force():
    chosen, rejected, p = randn(300, seed=3), randn(300, seed=4) - 0.5, rand(300, seed=5)
    rejected[:20] = chosen[:20]  # ties
    thresholds = [-10.0, -1.0, 0.0, 0.7, chosen[0].item(), 10.0]
    accuracy, bayes, n = threshold_curve(chosen, rejected, thresholds, p)
    for k, t in enumerate(thresholds[:-1]):
        kept = [(c, r, q) for c, r, q in zip(chosen.tolist(), rejected.tolist(), p.tolist()) if c > t and r > t]
        assert n[k] == len(kept) > 0
        assert accuracy[k].item() == pytest.approx(sum((c > r) + 0.5 * (c == r) for c, r, _ in kept) / len(kept))
        assert bayes[k].item() == pytest.approx(sum(max(q, 1 - q) for _, _, q in kept) / len(kept))
    assert n[0] == 300 and n[-1] == 0 and accuracy[-1].isnan()  # nothing is above 10
    assert threshold_curve(chosen, rejected, thresholds)[1].isnan().all()


# --- fits ------------------------------------------------------------------------------

def test_the_logistic_fit_is_where_the_gradient_is_zero_and_gives_the_hessian():
    x, y, weight, l2 = randn(60, 3, seed=6), rand(60, seed=7), 5 * rand(60, seed=8), torch.tensor([0.5, 0, 2]).double()

    def loss(w):  # for lists of floats
        z = [sum(a * b for a, b in zip(row, w)) for row in x.tolist()]
        data = sum(v * (-t * math.log(sigmoid(s)) - (1 - t) * math.log(1 - sigmoid(s)))
                   for v, t, s in zip(weight.tolist(), y.tolist(), z))
        return data + sum(k * b * b for k, b in zip(l2.tolist(), w)) / 2
    w, hessian = logistic_fit(x, y, weight, l2)
    h, w = 1e-4, w.tolist()

    def moved(*steps):
        out = list(w)
        for i, s in steps:
            out[i] += s
        return loss(out)
    for i in range(3):
        assert abs(moved((i, h)) - moved((i, -h))) / (2 * h) < 1e-6
        for j in range(3):
            second = sum(a * b * moved((i, a * h), (j, b * h)) for a in (-1, 1) for b in (-1, 1)) / (4 * h * h)
            assert hessian[i, j].item() == pytest.approx(second, abs=2e-5)


def test_the_logistic_fit_arrives_where_plain_newton_steps_run_away():
    x = torch.tensor([[1.0, -2.0], [-8.0, 1.0], [-6.0, -7.0]], dtype=torch.float64)
    y, weight = torch.tensor([0.01, 0.1, 0.1]).double(), torch.tensor([100.0, 1.0, 1.0]).double()
    plain = torch.zeros(2, dtype=torch.float64)
    for _ in range(50):
        p = torch.sigmoid(x @ plain)
        hessian = (x * (weight * p * (1 - p))[:, None]).T @ x + 1e-12 * torch.eye(2)
        plain += torch.linalg.solve(hessian, x.T @ (weight * (y - p)))
        if plain.abs().max() > 1e6:
            break
    assert plain.abs().max() > 1e6
    w, _ = logistic_fit(x, y, weight, torch.zeros(2, dtype=torch.float64))
    assert (x.T @ (weight * (torch.sigmoid(x @ w) - y))).abs().max() < 1e-9


def test_the_logistic_fit_arrives_at_extreme_points():
    """A row a thousand times as long as the others, which is soon sure, and next to the boundary in the end."""
    x = torch.tensor([[1.0], [-1.0], [1000.0]], dtype=torch.float64)
    y, weight = torch.tensor([0.9, 0.1, 0.5]).double(), torch.tensor([1e4, 1e4, 1.0]).double()
    w, _ = logistic_fit(x, y, weight, torch.zeros(1, dtype=torch.float64))
    assert (x[:, 0] * weight * (torch.sigmoid(x @ w) - y)).sum().abs() < 1e-6


def test_line_fit_against_numpy():
    x, noise = 3 * rand(40, seed=9), randn(40, seed=10)
    for size in (0.0, 0.1, 2.0):
        y = 1.7 * x - 0.4 + size * noise
        slope, intercept, r2 = line_fit(x, y)
        assert (slope, intercept) == pytest.approx(tuple(np.polyfit(x.numpy(), y.numpy(), 1)))
        assert r2 == pytest.approx(np.corrcoef(x.numpy(), y.numpy())[0, 1] ** 2)
    # By hand: through (0, 0), (1, 2), (2, 1) goes y = x/2 + 1/2, with residuals -1/2, 1, -1/2: R^2 = 1 - 1.5 / 2.
    assert line_fit([0, 1, 2], [0, 2, 1]) == pytest.approx((0.5, 0.5, 0.25))


def test_a_fit_that_the_points_do_not_fix_is_refused():
    with pytest.raises(ValueError, match="do not fix 2 coefficients"):
        line_fit([2.0, 2.0, 2.0], [1.0, 2.0, 3.0])
    with pytest.raises(ValueError, match="do not fix 3 coefficients"):  # one size only: a and b cannot be told apart
        fit_scaling([1e6] * 4, [100, 200, 400, 800], [0.6, 0.61, 0.62, 0.63])
    with pytest.raises(ValueError):
        least_squares([[1.0, 2.0]], [1.0])


def test_scaling_fit_finds_the_papers_coefficients():
    sizes = [13e6, 42e6, 197e6, 810e6, 2.7e9, 13e9, 52e9]
    points = [(p, d) for p in sizes for d in (1e3, 1e4, 8e4)]

    def accuracy(p, d):  # Eq. A.1, helpful only
        return 0.72 + 0.007 * math.log(p / 1e11) + 0.015 * math.log(d / 8e4)
    params, pairs = zip(*points)
    coefficients, r2 = fit_scaling(params, pairs, [accuracy(*x) for x in points])
    assert coefficients == pytest.approx((0.72, 0.007, 0.015), abs=1e-9) and r2 == pytest.approx(1.0)
    assert (round(accuracy(13e6, 8e4), 3), round(accuracy(52e9, 8e4), 3)) == (0.657, 0.715)  # as the curves are drawn, with natural logs
    # Another point of reference moves the first coefficient only, to the accuracy there.
    moved, _ = fit_scaling(params, pairs, [accuracy(*x) for x in points], at=(13e6, 1e3))
    assert moved == pytest.approx((accuracy(13e6, 1e3), 0.007, 0.015), abs=1e-9)


@pytest.mark.parametrize("kind, form", [("bon", lambda d: d * (1.3 - 0.2 * d)),
                                        ("rl", lambda d: d * (1.3 - 0.5 * math.log(d)) if d else 0.0)])
def test_gaos_forms(kind, form):
    d = [0.0, 0.5, 1.0, 2.0, 4.0, 8.0]  # 0 is the initial policy
    alpha, beta, r2 = fit_gao(d, [form(x) for x in d], kind)
    assert (alpha, beta) == pytest.approx((1.3, 0.2 if kind == "bon" else 0.5)) and r2 == pytest.approx(1.0)
    peak = alpha / (2 * beta) if kind == "bon" else math.exp(alpha / beta - 1)
    assert form(peak) > max(form(0.99 * peak), form(1.01 * peak))  # where the docstring says it is
    # With noise, no other coefficients come closer.
    noisy = [form(x) + e for x, e in zip(d, (0.3, -0.2, 0.1, 0.2, -0.3, 0.1))]
    alpha, beta, r2 = fit_gao(d, noisy, kind)

    def error(a, b):
        bend = [x * x if kind == "bon" else x * math.log(x) if x else 0.0 for x in d]
        return sum((y - a * x + b * c) ** 2 for x, y, c in zip(d, noisy, bend))
    assert all(error(alpha, beta) < error(alpha + s * 1e-3, beta + t * 1e-3) for s in (-1, 0, 1) for t in (-1, 0, 1)
               if (s, t) != (0, 0))
    mean = sum(noisy) / 6
    assert r2 == pytest.approx(1 - error(alpha, beta) / sum((y - mean) ** 2 for y in noisy))


# --- Elo -------------------------------------------------------------------------------

def test_elo_and_win_rate():
    assert ELO == pytest.approx(173.7178, abs=1e-4)
    for elo, percent in [(0, 50.0), (100, 64.0), (200, 76.0), (300, 84.9), (-100, 36.0), (ELO, 73.1)]:
        assert 100 * elo_to_win_rate(elo).item() == pytest.approx(percent, abs=0.05)
        assert elo_to_win_rate(elo).item() == pytest.approx(1 / (1 + 10 ** (-elo / 400)))
        assert win_rate_to_elo(elo_to_win_rate(elo)).item() == pytest.approx(elo, abs=1e-9)
    assert win_rate_to_elo([0.0, 0.5, 1.0]).tolist() == [-math.inf, 0.0, math.inf]


def test_the_elo_of_two_players_in_closed_form():
    """The maximum has the win rate that was seen; the variance of its logit is 1 / wins + 1 / losses."""
    for wins, losses in [(64, 36), (1, 999), (0.5, 2.5)]:
        elo, covariance = fit_elo([[0, losses], [wins, 0]])
        assert elo[0] == 0 and elo[1].item() == pytest.approx(400 * math.log10(wins / losses))
        assert elo_error(covariance, 0, 1) == pytest.approx(ELO * math.sqrt(1 / wins + 1 / losses))


def table(K: int, games: int, elo, seed: int):
    """A tournament of K players with given Elos: wins (K, K) of `games` choices a pair."""
    rng, wins = random.Random(seed), torch.zeros(K, K)
    for i, j in itertools.combinations(range(K), 2):
        for _ in range(games):
            first = rng.random() < 1 / (1 + 10 ** ((elo[j] - elo[i]) / 400))
            wins[(i, j) if first else (j, i)] += 1
    return wins


def log_likelihood(wins, elo) -> float:
    """Eq. B.1, summed over pairs."""
    r, K, total = [x * math.log(10) / 400 for x in elo], len(elo), 0.0
    for a, b in itertools.combinations(range(K), 2):
        total -= wins[a][b] * math.log(1 + math.exp(r[b] - r[a])) + wins[b][a] * math.log(1 + math.exp(r[a] - r[b]))
    return total


def test_elos_are_the_maximum_of_equation_b1_and_errors_its_curvature():
    wins = table(4, 30, [0, 100, 250, -80], seed=0)
    wins[0, 3] = wins[3, 0] = 0  # two players who never met
    wins[1, 2] += 0.5            # an undecided choice: half for each side
    wins[2, 1] += 0.5
    elo, covariance = fit_elo(wins)
    assert elo[0] == 0 and (covariance[0] == 0).all() and (covariance[:, 0] == 0).all()
    elo, h = elo.tolist(), 0.5

    def at(*steps):
        moved = list(elo)
        for i, s in steps:
            moved[i] += s
        return log_likelihood(wins.tolist(), moved)
    information = torch.zeros(3, 3, dtype=torch.float64)
    for i in range(1, 4):
        assert abs(at((i, h)) - at((i, -h))) / (2 * h) < 1e-5
        for j in range(1, 4):
            information[i - 1, j - 1] = -sum(
                a * b * at((i, a * h), (j, b * h)) for a in (-1, 1) for b in (-1, 1)) / (4 * h * h)
    assert torch.allclose(covariance[1:, 1:], torch.linalg.inv(information), rtol=1e-3)


def test_the_anchor_changes_no_difference_and_no_error_of_one():
    wins = table(5, 20, [0, 30, 60, 90, 500], seed=1)
    first, first_covariance = fit_elo(wins)
    for anchor in range(5):
        elo, covariance = fit_elo(wins, anchor)
        assert elo[anchor] == 0 and torch.allclose(elo, first - first[anchor], atol=1e-6)
        for i, j in itertools.combinations(range(5), 2):
            assert elo_error(covariance, i, j) == pytest.approx(elo_error(first_covariance, i, j))
            assert elo_error(covariance, i, j) == pytest.approx(elo_error(covariance, j, i))
            assert elo_error(covariance, anchor, j) == pytest.approx(covariance[j, j].sqrt().item(), abs=1e-9)
    # Ten times the choices: the same Elos, errors smaller by sqrt(10).
    elo, covariance = fit_elo(10 * wins)
    assert torch.allclose(elo, first) and torch.allclose(10 * covariance, first_covariance)
    # What stands on the diagonal means nothing, and the caller's table stays as it is.
    padded = wins.double() + 7 * torch.eye(5)
    assert torch.equal(fit_elo(padded)[0], first) and padded[0, 0] == 7


def test_errors_of_elo_are_as_large_as_the_errors_made():
    """Over tournaments of known players, (estimate - truth) / error has standard deviation 1."""
    truth, z = [0.0, 120.0, -60.0], []
    for seed in range(300):
        elo, covariance = fit_elo(table(3, 60, truth, seed))
        z.append(((elo[1] - elo[2]).item() - 180.0) / elo_error(covariance, 1, 2))
    assert abs(np.mean(z)) < 0.2 and 0.88 < np.std(z) < 1.12  # 0.06 and 0.04 are one standard error


def test_far_apart_players_converge():
    elo, _ = fit_elo([[0, 1e6, 0], [1, 0, 1e6], [0, 1, 0]])
    assert elo.tolist() == pytest.approx([0, -2400, -4800])


@pytest.mark.parametrize("wins, i, j", [
    ([[0, 0], [5, 0]], 0, 1),                                      # 1 never lost: its Elo is infinite
    ([[0, 5, 0], [5, 0, 0], [0, 0, 0]], 0, 2),                     # 2 never played
    ([[0, 5, 0, 0], [5, 0, 0, 0], [0, 0, 0, 1], [0, 0, 1, 0]], 0, 2),  # two separate groups
    ([[0, 1, 1, 1], [1, 0, 1, 1], [0, 0, 0, 1], [0, 0, 1, 0]], 2, 0),  # all have wins and losses; 2, 3 never beat 0, 1
])
def test_no_finite_elo_is_an_error_that_names_the_players(wins, i, j):
    with pytest.raises(ValueError, match=f"from player {i} to player {j}$"):
        fit_elo(wins)
    fit_elo(torch.tensor(wins) + 0.5)  # the documented way out


def test_a_long_chain_of_wins_is_enough():
    """Each player beats only the next one, the last beats the first: by symmetry all are equal."""
    for K in (2, 3, 9, 33):
        wins = torch.zeros(K, K)
        wins[torch.arange(K), (torch.arange(K) + 1) % K] = 3
        assert fit_elo(wins)[0].abs().max() < 1e-6


@pytest.mark.parametrize("wins", [[[0, 1, 2], [1, 0, 2]], [[0, -1], [1, 0]], [[0, math.nan], [1, 0]], [[0]]])
def test_a_table_that_is_none_is_refused(wins):
    with pytest.raises(ValueError, match="square table of counts"):
        fit_elo(wins)


# --- best of n -------------------------------------------------------------------------

def test_best_of_n_against_all_subsets():
    scores, values = randn(3, 7, seed=11), randn(3, 7, seed=12)
    curve = best_of_n(scores, values)
    assert curve.shape == (3, 7)
    for s, v, estimate in zip(scores.tolist(), values.tolist(), curve.tolist()):
        for n in range(1, 8):
            best = [v[max(subset, key=s.__getitem__)] for subset in itertools.combinations(range(7), n)]
            assert estimate[n - 1] == pytest.approx(sum(best) / len(best))


def test_tied_samples_share_their_values():
    """Against every order in which ties might be broken."""
    scores, values = [1.0, 0.0, 1.0, 2.0, 0.0], [5.0, -1.0, 1.0, 4.0, 2.0]
    estimate = best_of_n(torch.tensor([scores, [0.0] * 5]), torch.tensor([values, values]))
    for n in range(1, 6):
        best = [values[max(subset, key=lambda i: (scores[i], order[i]))]
                for order in itertools.permutations(range(5)) for subset in itertools.combinations(range(5), n)]
        assert estimate[0, n - 1].item() == pytest.approx(sum(best) / len(best))
    assert estimate[1].tolist() == pytest.approx([11 / 5] * 5)  # scores that say nothing gain nothing


def test_best_of_many():
    """The mean of the best of n uniform numbers is n / (n + 1); weights of 2000 samples must not overflow."""
    x = rand(50, 2000, seed=13)
    curve = best_of_n(x, x)
    assert torch.allclose(curve[:, 0], x.mean(1)) and torch.allclose(curve[:, -1], x.max(1).values)
    for n in (1, 4, 16, 64):
        assert curve[:, n - 1].mean().item() == pytest.approx(n / (n + 1), abs=0.005)
    assert torch.allclose(best_of_n(x, torch.ones_like(x)), torch.ones_like(x), atol=1e-9)  # weights sum to 1


def test_the_kl_of_best_of_n():
    assert best_of_n_kl([1, 4, 16, 64, 1000]).tolist() == pytest.approx([0, 0.636, 1.835, 3.175, 5.909], abs=1e-3)
    # Exactly, for replies of equal probability: the i-th of `many` is the best of n with (i^n - (i-1)^n) / many^n.
    for n in (2, 4, 16):
        for many in (5, 100000):
            i = np.arange(1, many + 1)
            best = (i / many) ** n - ((i - 1) / many) ** n
            kl = (best * np.log(best * many, where=best > 0, out=np.zeros(many))).sum()
            formula = best_of_n_kl(n).item()
            assert kl < formula and (many == 5 or kl == pytest.approx(formula, abs=1e-3))


# --- outliers --------------------------------------------------------------------------

CFG = GPTConfig(n_layer=3, n_head=2, d_model=32, vocab_size=64, context=64)


@pytest.fixture
def model() -> GPT:
    torch.manual_seed(0)
    net = GPT(CFG).requires_grad_(False)
    for p in net.parameters():
        p += torch.randn_like(p) * (0.3 if p.dim() == 1 else 0.1)
    return net


def test_features_against_what_each_block_puts_out(model):
    """Row by row, without pads, by hooks on the blocks."""
    rng = random.Random(0)
    rows = [[rng.randrange(64) for _ in range(rng.randrange(1, 41))] for _ in range(25)]
    seen = []
    hooks = [block.register_forward_hook(lambda block, inputs, x: seen.append(x[0])) for block in model.blocks]
    last, average = torch.empty(3, 25, 32), torch.empty(3, 25, 32)
    for n, row in enumerate(rows):
        seen.clear()
        hidden = model(torch.tensor([row]))
        for i, x in enumerate(seen):  # (T, D)
            last[i, n], average[i, n] = x[-1], x.mean(0)
        assert torch.allclose(model.ln_f(last[2, n]), hidden[0, -1], atol=1e-5)
    for hook in hooks:
        hook.remove()
    for token_budget in (1, 100, 8192):
        assert torch.allclose(features(model, rows, token_budget=token_budget), last, atol=1e-4)
        assert torch.allclose(features(model, rows, mean=True, token_budget=token_budget), average, atol=1e-4)
    assert not torch.allclose(last[:, 1:], average[:, 1:], atol=0.1)


def test_mahalanobis_by_hand():
    """Variances 4 and 1, covariance 1.2: inverse [[1, -1.2], [-1.2, 4]] / 2.56."""
    mean, covariance = torch.tensor([1.0, -1.0]).double(), torch.tensor([[4.0, 1.2], [1.2, 1.0]]).double()
    vectors = torch.tensor([[3.0, 0.0], [3.0, -2.0], [1.0, -1.0]])  # less the mean: (2, 1), (2, -1), (0, 0)
    plain = [(4 - 4.8 + 4) / 2.56, (4 + 4.8 + 4) / 2.56, 0.0]
    assert mahalanobis(vectors, mean, covariance, relative=False).tolist() == pytest.approx(plain)
    # Coordinate by coordinate both are as unusual, 2^2 / 4 + 1^2 / 1 = 2. Only their going together differs.
    assert mahalanobis(vectors, mean, covariance).tolist() == pytest.approx([plain[0] - 2, plain[1] - 2, 0.0])


def test_the_gaussian_and_the_scores_against_numpy():
    x, new = (randn(n, 5, seed=s) @ randn(5, 5, seed=14) + 3 for n, s in ((200, 15), (30, 16)))
    mean, covariance = fit_gaussian(x, ridge=0.0)
    expected = np.cov(x.numpy().T, bias=True)  # 1 / N
    assert np.allclose(mean, x.numpy().mean(0)) and np.allclose(covariance, expected)
    z = new.numpy() - x.numpy().mean(0)
    plain = [v @ np.linalg.inv(expected) @ v for v in z]
    diagonal = [v @ np.diag(1 / np.diag(expected)) @ v for v in z]
    assert np.allclose(mahalanobis(new, mean, covariance, relative=False), plain)
    assert np.allclose(mahalanobis(new, mean, covariance), np.subtract(plain, diagonal))
    # With 1 / N both distances average D on the training vectors, so their difference averages 0.
    assert mahalanobis(x, mean, covariance, relative=False).mean().item() == pytest.approx(5)
    assert mahalanobis(x, mean, covariance).mean().item() == pytest.approx(0, abs=1e-9)
    # The plain distance doesn't depend on the coordinates (the relative one does).
    turn = randn(5, 5, seed=17)
    turned = mahalanobis(new @ turn, *fit_gaussian(x @ turn, ridge=0.0), relative=False)
    assert np.allclose(turned, plain)


def test_a_ridge_makes_fewer_vectors_than_dimensions_usable():
    x = randn(5, 20, seed=18)
    x[:, 3] = 1.0  # a coordinate that never changes
    scores = mahalanobis(randn(4, 20, seed=19), *fit_gaussian(x), relative=False)
    assert scores.isfinite().all() and (scores > 0).all()
    mean, covariance = fit_gaussian(x, ridge=0.1)
    plain = np.cov(x.numpy().T, bias=True)
    assert np.allclose(covariance, plain + 0.1 * np.trace(plain) / 20 * np.eye(20))
    with pytest.raises(RuntimeError):
        mahalanobis(x, *fit_gaussian(x, ridge=0.0))


def test_the_relative_score_finds_what_breaks_a_correlation():
    """Outliers have the inliers' mean and variances, and the opposite correlation of two coordinates. The other 28
    only add noise to the plain distance; the relative one is free of it."""
    inliers, test, outliers = randn(3, 20000, 30, seed=20)
    for x, sign in ((inliers, 1), (test, 1), (outliers, -1)):
        x[:, 1] = sign * 0.9 * x[:, 0] + math.sqrt(0.19) * x[:, 1]
    mean, covariance = fit_gaussian(inliers)
    relative, plain = (auroc(mahalanobis(test, mean, covariance, r), mahalanobis(outliers, mean, covariance, r))
                       for r in (True, False))

    def exact(x):  # the relative score of the two coordinates that matter, from their true covariance
        a, b = x[:, 0], x[:, 1]
        return (a * a + b * b - 1.8 * a * b) / 0.19 - a * a - b * b
    assert relative == pytest.approx(auroc(exact(test), exact(outliers)), abs=0.02) and relative > 0.88
    assert 0.6 < plain < relative - 0.05


def test_outlier_exposure_is_the_logistic_fit_of_literal_copies():
    """By autograd on the data set that §5.4 describes, each of M outliers standing in it N // M times."""
    inliers, outliers = randn(50, 4, seed=22) * torch.tensor([1.0, 5.0, 0.1, 1.0]), randn(7, 4, seed=23) + 1
    weight, bias = outlier_exposure(inliers, outliers, l2=2.0)
    variance = inliers.var(0, correction=0)
    scale = (variance + 1e-6 * variance.mean()).sqrt()  # with the ridge of fit_gaussian
    copies = torch.cat([outliers] * (50 // 7))
    w, b = weight.clone().requires_grad_(True), torch.tensor(bias, dtype=torch.float64, requires_grad=True)
    loss = (-F.logsigmoid(-(inliers @ w + b)).sum()
            - F.logsigmoid(copies @ w + b).sum() + (w * scale).square().sum())  # l2 / 2 = 1
    loss.backward()
    assert (w.grad / scale).abs().max() < 1e-6 and b.grad.abs() < 1e-6  # the loss is convex: this is its minimum


def test_outlier_exposure_learns_from_few_examples():
    direction = randn(16, seed=24)
    train, test = 3 + randn(2, 400, 16, seed=25)
    outliers = 3 + randn(1500, 16, seed=26) + 0.6 * direction

    def score(m):
        weight, bias = outlier_exposure(train, outliers[1000:1000 + m])
        return auroc(test @ weight + bias, outliers[:1000] @ weight + bias)
    one, ten, many = score(1), score(10), score(500)  # one, ten: a plane parts them from the inliers; 500: M > N
    assert 0.55 < one < ten < many and many > 0.9
    weight, bias = outlier_exposure(train, outliers[1000:])
    assert abs((test @ weight + bias > 0).double().mean() - (outliers[:1000] @ weight + bias < 0).double().mean()) < 0.1
    # A coordinate of another scale, or one that never changes, makes no NaN and no difference.
    units = torch.tensor([0.1, 10.0] + [1.0] * 14)
    assert torch.allclose(outlier_exposure(train * units, outliers[1000:] * units)[0] * units, weight, atol=1e-3)
    constant = F.pad(train, (0, 1)), F.pad(outliers[1000:], (0, 1))
    assert torch.allclose(outlier_exposure(*constant)[0], F.pad(weight, (0, 1)), atol=1e-4)


def test_auroc_against_all_pairs():
    inliers, outliers = (2 * randn(80, seed=27)).round(), (2 * randn(33, seed=28)).round() + 1  # with many ties
    pairs = [(o > i) + 0.5 * (o == i) for i in inliers.tolist() for o in outliers.tolist()]
    assert auroc(inliers, outliers) == pytest.approx(sum(pairs) / len(pairs))
    assert auroc(outliers, inliers) == pytest.approx(1 - sum(pairs) / len(pairs))
    assert auroc([1.0, 2.0], [3.0, 4.0]) == 1 and auroc([3.0, 4.0], [1.0, 2.0]) == 0
    assert auroc([1, 1], [1]) == 0.5 and auroc([0, 1, 2, 3], [1.5]) == 0.5
