"""Figs 1 and 35: Elo by crowdworkers of context distillation, best of n, static and online RLHF.

    python experiments/elo.py                # 1 seed; minutes on two CPU cores
    python experiments/elo.py --full         # 4 seeds

The paper's claim (Fig. 1): crowdworkers prefer RLHF to context distillation, and online RLHF to
static RLHF; for helpfulness alone they prefer helpful-only RLHF, which is less harmless. The
players are policies of a whole run (`lab.trained`), and two that are trained here:
  RLHF               the main job's policy. Its comparisons are all about replies of the initial
                     policy, hence "static"
  online RLHF        the same with as many helpful comparisons on the same prompts: a third as they
                     were; a third about replies that were the best of 4 by a PM of the first
                     (rejection sampling; HH mostly 16); a third about replies of snapshots of RLHF
                     against a PM of both. The red-team comparisons are static, as in HH (§2.3)
  helpful-only RLHF  the PM and the prompts are helpful ones only

1. Conversations (App. B.5): two policies answer side by side at each turn, crowdworkers choose, and
   the dialogue goes on from the choice. Each kind of prompts gives an Elo of its own. The verdict
   has one number for each seed. RLHF is above the initial policy on both kinds; helpful-only RLHF
   is below RLHF on red-team prompts, and on helpful prompts at most 35 Elo below it (a win rate of
   45%). A finding of its own: on helpful prompts online RLHF is above RLHF, which had as many
   comparisons on the same prompts, and none of them online.
2. Scores and rankings (App. B.4, Fig. 35). By Eq. 2.1 one unit of PM score is worth 174 Elo. Does
   it foretell the crowdworkers' Elo? Single replies of these players, the LM with and without the
   HHH prompt, and the best of 16 replies of the initial policy, in pairs drawn by lot:
     mean_pm      174 times the mean PM score, less the initial policy's
     pm_choices   Elo from the PM's choices on the crowdworkers' pairs
     mean_truth   174 times the mean of the utility by which crowdworkers choose (ours)
     crowd        Elo by the crowdworkers, with its error
   The first and third are means of scores; the others come from choices. The crowd's noisy choices
   saturate: a reply better by 4 logits wins hardly more often than one better by 2. HH find no
   significant difference in terms of robustness.
"""
import copy
import dataclasses

import lab
import output
import torch
from decide import Claim, sentence

import toy
import toy_corpus
from collect import match
from data import read_comparisons
from evaluate import Prompts
from measures import line_fit
from picture import curve, groups
from ratings import ELO, elo_error, fit_elo
from train_pm import PMConfig
from train_rl import RLConfig

BASE, BEST, RLHF = "context-distilled", "best of 16", "RLHF"
ONLINE, HELPFUL = "online RLHF", "helpful-only RLHF"
MARGIN = 35  # Elo; a win rate of 45%

# ---- 1. Players --------------------------------------------------------------


def compare_again(run, pairs, name: str, *speakers) -> list:
    """The prompts of `pairs` with new replies, each of two speakers drawn by lot, and new choices.
    Where both replies are the same there is none. A speaker maps prompts and a name to replies."""
    rng, prompts, said = run.rng("elo", name), [pair.prompt for pair in pairs], []
    for i, speak in enumerate(speakers):
        said.append(speak(prompts, f"{name} {i}"))
    labeled = []
    for prompt, replies in zip(prompts, zip(*said)):
        a, b = rng.sample(replies, 2)
        if a != b and a.strip() and b.strip():
            labeled.append(toy.label(prompt, a, b, "helpful", rng))
    return labeled


def train_players(run, cfg: RLConfig, early: RLConfig) -> tuple:
    """-> the main job's PM, and {player: policy}. early: options of the RLHF whose snapshots are
    compared."""
    initial, pm, pmp = lab.load(run), run.load_model("pm.pt"), run.load_model("pmp.pt")
    static, test = {}, {}
    for kind in lab.KINDS:
        folder = run.path("comparisons") / f"{kind}-base"
        static[kind], _ = read_comparisons(folder / "train.jsonl", kind)
        test[kind], _ = read_comparisons(folder / "test.jsonl", kind)
        run.rng("elo", "order", kind).shuffle(static[kind])  # the file goes turn by turn

    def fit(pairs, kinds=lab.KINDS):
        """A PM that learns from `pairs` as the main job's does, with a mean of 0 on its held-out
        comparisons of these kinds."""
        pm = lab.train_pm_on(run, pairs, PMConfig().harmless_weight, start=pmp)
        return lab.center(run, pm, [pair for kind in kinds for pair in test[kind]])

    def rlhf(pm, cfg, watch=None):
        prompts = Prompts(run, cfg.max_response, cfg.harmless_share)  # those of the comparisons
        return lab.ppo(run, pm, cfg, initial, watch, prompts)[0].policy

    def speaker(policy):
        return lambda prompts, name: lab.sample(run, policy, prompts, name)

    n = len(static["helpful"]) // 3
    base, second, third = (static["helpful"][start:][:n] for start in (0, n, 2 * n))
    base_pm = fit(base)

    def best(prompts, name):
        return lab.best_of(run, initial, base_pm, prompts, 4, name)

    data = static["harmless"] + base + compare_again(run, second, "rejection sampling", best, best)
    snapshots = []
    rlhf(fit(data), early, lambda learner: snapshots.append(copy.deepcopy(learner.policy)))
    data += compare_again(run, third, "online", *map(speaker, snapshots[1:]))
    print(f"    {len(data) - len(static['harmless']):,} helpful comparisons for online RLHF, "
          f"{len(static['helpful']):,} for RLHF")
    helpful_pm = fit(static["helpful"], kinds=["helpful"])
    return pm, {BASE: initial, RLHF: run.load_model("policy.pt"), ONLINE: rlhf(fit(data), cfg),
                HELPFUL: rlhf(helpful_pm, dataclasses.replace(cfg, harmless_share=0.0))}


# ---- 2. Conversations --------------------------------------------------------


def conversations(run, kind: str, n: int, players: dict) -> list[dict]:
    """A row for each player: its Elo by conversations with each other player."""
    names, policies = list(players), list(players.values())
    # Half a win each way: someone who never lost would have no finite Elo.
    wins = 0.5 * torch.ones(len(names), len(names))
    for i in range(len(names)):
        for j in range(i + 1, len(names)):
            found = match(run, policies[i], policies[j], kind, n, RLConfig().max_response, "elo")
            wins[i, j] += found[0, 1]
            wins[j, i] += found[1, 0]
    elo, covariance = fit_elo(wins)
    rows = []
    for i, name in enumerate(names):
        rows.append({"seed": run.seed, "part": "conversations", "kind": kind, "player": name,
                     "crowd": elo[i].item(), "error": elo_error(covariance, 0, i)})
    return rows


# ---- 3. Scores and rankings --------------------------------------------------


def pm_elo(run, kind: str, scores):
    """Elo (players,) by the PM's choices on the crowdworkers' pairs; scores (players, prompts)."""
    players, n = scores.shape
    wins = 0.5 * torch.ones(players, players)  # as in `conversations`
    for k, i, j, _ in lab.pairs_by_lot(run, kind, n, players):
        winner, loser = (i, j) if scores[i, k] > scores[j, k] else (j, i)
        wins[winner, loser] += 1
    return fit_elo(wins)[0]


def single_replies(run, kind: str, n: int, pm, players: dict) -> list[dict]:
    """Single replies of all players to n prompts -> a row for each player."""
    rng, replies = run.rng("matches", kind), {}
    prompts = [toy_corpus.draw_prompt(rng, kind, held_out=True) for _ in range(n)]
    for name, policy in players.items():  # each player has random numbers of its own
        replies[name] = lab.sample(run, policy, prompts, name)
    lm = lab.load(run, "lm.pt")
    replies["LM"] = lab.sample(run, lm, prompts, "LM")
    replies["LM, prompted"] = lab.sample(run, lm, prompts, "prompted", toy_corpus.HHH_HEADER)
    replies[BEST] = lab.best_of(run, players[BASE], pm, prompts)
    elo, covariance = lab.crowd_elo(run, prompts, kind, replies)
    scores, truths = [], []
    for texts in replies.values():
        scores.append(lab.score_replies(run, pm, prompts, texts))
        truths.append(torch.tensor([toy.truth(p, r, kind) for p, r in zip(prompts, texts)]))
    scores, truths = torch.stack(scores), torch.stack(truths)  # (players, prompts) each
    mean_pm = ELO * (scores.mean(1) - scores.mean(1)[0])       # (players,)
    mean_truth = ELO * (truths.mean(1) - truths.mean(1)[0])    # (players,)
    pm_choices, rows = pm_elo(run, kind, scores), []
    for i, name in enumerate(replies):
        rows.append({"seed": run.seed, "part": "single replies", "kind": kind, "player": name,
                     "mean_pm": mean_pm[i].item(), "pm_choices": pm_choices[i].item(),
                     "mean_truth": mean_truth[i].item(), "crowd": elo[name],
                     "error": elo_error(covariance, 0, i)})
    return rows


# ---- 4. The finding ----------------------------------------------------------


def draw(plt, rows):
    plt.subplot(1, 2, 1)
    talks = output.select(rows, part="conversations")
    players = list(dict.fromkeys(output.column(talks, "player")))
    found = {}
    for kind, label in (("helpful", "helpful"), ("harmless", "red-teaming")):
        mine = output.select(talks, kind=kind)
        found[label] = output.samples(mine, "crowd", "player", players)
    groups(plt, players, found)
    plt.xticks(rotation=15)
    plt.ylabel("Elo in conversations")
    plt.legend()
    plt.subplot(1, 2, 2)
    single = output.select(rows, part="single replies")
    players = list(dict.fromkeys(output.column(single, "player")))
    for kind, label in (("helpful", "helpful"), ("harmless", "red-teaming")):
        mine, x = output.select(single, kind=kind), []
        for values in output.samples(mine, "mean_pm", "player", players):
            x.append(toy.mean_or_nan(values) / ELO)
        elos = output.samples(mine, "crowd", "player", players)
        curve(plt, x, elos, label, linestyle="")
        for player, place, values in zip(players, x, elos):
            plt.annotate(player, (place, toy.mean_or_nan(values)), fontsize=6, xytext=(4, -3),
                         textcoords="offset points")
    ends = [min(output.column(single, "mean_pm")), max(output.column(single, "mean_pm"))]
    plt.plot([end / ELO for end in ends], ends, color="gray", ls=":", marker="",
             label="Eq. 2.1: 174 a logit")
    plt.xlabel("mean PM score, less the initial policy's (logits)")
    plt.ylabel("Elo by crowdworkers, single replies")
    plt.legend()


def verdict(rows: list[dict]) -> tuple[str, str]:
    """The outcome of Fig. 1's claims on RLHF, and the sentences of both findings. rows: of the
    conversations."""
    def lead(kind: str, a: str, b: str) -> list[float]:
        """Player a's Elo less player b's, of each seed."""
        mine = output.select(rows, part="conversations", kind=kind)
        ours, theirs = (output.column(output.select(mine, player=x), "crowd") for x in (a, b))
        return output.less(ours, theirs)

    outcome, words = sentence(
        "Fig. 1: people prefer RLHF, and helpful-only RLHF is as helpful and less harmless",
        [Claim("Elo of RLHF above the initial policy, helpful", lead("helpful", RLHF, BASE), 0),
         Claim("red-team", lead("harmless", RLHF, BASE), above=0),
         Claim("helpful-only above RLHF, helpful", lead("helpful", HELPFUL, RLHF), above=-MARGIN),
         Claim("RLHF above helpful-only, red-team", lead("harmless", RLHF, HELPFUL), above=0)])
    _, online = sentence("with about as many comparisons, online is above static RLHF",
                         [Claim("Elo, helpful", lead("helpful", ONLINE, RLHF), above=0)])
    return outcome, f"{words} {online}"


def one_seed(run, cfg: RLConfig, early: RLConfig, n_talks: int, n_prompts: int) -> list[dict]:
    pm, players = train_players(run, cfg, early)
    rows = []
    for kind in lab.KINDS:
        rows += conversations(run, kind, n_talks, players)
        rows += single_replies(run, kind, n_prompts, pm, players)
    return rows


def experiment(args):
    n_talks, n_prompts, n_seeds = 200, 800, 1
    if args.full:
        n_talks, n_seeds = 600, 4
    cfg = RLConfig(eval_prompts=64, eval_every=1000)
    early = dataclasses.replace(cfg, iterations=24, eval_every=8)  # snapshots after 8, 16 and 24
    if args.tiny:
        n_talks, n_prompts, n_seeds, cfg = 4, 40, 1, lab.TINY_RL
        early = dataclasses.replace(cfg, eval_every=1)
    rows = output.each_seed("elo", args, n_seeds, lambda seed: one_seed(
        lab.trained(seed, args.tiny), cfg, early, n_talks, n_prompts))
    print(f"Elo in {n_talks} conversations of each pair; errors over choices:")
    output.table(output.select(rows, part="conversations"))
    print(f"Elo of single replies to {n_prompts} prompts:")
    singles = output.select(rows, part="single replies")
    output.table(singles)
    for name in ("mean_pm", "mean_truth"):
        slope, _, r2 = line_fit([row[name] / ELO for row in singles],
                                output.column(singles, "crowd"))
        print(f"    crowd Elo against {name} in logits: {slope:.0f} Elo a logit (Eq. 2.1: "
              f"{ELO:.0f}), R^2 {r2:.2f}, {len(singles)} points")
    _, sentences = verdict(rows)
    output.finish("elo", args, rows, lambda plt: draw(plt, rows), sentences)


if __name__ == "__main__":
    output.main(experiment, __doc__)
