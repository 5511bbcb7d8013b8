"""§4.5, Figs 15, 16, 34: iterated online RLHF beats RLHF with as many static comparisons.

    python experiments/online.py             # 1 seed; minutes on two CPU cores
    python experiments/online.py --full      # 4 seeds

The paper's claim: crowdworkers clearly prefer the policy whose PM learned from base, rejection
sampling and online comparisons to one whose PM learned from as many base comparisons. Two runs here
spend the same number of helpful comparisons, which HH split in thirds:
  static   all about pairs of the initial policy's replies
  second   the same once more, with other comparisons (the control)
  online   a quarter about such pairs ("base"), a quarter about the best of 16 by a PM of the first
           quarter ("RS", rejection sampling), the rest in rounds. A round trains a PM on all
           comparisons so far and a policy against it, and compares replies of that run's middle and
           last policy and of the last one of the round before.
Each PM starts from the LM and each policy from the initial policy. At the end, each run trains its
last PM and, with the same options, its last policy. Comparisons are few and the KL penalty is small
on purpose, so that the static PM has flaws for PPO to find.

1. Elo by crowdworkers of the last runs' snapshots on held-out prompts (Fig. 16); the Elo that each
   PM promises for its own run (Fig. 15, right); how often the chosen reply has the higher mean
   log-prob (Fig. 34). The finding: the last online snapshot's Elo is above the last static one's.
   The control is a second static run, whose comparisons are others: it is not above the first.
2. The last PMs on held-out comparisons of each origin, and their scores (Fig. 15, left).
"""
import lab
import output
import torch
from campaign import Campaign, logp_accuracy
from decide import Claim, sentence
from picture import curve

import toy
import toy_corpus
from pm import report
from ratings import ELO, elo_error
from train_rl import RLConfig


STATIC, SECOND, ONLINE = "static", "second static", "online"


def rate_snapshots(campaign, players: dict, n: int) -> list[dict]:
    """players: {(run, iteration): (policy, its numbers, those at the start of its run)} -> a row
    for each player."""
    run, cfg, rng = campaign.run, campaign.cfg, campaign.run.rng("matches")
    prompts = [toy_corpus.draw_prompt(rng, "helpful", held_out=True) for _ in range(n)]
    replies, rows = {}, []
    for player, (policy, _, _) in players.items():
        replies[player] = lab.sample(run, policy, prompts, f"match {player}")
    elo, covariance = lab.crowd_elo(run, prompts, "helpful", replies)
    for i, (player, (policy, now, start)) in enumerate(players.items()):
        found = [toy.judge(prompt, reply) for prompt, reply in zip(prompts, replies[player])]
        beside = toy.mean_or_nan(judged.wrong and not judged.has_answer for judged in found)
        rows.append({"policy": player[0], "responses": player[1] * cfg.batch, "elo": elo[player],
                     "elo_error": elo_error(covariance, 0, i),
                     "pm_elo": ELO * (now["score_helpful"] - start["score_helpful"]),
                     "kl": now["kl"], "right": toy.mean_or_nan(judged.correct for judged in found),
                     "beside_the_point": beside,
                     "logp_accuracy": logp_accuracy(run, policy, campaign.test["base"])})
    return rows


def rate_pms(campaign, pms: dict) -> list[dict]:
    """A row for each origin of held-out comparisons, with its scores by the online PM."""
    rows = []
    for origin, pairs in campaign.test.items():
        found = {}
        for name, pm in pms.items():
            chosen, rejected = lab.scores(campaign.run, pm, pairs)
            found[name] = report(chosen - rejected, pairs)
        scores = torch.cat((chosen, rejected)).tolist()  # of the last PM, the online one
        truths = []
        for c in pairs:
            truths += [toy.helpfulness(c.prompt, c.chosen), toy.helpfulness(c.prompt, c.rejected)]
        rows.append({"pairs": origin, "static_pm": found[STATIC].accuracy,
                     "online_pm": found[ONLINE].accuracy, "bayes": found[STATIC].bayes,
                     "score": toy.mean_or_nan(scores), "truth": toy.mean_or_nan(truths),
                     "scores": scores})
    return rows


def one_seed(campaign, rounds: int, n_matches: int) -> list[dict]:
    """Rows of snapshots ("part": "snapshot") and of PMs ("part": "PM")."""
    online = campaign.online_comparisons(rounds)
    first = campaign.samples_of(campaign.initial)
    comparisons = {STATIC: campaign.compare(len(online), "static", first, first),
                   SECOND: campaign.compare(len(online), "second static", first, first),
                   ONLINE: online}
    pms = {name: campaign.fit(pairs) for name, pairs in comparisons.items()}
    players = {}
    for name, pm in pms.items():
        snapshots, path = campaign.rlhf(pm)
        for policy, numbers in zip(snapshots, path):
            if numbers["iteration"] > 0:
                players[name, numbers["iteration"]] = (policy, numbers, path[0])
            elif name == STATIC:  # all runs start from the initial policy
                players["initial", 0] = (policy, numbers, path[0])
    rows = []
    for part, found in (("snapshot", rate_snapshots(campaign, players, n_matches)),
                        ("PM", rate_pms(campaign, pms))):
        rows += [{"seed": campaign.run.seed, "part": part} | row for row in found]
    return rows


def last_elo(rows: list[dict], policy: str) -> list[float]:
    """The Elo of a run's last snapshot, one number for each seed."""
    mine = output.select(rows, part="snapshot", policy=policy)
    last = max(output.column(mine, "responses"))
    return output.column(output.select(mine, responses=last), "elo")


def draw(plt, rows):
    plt.subplot(1, 2, 1)
    snapshots = output.select(rows, part="snapshot")
    for name in (STATIC, SECOND, ONLINE):
        mine = output.select(snapshots, policy="initial") + output.select(snapshots, policy=name)
        x = list(dict.fromkeys(output.column(mine, "responses")))
        curve(plt, x, output.samples(mine, "elo", "responses", x), name)
        if name != SECOND:
            curve(plt, x, output.samples(mine, "pm_elo", "responses", x), f"{name}, by its PM")
    plt.xlabel("responses in RL")
    plt.ylabel("Elo")
    plt.legend()
    plt.subplot(1, 2, 2)
    for row, style in zip(output.select(rows, part="PM", seed=rows[0]["seed"]), ("-", "--", ":")):
        plt.hist(row["scores"], 30, density=True, histtype="step", ls=style, label=row["pairs"])
    plt.xlabel("score by the online PM (first seed)")
    plt.ylabel("density of both replies of a pair")
    plt.legend()


def verdict(rows: list[dict]) -> tuple[str, str]:
    def above_static(policy: str) -> list[Claim]:
        gains = output.less(last_elo(rows, policy), last_elo(rows, STATIC))
        return [Claim("Elo of the last snapshot, less the static one's", gains, above=0.0)]

    return sentence("with as many comparisons, online is above static", above_static(ONLINE),
                    above_static(SECOND))


def experiment(args):
    n, rounds, n_test, n_matches, n_seeds = 120, 2, 400, 1000, 1
    if args.full:
        n_matches, n_seeds = 4000, 4
    cfg = RLConfig(iterations=40, batch=128, minibatch=32, lr=1e-3, kl_coef=0.02,
                   harmless_share=0.0, eval_every=10, eval_prompts=256)
    if args.tiny:
        n, rounds, n_test, n_matches, n_seeds = 12, 1, 12, 40, 1
        cfg = RLConfig(iterations=2, batch=16, minibatch=8, eval_every=2, eval_prompts=16)
    rows = output.each_seed("online", args, n_seeds, lambda seed: one_seed(
        Campaign(lab.base("toy", seed, args.tiny), cfg, n, n_test), rounds, n_matches))
    print(f"means of {n_seeds} seeds; {n * (2 + rounds)} comparisons for each PM. The snapshots:")
    output.table(output.means(output.select(rows, part="snapshot"), ("policy", "responses")))
    print("accuracy of the last PMs on held-out comparisons of each origin; score by the online "
          "PM; true helpfulness:")
    output.table(output.means(output.select(rows, part="PM"), ("pairs",)))
    _, words = verdict(rows)
    output.finish("online", args, rows, lambda plt: draw(plt, rows), words)


if __name__ == "__main__":
    output.main(experiment, __doc__)
