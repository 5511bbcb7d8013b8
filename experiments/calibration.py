"""§3.3, Figs 9 and 25: a PM's probabilities mean what they say; it is less often right where both replies score high.

    python experiments/calibration.py              # helpful-only and mixed PMs x 3 seeds; minutes on two CPU cores
    python experiments/calibration.py --full       # 5 seeds, more test comparisons

Two PMs learn from the same number of comparisons: one from helpful ones only, one from two thirds helpful and one third
harmless ones; each is tested on held-out comparisons of what it learned from. Seeds differ in the comparisons and in
the PM's training, not in the LM it starts from.

1. Calibration (Fig. 9). P(A is better) = sigmoid(r_A - r_B) (Eq. 4.2). Of the pairs where a PM is 80% sure, is it right
   in 80%? ECE is the mean distance between the two over ten bins of confidence; `bias` is confidence less accuracy,
   above 0 for a PM that is too sure. The toy knows the probability of each choice (Comparison.p_chosen), so "right" is
   an average over fresh labels, and the noise of the one label drawn is not taken for miscalibration.
2. Log loss against those probabilities. What it has above their entropy is what the PM gets wrong, in nats.
3. Thresholds (Fig. 25): accuracy on helpful pairs that both score above one. The Bayes ceiling on the same pairs, which
   the paper could not know, says how much of the fall is that good replies are alike.
"""
import lab
import torch

from pm import calibration_curve, expected_calibration_error, log_loss, threshold_curve
from train_pm import PMConfig

WELL = 0.03       # the ECE up to which a PM counts as very well calibrated
QUANTILES = (0.0, 0.2, 0.4, 0.6, 0.7, 0.8, 0.9)  # of the test replies' scores: the thresholds
HIGH = 0.7        # the one that the finding is decided at
# The rate is constant, so the last steps leave noise in the scores, and noise looks like confidence. With the main job's
# batch of 16 the ECE was 0.031 +- 0.001 (3 seeds).
CALM = PMConfig(batch=32)


def experiment(args):
    n, n_test, seeds = (30, 300, 1) if args.tiny else (10_000, 8000, 5) if args.full else (10_000, 4000, 3)
    take = 12 if args.tiny else 1.1  # some pairs are dropped; most of those of the tests' unfinished LM
    base = lab.base("toy", args.seed, 300 if args.tiny else 0)
    rows, curves = [], []
    for seed in range(args.seed, args.seed + seeds):
        run = lab.replica(base, seed)
        helpful, harmless = (lab.comparisons(run, int(take * m), k) for k, m in (("helpful", n), ("harmless", n / 3)))
        test = {"helpful": lab.comparisons(run, n_test, "helpful", "test")}
        test["mixed"] = test["helpful"][:n_test * 2 // 3] + lab.comparisons(run, n_test // 3, "harmless", "test")
        train = {"helpful": helpful[:n], "mixed": helpful[:n * 2 // 3] + harmless[:n // 3]}
        for name, pairs in train.items():
            pm = lab.centre(run, lab.train_pm_on(run, pairs, cfg=CALM), test["helpful"])
            chosen, rejected = lab.scores(run, pm, test[name])
            p = torch.tensor([c.p_chosen for c in test[name]])
            predicted, right, size = calibration_curve(chosen - rejected, p_chosen=p)
            loss, floor = log_loss(chosen - rejected, p)
            mean = [(x * size).sum().item() / size.sum().item() for x in (predicted, right)]
            rows.append(dict(part="calibration", PM=name, seed=seed, accuracy=mean[1], bias=mean[0] - mean[1],
                             bayes=torch.maximum(p, 1 - p).mean().item(), log_loss=loss, entropy=floor,
                             ECE=expected_calibration_error(chosen - rejected, p_chosen=p), excess=loss - floor))
            curves.append((name, predicted, right))
            if name == "helpful":
                at = torch.cat((chosen, rejected)).quantile(torch.tensor(QUANTILES))
                found = zip(at.tolist(), *(x.tolist() for x in threshold_curve(chosen, rejected, at, p)))
                rows += [dict(part="threshold", seed=seed, quantile=q, threshold=t, accuracy=a, bayes=b, pairs=k)
                         for q, (t, a, b, k) in zip(QUANTILES, found)]

    def over_seeds(key, *columns, **where):
        """One row of means and standard errors over seeds."""
        mine = [r for r in rows if all(r.get(k) == v for k, v in where.items())]
        numbers = {c: lab.mean_se(r[c] for r in mine) for c in columns}
        return {key: where[key]} | {k: x for c, (m, se) in numbers.items() for k, x in ((c, m), (f"+- {c[:3]}", se))}

    print(f"Each PM on held-out comparisons of its own mixture, n = {seeds} seeds; log loss and entropy in nats a pair")
    by_pm = [over_seeds("PM", "accuracy", "bayes", "ECE", "bias", "log_loss", "entropy", "excess",
                        part="calibration", PM=name) for name in ("helpful", "mixed")]
    lab.table(by_pm)
    print("Helpful-only PM: pairs whose scores are both above a quantile of all scores")
    by_threshold = [over_seeds("quantile", "threshold", "accuracy", "bayes", "pairs", part="threshold", quantile=q)
                    for q in QUANTILES]
    lab.table(by_threshold)

    def draw(plt):
        plt.gcf().set_size_inches(8, 4)
        plt.subplot(1, 2, 1), plt.plot([0.5, 1], [0.5, 1], color="gray", lw=0.8)
        for i, (name, predicted, right) in enumerate(curves):  # two a seed
            plt.plot(predicted, right, ".-", lw=0.8, color=("C0", "C1")[i % 2], label=name if i < 2 else None)
        plt.xlabel("the PM's confidence"), plt.ylabel("how often it is right"), plt.legend()
        plt.subplot(1, 2, 2)
        for column, color in (("bayes", "gray"), ("accuracy", "C0")):
            plt.errorbar(QUANTILES, [t[column] for t in by_threshold], [t[f"+- {column[:3]}"] for t in by_threshold],
                         fmt=".-", color=color, label=column)
        plt.xlabel("both scores above this quantile"), plt.legend()

    def fall(column):  # from all pairs to those that both score above a high quantile, over seeds
        at = {(r["seed"], r["quantile"]): r[column] for r in rows if r["part"] == "threshold"}
        return lab.mean_se(at[seed, 0.0] - at[seed, HIGH] for seed in range(args.seed, args.seed + seeds))

    (helpful, mixed), (lost, se), (ceiling, _) = by_pm, fall("accuracy"), fall("bayes")
    numbers = (f"the helpful-only PM's ECE is {helpful['ECE']:.3f} +- {helpful['+- ECE']:.3f} (threshold {WELL}), its "
               f"confidence {helpful['bias']:+.3f} from its accuracy; the mixed PM's are {mixed['ECE']:.3f} and "
               f"{mixed['bias']:+.3f} (HH: a little below). Where both scores exceed the {HIGH:.0%} quantile, accuracy "
               f"is {lost:.3f} +- {se:.3f} below that on all pairs (threshold 2 errors), the ceiling {ceiling:.3f}")
    holds = helpful["ECE"] <= WELL and lost > 2 * se
    lab.finish("calibration", args, rows, draw, (
        "HOLDS: a helpful-only PM's scores are honest probabilities, and it is less often right among high scores: "
        if holds else "DOES NOT HOLD in full: ") + numbers + ".")


if __name__ == "__main__":
    lab.main(experiment, __doc__)
