"""§4.3, Fig. 13: early in RLHF the PM score is linear in sqrt(KL), in parallel for all sizes.

    python experiments/sqrt_kl.py           # 1 seed of three policy sizes; minutes on two CPU cores
    python experiments/sqrt_kl.py --full    # 4 seeds, longer runs, more responses measured

The paper's claim: for much of training the PM score is approximately linear in the square root of
the KL to the initial policy, and the lines of all sizes are roughly parallel under one PM. All
policies of a seed are trained against one common PM, as on the left of Fig. 13.

Measured: the mean PM score of replies to held-out prompts against sqrt(KL). A straight line is
fitted where sqrt(KL) <= 1, and for comparison one in KL itself. The finding has three claims, one
number for each seed: over the sizes, R^2 is at least 0.95, and above that of the line in KL; the
steepest size's slope is at most 1.33 times the flattest's. The control takes the optimization away:
the same replies are scored by a PM that no policy was trained against, one with random weights. The
first two claims must not hold there. (Its slopes may be near 0, so the third says nothing.)

The table also has the toy size at other KL coefficients, the fit on the training samples (§4.3
measures KL there), and where the line ends: the sqrt(KL) from which on the score is off by more
than 10% of the line's rise. The slope is compared with what is possible at all:

  Of all policies with a given KL, exponential tilting, pi ~ pi_0 exp(eta r), has the highest E[r]
  (Gibbs' variational principle; the paper argues from the leading order of a series and prints
  no slope). With V the mean over prompts of the variance of r among the initial policy's replies to
  one prompt, tilting has E[r] - E_0[r] = eta V and KL = eta^2 V / 2 for small eta. So the gain is
  sqrt(2 V) sqrt(KL) at most, to first order in sqrt(KL).
"""
import dataclasses
import math

import lab
import output
from decide import Claim, sentence

from measures import line_fit
from picture import paths
from train_rl import RLConfig

EARLY = 1.0     # the range of the line, in sqrt(nats)
KL_COEF = 0.02  # smaller than the main job's: some points lie beyond sqrt(KL) = 1
OTHER_COEFS = (0.0, 0.1)  # of the toy size
COMMON, UNTRAINED = "common", "untrained"  # the PM that scores the replies


def leaves(distance: list[float], score: list[float], slope: float, intercept: float) -> float:
    """The sqrt(KL) from which on the score is off the line by more than 10% of the line's rise;
    NaN if it is near the line in the end."""
    first = 0
    for i, (x, y) in enumerate(zip(distance, score)):
        if abs(y - intercept - slope * x) <= 0.1 * slope * x:
            first = i + 1
    return distance[first] if first < len(distance) else math.nan


def common_pm(run, n: int):
    pairs = lab.comparisons(run, n) + lab.comparisons(run, n // 2, "harmless")
    test = lab.comparisons(run, n // 8, "helpful", "test")
    test += lab.comparisons(run, n // 8, "harmless", "test")
    return lab.center(run, lab.train_pm_on(run, pairs), test)


def steepest_slope(run, initial, pm, n_prompts: int) -> float:
    """sqrt(2 V) from 16 replies to each prompt."""
    prompts = lab.held_out_prompts(run, n_prompts, "spread")
    scores = lab.judge(run, initial, [pm], prompts, replies=16)[0]  # (prompts, replies)
    return (2 * scores.var(1).mean()).sqrt().item()


def trace(run, pm, other, cfg: RLConfig, initial, prompts) -> list[dict]:
    """PPO against `pm` -> a row for each measurement. `score` and, by the PM `other`, `other_score`
    are of the same replies to `prompts`, sqrt_kl is on the prompts of lab.ppo, and what begins with
    train_ is on the samples of the iteration before."""
    judged = []

    def watch(learner):
        ours, others, _ = lab.judge(run, learner.policy, [pm, other], prompts)
        judged.append({"score": ours.mean().item(), "other_score": others.mean().item()})
    _, path = lab.ppo(run, pm, cfg, initial, watch)
    rows = []
    for numbers, scores in zip(path, judged):
        rows.append({"iteration": numbers["iteration"], "kl": numbers["kl"],
                     "sqrt_kl": numbers["sqrt_kl"], "train_score": numbers["train_score"],
                     "train_sqrt_kl": math.sqrt(max(numbers["train_kl"], 0.0))} | scores)
    return rows


def fit_early(path: list[dict], score: str, distance: str = "sqrt_kl") -> dict:
    """The line through the points up to EARLY (at least the first five, because a line fits two
    points always), and where the path leaves it."""
    early = [row for i, row in enumerate(path) if i < 5 or row[distance] <= EARLY]
    early_score = output.column(early, score)
    slope, intercept, r2 = line_fit(output.column(early, distance), early_score)
    kl = [row[distance] ** 2 for row in early]
    everywhere = output.column(path, distance)
    return {"points": len(early), "slope": slope, "R2": r2,
            "R2_in_KL": line_fit(kl, early_score)[2], "last": everywhere[-1],
            "leaves_at": leaves(everywhere, output.column(path, score), slope, intercept)}


def one_seed(runs: dict, cfg: RLConfig, n: int, n_prompts: int) -> list[dict]:
    """Rows of paths ("part": "path") and of fits ("part": "fit")."""
    rows, largest = [], list(runs)[-1]
    pm, other = common_pm(runs[largest], n), lab.untrained_pm(runs[largest])
    settings = [(size, KL_COEF) for size in runs]
    settings += [(largest, coefficient) for coefficient in OTHER_COEFS]
    for size, coefficient in settings:
        run, initial = runs[size], lab.load(runs[size])
        setting = {"seed": run.seed, "size": size, "kl_coef": coefficient}
        prompts = lab.held_out_prompts(run, n_prompts, "other PM")
        path = trace(run, pm, other, dataclasses.replace(cfg, kl_coef=coefficient), initial,
                     prompts)
        bound = steepest_slope(run, initial, pm, n_prompts // 3)
        for name, score, distance in ((COMMON, "score", "sqrt_kl"),
                                      (UNTRAINED, "other_score", "sqrt_kl"),
                                      ("training samples", "train_score", "train_sqrt_kl")):
            fit = fit_early(path, score, distance)
            rows.append(setting | {"part": "fit", "by": name, "bound": bound} | fit)
        for row in path:
            rows.append(setting | {"part": "path"} | row)
    return rows


def draw(plt, rows):
    sizes = list(dict.fromkeys(output.column(rows, "size")))
    coefficients = sorted((KL_COEF, *OTHER_COEFS))
    panels = (({"kl_coef": KL_COEF}, "size", sizes), ({"size": "toy"}, "kl_coef", coefficients))
    for i, (where, key, values) in enumerate(panels, 1):
        plt.subplot(1, 2, i)
        mine = output.select(rows, part="path", **where)
        for value in values:
            label = value if key == "size" else f"toy, KL coefficient {value}"
            paths(plt, output.select(mine, **{key: value}), "sqrt_kl", "score", label)
        plt.axvline(EARLY, color="gray", ls=":", lw=0.8)
        plt.xlabel("sqrt(KL) to the initial policy (sqrt(nats))")
        plt.ylabel("PM score, held-out prompts (logits)")
        plt.legend()


def verdict(rows: list[dict]) -> tuple[str, str]:
    def claims(by: str) -> list[Claim]:
        worst, better, ratios = [], [], []
        fits = output.select(rows, part="fit", by=by, kl_coef=KL_COEF)
        for seed in dict.fromkeys(output.column(fits, "seed")):
            mine = output.select(fits, seed=seed)
            worst.append(min(output.column(mine, "R2")))
            better.append(min(fit["R2"] - fit["R2_in_KL"] for fit in mine))
            steepest, flattest = (f(abs(fit["slope"]) for fit in mine) for f in (max, min))
            ratios.append(steepest / flattest)
        return [Claim("lowest R^2", worst, above=0.95),
                Claim("above the R^2 of a line in KL by", better, above=0.0),
                Claim("steepest slope over flattest", ratios, below=1.33)]

    return sentence("PM score is linear in sqrt(KL), in parallel for all sizes", claims(COMMON),
                    claims(UNTRAINED)[:2])


def experiment(args):
    sizes, n_seeds, n, n_prompts = ["small", "medium", "toy"], 1, 4000, 600
    # A smaller rate and batch than the main job's: many points before sqrt(KL) = 1.
    cfg = RLConfig(iterations=30, batch=128, lr=3e-4, eval_every=2, eval_prompts=400)
    if args.full:
        n_seeds, cfg = 4, dataclasses.replace(cfg, iterations=40)
    if args.tiny:
        sizes, n, n_prompts = ["toy"], 120, 8
        cfg = dataclasses.replace(cfg, iterations=4, batch=32, minibatch=16, lr=3e-3, eval_every=1,
                                  eval_prompts=32)
    rows = output.each_seed("sqrt_kl", args, n_seeds, lambda seed: one_seed(
        lab.bases(sizes, seed, args.tiny), cfg, n, n_prompts))
    print(f"PM score = intercept + slope sqrt(KL) where sqrt(KL) <= {EARLY}, means of {n_seeds} "
          "seeds; bound: sqrt(2 V)")
    output.table(output.means(output.select(rows, part="fit"), ("size", "kl_coef", "by"),
                              ("slope", "bound", "R2", "R2_in_KL", "leaves_at", "last")))
    _, words = verdict(rows)
    output.finish("sqrt_kl", args, rows, lambda plt: draw(plt, rows), words)


if __name__ == "__main__":
    output.main(experiment, __doc__)
