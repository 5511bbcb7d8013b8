"""Iterated online RLHF (§4.5; Figs 15, 16, 34): are comparisons of the policy's own replies worth more than as many of the
first model's?

    python experiments/online.py             # 2 seeds; minutes on two CPU cores
    python experiments/online.py --full      # 4 seeds

Two runs spend the same number of helpful comparisons. The static one asks for all of them at the start, about pairs of the
initial policy's replies. The online one asks for a quarter (HH: a third each) about those ("base"), a quarter about the
best of 16 by a PM of the first quarter ("RS", rejection sampling), and the rest in rounds: a PM from scratch on all
comparisons so far, RLHF from the initial policy, comparisons between that run's policies and the last one of the round
before, all data mixed. Then each run
trains its last PM from scratch and, with the same PPO options, its last policy. Comparisons are few and the KL penalty small,
so that the static PM has flaws for PPO to find.

1. Elo of all snapshots of both last runs, by crowdworkers on held-out prompts (Eq. B.1; Fig. 16), with errors; beside it
   the Elo that each PM promises for its own run (174 a unit, Eq. 2.1; Fig. 15, right), and how often the mean log-prob of
   the chosen reply is the higher one under the policy (Fig. 34).
2. Both PMs on held-out comparisons of each origin, and how PM scores of the three are distributed (Fig. 15, left).
"""
import copy

import torch

import lab
import toy
from data import encode_comparison
from model import token_logprobs
from pm import ELO, elo_error, report
from train_pm import PMConfig
from train_rl import RLConfig

FEW = PMConfig(batch=4)  # with the usual 16, some hundred comparisons would be too few steps


def compared(run, n, name, *speakers):
    """n comparisons of replies to the same prompt, each by two of the speakers (functions of prompts and a name)."""
    rng = run.rng("online", name)
    prompts = [toy.draw_prompt(rng, "helpful", name.startswith("test")) for _ in range(2 * n)]  # two may say the same
    replies = zip(*(speak(prompts, f"{name} {i}") for i, speak in enumerate(speakers)))
    pairs = [(prompt, *rng.sample(said, 2)) for prompt, said in zip(prompts, replies)]
    return [toy.label(prompt, a, b, "helpful", rng) for prompt, a, b in pairs if a != b][:n]


def campaign(run, cfg, n, rounds, n_test):
    """Both runs of one seed -> snapshots {run: [policy]}, PPO's numbers {run: [dict]}, the last PMs {run: PM}, held-out
    comparisons {origin: [Comparison]}."""
    initial = lab.load(run)
    test, train = {}, []

    def collect(origin, name, *speakers):
        test[origin] = compared(run, n_test, f"test {name}", *speakers)
        return compared(run, n, name, *speakers)

    def speaker(policy): return lambda prompts, name: lab.sample(run, policy, prompts, name)

    def fit(pairs): return lab.centre(run, lab.train_pm_on(run, pairs, cfg=FEW), test["base"])

    def rlhf(pm):
        snapshots = []
        _, path = lab.ppo(run, pm, cfg, initial, lambda learner, _: snapshots.append(copy.deepcopy(learner.policy)))
        return snapshots, path

    train += collect("base", "base", *[speaker(initial)] * 2)
    base_pm = fit(train)
    train += collect("RS", "RS", *[lambda prompts, name: lab.best_of(run, initial, base_pm, prompts, name=name)] * 2)
    before = initial
    for k in range(rounds):
        snapshots, _ = rlhf(fit(train))
        train += collect("online", f"online {k}", *map(speaker, (before, snapshots[len(snapshots) // 2], snapshots[-1])))
        before = snapshots[-1]
    pms = dict(static=fit(compared(run, len(train), "static", *[speaker(initial)] * 2)), online=fit(train))
    found = {name: rlhf(pm) for name, pm in pms.items()}
    return {name: f[0] for name, f in found.items()}, {name: f[1] for name, f in found.items()}, pms, test


@torch.no_grad()
def logp_accuracy(run, policy, pairs):
    """How often the chosen reply is the one with the higher mean log-prob under a policy (Fig. 34)."""
    right = []
    for c in pairs:
        prompt, *replies = encode_comparison(run.tok, c, run.context)
        rows = [torch.tensor(prompt + r, device=run.device) for r in replies]
        hidden = [policy(row[None, :-1])[0, len(prompt) - 1:] for row in rows]  # states before each token of the reply
        chosen, rejected = (token_logprobs(policy, h, row[len(prompt):]).mean() for h, row in zip(hidden, rows))
        right.append((chosen > rejected).item())
    return toy.mean(right)


def one_seed(run, cfg, n, rounds, n_test, matches):
    """-> rows of the two tables, PM scores for the histogram, and Elo of online less static at the end, with its error."""
    snapshots, paths, pms, test = campaign(run, cfg, n, rounds, n_test)
    players = {("initial", 0): (snapshots["static"][0], paths["static"][0])}
    for name in pms:
        players |= {(name, p["iteration"]): (s, p) for s, p in list(zip(snapshots[name], paths[name]))[1:]}
    rng = run.rng("matches")
    prompts = [toy.draw_prompt(rng, "helpful", True) for _ in range(matches)]
    replies = {who: lab.sample(run, policy, prompts, f"match {who}") for who, (policy, _) in players.items()}
    elo, covariance = lab.crowd_elo(run, prompts, "helpful", replies)
    rows, quality, histogram = [], [], {}
    for i, (who, (policy, numbers)) in enumerate(players.items()):
        found = [toy.judge(prompt, reply) for prompt, reply in zip(prompts, replies[who])]
        start = paths["online" if who[0] == "online" else "static"][0]
        rows.append(dict(
            policy=who[0], responses=who[1] * cfg.batch, elo=elo[who], elo_error=elo_error(covariance, 0, i),
            pm_elo=ELO * (numbers["score_helpful"] - start["score_helpful"]), kl=numbers["kl"],
            right=toy.mean(j.correct for j in found), beside_the_point=toy.mean(j.wrong and not j.answers for j in found),
            logp_accuracy=logp_accuracy(run, policy, test["base"])))
    for origin, pairs in test.items():
        both = {name: lab.scores(run, pm, pairs) for name, pm in pms.items()}
        right = {name: report(chosen - rejected, pairs) for name, (chosen, rejected) in both.items()}
        histogram[origin] = torch.cat(both["online"]).tolist()
        quality.append(dict(
            pairs=origin, static_pm=right["static"].accuracy, online_pm=right["online"].accuracy,
            bayes=right["static"].bayes, score=toy.mean(histogram[origin]),
            truth=toy.mean(toy.helpfulness(c.prompt, reply) for c in pairs for reply in (c.chosen, c.rejected))))
    static, online = (list(players).index((name, cfg.iterations)) for name in ("static", "online"))
    return rows, quality, histogram, (list(elo.values())[online] - list(elo.values())[static],
                                      elo_error(covariance, static, online))


def over_seeds(tables, label) -> list[dict]:
    """The rows of several seeds' tables, of which `label` is the same -> means."""
    return [{k: rows[0][k] if k == label else toy.mean(r[k] for r in rows) for k in rows[0]} for rows in zip(*tables)]


def experiment(args):
    n, rounds, n_test, matches, seeds = 120, 2, 400, 1000, 4 if args.full else 2
    cfg = RLConfig(iterations=40, batch=128, minibatch=32, lr=1e-3, kl_coef=0.02, harmless_share=0.0, eval_every=10,
                   eval_prompts=256)
    if args.tiny:
        n, rounds, n_test, matches, seeds = 12, 1, 12, 100, 1
        cfg = RLConfig(iterations=2, batch=16, minibatch=8, eval_every=2, eval_prompts=16)
    base = lab.base("toy", 0, 300 if args.tiny else 0)
    found = [one_seed(lab.replica(base, args.seed + i), cfg, n, rounds, n_test, matches) for i in range(seeds)]
    rows, quality = over_seeds([f[0] for f in found], "policy"), over_seeds([f[1] for f in found], "pairs")
    print(f"means over n = {seeds} seeds; {n * (2 + rounds)} comparisons for each PM. The snapshots of both runs:")
    lab.table(rows)
    print("accuracy of the last PMs on held-out comparisons of each origin; score by the online PM; true helpfulness:")
    lab.table(quality)

    def draw(plt):
        plt.gcf().set_size_inches(10, 4)
        plt.subplot(121)
        for name, colour in (("static", "C0"), ("online", "C1")):
            mine = [r for r in rows if r["policy"] in ("initial", name)]
            x = [r["responses"] for r in mine]
            plt.errorbar(x, [r["elo"] for r in mine], [r["elo_error"] for r in mine], color=colour, capsize=3, label=name)
            plt.plot(x, [r["pm_elo"] for r in mine], "--", color=colour, label=f"{name}, by its PM")
        plt.xlabel("responses in RL"), plt.ylabel("Elo"), plt.legend()
        plt.subplot(122)
        for origin, scores in found[0][2].items():
            plt.hist(scores, 30, density=True, histtype="step", label=origin)
        plt.xlabel("score by the online PM"), plt.legend()

    gains = [f[3] for f in found]
    holds = all(gain > 2 * error for gain, error in gains)
    lab.finish("online", args, rows, draw, (
        f"{'HOLDS' if holds else 'DOES NOT HOLD'}: with as many comparisons, online is above static. Elo of the last "
        f"online snapshot less the last static one: {', '.join(f'{g:.0f} +- {e:.0f}' for g, e in gains)} (threshold: 2 "
        f"errors in each of n = {seeds} seeds)."))


if __name__ == "__main__":
    lab.main(experiment, __doc__)
