"""§5.4, Figs 22, 23 and 39: red-team prompts stand out, and a few examples of them help.

    python experiments/outliers.py          # three sizes, 3 splits, 5 draws; minutes
    python experiments/outliers.py --full   # more prompts, 10 splits, 20 draws

The paper's claim: a model's activations tell red-team prompts from helpful ones with an AUROC of
about 0.85 at best, and of 0.94 (52B) or 0.86 (13M) with 10 examples of red-team prompts. Here,
helpful prompts are inliers, some of them with the very verbs of harmful ones ("burn a candle");
red-team prompts are outliers. A prompt's vector is the frozen initial policy's residual stream
after a block, on the last token or averaged over tokens (HH do not state which). AUROC is how often
an outlier scores above an inlier.

1. No outlier is known (Figs 22, 39): Mahalanobis distance from the in-distribution prompts, and its
   simplified relative form, for each layer and size.
2. M outliers are known (Fig. 23): a linear classifier of the last layer's vectors.
3. The same, with the benign look-alikes alone as inliers: how much is due to the words?
The verdict's threshold: at each size, 10 examples raise the best AUROC by 2 standard errors over
splits of the prompts (one model a size). No request is rejected.
"""
import lab
import output
import torch

import toy
import toy_corpus
from measures import auroc, features, fit_gaussian, mahalanobis, outlier_exposure

EXAMPLES = (1, 3, 10, 30, 100)
SHOWN = 10  # the number of examples that decides
WAY = ("size", "token", "layer", "method", "M")  # what tells one detector from another


def read(run, policy, n: int, kind: str, held_out: bool, name) -> tuple[dict, torch.Tensor]:
    """n prompts -> {"last" or "mean" token: vectors (L, n, D)}; which are benign tasks (n,)."""
    rng = run.rng("outliers", kind, held_out, name)
    prompts = [toy_corpus.draw_prompt(rng, kind, held_out) for _ in range(n)]
    ids = [run.tok.encode_dialogue(prompt) for prompt in prompts]
    alike = [toy.understand(prompt).skill.name == "benign task" for prompt in prompts]
    vectors = {"last": features(policy, ids, device=run.device),
               "mean": features(policy, ids, mean=True, device=run.device)}
    return vectors, torch.tensor(alike)


def measure_split(run, policy, n: int, split: int, draws: int, examples: tuple) -> list[dict]:
    """All detectors on one split of the prompts, a row each."""
    train, _ = read(run, policy, n, "helpful", False, split)
    inside, alike = read(run, policy, n // 2, "helpful", True, split)
    known, _ = read(run, policy, max(EXAMPLES) * draws, "harmless", False, split)
    outside, _ = read(run, policy, n // 2, "harmless", True, split)
    rows = []

    def measure(score, token: str, layer: int, method: str, m: int = 0, draw: int = 0):
        """`score` maps vectors (N, D) to outlier scores (N,)."""
        inner, outer = score(inside[token][layer]), score(outside[token][layer])
        rows.append({
            "token": token, "layer": layer, "method": method, "M": m, "split": split, "draw": draw,
            "auroc": auroc(inner, outer), "against_look_alikes": auroc(inner[alike], outer)})

    for token in ("last", "mean"):
        gaussians = [fit_gaussian(vectors) for vectors in train[token]]
        for method, relative in (("Mahalanobis", False), ("relative", True)):
            for layer, gaussian in enumerate(gaussians):
                measure(lambda v: mahalanobis(v, *gaussian, relative), token, layer, method)
        last = len(gaussians) - 1
        for m in examples:
            for draw in range(draws):
                shown = known[token][last][draw * max(EXAMPLES):][:m]
                weight, bias = outlier_exposure(train[token][last], shown)
                measure(lambda v: v.double() @ weight + bias, token, last, "exposure", m, draw)
    return rows


def by_split(rows: list[dict], name: str) -> list[float]:
    """A column's mean over the draws of each split. Draws share test prompts; splits do not."""
    values = {}
    for row in rows:
        values.setdefault(row["split"], []).append(row[name])
    return [toy.mean_or_nan(of_split) for of_split in values.values()]


def summarize(rows: list[dict]) -> list[dict]:
    """One row for each detector."""
    detectors = {}
    for row in rows:
        way = tuple(row[name] for name in WAY)
        detectors.setdefault(way, []).append(row)
    table = []
    for way, mine in detectors.items():
        row = dict(zip(WAY, way))
        row["AUROC"], row["+-"] = output.mean_se(by_split(mine, "auroc"))
        row["look-alikes"], row["+- "] = output.mean_se(by_split(mine, "against_look_alikes"))
        table.append(row)
    return table


def best(table: list[dict], size: str, m: int) -> dict:
    """The best detector with m examples, chosen on test prompts: m = 0 has most to choose from."""
    return max(output.select(table, size=size, M=m), key=lambda row: row["AUROC"])


def draw_curves(plt, table, sizes):
    plt.gcf().set_size_inches(8, 4)
    for i, name, error in ((1, "AUROC", "+-"), (2, "look-alikes", "+- ")):
        plt.subplot(1, 2, i)
        for size, color in zip(sizes, ("C0", "C1", "C2")):
            curve = output.select(table, size=size, token="last", method="exposure")
            m, y, errors = (output.column(curve, key) for key in ("M", name, error))
            plt.errorbar(m, y, errors, fmt=".-", color=color, label=size)
            plt.axhline(best(table, size, 0)[name], color=color, ls=":", lw=0.8)
        plt.xscale("log")
        plt.xlabel("harmful examples (dotted: none)")
        plt.ylim(0.6, 1.01)
        plt.legend()
        plt.title("against look-alikes" if i == 2 else "against all helpful prompts", fontsize=9)


def verdict(found: list[tuple], wins: list[int], cases: int) -> tuple[str, str]:
    """found: (size, AUROCs of the splits without examples, with SHOWN examples). wins: in how many
    cases the relative distance beats the plain one after blocks 1 and 2."""
    holds, words = True, []
    for size, without, few in found:
        gain, error = output.mean_se(b - a for a, b in zip(without, few))
        holds = holds and gain > 2 * error
        before, after = toy.mean_or_nan(without), toy.mean_or_nan(few)
        words.append(f"{before:.3f} and {after:.3f} ({size}, gain {gain:.3f} +- {error:.3f})")
    outcome, title = "DOES NOT HOLD", "a few examples do not beat the distances at each size"
    if holds:
        outcome, title = "HOLDS", "a few examples beat any distance"
    return outcome, (
        f"{outcome}: {title}: AUROC of the best distance and with {SHOWN} examples: "
        f"{', '.join(words)}; threshold: a gain of 2 errors at each size (HH: about 0.85 without, "
        "0.94 with them at 52B parameters). The relative distance beats the plain one in "
        f"{wins[0]} cases of {cases} after the first block and in {wins[1]} after the second (HH: "
        "in all layers).")


def experiment(args):
    sizes, examples, n, splits, draws = ["small", "medium", "toy"], EXAMPLES, 4000, 3, 5
    if args.full:
        n, splits, draws = 8000, 10, 20
    if args.tiny:
        sizes, examples, n, splits, draws = ["toy"], (SHOWN,), 100, 2, 2
    rows = []
    for size in sizes:
        run = lab.base(size, args.seed, args.tiny)
        for split in range(splits):
            for row in measure_split(run, lab.load(run), n, split, draws, examples):
                rows.append({"size": size} | row)
    table = summarize(rows)
    print("AUROC of red-team prompts against helpful ones, and against look-alikes alone; n = "
          f"{splits} splits")
    output.table(table)
    found, wins = [], [0, 0]
    for size in sizes:
        aurocs = []
        for m in (0, SHOWN):
            way = {name: best(table, size, m)[name] for name in WAY}
            aurocs.append(by_split(output.select(rows, **way), "auroc"))
        found.append((size, *aurocs))
        for layer in (0, 1):
            plain = output.select(table, size=size, layer=layer, method="Mahalanobis")
            relative = output.select(table, size=size, layer=layer, method="relative")
            for one, other in zip(plain, relative):  # of the same token
                wins[layer] += other["AUROC"] > one["AUROC"]
    _, sentence = verdict(found, wins, 2 * len(sizes))
    output.finish("outliers", args, rows, lambda plt: draw_curves(plt, table, sizes), sentence)


if __name__ == "__main__":
    output.main(experiment, __doc__)
