"""Preference-model pretraining (PMP; GL §4, HH App. A.2): how much do cheap comparisons help a PM?

    python experiments/pmp.py                # 1 seed; minutes on two CPU cores
    python experiments/pmp.py --full         # 6 seeds

GL's claim, from secondary sources: with 500 human comparisons, PMP improves accuracy by 5 to 10
points at 52B, and more with binarized comparisons. The cheap comparisons here are 4,000 pairs of
answers to a forum post, by their upvotes (toy_corpus.upvoted), a biased and noisy sign of what is
helpful. A PM is pretrained on them as they are ("ranked": A above B) or as questions with a fixed
answer ("binarized": "GOOD" above "BAD" before A, "BAD" above "GOOD" before B). Then it is trained
on few or many of the crowdworkers' comparisons of helpful replies, and its accuracy on held-out
ones is compared with that of a PM that starts from the LM.

1. The finding: where comparisons are few (the mean over 100, 250 and 500), ranked PMP improves
   accuracy. In the control, a coin decides which of the two answers has more votes.
2. A finding of its own, with the same control: so does binarized PMP.
Gains are taken within a seed: the accuracies of one seed share their comparisons and their test.
"""
import lab
import output
import torch
from decide import Claim, sentence

import toy
import toy_corpus
import train_pm
from measures import agreement
from picture import curve

NONE, RANKED, BINARIZED = "none", "ranked", "binarized"
BY_COIN, BINARIZED_BY_COIN = "ranked by coin (control)", "binarized by coin (control)"
STARTS = (NONE, RANKED, BINARIZED, BY_COIN, BINARIZED_BY_COIN)
FEW = 500  # comparisons, at most


def accuracy(run, pm, pairs) -> float:
    """How often a new label would agree with the PM: accuracy without the luck of the labels that
    were drawn."""
    chosen, rejected = lab.scores(run, pm, pairs)
    p = torch.tensor([comparison.p_chosen for comparison in pairs])
    return agreement(chosen - rejected, p).mean().item()


def one_seed(run, sizes: list[int], n_forum: int, n_draw: int, n_test: int) -> list[dict]:
    """A row for each start and number of comparisons; the same comparisons, in the same order, for
    every start."""
    rng, cfg = run.rng("forum", "train"), train_pm.PMPConfig()
    forum = [toy_corpus.upvoted(rng) for _ in range(n_forum)]
    tossed = lab.by_coin(run.rng("forum", "coin"), forum)
    pretraining = {RANKED: forum, BINARIZED: train_pm.binarize(forum), BY_COIN: tossed,
                   BINARIZED_BY_COIN: train_pm.binarize(tossed)}
    pairs, test = lab.comparisons(run, n_draw), lab.comparisons(run, n_test, name="test")
    rows = []
    for name in STARTS:
        start = train_pm.from_lm(run)
        if name in pretraining:
            start = lab.train_pm_on(run, pretraining[name], cfg=cfg)
        for n in (0, *sizes):
            pm = lab.train_pm_on(run, pairs[:n], start=start) if n else start
            rows.append({"seed": run.seed, "PMP": name, "comparisons": n,
                         "accuracy": accuracy(run, pm, test)})
    return rows


def accuracies(rows: list[dict], name: str, n: int) -> list[float]:
    """One number for each seed."""
    return output.column(output.select(rows, PMP=name, comparisons=n), "accuracy")


def gains(rows: list[dict], name: str, n: int) -> list[float]:
    """Accuracy with PMP less that without, for each seed."""
    return output.less(accuracies(rows, name, n), accuracies(rows, NONE, n))


def gains_where_few(rows: list[dict], name: str) -> list[float]:
    """The mean gain over the small numbers of comparisons, for each seed."""
    sizes = [n for n in dict.fromkeys(output.column(rows, "comparisons")) if 0 < n <= FEW]
    by_size = [gains(rows, name, n) for n in sizes]
    return [toy.mean_or_nan(of_seed) for of_seed in zip(*by_size)]


def draw(plt, rows):
    sizes = [n for n in dict.fromkeys(output.column(rows, "comparisons")) if n]
    for name in STARTS:
        curve(plt, sizes, [accuracies(rows, name, n) for n in sizes], f"PMP: {name}")
    plt.xscale("log")
    plt.xticks(sizes, sizes)
    plt.minorticks_off()
    plt.xlabel("comparisons of crowdworkers")
    plt.ylabel("accuracy on held-out comparisons")
    plt.legend()


def verdict(rows: list[dict]) -> tuple[str, str]:
    """The outcome for ranked PMP, and the sentences for both forms."""
    def found(form: str, control: str) -> tuple[str, str]:
        name = f"accuracy with {form} PMP less without"
        return sentence(f"{form} PMP helps where comparisons are few",
                        [Claim(name, gains_where_few(rows, form), above=0.0)],
                        [Claim(name, gains_where_few(rows, control), above=0.0)])

    outcome, ranked = found(RANKED, BY_COIN)
    _, binarized = found(BINARIZED, BINARIZED_BY_COIN)
    return outcome, f"{ranked} {binarized}"


def experiment(args):
    sizes, n_forum, n_test, n_seeds = [100, 250, 500, 1000, 4000], 4000, 2000, 1
    if args.full:
        n_test, n_seeds = 4000, 6
    n_draw = max(sizes) * 5 // 4  # some are dropped: identical or unfinished
    if args.tiny:
        sizes, n_forum, n_draw, n_test = [8], 16, 30, 60
    rows = output.each_seed("pmp", args, n_seeds, lambda seed: one_seed(
        lab.base("toy", seed, args.tiny), sizes, n_forum, n_draw, n_test))
    print(f"accuracy on held-out comparisons, means of {n_seeds} seeds")
    table = []
    for n in (0, *sizes):
        row = {"comparisons": n}
        for name in STARTS:
            row[name], _ = output.mean_se(accuracies(rows, name, n))
        row["gain of ranked"], row["+-"] = output.mean_se(gains(rows, RANKED, n))
        table.append(row)
    output.table(table)
    _, sentences = verdict(rows)
    output.finish("pmp", args, rows, lambda plt: draw(plt, rows), sentences)


if __name__ == "__main__":
    output.main(experiment, __doc__)
