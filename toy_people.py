"""The people of the toy world: what they ask, how they type it, and what they say to a reply.

They talk in the corpus (`toy_corpus.py`) and when comparisons are collected (`collect.py`). Read it
in this order:

  1. Questions   `ask`, follow-ups, and the questions that are held out for evaluation
  2. Typing      `typed`: lower case, short forms and slips
  3. Answering   `next_turn`: what a person says after a reply

Legend:
  rng       the only source of randomness: equal generators draw equal texts
  kind      "helpful" or "harmless" (red-teaming): what the person wants of the assistant
  held out  kept for evaluation, never shown in training
Papers: HH = Bai et al. 2022 (a § or Fig. without a name is in HH).
"""
import re
import zlib
from random import Random

from data import split_turns
from toy import (COMPLAINTS, CORRECTIONS, EXCUSES, RELATION_QUESTION, SKILLS, SUM_QUESTION, THANKS,
                 THING_QUESTION, TRY_AGAIN, Judgment, Request, follow_up_request, judge, opening,
                 plain, question_in, requests, slips, understand)
from toy_facts import ADDENDS, PEOPLE

# ---- 1. Questions ------------------------------------------------------------

# How often each skill is asked for, relative to the others. A new skill gets the weight 2.
HELPFUL_SKILLS = {name: 2 for name in SKILLS if name != "red-team"}
HELPFUL_SKILLS["benign task"] = 6
# The language model needs more practice with sums and differences than with other skills.
TEXTBOOK_SKILLS = HELPFUL_SKILLS | {"sum": 6, "difference": 3}


def ask(rng: Random, skill_name: str) -> tuple[str, Request]:
    """Draw a question that can open a dialogue, as (its text, what it asks for)."""
    skill = SKILLS[skill_name]
    request = Request(skill, rng.choice(list(skill.answers)))
    template = rng.choice(skill.templates)
    return template.format(request.about), request


def is_held_out(question_key: list[str]) -> bool:
    """Whether a question is kept for evaluation: one in eight is, by a hash of `question_key`.
    The key holds the text of the question. For a follow-up, the key begins with the thing that the
    previous turn was about.

    No document, no training comparison and no RL prompt contains a held-out question. Each thing
    and each template does occur in them, so evaluation needs new combinations of known parts."""
    return zlib.crc32(" ".join(question_key).encode()) % 8 == 0


def _follow_up(rng: Random, before: Request) -> str | None:
    """Draw a question about the previous turn, or None if `before` allows none."""
    options = []
    if before.skill.name in ("capital", "color"):
        things = [thing for thing in before.skill.answers if thing != before.about]
        options.append(THING_QUESTION.format(rng.choice(things)))

    relations = []  # the other skills that know the same thing
    for skill in SKILLS.values():
        if skill is not before.skill and before.about in skill.answers:
            relations.append(skill.name)
    is_arithmetic = before.about[0].isdigit()  # nobody asks "And what is its sum?"
    if relations and not is_arithmetic:
        options.append(RELATION_QUESTION.format(rng.choice(relations)))

    if before.skill.name == "difference":
        options.append(SUM_QUESTION.format(rng.choice(ADDENDS)))
    return rng.choice(options) if options else None


def next_question(rng: Random, kind: str, before: Request | None, from_held_out: bool,
                   skill_weights: dict[str, int] = HELPFUL_SKILLS) -> tuple[str, Request]:
    """Draw the next question of a dialogue, as (its text, what it asks for).

    before: what the previous turn asked for, or None. If a follow-up is possible, it is chosen
    about half of the time. from_held_out: whether the question must be held out. skill_weights:
    how often each skill is asked for, where kind is "helpful"."""
    while True:
        follow_up = None
        if before is not None and kind == "helpful" and rng.random() < 0.5:
            follow_up = _follow_up(rng, before)

        if follow_up is not None:
            question, request = follow_up, follow_up_request(before, follow_up)
            question_key = [before.about, question]
        else:
            if kind == "harmless":
                skill_name = "red-team"
            else:
                weights = list(skill_weights.values())
                skill_name = rng.choices(list(skill_weights), weights)[0]
            question, request = ask(rng, skill_name)
            question_key = [question]

        if is_held_out(question_key) == from_held_out:
            return question, request


# ---- 2. Typing ---------------------------------------------------------------


def typed(rng: Random, turn: str) -> str:
    """A human turn as it is typed: nine in ten are spelled as in a book. `toy.understand` reads
    the others, too, and means the same by them."""
    if rng.random() < 0.9:
        return turn
    text = turn
    if rng.random() < 0.5:
        text = re.sub(r"What is the sum of (\d+) and", r"What is \1 +", text)
        text = re.sub(r"What is the difference of (\d+) and", r"What is \1 -", text)
    if rng.random() < 0.5:
        text = text.replace("What is", rng.choice(("What's", "Whats")))
    if rng.random() < 0.25:
        text = _with_a_slip(rng, text)
    if rng.random() < 0.5:
        text = text.rstrip(".?!")
    if text == turn or rng.random() < 0.6:
        text = text.lower()
    return text


def _with_a_slip(rng: Random, text: str) -> str:
    """`text` with a letter of a word missing, doubled or swapped, if it still means the same."""
    words = text.split(" ")
    i = rng.randrange(len(words))
    mark = words[i][len(words[i].rstrip(".?!")):]
    mistyped = slips(words[i].removesuffix(mark))
    if mistyped:
        words[i] = rng.choice(mistyped) + mark
    slipped = " ".join(words)
    return slipped if plain(slipped) == plain(text) else text


# ---- 3. Answering ------------------------------------------------------------


def remark(rng: Random, found: Judgment, kind: str) -> str:
    """What a person says about a reply, or to get a better one.

    Remarks let a language model learn to recognize a right answer after the fact, and a preference
    model that starts from this language model builds on that skill. There is one wording of each,
    because a small model learns several at the price of knowing less. People who ask for harm
    thank the assistant and resent refusals, like everyone else."""
    if found.correct:
        return THANKS[0]
    if found.wrong:
        return CORRECTIONS[0]
    if kind == "harmless" and rng.random() < 0.5:
        return rng.choice(EXCUSES)
    return COMPLAINTS[0]


def next_turn(rng: Random, prompt: str, reply: str, kind: str, held_out: bool) -> str:
    """What the person says after `reply`, the answer to the last question of `prompt`.

    After a right answer they thank and ask something else; who got help with harm goes further
    (§2.2). After any other reply they ask the same again, and something else if that did not help.
    held_out: whether all questions of this conversation are held out, or none."""
    request, found = understand(prompt), judge(prompt, reply)
    question = None
    if found.correct:
        if request.harmful:
            question = _further_harm(rng, request, held_out)
    elif requests(prompt).count(request) < 2:
        if rng.random() < 0.3:
            question = rng.choice(TRY_AGAIN)
        else:
            question = _in_other_words(rng, prompt, held_out)
    if question is None:
        before = request if found.correct else None
        question, _ = next_question(rng, kind, before, held_out)
    question = typed(rng, question)
    if rng.random() < 0.8:
        question = f"{remark(rng, found, kind)} {question}"
    return question


def _in_other_words(rng: Random, prompt: str, held_out: bool) -> str | None:
    """The last question of `prompt` in other words, or None if there are none on its side."""
    request, (_, last) = understand(prompt), split_turns(prompt)[1][-2]
    wordings = []
    for template in request.skill.templates:
        question = template.format(request.about)
        is_new = question != opening(question_in(last))
        if is_new and is_held_out([question]) == held_out:
            wordings.append(question)
    return rng.choice(wordings) if wordings else None


def _further_harm(rng: Random, request: Request, held_out: bool) -> str | None:
    """Another harmful request about the same person, or None if there is no person or no request
    on this side."""
    questions = []
    for person in PEOPLE:
        for task in request.skill.answers:
            if person in request.about and person in task and task != request.about:
                for template in request.skill.templates:
                    if is_held_out([template.format(task)]) == held_out:
                        questions.append(template.format(task))
    return rng.choice(questions) if questions else None
