"""§3.2, App. A.3, Figs 7, 31, 32: PM accuracy grows with the log of comparisons and of size.

    python experiments/pm_scaling.py              # three sizes, 250 to 8,000 comparisons, 1 seed
    python experiments/pm_scaling.py --full       # up to 16,000 comparisons, 3 seeds

The paper's claim: accuracy is roughly linear in both logs, more cleanly for helpful-only PMs. PMs
of each size learn here from nested subsets of one set of comparisons: helpful ones only (Fig. 32),
or two thirds helpful and one third harmless ones (Figs 7, 31); one epoch at a constant rate, each
PM anew from the LM. (HH read the same off one training run.) Accuracy on held-out comparisons is
fitted, for all sizes and amounts together, by Eq. A.1:

    accuracy = a + b log(P / P_max) + c log(D / D_max)   P parameters without the embeddings
                                                         D comparisons
The verdict's thresholds, for helpful-only PMs: R^2 is at least 0.9, and b and c are above 0.

Labels are noisy, so accuracy has a ceiling, that of a judge who knows the truth; the paper could
not know its own. A line has none: where PMs come near it, growth must bend, and R^2 falls.
"""
import math

import lab
import output

from measures import fit_scaling
from pm import report
from toy import mean_or_nan

LOG_LINEAR = 0.9  # the R^2 of Eq. A.1 from which on growth counts as log-linear
CURVES = (("helpful", "helpful"), ("mixed", "helpful"), ("mixed", "harmless"))  # trained, tested on


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


def one_seed(runs: dict, seed: int, amounts: list[int], n_test: int, surplus: float) -> list[dict]:
    """`surplus` times as many comparisons are drawn as are used, because some are dropped."""
    world = lab.replica(runs["toy"], seed)  # replies are the largest policy's for every PM
    n, rows, test = amounts[-1], [], {}
    helpful = lab.comparisons(world, int(surplus * n))
    harmless = lab.comparisons(world, int(surplus * n / 3), "harmless")
    for kind in lab.KINDS:
        test[kind] = lab.comparisons(world, n_test, kind, "test")
    for size in runs:
        run = lab.replica(runs[size], seed)
        for data in ("helpful", "mixed"):
            for amount in amounts:
                third = amount // 3 if data == "mixed" else 0
                pairs = helpful[:amount - third] + harmless[:third]
                for row in measure(run, pairs, test, data):
                    rows.append({"trained_on": data, "size": size, "seed": seed,
                                 "comparisons": amount} | row)
    return rows


def curve(rows: list[dict], trained_on: str, tested_on: str) -> list[dict]:
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


def draw(plt, rows, fits, sizes, amounts):
    plt.gcf().set_size_inches(9, 3.5)
    largest = max(output.column(rows, "params"))
    for i, (trained_on, tested_on) in enumerate(CURVES, 1):
        plt.subplot(1, 3, i)
        mine = curve(rows, trained_on, tested_on)
        (a, b, c), _ = fits[trained_on, tested_on]
        for size, color in zip(sizes, ("C0", "C1", "C2")):
            errors, line = [], []
            log_p = math.log(output.select(mine, size=size)[0]["params"] / largest)
            for amount in amounts:
                found = output.select(mine, size=size, comparisons=amount)
                width = mean_or_nan(row["high"] - row["low"] for row in found)
                errors.append(width / 2 / len(found) ** 0.5)  # 95%
                line.append(a + b * log_p + c * math.log(amount / amounts[-1]))
            plt.errorbar(amounts, accuracies(mine, size, amounts), errors, fmt=".", color=color,
                         label=size)
            plt.plot(amounts, line, color=color, lw=0.8)
        plt.axhline(mine[0]["bayes"], color="gray", ls=":")
        plt.xscale("log")
        plt.ylim(0.4, 0.85)
        plt.xticks(amounts, amounts, fontsize=7)
        plt.minorticks_off()
        plt.title(f"{trained_on} PM on {tested_on}", fontsize=8)
        plt.xlabel("comparisons")
        plt.legend(fontsize=7)


def verdict(fits: dict) -> tuple[str, str]:
    """fits: {(trained on, tested on): ((a, b, c), R^2)} for the three curves."""
    (_, b, c), r2 = fits["helpful", "helpful"]
    outcome, words = "DOES NOT HOLD", "accuracy is not log-linear here"
    if r2 >= LOG_LINEAR and b > 0 and c > 0:
        outcome, words = "HOLDS", "accuracy grows with log D and log P"
    return outcome, (
        f"{outcome}: {words}: for helpful-only PMs Eq. A.1 has b = {b:.3f} and c = {c:.3f} (HH: "
        f"0.007 and 0.015, if its logs are natural) with R^2 = {r2:.3f} (threshold {LOG_LINEAR}, "
        f"and b and c above 0); trained on both kinds, R^2 is {fits['mixed', 'helpful'][1]:.3f} on "
        f"helpful and {fits['mixed', 'harmless'][1]:.3f} on harmless comparisons.")


def experiment(args):
    sizes, n, n_test, n_seeds, surplus = ["small", "medium", "toy"], 8000, 3000, 1, 1.1
    if args.full:
        n, n_test, n_seeds = 16_000, 5000, 3
    amounts = [n // 32, n // 16, n // 8, n // 4, n // 2, n]
    if args.tiny:
        sizes, amounts, n_test, surplus = ["small", "toy"], [8, 16], 60, 2
    runs, rows = lab.bases(sizes, args.seed, args.tiny), []
    for seed in range(args.seed, args.seed + n_seeds):
        rows += one_seed(runs, seed, amounts, n_test, surplus)

    fits, largest = {}, max(output.column(rows, "params"))
    for trained_on, tested_on in CURVES:
        print(f"Trained on {trained_on}, tested on {tested_on}: accuracy by number of comparisons "
              f"(n = {n_seeds} seeds)")
        mine = curve(rows, trained_on, tested_on)
        print_table(mine, sizes, amounts)
        (a, b, c), r2 = fits[trained_on, tested_on] = fit_scaling(
            output.column(mine, "params"), output.column(mine, "comparisons"),
            output.column(mine, "accuracy"), at=(largest, amounts[-1]))
        print(f"    accuracy = {a:.3f} + {b:.4f} log(P / {largest:,}) + {c:.4f} log(D / "
              f"{amounts[-1]:,}), R^2 = {r2:.3f}")
    _, sentence = verdict(fits)
    output.finish("pm_scaling", args, rows, lambda plt: draw(plt, rows, fits, sizes, amounts),
                  sentence)


if __name__ == "__main__":
    output.main(experiment, __doc__)
