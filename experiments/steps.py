"""InstructGPT's three steps with a script's own labelers: what they ask, write and rank (IG §3).

lab.instructgpt runs the steps with the toy's labelers. A script with other prompts, or with other
judges, uses these functions instead, in this order:
  1. SFT             a language model, finetuned on demonstrations
  2. Reward model    K replies to each prompt, ranked by their utilities
  3. PPO             against the reward model (RM), on the script's own prompts
  4. All three       a policy for each kind of labelers, from one SFT model and the same replies
These RMs see fewer rankings than that of rankings.py, so their learning rate is twice as high.

Legend:  K replies to one prompt   N prompts
"""
import copy
import dataclasses
from collections import Counter
from dataclasses import dataclass

import lab

import rankings
import train_sft
from demonstrations import Demonstration
from evaluate import PromptBatch
from model import GPT
from pipeline import Run
from pm import ScalarModel
from run import write_jsonl
from toy_labelers import rank_by
from train_rl import Learner, RLConfig

# ---- 1. SFT ------------------------------------------------------------------


def sft(run: Run, cfg: train_sft.SFTConfig, found: list[Demonstration]) -> GPT:
    """The model after the last epoch on these demonstrations, of which one prompt in sixteen is
    held out. Writes sft.pt to the run's folder."""
    path = run.path("own-demonstrations.jsonl")
    write_jsonl(path, [{"prompt": one.prompt, "reply": one.reply} for one in found])
    with lab.silence():
        train_sft.train(run, dataclasses.replace(cfg, data=str(path)))
    return run.load_model("sft.pt")


# ---- 2. Reward model ---------------------------------------------------------

RM, TINY_RM = rankings.RMConfig(lr=1e-3), lab.TINY_RM


def sample(run: Run, models: list[GPT], prompts: list[str], k: int) -> list[list[str]]:
    """k replies of each model to each prompt: (N, k x models). Unfinished ones are empty."""
    replies = [[] for _ in prompts]
    for number, model in enumerate(models):
        generator = run.torch_rng("lab", f"to be ranked {number}")
        said = rankings.replies_to(run, model, prompts, [k] * len(prompts), RM.max_response,
                                   generator)
        for mine, more in zip(replies, said):
            mine += more
    return replies


def reward_model(run: Run, prompts: list[str], replies: list[list[str]],
                 utilities: list[list[float]], tiny: bool) -> ScalarModel:
    """An RM that starts from sft.pt and learns from labelers' rankings. They rank the replies to
    each prompt by these utilities (nats), with noise that is the same for any utilities. The RM's
    mean is not subtracted; PPO does not depend on it."""
    cfg, rng, found = TINY_RM if tiny else RM, run.rng("ranks"), []
    for prompt, options, worth in zip(prompts, replies, utilities):
        kept = rankings.different(options, Counter())
        if kept:
            ranks = rank_by([worth[k] for k in kept], rng)
            found.append(rankings.Ranking(prompt, [options[k] for k in kept], ranks))
    with lab.silence():
        elements = rankings.encode(run, found)
    return lab.train_rm(run, cfg, elements)


# ---- 3. PPO ------------------------------------------------------------------


class OwnPrompts:
    """A script's prompts, in the form in which Learner.iterate draws them."""

    def __init__(self, run: Run, texts: list[str]):
        self.run, self.texts = run, texts

    def draw(self, n: int, *name, held_out: bool) -> PromptBatch:
        """n of the texts. The words of `name` seed the choice. None is held out."""
        texts = self.run.rng("own prompts", *name).choices(self.texts, k=n)
        ids = [self.run.tok.encode_dialogue(text) for text in texts]
        return PromptBatch(texts, ["helpful"] * n, ids)


def short_rl(tiny: bool, iterations: int) -> RLConfig:
    """IG's options of RL, without what takes time (pretraining text) or only suits long runs (the
    average of the weights)."""
    return lab.instructgpt_rl(tiny, ptx_coef=0.0, ema=0.0, iterations=iterations)


def ppo(run: Run, rm: ScalarModel, cfg: RLConfig, reference: GPT, prompts: list[str]) -> GPT:
    """The policy after PPO against an RM on these prompts, without files."""
    blind = copy.copy(run)
    blind.toy = False  # no ground truth in the statistics: it does not know a script's prompts
    learner = Learner(blind, cfg, reference, rm)
    for iteration in range(cfg.iterations):
        learner.iterate(OwnPrompts(run, prompts), iteration)
    return learner.result


# ---- 4. All three ------------------------------------------------------------

LM, SFT = "LM", "SFT"


@dataclass
class Sizes:
    """The amounts of a quick run."""
    n: int                    # held-out prompts of each kind
    demonstrations: int = 4000
    epochs: int = 4
    ranked: int = 3000        # prompts with four replies each
    iterations: int = 30      # of PPO


FULL = Sizes(n=1000, epochs=8, ranked=4000, iterations=50)
TINY = Sizes(n=8, demonstrations=60, epochs=1, ranked=24, iterations=2)


def policies(run: Run, sizes: Sizes, found: list[Demonstration], asked: list, labelers: dict,
             tiny: bool) -> dict[str, GPT]:
    """The LM, the SFT model of the demonstrations, and PPO's policy for each kind of labelers. All
    rank the same replies of the SFT model to the prompts `asked`, objects that have a `prompt`.

    labelers: {name of the policy: function of (object, reply) -> utility in nats}."""
    model = sft(run, train_sft.SFTConfig(epochs=sizes.epochs), found)
    prompts = [one.prompt for one in asked]
    replies = sample(run, [model], prompts, 4)
    return {LM: run.load_model("lm.pt"), SFT: model} | policies_by_labelers(
        run, prompts, asked, replies, labelers, model, sizes.iterations, tiny)


def policies_by_labelers(run: Run, prompts: list[str], asked: list, replies: list[list[str]],
                         labelers: dict, reference: GPT, iterations: int,
                         tiny: bool) -> dict[str, GPT]:
    """PPO's policy from `reference` for each kind of labelers, who rank the same replies to the
    prompts. asked, labelers: as above, one object for each prompt."""
    models = {}
    for name, utility in labelers.items():
        utilities = []
        for one, options in zip(asked, replies):
            utilities.append([utility(one, reply) for reply in options])
        rm = reward_model(run, prompts, replies, utilities, tiny)
        models[name] = ppo(run, rm, short_rl(tiny, iterations), reference, prompts)
    return models
