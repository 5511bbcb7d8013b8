"""§5.1, Figs 19, 26, 27: a PM that learned one kind only falls below chance on the other.

    python experiments/tension.py          # two PM sizes; minutes
    python experiments/tension.py --full   # three sizes, 4,000 comparisons

The paper's claim: trained on one kind of comparisons only, a PM is "significantly worse than
chance" on the other; the text gives no number. All PMs here learn from the largest initial policy's
replies (HH: nearly all are of 52B models). Measured:

1. Mixtures (Figs 19, 26). Eleven, from all harmless to all helpful, each of the same number of
   comparisons. Accuracy on held-out comparisons of both kinds, and the mean of the two. The
   verdict looks at the ends: accuracy on the other kind, of the largest PM, is at most 0.40 in the
   mean of 3 seeds.
2. Loss weights (Fig. 27). L = L_helpful + lambda L_harmless, on two thirds helpful and one third
   harmless comparisons. What lambda = 10 costs does not enter the verdict.
What the same tension does to a policy (§4.4) is in negotiator.py.
"""
import lab
import output

from pm import report
from toy import mean_or_nan

BELOW = 0.40  # accuracy on the other kind up to here counts as below chance
COLUMNS = ("helpful", "harmless", "mean")


def accuracies(run, pm, test: dict) -> dict[str, float]:
    """Accuracy on the held-out comparisons of each kind, and the mean of the two."""
    found = {}
    for kind in lab.KINDS:
        chosen, rejected = lab.scores(run, pm, test[kind])
        found[kind] = report(chosen - rejected, test[kind]).accuracy
    return found | {"mean": mean_or_nan(found.values())}


def measure_pms(run, found: dict, test: dict, n: int, settings: list[tuple]) -> list[dict]:
    """One PM and row for each (part, share of helpful comparisons, lambda)."""
    rows = []
    for part, share, weight in settings:
        k = round(share * n)
        pm = lab.train_pm_on(run, found["helpful"][:k] + found["harmless"][:n - k], weight)
        row = {"part": part, "seed": run.seed, "helpful_share": share, "weight": weight}
        rows.append(row | accuracies(run, pm, test))
    return rows


def curve(rows: list[dict], part: str, size: str, name: str, key: str, values) -> list[tuple]:
    """(mean, standard error) of a column over seeds, for each value of row[key]."""
    points = []
    for value in values:
        mine = output.select(rows, part=part, size=size, **{key: value})
        points.append(output.mean_se(output.column(mine, name)))
    return points


def print_part(rows, sizes: list[str], part: str, key: str, values):
    table = []
    for size in sizes:
        for value in values:
            row = {"size": size, key: value}
            for name in COLUMNS:
                [(row[name], row[f"+- {name[:7]}"])] = curve(rows, part, size, name, key, [value])
            table.append(row)
    output.table(table)


def draw(plt, rows, sizes, panels):
    plt.gcf().set_size_inches(9, 4)
    titles = {"mixture": "share of helpful comparisons", "weight": "lambda"}
    for i, (part, key, values) in enumerate(panels, 1):
        plt.subplot(1, 2, i)
        for size, style in zip(reversed(sizes), ("-", "--", ":")):
            for name, color in zip(COLUMNS, ("C0", "C3", "gray")):
                means, errors = zip(*curve(rows, part, size, name, key, values))
                plt.errorbar(values, means, errors, fmt=style, marker=".", color=color, lw=1,
                             label=f"{name}, {size}")
        plt.axhline(0.5, color="black", lw=0.5)
        plt.ylim(0.25, 0.85)
        plt.ylabel("held-out accuracy")
        plt.xlabel(titles[part])
    plt.legend(fontsize=7)


def verdict(helpful_only: tuple, harmless_only: tuple, lost: dict, weight: int,
            n: int) -> tuple[str, str]:
    """helpful_only, harmless_only: accuracy on the other kind, (mean, standard error) over n seeds.
    lost: {size: helpful accuracy that lambda = weight costs}."""
    outcome, words = "DOES NOT HOLD", "one-sided PMs are not both below chance on the other side"
    if max(helpful_only[0], harmless_only[0]) <= BELOW:
        outcome, words = "HOLDS", "each one-sided PM is below chance on the other side"
    costs = ", ".join(f"{cost:.3f} ({size})" for size, cost in lost.items())
    return outcome, (
        f"{outcome}: {words}: the helpful-only PM is right on {helpful_only[0]:.3f} +- "
        f"{helpful_only[1]:.3f} of harmless comparisons, the harmless-only one on "
        f"{harmless_only[0]:.3f} +- {harmless_only[1]:.3f} of helpful ones (threshold {BELOW}, n = "
        f"{n} seeds); lambda = {weight} costs {costs} of helpful accuracy (HH: 0.074 at 13M "
        "parameters, 0.015 at 52B).")


def experiment(args):
    sizes, n, n_test, n_seeds, surplus = ["small", "toy"], 2000, 1500, 3, 1.1
    shares, weights = [i / 10 for i in range(11)], [1, 2, 3, 4, 10]
    if args.full:
        sizes, n, n_test = ["small", "medium", "toy"], 4000, 2000
    if args.tiny:
        sizes, n, n_test, n_seeds, surplus = ["toy"], 24, 60, 1, 2
        shares, weights = [0.0, 1.0], [1, 10]
    runs, rows = lab.bases(sizes, args.seed, args.tiny), []
    ends = [("mixture", 0.0, 1), ("mixture", 1.0, 1)]
    everything = [("mixture", share, 1) for share in shares]
    everything += [("weight", 2 / 3, weight) for weight in weights]
    for seed in range(args.seed, args.seed + n_seeds):
        world, found, test = lab.replica(runs["toy"], seed), {}, {}
        for kind in lab.KINDS:
            found[kind] = lab.comparisons(world, int(surplus * n), kind)[:n]
            test[kind] = lab.comparisons(world, n_test, kind, "test")
        settings = everything if seed == args.seed or args.full else ends
        for size in sizes:
            for row in measure_pms(lab.replica(runs[size], seed), found, test, n, settings):
                rows.append({"size": size} | row)

    panels = [("mixture", "helpful_share", shares), ("weight", "weight", weights)]
    notes = {"mixture": f"; at the ends n = {n_seeds} seeds, +- standard error", "weight": ""}
    for part, key, values in panels:
        print(f"Held-out accuracy by {part}, {n} comparisons in training{notes[part]}")
        print_part(rows, sizes, part, key, values)

    [helpful_only] = curve(rows, "mixture", "toy", "harmless", "helpful_share", [1.0])
    [harmless_only] = curve(rows, "mixture", "toy", "helpful", "helpful_share", [0.0])
    lost = {}
    for size in sizes:
        points = curve(rows, "weight", size, "helpful", "weight", weights)
        lost[size] = points[0][0] - points[-1][0]
    _, sentence = verdict(helpful_only, harmless_only, lost, weights[-1], n_seeds)
    output.finish("tension", args, rows, lambda plt: draw(plt, rows, sizes, panels), sentence)


if __name__ == "__main__":
    output.main(experiment, __doc__)
