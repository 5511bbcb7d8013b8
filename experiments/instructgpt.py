"""IG Figs 1 and 3: labelers prefer PPO to SFT, SFT to the prompted LM, and that to the LM.

    python experiments/instructgpt.py            # 1 seed; minutes on two CPU cores
    python experiments/instructgpt.py --full     # 4 seeds

The paper's claim (§4.1): labelers prefer InstructGPT 175B to GPT-3 85 ± 3% of the time, and 71 ± 4%
of the time to few-shot GPT-3. Each step of the method helps. Even the 1.3B PPO-ptx policy, with 100
times fewer parameters, beats the 175B GPT-3, with or without a few-shot prompt (§1).

Here the players reply once to the same held-out prompts, drawn from labelers and users like those
of the rankings. The win rate is the mean probability with which a labeler prefers the reply of the
later player. The players:
  LM             reads the dialogue alone
  prompted LM    reads PREFIX first: a good header, and two examples of good replies
  SFT            the initial policy of stage 5
  PPO, PPO-ptx   from SFT, against the reward model (RM)
  small PPO-ptx  the same from an SFT model of half the width, against the same RM (IG C.2 uses one
                 RM, of 6B, for policies of all sizes)

1. The finding: each of LM < prompted LM < SFT < PPO is a win rate above 0.5. The control takes the
   labelers' judgment away. The RM learns from their rankings, but of each pair a coin decides which
   reply counts as the better one. PPO against this RM wins at most 0.55 of the time over SFT.
2. A finding of its own: the small PPO-ptx policy beats the large prompted LM.
"""
import dataclasses

import lab
import output
from decide import Claim, sentence
from picture import groups

import rankings
import toy
import toy_corpus
import toy_labelers
import train_sft
from data import ASSISTANT, HUMAN

LM, PROMPTED, SFT, PPO, PTX = "LM", "prompted LM", "SFT", "PPO", "PPO-ptx"
SMALL, CONTROL = "small PPO-ptx", "PPO, coin-flip RM (control)"
STEPS = ((PROMPTED, LM), (SFT, PROMPTED), (PPO, SFT))
# IG §3.5 gives few-shot GPT-3 a prefix that makes it follow instructions.
PREFIX = (toy_corpus.HHH_HEADER
          + f"{HUMAN} What is the opposite of hot?{ASSISTANT} The opposite of hot is cold."
          + f"{HUMAN} What is 2 plus 3?{ASSISTANT} 2 plus 3 is 5.")

# ---- 1. Players --------------------------------------------------------------


def by_coin(run, elements: list) -> list:
    """The same pairs, but a coin decides which reply is the better one."""
    rng, flipped = run.rng("instructgpt", "coin"), []
    for element in elements:
        pairs = []
        for i, j in element.pairs:
            pairs.append((j, i) if rng.random() < 0.5 else (i, j))
        flipped.append(dataclasses.replace(element, pairs=pairs))
    return flipped


def coin_flip_rm(run, cfg: rankings.RMConfig):
    """The RM of a labeler without judgment."""
    with lab.silence():
        elements = rankings.encode(run, rankings.rankings(run, cfg, "train"))
    return lab.train_rm(run, cfg, by_coin(run, elements))


def players(seed: int, tiny: bool) -> tuple:
    """-> the run, {player: (model, the header that it reads)}"""
    run = lab.instructgpt("toy", seed, tiny)
    small = lab.instructgpt("small", seed, tiny, upto="sft")
    rl, rl_ptx = lab.instructgpt_rl(tiny, ptx_coef=0.0), lab.instructgpt_rl(tiny)
    lm, sft, rm = run.load_model("lm.pt"), run.load_model("initial.pt"), run.load_model("pm.pt")

    def ppo(run, rm, cfg, reference):
        learner, _ = lab.ppo(run, rm, cfg, reference)
        return learner.result

    # The last epoch is the one that the RM scores best (experiments/sft.py).
    small_sft = list(train_sft.load_epochs(small).values())[-1]
    coin = coin_flip_rm(run, lab.TINY_RM if tiny else rankings.RMConfig())
    return run, {
        LM: (lm, ""), PROMPTED: (lm, PREFIX), SFT: (sft, ""),
        PPO: (ppo(run, rm, rl, sft), ""), PTX: (run.load_model("policy.pt"), ""),
        SMALL: (ppo(small, rm, rl_ptx, small_sft), ""), CONTROL: (ppo(run, coin, rl, sft), ""),
    }


# ---- 2. Win rates ------------------------------------------------------------


def draw_prompts(run, n: int) -> tuple[list[str], list[str]]:
    """n held-out prompts that fit the context after PREFIX, and their kinds."""
    rng, prompts, kinds = run.rng("instructgpt", "prompts"), [], []
    while len(prompts) < n:
        prompt, kind, _ = toy_labelers.draw_prompt(rng, held_out=True)
        if len(run.tok.encode_dialogue(PREFIX + prompt)) <= run.context - 32 - 1:
            prompts.append(prompt)
            kinds.append(kind)
    return prompts, kinds


def one_seed(seed: int, n: int, tiny: bool) -> list[dict]:
    """A row for each player and each player before it."""
    run, found = players(seed, tiny)
    prompts, kinds = draw_prompts(run, n)
    replies, rows = {}, []
    for name, (model, header) in found.items():
        replies[name] = lab.sample(run, model, prompts, name, header)
    for name in found:
        rates = toy.rates(prompts, kinds, replies[name])
        for other in list(found)[:list(found).index(name)]:
            preferred = []
            for prompt, kind, a, b in zip(prompts, kinds, replies[name], replies[other]):
                preferred.append(toy.preference(prompt, a, b, kind))
            win_rate, error = output.mean_se(preferred)
            rows.append({"seed": seed, "player": name, "over": other, "win_rate": win_rate,
                         "+-": error, "correct": rates["correct"],
                         "complied": rates["complied"]})
    return rows


def of(rows: list[dict], player: str, over: str) -> list[float]:
    """The player's win rate over another, one number a seed."""
    return output.column(output.select(rows, player=player, over=over), "win_rate")


def draw(plt, rows):
    pairs = [*STEPS, (CONTROL, SFT), (SMALL, PROMPTED), (PTX, LM), (PTX, PROMPTED)]
    names = [f"{player}\nover {over}" for player, over in pairs]
    groups(plt, names, {"here": [of(rows, player, over) for player, over in pairs]})
    plt.plot([5, 6], [0.85, 0.71], "_", color="gray", markersize=20, label="IG, 175B")
    plt.axhline(0.5, color="gray", lw=0.8)
    plt.xticks(rotation=15)
    plt.ylim(0, 1)
    plt.ylabel("win rate")
    plt.legend()


def verdict(rows: list[dict]) -> tuple[str, str]:
    """The outcome of the steps, and the sentences of both findings."""
    claims = []
    for player, over in STEPS:
        claims.append(Claim(f"{player} over {over}", of(rows, player, over), above=0.5))
    claims.append(Claim(f"{CONTROL} over SFT", of(rows, CONTROL, SFT), below=0.55))
    outcome, steps = sentence("each step of InstructGPT is preferred to the one before", claims)
    _, small = sentence("a small policy with human feedback beats a large LM without it",
                        [Claim("win rate", of(rows, SMALL, PROMPTED), above=0.5)])
    return outcome, f"{steps} {small}"


def experiment(args):
    n, n_seeds = 600, 1
    if args.full:
        n, n_seeds = 1500, 4
    if args.tiny:
        n, n_seeds = 8, 1
    rows = output.each_seed("instructgpt", args, n_seeds,
                            lambda seed: one_seed(seed, n, args.tiny))
    print(f"how often a labeler prefers the player; errors over {n} prompts")
    output.table(rows)
    _, sentences = verdict(rows)
    output.finish("instructgpt", args, rows, lambda plt: draw(plt, rows), sentences)


if __name__ == "__main__":
    output.main(experiment, __doc__)
