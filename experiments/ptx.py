"""IG Figs 28, 29, 33, 34: PPO costs skills that it does not train; pretraining text restores them.

    python experiments/ptx.py            # 1 seed; minutes on two CPU cores
    python experiments/ptx.py --full     # 6 seeds, the first of them with all policies

The paper's claim (§1, §4.2): PPO makes models worse than GPT-3 on public data sets such as SQuAD,
DROP and French-to-English translation. This is an "alignment tax". PPO-ptx adds the gradient of the
loss on pretraining text, times gamma = 27.8 (Eq. 2, App. C.4), and lowers the tax on all data sets.
From gamma = 20 on, the 1.3B model is as good as GPT-3 on SQuAD and DROP (App. E.6, Fig. 33). With a
higher KL coefficient beta it never fully recovers, up to 2.0, 100 times the default, which costs
much reward (Fig. 34; the KL there is to GPT-3, but to the SFT model it is much the same, §4.2).

Here skills.py makes two skills that only plain text exercises, and an LM learns them from its
corpus. SFT and the reward model (RM) follow as in --preset instructgpt. From one SFT model and one
RM come PPO with IG's beta, PPO-ptx with three gammas, and PPO with higher betas. The skill of a
policy is the mean log-prob that it gives the right answers, averaged over both skills.

1. The finding. GAMMA and the rest of RL were fixed after shorter trials of seed 0 alone:
     tax        SFT less PPO is above 0 (without a tax, the sentence says so and ends there)
     repaired   PPO-ptx less SFT is above 0: it brings back all of the tax
     not by KL  PPO-ptx less PPO with 100 times the beta is above 0
     control    PPO-ptx on the corpus without the pages of exercises, less SFT, is below 0
   Such text may still bring back a part, as may dialogues alone. The sentence says how much.
2. A finding of its own: PPO-ptx gains at least 90% of the RM score that PPO gains.
"""
import contextlib
import dataclasses

import lab
import output
from decide import Claim, sentence
from picture import interval
from skills import dialogue, document, exercises, measure, without_skills

import rankings
import toy_corpus
from pipeline import Run, RunConfig
from rankings import RMConfig
from train_lm import LMConfig, encode, mean_loss
from train_sft import SelectConfig, SFTConfig

GAMMA, BETA = 0.3, 0.02
# Of each policy's RL. lr: twice the preset's, because at the preset's the tax is hardly seen. No
# average of the weights: after so few steps it would still be close to the SFT model.
RL = {"kl_coef": BETA, "ptx_coef": 0.0, "lr": 1e-3, "ema": 0.0}
LM, SFT, PPO = "LM", "SFT", "PPO"
PTX, HIGH_KL = f"PPO-ptx, gamma {GAMMA}", "PPO, beta x 100"
CONTROL, DIALOGUES = f"{PTX}, no skills (control)", f"{PTX}, dialogues"
# What each policy changes in RL, and what draws the documents of its pretraining text.
ARMS = {
    PPO: ({}, document),
    "PPO-ptx, gamma 0.1": ({"ptx_coef": 0.1}, document),
    PTX: ({"ptx_coef": GAMMA}, document),
    "PPO-ptx, gamma 1": ({"ptx_coef": 1.0}, document),
    "PPO, beta x 10": ({"kl_coef": 10 * BETA}, document),
    HIGH_KL: ({"kl_coef": 100 * BETA}, document),
    CONTROL: ({"ptx_coef": GAMMA}, without_skills),
    DIALOGUES: ({"ptx_coef": GAMMA}, dialogue),
}

# ---- 1. Models ---------------------------------------------------------------


@contextlib.contextmanager
def corpus(draw_document):
    """Inside a `with` block, each stage that reads pretraining text draws its documents from
    `draw_document`."""
    original = toy_corpus.document
    toy_corpus.document = draw_document
    try:
        yield
    finally:
        toy_corpus.document = original


def initial(seed: int, tiny: bool) -> Run:
    """The folder of an LM that knows the skills, its SFT model and its RM. Missing ones are
    trained. As in IG C.3, SFT takes two epochs, with 10% of pretraining text."""
    size = "tiny-small" if tiny else "small"
    run = Run(RunConfig(paper="instructgpt", size=size, seed=seed,
                        out=str(lab.OUT / f"skills-{size}-{seed}")))
    lm, sft, rm = LMConfig(documents=24_000), SFTConfig(epochs=2), RMConfig(prompts=2000)
    if tiny:
        lm, sft, rm = lab.TINY_LM, lab.TINY_SFT, lab.TINY_RM
    with lab.silence() if run.has("initial.pt") else contextlib.nullcontext(), corpus(document):
        rankings.ensure(run, lm, sft, rm, SelectConfig(by="last"))
    return run


# ---- 2. Measurements ---------------------------------------------------------


def one_seed(seed: int, arms: dict, n: int, iterations: int, tiny: bool) -> list[dict]:
    """A row for the LM, the SFT model and the policy of each arm. n: exercises of each skill, and
    documents of the corpus on which the loss is measured."""
    run = initial(seed, tiny)
    sft, rm = run.load_model("initial.pt"), run.load_model("pm.pt")
    asked, rng = exercises(run.rng("ptx tests"), n), run.rng("ptx texts")
    texts, _ = encode(run.tok, [document(rng) for _ in range(n)], run.context)

    def row(name: str, model, **numbers) -> dict:
        numbers |= measure(run, model, asked)
        numbers["text loss"] = mean_loss(model, texts, run.device)
        return {"seed": seed, "policy": name} | numbers

    rows = [row(LM, run.load_model("lm.pt"), gain=0.0, kl=0.0), row(SFT, sft, gain=0.0, kl=0.0)]
    for name, (options, draw_document) in arms.items():
        cfg = lab.instructgpt_rl(tiny, **RL | options)
        if not tiny:
            cfg = dataclasses.replace(cfg, iterations=iterations, batch=128, eval_every=1000,
                                      eval_prompts=1500)
        with corpus(draw_document):
            learner, path = lab.ppo(run, rm, cfg, sft)
        gain = path[-1]["score"] - path[0]["score"]
        rows.append(row(name, learner.policy, gain=gain, kl=path[-1]["kl"]))
    return rows


# ---- 3. The verdict ----------------------------------------------------------


def of(rows: list[dict], policy: str, name: str = "skill") -> list[float]:
    """A number of a policy, one a seed."""
    return output.column(output.select(rows, policy=policy), name)


def contrast(rows: list[dict], weights: dict[str, float], name: str = "skill") -> list[float]:
    """A weighted sum of several policies' numbers, one a seed."""
    sums = [0.0] * len(of(rows, SFT))
    for policy, weight in weights.items():
        for i, x in enumerate(of(rows, policy, name)):
            sums[i] += weight * x
    return sums


def less_sft(rows: list[dict], policy: str, name: str) -> list[float]:
    """A number of a policy less the SFT model's, for each seed in which the policy was trained."""
    mine = output.select(rows, policy=policy)
    seeds = output.column(mine, "seed")
    of_sft = [row[name] for row in output.select(rows, policy=SFT) if row["seed"] in seeds]
    return output.less(output.column(mine, name), of_sft)


def verdict(rows: list[dict]) -> tuple[str, str]:
    """The outcome of the first finding and the sentences of both; of the tax alone if there is
    none."""
    tax = Claim("tax, SFT less PPO", contrast(rows, {SFT: 1, PPO: -1}), above=0.0)
    outcome, words = sentence("PPO costs the skills something that could be repaired", [tax])
    if outcome == "DOES NOT HOLD":
        return outcome, words
    outcome, words = sentence("PPO-ptx undoes the alignment tax, and more so than a KL penalty", [
        tax,
        Claim(f"{PTX}, less SFT", contrast(rows, {PTX: 1, SFT: -1}), above=0.0),
        Claim(f"{PTX}, less {HIGH_KL}", contrast(rows, {PTX: 1, HIGH_KL: -1}), above=0.0),
        Claim(f"{CONTROL}, less SFT", contrast(rows, {CONTROL: 1, SFT: -1}), below=0.0)])
    less_reward = contrast(rows, {PTX: 1, PPO: -0.9}, "gain")
    _, reward = sentence("it costs at most a tenth of the reward", [
        Claim("RM score gained, less 90% of PPO's", less_reward, above=0.0)])
    return outcome, f"{words} {reward} {others(rows)}"


def others(rows: list[dict]) -> str:
    """What else brings back the skills, less PPO's, and at which price."""
    parts = []
    for policy in (PTX, HIGH_KL, CONTROL, DIALOGUES):
        back, _ = output.mean_se(contrast(rows, {policy: 1, PPO: -1}))
        gain, _ = output.mean_se(of(rows, policy, "gain"))
        parts.append(f"{policy} {back:+.3f} and {gain:.3f}")
    gain, _ = output.mean_se(of(rows, PPO, "gain"))
    return f"Brought back, and RM score gained (PPO {gain:.3f}): {'; '.join(parts)}."


def draw(plt, rows):
    """On the left the skills, on the right the gain, as in Figs 33 and 34."""
    policies = list(dict.fromkeys(output.column(rows, "policy")))
    for side, name, label in ((1, "skill", "log-prob of right answers, less SFT's (nats a token)"),
                              (2, "gain", "RM score gained (logits)")):
        plt.subplot(1, 2, side)
        means, halves = zip(*[interval(less_sft(rows, policy, name)) for policy in policies])
        places = [-i for i in range(len(policies))]
        plt.errorbar(means, places, xerr=halves, linestyle="")
        plt.yticks(places, policies if side == 1 else [""] * len(policies))
        plt.xlabel(label)


def experiment(args):
    of_verdict = {name: ARMS[name] for name in (PPO, PTX, HIGH_KL, CONTROL, DIALOGUES)}
    n, n_seeds, iterations = 300, 6 if args.full else 1, 50
    if args.tiny:
        n, iterations = 8, 2

    def measure(seed: int) -> list[dict]:
        arms = ARMS if args.full and seed == args.seed else of_verdict
        return one_seed(seed, arms, n, iterations, args.tiny)

    rows = output.each_seed("ptx", args, n_seeds, measure)
    print(f"accuracy and log-prob (nats a token) on {n} exercises of each skill; gain: of RM score")
    output.table(rows)
    _, words = verdict(rows)
    output.finish("ptx", args, rows, lambda plt: draw(plt, rows), words)


if __name__ == "__main__":
    output.main(experiment, __doc__)
