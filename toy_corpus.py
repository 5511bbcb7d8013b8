"""What is written in the toy world: assistants' replies, documents, prompts and forum posts.

`toy.py` holds the world itself and judges what is said; `toy_people.py` says what people ask. Read
it in this order:

  1. Personas               kinds of assistant, and the headers that describe them
  2. Replies                `speak`: one reply of an assistant, right or wrong, polite or rude
  3. The corpus             `document`: what the language model is pretrained on
  4. Prompts and upvotes    `draw_prompt` for evaluation; `upvoted` answers on a forum

Legend:
  rng       the only source of randomness: equal generators draw equal texts
  kind      "helpful" or "harmless" (red-teaming): which of the two data sets a prompt belongs to
  held out  kept for evaluation, never shown in training
Papers: HH = Bai et al. 2022 (a § or Fig. without a name is in HH), GL = Askell et al. 2021 (arXiv
2112.00861).
"""
import math
from dataclasses import dataclass
from random import Random

from data import ASSISTANT, HUMAN, Comparison
from toy import (ALTERNATIVES, APOLOGY, CLOSERS, EVASIONS, HELLO, OFFER, OPENERS, RAMBLE, REASONS,
                 REFUSALS, RUDE, WELCOME, Request, judge, understand)
from toy_people import HELPFUL_SKILLS, TEXTBOOK_SKILLS, ask, next_question, next_turn, remark, typed

# ---- 1. Personas -------------------------------------------------------------


@dataclass(frozen=True)
class Persona:
    """How an assistant behaves in one reply. Each field is a probability."""
    right: float      # probability that an answer is right
    complies: float   # that a harmful request is not refused
    refuses: float    # that a benign request is refused
    offers: float     # that a refusal with a reason goes on to offer something else
    evades: float     # that a reply without a refusal gives no answer either
    polite: float     # that an answer comes with a courtesy
    rude: float       # that the reply contains a rude sentence
    rambles: float    # that the reply contains one or two rambling sentences


KIND = Persona(right=0.70, complies=0.55, refuses=0.10, offers=0.15, evades=0.05,
               polite=0.6, rude=0.0, rambles=0.08)
PLAIN = Persona(right=0.62, complies=0.70, refuses=0.10, offers=0.0, evades=0.10,
                polite=0.2, rude=0.05, rambles=0.2)
SLOPPY = Persona(right=0.45, complies=0.95, refuses=0.05, offers=0.0, evades=0.15,
                 polite=0.05, rude=0.3, rambles=0.3)
PERFECT = Persona(right=1.0, complies=0.0, refuses=0.0, offers=0.0, evades=0.0,
                  polite=0.5, rude=0.0, rambles=0.0)

# A header describes the assistant of a document. Because behavior follows the header there, a
# language model learns to behave as the header before a dialogue says (GL §2).
HHH_HEADER = "Below are conversations between people and a helpful, honest and harmless assistant."
HEADERS = (
    (KIND, HHH_HEADER),
    (KIND, "The assistant in this conversation is kind and careful. "
           "It tries to help and not to hurt."),
    (SLOPPY, "Below is a conversation with a careless assistant. It does whatever it is told."),
    (SLOPPY, "The assistant in this conversation is tired and does not care."),
)
GREETING = f"{HUMAN} Hello.{ASSISTANT} {HELLO} {OFFER}"

# ---- 2. Replies --------------------------------------------------------------


def _beside_the_point(request: Request, rng: Random) -> str:
    """A true statement about something that was not asked."""
    others = [name for name in HELPFUL_SKILLS if name != request.skill.name]
    _, other = ask(rng, rng.choice(others))
    return other.statement(other.answer)


def _answer(request: Request, right: bool, rng: Random) -> str:
    """An answer, as a whole sentence or bare. A wrong answer is sometimes a true statement about
    something that was not asked. Without such data a PM learns to reward true statements that do
    not answer, and PPO exploits it."""
    if right:
        answer = request.answer
    elif rng.random() < 0.15:
        return _beside_the_point(request, rng)
    else:
        answer = rng.choice(request.wrong_answers())
    if rng.random() < 0.6:
        return request.statement(answer)
    return answer[0].upper() + answer[1:] + "."


def speak(request: Request, persona: Persona, rng: Random) -> str:
    """Draw one reply to a request, with the leading space of the HH format."""
    sentences = []
    p_refuse = 1 - persona.complies if request.harmful else persona.refuses
    if rng.random() < p_refuse:
        sentences.append(rng.choice(REFUSALS))
        if rng.random() < 0.5:
            sentences.append(rng.choice(REASONS))
            if rng.random() < persona.offers:
                sentences.append(rng.choice(ALTERNATIVES))
    elif rng.random() < persona.evades:
        sentences.append(rng.choice(EVASIONS))
    else:
        right = rng.random() < persona.right
        sentences.append(_answer(request, right, rng))
        if rng.random() < persona.polite:
            opener, closer = rng.choice(OPENERS), rng.choice(CLOSERS)
            if rng.choice(("opener", "closer")) == "opener":
                sentences.insert(0, opener)
            else:
                sentences.append(closer)
    if rng.random() < persona.rude:
        place = rng.randrange(2)  # before or after the first sentence
        sentences.insert(place, rng.choice(RUDE))
    if rng.random() < persona.rambles:
        place = rng.randrange(2)
        how_many = rng.randint(1, 2)
        sentences[place:place] = rng.sample(RAMBLE, how_many)
    return " " + " ".join(sentences)


# ---- 3. The corpus -----------------------------------------------------------


def _textbook_page(rng: Random) -> str:
    """Three to six true facts, which dialogues teach badly: assistants there are often wrong."""
    statements = []
    for _ in range(rng.randint(3, 6)):
        _, request = next_question(rng, "helpful", before=None, from_held_out=False,
                                    skill_weights=TEXTBOOK_SKILLS)
        statements.append(request.statement(request.answer))
    return " ".join(statements)


def _quiz_page(rng: Random) -> str:
    """Three to six questions, each with an answer and the verdict "Right." or "Wrong.". They teach
    a language model to tell a right answer from a wrong one."""
    sentences = []
    for _ in range(rng.randint(3, 6)):
        question, request = next_question(rng, "helpful", before=None, from_held_out=False,
                                           skill_weights=TEXTBOOK_SKILLS)
        right = rng.random() < 0.5
        sentences.append(question)
        sentences.append(_answer(request, right, rng))
        sentences.append("Right." if right else "Wrong.")
    return " ".join(sentences)


def open_dialogue(rng: Random, kind: str, held_out: bool) -> str:
    """Draw a prompt with one question, sometimes after a greeting."""
    greeting = GREETING if rng.random() < 0.1 else ""
    question, _ = next_question(rng, kind, before=None, from_held_out=held_out)
    return f"{greeting}{HUMAN} {typed(rng, question)}{ASSISTANT}"


def _dialogue(rng: Random, headers: bool) -> str:
    """One to four exchanges, sometimes after a header, and often a last remark."""
    text, persona = "", rng.choice((KIND, PLAIN, PLAIN, SLOPPY))
    if headers and rng.random() < 0.3:
        persona, text = rng.choice(HEADERS)
    kind = "harmless" if rng.random() < 0.25 else "helpful"
    prompt = text + open_dialogue(rng, kind, held_out=False)
    reply = speak(understand(prompt), persona, rng)
    for _ in range(rng.choice((0, 0, 0, 1, 1, 3))):  # further exchanges
        turn = next_turn(rng, prompt, reply, kind, held_out=False)
        prompt = f"{prompt}{reply}{HUMAN} {turn}{ASSISTANT}"
        reply = speak(understand(prompt), persona, rng)
    text = prompt + reply
    if rng.random() < 0.8:
        found = judge(prompt, reply)
        answer = WELCOME if found.correct else APOLOGY
        text += f"{HUMAN} {remark(rng, found, kind)}{ASSISTANT} {answer}"
    return text


def document(rng: Random, headers: bool = True) -> str:
    """Draw one document of the pretraining corpus: a page of plain text or a dialogue. With
    `headers`, three dialogues in ten open with a text that describes the assistant."""
    is_plain_text = rng.random() < 0.5
    if not is_plain_text:
        return _dialogue(rng, headers)
    is_quiz = rng.random() < 0.75
    return _quiz_page(rng) if is_quiz else _textbook_page(rng)


# ---- 4. Prompts and upvotes --------------------------------------------------


def draw_prompt(rng: Random, kind: str, held_out: bool) -> str:
    """Draw a prompt of one to three human turns that ends with an open assistant turn.

    kind: "helpful" or "harmless" (red-teaming). held_out: whether its questions are those that are
    kept for evaluation. Four in ten prompts have an earlier exchange, in which the assistant is as
    good as KIND."""
    prompt = open_dialogue(rng, kind, held_out)
    if rng.random() < 0.4:
        reply = speak(understand(prompt), KIND, rng)
        turn = next_turn(rng, prompt, reply, kind, held_out)
        prompt = f"{prompt}{reply}{HUMAN} {turn}{ASSISTANT}"
    return prompt


# A forum words its questions in its own way, so no post equals a crowdworker's prompt.
FORUM_TEMPLATES = ("Can anyone help? {}", "A quick one: {}", "Asked by a friend: {}",
                   "Question of the day: {}")


def _votes(prompt: str, reply: str) -> float:
    """The log-odds, up to a constant, that readers of a forum vote for this reply. It is a biased
    stand-in for helpfulness: friendly and long answers gain about as much as right ones."""
    found = judge(prompt, reply)
    votes = 0.0
    if found.correct:
        votes += 1.5
    if found.wrong:
        votes -= 0.5
    if found.polite > 0:
        votes += 1.0
    votes -= 1.0 * found.rude
    votes += 0.05 * len(reply.split())
    return votes


def upvoted(rng: Random, held_out: bool = False) -> Comparison:
    """Draw two answers to one question on a forum, with the more upvoted one as `chosen`. These are
    the cheap comparisons of preference-model pretraining (GL §4).

    They differ from crowdworkers' comparisons in three ways: the questions have the forum's own
    wording and never ask for harm, the replies are not those of a language model, and upvotes are
    noisier than crowdworkers and biased (see `_votes`). held_out: as in `draw_prompt`."""
    question, request = next_question(rng, "helpful", before=None, from_held_out=held_out)
    post = rng.choice(FORUM_TEMPLATES).format(question)
    while True:
        a = speak(request, rng.choice((KIND, PLAIN, SLOPPY)), rng)
        b = speak(request, rng.choice((KIND, PLAIN, SLOPPY)), rng)
        if a != b:
            break

    prompt = f"{HUMAN} {question}{ASSISTANT}"  # the toy's judge does not know the forum's wording
    p = 1 / (1 + math.exp(_votes(prompt, b) - _votes(prompt, a)))  # that a has more upvotes
    posted = f"{HUMAN} {post}{ASSISTANT}"
    if rng.random() < p:
        return Comparison(posted, chosen=a, rejected=b, kind="helpful", p_chosen=p)
    return Comparison(posted, chosen=b, rejected=a, kind="helpful", p_chosen=1 - p)
