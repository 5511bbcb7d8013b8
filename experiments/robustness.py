"""§4.2, Figs 4 and 33: RLHF finds the flaws of its PM, and a test PM sees some of them.

    python experiments/robustness.py           # 1 seed; minutes on two CPU cores
    python experiments/robustness.py --full    # 4 seeds

The paper's claims: the scores of the PM that RLHF trains against ("train PM") and of one from other
comparisons ("test PM") agree early and part later; larger PMs are more robust. Measured with both
is the true utility, which the paper did not have.

Comparisons are split in halves, as in the paper: a train PM learns from one, a test PM of the same
size from the other (HH score each policy by test PMs of all seven sizes). The policy (toy size) is
trained by PPO against the train PM, without a KL penalty and with two passes over the same
responses (HH: 0.001 and 2). The paper's PMs grow with the policy or are all of the largest size;
here the policy stays the same (OO's design). Its critic still has the PM's size, because it starts
from the PM.

Measured on held-out prompts, against sqrt(KL): the gain in each PM's score and in true utility. The
point where the truth peaks is found on one set of prompts, and the fall from it is measured on
another: the highest of many noisy points is high partly by luck, and that would count as a fall.
OO's curve, truth = d (alpha - beta log d), is fitted.

1. The finding: at the end, the train PM has gained more than the test PM; the share of its gain
   that the test PM confirms is smaller than it was halfway (at half the sqrt(KL)); and the truth
   has fallen from its peak. A seed's number is the smallest of its settings (sizes and amounts of
   data). The control exchanges the PMs: the policy is trained against the test PM of one setting,
   and the train PM has not gained more. The fall of the truth has no control.
2. A finding of its own: larger PMs are more robust. All runs of a seed are compared where the first
   of them ends, at the same sqrt(KL), in the mean over the amounts of data: the share of the train
   PM's gain that the test PM confirms, and the gain in truth, toy less small. (The two PMs come
   from one LM and may share flaws, as HH say of theirs; the truth has none.)
"""
import dataclasses

import lab
import output
import torch
from decide import Claim, sentence

from measures import fit_gao
from picture import paths
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
    gap, gap_se = output.mean_se((gains[-1, 0] - gains[-1, 1]).tolist())
    fall, fall_se = output.mean_se((gains[peak, 2] - gains[-1, 2]).tolist())
    distance, truth = output.column(points, "sqrt_kl"), output.column(points, "truth")
    alpha, beta, r2 = fit_gao(distance[1:], truth[1:], "rl")
    return {"last_sqrt_kl": last["sqrt_kl"], "train_pm": last["train_pm"],
            "test_pm": last["test_pm"], "gap": gap, "gap_se": gap_se,
            "peak_at": distance[peak], "truth_peak": truth[peak], "truth_end": last["truth"],
            "fall": fall, "fall_se": fall_se, "alpha": alpha, "beta": beta, "R2": r2}


def at_distance(points: list[dict], distance: float, name: str) -> float:
    """A column between the two points whose sqrt(KL) first encloses `distance`, on the straight
    line through them."""
    for before, after in zip(points, points[1:]):
        low, high = before["sqrt_kl"], after["sqrt_kl"]
        if low <= distance <= high and low < high:
            share = (distance - low) / (high - low)
            return before[name] + share * (after[name] - before[name])
    return points[-1][name]


def one_seed(runs: dict, amounts: list[int], cfg: RLConfig, n_test: int, n_prompts: int):
    """Rows of paths ("part": "path") and of ends ("part": "end")."""
    run, largest, rows = runs["toy"], max(amounts), []
    initial = lab.load(run)
    prompts = lab.held_out_prompts(run, n_prompts, "judge")
    found, test = draw_comparisons(run, 2 * largest, n_test)  # for both halves
    settings = []
    for size, pm_run in runs.items():
        for amount in amounts:
            pms = train_and_test_pm(pm_run, found, amount, largest, test)
            settings.append(({"size": size, "comparisons": amount, "control": False}, pms))
    of_control = {"size": size, "comparisons": amount, "control": True}
    settings.append((of_control, pms[::-1]))
    for setting, pms in settings:
        path, gains = optimize(run, pms, cfg, initial, prompts)
        if setting["control"]:  # back to the order train PM, test PM, truth
            gains = gains[:, [1, 0, 2]]
        setting = {"seed": run.seed} | setting
        rows.append(setting | {"part": "end"} | describe_end(path, gains))
        for point in describe_points(path, gains):
            rows.append(setting | {"part": "path"} | point)
    return rows


def confirmed(rows: list[dict]) -> list[dict]:
    """For each seed and setting: the share of the train PM's gain that the test PM confirms, and
    the gain in truth, where the first run of the seed ends."""
    found = []
    for seed in dict.fromkeys(output.column(rows, "seed")):
        ends = output.select(rows, part="end", seed=seed, control=False)
        distance = min(output.column(ends, "last_sqrt_kl"))
        for end in ends:
            setting = {name: end[name] for name in ("seed", "size", "comparisons")}
            points = output.select(rows, part="path", control=False, **setting)
            train, test, truth = (at_distance(points, distance, name)
                                  for name in ("train_pm", "test_pm", "truth"))
            found.append(setting | {"sqrt_kl": distance, "confirmed": test / train,
                                    "truth": truth})
    return found


def halfway(rows: list[dict], end: dict) -> float:
    """The share of the train PM's gain that the test PM confirms at half the sqrt(KL) of a run's
    end, less the share at its end."""
    setting = {name: end[name] for name in ("seed", "size", "comparisons", "control")}
    points = output.select(rows, part="path", **setting)
    half, last = end["last_sqrt_kl"] / 2, points[-1]
    confirmed_halfway = (at_distance(points, half, "test_pm")
                         / at_distance(points, half, "train_pm"))
    return confirmed_halfway - last["test_pm"] / last["train_pm"]


def draw(plt, rows):
    ends = output.select(rows, part="end", seed=rows[0]["seed"], control=False)
    for k, end in enumerate(ends, 1):
        plt.subplot(len(ends) // 2, 2, k)
        mine = output.select(rows, part="path", size=end["size"], control=False,
                             comparisons=end["comparisons"])
        for name, label in (("train_pm", "train PM"), ("test_pm", "test PM"), ("truth", "truth")):
            paths(plt, mine, "sqrt_kl", name, label)
        plt.title(f"{end['size']} PM, {end['comparisons']} comparisons")
        plt.xlabel("sqrt(KL)" if k > len(ends) - 2 else "")
        plt.ylabel("gain (logits, nats)")
    plt.legend()


def verdict(rows: list[dict]) -> tuple[str, str]:
    """The outcome of the first finding, and the sentences of both."""
    ends, seeds = output.select(rows, part="end"), dict.fromkeys(output.column(rows, "seed"))

    def smallest(name: str, control: bool) -> list[float]:
        numbers = []
        for seed in seeds:
            mine = output.select(ends, seed=seed, control=control)
            numbers.append(min(output.column(mine, name)))
        return numbers

    lost = []
    for seed in seeds:
        mine = output.select(ends, seed=seed, control=False)
        lost.append(min(halfway(rows, end) for end in mine))
    outcome, apart = sentence(
        "train and test PM part ways, and the truth turns down",
        [Claim("train PM's gain less the test PM's", smallest("gap", control=False), above=0.0),
         Claim("share confirmed halfway less that at the end", lost, above=0.0),
         Claim("fall of the truth from its peak", smallest("fall", control=False), above=0.0)],
        [Claim("train PM's gain less the test PM's", smallest("gap", control=True), above=0.0)])
    by_size = output.means(confirmed(rows), ("seed", "size"), ("confirmed", "truth"))
    smallest_pm, largest_pm = by_size[0]["size"], by_size[-1]["size"]

    def larger(name: str) -> list[float]:
        large, small = (output.column(output.select(by_size, size=size), name)
                        for size in (largest_pm, smallest_pm))
        return output.less(large, small)

    _, robust = sentence("larger PMs are more robust", [
        Claim("share of the gain that the test PM confirms, toy less small", larger("confirmed"),
              above=0.0),
        Claim("gain in truth, toy less small", larger("truth"), above=0.0)])
    return outcome, f"{apart} {robust}"


def experiment(args):
    sizes, amounts, n_seeds, n_test, n_prompts = ["small", "toy"], [500, 4000], 1, 500, 900
    if args.full:
        n_seeds = 4
    cfg = RLConfig(kl_coef=0.0, passes=2, iterations=50, batch=128, eval_every=5, eval_prompts=400)
    if args.tiny:
        sizes, amounts, n_test, n_prompts = ["toy"], [60, 80], 20, 32
        cfg = dataclasses.replace(cfg, iterations=4, batch=32, minibatch=16, lr=5e-3, eval_every=2,
                                  eval_prompts=32)
    rows = output.each_seed("robustness", args, n_seeds, lambda seed: one_seed(
        lab.bases(sizes, seed, args.tiny), amounts, cfg, n_test, n_prompts))
    print("gains from the first to the last iteration; where the truth peaks, how far it falls; "
          "OO's fit of the truth")
    output.table(output.select(rows, part="end"))
    print("where the first run of a seed ends:")
    output.table(confirmed(rows))
    _, sentences = verdict(rows)
    output.finish("robustness", args, rows, lambda plt: draw(plt, rows), sentences)


if __name__ == "__main__":
    output.main(experiment, __doc__)
