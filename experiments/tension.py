"""§5.1, Figs 19, 26, 27: a PM that learned one kind only falls below chance on the other.

    python experiments/tension.py          # 1 seed, two PM sizes; minutes on two CPU cores
    python experiments/tension.py --full   # 4 seeds, more test comparisons

The paper's claim: trained on one kind of comparisons only, a PM is "significantly worse than
chance" on the other; the text gives no number. All PMs here learn from the largest initial policy's
replies (HH: nearly all are of 52B models). Measured:

1. Mixtures (Figs 19, 26). From all harmless to all helpful, each of the same number of comparisons.
   Accuracy on held-out comparisons of both kinds, and the mean of the two. The finding, for PMs of
   the toy size: both one-sided PMs are below 0.5 on the other kind. In the control, a coin has
   labeled their comparisons, so they have learned nothing from either side (means of five PMs).
2. Loss weights (Fig. 27). L = L_helpful + lambda L_harmless, on two thirds helpful and one third
   harmless comparisons. HH: lambda = 10 costs 0.074 of helpful accuracy at 13M parameters, and
   0.015 at 52B. A finding of its own: it costs the small PM more than the toy PM.
What the same tension does to a policy (§4.4) is in negotiator.py.
"""
import lab
import output
from decide import Claim, sentence
from picture import curve

from pm import report
from toy import mean_or_nan

COLUMNS = ("helpful", "harmless", "mean")
LARGEST, SMALLEST = "toy", "small"
HEAVY = 10  # lambda
COINS = 5   # PMs of a control


def accuracies(run, pm, test: dict) -> dict[str, float]:
    """Accuracy on the held-out comparisons of each kind, and the mean of the two."""
    found = {}
    for kind in lab.KINDS:
        chosen, rejected = lab.scores(run, pm, test[kind])
        found[kind] = report(chosen - rejected, test[kind]).accuracy
    return found | {"mean": mean_or_nan(found.values())}


def measure_pms(run, found: dict, test: dict, n: int, settings: list[tuple]) -> list[dict]:
    """One PM and row for each (part, share of helpful comparisons, lambda). A row of the control is
    the mean of several PMs: one alone leans to some side by chance."""
    rows = []
    for part, share, weight in settings:
        k, measured = round(share * n), []
        for number in range(COINS if part == "control" else 1):
            own = lab.replica(run, run.seed + 1000 * number)  # number > 0: another head and order
            pairs = found["helpful"][:k] + found["harmless"][:n - k]
            if part == "control":
                pairs = lab.by_coin(own.rng("tension", "coin"), pairs)
            measured.append(accuracies(run, lab.train_pm_on(own, pairs, weight), test))
        [mean] = output.means(measured, ())
        rows.append({"part": part, "helpful_share": share, "weight": weight} | mean)
    return rows


def one_seed(runs: dict, n: int, n_test: int, surplus: float, shares, weights) -> list[dict]:
    """runs: {size: run} of one seed. Every PM of the toy size, and the weights of the others."""
    world, found, test, rows = runs[LARGEST], {}, {}, []
    for kind in lab.KINDS:
        found[kind] = lab.comparisons(world, int(surplus * n), kind)[:n]
        test[kind] = lab.comparisons(world, n_test, kind, "test")
    mixtures = [("mixture", share, 1) for share in shares]
    weighted = [("weight", 2 / 3, weight) for weight in weights]
    controls = [("control", 0.0, 1), ("control", 1.0, 1)]
    for size, run in runs.items():
        settings = weighted + (mixtures + controls if size == LARGEST else [])
        for row in measure_pms(run, found, test, n, settings):
            rows.append({"seed": run.seed, "size": size} | row)
    return rows


def draw(plt, rows, shares, weights):
    panels = (("mixture", "helpful_share", shares, (LARGEST,), "share of helpful comparisons"),
              ("weight", "weight", weights, (LARGEST, SMALLEST), "lambda"))
    for i, (part, key, values, sizes, title) in enumerate(panels, 1):
        plt.subplot(1, 2, i)
        for size in sizes:
            mine = output.select(rows, part=part, size=size)
            for name in COLUMNS:
                curve(plt, values, output.samples(mine, name, key, values), f"{name}, {size}")
        plt.axhline(0.5, color="gray", lw=0.8)
        plt.ylim(0.25, 0.85)
        plt.ylabel("held-out accuracy")
        plt.xlabel(title)
        plt.legend()


def verdict(rows: list[dict]) -> tuple[str, str]:
    """The outcome for one-sided PMs, and the sentences of both findings."""
    def below_chance(part: str) -> list[Claim]:
        claims = []
        for share, trained, tested in ((1.0, "helpful", "harmless"), (0.0, "harmless", "helpful")):
            mine = output.select(rows, part=part, size=LARGEST, helpful_share=share)
            claims.append(Claim(f"{trained}-only PM on {tested} comparisons",
                                output.column(mine, tested), below=0.5))
        return claims

    costs = {}
    for size in (SMALLEST, LARGEST):
        light, heavy = (output.column(output.select(rows, part="weight", size=size, weight=weight),
                                      "helpful") for weight in (1, HEAVY))
        costs[size] = output.less(light, heavy)
    outcome, ends = sentence("one-sided PMs are below chance on the other side",
                             below_chance("mixture"), below_chance("control"))
    more = output.less(costs[SMALLEST], costs[LARGEST])
    _, weights = sentence(
        f"lambda = {HEAVY} costs a small PM more helpful accuracy (HH 0.074) than a large one (HH "
        "0.015)", [Claim("small less toy", more, above=0.0)])
    means = [f"{mean_or_nan(cost):.3f} ({size})" for size, cost in costs.items()]
    return outcome, f"{ends} {weights} The costs are {' and '.join(means)}."


def experiment(args):
    n, n_test, n_seeds, surplus = 2000, 1500, 1, 1.1
    shares, weights = [i / 5 for i in range(6)], [1, 3, HEAVY]
    if args.full:
        n_test, n_seeds = 3000, 4
    if args.tiny:
        n, n_test, surplus, shares, weights = 24, 60, 2, [0.0, 1.0], [1, HEAVY]
    rows = output.each_seed("tension", args, n_seeds, lambda seed: one_seed(
        lab.bases([SMALLEST, LARGEST], seed, args.tiny), n, n_test, surplus, shares, weights))
    print(f"Held-out accuracy, {n} comparisons in training, means of {n_seeds} seeds")
    output.table(output.means(rows, ("size", "part", "helpful_share", "weight"), errors=True))
    _, sentences = verdict(rows)
    output.finish("tension", args, rows, lambda plt: draw(plt, rows, shares, weights), sentences)


if __name__ == "__main__":
    output.main(experiment, __doc__)
