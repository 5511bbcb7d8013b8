"""The preference model (PM), the scalar head it shares with the critic, and what is measured on a PM.

Read it in this order:

  ScalarModel, score_rows, ranking_loss   the PM itself
  PMReport                                its accuracy
  calibration_curve, threshold_curve      are its scores honest probabilities?
  logistic_fit, least_squares             two solvers, and the curves that the papers fit
  fit_elo                                 from choices between models to Elo, with errors
  best_of_n                               what picking the best of n samples gains
  features, fit_gaussian, auroc           does a prompt look unlike those the model was trained to answer?

The last five only measure. All but `features` take numbers that an experiment has gathered, from any device, and
work in float64 on the CPU.

Legend:  B rows   T time   D width   L layers   N comparisons, points, samples of a prompt, or vectors   K players
A score r is a logit: P(A is preferred to B) = sigmoid(r_A - r_B) (Eq. 4.2). One unit of it is 174 Elo (Eq. 2.1).
Only differences mean anything, so a PM's mean on held-out replies is subtracted before scores are compared (B.2).
"""
import copy
import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

from data import Comparison, batches_by_length, pad
from model import GPT, autocast, tokens_at_once


class ScalarModel(nn.Module):
    """A transformer with one number at each position instead of V logits.

    As a preference model, the number that counts is the one on the end-of-context token (App. A.2). As a critic,
    the one at position t - 1 is the value of the state in which token t is chosen."""

    def __init__(self, trunk: GPT, zero_head: bool = False):
        """`trunk` is copied. A PM's head starts small and random, normal(0, 1 / sqrt(D + 1)) as in OpenAI's first RLHF
        code (HH does not state it); a critic's starts at zero, so its first values are all 0."""
        super().__init__()
        self.trunk = copy.deepcopy(trunk)
        self.head = nn.Linear(trunk.cfg.d_model, 1)
        nn.init.normal_(self.head.weight, std=0.0 if zero_head else (trunk.cfg.d_model + 1) ** -0.5)
        nn.init.zeros_(self.head.bias)
        self.register_buffer("mean", torch.zeros(()))  # subtracted from every score; set once, after training

    def forward(self, ids):
        """ids (B, T) -> (B, T), float32 also under autocast: in bf16 a score of 2 moves in steps of 1/64."""
        hidden = self.trunk(ids).float()  # (B, T, D)
        with torch.autocast(ids.device.type, enabled=False):
            return self.head(hidden)[..., 0] - self.mean

    def score(self, ids, lengths):
        """ids (B, T) padded on the right, lengths (B,) -> scores (B,), read on each row's last real token."""
        return self(ids)[torch.arange(len(ids), device=ids.device), lengths - 1]


@torch.no_grad()
def score_rows(pm: ScalarModel, rows: list[list[int]], token_budget: int = 0, device="cpu"):
    """Score rows of ids, each of which ends with the end-of-context token -> (N,) float32 on the CPU.

    The evaluation of the PM and PPO score through this one function, so that an accuracy that was measured is the
    accuracy that RL gets (but for RL's ids being those sampled, not text encoded again)."""
    out = torch.empty(len(rows))
    for batch in batches_by_length([len(r) for r in rows], tokens_at_once(token_budget, device)):
        ids, lengths = (t.to(device) for t in pad([rows[i] for i in batch]))
        with autocast(device):
            out[batch] = pm.score(ids, lengths).float().cpu()
    return out


def ranking_loss(chosen, rejected, weight=None):
    """L = -log sigmoid(r_chosen - r_rejected) = log(1 + exp(r_rejected - r_chosen)), mean over (N,) pairs.

    This is the negative log-likelihood of Eq. 4.2; GL §3.1 gives the loss. Written with softplus, as log(sigmoid(x))
    is -inf for x = -110. `weight` (N,) is the lambda of §5.1.2, which scales the harmless comparisons."""
    loss = F.softplus(rejected - chosen)  # (N,)
    return loss.mean() if weight is None else (weight * loss).sum() / weight.sum()


def wilson(hits: float, n: int) -> tuple[float, float]:
    """95% confidence interval of a proportion (Wilson's; it stays inside [0, 1] where n is small)."""
    if n == 0:
        return 0.0, 1.0
    z, p = 1.959964, hits / n
    middle, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, (middle - half) / (1 + z * z / n)), min(1.0, (middle + half) / (1 + z * z / n))


@dataclass
class PMReport:
    """How well margins r_chosen - r_rejected agree with the labels of one set of comparisons."""
    n: int
    accuracy: float       # ties count half
    low: float            # 95% confidence interval
    high: float
    loss: float           # nats; log 2 = 0.693 is what a PM that knows nothing gets
    length_rule: float    # accuracy of "the longer reply is better", a baseline any PM should beat
    bayes: float | None   # accuracy of someone who knows the true preferences: the ceiling, where it is known

    def __str__(self):
        ceiling = "" if self.bayes is None else f", Bayes ceiling {self.bayes:.3f}"
        return (f"accuracy {self.accuracy:.3f} [{self.low:.3f}, {self.high:.3f}] on n = {self.n}, loss {self.loss:.3f}, "
                f"longer-is-better {self.length_rule:.3f}{ceiling}")


def report(margins, comparisons: list[Comparison]) -> PMReport:
    """margins (N,): score of the chosen reply minus score of the rejected one, in logits."""
    n = len(comparisons)
    right = ((margins > 0).double() + 0.5 * (margins == 0).double()).sum().item()
    lengths = [len(c.chosen) - len(c.rejected) for c in comparisons]
    known = [max(c.p_chosen, 1 - c.p_chosen) for c in comparisons if c.p_chosen is not None]
    return PMReport(n, right / max(n, 1), *wilson(right, n), F.softplus(-margins.double()).mean().item(),
                    sum(1.0 if d > 0 else 0.5 if d == 0 else 0.0 for d in lengths) / max(n, 1),
                    sum(known) / n if known and len(known) == n else None)


def _f64(x):
    """Lists, or tensors from any device -> float64 on the CPU."""
    return torch.as_tensor(x, dtype=torch.float64, device="cpu").detach()


# ------------------------------------------------------------------------------ calibration


def _right(margins, p_chosen=None):
    """(N,) 1 where the PM agrees with the label, 0 where not, a half for a tie. With the true p_chosen (N,), the
    probability that a fresh label agrees: the same on average, without the luck of the one label drawn."""
    p = torch.ones_like(margins) if p_chosen is None else _f64(p_chosen)
    return torch.where(margins > 0, p, torch.where(margins < 0, 1 - p, 0.5))


def calibration_curve(margins, bins=10, p_chosen=None):
    """Accuracy as a function of the gap between two scores (§3.3, Fig. 9) -> three (bins,): the mean probability
    sigmoid(|d|) that the PM gives to its own choice, how often the choice is right, the number of pairs.

    margins (N,): d = chosen minus rejected. Observed above predicted is under-confidence, as HH find for helpful and
    harmless data together. Bins hold equally many pairs, so none is much noisier (HH's binning: not stated)."""
    margins = _f64(margins)
    parts = margins.abs().argsort(stable=True).tensor_split(max(1, min(bins, len(margins))))
    right, predicted = _right(margins, p_chosen), torch.sigmoid(margins.abs())
    return (torch.stack([predicted[i].mean() for i in parts]), torch.stack([right[i].mean() for i in parts]),
            torch.tensor([len(i) for i in parts]))


def expected_calibration_error(margins, bins=10, p_chosen=None) -> float:
    """Mean of |predicted - observed| over the bins, each weighted by its pairs. Labels are noisy, so a perfect PM
    doesn't get 0 but about 0.8 sqrt(p (1 - p) bins / N)."""
    predicted, observed, n = calibration_curve(margins, bins, p_chosen)
    return ((n * (predicted - observed).abs()).sum() / n.sum()).item()


def log_loss(margins, p_chosen) -> tuple[float, float]:
    """Cross-entropy of true preferences p_chosen (N,) and the PM's, and its floor, the entropy of the true ones; mean
    nats a pair. The difference is a KL: what the PM still gets wrong, however noisy the labels."""
    d, p = _f64(margins), _f64(p_chosen)
    loss = p * F.softplus(-d) + (1 - p) * F.softplus(d)  # (N,)
    floor = -torch.xlogy(p, p) - torch.xlogy(1 - p, 1 - p)  # (N,)
    return loss.mean().item(), floor.mean().item()


def threshold_curve(chosen, rejected, thresholds, p_chosen=None):
    """Accuracy on the pairs whose scores are both above a threshold (Fig. 25) -> three tensors, one entry for each:
    the accuracy, the Bayes ceiling on the same pairs (NaN without p_chosen), the number of pairs.

    chosen, rejected (N,): scores less the PM's mean. HH see the accuracy fall as the threshold rises, and give three
    reasons: finer distinctions, little data up there, smaller gaps. The ceiling shows how much is the labels' part."""
    chosen, rejected = _f64(chosen), _f64(rejected)
    right = _right(chosen - rejected)
    p = torch.full_like(right, math.nan) if p_chosen is None else _f64(p_chosen)
    bayes = torch.maximum(p, 1 - p)
    kept = torch.minimum(chosen, rejected) > _f64(thresholds)[:, None]  # (thresholds, N)
    return torch.stack([right[k].mean() for k in kept]), torch.stack([bayes[k].mean() for k in kept]), kept.sum(1)


# ------------------------------------------------------------------------------ fits


def logistic_fit(x, y, weight, l2):
    """Logistic regression by Newton's method -> w (D,) and the Hessian (D, D) of the loss there, which is

      sum_n weight_n * (-y_n log p_n - (1 - y_n) log(1 - p_n)) + sum_d l2_d w_d^2 / 2,   p = sigmoid(x @ w)
    x (N, D), y (N,) in [0, 1], weight (N,), l2 (D,)."""
    def loss(w):
        return (weight * (F.softplus(x @ w) - y * (x @ w))).sum() + (l2 * w * w).sum() / 2

    w = torch.zeros(x.shape[1], dtype=torch.float64)
    for _ in range(1000):
        p = torch.sigmoid(x @ w)  # (N,)
        hessian = (x * (weight * p * (1 - p))[:, None]).T @ x + torch.diag(l2)  # (D, D)
        gradient = x.T @ (weight * (p - y)) + l2 * w  # (D,)
        step = -torch.linalg.solve(hessian, gradient)
        gain = -(gradient @ step).item()  # twice what is left to gain, in nats, once it is small
        # Full steps can run away. One that moves no logit by more than 1 always lowers this loss, so this ends.
        while (x @ step).abs().max() > 1 and loss(w + step) > loss(w):
            step = step / 2
        w = w + step
        if gain < 1e-12:  # before the step w was a millionth of a standard error off
            return w, hessian
    raise ValueError("the logistic fit does not converge")


def least_squares(x, y):
    """x (N, D), y (N,) -> coefficients (D,), R^2 = 1 - residual sum of squares / that of the mean alone (NaN for a
    constant y; below 0 where a fit without intercept is worse than the mean)."""
    x, y = _f64(x), _f64(y)
    if torch.linalg.matrix_rank(x) < x.shape[1]:
        raise ValueError(f"{len(x)} points do not fix {x.shape[1]} coefficients: some column says nothing of its own")
    w = torch.linalg.lstsq(x, y[:, None]).solution[:, 0]
    return w, (1 - ((y - x @ w) ** 2).sum() / ((y - y.mean()) ** 2).sum()).item()


def line_fit(x, y) -> tuple[float, float, float]:
    """-> slope, intercept, R^2 of y = slope x + intercept: PM score against sqrt(KL) in §4.3, Figs 4 and 13."""
    x = _f64(x)
    (slope, intercept), r2 = least_squares(torch.stack([x, torch.ones_like(x)], 1), y)
    return slope.item(), intercept.item(), r2


def fit_scaling(params, pairs, accuracy, at=(1e11, 8e4)):
    """Eq. A.1: accuracy = a + b log(P / 1e11) + c log(D / 8e4) for P parameters, D comparisons -> (a, b, c), R^2.

    HH's helpful-only PMs: 0.72, 0.007, 0.015. The base of the log is not stated; natural logs fit the plotted curves.
    `at` is the point where the accuracy is a."""
    columns = [torch.ones_like(_f64(params)), torch.log(_f64(params) / at[0]), torch.log(_f64(pairs) / at[1])]
    w, r2 = least_squares(torch.stack(columns, 1), accuracy)
    return tuple(w.tolist()), r2


def fit_gao(d, reward, kind: str):
    """OO §1: how a true reward rises and falls with d = sqrt(KL), reward(0) = 0 -> alpha, beta, R^2.

      kind "bon"  R = d (alpha - beta d)      best of n; its peak is at d = alpha / (2 beta)
      kind "rl"   R = d (alpha - beta log d)  its peak is at d = exp(alpha / beta - 1); not valid near d = 0, where
                                              the slope is infinite"""
    d = _f64(d)
    bend = {"bon": d * d, "rl": torch.xlogy(d, d)}[kind]  # xlogy(0, 0) = 0
    (alpha, beta), r2 = least_squares(torch.stack([d, -bend], 1), reward)
    return alpha.item(), beta.item(), r2


# ------------------------------------------------------------------------------ Elo


ELO = 400 / math.log(10)  # Elo of one unit of PM score: 173.7; HH round it to 174 (Eq. 2.1)


def elo_to_win_rate(elo):
    """How often A wins, with elo = A's Elo minus B's: 1 / (1 + 10^(-elo / 400)). Eq. 2.1 prints a plus in the
    exponent, so its difference must be the opponent's Elo minus one's own."""
    return torch.sigmoid(_f64(elo) / ELO)


def win_rate_to_elo(p):
    """The inverse; infinite for 0 and 1."""
    return ELO * torch.logit(_f64(p))


def fit_elo(wins, anchor=0):
    """Elo of K players by maximum likelihood over all pairs (Eq. B.1) -> elo (K,), covariance (K, K) in Elo^2. Only
    differences are known, so `anchor` has Elo 0 and error 0.

    wins (K, K): [i, j] is how often i was preferred to j. HH drop "unsure" choices (B.5); who keeps them counts half
    a win for each side. The covariance is the inverse of the Fisher information (HH: errors by maximum likelihood too,
    B.5; the formula is not given), which takes choices as independent; those in one chat are not quite.
    Raises ValueError where the likelihood has its maximum at infinity, as for a player who never lost. No prior is
    slipped in: it would say how far ahead that player is. To have one, add it to `wins`."""
    wins = _f64(wins).clone()
    K = len(wins)
    if K < 2 or wins.shape != (K, K) or not (wins.isfinite() & (wins >= 0)).all():
        raise ValueError("wins must be a square table of counts for two or more players")
    wins.fill_diagonal_(0)
    # Finite Elos exist just where a chain of wins leads from every player to every other (Ford 1957).
    chain = (wins > 0).double() + torch.eye(K)
    for _ in range(K.bit_length()):  # chains of up to 2, 4, 8, ... wins
        chain = (chain @ chain > 0).double()
    if (chain == 0).any():
        i, j = (chain == 0).nonzero()[0].tolist()
        raise ValueError(f"no finite Elo: no chain of wins leads from player {i} to player {j}")
    # A row for each pair that met, +1 at the one and -1 at the other: then x @ r is r_A - r_B, and Eq. B.1 is the
    # log-likelihood of a logistic regression.
    a, b = torch.triu_indices(K, K, 1)
    met = wins[a, b] + wins[b, a] > 0
    a, b, free = a[met], b[met], torch.arange(K) != anchor
    x = torch.eye(K, dtype=torch.float64)
    n = wins[a, b] + wins[b, a]
    r, information = logistic_fit((x[a] - x[b])[:, free], wins[a, b] / n, n, torch.zeros(K - 1, dtype=torch.float64))
    elo, covariance = torch.zeros(K, dtype=torch.float64), torch.zeros(K, K, dtype=torch.float64)
    elo[free] = ELO * r
    covariance[free[:, None] & free] = (ELO**2 * torch.linalg.inv(information)).flatten()
    return elo, covariance


def elo_error(covariance, i: int, j: int) -> float:
    """Standard error of Elo i minus Elo j; the same for every anchor."""
    return (covariance[i, i] + covariance[j, j] - 2 * covariance[i, j]).clamp(min=0).sqrt().item()


# ------------------------------------------------------------------------------ best of n


def best_of_n(scores, values):
    """Expected value of the best by score of n samples (B.6, Fig. 36), for n = 1..N at once -> (prompts, N), with
    column n - 1 for n. Average over prompts for the curve, and take errors over prompts.

    scores, values (prompts, N): the PM's score and what is measured (true reward, or the score itself) of N samples
    of each prompt. All subsets of n count equally: the sample of rank i (1 is the worst) is the best of C(i-1, n-1)
    out of C(N, n), so nothing is drawn, and the estimate is unbiased (OO use it, from Nakano et al., App. I). Samples
    of equal score count as if ties were broken at random: each gets their mean value."""
    scores, order = _f64(scores).sort(1)  # ascending: column i - 1 has rank i
    values, N = _f64(values).gather(1, order), scores.shape[1]
    tie = F.pad((scores[:, 1:] != scores[:, :-1]).long().cumsum(1), (1, 0))  # (prompts, N) number of the tied group
    total, size = (torch.zeros_like(scores).scatter_add(1, tie, x) for x in (values, torch.ones_like(values)))
    values = (total / size.clamp(min=1)).gather(1, tie)  # (prompts, N)
    n = torch.arange(1, N + 1, dtype=torch.float64)
    i, lgamma = n[:, None], torch.lgamma  # lgamma(k + 1) = log k!, and infinite for k < 0: weight 0 where i < n
    log_ways = lgamma(i) - lgamma(n) - lgamma(i - n + 1)  # (N ranks, N sizes): log C(i-1, n-1)
    log_subsets = math.lgamma(N + 1) - lgamma(n + 1) - lgamma(N - n + 1)  # (N,): log C(N, n)
    return values @ torch.exp(log_ways - log_subsets)


def best_of_n_kl(n):
    """KL of best-of-n from the policy it samples, in nats: log n - (n - 1) / n (OO §2). HH quote the upper bound
    log n (B.6): 4.2 instead of 3.2 for n = 64. It is itself an upper bound where two samples may tie."""
    n = _f64(n)
    return n.log() - (n - 1) / n


# ------------------------------------------------------------------------------ outliers


@torch.no_grad()
def features(model: GPT, rows: list[list[int]], mean=False, token_budget: int = 0, device="cpu"):
    """The residual stream after each block, one vector a row (§5.4) -> (L, N, D) float32 on the CPU; [i] is what block
    i puts out, from 0. Rows (ids) have at least one token. Read on a row's last token or, with `mean`, averaged over
    all of them (which tokens HH read: not stated)."""
    out = torch.empty(len(model.blocks), len(rows), model.cfg.d_model)
    for batch in batches_by_length([len(r) for r in rows], tokens_at_once(token_budget, device)):
        ids, lengths = (t.to(device) for t in pad([rows[i] for i in batch]))  # (B, T), (B,)
        at, n = torch.arange(ids.shape[1], device=device), lengths[:, None]  # (T,), (B, 1)
        weight = (at < n) / n if mean else (at == n - 1).float()  # (B, T)
        with autocast(device):
            x = model.embed(ids) + model.positions(at)  # (B, T, D): GPT.forward, without its last LayerNorm
            for i, block in enumerate(model.blocks):
                x = block(x)
                out[i, batch] = (weight[..., None] * x.float()).sum(1).cpu()
    return out


def fit_gaussian(vectors, ridge=1e-6):
    """vectors (N, D) of prompts that are in distribution -> their mean (D,) and covariance (D, D), by 1 / N (§5.4).

    `ridge` times the mean variance is added to each variance (HH mention no such thing). Without it the covariance
    cannot be inverted for N <= D; take a larger one where N is not many times D."""
    v = _f64(vectors)
    mean = v.mean(0)
    covariance = (v - mean).T @ (v - mean) / len(v)
    return mean, covariance + ridge * covariance.diagonal().mean() * torch.eye(v.shape[1], dtype=torch.float64)


def mahalanobis(vectors, mean, covariance, relative=True):
    """Outlier scores (N,) of vectors (N, D): z' S^-1 z with z = v - mean and S the covariance. `relative` (simplified
    relative Mahalanobis, §5.4, Fig. 22) subtracts the same with the diagonal of S: what is then left is how unusual
    the vector is in the way its coordinates go together. HH find it better at every layer and size (Fig. 39)."""
    z = (_f64(vectors) - mean).T  # (D, N)
    # With S = C C', z' S^-1 z is the squared length of C^-1 z.
    score = (torch.linalg.solve_triangular(torch.linalg.cholesky(covariance), z, upper=False) ** 2).sum(0)  # (N,)
    return score - (z**2 / covariance.diagonal()[:, None]).sum(0) if relative else score


def outlier_exposure(inliers, outliers, l2=1.0):
    """A detector from M examples of outliers (§5.4, Fig. 23): a linear classifier of hidden vectors -> w (D,), bias;
    vectors @ w + bias is the outlier score, a logit.

    inliers (N, D), outliers (M, D). Each outlier stands N // M times in the training set, for balance; here it has
    that weight instead. HH read the last layer of models of 4 and 6 layers, and the middle one of larger models. How
    the classifier is trained is not stated: here logistic regression on standardised coordinates, with l2 / 2 times
    the squared length of w as penalty. Without it there is no best w where a plane parts the two, as it does for few
    outliers in many dimensions."""
    N, M = len(inliers), len(outliers)
    mean, covariance = fit_gaussian(inliers)
    scale = covariance.diagonal().sqrt()  # (D,); not 0, thanks to the ridge
    x = (torch.cat([_f64(inliers), _f64(outliers)]) - mean) / scale
    x = torch.cat([x, torch.ones(N + M, 1, dtype=torch.float64)], 1)  # (N + M, D + 1)
    y = torch.cat([torch.zeros(N), torch.ones(M)]).double()
    penalty = torch.cat([torch.full((x.shape[1] - 1,), l2), torch.zeros(1)]).double()
    w, _ = logistic_fit(x, y, torch.where(y > 0, float(max(1, N // M)), 1.0).double(), penalty)
    return w[:-1] / scale, (w[-1] - (w[:-1] * mean / scale).sum()).item()


def auroc(inliers, outliers) -> float:
    """Area under the ROC curve of scores (N,), (M,): how often an outlier scores above an inlier, ties half."""
    inliers, outliers = _f64(inliers).sort().values, _f64(outliers)
    below, up_to = (torch.searchsorted(inliers, outliers, right=right).double() for right in (False, True))  # (M,)
    return ((below + up_to) / 2).mean().item() / len(inliers)
