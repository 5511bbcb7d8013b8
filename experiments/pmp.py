"""Preference-model pretraining (GL §4; HH App. A.2): how much better is a PM that has seen cheap comparisons first?

    python experiments/pmp.py                # 3 seeds; minutes on two CPU cores
    python experiments/pmp.py --full         # 6 seeds, up to 16,000 comparisons

The cheap ones are 4,000 pairs of answers to a forum post, by their upvotes (toy.upvoted), a biased and noisy sign of
what is helpful. A PM is pretrained on them as they are ("ranked": A above B) or as questions with a fixed answer
("binarised": "GOOD" above "BAD" before A, "BAD" above "GOOD" before B). Then it is trained on few or many of the
crowdworkers' comparisons of helpful replies, and its accuracy on held-out ones is compared with that of a PM that
starts from the LM. GL find 5 to 10 points at 52B with 500 comparisons, and more from the binarised kind: it has less to
unlearn.
"""
import torch

import lab
import toy
import train_pm


def accuracy(run, pm, pairs) -> float:
    """How often a fresh label would agree with the PM: accuracy without the luck of the labels that were drawn."""
    chosen, rejected = lab.scores(run, pm, pairs)
    p = torch.tensor([c.p_chosen for c in pairs])
    return torch.where(chosen > rejected, p, torch.where(chosen < rejected, 1 - p, 0.5)).mean().item()


def one_seed(run, sizes, n_forum, n_draw, n_test) -> dict:
    """-> {(start, comparisons): accuracy}; the same comparisons, in the same order, for every start."""
    rng = run.rng("forum", "train")
    forum = [toy.upvoted(rng) for _ in range(n_forum)]
    cfg = train_pm.PMPConfig()
    starts = dict(none=train_pm.from_lm(run), ranked=lab.train_pm_on(run, forum, cfg=cfg),
                  binarised=lab.train_pm_on(run, train_pm.binarise(forum), cfg=cfg))
    pairs, test = lab.comparisons(run, n_draw), lab.comparisons(run, n_test, name="test")
    found = {(name, 0): accuracy(run, pm, test) for name, pm in starts.items()}
    for n in sizes:
        for name, start in starts.items():
            found[name, n] = accuracy(run, lab.train_pm_on(run, pairs[:n], start=start), test)
    return found


def experiment(args):
    sizes, n_forum, n_test, seeds = [250, 500, 1000, 2000, 4000], 4000, 2000, range(args.seed, args.seed + 3)
    if args.full:
        sizes, seeds = sizes + [8000, 16000], range(args.seed, args.seed + 6)
    n_draw = max(sizes) * 5 // 4  # some are dropped: identical or unfinished
    if args.tiny:
        sizes, n_forum, n_draw, n_test, seeds = [8], 16, 100, 100, range(args.seed, args.seed + 2)
    base = lab.base("toy", 0, 300 if args.tiny else 0)
    found = [one_seed(lab.replica(base, seed), sizes, n_forum, n_draw, n_test) for seed in seeds]
    rows = []
    for n in [0, *sizes]:
        row = dict(comparisons=n)
        for name in ("none", "ranked", "binarised"):
            row[name], row[f"{name}_error"] = lab.mean_se(f[name, n] for f in found)
        # Differences of one seed share their comparisons and their test, so they scatter less than the accuracies.
        for a, b, title in (("ranked", "none", "gain"), ("binarised", "none", "gain_binarised")):
            row[title], row[f"{title}_error"] = lab.mean_se(f[a, n] - f[b, n] for f in found)
        rows.append(row)
    lab.table(rows)

    def draw(plt):
        for name in ("none", "ranked", "binarised"):
            plt.errorbar(sizes, [r[name] for r in rows[1:]], [r[f"{name}_error"] for r in rows[1:]], capsize=3,
                         label=f"PMP: {name}")
        plt.xscale("log")
        plt.xticks(sizes, sizes)
        plt.minorticks_off()
        plt.xlabel("comparisons of crowdworkers")
        plt.ylabel("accuracy on held-out comparisons")
        plt.legend()

    few, many = rows[1], rows[-1]
    ranked, binarised = (few[gain] > 2 * few[f"{gain}_error"] for gain in ("gain", "gain_binarised"))

    def gain(row, title): return f"{row[title]:+.3f} +- {row[title + '_error']:.3f}"
    lab.finish("pmp", args, rows, draw, (
        ("HOLDS" if ranked and binarised else "HOLDS IN PART" if ranked or binarised else "DOES NOT HOLD")
        + f": PMP helps where comparisons are few. With {few['comparisons']} the ranked kind changes accuracy by "
        f"{gain(few, 'gain')} over no PMP, the binarised kind by {gain(few, 'gain_binarised')} (threshold: 2 errors above 0; "
        f"n = {len(found)} seeds; GL: binarised is better); with {many['comparisons']} by {gain(many, 'gain')} and "
        f"{gain(many, 'gain_binarised')}."))


if __name__ == "__main__":
    lab.main(experiment, __doc__)
