"""App. B.6, Fig. 36: the best of n samples by the PM gets better with n; and how RLHF compares with it.

    python experiments/best_of_n.py           # n up to 64, PPO with 2 seeds; minutes on two CPU cores
    python experiments/best_of_n.py --full    # more prompts, 5 seeds

N = 64 replies to each of some held-out prompts give the mean for every n up to 64 at once, without bias (pm.best_of_n).
Measured: PM score and true utility of the best reply (HH: Elo by crowdworkers, under another PM than that of the online
RLHF beside it, a rough comparison), as gains over one reply of the initial policy; and the same of PPO against the same
PM, at each n's KL, at each n's PM score, and at PPO's end.

The KL of best-of-n is log n - (n - 1) / n where no two replies tie (HH quote the upper bound log n: 4.2 instead of 3.2
for n = 64). In this small world replies repeat, which makes it less. So at "equal KL" best-of-n is given more than it
used, and where it is ahead there, it is ahead. OO §3.5 warns that KL is no fair measure of methods: RL uses more of it
for the same effect.
"""
import dataclasses

import lab

from pm import best_of_n, best_of_n_kl
from train_rl import Prompts, RLConfig


def at(x, xs, ys) -> float:
    """ys, a function of xs given at points in the order of a path, where xs first reaches x (nan: it never does)."""
    for x0, x1, y0, y1 in zip(xs, xs[1:], ys, ys[1:]):
        if x0 <= x <= x1:
            return y0 + (y1 - y0) * (x - x0) / max(x1 - x0, 1e-9)
    return float("nan")


def experiment(args):
    n_prompts, N, seeds = 600 if args.full else 300, 64, 5 if args.full else 2
    cfg, n = RLConfig(kl_coef=0.05, iterations=60, eval_every=4), 6000
    if args.tiny:
        n_prompts, N, seeds, n = 12, 8, 1, 100
        cfg = dataclasses.replace(cfg, iterations=4, batch=32, minibatch=16, eval_every=2, eval_prompts=32)
    run = lab.base("toy", args.seed, 300 if args.tiny else 0)
    pm = lab.train_pm_on(run, lab.comparisons(run, n) + lab.comparisons(run, n // 3, "harmless"))
    initial = lab.load(run)
    prompts = Prompts(run, cfg).draw(n_prompts, True, "best of n", share=1 / 3)
    scores, truth = lab.judge(run, initial, [pm], prompts, replies=N)  # both (prompts, N)
    gain = dict(score=best_of_n(scores, scores), truth=best_of_n(scores, truth))  # (prompts, N) each: column n - 1
    gain = {name: g - g[:, :1] for name, g in gain.items()}

    paths = []
    for seed in range(args.seed, args.seed + seeds):
        _, path = lab.ppo(lab.replica(run, seed), pm, cfg, initial)
        paths.append({name: [p[name] - path[0][name] for p in path] for name in ("kl", "score", "truth")})

    def ppo_at(name, x, wanted):
        return lab.mean_se(at(x, path[name], path[wanted]) for path in paths)[0]
    rows = []
    for n in [2**i for i in range(N.bit_length())]:
        kl, mine = best_of_n_kl(n).item(), {name: g[:, n - 1] for name, g in gain.items()}
        score, true = (g.mean().item() for g in mine.values())
        rows.append(dict(n=n, kl=kl, score=score, truth=true, truth_se=mine["truth"].std().item() / n_prompts**0.5,
                         ppo_score_at_kl=ppo_at("kl", kl, "score"), ppo_truth_at_kl=ppo_at("kl", kl, "truth"),
                         ppo_kl_at_score=ppo_at("score", score, "kl"),
                         ppo_truth_at_score=ppo_at("score", score, "truth")))
    print(f"gains over one reply of the initial policy: best of n; PPO ({seeds} seeds) at its KL, and at its PM score")
    lab.table(rows)
    end = {name: lab.mean_se(path[name][-1] for path in paths) for name in ("kl", "score", "truth")}
    print("    PPO's end: " + ", ".join(f"{name} {m:.3f} +- {se:.3f}" for name, (m, se) in end.items()))

    def draw(plt):
        for name, style in (("truth", "-"), ("score", "--")):
            plt.plot([r["kl"] ** 0.5 for r in rows], [r[name] for r in rows], f"C0o{style}", label=f"best of n, {name}")
            for i, path in enumerate(paths):
                plt.plot([max(kl, 0) ** 0.5 for kl in path["kl"]], path[name], f"C1{style}",
                         label=None if i else f"PPO, {name}")
        plt.xlabel("sqrt(KL)"), plt.ylabel("gain over the initial policy"), plt.legend()

    ns, last = [n for n in (1, 4, 16, 64) if n <= N], rows[-1]
    steps = [gain["truth"][:, b - 1] - gain["truth"][:, a - 1] for a, b in zip(ns, ns[1:])]
    z = [(s.mean() / (s.std() / n_prompts**0.5)).item() for s in steps]
    holds = min(z) > 2 and end["truth"][0] > last["truth"] - 2 * last["truth_se"]
    lab.finish("best_of_n", args, rows, draw, (
        f"HOLDS: best-of-n gains at each step, RLHF reaches best of {N}: " if holds else "DOES NOT HOLD as stated: ")
        + f"true utility over n = {ns} steps up by "
        + ", ".join(f"{s.mean():.3f} ({x:.1f} se)" for s, x in zip(steps, z))
        + f" (threshold 2 se); best of {N} gains {last['truth']:.3f} +- {last['truth_se']:.3f} in all, PPO "
        f"{end['truth'][0]:.3f} +- {end['truth'][1]:.3f} (threshold: best of {N} less 2 se).")


if __name__ == "__main__":
    lab.main(experiment, __doc__)
