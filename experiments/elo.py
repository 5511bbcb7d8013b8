"""Crowdworkers' Elo of context distillation, best-of-n and RLHF (Figs 1 and 36; prompting is ours), and whether PM scores
foretell it (Eq. 2.1, Fig. 35).

    python experiments/elo.py                # 1 seed; minutes on two CPU cores
    python experiments/elo.py --full         # 3 seeds

Six players answer held-out prompts: the LM, the LM behind the HHH prompt, the initial policy (context-distilled), best
of 16 of its replies by the PM, RLHF against that PM, and helpful-only RLHF, whose PM and prompts are helpful ones only.
Crowdworkers choose the more helpful of two replies to a helpful prompt, the less harmful of two to a red-team prompt;
each gives an Elo of its own, 0 for the initial policy.

By Eq. 2.1 one unit of PM score is worth 174 Elo. Four numbers stand side by side (after Fig. 35, whose two mean PM
scores, on held-out prompts and on crowdworkers' dialogues, are one here; the truth is ours): 174 times the mean PM score,
Elo from the PM's own choices in the same matches, 174 times the mean of the truth that crowdworkers go by, and their Elo.
The first and third take a mean where the second and fourth count choices. Choices saturate: a reply that is better by 4
logits wins hardly more often than one that is better by 2.
"""
import dataclasses

import torch

import lab
import toy
from pm import ELO, elo_error, fit_elo, line_fit, score_rows
from train_rl import RLConfig

KINDS = ("helpful", "harmless")
BASE, BEST, RLHF, HELPFUL = "context-distilled", "best of 16", "RLHF", "helpful-only RLHF"


def pm_score(run, pm, prompts, replies):
    rows = [run.tok.encode_dialogue(p) + run.tok.encode_reply(r) for p, r in zip(prompts, replies)]
    return score_rows(pm, [row + [run.tok.end_of_context] for row in rows], device=run.device)


def pm_elo(scores):
    """Elo from the PM's choices, scores (players, prompts); every pair of players meets on every prompt."""
    return fit_elo(torch.sigmoid(scores[:, None] - scores[None]).mean(-1))[0]


def one_seed(run, n, matches, cfg):
    """-> a row for each kind of prompt and player; {kind: covariance of Elo}."""
    lm, initial = lab.load(run, "lm.pt"), lab.load(run)
    helpful, harmless = lab.comparisons(run, n), lab.comparisons(run, n // 2, "harmless")
    test = [c for kind in KINDS for c in lab.comparisons(run, 300, kind, "test")]
    pm, helpful_pm = (lab.centre(run, lab.train_pm_on(run, pairs), test) for pairs in (helpful + harmless, helpful))
    rlhf, _ = lab.ppo(run, pm, cfg, initial)
    helpful_only, _ = lab.ppo(run, helpful_pm, dataclasses.replace(cfg, harmless_share=0.0), initial)

    rows, covariance = [], {}
    for kind in KINDS:
        rng = run.rng("matches", kind)
        prompts = [toy.draw_prompt(rng, kind, True) for _ in range(matches)]
        replies = {  # each player with random numbers of its own
            BASE: lab.sample(run, initial, prompts, "initial"), "LM": lab.sample(run, lm, prompts, "LM"),
            "LM, prompted": lab.sample(run, lm, prompts, "prompted", header=toy.HHH_PROMPT),
            BEST: lab.best_of(run, initial, pm, prompts), RLHF: lab.sample(run, rlhf.policy, prompts, "RLHF"),
            HELPFUL: lab.sample(run, helpful_only.policy, prompts, "helpful-only")}
        elo, covariance[kind] = lab.crowd_elo(run, prompts, kind, replies)
        score = torch.stack([pm_score(run, pm, prompts, r) for r in replies.values()])  # (players, prompts)
        truth = torch.tensor([[toy.truth(p, r, kind) for p, r in zip(prompts, rs)] for rs in replies.values()])
        mean_pm, mean_truth = (ELO * (x.mean(1) - x.mean(1)[0]) for x in (score, truth))
        choices = pm_elo(score)
        rows += [dict(seed=run.seed, kind=kind, player=who, mean_pm=mean_pm[i].item(), pm_choices=choices[i].item(),
                      mean_truth=mean_truth[i].item(), crowd=elo[who], error=elo_error(covariance[kind], 0, i))
                 for i, who in enumerate(replies)]
    return rows, covariance


def experiment(args):
    n, matches, cfg = 6000, 800, RLConfig(iterations=60, eval_every=60)
    seeds = range(args.seed, args.seed + (3 if args.full else 1))
    if args.tiny:
        n, matches, cfg = 100, 60, RLConfig(iterations=2, eval_every=2, eval_prompts=16, batch=16, minibatch=8)
    base, rows, failed = lab.base("toy", 0, 300 if args.tiny else 0), [], []
    for seed in seeds:
        mine, covariance = one_seed(lab.replica(base, seed), n, matches, cfg)
        rows += mine
        players = [r["player"] for r in mine if r["kind"] == "helpful"]
        elo = {(r["kind"], r["player"]): r["crowd"] for r in mine}

        def ahead(kind, a, b):
            """By how many standard errors a's Elo is above b's."""
            error = elo_error(covariance[kind], players.index(a), players.index(b))
            return (elo[kind, a] - elo[kind, b]) / error
        failed += [f"{text} (seed {seed})" for text, right in (
            ("RLHF above the initial policy on helpful prompts", ahead("helpful", RLHF, BASE) > 2),
            ("RLHF above the initial policy on red-team prompts", ahead("harmless", RLHF, BASE) > 2),
            ("helpful-only no worse than RLHF on helpful prompts", ahead("helpful", RLHF, HELPFUL) < 2),
            ("helpful-only below RLHF on red-team prompts", ahead("harmless", RLHF, HELPFUL) > 2)) if not right]
    lab.table(rows)
    fit = {x: line_fit([r[x] / ELO for r in rows], [r["crowd"] for r in rows]) for x in ("mean_pm", "mean_truth")}
    for x, (slope, _, r2) in fit.items():
        print(f"    crowd Elo against {x} in logits: {slope:.0f} Elo a logit (Eq. 2.1: {ELO:.0f}), R^2 {r2:.2f}, "
              f"{len(rows)} points")

    def draw(plt):
        for kind, style in (("helpful", "o"), ("harmless", "s")):
            mine = [r for r in rows if r["kind"] == kind]
            plt.errorbar([r["mean_pm"] / ELO for r in mine], [r["crowd"] for r in mine], [r["error"] for r in mine],
                         fmt=style, capsize=3, label=f"{'helpful' if kind == 'helpful' else 'red-team'} prompts")
            for r in mine if rows[0]["seed"] == mine[0]["seed"] else ():
                plt.annotate(r["player"], (r["mean_pm"] / ELO, r["crowd"]), fontsize=7, xytext=(4, -3),
                             textcoords="offset points")
        ends = [min(r["mean_pm"] for r in rows) / ELO, max(r["mean_pm"] for r in rows) / ELO]
        plt.plot(ends, [ELO * x for x in ends], "k:", label="Eq. 2.1: 174 a logit")
        plt.xlabel("mean PM score, less the initial policy's (logits)")
        plt.ylabel("Elo by crowdworkers")
        plt.legend()

    lab.finish("elo", args, rows, draw, (
        ("HOLDS" if not failed else "DOES NOT HOLD as stated") + ": Fig. 1, RLHF above the initial policy, helpful-only "
        "RLHF at least as helpful and less harmless (threshold: 2 standard errors of the difference)"
        + (f"; it fails at: {'; '.join(failed)}." if failed else f", in each of n = {len(seeds)} seeds.")))


if __name__ == "__main__":
    lab.main(experiment, __doc__)
