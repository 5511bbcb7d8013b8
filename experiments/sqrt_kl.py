"""§4.3, Fig. 13: early in RLHF the PM score is linear in sqrt(KL), in parallel for all sizes.

    python experiments/sqrt_kl.py           # three policy sizes x 3 seeds; minutes on two CPU cores
    python experiments/sqrt_kl.py --full    # 5 seeds, more responses measured

The paper's claim: for much of training the PM score is approximately linear in the square root of
the KL to the initial policy, and the lines of all sizes are roughly parallel under one PM. All
policies here are trained against one common PM, as on the left of Fig. 13. Seeds differ in PPO's
randomness and in the held-out prompts, not in the models they start from.

Measured: the mean PM score of replies to held-out prompts against sqrt(KL). A straight line is
fitted where sqrt(KL) <= 1, and for comparison one in KL itself. The verdict's thresholds: R^2 is at
least 0.95 in each run and above that of the line in KL, and the steepest size's mean slope is at
most 1.33 times the flattest's. The slope is compared with what is possible at all:

  Of all policies with a given KL, exponential tilting, pi ~ pi_0 exp(eta r), has the highest E[r]
  (Gibbs' variational principle; the paper argues from orders of magnitude only and prints no
  slope). With V the mean over prompts of the variance of r among the initial policy's replies to
  one prompt, tilting has E[r] - E_0[r] = eta V and KL = eta^2 V / 2 for small eta. So the gain is
  sqrt(2 V) sqrt(KL) at most, to first order in sqrt(KL).
"""
import dataclasses
import math

import lab
import output

from measures import line_fit
from train_rl import RLConfig

EARLY = 1.0  # the range of the line, in sqrt(nats)


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


def fit_early(path: list[dict], bound: float) -> dict:
    distance, score = output.column(path, "sqrt_kl"), output.column(path, "score")
    early = [numbers for numbers in path if numbers["sqrt_kl"] <= EARLY]
    early_score = output.column(early, "score")
    slope, intercept, r2 = line_fit(output.column(early, "sqrt_kl"), early_score)
    kl = [numbers["sqrt_kl"] ** 2 for numbers in early]
    return {"points": len(early), "slope": slope, "bound": bound, "share": slope / bound,
            "intercept": intercept, "R2": r2, "R2_in_KL": line_fit(kl, early_score)[2],
            "leaves_at": leaves(distance, score, slope, intercept), "last_sqrt_kl": distance[-1]}


def mean_slopes(fits: list[dict]) -> dict:
    """{size: (mean, standard error)} over seeds."""
    slopes = {}
    for size in output.column(fits, "size"):
        slopes[size] = output.mean_se(output.column(output.select(fits, size=size), "slope"))
    return slopes


def draw(plt, rows, fits):
    slopes = mean_slopes(fits)
    sizes = list(slopes)
    for fit in fits:
        mine = output.select(rows, size=fit["size"], seed=fit["seed"])
        is_first = fit is output.select(fits, size=fit["size"])[0]
        label = f"{fit['size']}: slope {slopes[fit['size']][0]:.2f}"
        plt.plot(output.column(mine, "sqrt_kl"), output.column(mine, "score"), ".-", lw=0.8,
                 color=f"C{sizes.index(fit['size'])}", label=label if is_first else None)
    plt.axvline(EARLY, color="gray", lw=0.5)
    plt.xlabel("sqrt(KL) to the initial policy")
    plt.ylabel("PM score, held-out prompts")
    plt.legend()


def verdict(fits: list[dict]) -> tuple[str, str]:
    """fits: a row for each run, with "size", "slope", "R2" and "R2_in_KL"."""
    worst = min(output.column(fits, "R2"))
    better = sum(fit["R2"] > fit["R2_in_KL"] for fit in fits)
    slopes = [mean for mean, _ in mean_slopes(fits).values()]
    ratio = max(slopes) / min(slopes)
    outcome, words = "DOES NOT HOLD", " as stated"
    if worst >= 0.95 and better == len(fits) and 0 < ratio <= 1.33:
        outcome, words = "HOLDS", ": PM score is linear in sqrt(KL), in parallel for all sizes"
    return outcome, (
        f"{outcome}{words}: R^2 of the line in sqrt(KL) is at least {worst:.3f} (threshold 0.95) "
        f"in {len(fits)} runs, above that of a line in KL in {better}; the steepest size's slope "
        f"is {ratio:.2f} times the flattest's (threshold 1.33).")


def experiment(args):
    sizes, n_seeds, n, n_prompts = ["small", "medium", "toy"], 5 if args.full else 3, 4000, 200
    # A smaller penalty, rate and batch than the main job's: many points before sqrt(KL) = 1, and
    # some beyond.
    cfg = RLConfig(kl_coef=0.02, iterations=30, batch=128, lr=3e-4, eval_every=2, eval_prompts=400)
    if args.full:
        cfg = dataclasses.replace(cfg, iterations=60, eval_prompts=1000)
    if args.tiny:
        sizes, n_seeds, n, n_prompts = ["toy"], 1, 120, 8
        cfg = dataclasses.replace(cfg, iterations=4, batch=32, minibatch=16, lr=3e-3, eval_every=1,
                                  eval_prompts=32)
    runs, rows, fits = lab.bases(sizes, args.seed, args.tiny), [], []
    pm = common_pm(runs[sizes[-1]], n)
    for size, run in runs.items():
        initial = lab.load(run)
        bound = steepest_slope(run, initial, pm, n_prompts)
        for seed in range(args.seed, args.seed + n_seeds):
            _, path = lab.ppo(lab.replica(run, seed), pm, cfg, initial)
            fits.append({"size": size, "seed": seed} | fit_early(path, bound))
            for numbers in path:
                row = {"size": size, "seed": seed}
                for name in ("iteration", "kl", "sqrt_kl", "score"):
                    row[name] = numbers[name]
                rows.append(row)
    print(f"PM score = intercept + slope sqrt(KL) where sqrt(KL) <= {EARLY}; bound: sqrt(2 V); "
          "share: slope / bound")
    output.table(fits)
    for size, (mean, se) in mean_slopes(fits).items():
        print(f"    slope, {size}: {mean:.3f} +- {se:.3f} (n = {n_seeds})")
    _, sentence = verdict(fits)
    output.finish("sqrt_kl", args, rows, lambda plt: draw(plt, rows, fits), sentence)


if __name__ == "__main__":
    output.main(experiment, __doc__)
