"""From choices between models to Elo, with standard errors (§2.4, App. B.5).

Read it in this order:
  1. Fit   logistic regression by Newton's method
  2. Elo   by maximum likelihood (Eq. B.1), and its errors

Legend: "points" is the number of measurements, D the number of coefficients of the fit. A "player"
is a model. wins[i, j] is how often people preferred player i to player j.
All functions take lists, or tensors from any device, and work in float64 on the CPU.
Papers: HH = Bai et al. 2022 (arXiv 2204.05862); a § or App. without a name is in HH.
"""
import math

import torch
import torch.nn.functional as F

# ---- 1. Fit ------------------------------------------------------------------


def to_float64(numbers):
    """Numbers, or a tensor from any device -> a tensor of the same shape, float64 on the CPU."""
    return torch.as_tensor(numbers, dtype=torch.float64, device="cpu").detach()


def logistic_fit(inputs, targets, weights, l2):
    """Logistic regression by Newton's method.

    inputs (points, D), targets (points,) in [0, 1], weights (points,), l2 (D,), all float64.
    Returns the coefficients c (D,) that minimize the loss below, and its Hessian there (D, D).
    Raises ValueError if 1000 steps do not suffice. With p = sigmoid(inputs @ c) the loss is
    the sum of weight * (-target log p - (1 - target) log(1 - p)), plus the sum of l2 * c^2 / 2."""
    def loss(c):
        z = inputs @ c
        # -log p = softplus(z) - z and -log(1 - p) = softplus(z): a term is softplus(z) - target z.
        return (weights * (F.softplus(z) - targets * z)).sum() + (l2 * c * c).sum() / 2

    coefficients = torch.zeros(inputs.shape[1], dtype=torch.float64)
    for _ in range(1000):
        p = torch.sigmoid(inputs @ coefficients)  # (points,)
        # d softplus(z) / dz = p and dp / dz = p (1 - p); the chain rule brings in the inputs.
        gradient = inputs.T @ (weights * (p - targets)) + l2 * coefficients  # (D,)
        curvature = weights * p * (1 - p)  # (points,)
        hessian = (inputs * curvature[:, None]).T @ inputs + torch.diag(l2)  # (D, D)

        # Newton's step goes to the minimum of the quadratic model g's + s'Hs / 2, at s = -H^-1 g.
        # The model's value there is -g'H^-1 g / 2, so `gain` is twice the expected decrease.
        step = -torch.linalg.solve(hessian, gradient)
        gain = -(gradient @ step).item()

        # A full step can overshoot, and plain Newton then runs away. A share a of the step is safe
        # once it moves no logit by more than 1: p (1 - p) grows at most e-fold on the way, so the
        # loss changes by at most gain * (-a + a^2 (e - 2)) < 0. Hence the halving ends.
        while (inputs @ step).abs().max() > 1 and loss(coefficients + step) > loss(coefficients):
            step = step / 2
        coefficients = coefficients + step
        if gain < 1e-12:  # even before this step c was within a millionth of a standard error
            return coefficients, hessian
    raise ValueError("the logistic fit did not converge in 1000 steps")


# ---- 2. Elo ------------------------------------------------------------------

ELO = 400 / math.log(10)  # Elo of one unit of PM score: 173.7; HH round to 174 (Eq. 2.1)


def elo_to_win_rate(elo):
    """How often A wins against B, with elo = A's Elo minus B's: 1 / (1 + 10^(-elo / 400)).

    Eq. 2.1 prints a plus in the exponent, so its difference must be B's Elo minus A's."""
    return torch.sigmoid(to_float64(elo) / ELO)


def win_rate_to_elo(win_rate):
    """The inverse of `elo_to_win_rate`. It is infinite for win rates of 0 and 1."""
    return ELO * torch.logit(to_float64(win_rate))


def check_finite_elo(wins):
    """Raises ValueError if the likelihood of Eq. B.1 has its maximum at infinity.

    Finite Elos exist exactly where a chain of wins leads from every player to every other player
    (Ford 1957). Otherwise moving some players up forever makes the choices ever likelier."""
    players = len(wins)
    chain = (wins > 0) | torch.eye(players, dtype=torch.bool)
    for middle in range(players):  # Warshall: after this step, chains may pass through 0..middle
        chain |= chain[:, middle, None] & chain[middle]
    if not chain.all():
        i, j = (~chain).nonzero()[0].tolist()
        raise ValueError(f"no finite Elo: no chain of wins leads from player {i} to player {j}")


def fit_elo(wins, anchor=0):
    """Elo (players,) by maximum likelihood over all pairs (Eq. B.1), and its covariance in Elo^2.

    wins (players, players): the diagonal is ignored. HH drop "unsure" choices (B.5); to keep them,
    count half a win for each side. Only differences are known: player `anchor` has Elo and error 0.

    The covariance (players, players) is the inverse of the Fisher information (HH, B.5: errors by
    maximum likelihood, formula not given). It ignores that choices within one chat are related.
    Raises ValueError if `wins` is not a table of counts, or if no finite Elo exists, as for someone
    who never lost. No prior is built in, because it would decide how far ahead that player is; to
    have one, add it to `wins`."""
    wins = to_float64(wins)
    players = len(wins)
    all_counts = wins.isfinite().all() and (wins >= 0).all()
    if players < 2 or wins.shape != (players, players) or not all_counts:
        raise ValueError("wins must be a square table of counts for two or more players")
    check_finite_elo(wins)

    # Eq. B.1 is the log-likelihood of a logistic regression on the players' scores r = Elo / ELO.
    # Each pair that met is a point. Its input has +1 for the first player and -1 for the second, so
    # its logit is r_first - r_second. The target is the first player's share of the games.
    identity = torch.eye(players, dtype=torch.float64)
    inputs, targets, weights = [], [], []
    for first in range(players):
        for second in range(first + 1, players):
            games = wins[first, second] + wins[second, first]
            if games == 0:
                continue
            inputs.append(identity[first] - identity[second])
            targets.append(wins[first, second] / games)
            weights.append(games)

    free = torch.arange(players)[torch.arange(players) != anchor]  # the anchor's score stays 0
    no_prior = torch.zeros(len(free), dtype=torch.float64)
    scores, information = logistic_fit(
        torch.stack(inputs)[:, free], torch.stack(targets), torch.stack(weights), no_prior)

    # The Fisher information is the expected Hessian of minus the log-likelihood. Here it is the
    # Hessian itself, the sum of games * p (1 - p) * input input', in which nobody's wins appear.
    elo = torch.zeros(players, dtype=torch.float64)
    elo[free] = ELO * scores
    covariance = torch.zeros(players, players, dtype=torch.float64)
    covariance[free[:, None], free] = ELO**2 * torch.linalg.inv(information)
    return elo, covariance


def elo_error(covariance, i: int, j: int) -> float:
    """Standard error of player i's Elo minus player j's. It is the same for every anchor."""
    variance = covariance[i, i] + covariance[j, j] - 2 * covariance[i, j]
    return variance.clamp(min=0).sqrt().item()  # rounding can take a variance of 0 below 0
