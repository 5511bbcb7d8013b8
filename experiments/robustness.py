"""§4.2, Figs 4 and 33: RLHF finds the flaws of its PM. A test PM, of other comparisons, sees through some of them; the
ground truth, which the paper did not have, sees all, and turns down.

    python experiments/robustness.py           # PMs of two sizes x two amounts of data; minutes on two CPU cores
    python experiments/robustness.py --full    # three sizes x three amounts, 3 seeds, longer

Comparisons are split in halves, as in the paper: a train PM learns from one, a test PM from the other (here of the same
size; HH score each policy by test PMs of all seven).
The policy (toy size) is trained by PPO against the train PM, without a KL penalty and with two passes over the same
responses (HH: 0.001 and 2). The paper's PMs grow with the policy or are all of the largest size; here the policy stays
the same (OO's design), so that only the PM's robustness differs.

Measured on held-out prompts, against sqrt(KL): how much each PM and the true utility have gained since the start. The
point where the truth peaks is found on one set of prompts and the fall from it measured on another: the highest of many
noisy points is high partly by luck, and that luck would count as a fall. Fit: OO's truth = d (alpha - beta log d).
"""
import dataclasses

import lab
import torch

from pm import fit_gao
from train_rl import Prompts, RLConfig


def experiment(args):
    sizes, amounts, seeds = (["small", "toy"], [500, 4000], 1)
    if args.full:
        sizes, amounts, seeds = ["small", "medium", "toy"], [500, 2000, 8000], 3
    cfg = RLConfig(kl_coef=0.0, passes=2, iterations=50, batch=128, eval_every=5, eval_prompts=400)
    if args.tiny:
        sizes, amounts, cfg = ["toy"], [60], dataclasses.replace(
            cfg, iterations=4, batch=32, minibatch=16, eval_every=2, eval_prompts=32)
    runs = {size: lab.base(size, args.seed, 300 if args.tiny else 0) for size in dict.fromkeys(sizes + ["toy"])}
    initial, largest = lab.load(runs["toy"]), max(amounts)
    assert len({run.tok.fingerprint for run in runs.values()}) == 1, "PM and policy need common ids"

    rows, ends = [], []
    for seed in range(args.seed, args.seed + seeds):
        run = lab.replica(runs["toy"], seed)
        prompts = Prompts(run, cfg).draw(32 if args.tiny else 900, True, "judge", share=1 / 3)
        found = {kind: lab.comparisons(run, int(2 * largest * share), kind)  # for both halves
                 for kind, share in (("helpful", 2 / 3), ("harmless", 1 / 3))}
        centre = [c for kind in found for c in lab.comparisons(run, 20 if args.tiny else 500, kind, "test")]
        for size, amount in [(s, a) for s in sizes for a in amounts]:
            used = [c for pairs in found.values() for c in pairs[:len(pairs) * amount // largest]]
            # Each with a head of its own, or the two would share the flaws that a random head brings.
            pms = [lab.train_pm_on(lab.replica(runs[size], seed + 1000 * half), used[half::2]) for half in (0, 1)]
            pms, judged = [lab.centre(run, pm, centre) for pm in pms], []
            _, path = lab.ppo(run, pms[0], cfg, initial, watch=lambda learner, _:
                              judged.append(lab.judge(run, learner.policy, pms, prompts)[..., 0]))
            gains = torch.stack(judged) - judged[0]  # (points, 3, prompts): train PM, test PM, truth
            mean, d = gains.mean(2).tolist(), [p["sqrt_kl"] for p in path]
            rows += [dict(size=size, comparisons=amount, seed=seed, iteration=p["iteration"], sqrt_kl=x, train_pm=train,
                          test_pm=test, truth=truth) for p, x, (train, test, truth) in zip(path, d, mean)]
            # Paired errors, over prompts: two judges of one reply, or two replies to one prompt.
            peak = max(range(len(path)), key=lambda i: path[i]["truth"])  # on the prompts that lab.ppo drew
            gap, fall = gains[-1, 0] - gains[-1, 1], gains[peak, 2] - gains[-1, 2]
            (gap, gap_se), (fall, fall_se) = ((x.mean().item(), x.std().item() / len(x) ** 0.5) for x in (gap, fall))
            alpha, beta, r2 = fit_gao(d[1:], [m[2] for m in mean[1:]], "rl")
            ends.append(dict(size=size, comparisons=amount, seed=seed, last_sqrt_kl=d[-1], train_pm=mean[-1][0],
                             test_pm=mean[-1][1], gap=gap, gap_se=gap_se, peak_at=d[peak], truth_peak=mean[peak][2],
                             truth_end=mean[-1][2], fall=fall, fall_se=fall_se, alpha=alpha, beta=beta, R2=r2))
    print("gains from the first to the last iteration; where the truth peaks, how far it falls; OO's fit of the truth")
    lab.table(ends)

    def draw(plt):
        for k, end in enumerate(ends[:len(sizes) * len(amounts)]):  # the first seed
            plt.subplot(len(sizes), len(amounts), k + 1)
            mine = [r for r in rows if all(r[key] == end[key] for key in ("size", "comparisons", "seed"))]
            for name, style in (("train_pm", "C0"), ("test_pm", "C1"), ("truth", "k")):
                plt.plot([r["sqrt_kl"] for r in mine], [r[name] for r in mine], style, label=name.replace("_", " "))
            plt.title(f"{end['size']} PM, {end['comparisons']} comparisons", fontsize=8)
        plt.legend(fontsize=7), plt.xlabel("sqrt(KL)")

    apart, turned = (sum(e[x] > 2 * e[f"{x}_se"] for e in ends) for x in ("gap", "fall"))
    lab.finish("robustness", args, rows, draw, (
        "HOLDS: train and test PM part ways, and the truth turns down: " if apart == turned == len(ends) else
        "DOES NOT HOLD in every setting: ")
        + f"the train PM gains more than the test PM by over 2 standard errors in {apart} of {len(ends)} runs, and the "
        f"true utility falls from its peak by over 2 standard errors in {turned} of {len(ends)}.")


if __name__ == "__main__":
    lab.main(experiment, __doc__)
