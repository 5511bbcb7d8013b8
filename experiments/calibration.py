"""§3.3, Figs 9 and 25: a PM's probabilities can be taken at their word, less so its high scores.

    python experiments/calibration.py         # helpful-only and mixed PMs x 3 seeds; minutes
    python experiments/calibration.py --full  # 5 seeds, more test comparisons

The paper's claims: PMs of helpful comparisons only are very well calibrated, those of both kinds
are a little under-confident (Fig. 9); accuracy falls on pairs of which both replies score high
(Fig. 25). Here, two PMs learn from the same number of comparisons: from helpful ones only, or from
two thirds helpful and one third harmless ones. Each is tested on held-out comparisons of its own
mixture. Seeds differ in the comparisons and in the PM's training, not in the LM it starts from.

1. Calibration. P(A is better) = sigmoid(r_A - r_B) (Eq. 4.2). Of the pairs where a PM is 80% sure,
   is it right in 80%? ECE is the mean distance between the two over ten bins of confidence. `bias`
   is confidence minus accuracy, above 0 for a PM that is too sure. The toy world knows the
   probability of each choice (Comparison.p_chosen), so "right" is an average over newly drawn
   labels, and the noise of one label is not taken for miscalibration.
2. Log loss. Its excess over the entropy of those probabilities is the PM's own error, in nats.
3. Thresholds. The fall of the Bayes ceiling on the same pairs, which the paper could not know, says
   how much of the fall in accuracy is due to good replies being alike.

The verdict's thresholds: the helpful-only PM's ECE is at most 0.03, and its accuracy on pairs above
the 70% quantile is below that on all pairs by 2 standard errors. The mixed PM does not enter it.
"""
import lab
import output
import torch

from measures import calibration_curve, expected_calibration_error, log_loss, threshold_curve
from train_pm import PMConfig

WELL = 0.03       # the ECE up to which a PM counts as very well calibrated
QUANTILES = (0.0, 0.2, 0.4, 0.6, 0.7, 0.8, 0.9)  # of the test replies' scores: the thresholds
HIGH = 0.7        # the quantile at which the finding is decided
# The rate is constant, so the last steps leave noise in the scores, and noise looks like
# confidence. With the main job's batch of 16 the ECE was 0.031 +- 0.001 (3 seeds).
CALM = PMConfig(batch=32)


def draw_comparisons(run, n: int, n_test: int, surplus: float) -> tuple[dict, dict]:
    """Comparisons for training and for the test, {"helpful", "mixed": [Comparison]} each. `surplus`
    times as many are drawn, because some are dropped."""
    helpful = lab.comparisons(run, int(surplus * n))
    harmless = lab.comparisons(run, int(surplus * n / 3), "harmless")
    train = {"helpful": helpful[:n], "mixed": helpful[:n * 2 // 3] + harmless[:n // 3]}
    helpful = lab.comparisons(run, n_test, "helpful", "test")
    harmless = lab.comparisons(run, n_test // 3, "harmless", "test")
    return train, {"helpful": helpful, "mixed": helpful[:n_test * 2 // 3] + harmless}


def calibrate(chosen, rejected, p) -> tuple[dict, tuple]:
    """Scores (N,), (N,), true probabilities (N,) -> a row of numbers, and the curve of Fig. 9."""
    margins = chosen - rejected
    predicted, right, counts = calibration_curve(margins, p_chosen=p)  # (bins,) each
    loss, entropy = log_loss(margins, p)
    confidence = (predicted * counts).sum().item() / counts.sum().item()
    accuracy = (right * counts).sum().item() / counts.sum().item()
    row = {"accuracy": accuracy, "bayes": torch.maximum(p, 1 - p).mean().item(),
           "ECE": expected_calibration_error(margins, p_chosen=p), "bias": confidence - accuracy,
           "log_loss": loss, "entropy": entropy, "excess": loss - entropy}
    return row, (predicted, right)


def above_thresholds(chosen, rejected, p, seed: int) -> list[dict]:
    at = torch.cat((chosen, rejected)).quantile(torch.tensor(QUANTILES))
    accuracy, bayes, pairs = threshold_curve(chosen, rejected, at, p)
    rows = []
    for i, quantile in enumerate(QUANTILES):
        rows.append({"part": "threshold", "seed": seed, "quantile": quantile,
                     "threshold": at[i].item(), "accuracy": accuracy[i].item(),
                     "bayes": bayes[i].item(), "pairs": pairs[i].item()})
    return rows


def over_seeds(rows: list[dict], key: str, columns: list[str]) -> dict:
    """One row of means and standard errors over seeds; `key` is the same in all the rows."""
    result = {key: rows[0][key]}
    for name in columns:
        result[name], result[f"+- {name[:3]}"] = output.mean_se(output.column(rows, name))
    return result


def draw(plt, curves, by_threshold):
    plt.gcf().set_size_inches(8, 4)
    plt.subplot(1, 2, 1)
    plt.plot([0.5, 1], [0.5, 1], color="gray", lw=0.8)
    for i, (name, predicted, right) in enumerate(curves):  # two a seed
        label = name if i < 2 else None
        plt.plot(predicted, right, ".-", lw=0.8, color=("C0", "C1")[i % 2], label=label)
    plt.xlabel("the PM's confidence")
    plt.ylabel("how often it is right")
    plt.legend()
    plt.subplot(1, 2, 2)
    for name, color in (("bayes", "gray"), ("accuracy", "C0")):
        errors = output.column(by_threshold, f"+- {name[:3]}")
        plt.errorbar(QUANTILES, output.column(by_threshold, name), errors, fmt=".-", color=color,
                     label=name)
    plt.xlabel("both scores above this quantile")
    plt.legend()


def fall(rows: list[dict], name: str) -> tuple[float, float]:
    """By how much a column is lower above the high quantile than on all pairs: mean and error."""
    everywhere = output.column(output.select(rows, part="threshold", quantile=0.0), name)
    high = output.column(output.select(rows, part="threshold", quantile=HIGH), name)
    return output.mean_se(a - b for a, b in zip(everywhere, high))


def verdict(helpful: dict, mixed: dict, accuracy_fall: tuple, bayes_fall: float) -> tuple[str, str]:
    """helpful, mixed: rows with "ECE", "+- ECE" and "bias". accuracy_fall: mean, standard error."""
    lost, se = accuracy_fall
    outcome, words = "DOES NOT HOLD", " in full"
    if helpful["ECE"] <= WELL and lost > 2 * se:
        outcome, words = "HOLDS", (": a helpful-only PM's scores are honest probabilities, and it "
                                   "is less often right among high scores")
    return outcome, (
        f"{outcome}{words}: the helpful-only PM's ECE is {helpful['ECE']:.3f} +- "
        f"{helpful['+- ECE']:.3f} (threshold {WELL}), its confidence {helpful['bias']:+.3f} from "
        f"its accuracy; the mixed PM's are {mixed['ECE']:.3f} and {mixed['bias']:+.3f} (HH: a "
        f"little below). Where both scores exceed the {HIGH:.0%} quantile, accuracy is {lost:.3f} "
        f"+- {se:.3f} below that on all pairs (threshold 2 errors), the ceiling {bayes_fall:.3f}.")


def experiment(args):
    n, n_test, n_seeds, surplus = 10_000, 4000, 3, 1.1
    if args.full:
        n_test, n_seeds = 8000, 5
    if args.tiny:
        n, n_test, n_seeds, surplus = 30, 60, 1, 2  # a tiny LM leaves many replies unfinished
    base, rows, curves = lab.base("toy", args.seed, args.tiny), [], []
    for seed in range(args.seed, args.seed + n_seeds):
        run = lab.replica(base, seed)
        train, test = draw_comparisons(run, n, n_test, surplus)
        for name, pairs in train.items():
            pm = lab.center(run, lab.train_pm_on(run, pairs, cfg=CALM), test["helpful"])
            chosen, rejected = lab.scores(run, pm, test[name])
            p = torch.tensor([comparison.p_chosen for comparison in test[name]])
            row, curve = calibrate(chosen, rejected, p)
            rows.append({"part": "calibration", "PM": name, "seed": seed} | row)
            curves.append((name, *curve))
            if name == "helpful":
                rows += above_thresholds(chosen, rejected, p, seed)

    print(f"Each PM on held-out comparisons of its own mixture, n = {n_seeds} seeds; log loss and "
          "entropy in nats a pair")
    by_pm, by_threshold = [], []
    columns = ["accuracy", "bayes", "ECE", "bias", "log_loss", "entropy", "excess"]
    for name in ("helpful", "mixed"):
        by_pm.append(over_seeds(output.select(rows, PM=name), "PM", columns))
    output.table(by_pm)
    print("Helpful-only PM: pairs whose scores are both above a quantile of all scores")
    for quantile in QUANTILES:
        mine = output.select(rows, part="threshold", quantile=quantile)
        columns = ["threshold", "accuracy", "bayes", "pairs"]
        by_threshold.append(over_seeds(mine, "quantile", columns))
    output.table(by_threshold)
    _, sentence = verdict(*by_pm, fall(rows, "accuracy"), fall(rows, "bayes")[0])
    output.finish("calibration", args, rows, lambda plt: draw(plt, curves, by_threshold), sentence)


if __name__ == "__main__":
    output.main(experiment, __doc__)
