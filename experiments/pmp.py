"""Preference-model pretraining (PMP; GL §4, HH App. A.2): how much do cheap comparisons help a PM?

    python experiments/pmp.py                # 3 seeds; minutes on two CPU cores
    python experiments/pmp.py --full         # 6 seeds, up to 16,000 comparisons

GL's claim: with 500 human comparisons, PMP improves accuracy by 5 to 10 points at 52B, and more
with binarized comparisons, which leave less to unlearn. The cheap comparisons here are 4,000 pairs
of answers to a forum post, by their upvotes (toy_corpus.upvoted), a biased and noisy sign of what
is helpful. A PM is pretrained on them as they are ("ranked": A above B) or as questions with a
fixed answer ("binarized": "GOOD" above "BAD" before A, "BAD" above "GOOD" before B). Then it is
trained on few or many of the crowdworkers' comparisons of helpful replies, and its accuracy on
held-out ones is compared with that of a PM that starts from the LM.

The verdict's threshold: with the fewest comparisons, PMP improves accuracy by more than 2 standard
errors over seeds, with both kinds (HOLDS) or with one (HOLDS IN PART). With three seeds this is
weaker than a test at 5%, which asks for 4.3 standard errors. All seeds share one LM.
"""
import lab
import output
import torch

import toy_corpus
import train_pm
from measures import agreement

STARTS = ("none", "ranked", "binarized")


def accuracy(run, pm, pairs) -> float:
    """How often a new label would agree with the PM: accuracy without the luck of the labels that
    were drawn."""
    chosen, rejected = lab.scores(run, pm, pairs)
    p = torch.tensor([comparison.p_chosen for comparison in pairs])
    return agreement(chosen - rejected, p).mean().item()


def one_seed(run, sizes: list[int], n_forum: int, n_draw: int, n_test: int) -> dict:
    """-> {(start, comparisons): accuracy}; the same comparisons, in the same order, for every
    start."""
    rng, cfg = run.rng("forum", "train"), train_pm.PMPConfig()
    forum = [toy_corpus.upvoted(rng) for _ in range(n_forum)]
    starts = {"none": train_pm.from_lm(run), "ranked": lab.train_pm_on(run, forum, cfg=cfg),
              "binarized": lab.train_pm_on(run, train_pm.binarize(forum), cfg=cfg)}
    pairs, test = lab.comparisons(run, n_draw), lab.comparisons(run, n_test, name="test")
    found = {}
    for name, start in starts.items():
        found[name, 0] = accuracy(run, start, test)
        for n in sizes:
            pm = lab.train_pm_on(run, pairs[:n], start=start)
            found[name, n] = accuracy(run, pm, test)
    return found


def summarize(found: list[dict], n: int) -> dict:
    """The row for n comparisons: mean accuracies over seeds, and the gains over no PMP.

    A seed's accuracies share their comparisons and their test, so a gain is taken within a seed; it
    scatters less than they do."""
    row = {"comparisons": n}
    for name in STARTS:
        row[name], row[f"{name}_error"] = output.mean_se(seed[name, n] for seed in found)
    for name, gain in (("ranked", "gain"), ("binarized", "gain_binarized")):
        gains = [seed[name, n] - seed["none", n] for seed in found]
        row[gain], row[f"{gain}_error"] = output.mean_se(gains)
    return row


def draw(plt, rows):
    sizes = output.column(rows, "comparisons")
    for name in STARTS:
        plt.errorbar(sizes, output.column(rows, name), output.column(rows, f"{name}_error"),
                     capsize=3, label=f"PMP: {name}")
    plt.xscale("log")
    plt.xticks(sizes, sizes)
    plt.minorticks_off()
    plt.xlabel("comparisons of crowdworkers")
    plt.ylabel("accuracy on held-out comparisons")
    plt.legend()


def verdict(few: dict, many: dict, n: int) -> tuple[str, str]:
    """few, many: the rows (see `summarize`) of the fewest and the most comparisons; n seeds."""
    def words(row, name):
        return f"{row[name]:+.3f} +- {row[f'{name}_error']:.3f}"

    helped = 0
    for name in ("gain", "gain_binarized"):
        helped += few[name] > 2 * few[f"{name}_error"]
    outcome = ("DOES NOT HOLD", "HOLDS IN PART", "HOLDS")[helped]
    return outcome, (
        f"{outcome}: PMP helps where comparisons are few. With {few['comparisons']} the ranked "
        f"kind changes accuracy by {words(few, 'gain')} over no PMP, the binarized kind by "
        f"{words(few, 'gain_binarized')} (threshold: 2 errors above 0; n = {n} seeds; GL: "
        f"binarized is better); with {many['comparisons']} by {words(many, 'gain')} and "
        f"{words(many, 'gain_binarized')}.")


def experiment(args):
    sizes, n_forum, n_test, n_seeds = [250, 500, 1000, 2000, 4000], 4000, 2000, 3
    if args.full:
        sizes, n_seeds = sizes + [8000, 16000], 6
    n_draw = max(sizes) * 5 // 4  # some are dropped: identical or unfinished
    if args.tiny:
        sizes, n_forum, n_draw, n_test, n_seeds = [8], 16, 30, 60, 2
    base, found = lab.base("toy", 0, args.tiny), []
    for seed in range(args.seed, args.seed + n_seeds):
        found.append(one_seed(lab.replica(base, seed), sizes, n_forum, n_draw, n_test))
    rows = [summarize(found, n) for n in [0, *sizes]]
    output.table(rows)
    _, sentence = verdict(rows[1], rows[-1], n_seeds)
    output.finish("pmp", args, rows, lambda plt: draw(plt, rows[1:]), sentence)


if __name__ == "__main__":
    output.main(experiment, __doc__)
