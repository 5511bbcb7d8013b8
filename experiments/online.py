"""§4.5, Figs 15, 16, 34: iterated online RLHF beats RLHF with as many static comparisons.

    python experiments/online.py             # 2 seeds; minutes on two CPU cores
    python experiments/online.py --full      # 4 seeds

The paper's claim: crowdworkers clearly prefer the policy whose PM learned from base, rejection
sampling and online comparisons to one whose PM learned from as many base comparisons. Two runs here
spend the same number of helpful comparisons, which HH split in thirds:
  static   all about pairs of the initial policy's replies
  online   a quarter about such pairs ("base"), a quarter about the best of 16 by a PM of the first
           quarter ("RS", rejection sampling), the rest in rounds. A round trains a PM on all
           comparisons so far and a policy against it, and compares replies of that run's middle and
           last policy and of the last one of the round before.
Each PM starts from the LM and each policy from the initial policy. At the end, each run trains its
last PM and, with the same options, its last policy. Comparisons are few and the KL penalty is small
on purpose, so that the static PM has flaws for PPO to find.

1. Elo by crowdworkers of the last runs' snapshots on held-out prompts (Fig. 16); the Elo that each
   PM promises for its own run (Fig. 15, right); how often the chosen reply has the higher mean
   log-prob (Fig. 34). The verdict's threshold: in each seed, the last online snapshot's Elo is
   above the last static one's by 2 standard errors (over matches; they say nothing of other runs).
2. The last PMs on held-out comparisons of each origin, and their scores (Fig. 15, left).
"""
import lab
import output
import torch
from campaign import Campaign, logp_accuracy

import toy
import toy_corpus
from pm import report
from ratings import ELO, elo_error
from train_rl import RLConfig


def rate_snapshots(campaign, players: dict, n: int) -> tuple[list[dict], tuple]:
    """players: {(run, iteration): (policy, its numbers, those at the start of its run)} -> a row
    for each player, and Elo of the last online player minus the last static one, with error."""
    run, cfg, rng = campaign.run, campaign.cfg, campaign.run.rng("matches")
    prompts = [toy_corpus.draw_prompt(rng, "helpful", held_out=True) for _ in range(n)]
    replies, rows = {}, []
    for player, (policy, _, _) in players.items():
        replies[player] = lab.sample(run, policy, prompts, f"match {player}")
    elo, covariance = lab.crowd_elo(run, prompts, "helpful", replies)
    for i, (player, (policy, now, start)) in enumerate(players.items()):
        found = [toy.judge(prompt, reply) for prompt, reply in zip(prompts, replies[player])]
        beside = toy.mean_or_nan(judged.wrong and not judged.answers for judged in found)
        rows.append({"policy": player[0], "responses": player[1] * cfg.batch, "elo": elo[player],
                     "elo_error": elo_error(covariance, 0, i),
                     "pm_elo": ELO * (now["score_helpful"] - start["score_helpful"]),
                     "kl": now["kl"], "right": toy.mean_or_nan(judged.correct for judged in found),
                     "beside_the_point": beside,
                     "logp_accuracy": logp_accuracy(run, policy, campaign.test["base"])})
    order = list(players)
    online, static = ("online", cfg.iterations), ("static", cfg.iterations)
    error = elo_error(covariance, order.index(static), order.index(online))
    return rows, (elo[online] - elo[static], error)


def rate_pms(campaign, pms: dict) -> tuple[list[dict], dict]:
    """A row for each origin of held-out comparisons, and {origin: scores by the online PM}."""
    rows, histogram = [], {}
    for origin, pairs in campaign.test.items():
        found = {}
        for name, pm in pms.items():
            chosen, rejected = lab.scores(campaign.run, pm, pairs)
            found[name] = report(chosen - rejected, pairs)
        histogram[origin] = torch.cat((chosen, rejected)).tolist()  # of the last PM, the online one
        truths = []
        for c in pairs:
            truths += [toy.helpfulness(c.prompt, c.chosen), toy.helpfulness(c.prompt, c.rejected)]
        rows.append({"pairs": origin, "static_pm": found["static"].accuracy,
                     "online_pm": found["online"].accuracy, "bayes": found["static"].bayes,
                     "score": toy.mean_or_nan(histogram[origin]),
                     "truth": toy.mean_or_nan(truths)})
    return rows, histogram


def one_seed(campaign, rounds: int, n_matches: int):
    """-> rows of both tables, the scores for the histogram, and the Elo gained with its error."""
    online = campaign.online_comparisons(rounds)
    first = campaign.samples_of(campaign.initial)
    static = campaign.compare(len(online), "static", first, first)
    pms = {"static": campaign.fit(static), "online": campaign.fit(online)}
    players = {}
    for name, pm in pms.items():
        snapshots, path = campaign.rlhf(pm)
        for policy, numbers in zip(snapshots, path):
            if numbers["iteration"] > 0:
                players[name, numbers["iteration"]] = (policy, numbers, path[0])
            elif name == "static":  # both runs start from the initial policy
                players["initial", 0] = (policy, numbers, path[0])
    rows, gain = rate_snapshots(campaign, players, n_matches)
    return rows, *rate_pms(campaign, pms), gain


def over_seeds(tables: list[list[dict]], label: str) -> list[dict]:
    """The mean of several seeds' tables; `label` is the same in all of them."""
    means = []
    for rows in zip(*tables):
        mean = dict(rows[0])
        for name in mean:
            if name != label:
                mean[name] = toy.mean_or_nan(output.column(rows, name))
        means.append(mean)
    return means


def draw(plt, rows, histogram):
    plt.gcf().set_size_inches(10, 4)
    plt.subplot(121)
    for name, color in (("static", "C0"), ("online", "C1")):
        mine = output.select(rows, policy="initial") + output.select(rows, policy=name)
        x = output.column(mine, "responses")
        plt.errorbar(x, output.column(mine, "elo"), output.column(mine, "elo_error"), color=color,
                     capsize=3, label=name)
        plt.plot(x, output.column(mine, "pm_elo"), "--", color=color, label=f"{name}, by its PM")
    plt.xlabel("responses in RL")
    plt.ylabel("Elo")
    plt.legend()
    plt.subplot(122)
    for origin, scores in histogram.items():
        plt.hist(scores, 30, density=True, histtype="step", label=origin)
    plt.xlabel("score by the online PM")
    plt.legend()


def verdict(gains: list[tuple]) -> tuple[str, str]:
    """gains, of each seed: Elo of the last online snapshot minus the last static one, its error."""
    holds = all(gain > 2 * error for gain, error in gains)
    outcome = "HOLDS" if holds else "DOES NOT HOLD"
    words = ", ".join(f"{gain:.0f} +- {error:.0f}" for gain, error in gains)
    return outcome, (
        f"{outcome}: with as many comparisons, online is above static. Elo of the last online "
        f"snapshot less the last static one: {words} (threshold: 2 errors in each of n = "
        f"{len(gains)} seeds).")


def experiment(args):
    n, rounds, n_test, n_matches, n_seeds = 120, 2, 400, 1000, 4 if args.full else 2
    cfg = RLConfig(iterations=40, batch=128, minibatch=32, lr=1e-3, kl_coef=0.02,
                   harmless_share=0.0, eval_every=10, eval_prompts=256)
    if args.tiny:
        n, rounds, n_test, n_matches, n_seeds = 12, 1, 12, 40, 1
        cfg = RLConfig(iterations=2, batch=16, minibatch=8, eval_every=2, eval_prompts=16)
    base = lab.base("toy", 0, args.tiny)
    snapshots, quality, histograms, gains = [], [], [], []
    for seed in range(args.seed, args.seed + n_seeds):
        campaign = Campaign(lab.replica(base, seed), cfg, n, n_test)
        rows, pm_rows, histogram, gain = one_seed(campaign, rounds, n_matches)
        snapshots.append(rows)
        quality.append(pm_rows)
        histograms.append(histogram)
        gains.append(gain)
    rows = over_seeds(snapshots, "policy")
    print(f"means over n = {n_seeds} seeds; {n * (2 + rounds)} comparisons for each PM. The "
          "snapshots of both runs:")
    output.table(rows)
    print("accuracy of the last PMs on held-out comparisons of each origin; score by the online "
          "PM; true helpfulness:")
    output.table(over_seeds(quality, "pairs"))
    _, sentence = verdict(gains)
    output.finish("online", args, rows, lambda plt: draw(plt, rows, histograms[0]), sentence)


if __name__ == "__main__":
    output.main(experiment, __doc__)
