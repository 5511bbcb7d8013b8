"""§3.2, App. A.3, Figs 7, 31, 32: PM accuracy grows with the log of the comparisons and of the model's size.

    python experiments/pm_scaling.py              # three sizes, 250 to 8,000 comparisons, 1 seed; minutes
    python experiments/pm_scaling.py --full       # up to 16,000 comparisons, 3 seeds

PMs of each size learn from nested subsets of one set of comparisons: helpful ones only (Fig. 32), or two thirds
helpful and one third harmless ones (Figs 7, 31); one epoch at a constant rate, each PM anew from the LM. (HH read the same
off one training run.) Accuracy on held-out comparisons is fitted, for all sizes and amounts together, by Eq. A.1:

    accuracy = a + b log(P / P_max) + c log(D / D_max)      P parameters without the embeddings, D comparisons

Labels are noisy, so accuracy has a ceiling, that of a judge who knows the truth; the paper could not know its own. A
line has none: where PMs come near the ceiling, growth must bend, and R^2 falls.
"""
import math

import lab

from pm import fit_scaling, report
from toy import mean

KINDS = ("helpful", "harmless")
LOG_LINEAR = 0.9  # the R^2 of Eq. A.1 from which on growth counts as log-linear


def experiment(args):
    sizes = ["small", "toy"] if args.tiny else ["small", "medium", "toy"]
    n, n_test, seeds = (16, 300, 1) if args.tiny else (16_000, 5000, 3) if args.full else (8000, 3000, 1)
    amounts = [n // 2**k for k in range(5, -1, -1)] if not args.tiny else [8, 16]
    take = 14 if args.tiny else 1.1  # some pairs are dropped; most of those of the tests' unfinished LM
    runs = {size: lab.base(size, args.seed, 300 if args.tiny else 0) for size in sizes}
    rows = []
    for seed in range(args.seed, args.seed + seeds):
        world = lab.replica(runs[sizes[-1]], seed)  # replies are the largest policy's, whatever the PM's size
        helpful, harmless = (lab.comparisons(world, int(take * m), k) for k, m in (("helpful", n), ("harmless", n / 3)))
        test = {kind: lab.comparisons(world, n_test, kind, "test") for kind in KINDS}
        for size in sizes:
            run, shape = lab.replica(runs[size], seed), runs[size].model_config()
            for data in ("helpful", "mixed"):
                for amount in amounts:
                    third = amount // 3 if data == "mixed" else 0
                    pm = lab.train_pm_on(run, helpful[:amount - third] + harmless[:third])
                    for kind in KINDS if third else KINDS[:1]:
                        chosen, rejected = lab.scores(run, pm, test[kind])
                        r = report(chosen - rejected, test[kind])
                        rows.append(dict(trained_on=data, tested_on=kind, size=size, seed=seed, comparisons=amount,
                                         params=12 * shape.n_layer * shape.d_model**2, accuracy=r.accuracy, loss=r.loss,
                                         low=r.low, high=r.high, bayes=r.bayes))

    def some(data, kind, **where) -> list[dict]:
        """The rows of one curve: trained on, tested on."""
        where |= dict(trained_on=data, tested_on=kind)
        return [r for r in rows if all(r[k] == v for k, v in where.items())]

    curves, fits = [("helpful", "helpful"), ("mixed", "helpful"), ("mixed", "harmless")], {}
    largest = max(r["params"] for r in rows)
    for curve in curves:
        print(f"Trained on {curve[0]}, tested on {curve[1]}: accuracy by number of comparisons (n = {seeds} seeds)")
        lab.table([dict(size=size) | {f"D={d}": mean(r["accuracy"] for r in some(*curve, size=size, comparisons=d))
                                      for d in amounts} | dict(ceiling=mean(r["bayes"] for r in some(*curve)))
                   for size in sizes])
        columns = ([r[k] for r in some(*curve)] for k in ("params", "comparisons", "accuracy"))
        (a, b, c), r2 = fits[curve] = fit_scaling(*columns, at=(largest, n))
        print(f"    accuracy = {a:.3f} + {b:.4f} log(P / {largest:,}) + {c:.4f} log(D / {n:,}), R^2 = {r2:.3f}")

    def draw(plt):
        plt.gcf().set_size_inches(9, 3.5)
        for i, curve in enumerate(curves, 1):
            plt.subplot(1, 3, i)
            for size, color in zip(sizes, ("C0", "C1", "C2")):
                found = [some(*curve, size=size, comparisons=d) for d in amounts]
                errors = [mean(r["high"] - r["low"] for r in f) / 2 / len(f) ** 0.5 for f in found]  # 95%
                plt.errorbar(amounts, [mean(r["accuracy"] for r in f) for f in found], errors, fmt=".", color=color,
                             label=size)
                (a, b, c), _ = fits[curve]
                log_p = math.log(some(*curve, size=size)[0]["params"] / largest)
                plt.plot(amounts, [a + b * log_p + c * math.log(d / n) for d in amounts], color=color, lw=0.8)
            plt.axhline(some(*curve)[0]["bayes"], color="gray", ls=":"), plt.xscale("log"), plt.ylim(0.4, 0.85)
            plt.xticks(amounts, amounts, fontsize=7), plt.minorticks_off()
            plt.title(f"{curve[0]} PM on {curve[1]}", fontsize=8), plt.xlabel("comparisons"), plt.legend(fontsize=7)

    (a, b, c), r2 = fits["helpful", "helpful"]
    holds = r2 >= LOG_LINEAR and b > 0 and c > 0
    numbers = (f"for helpful-only PMs Eq. A.1 has b = {b:.3f} and c = {c:.3f} (HH: 0.007 and 0.015, if its "
               f"logs are natural) with R^2 = {r2:.3f} (threshold {LOG_LINEAR}, and b and c above 0); trained on both "
               f"kinds, R^2 is {fits[curves[1]][1]:.3f} on helpful and {fits[curves[2]][1]:.3f} on harmless comparisons")
    lab.finish("pm_scaling", args, rows, draw, ("HOLDS: accuracy grows with log D and log P: " if holds else
               "DOES NOT HOLD: accuracy is not log-linear here: ") + numbers + ".")


if __name__ == "__main__":
    lab.main(experiment, __doc__)
