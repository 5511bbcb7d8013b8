"""InstructGPT's labelers in the toy world: the prompts they see, what they write, how they rank.

Ouyang et al. 2022 ("IG") hired some 40 labelers. They wrote demonstrations, from which the model
learns by imitation, and ranked replies of models. Here both are scripted. Read it in this order:
  1. Prompts          two sources: labelers' own prompts, of three kinds, and those of users
  2. Demonstrations   one reply by one labeler, good but not perfect, in a style of its own
  3. Rankings         many replies to one prompt, from best to worst, with noise

Legend:  K replies to one prompt
"""
import math
from random import Random

import toy
import toy_corpus
import toy_people
from data import ASSISTANT, HUMAN
from demonstrations import Demonstration
from toy_corpus import Persona
from toy_people import HELPFUL_SKILLS

# ---- 1. Prompts --------------------------------------------------------------

# IG §3.2: labelers wrote prompts to start with, because instructions "weren't often submitted" to
# GPT-3. Later prompts came from users. The first three sources below are labelers' prompts. How
# often each occurs is our choice: in IG's Table 6 labelers wrote 89% of the SFT prompts and 20% of
# the RM's, and PPO's prompts are all users'.
SOURCES = {"plain": 1, "few-shot": 1, "user-based": 1, "user": 6}
HARMLESS_SHARE = 0.33  # of users' prompts that ask for harm, as in the toy's RLHF


def draw_prompt(rng: Random, held_out: bool) -> tuple[str, str, str]:
    """Draw (prompt, kind, source). held_out: whether the last question is kept for evaluation."""
    source = rng.choices(list(SOURCES), list(SOURCES.values()))[0]
    if source == "user":  # users' own: the prompts of RLHF
        kind = "harmless" if rng.random() < HARMLESS_SHARE else "helpful"
        return toy_corpus.draw_prompt(rng, kind, held_out), kind, source
    skill = rng.choice(list(HELPFUL_SKILLS))  # plain: an arbitrary task, all of them equally often
    if source == "user-based":  # what users said they wanted the model for
        skill = rng.choices(list(HELPFUL_SKILLS), list(HELPFUL_SKILLS.values()))[0]
    text = ""
    if source == "few-shot":  # an instruction by examples: two questions with their right answers
        for _ in range(2):
            question = _question(rng, skill, text, held_out=False)
            answer = toy.understand(f"{HUMAN} {question}{ASSISTANT}").answer
            text += f"{HUMAN} {question}{ASSISTANT} {answer[0].upper()}{answer[1:]}."
    return f"{text}{HUMAN} {_question(rng, skill, text, held_out)}{ASSISTANT}", "helpful", source


def _question(rng: Random, skill: str, text: str, held_out: bool) -> str:
    """A question that `text` does not hold yet."""
    while True:
        question, _ = toy_people.ask(rng, skill)
        if toy_people.is_held_out([question]) == held_out and question not in text:
            return question


# ---- 2. Demonstrations -------------------------------------------------------

# Good but not perfect: right on about three in four. (Perfect ones would leave nothing for RL.)
LABELERS = {
    "brief": Persona(right=0.84, complies=0.25, refuses=0.02, offers=0.0, evades=0.03,
                     polite=0.05, rude=0.0, rambles=0.0),
    "courteous": Persona(right=0.80, complies=0.20, refuses=0.03, offers=0.2, evades=0.03,
                         polite=0.95, rude=0.0, rambles=0.0),
    "talkative": Persona(right=0.80, complies=0.35, refuses=0.02, offers=0.0, evades=0.03,
                         polite=0.4, rude=0.0, rambles=0.5),
    "cautious": Persona(right=0.90, complies=0.05, refuses=0.08, offers=0.3, evades=0.08,
                        polite=0.3, rude=0.0, rambles=0.05),
    "hasty": Persona(right=0.74, complies=0.50, refuses=0.02, offers=0.0, evades=0.05,
                     polite=0.1, rude=0.05, rambles=0.05),
}


def demonstrate(rng: Random, held_out: bool) -> Demonstration:
    """A labeler draws a prompt and writes the reply that a model should give."""
    prompt, kind, source = draw_prompt(rng, held_out)
    labeler = rng.choice(list(LABELERS))
    reply = toy_corpus.speak(toy.understand(prompt), LABELERS[labeler], rng)
    return Demonstration(prompt, reply, kind, source, labeler)


# ---- 3. Rankings -------------------------------------------------------------


def rank(prompt: str, replies: list[str], kind: str, rng: Random,
         temperature: float = 1.0) -> list[int]:
    """The rank of each of K replies by their true utilities, 1 for the best: (K,)."""
    return rank_by([toy.truth(prompt, reply, kind) / temperature for reply in replies], rng)


def rank_by(utilities: list[float], rng: Random) -> list[int]:
    """The rank of each of K utilities in nats, 1 for the best: (K,).

    Each utility gets noise of its own, drawn from a Gumbel distribution, and the noisy utilities
    are sorted. The difference of two Gumbel variables has a logistic distribution. So each pair is
    ordered as crowdworkers would choose (toy.preference): Bradley-Terry, with odds of
    exp(difference of the utilities). A labeler whose noise were drawn for each pair could
    contradict itself; this one cannot."""
    noisy = []
    for utility in utilities:
        gumbel = -math.log(-math.log(max(rng.random(), 1e-300)))
        noisy.append(utility + gumbel)
    order = sorted(range(len(utilities)), key=lambda k: -noisy[k])
    ranks = [0] * len(utilities)
    for place, k in enumerate(order, start=1):
        ranks[k] = place
    return ranks
