"""App. B.6, Fig. 36: the best of n samples by the PM gets better with n; and how RLHF compares.

    python experiments/best_of_n.py           # 1 seed; minutes on two CPU cores
    python experiments/best_of_n.py --full    # 4 seeds

The paper's claim: the crowdworkers' Elo for helpfulness rises over n = 1, 4, 16, 64, and, "very
roughly and heuristically", online RLHF is about as good as best of 64 or better. As there, the PM
and the prompts are helpful ones only. HH's RLHF policy was trained under another PM; here PPO is
trained against the same PM.

N replies to each held-out prompt give the mean for every n at once (measures.best_of_n). Measured
are the PM score and the true utility of the best reply, as gains over one reply of the initial
policy; and the same for PPO, on the same prompts.

1. The finding: each step from 1 to 4, 16 and 64 raises the true utility. The control picks by PMs
   with random weights, in the mean over five of them.
2. A finding of its own: PPO's true gain is at most 0.1 nats below that of best of 64.
3. Over-optimization, in the table and the picture: beyond some n the truth turns down while the PM
   score keeps rising. OO's curve for best of n, truth = d (alpha - beta d) with d = sqrt(KL), is
   fitted, and the n that it promises the most for is printed.

The KL of best-of-n is log n - (n - 1) / n if no two replies tie (HH write log n, an upper
bound: 4.2 instead of 3.2 for n = 64). In this small world replies repeat, which makes it less.
"""
import dataclasses
import math

import lab
import output
from decide import Claim, sentence
from measures import best_of_n, best_of_n_kl, fit_gao
from picture import curve, paths

from evaluate import measure
from train_rl import RLConfig

STEPS = (1, 4, 16, 64)
N = STEPS[-1]      # replies to each prompt
N_UNTRAINED = 5    # PMs with random weights; one alone may like or dislike the truth by chance
PPO_REPLIES = 4    # of a policy to each prompt
MARGIN = 0.1       # nats
PM, UNTRAINED, PPO = "PM", "untrained PM (control)", "PPO"


def one_seed(run, cfg: RLConfig, n: int, n_prompts: int) -> list[dict]:
    """Rows of best of n by each PM for n = 1, 2, 4, ..., and of PPO's path."""
    pm, initial = lab.train_pm_on(run, lab.comparisons(run, n)), lab.load(run)
    judges = [pm]
    for k in range(N_UNTRAINED):
        judges.append(lab.untrained_pm(lab.replica(run, run.seed + 1000 * k)))
    prompts = lab.drawn_prompts(run, cfg)
    held_out = prompts.draw(n_prompts, "best of n", held_out=True)
    *scored, truth = lab.judge(run, initial, judges, held_out, replies=N)  # (prompts, N) each
    rows = []
    for k, scores in enumerate(scored):
        best_score, best_truth = best_of_n(scores, scores), best_of_n(scores, truth)
        for exponent in range(N.bit_length()):
            column = 2**exponent - 1  # for n = 2 ** exponent
            rows.append({"seed": run.seed, "by": UNTRAINED if k else PM, "n": column + 1,
                         "kl": best_of_n_kl(column + 1).item(),
                         "score": (best_score[:, column] - best_score[:, 0]).mean().item(),
                         "truth": (best_truth[:, column] - best_truth[:, 0]).mean().item()})
    judged = []

    def watch(learner):
        score, gain = lab.judge(run, learner.policy, [pm], held_out, PPO_REPLIES)
        _, _, kl = measure(run, cfg, learner.policy, initial, pm, held_out)
        # The baseline is that of best of n: the mean over all N replies.
        judged.append({"kl": kl.mean().item(), "score": (score.mean() - scored[0].mean()).item(),
                       "truth": (gain.mean() - truth.mean()).item()})
    _, path = lab.ppo(run, pm, cfg, initial, watch, prompts)
    for numbers, gains in zip(path, judged):
        rows.append({"seed": run.seed, "by": PPO, "n": numbers["iteration"]} | gains)
    return rows


def at(rows: list[dict], by: str, n: int) -> list[float]:
    """True gains, one number for each seed."""
    return output.seed_means(output.select(rows, by=by, n=n), "truth")


def best_n(rows: list[dict]) -> float:
    """The n with the highest truth by OO's fit to the best of n by the PM, over all seeds."""
    mine = [row for row in output.select(rows, by=PM) if row["n"] > 1]
    distances = [math.sqrt(row["kl"]) for row in mine]
    alpha, beta, r2 = fit_gao(distances, output.column(mine, "truth"), "bon")
    print(f"    truth = d ({alpha:.3f} - {beta:.3f} d), R^2 = {r2:.3f}, d = sqrt(KL)")
    if beta <= 0:
        return math.inf
    kl = (alpha / (2 * beta)) ** 2  # where its derivative alpha - 2 beta d is 0
    n = 1
    while n < 1000 and best_of_n_kl(n).item() < kl:
        n += 1
    return n


def draw(plt, rows):
    ppo = []
    for row in output.select(rows, by=PPO):
        ppo.append(row | {"sqrt(KL)": math.sqrt(max(row["kl"], 0.0))})
    for i, (name, title) in enumerate((("score", "PM score"), ("truth", "true utility")), 1):
        plt.subplot(1, 2, i)
        paths(plt, ppo, "sqrt(KL)", name, PPO)
        for by in (PM, UNTRAINED):
            mine = output.select(rows, by=by)
            distance = {row["n"]: math.sqrt(row["kl"]) for row in mine}
            if by == PM or name == "truth":
                gains = [output.seed_means(output.select(mine, n=n), name) for n in distance]
                curve(plt, list(distance.values()), gains, f"best of n by {by}")
        plt.xlabel("sqrt(KL)")
        plt.ylabel(f"gain in {title} over one reply of the initial policy")
    plt.legend()


def verdict(rows: list[dict]) -> tuple[str, str]:
    def steps(by: str) -> list[Claim]:
        claims = []
        for few, many in zip(STEPS, STEPS[1:]):
            gains = output.less(at(rows, by, many), at(rows, by, few))
            claims.append(Claim(f"from {few} to {many}", gains, above=0.0))
        return claims

    outcome, rises = sentence("the true utility of the best of n rises at each step", steps(PM),
                              steps(UNTRAINED))
    last = max(output.column(output.select(rows, by=PPO), "n"))
    less = output.less(at(rows, PPO, last), at(rows, PM, STEPS[-1]))
    _, as_good = sentence(f"PPO is as good as best of {STEPS[-1]}",
                          [Claim("its true gain, less that", less, above=-MARGIN)])
    return outcome, f"{rises} {as_good}"


def experiment(args):
    n_prompts, n, n_seeds = 300, 6000, 1
    if args.full:
        n_prompts, n_seeds = 600, 4
    # lab.ppo's own measurements are not used.
    cfg = RLConfig(kl_coef=0.05, iterations=60, eval_every=6, harmless_share=0.0, eval_prompts=60)
    if args.tiny:
        n_prompts, n = 8, 60
        cfg = dataclasses.replace(cfg, iterations=4, batch=32, minibatch=16, eval_every=2,
                                  eval_prompts=32)
    rows = output.each_seed("best_of_n", args, n_seeds, lambda seed: one_seed(
        lab.base("toy", seed, args.tiny), cfg, n, n_prompts))
    print(f"gains over one reply of the initial policy, means of {n_seeds} seeds (PPO: n is the "
          "iteration)")
    output.table(output.means(rows, ("by", "n"), errors=True))
    n = best_n(rows)
    words = f"By OO's fit the truth is highest near n = {n}." if n < 1000 else ""
    _, sentences = verdict(rows)
    output.finish("best_of_n", args, rows, lambda plt: draw(plt, rows), f"{sentences} {words}")


if __name__ == "__main__":
    output.main(experiment, __doc__)
