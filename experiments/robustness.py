"""§4.2, Figs 4 and 33: RLHF finds the flaws of its PM, and a test PM sees some of them.

    python experiments/robustness.py           # PMs of two sizes x two amounts of data; minutes
    python experiments/robustness.py --full    # three sizes x three amounts, 3 seeds

The paper's claims: the scores of the PM that RLHF trains against ("train PM") and of one from other
comparisons ("test PM") agree early and part later; larger PMs are more robust. Measured here is the
first claim, and with it the true utility, which the paper did not have. The second has no verdict.

Comparisons are split in halves, as in the paper: a train PM learns from one, a test PM of the same
size from the other (HH score each policy by test PMs of all seven sizes). The policy (toy size) is
trained by PPO against the train PM, without a KL penalty and with two passes over the same
responses (HH: 0.001 and 2). The paper's PMs grow with the policy or are all of the largest size;
here the policy stays the same (OO's design), so only the PM's robustness differs.

Measured on held-out prompts, against sqrt(KL): the gain in each PM's score and in true utility. The
point where the truth peaks is found on one set of prompts, and the fall from it is measured on
another: the highest of many noisy points is high partly by luck, and that would count as a fall.
OO's curve, truth = d (alpha - beta log d), is fitted. The verdict's thresholds: in each run, the
train PM gains more than the test PM, and the truth falls from its peak, both by more than 2
standard errors over prompts.
"""
import dataclasses

import lab
import output
import torch

from measures import fit_gao
from train_rl import RLConfig


def draw_comparisons(run, n: int, n_test: int) -> tuple[dict, list]:
    """{kind: comparisons}, two thirds of n helpful; and held-out ones of both kinds."""
    found = {"helpful": lab.comparisons(run, int(n * (2 / 3)), "helpful"),
             "harmless": lab.comparisons(run, int(n * (1 / 3)), "harmless")}
    test = lab.comparisons(run, n_test, "helpful", "test")
    return found, test + lab.comparisons(run, n_test, "harmless", "test")


def train_and_test_pm(run, found: dict, amount: int, largest: int, test: list) -> list:
    """Two PMs, each from one half of the comparisons, of which amount / largest are used."""
    used, pms = [], []
    for pairs in found.values():
        used += pairs[:len(pairs) * amount // largest]
    for half in (0, 1):
        # Each has its own head, or the two would share the flaws that a random head brings.
        own = lab.replica(run, run.seed + 1000 * half)
        pms.append(lab.center(run, lab.train_pm_on(own, used[half::2]), test))
    return pms


def optimize(run, pms: list, cfg: RLConfig, initial, prompts) -> tuple[list[dict], torch.Tensor]:
    """PPO against the first PM -> its numbers, and gains (points, 3, prompts) since the start by
    train PM, test PM and truth."""
    judged = []

    def watch(learner):
        judged.append(lab.judge(run, learner.policy, pms, prompts)[..., 0])  # (3, prompts)
    _, path = lab.ppo(run, pms[0], cfg, initial, watch)
    return path, torch.stack(judged) - judged[0]


def mean_and_se(values) -> tuple[float, float]:
    """The mean of paired differences over prompts, and its standard error."""
    return values.mean().item(), values.std().item() / len(values) ** 0.5


def describe_points(path: list[dict], gains) -> list[dict]:
    rows = []
    for numbers, (train, test, truth) in zip(path, gains.mean(2).tolist()):
        rows.append({"iteration": numbers["iteration"], "sqrt_kl": numbers["sqrt_kl"],
                     "train_pm": train, "test_pm": test, "truth": truth})
    return rows


def describe_end(path: list[dict], gains) -> dict:
    points = describe_points(path, gains)
    truths = output.column(path, "truth")  # on the prompts that lab.ppo drew
    peak, last = truths.index(max(truths)), points[-1]
    # Paired: two judges of the same replies, or two policies' replies to the same prompts.
    gap, gap_se = mean_and_se(gains[-1, 0] - gains[-1, 1])
    fall, fall_se = mean_and_se(gains[peak, 2] - gains[-1, 2])
    distance, truth = output.column(points, "sqrt_kl"), output.column(points, "truth")
    alpha, beta, r2 = fit_gao(distance[1:], truth[1:], "rl")
    return {"last_sqrt_kl": last["sqrt_kl"], "train_pm": last["train_pm"],
            "test_pm": last["test_pm"], "gap": gap, "gap_se": gap_se,
            "peak_at": distance[peak], "truth_peak": truth[peak], "truth_end": last["truth"],
            "fall": fall, "fall_se": fall_se, "alpha": alpha, "beta": beta, "R2": r2}


def draw(plt, rows, ends, shape):
    for k, end in enumerate(ends[:shape[0] * shape[1]]):  # the first seed
        plt.subplot(*shape, k + 1)
        mine = output.select(rows, size=end["size"], comparisons=end["comparisons"],
                             seed=end["seed"])
        for name, style in (("train_pm", "C0"), ("test_pm", "C1"), ("truth", "k")):
            plt.plot(output.column(mine, "sqrt_kl"), output.column(mine, name), style,
                     label=name.replace("_", " "))
        plt.title(f"{end['size']} PM, {end['comparisons']} comparisons", fontsize=8)
    plt.legend(fontsize=7)
    plt.xlabel("sqrt(KL)")


def verdict(ends: list[dict]) -> tuple[str, str]:
    """ends: a row for each run, see `describe_end`."""
    apart = sum(end["gap"] > 2 * end["gap_se"] for end in ends)
    turned = sum(end["fall"] > 2 * end["fall_se"] for end in ends)
    outcome, words = "DOES NOT HOLD", " in every setting"
    if apart == turned == len(ends):
        outcome, words = "HOLDS", ": train and test PM part ways, and the truth turns down"
    return outcome, (
        f"{outcome}{words}: the train PM gains more than the test PM by over 2 standard errors in "
        f"{apart} of {len(ends)} runs, and the true utility falls from its peak by over 2 standard "
        f"errors in {turned} of {len(ends)}.")


def experiment(args):
    sizes, amounts, n_seeds, n_test, n_prompts = ["small", "toy"], [500, 4000], 1, 500, 900
    if args.full:
        sizes, amounts, n_seeds = ["small", "medium", "toy"], [500, 2000, 8000], 3
    cfg = RLConfig(kl_coef=0.0, passes=2, iterations=50, batch=128, eval_every=5, eval_prompts=400)
    if args.tiny:
        sizes, amounts, n_test, n_prompts = ["toy"], [60], 20, 32
        cfg = dataclasses.replace(cfg, iterations=4, batch=32, minibatch=16, lr=5e-3, eval_every=2,
                                  eval_prompts=32)
    runs, rows, ends = lab.bases(sizes, args.seed, args.tiny), [], []
    initial, largest = lab.load(runs["toy"]), max(amounts)
    for seed in range(args.seed, args.seed + n_seeds):
        run = lab.replica(runs["toy"], seed)
        prompts = lab.held_out_prompts(run, n_prompts, "judge")
        found, test = draw_comparisons(run, 2 * largest, n_test)  # for both halves
        for size in sizes:
            for amount in amounts:
                pm_run = lab.replica(runs[size], seed)
                pms = train_and_test_pm(pm_run, found, amount, largest, test)
                path, gains = optimize(run, pms, cfg, initial, prompts)
                setting = {"size": size, "comparisons": amount, "seed": seed}
                ends.append(setting | describe_end(path, gains))
                for point in describe_points(path, gains):
                    rows.append(setting | point)
    print("gains from the first to the last iteration; where the truth peaks, how far it falls; "
          "OO's fit of the truth")
    output.table(ends)
    shape = (len(sizes), len(amounts))
    _, sentence = verdict(ends)
    output.finish("robustness", args, rows, lambda plt: draw(plt, rows, ends, shape), sentence)


if __name__ == "__main__":
    output.main(experiment, __doc__)
