"""What the experiments measure on scores, choices and hidden vectors. No file of the core needs it.

Read it in this order:
  1. Calibration   are the PM's scores honest probabilities?
  2. Fits          least squares, and the curves that the papers fit
  3. Best of n     what is gained by keeping the best of n samples
  4. Outliers      does a prompt look unlike the prompts that the model should answer?

Legend: each section has its own, because each measures something else.
The functions take lists, or tensors from any device, and work in float64 on the CPU.
A score r is a logit: P(A is preferred to B) = sigmoid(r_A - r_B) (Eq. 4.2). Only differences of
scores mean anything, so subtract a PM's mean on held-out replies before comparing scores (B.2).
Elo and logistic regression are in ratings.py, and hidden vectors and their distances in
outlier_score.py, because the core needs them.
"""
import math

import torch
import torch.nn.functional as F

from outlier_score import fit_gaussian
from ratings import logistic_fit, to_float64

# ---- 1. Calibration ----------------------------------------------------------
# Legend: "pairs" is the number of labeled comparisons. In this section
#   margins (pairs,)    score of the chosen reply minus score of the rejected reply, in logits
#   p_chosen (pairs,)   the true probability that a worker chooses the chosen reply, where known


def agreement(margins, p_chosen=None):
    """Does the PM agree with the labels? -> (pairs,): 1 if it does, 0 if not, 1/2 for a tie.

    With p_chosen: the probability that a newly drawn label would agree. Its mean has the same
    expected value, without the noise of drawing one label a pair."""
    p = torch.ones_like(margins) if p_chosen is None else to_float64(p_chosen)
    agrees = torch.full_like(margins, 0.5)
    agrees = torch.where(margins > 0, p, agrees)
    return torch.where(margins < 0, 1 - p, agrees)  # the PM prefers the rejected reply


def calibration_curve(margins, bins=10, p_chosen=None):
    """Accuracy as a function of the gap between two scores (§3.3, Fig. 9).

    Returns three tensors (bins,): the mean probability sigmoid(|margin|) that the PM gives to its
    own choice, how often that choice is right, and the number of pairs. A curve above the diagonal
    is under-confidence, as HH find for helpful and harmless data together. The bins hold equally
    many pairs, so none is much noisier (HH's binning: not stated)."""
    margins = to_float64(margins)
    confidence = torch.sigmoid(margins.abs())
    agrees = agreement(margins, p_chosen)
    by_gap = margins.abs().argsort(stable=True)
    bins = max(1, min(bins, len(margins)))  # no bin may be empty: it would have no mean
    predicted, observed, counts = [], [], []
    for members in by_gap.tensor_split(bins):
        predicted.append(confidence[members].mean())
        observed.append(agrees[members].mean())
        counts.append(len(members))
    return torch.stack(predicted), torch.stack(observed), torch.tensor(counts)


def expected_calibration_error(margins, bins=10, p_chosen=None) -> float:
    """Mean of |predicted - observed| over the bins, each weighted by its number of pairs.

    Labels are noisy, so without p_chosen even a perfect PM gets about
    0.8 sqrt(p (1 - p) bins / pairs): the mean size of a normal error is 0.8 standard errors."""
    predicted, observed, counts = calibration_curve(margins, bins, p_chosen)
    return ((counts * (predicted - observed).abs()).sum() / counts.sum()).item()


def log_loss(margins, p_chosen) -> tuple[float, float]:
    """The PM's cross-entropy and its floor, both in nats a pair.

    The floor is the entropy of the true preferences. The rest, KL(true preferences || PM's), is the
    PM's own error, however noisy the labels are."""
    margins, p = to_float64(margins), to_float64(p_chosen)
    # softplus(-m) = -log sigmoid(m), and softplus(m) = -log(1 - sigmoid(m))
    loss = p * F.softplus(-margins) + (1 - p) * F.softplus(margins)
    entropy = -torch.xlogy(p, p) - torch.xlogy(1 - p, 1 - p)  # xlogy(0, 0) = 0, the limit
    return loss.mean().item(), entropy.mean().item()


def threshold_curve(chosen, rejected, thresholds, p_chosen=None):
    """Accuracy on the pairs in which both scores are above a threshold (Fig. 25).

    chosen, rejected (pairs,): scores, with the PM's mean subtracted.
    Returns three tensors (thresholds,): the accuracy, the Bayes ceiling on the same pairs (NaN
    without p_chosen), and the number of pairs. Where no pair is left, the first two are NaN.
    HH see the accuracy fall as the threshold rises, and give three reasons: finer distinctions,
    little data at high scores, smaller gaps. The ceiling shows how much is due to the labels."""
    chosen, rejected = to_float64(chosen), to_float64(rejected)
    agrees = agreement(chosen - rejected, p_chosen)
    p = torch.full_like(agrees, math.nan) if p_chosen is None else to_float64(p_chosen)
    best_guess = torch.maximum(p, 1 - p)  # always choosing the likelier reply: no PM can do better
    accuracy, ceiling, counts = [], [], []
    for threshold in to_float64(thresholds):
        kept = torch.minimum(chosen, rejected) > threshold
        accuracy.append(agrees[kept].mean())
        ceiling.append(best_guess[kept].mean())
        counts.append(kept.sum())
    return torch.stack(accuracy), torch.stack(ceiling), torch.stack(counts)


# ---- 2. Fits -----------------------------------------------------------------
# Legend: "points" is the number of measurements, D the number of coefficients of the fit.


def least_squares(inputs, targets):
    """inputs (points, D), targets (points,) -> coefficients (D,), R^2.

    R^2 = 1 - (sum of squared residuals) / (sum of squared deviations from the mean). It is NaN for
    constant targets, and negative where a fit without intercept is worse than the mean.
    Raises ValueError if the points leave some coefficient undetermined."""
    inputs, targets = to_float64(inputs), to_float64(targets)
    points, D = inputs.shape
    if torch.linalg.matrix_rank(inputs) < D:
        raise ValueError(f"{points} points do not fix {D} coefficients: add different points, or "
                         "drop a column that depends linearly on the others")
    coefficients = torch.linalg.lstsq(inputs, targets[:, None]).solution[:, 0]
    unexplained = ((targets - inputs @ coefficients) ** 2).sum()
    return coefficients, (1 - unexplained / ((targets - targets.mean()) ** 2).sum()).item()


def line_fit(inputs, targets) -> tuple[float, float, float]:
    """inputs, targets (points,) -> slope, intercept and R^2 of target = slope * input + intercept.

    §4.3 and Figs 4 and 13: the PM score as a function of sqrt(KL)."""
    inputs = to_float64(inputs)
    columns = torch.stack([inputs, torch.ones_like(inputs)], 1)  # (points, 2)
    (slope, intercept), r2 = least_squares(columns, targets)
    return slope.item(), intercept.item(), r2


def fit_scaling(params, pairs, accuracy, at=(1e11, 8e4)):
    """Eq. A.1: accuracy = a + b log(params / 1e11) + c log(pairs / 8e4) -> (a, b, c), R^2.

    params, pairs, accuracy (points,): a PM's parameters, the comparisons it learned from, its
    accuracy. `at` is the point where the accuracy is a. HH's helpful-only PMs: 0.72, 0.007, 0.015.
    The base of the logarithm is not stated."""
    size = torch.log(to_float64(params) / at[0])
    data = torch.log(to_float64(pairs) / at[1])
    coefficients, r2 = least_squares(torch.stack([torch.ones_like(size), size, data], 1), accuracy)
    return tuple(coefficients.tolist()), r2


def fit_gao(distance, reward, kind: str):
    """OO §1: how a true reward rises and falls with distance d = sqrt(KL) -> alpha, beta, R^2.

    distance, reward (points,), with reward 0 at d = 0. `kind` names the optimizer:
      "bon"  best of n: R = d (alpha - beta d), with its peak at d = alpha / (2 beta)
      "rl"   RL: R = d (alpha - beta log d), with its peak at d = exp(alpha / beta - 1); not valid
             near d = 0, where its slope is infinite."""
    distance = to_float64(distance)
    if kind == "bon":
        bend = distance**2
    elif kind == "rl":
        bend = torch.xlogy(distance, distance)  # d log d, and 0 at d = 0
    else:
        raise ValueError(f'kind must be "bon" or "rl", not {kind!r}')
    (alpha, beta), r2 = least_squares(torch.stack([distance, -bend], 1), reward)
    return alpha.item(), beta.item(), r2


# ---- 3. Best of n ------------------------------------------------------------
# Legend: N samples were drawn for each prompt; n <= N of them compete. Rank 1 is the worst score.


def best_of_n(scores, values):
    """Expected value of the best of n samples by score, for n = 1..N at once (B.6, Fig. 36).

    scores, values (prompts, N): the PM's score of each sample, and what is measured on it (the true
    reward, or the score itself). Returns (prompts, N), column n - 1 for n; average over prompts.
    All subsets of n samples count equally, so the estimate is unbiased and nothing is drawn (OO use
    it, from Nakano et al., App. I). Samples of equal score count as if chance broke the ties."""
    scores, order = to_float64(scores).sort(1)  # ascending, so that rank i is in column i - 1
    values = to_float64(values).gather(1, order)
    for prompt in range(len(scores)):  # give each sample the mean value of those with its score
        _, group = torch.unique_consecutive(scores[prompt], return_inverse=True)  # (N,)
        mean = torch.bincount(group, weights=values[prompt]) / torch.bincount(group)  # (groups,)
        values[prompt] = mean[group]

    # Rank i is the best of a subset if the n - 1 others are among the i - 1 ranks below. That is so
    # in C(i-1, n-1) of all C(N, n) subsets, and weights[i - 1, n - 1] is the ratio of the two.
    # For rank N it is n / N. As C(i-2, n-1) / C(i-1, n-1) = (i - n) / (i - 1), the lower ranks
    # follow one by one, without large factorials; below rank n the ratio is 0.
    N = scores.shape[1]
    n = torch.arange(1, N + 1, dtype=torch.float64)  # (N,)
    weights = torch.empty(N, N, dtype=torch.float64)  # (ranks, n)
    weights[N - 1] = n / N
    for rank in range(N, 1, -1):
        weights[rank - 2] = weights[rank - 1] * (rank - n) / (rank - 1)
    return values @ weights


def best_of_n_kl(n):
    """KL divergence of best-of-n from the policy it samples, in nats: log n - (n - 1) / n (OO §2).

    HH write log n (B.6), an upper bound: 4.2 instead of 3.2 for n = 64. The formula holds if no two
    samples tie; where they may, it is an upper bound itself."""
    n = to_float64(n)
    return n.log() - (n - 1) / n


# ---- 4. Outliers -------------------------------------------------------------
# Legend: B rows of a batch, T time, L layers, D width of the hidden vectors. "Inliers" are prompts
# in distribution (helpful requests), "outliers" are others (red-team prompts); vectors (rows, D).


def outlier_exposure(inliers, outliers, l2=1.0):
    """A detector that has seen a few outliers (§5.4, Fig. 23): a linear classifier of vectors.

    Returns weight (D,) and bias; vectors @ weight + bias is the outlier score, a logit.
    For balance, HH repeat each outlier len(inliers) // len(outliers) times in the training set; it
    has that weight here. HH read the last layer of models of 4 and 6 layers, and the middle one of
    larger models. How they train the classifier is not stated: here by logistic regression on
    standardized coordinates with penalty l2 |c|^2 / 2. Without the penalty no best c exists where a
    plane separates the two groups, as it does for few outliers in large D."""
    mean, covariance = fit_gaussian(inliers)
    scale = covariance.diagonal().sqrt()  # (D,), not 0 even for a constant coordinate: the ridge
    vectors = torch.cat([to_float64(inliers), to_float64(outliers)])  # (rows, D)
    inputs = F.pad((vectors - mean) / scale, (0, 1), value=1.0)  # (rows, D + 1), 1 for the bias
    targets = torch.zeros(len(inputs), dtype=torch.float64)
    targets[len(inliers):] = 1
    weights = torch.ones_like(targets)
    weights[len(inliers):] = max(1, len(inliers) // len(outliers))
    penalty = torch.full((inputs.shape[1],), l2, dtype=torch.float64)
    penalty[-1] = 0  # the bias is free
    coefficients, _ = logistic_fit(inputs, targets, weights, penalty)
    # Back to the vectors' own units: c . (v - mean) / scale + b = weight . v + (b - weight . mean).
    weight = coefficients[:-1] / scale  # (D,)
    return weight, (coefficients[-1] - weight @ mean).item()


def auroc(inliers, outliers) -> float:
    """Area under the ROC curve: how often an outlier's score is above an inlier's, ties half."""
    inliers = to_float64(inliers).sort().values
    outliers = to_float64(outliers)
    below = torch.searchsorted(inliers, outliers, right=False)  # (outliers,) inliers strictly below
    up_to = torch.searchsorted(inliers, outliers, right=True)  # (outliers,) inliers below or equal
    return (below + up_to).double().mean().item() / (2 * len(inliers))
