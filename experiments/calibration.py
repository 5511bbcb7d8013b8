"""§3.3, Figs 9 and 25: a PM's probabilities can be taken at their word, less so its high scores.

    python experiments/calibration.py         # 1 seed; minutes on two CPU cores
    python experiments/calibration.py --full  # 4 seeds, more test comparisons

The paper's claims: PMs of helpful comparisons only are very well calibrated, those of both kinds
are a little under-confident (Fig. 9); accuracy falls on pairs of which both replies score high
(Fig. 25). Two PMs learn from the same number of comparisons: from helpful ones only, or from two
thirds helpful and one third harmless ones ("mixed"). Each is tested on held-out comparisons of its
own mixture.

1. Calibration. P(A is better) = sigmoid(r_A - r_B) (Eq. 4.2). Of the pairs where a PM is 80% sure,
   is it right in 80%? ECE is the mean distance between the two over ten bins of confidence. `bias`
   is confidence minus accuracy, above 0 for a PM that is too sure. The toy world knows the
   probability of each choice (Comparison.p_chosen), so "right" is an average over newly drawn
   labels, and the noise of one label is not taken for miscalibration.
   The finding: the helpful-only PM's ECE is below 0.03. The control shuffles the sizes of its
   margins among the pairs: the same choices, with other pairs' confidence. Its ECE is above 0.03.
   A finding of its own: the mixed PM's bias is below 0.
2. Noise. The learning rate is constant, so the last steps leave noise in the scores. Noise makes
   margins larger, which looks like confidence. Two more mixed PMs that read the comparisons in
   other orders have other noise. The mean of the three PMs' scores has less of it, and a PM trained
   in batches of 32 instead of 16 has less, too. Their ECE and bias are in the table.
3. Thresholds. Accuracy on pairs of which both scores are above the 70% quantile is below that on
   all pairs. Two replies with high scores have similar scores, which alone makes a pair harder. So
   the fall must also exceed that on pairs of which both scores are below the 30% quantile. How far
   the Bayes ceiling falls on the same pairs, which the paper could not know, is printed.
`excess` is the log loss over the entropy of the true probabilities: the PM's own error, in nats.
"""
import dataclasses

import lab
import output
import torch
from decide import Claim, sentence

from measures import calibration_curve, expected_calibration_error, log_loss, threshold_curve
from picture import curve, paths
from train_pm import PMConfig

WELL = 0.03       # the ECE up to which a PM counts as very well calibrated
QUANTILES = (0.0, 0.2, 0.4, 0.6, 0.7, 0.8, 0.9)  # of the test replies' scores: the thresholds
HIGH = 0.7        # the quantile at which the finding is decided
HELPFUL, MIXED = "helpful", "mixed"
SHUFFLED = "sizes of margins shuffled (control)"
MEAN, LARGE = "mean of 3 mixed PMs", "mixed, batch 32"


def draw_comparisons(run, n: int, n_test: int, surplus: float) -> tuple[dict, dict]:
    """Comparisons for training and for the test, {"helpful", "mixed": [Comparison]} each. `surplus`
    times as many are drawn, because some are dropped."""
    helpful = lab.comparisons(run, int(surplus * n))
    harmless = lab.comparisons(run, int(surplus * n / 3), "harmless")
    train = {HELPFUL: helpful[:n], MIXED: helpful[:n * 2 // 3] + harmless[:n // 3]}
    helpful = lab.comparisons(run, n_test, "helpful", "test")
    harmless = lab.comparisons(run, n_test // 3, "harmless", "test")
    return train, {HELPFUL: helpful, MIXED: helpful[:n_test * 2 // 3] + harmless}


def calibrate(margins, p) -> dict:
    """Margins (N,) and true probabilities (N,) -> a row of numbers."""
    predicted, right, counts = calibration_curve(margins, p_chosen=p)  # (bins,) each
    loss, entropy = log_loss(margins, p)
    confidence = (predicted * counts).sum().item() / counts.sum().item()
    accuracy = (right * counts).sum().item() / counts.sum().item()
    return {"accuracy": accuracy, "bayes": torch.maximum(p, 1 - p).mean().item(),
            "ECE": expected_calibration_error(margins, p_chosen=p), "bias": confidence - accuracy,
            "excess": loss - entropy}


def shuffled(values, generator):
    """The same numbers (N,) in another order."""
    return values[torch.randperm(len(values), generator=generator)]


def beyond_thresholds(chosen, rejected, p) -> list[dict]:
    """Scores (N,), (N,) -> a row for pairs above each quantile ("threshold"), and for pairs below
    1 less each ("low")."""
    rows = []
    # Below a threshold is above it with all signs turned; the margins stay what they are.
    for part, ours, theirs in (("threshold", chosen, rejected), ("low", -rejected, -chosen)):
        at = torch.cat((ours, theirs)).quantile(torch.tensor(QUANTILES))
        accuracy, bayes, pairs = threshold_curve(ours, theirs, at, p)
        for i, quantile in enumerate(QUANTILES):
            rows.append({"part": part, "quantile": quantile, "accuracy": accuracy[i].item(),
                         "bayes": bayes[i].item(), "pairs": pairs[i].item()})
    return rows


def one_seed(run, n: int, n_test: int, surplus: float) -> list[dict]:
    train, test = draw_comparisons(run, n, n_test, surplus)
    rows, generator = [], run.torch_rng("calibration", "control")

    def scores(name: str, order: int = 0, **options):
        """Of a PM's training on `name`: order -> the order of the comparisons, and the head."""
        own = lab.replica(run, run.seed + 1000 * order)
        pm = lab.train_pm_on(own, train[name], cfg=dataclasses.replace(PMConfig(), **options))
        return torch.stack(lab.scores(run, pm, test[name]))  # (2, N): chosen, rejected

    def measure(name: str, found, pairs: list):
        p = torch.tensor([comparison.p_chosen for comparison in pairs])
        margins = found[0] - found[1]
        rows.append({"part": "calibration", "PM": name} | calibrate(margins, p))
        if name in (HELPFUL, MIXED):  # for Fig. 9
            predicted, right, _ = calibration_curve(margins, p_chosen=p)
            for x, y in zip(predicted.tolist(), right.tolist()):
                rows.append({"part": "curve", "PM": name, "predicted": x, "right": y})
        if name == HELPFUL:
            control = {"part": "calibration", "PM": SHUFFLED}
            of_others = shuffled(margins.abs(), generator) * margins.sign()
            rows.append(control | calibrate(of_others, p))
            rows.extend(beyond_thresholds(*found, p))

    measure(HELPFUL, scores(HELPFUL), test[HELPFUL])
    first = scores(MIXED)
    measure(MIXED, first, test[MIXED])
    measure(MEAN, (first + scores(MIXED, 1) + scores(MIXED, 2)) / 3, test[MIXED])
    measure(LARGE, scores(MIXED, batch=32), test[MIXED])
    return [{"seed": run.seed} | row for row in rows]


def fall(rows: list[dict], part: str, name: str) -> list[float]:
    """By how much a column is lower beyond the quantile HIGH than on all pairs, for each seed.
    part: "threshold", both scores above it; "low", both below 1 less it."""
    everywhere, beyond = (output.select(rows, part=part, quantile=q) for q in (0.0, HIGH))
    return output.less(output.column(everywhere, name), output.column(beyond, name))


def draw(plt, rows):
    plt.subplot(1, 2, 1)
    for name in (HELPFUL, MIXED):
        paths(plt, output.select(rows, part="curve", PM=name), "predicted", "right", name)
    plt.plot([0.5, 1], [0.5, 1], color="gray", ls=":", lw=0.8, marker="")
    plt.xlabel("the PM's confidence")
    plt.ylabel("how often it is right")
    plt.legend()
    plt.subplot(1, 2, 2)
    mine = output.select(rows, part="threshold")
    for name, label in (("accuracy", "helpful-only PM"), ("bayes", "ceiling")):
        curve(plt, QUANTILES, output.samples(mine, name, "quantile", QUANTILES), label)
    plt.xlabel("both scores above this quantile")
    plt.ylabel("accuracy")
    plt.legend()


def verdict(rows: list[dict]) -> tuple[str, str]:
    """The outcome for the helpful-only PM, and the sentences of all three findings."""
    def of(pm: str, name: str) -> list[float]:
        return output.column(output.select(rows, part="calibration", PM=pm), name)

    outcome, well = sentence("a helpful-only PM's scores are honest probabilities", [
        Claim("its ECE", of(HELPFUL, "ECE"), below=WELL),
        Claim("with the sizes of its margins shuffled, the control", of(SHUFFLED, "ECE"),
              above=WELL)])
    high, low = fall(rows, "threshold", "accuracy"), fall(rows, "low", "accuracy")
    _, less = sentence("it is less often right among high scores", [
        Claim(f"accuracy above the {HIGH:.0%} quantile, less than on all pairs by", high,
              above=0.0),
        Claim(f"the same, less the fall below the {1 - HIGH:.0%} quantile, the control",
              output.less(high, low), above=0.0)])
    _, under = sentence("a PM of both kinds is under-confident",
                        [Claim("its confidence less its accuracy", of(MIXED, "bias"), below=0.0)])
    ceilings = [output.mean_se(fall(rows, part, "bayes"))[0] for part in ("threshold", "low")]
    return outcome, (f"{well} {less} The ceiling falls by {ceilings[0]:.3f} (high scores) and "
                     f"{ceilings[1]:.3f} (low ones). {under}")


def experiment(args):
    n, n_test, n_seeds, surplus = 10_000, 4000, 1, 1.1
    if args.full:
        n_test, n_seeds = 8000, 4
    if args.tiny:
        n, n_test, n_seeds, surplus = 30, 60, 1, 2  # a tiny LM leaves many replies unfinished
    rows = output.each_seed("calibration", args, n_seeds, lambda seed: one_seed(
        lab.base("toy", seed, args.tiny), n, n_test, surplus))
    print(f"Each PM on held-out comparisons of its own mixture, means of {n_seeds} seeds; excess "
          "in nats a pair")
    output.table(output.means(output.select(rows, part="calibration"), ("PM",)))
    print("Helpful-only PM: pairs whose scores are both above a quantile of all scores")
    output.table(output.means(output.select(rows, part="threshold"), ("quantile",)))
    print("and pairs whose scores are both below 1 less a quantile")
    output.table(output.means(output.select(rows, part="low"), ("quantile",)))
    _, sentences = verdict(rows)
    output.finish("calibration", args, rows, lambda plt: draw(plt, rows), sentences)


if __name__ == "__main__":
    output.main(experiment, __doc__)
