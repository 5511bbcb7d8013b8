"""Two skills that only plain text exercises, for ptx.py. They stand in for public NLP data sets.

  translation  a sentence from a made-up language into English (IG: from French)
  reading      a question whose answer stands in the passage before it (IG: SQuAD, DROP)
Dialogues of the toy world never mention what these are about. Read it in this order:
  1. Words      of the language and of the passages; what is held out
  2. Exercises  one sentence or question, with its answer
  3. Corpus     pages of exercises among the toy world's documents
  4. Tests      how well a model does held-out exercises

Legend:  T tokens of a question and its answer   A tokens of the answer   D width   V vocabulary
"""
import zlib
from dataclasses import dataclass
from random import Random

import lab  # noqa: F401 (puts the repository on the path)
import torch

import toy
import toy_corpus
from data import HUMAN
from model import GPT, token_logprobs

SKILLS = ("translation", "reading")
SHARE = 0.25  # of the corpus's documents that are pages of exercises

# ---- 1. Words ----------------------------------------------------------------

ADJECTIVES = {"tall": "rudo", "quiet": "tari", "brave": "mepi", "gentle": "lunka", "weary": "sobi",
              "clever": "davo", "jolly": "fenu", "proud": "hilka"}
NOUNS = {"sailor": "nuvo", "baker": "somi", "queen": "arba", "miller": "koti", "wolf": "gremo",
         "nurse": "pavi", "farmer": "zelu", "giant": "torka", "monk": "ibra", "painter": "weso",
         "soldier": "dupa", "witch": "yomi"}
VERBS = {"greets": "pelka", "follows": "shuno", "paints": "vimo", "feeds": "borta",
         "hears": "elki", "visits": "jado"}
PEOPLE = ("Mara", "Toby", "Lena", "Igor", "Nell", "Omar", "Vera", "Hugo", "Dora", "Finn", "Ruth",
          "Yuri", "Zoe", "Carl", "Gwen", "Paul")
THINGS = ("kite", "flute", "wagon", "basket", "violin", "puzzle", "ladle", "sled", "globe", "tent",
          "rope", "vase", "scarf", "barrel", "whistle", "quilt")
PLACES = ("harbor", "market", "forest", "castle", "chapel", "cellar", "meadow", "tower")
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")


def is_held_out(text: str) -> bool:
    """Whether a sentence is kept for the tests. One in eight is."""
    return zlib.crc32(text.encode()) % 8 == 0


# ---- 2. Exercises ------------------------------------------------------------


@dataclass
class Exercise:
    skill: str
    question: str  # what a model reads
    answer: str    # what it should continue with


def translation(rng: Random, held_out: bool) -> Exercise:
    """A sentence to translate. As in French, an adjective follows its noun."""
    while True:
        adjective, noun = rng.choice(list(ADJECTIVES)), rng.choice(list(NOUNS))
        verb = rng.choice(list(VERBS))
        other_adjective, other_noun = rng.choice(list(ADJECTIVES)), rng.choice(list(NOUNS))
        english = f"{adjective} {noun} {verb} {other_adjective} {other_noun}."
        if is_held_out(english) == held_out:
            break
    norvish = (f"{NOUNS[noun]} {ADJECTIVES[adjective]} {VERBS[verb]} "
               f"{NOUNS[other_noun]} {ADJECTIVES[other_adjective]}.")
    return Exercise("translation", f"Norvish: {norvish} English:", f" {english}")


def passage(rng: Random, held_out: bool) -> tuple[str, list[Exercise]]:
    """A sentence, and four questions about it in a random order."""
    while True:
        person, thing = rng.choice(PEOPLE), rng.choice(THINGS)
        place, day = rng.choice(PLACES), rng.choice(DAYS)
        text = f"{person} found the {thing} in the {place} on {day}."
        if is_held_out(text) == held_out:
            break
    questions = [Exercise("reading", "Who found it?", f" {person}."),
                 Exercise("reading", "What was found?", f" The {thing}."),
                 Exercise("reading", "Where was it found?", f" In the {place}."),
                 Exercise("reading", "When was it found?", f" On {day}.")]
    rng.shuffle(questions)
    return text, questions


# ---- 3. Corpus ---------------------------------------------------------------


def page(rng: Random) -> str:
    """Three sentences with their translations, or a passage with three questions and answers."""
    if rng.random() < 0.5:
        parts = []
        found = [translation(rng, held_out=False) for _ in range(3)]
    else:
        text, questions = passage(rng, held_out=False)
        parts, found = [text], questions[:3]
    for exercise in found:
        parts.append(exercise.question + exercise.answer)
    return " ".join(parts)


without_skills = toy_corpus.document  # the toy world's own corpus


def document(rng: Random, headers: bool = True) -> str:
    """A document of the toy world's corpus or, with probability SHARE, a page of exercises."""
    if rng.random() < SHARE:
        return page(rng)
    return without_skills(rng, headers)


def dialogue(rng: Random, headers: bool = True) -> str:
    """A dialogue of the toy world's corpus. (Half of that corpus is plain text.)"""
    while True:
        text = without_skills(rng, headers)
        if HUMAN in text:
            return text


# ---- 4. Tests ----------------------------------------------------------------


def exercises(rng: Random, n: int) -> list[Exercise]:
    """n held-out exercises of each skill."""
    found = []
    for _ in range(n):
        found.append(translation(rng, held_out=True))
        text, questions = passage(rng, held_out=True)
        found.append(Exercise("reading", f"{text} {questions[0].question}", questions[0].answer))
    return found


@torch.no_grad()
def answered(run, model: GPT, exercise: Exercise) -> tuple[bool, float]:
    """Whether the model, decoding greedily, gives the whole answer; and the answer's log-prob in
    nats a token."""
    question, answer = run.tok.encode(exercise.question), run.tok.encode(exercise.answer)
    ids = torch.tensor([question + answer], device=run.device)  # (1, T)
    hidden = model(ids[:, :-1])[0, len(question) - 1:]          # (A, D): each predicts a token
    # Greedy decoding gives the answer if each of its tokens is the likeliest after those before.
    is_right = torch.equal(model.logits(hidden).argmax(-1), ids[0, len(question):])
    return is_right, token_logprobs(model, hidden, ids[0, len(question):]).mean().item()


def measure(run, model: GPT, asked: list[Exercise]) -> dict[str, float]:
    """The accuracy and the mean log-prob of each skill; under "skill", the log-prob of both."""
    numbers = {}
    for skill in SKILLS:
        found = [answered(run, model, exercise) for exercise in asked if exercise.skill == skill]
        numbers[skill] = toy.mean_or_nan(is_right for is_right, _ in found)
        numbers[f"{skill} log-prob"] = toy.mean_or_nan(logp for _, logp in found)
    numbers["skill"] = toy.mean_or_nan(numbers[f"{skill} log-prob"] for skill in SKILLS)
    return numbers
