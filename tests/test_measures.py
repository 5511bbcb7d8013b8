"""Tests of experiments/measures.py, in the order of its sections.

Expected values come from brute force in plain Python, numpy, autograd, closed forms, or by hand."""
import itertools
import math
import random
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.autograd.functional import hessian, jacobian

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "experiments"))
from measures import (auroc, best_of_n, best_of_n_kl, calibration_curve,
                      expected_calibration_error, fit_gao, fit_scaling, least_squares, line_fit,
                      log_loss, outlier_exposure, threshold_curve)
from model import GPT, GPTConfig
from outlier_score import features, fit_gaussian, mahalanobis
from ratings import ELO, elo_error, elo_to_win_rate, fit_elo, logistic_fit, win_rate_to_elo


def randn(*shape, seed: int):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def approx(expected):
    """Equal up to rounding in float64, whatever the order of the operations."""
    return pytest.approx(expected, rel=1e-9, abs=1e-9)


# ---- 1. Calibration ----------------------------------------------------------


def test_a_calibration_curve_by_hand():
    """|margin| in order: 0, 0.5, 1 | 2, 3. The tie is half right, and -1 is wrong."""
    margins, p_chosen = [3.0, -1.0, 0.5, 2.0, 0.0], [0.9, 0.8, 0.7, 0.6, 0.4]
    low, high = (0.5 + sigmoid(0.5) + sigmoid(1)) / 3, (sigmoid(2) + sigmoid(3)) / 2
    predicted, observed, counts = calibration_curve(torch.tensor(margins), bins=2)
    assert counts.tolist() == [3, 2] and predicted.tolist() == approx([low, high])
    assert observed.tolist() == approx([1.5 / 3, 1.0])
    _, observed, _ = calibration_curve(margins, 2, p_chosen)
    assert observed.tolist() == approx([(0.5 + 0.7 + 0.2) / 3, (0.6 + 0.9) / 2])
    error = expected_calibration_error(margins, 2, p_chosen)
    assert error == approx(3 / 5 * abs(low - 1.4 / 3) + 2 / 5 * abs(high - 1.5 / 2))
    assert len(calibration_curve(margins, bins=10)[2]) == 5  # never an empty bin


@pytest.mark.parametrize("bins", [1, 7, 103])
def test_a_calibration_curve_against_brute_force(bins):
    margins, error = 2 * randn(103, seed=0), 0.0
    predicted, observed, counts = calibration_curve(margins, bins)
    pairs = sorted((abs(d), d > 0) for d in margins.tolist())
    for b in range(bins):
        size = 103 // bins + (b < 103 % bins)
        part, pairs = pairs[:size], pairs[size:]
        mean = sum(sigmoid(gap) for gap, _ in part) / size
        right = sum(is_right for _, is_right in part) / size
        assert (counts[b], predicted[b], observed[b]) == approx((size, mean, right))
        error += size / 103 * abs(mean - right)
    assert expected_calibration_error(margins, bins) == approx(error)


def test_the_log_loss_and_its_floor():
    margins, p_chosen, loss, floor = [2.0, -1.0, 0.3, -4.0], [0.9, 0.6, 0.5, 0.05], 0.0, 0.0
    for d, p in zip(margins, p_chosen):
        loss -= (p * math.log(sigmoid(d)) + (1 - p) * math.log(1 - sigmoid(d))) / 4
        floor -= (p * math.log(p) + (1 - p) * math.log(1 - p)) / 4
    assert log_loss(margins, p_chosen) == approx((loss, floor))
    assert log_loss([1e4, 0.0], [1.0, 0.0]) == approx((math.log(2) / 2, 0.0))  # p = 0 and 1: no NaN


def test_a_threshold_curve_against_brute_force():
    chosen, rejected, p_chosen = randn(3, 300, seed=3)
    p_chosen = torch.sigmoid(p_chosen)
    rejected[:20] = chosen[:20]  # ties
    thresholds = [-10.0, -1.0, 0.0, chosen[0].item(), 10.0]  # the fourth is a score: not above it
    accuracy, ceiling, counts = threshold_curve(chosen, rejected, thresholds, p_chosen)
    for k, threshold in enumerate(thresholds[:-1]):
        n, right, best = 0, 0.0, 0.0
        for c, r, p in zip(chosen.tolist(), rejected.tolist(), p_chosen.tolist()):
            if c > threshold and r > threshold:
                n, best = n + 1, best + max(p, 1 - p)
                right += p if c > r else 1 - p if c < r else 0.5
        assert (counts[k], accuracy[k], ceiling[k]) == approx((n, right / n, best / n))
    assert counts[-1] == 0 and accuracy[-1].isnan() and ceiling[-1].isnan()
    assert threshold_curve(chosen, rejected, thresholds)[1].isnan().all()  # no p_chosen


# ---- 2. Fits -----------------------------------------------------------------


def test_the_logistic_fit_is_where_the_gradient_is_zero_and_gives_the_hessian():
    inputs, targets, weights = randn(60, 3, seed=6), *torch.sigmoid(randn(2, 60, seed=7))
    l2 = torch.tensor([0.5, 0, 2]).double()

    def loss(c):
        p = 1 / (1 + torch.exp(-inputs @ c))
        log_likelihood = targets * p.log() + (1 - targets) * (1 - p).log()  # (60,)
        return (l2 * c**2).sum() / 2 - (weights * log_likelihood).sum()

    coefficients, curvature = logistic_fit(inputs, targets, weights, l2)
    assert jacobian(loss, coefficients).tolist() == approx([0.0, 0.0, 0.0])
    # The curvature is that one step before the end, a millionth of a standard error away at most.
    assert torch.allclose(curvature, hessian(loss, coefficients), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("inputs, targets, weights", [
    # Plain Newton steps run away from 0 to beyond 1e6.
    ([[1.0, -2.0], [-8.0, 1.0], [-6.0, -7.0]], [0.01, 0.1, 0.1], [100.0, 1.0, 1.0]),
    # One point is a thousand times as long as the others: p (1 - p) there is soon 0.
    ([[1.0], [-1.0], [1000.0]], [0.9, 0.1, 0.5], [1e4, 1e4, 1.0])])
def test_the_logistic_fit_arrives_where_plain_newton_does_not(inputs, targets, weights):
    inputs = torch.tensor(inputs, dtype=torch.float64)
    targets, weights = torch.tensor([targets, weights], dtype=torch.float64)
    coefficients, _ = logistic_fit(inputs, targets, weights, torch.zeros(inputs.shape[1]).double())
    slope = inputs.T @ (weights * (torch.sigmoid(inputs @ coefficients) - targets))
    assert slope.abs().max() < 1e-13 * (weights @ inputs.abs()).sum()  # some hundred roundings


def test_line_fit_against_numpy():
    x = randn(40, seed=9)
    y = 1.7 * x - 0.4 + 0.5 * randn(40, seed=10)
    assert line_fit(x, y) == approx((*np.polyfit(x, y, 1), np.corrcoef(x, y)[0, 1] ** 2))


def test_a_fit_that_the_points_do_not_fix_is_refused():
    with pytest.raises(ValueError, match="3 points do not fix 2 coefficients"):
        line_fit([2.0, 2.0, 2.0], [1.0, 2.0, 3.0])
    with pytest.raises(ValueError, match="1 points do not fix 2 coefficients"):
        least_squares([[1.0, 2.0]], [1.0])


def test_the_scaling_fit_finds_the_papers_coefficients():
    params, pairs = zip(*itertools.product([13e6, 197e6, 2.7e9, 52e9], [1e3, 1e4, 8e4]))
    size, data = np.log(np.divide(params, 1e11)), np.log(np.divide(pairs, 8e4))
    accuracy = 0.72 + 0.007 * size + 0.015 * data
    coefficients, r2 = fit_scaling(params, pairs, accuracy)
    assert (*coefficients, r2) == approx((0.72, 0.007, 0.015, 1))
    # Another point of reference only moves the first coefficient, to the accuracy there.
    coefficients, _ = fit_scaling(params, pairs, accuracy, at=(13e6, 1e3))
    assert coefficients == approx((accuracy[0], 0.007, 0.015))


@pytest.mark.parametrize("kind", ["bon", "rl"])
def test_gaos_forms(kind):
    distance = np.array([0.0, 0.5, 1.0, 2.0, 4.0, 8.0])  # 0 is the initial policy
    bend = distance**2 if kind == "bon" else distance * np.log(np.maximum(distance, 1e-300))
    reward = 1.3 * distance - 0.2 * bend + np.array([0.3, -0.2, 0.1, 0.2, -0.3, 0.1])  # noisy
    (alpha, beta), unexplained, *_ = np.linalg.lstsq(np.stack([distance, -bend], 1), reward, None)
    r2 = 1 - unexplained[0] / ((reward - reward.mean()) ** 2).sum()
    assert fit_gao(distance, reward, kind) == approx((alpha, beta, r2))
    with pytest.raises(ValueError, match='"bon" or "rl", not \'best\''):
        fit_gao(distance, reward, "best")


# ---- 3. Elo ------------------------------------------------------------------


def test_elo_and_win_rate():
    assert ELO == pytest.approx(173.7178, abs=1e-4)
    for elo, percent in [(0, 50.0), (100, 64.0), (300, 84.9), (-100, 36.0), (ELO, 73.1)]:
        assert 100 * elo_to_win_rate(elo).item() == pytest.approx(percent, abs=0.05)
        assert win_rate_to_elo(1 / (1 + 10 ** (-elo / 400))).item() == approx(elo)
    assert win_rate_to_elo([0.0, 0.5, 1.0]).tolist() == [-math.inf, 0.0, math.inf]


@pytest.mark.parametrize("wins, losses", [(64, 36), (1, 999), (0.5, 2.5)])
def test_the_elo_of_two_players_in_closed_form(wins, losses):
    """The win rate at the maximum is the observed one; its logit has variance 1/wins + 1/losses."""
    elo, covariance = fit_elo([[0, losses], [wins, 0]])
    assert elo.tolist() == approx([0, 400 * math.log10(wins / losses)])
    # The covariance is that one Newton step before the end, as in the test of the logistic fit.
    assert elo_error(covariance, 0, 1) == pytest.approx(ELO * (1 / wins + 1 / losses) ** 0.5, 1e-5)


def tournament(games: int, elo, seed: int):
    """Wins (players, players) of `games` choices a pair between players of known Elo."""
    rng, wins = random.Random(seed), torch.zeros(len(elo), len(elo), dtype=torch.float64)
    for i, j in itertools.combinations(range(len(elo)), 2):
        for _ in range(games):
            i_won = rng.random() < 1 / (1 + 10 ** ((elo[j] - elo[i]) / 400))
            wins[(i, j) if i_won else (j, i)] += 1
    return wins


def test_elos_are_the_maximum_of_equation_b1_and_errors_its_curvature():
    wins = tournament(30, [0, 100, 250, -80], seed=0)
    wins[0, 3], wins[3, 0] = 0, 0  # two players who never met
    wins[1:3, 1:3] += 0.5  # an undecided choice: half for each side; the diagonal does not matter

    def minus_log_likelihood(others):  # of players 1 to 3; player 0 has Elo 0
        r = F.pad(others, (1, 0)) * math.log(10) / 400
        return (wins * torch.log(1 + torch.exp(r[None, :] - r[:, None]))).sum()

    elo, covariance = fit_elo(wins)
    assert elo[0] == 0 and (covariance[0] == 0).all() and (covariance[:, 0] == 0).all()
    assert jacobian(minus_log_likelihood, elo[1:]).tolist() == approx([0.0, 0.0, 0.0])
    expected = torch.linalg.inv(hessian(minus_log_likelihood, elo[1:]))
    assert torch.allclose(covariance[1:, 1:], expected, rtol=1e-5)


def test_the_anchor_changes_no_difference_and_no_error_of_one():
    wins = tournament(20, [0, 30, 60, 90, 500], seed=1)
    first, first_covariance = fit_elo(wins)
    for anchor in range(5):
        elo, covariance = fit_elo(wins, anchor)
        assert elo[anchor] == 0 and elo.tolist() == approx((first - first[anchor]).tolist())
        for i, j in itertools.product(range(5), range(5)):
            expected = pytest.approx(elo_error(first_covariance, i, j), rel=1e-5)
            assert elo_error(covariance, i, j) == expected
    assert torch.equal(wins, tournament(20, [0, 30, 60, 90, 500], seed=1))  # unchanged


@pytest.mark.parametrize("wins, i, j", [
    ([[0, 0], [5, 0]], 0, 1),  # player 1 never lost
    ([[0, 5, 0], [5, 0, 0], [0, 0, 0]], 0, 2),  # player 2 never played
    # Two separate groups; then one of them beats the other every time.
    ([[0, 5, 0, 0], [5, 0, 0, 0], [0, 0, 0, 1], [0, 0, 1, 0]], 0, 2),
    ([[0, 1, 1, 1], [1, 0, 1, 1], [0, 0, 0, 1], [0, 0, 1, 0]], 2, 0)])
def test_no_finite_elo_is_an_error_that_names_the_players(wins, i, j):
    with pytest.raises(ValueError, match=f"from player {i} to player {j}$"):
        fit_elo(wins)
    assert fit_elo(torch.tensor(wins) + 0.5)[0].isfinite().all()  # the documented way out


def test_elos_by_symmetry_and_far_apart():
    for players in (2, 3, 9, 33):  # each beats only the next one, the last the first: all are equal
        assert fit_elo(3 * torch.eye(players).roll(1, dims=1))[0].abs().max() < 1e-6
    assert fit_elo([[0, 1e6, 0], [1, 0, 1e6], [0, 1, 0]])[0].tolist() == approx([0, -2400, -4800])


@pytest.mark.parametrize("wins", [[[0, 1, 2], [1, 0, 2]], [[0, -1], [1, 0]], [[0]],
                                  [[0, math.nan], [1, 0]], [[0, math.inf], [1, 0]]])
def test_a_table_that_is_none_is_refused(wins):
    with pytest.raises(ValueError, match="square table of counts"):
        fit_elo(wins)


# ---- 4. Best of n ------------------------------------------------------------


def test_best_of_n_against_all_subsets_and_all_ways_to_break_ties():
    scores = torch.tensor([[3.0, 1.0, 4.0, 0.0, 2.0], [1, 0, 1, 2, 0], [0, 0, 0, 0, 0]])
    values = randn(3, 5, seed=12)
    curve = best_of_n(scores, values)
    for prompt, n in itertools.product(range(3), range(1, 6)):
        best = []
        for order in itertools.permutations(range(5)):
            keys = list(zip(scores[prompt].tolist(), order))
            for subset in itertools.combinations(range(5), n):
                best.append(values[prompt, max(subset, key=keys.__getitem__)].item())
        assert curve[prompt, n - 1].item() == approx(sum(best) / len(best))


def test_best_of_many():
    """The largest of n of the numbers 1..N is n (N + 1) / (n + 1) on average; no overflow."""
    numbers = torch.arange(1, 2001)
    expected = numbers.double() * 2001 / (numbers + 1)
    assert torch.allclose(best_of_n(numbers[None], numbers[None])[0], expected, rtol=1e-9)


def test_the_kl_of_best_of_n():
    # Of `many` equally likely replies the i-th is the best of n with (i^n - (i-1)^n) / many^n. The
    # formula is the limit for many of them; of few, two samples may tie, and it is a bound.
    for n, many in itertools.product((2, 4, 64), (5, 100000)):
        i = np.arange(1, many + 1)
        best = (i / many) ** n - ((i - 1) / many) ** n
        gap = best_of_n_kl(n).item() - (best * np.log(np.maximum(best * many, 1e-300))).sum()
        assert gap > 0 and (many == 5 or gap < 1e-3)


# ---- 5. Outliers -------------------------------------------------------------


@pytest.mark.parametrize("token_budget", [1, 100, 8192])
def test_features_against_what_each_block_puts_out(token_budget):
    """Row by row, without pads, by hooks on the blocks of a model in float64."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(3, 2, 32, vocab_size=64, context=64)).double().requires_grad_(False)
    for p in model.parameters():  # a fresh model has biases of 0 and LayerNorm weights of 1
        p += torch.randn_like(p) * (0.3 if p.dim() == 1 else 0.1)
    seen = []
    for block in model.blocks:
        block.register_forward_hook(lambda block, inputs, output: seen.append(output[0]))
    rng = random.Random(0)
    rows = [[rng.randrange(64) for _ in range(rng.randrange(1, 41))] for _ in range(25)]
    last, average = torch.empty(2, 3, 25, 32, dtype=torch.float64)
    for n, row in enumerate(rows):
        seen.clear()
        model(torch.tensor([row]))
        for layer, hidden in enumerate(seen):  # (T, D)
            last[layer, n], average[layer, n] = hidden[-1], hidden.mean(0)
            assert hidden.abs().max() < 20
    # `features` rounds in float32: states, weights, products and 40 partial sums, of size <= 20.
    bound = 43 * torch.finfo(torch.float32).eps * 20
    assert (last - average).abs().max() > 0.1 > bound  # so the two cannot be confused
    for mean, expected in ((False, last), (True, average)):
        found = features(model, rows, mean=mean, token_budget=token_budget)
        assert (found - expected).abs().max() < bound


@pytest.mark.parametrize("n, ridge", [(200, 0.0), (4, 0.1)])  # 4 vectors alone do not span R^5
def test_the_gaussian_and_the_scores_against_numpy(n, ridge):
    mix = randn(5, 5, seed=14)
    x, new = randn(n, 5, seed=15) @ mix + 3, randn(30, 5, seed=16) @ mix + 3
    mean, covariance = fit_gaussian(x, ridge)
    expected = np.cov(x.numpy().T, bias=True)  # by 1 / N
    expected += ridge * np.trace(expected) / 5 * np.eye(5)
    assert np.allclose(mean, x.numpy().mean(0)) and np.allclose(covariance, expected)
    z = new.numpy() - x.numpy().mean(0)
    plain = ((z @ np.linalg.inv(expected)) * z).sum(1)
    assert np.allclose(mahalanobis(new, mean, covariance, relative=False), plain)
    diagonal = (z**2 / np.diag(expected)).sum(1)
    assert np.allclose(mahalanobis(new, mean, covariance), plain - diagonal)


@pytest.mark.parametrize("n_outliers, copies, options, l2", [(7, 50 // 7, dict(l2=2.0), 2.0),
                                                            (80, 1, dict(), 1.0)])  # the default
def test_outlier_exposure_is_the_logistic_fit_of_literal_copies(n_outliers, copies, options, l2):
    """By autograd, on the data of §5.4: 50 inliers, and `copies` of each outlier."""
    units = torch.tensor([1.0, 5.0, 0.1, 0.0])  # the last coordinate never changes
    inliers, outliers = randn(50, 4, seed=22) * units, (randn(n_outliers, 4, seed=23) + 1) * units
    weight, bias = outlier_exposure(inliers, outliers, **options)
    variance = inliers.var(0, correction=0)
    scale = (variance + 1e-6 * variance.mean()).sqrt()  # with the ridge of fit_gaussian

    def loss(c):  # on standardized coordinates
        inside, outside = inliers @ (c[:4] / scale) + c[4], outliers @ (c[:4] / scale) + c[4]
        data_loss = F.softplus(inside).sum() + copies * F.softplus(-outside).sum()
        return data_loss + l2 / 2 * (c[:4] ** 2).sum()

    slope = jacobian(loss, torch.cat([weight * scale, torch.tensor([bias], dtype=torch.float64)]))
    assert slope.abs().max() < 1e-9  # the loss is convex: where its slope is 0, it has its minimum


def test_auroc_against_all_pairs():
    inliers = (2 * randn(80, seed=27)).round()  # with many ties
    outliers = (2 * randn(33, seed=28)).round() + 1
    wins = ((outliers[:, None] - inliers).sign() + 1) / 2  # (33, 80): 1, 1/2 or 0
    assert auroc(inliers, outliers) == approx(wins.mean().item())
