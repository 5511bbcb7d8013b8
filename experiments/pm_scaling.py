"""§3.2, App. A.3, Figs 7, 31, 32: PM accuracy grows with the log of comparisons and of size.

    python experiments/pm_scaling.py              # 1 seed, three sizes; minutes on two CPU cores
    python experiments/pm_scaling.py --full       # 4 seeds

The paper's claim: accuracy is roughly linear in both logs, more cleanly for helpful-only PMs. PMs
of each size learn here from nested subsets of one set of comparisons: helpful ones only (Fig. 32),
or two thirds helpful and one third harmless ones (Figs 7, 31); one epoch at a constant rate, each
PM anew from the LM. (HH read the same off one training run of each size.) Accuracy on held-out
comparisons is fitted, for all sizes and amounts together, by Eq. A.1:

    accuracy = a + b log(P / P_max) + c log(D / D_max)   P parameters without the embeddings
                                                         D comparisons
1. The finding, for helpful-only PMs: in each seed b and c are above 0, and R^2 is above 0.9. In the
   control, a coin has labeled the comparisons.
2. A finding of its own. Labels are noisy, so accuracy has a ceiling, that of a judge who knows the
   truth; the paper could not know its own. A line has none. If the distance to the ceiling is a
   power law, then log(ceiling - accuracy) = a + b log P + c log D. Both forms are fitted to the
   smaller amounts and predict the accuracy at the larger ones (above a quarter of the largest). The
   power law's error is below the line's, for helpful-only PMs.
"""
import math

import lab
import output
from decide import Claim, sentence

from measures import fit_scaling
from picture import curve
from pm import report
from toy import mean_or_nan

LOG_LINEAR = 0.9  # the R^2 of Eq. A.1 from which on growth counts as log-linear
COIN = "labeled by a coin (control)"
HELPFUL = ("helpful", "helpful")  # trained on, tested on
CURVES = (HELPFUL, ("mixed", "helpful"), ("mixed", "harmless"), (COIN, "helpful"))


def measure(run, pairs, test: dict, data: str) -> list[dict]:
    """A PM trained on comparisons -> a row for each kind of comparisons that it is tested on."""
    pm, shape, rows = lab.train_pm_on(run, pairs), run.model_config(), []
    for trained_on, kind in CURVES:
        if trained_on != data:
            continue
        chosen, rejected = lab.scores(run, pm, test[kind])
        found = report(chosen - rejected, test[kind])
        rows.append({"tested_on": kind, "params": 12 * shape.n_layer * shape.d_model**2,
                     "accuracy": found.accuracy, "loss": found.loss, "low": found.low,
                     "high": found.high, "bayes": found.bayes})
    return rows


def one_seed(runs: dict, amounts: list[int], n_test: int, surplus: float) -> list[dict]:
    """`surplus` times as many comparisons are drawn as are used, because some are dropped."""
    world = list(runs.values())[-1]  # replies are the largest policy's for every PM
    n, rows, test = amounts[-1], [], {}
    helpful = lab.comparisons(world, int(surplus * n))
    harmless = lab.comparisons(world, int(surplus * n / 3), "harmless")
    tossed = lab.by_coin(world.rng("scaling", "coin"), helpful)
    for kind in lab.KINDS:
        test[kind] = lab.comparisons(world, n_test, kind, "test")
    for size, run in runs.items():
        for data in ("helpful", "mixed", COIN):
            for amount in amounts:
                third = amount // 3 if data == "mixed" else 0
                pairs = helpful[:amount - third] + harmless[:third]
                if data == COIN:
                    pairs = tossed[:amount]
                for row in measure(run, pairs, test, data):
                    rows.append({"seed": run.seed, "trained_on": data, "size": size,
                                 "comparisons": amount} | row)
    return rows


def fit(rows: list[dict]):
    """(a, b, c), R^2 of Eq. A.1."""
    amounts = output.column(rows, "comparisons")
    largest = max(output.column(rows, "params"))
    return fit_scaling(output.column(rows, "params"), amounts, output.column(rows, "accuracy"),
                       at=(largest, max(amounts)))


def prediction_errors(rows: list[dict]) -> tuple[float, float]:
    """How far the line and the power law are off at the amounts that they were not fitted to: root
    mean squares of differences in accuracy. rows: of one seed and curve."""
    most, ceiling = max(output.column(rows, "comparisons")), rows[0]["bayes"]
    seen = [row for row in rows if row["comparisons"] <= most / 4]
    unseen = [row for row in rows if row["comparisons"] > most / 4]
    logs = []
    for row in seen:
        distance = max(ceiling - row["accuracy"], 1e-3)  # luck can lift an accuracy above it
        logs.append(row | {"accuracy": math.log(distance)})
    params = max(output.column(seen, "params"))
    at = max(output.column(seen, "comparisons"))
    line, power = 0.0, 0.0
    (a, b, c), _ = fit(seen)
    (log_a, log_b, log_c), _ = fit(logs)
    for row in unseen:
        log_p, log_d = math.log(row["params"] / params), math.log(row["comparisons"] / at)
        line += (a + b * log_p + c * log_d - row["accuracy"]) ** 2
        power_law = ceiling - math.exp(log_a + log_b * log_p + log_c * log_d)
        power += (power_law - row["accuracy"]) ** 2
    return math.sqrt(line / len(unseen)), math.sqrt(power / len(unseen))


def curve_of(rows: list[dict], trained_on: str, tested_on: str) -> list[dict]:
    return output.select(rows, trained_on=trained_on, tested_on=tested_on)


def accuracies(rows: list[dict], size: str, amounts: list[int]) -> list[float]:
    """The mean over seeds for each number of comparisons."""
    means = []
    for amount in amounts:
        mine = output.select(rows, size=size, comparisons=amount)
        means.append(mean_or_nan(output.column(mine, "accuracy")))
    return means


def print_table(rows: list[dict], sizes: list[str], amounts: list[int]):
    table = []
    for size in sizes:
        row = {"size": size}
        for amount, accuracy in zip(amounts, accuracies(rows, size, amounts)):
            row[f"D={amount}"] = accuracy
        row["ceiling"] = mean_or_nan(output.column(rows, "bayes"))
        table.append(row)
    output.table(table)


def draw(plt, rows, sizes, amounts):
    for i, (trained_on, tested_on) in enumerate(CURVES[:3], 1):
        plt.subplot(1, 3, i)
        mine = curve_of(rows, trained_on, tested_on)
        for size in sizes:
            of_size = output.select(mine, size=size)
            curve(plt, amounts, output.samples(of_size, "accuracy", "comparisons", amounts), size)
        plt.axhline(mean_or_nan(output.column(mine, "bayes")), color="gray", ls=":", lw=0.8)
        plt.xscale("log")
        plt.ylim(0.4, 0.85)
        plt.xticks(amounts, amounts)
        plt.minorticks_off()
        plt.title(f"{trained_on} PM on {tested_on}")
        plt.xlabel("comparisons")
        plt.ylabel("accuracy (dotted: ceiling)")
        plt.legend()


def verdict(rows: list[dict]) -> tuple[str, str]:
    """The outcome of the first finding, and the sentences of both."""
    seeds = dict.fromkeys(output.column(rows, "seed"))

    def claims(trained_on: str) -> list[Claim]:
        found = [fit(output.select(curve_of(rows, trained_on, "helpful"), seed=seed))
                 for seed in seeds]
        return [Claim("b (size; HH 0.007)", [b for (_, b, _), _ in found], above=0.0),
                Claim("c (comparisons; HH 0.015)", [c for (_, _, c), _ in found], above=0.0),
                Claim("R^2", [r2 for _, r2 in found], above=LOG_LINEAR)]

    outcome, linear = sentence("accuracy is linear in log D and log P", claims("helpful"),
                               claims(COIN)[:2])
    better = []
    for seed in seeds:
        line, power = prediction_errors(output.select(curve_of(rows, *HELPFUL), seed=seed))
        better.append(line - power)
    _, bent = sentence("the distance to the ceiling fits a power law better than a line",
                       [Claim("error of the line less that of the power law", better, above=0.0)])
    return outcome, f"{linear} {bent}"


def experiment(args):
    sizes, n, n_test, n_seeds, surplus = ["small", "medium", "toy"], 8000, 3000, 1, 1.1
    if args.full:
        n_test, n_seeds = 5000, 4
    amounts = [n // 32, n // 16, n // 8, n // 4, n // 2, n]
    if args.tiny:
        sizes, amounts, n_test, surplus = ["small", "toy"], [8, 12, 64], 60, 3
    rows = output.each_seed("pm_scaling", args, n_seeds, lambda seed: one_seed(
        lab.bases(sizes, seed, args.tiny), amounts, n_test, surplus))
    for trained_on, tested_on in CURVES:
        print(f"Trained on {trained_on}, tested on {tested_on}: accuracy by number of comparisons "
              f"(means of {n_seeds} seeds)")
        mine = curve_of(rows, trained_on, tested_on)
        print_table(mine, sizes, amounts)
        (a, b, c), r2 = fit(mine)
        errors = []
        for seed in dict.fromkeys(output.column(mine, "seed")):
            errors.append(prediction_errors(output.select(mine, seed=seed)))
        line, power = (mean_or_nan(of_seeds) for of_seeds in zip(*errors))
        print(f"    accuracy = {a:.3f} + {b:.4f} log(P / P_max) + {c:.4f} log(D / D_max), R^2 = "
              f"{r2:.3f}; errors of predictions: line {line:.3f}, power law {power:.3f}")
    _, sentences = verdict(rows)
    output.finish("pm_scaling", args, rows, lambda plt: draw(plt, rows, sizes, amounts), sentences)


if __name__ == "__main__":
    output.main(experiment, __doc__)
