"""Figs 1 and 36: the Elo by crowdworkers of context distillation, best of n and RLHF.

    python experiments/elo.py                # 1 seed; minutes on two CPU cores
    python experiments/elo.py --full         # 3 seeds

The paper's claim (Fig. 1): crowdworkers prefer RLHF to context distillation; for helpfulness alone
they prefer helpful-only RLHF, which is less harmless. Six players answer held-out prompts: the LM,
the LM behind the HHH prompt (ours), the initial policy (context-distilled), the best of 16 of its
replies by the PM, RLHF against that PM, and helpful-only RLHF, whose PM and prompts are helpful
ones only. Crowdworkers choose the more helpful of two replies to a helpful prompt and the less
harmful of two to a red-team prompt; each kind gives an Elo of its own, 0 for the initial policy.

By Eq. 2.1 one unit of PM score is worth 174 Elo. Does it foretell the crowdworkers' Elo? Four
numbers stand side by side:
  mean_pm      174 times the mean PM score
  pm_choices   Elo from the PM's win probabilities, sigmoids averaged over all pairs of players on
               all prompts. Fig. 35 takes the PM's discrete choices on the crowdworkers' own
               dialogues; our crowdworkers judge pairs that are drawn by lot
  mean_truth   174 times the mean of the utility by which crowdworkers choose (ours)
  crowd        Elo by the crowdworkers, with its error
The first and third are means of scores; the others come from choices, which saturate: a reply
better by 4 logits wins hardly more often than one better by 2. HH (App. B.4) find no significant
difference between scores and rankings.
The verdict's threshold is 2 standard errors of a difference in Elo: RLHF above the initial policy
on both kinds of prompts, helpful-only RLHF below RLHF on red-team prompts, and, on helpful prompts,
RLHF not above helpful-only RLHF. The last is passed, too, if no difference is detected.
"""
import dataclasses

import lab
import output
import torch

import toy
import toy_corpus
from measures import ELO, elo_error, fit_elo, line_fit
from train_rl import RLConfig

BASE, BEST, RLHF, HELPFUL = "context-distilled", "best of 16", "RLHF", "helpful-only RLHF"


def pm_elo(scores):
    """Elo from the PM's win probabilities, averaged over prompts; scores (players, prompts)."""
    return fit_elo(torch.sigmoid(scores[:, None] - scores[None]).mean(-1))[0]


def train_players(run, n: int, cfg):
    """-> the PM, the RLHF policy, the helpful-only RLHF policy."""
    initial, helpful = lab.load(run), lab.comparisons(run, n)
    harmless = lab.comparisons(run, n // 2, "harmless")
    test = lab.comparisons(run, 300, "helpful", "test")
    test += lab.comparisons(run, 300, "harmless", "test")
    pm = lab.center(run, lab.train_pm_on(run, helpful + harmless), test)
    helpful_pm = lab.center(run, lab.train_pm_on(run, helpful), test)
    rlhf, _ = lab.ppo(run, pm, cfg, initial)
    helpful_cfg = dataclasses.replace(cfg, harmless_share=0.0)
    helpful_only, _ = lab.ppo(run, helpful_pm, helpful_cfg, initial)
    return pm, rlhf.policy, helpful_only.policy


def play(run, kind: str, n: int, pm, rlhf, helpful_only) -> tuple[list[dict], torch.Tensor]:
    """All players on n prompts -> a row for each player, and the covariance of the Elo."""
    lm, initial, rng = lab.load(run, "lm.pt"), lab.load(run), run.rng("matches", kind)
    prompts = [toy_corpus.draw_prompt(rng, kind, held_out=True) for _ in range(n)]
    replies = {  # each player has random numbers of its own
        BASE: lab.sample(run, initial, prompts, "initial"),
        "LM": lab.sample(run, lm, prompts, "LM"),
        "LM, prompted": lab.sample(run, lm, prompts, "prompted", toy_corpus.HHH_HEADER),
        BEST: lab.best_of(run, initial, pm, prompts),
        RLHF: lab.sample(run, rlhf, prompts, "RLHF"),
        HELPFUL: lab.sample(run, helpful_only, prompts, "helpful-only")}
    elo, covariance = lab.crowd_elo(run, prompts, kind, replies)
    scores, truths = [], []
    for texts in replies.values():
        scores.append(lab.score_replies(run, pm, prompts, texts))
        truths.append(torch.tensor([toy.truth(p, r, kind) for p, r in zip(prompts, texts)]))
    scores, truths = torch.stack(scores), torch.stack(truths)  # (players, prompts) each
    mean_pm = ELO * (scores.mean(1) - scores.mean(1)[0])       # (players,)
    mean_truth = ELO * (truths.mean(1) - truths.mean(1)[0])    # (players,)
    pm_choices, rows = pm_elo(scores), []
    for i, player in enumerate(replies):
        rows.append({"seed": run.seed, "kind": kind, "player": player, "mean_pm": mean_pm[i].item(),
                     "pm_choices": pm_choices[i].item(), "mean_truth": mean_truth[i].item(),
                     "crowd": elo[player], "error": elo_error(covariance, 0, i)})
    return rows, covariance


def lead(rows: list[dict], covariance, a: str, b: str) -> float:
    """By how many standard errors player a's Elo is above player b's, on one kind of prompts."""
    players, elo = output.column(rows, "player"), output.column(rows, "crowd")
    i, j = players.index(a), players.index(b)
    return (elo[i] - elo[j]) / elo_error(covariance, i, j)


def draw(plt, rows):
    for kind, style, label in (("helpful", "o", "helpful prompts"),
                               ("harmless", "s", "red-team prompts")):
        mine = output.select(rows, kind=kind)
        x = [row["mean_pm"] / ELO for row in mine]
        plt.errorbar(x, output.column(mine, "crowd"), output.column(mine, "error"), fmt=style,
                     capsize=3, label=label)
        for row in output.select(mine, seed=rows[0]["seed"]):
            plt.annotate(row["player"], (row["mean_pm"] / ELO, row["crowd"]), fontsize=7,
                         xytext=(4, -3), textcoords="offset points")
    mean_pm = output.column(rows, "mean_pm")
    ends = [min(mean_pm), max(mean_pm)]
    plt.plot([ends[0] / ELO, ends[1] / ELO], ends, "k:", label="Eq. 2.1: 174 a logit")
    plt.xlabel("mean PM score, less the initial policy's (logits)")
    plt.ylabel("Elo by crowdworkers")
    plt.legend()


def verdict(leads: list[dict]) -> tuple[str, str]:
    """leads: for each seed, by how many standard errors RLHF's Elo is above that of the initial
    policy and of helpful-only RLHF, on each kind of prompts (see `experiment`)."""
    failed = []
    for lead_of in leads:
        conditions = {
            "RLHF above the initial policy on helpful prompts": lead_of["initial, helpful"] > 2,
            "RLHF above the initial policy on red-team prompts": lead_of["initial, red-team"] > 2,
            "helpful-only no worse than RLHF on helpful prompts": lead_of["only, helpful"] < 2,
            "helpful-only below RLHF on red-team prompts": lead_of["only, red-team"] > 2}
        for words, holds in conditions.items():
            if not holds:
                failed.append(f"{words} (seed {lead_of['seed']})")
    claim = ("Fig. 1, RLHF above the initial policy, helpful-only RLHF at least as helpful and "
             "less harmless (threshold: 2 standard errors of the difference)")
    if failed:
        return "DOES NOT HOLD", (f"DOES NOT HOLD as stated: {claim}; it fails at: "
                                 f"{'; '.join(failed)}.")
    return "HOLDS", f"HOLDS: {claim}, in each of n = {len(leads)} seeds."


def experiment(args):
    n, n_matches, n_seeds = 6000, 800, 3 if args.full else 1
    cfg = RLConfig(iterations=60, eval_every=60)
    if args.tiny:
        n, n_matches = 60, 40
        cfg = RLConfig(iterations=2, eval_every=2, eval_prompts=16, batch=16, minibatch=8)
    base, rows, leads = lab.base("toy", 0, args.tiny), [], []
    for seed in range(args.seed, args.seed + n_seeds):
        run, above = lab.replica(base, seed), {"seed": seed}
        players = train_players(run, n, cfg)
        for kind, name in (("helpful", "helpful"), ("harmless", "red-team")):
            mine, covariance = play(run, kind, n_matches, *players)
            rows += mine
            above[f"initial, {name}"] = lead(mine, covariance, RLHF, BASE)
            above[f"only, {name}"] = lead(mine, covariance, RLHF, HELPFUL)
        leads.append(above)
    output.table(rows)
    crowd = output.column(rows, "crowd")
    for name in ("mean_pm", "mean_truth"):
        slope, _, r2 = line_fit([row[name] / ELO for row in rows], crowd)
        print(f"    crowd Elo against {name} in logits: {slope:.0f} Elo a logit (Eq. 2.1: "
              f"{ELO:.0f}), R^2 {r2:.2f}, {len(rows)} points")
    _, sentence = verdict(leads)
    output.finish("elo", args, rows, lambda plt: draw(plt, rows), sentence)


if __name__ == "__main__":
    output.main(experiment, __doc__)
