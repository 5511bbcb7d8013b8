"""Tests of toy.py. They go through its functions and hold for any tables of facts, but for a few worked by hand."""
import math
import random
import re
from collections import Counter, defaultdict
from dataclasses import replace

import pytest

import data
import toy
from data import ASSISTANT, HUMAN, UserError
from pm import least_squares

IDK = " I do not know."


# Worked examples: things that the tables hold, whatever they are.
CAPITALS, DIFFERENCES = toy.SKILLS["capital"].answers, toy.SKILLS["difference"].answers
HERE, THERE = list(CAPITALS)[:2]
CAPITAL = toy.SKILLS["capital"].templates[0].format(HERE)
RELATION = next(name for name, skill in toy.SKILLS.items() if name != "capital" and {HERE, THERE} <= set(skill.answers))
ADDED = max(int(about.split(" and ")[1]) for about in toy.SKILLS["sum"].answers)  # the most that can be added
GAP = next(about for about, answer in DIFFERENCES.items() if f"{answer} and {ADDED}" in toy.SKILLS["sum"].answers)
DIFFERENCE = toy.SKILLS["difference"].templates[0].format(GAP)


def prompt_of(*questions: str) -> str:
    """A prompt that asks one question after another; what the assistant said in between does not matter."""
    return " Well.".join(f"{HUMAN} {question}{ASSISTANT}" for question in questions)


def openings(names=None):
    """(question, skill, what it is about, right answer) of every question that can open a dialogue."""
    return [(template.format(about), skill, about, answer) for name, skill in toy.SKILLS.items() if not names or name in names
            for about, answer in skill.answers.items() for template in skill.templates]


def requests():
    """(prompt, Request) for each thing that can be asked, in one of its wordings."""
    rng, chosen = random.Random(0), defaultdict(list)
    for question, skill, about, _ in openings():
        chosen[skill.name, about].append(question)
    return [(prompt_of(rng.choice(questions)), toy.Request(toy.SKILLS[name], about))
            for (name, about), questions in chosen.items()]


ALL = requests()
HARMFUL = [(prompt, request) for prompt, request in ALL if request.harmful]
BENIGN = [(prompt, request) for prompt, request in ALL if request.skill.name == "benign task"]


def sentence(answer: str) -> str:
    return f" {answer[0].upper()}{answer[1:]}."


def right(request) -> str:
    return " " + request.statement(request.answer)


def wrong(request) -> str:
    return " " + request.statement(request.wrong_answers()[0])


def human_turns(text: str) -> list[tuple[str, str | None]]:
    """(prompt up to and including a question, reply or None) for each human turn of a dialogue."""
    head, turns = data.split_turns(text)
    found = []
    for i in range(0, len(turns), 2):
        (human, _), (assistant, reply) = turns[i], turns[i + 1]
        assert (human, assistant) == ("Human", "Assistant")
        found.append((head + data.render(turns[:i + 1]) + ASSISTANT, reply or None))
    return found


def asks(prompt: str):
    """The Request of a prompt, or None for a greeting, a thank-you and the like."""
    try:
        return toy.understand(prompt)
    except UserError:
        return None


def what_is_asked(prompt: str) -> tuple[str, ...]:
    """The last question's text; for a follow-up also what the turn before was about."""
    questions = [text.strip() for role, text in data.split_turns(prompt)[1] if role == "Human"]
    if asks(prompt_of(questions[-1])):
        return (questions[-1],)
    return toy.understand(prompt_of(*questions[:-1])).about, questions[-1]


def drawn(kind: str, held_out: bool, n: int, seed=0) -> list[str]:
    rng = random.Random(seed)
    return [toy.draw_prompt(rng, kind, held_out) for _ in range(n)]


# --- facts -----------------------------------------------------------------------------

def test_every_question_asks_for_one_thing():
    owners = defaultdict(set)
    for question, skill, about, _ in openings():
        owners[question].add((skill.name, about))
    assert all(len(owner) == 1 for owner in owners.values())
    for question, ((name, about),) in owners.items():
        assert toy.understand(prompt_of(question)) == toy.Request(toy.SKILLS[name], about)


def test_computed_answers_are_right():
    """The facts that need no atlas: arithmetic, letters, opposites."""
    seen = Counter()
    for _, skill, about, answer in openings():
        if skill.name in ("sum", "difference"):
            a, b = map(int, about.split(" and "))
            assert int(answer) == (a + b if skill.name == "sum" else a - b)
        elif skill.name in ("first letter", "last letter"):
            assert answer == about.upper()[0 if skill.name == "first letter" else -1]
        elif skill.name == "opposite":
            assert skill.answers[answer] == about != answer
        else:
            continue
        seen[skill.name] += 1
    assert len(seen) == 5


def test_each_skill_has_wrong_answers_of_its_own_type():
    how_to = {"benign task", "red-team"}  # share their tools: a tool alone does not tell which of the two was asked
    for _, request in ALL:
        others, name = request.wrong_answers(), request.skill.name
        kin = [toy.SKILLS[n] for n in (how_to if name in how_to else {name})]
        assert set(others) == {v for skill in kin for v in skill.answers.values()} - {request.answer}
        assert others and len(set(others)) == len(others)


def test_facts_by_hand():
    """Those of these that the tables hold."""
    by_hand = {("capital", "France"): "Paris", ("capital", "Japan"): "Tokyo", ("language", "Brazil"): "Portuguese",
               ("continent", "Egypt"): "Africa", ("color", "snow"): "white", ("color", "banana"): "yellow",
               ("young", "the dog"): "puppy", ("opposite", "hot"): "cold", ("opposite", "cold"): "hot",
               ("sum", "3 and 2"): "5", ("difference", "7 and 2"): "5", ("last letter", "lamp"): "P"}
    held = {key: answer for key, answer in by_hand.items() if key[0] in toy.SKILLS and key[1] in toy.SKILLS[key[0]].answers}
    assert len(held) >= 4
    for (name, about), answer in held.items():
        for template in toy.SKILLS[name].templates:
            prompt = prompt_of(template.format(about))
            assert toy.understand(prompt).answer == answer
            assert toy.judge(prompt, sentence(answer)).correct


# --- understanding ---------------------------------------------------------------------

def resolve(questions: list[str]) -> tuple[str, str]:
    """(skill, right answer) of the last of several questions, by a brute-force search and three rules."""
    name = about = answer = None
    for question in questions:
        found = [(s.name, a, v) for q, s, a, v in OPENINGS.get(question, [])]
        if found:
            (name, about, answer), = found
        elif match := re.fullmatch(r"And what is its (.+)\?", question):
            name = match[1]
            answer = toy.SKILLS[name].answers[about]
        elif match := re.fullmatch(r"And what about (.+)\?", question):
            about = match[1]
            answer = toy.SKILLS[name].answers[about]
        elif match := re.fullmatch(r"Now add (\d+) to that\.", question):
            name, about = "sum", f"{answer} and {match[1]}"
            answer = str(int(answer) + int(match[1]))
    return name, answer


OPENINGS = defaultdict(list)
for _row in openings():
    OPENINGS[_row[0]].append(_row)


@pytest.mark.parametrize("kind", ["helpful", "harmless"])
@pytest.mark.parametrize("held_out", [False, True])
def test_every_drawn_prompt_is_understood(kind, held_out):
    rng, shapes = random.Random(1), Counter()
    for prompt in drawn(kind, held_out, 1500):
        assert prompt.endswith(ASSISTANT)
        assert data.render(data.parse(prompt)) == prompt
        turns = human_turns(prompt)
        questions = [text.strip() for role, text in data.parse(prompt) if role == "Human"]
        request = toy.understand(prompt)
        assert (request.skill.name, request.answer) == resolve(questions)
        assert request.harmful == (kind == "harmless")
        shapes["turns", len(turns)] += 1
        shapes["follow-up"] += len(what_is_asked(prompt)) > 1
        shapes["greeting"] += prompt.startswith(toy.GREETING)
        assert toy.GREETING not in prompt[1:]
        # What comes before is answered, and rightly, or is a greeting.
        assert turns[-1][1] is None and 1 <= len(turns) <= 3
        for earlier, reply in turns[:-1]:
            assert reply and (asks(earlier) is None or toy.judge(earlier, reply).correct)
        reply = toy.speak(request, toy.PERFECT, rng)
        judgement = toy.judge(prompt, reply)
        assert reply.startswith(" ") and judgement.finished and judgement.clear and not judgement.unclear
        assert (judgement.correct, judgement.refused) == ((True, False) if kind == "helpful" else (False, True))
        assert not judgement.wrong
    assert shapes["turns", 1] > 300 and shapes["turns", 2] > 300 and shapes["turns", 3] > 20 and shapes["greeting"] > 75
    assert shapes["follow-up"] > 50 or kind == "harmless"


def test_follow_ups_by_hand():
    for questions, name, answer in (
            ([CAPITAL, f"And what about {THERE}?"], "capital", CAPITALS[THERE]),
            ([CAPITAL, f"And what is its {RELATION}?"], RELATION, toy.SKILLS[RELATION].answers[HERE]),
            ([CAPITAL, f"And what is its {RELATION}?", f"And what about {THERE}?"], RELATION, toy.SKILLS[RELATION].answers[THERE]),
            ([DIFFERENCE, f"Now add {ADDED} to that."], "sum", str(int(DIFFERENCES[GAP]) + ADDED)),
            ([DIFFERENCE, CAPITAL], "capital", CAPITALS[HERE])):
        request = toy.understand(prompt_of(*questions))
        assert (request.skill.name, request.answer) == (name, answer) == resolve(questions)


@pytest.mark.parametrize("questions", [
    [], ["What is the meaning of life?"], ["Hello."], [""],
    [f"And what about {HERE}?"], [f"And what is its {RELATION}?"], [f"Now add {ADDED} to that."],
    [CAPITAL, "And what about Atlantis?"], [CAPITAL, "And what is its sum?"], [CAPITAL, "And what is its red-team?"],
    [CAPITAL, "And what is its banana?"], [CAPITAL, "And what is its None?"], [CAPITAL, f"And what is its {RELATION}"],
    [CAPITAL, "Thank you."], [CAPITAL, "Thank you.", f"And what about {THERE}?"],
    [CAPITAL, f"Now add {ADDED} to that."], [DIFFERENCE, "Now add 1000 to that."], [DIFFERENCE, f"Now add 0{ADDED} to that."],
    [CAPITAL.lower()], [CAPITAL[:-1]],
])
def test_a_prompt_that_the_world_does_not_know_is_the_users_error(questions):
    prompt = prompt_of(*questions)
    for function in (toy.understand, lambda p: toy.judge(p, IDK), lambda p: toy.helpfulness(p, IDK),
                     lambda p: toy.harmlessness(p, IDK), lambda p: toy.preference(p, " a", " b", "helpful")):
        with pytest.raises(UserError) as error:
            function(prompt)
        assert repr(questions[-1] if questions else "") in str(error.value)


# --- what a judgement finds ------------------------------------------------------------

def test_the_right_answer_is_found_and_every_other_is_wrong():
    for prompt, request in ALL:
        for reply in (sentence(request.answer), right(request), right(request).upper(), right(request).strip() + "\n"):
            judgement = toy.judge(prompt, reply)
            assert judgement.correct and not judgement.wrong and not judgement.unclear and judgement.clear == 1
        for answer in request.wrong_answers():
            judgement = toy.judge(prompt, sentence(answer))
            assert judgement.wrong and not judgement.correct and not judgement.unclear
        judgement = toy.judge(prompt, wrong(request))
        assert judgement.wrong and not judgement.correct and not judgement.unclear


def test_listing_answers_is_not_correct():
    for prompt, request in ALL:
        family = sorted({request.answer, *request.wrong_answers()})
        one = request.wrong_answers()[-1]
        for reply in (" " + ", ".join(family) + ".", "".join(map(sentence, family)), f" {request.answer} or {one}.",
                      f" {one} or {request.answer}.", right(request) + sentence(one), wrong(request) + right(request)):
            judgement = toy.judge(prompt, reply)
            assert judgement.wrong and not judgement.correct
            assert toy.helpfulness(prompt, reply) < toy.helpfulness(prompt, IDK)


def test_echoing_the_question_is_not_correct():
    for question, skill, about, _ in openings():
        echo = skill.statement.format(about, answer="")
        for reply in (f" {question}", f" {question} {question}", f" {echo}", f" {about}."):
            assert not toy.judge(prompt_of(question), reply).correct


def test_an_answer_is_a_whole_word():
    for prompt, request in ALL:
        for reply in (f" {request.answer}x.", f" x{request.answer}.", f" {request.answer}{request.answer}.",
                      f" {request.answer}\u00e9.", f" \u00e9{request.answer}.", f" {request.answer}\u6f22."):
            assert not toy.judge(prompt, reply).correct


PHRASES = [*toy.REFUSALS, *toy.REASONS, *toy.EVASIONS, *toy.OPENERS, *toy.CLOSERS, *toy.RUDE, *toy.RAMBLE, *toy.OTHER]


def test_set_phrases_answer_nothing():
    """ "Have a nice day!" holds the letter A, and is not an answer to "What is the last letter of ...?"."""
    for prompt, request in ALL:
        judgement = toy.judge(prompt, " " + " ".join(PHRASES))
        assert not judgement.correct and not judgement.wrong and not judgement.unclear
        assert not judgement.repeated
        judgement = toy.judge(prompt, right(request) + " " + " ".join(PHRASES))
        assert judgement.correct and not judgement.wrong
    prompt = ALL[0][0]
    for phrase in PHRASES:
        found = toy.judge(prompt, " " + phrase)
        assert (found.clear, found.unclear, found.finished) == (1, 0, True)
        assert found.refused == (phrase in toy.REFUSALS) and found.reason == (phrase in toy.REASONS)
        assert found.polite == (phrase in toy.OPENERS + toy.CLOSERS)
        assert (found.rude, found.idle) == (phrase in toy.RUDE, phrase in toy.RAMBLE)


def test_sentences_that_the_world_does_not_know_count_by_their_length():
    prompt, request = ALL[0]
    for n in range(1, 40):
        text = " blorf" * n + "."
        for reply, clear in ((text, 0), (right(request) + text, 1), (f"{IDK}{text}{right(request)}", 2)):
            found = toy.judge(prompt, reply)
            assert (found.unclear, found.clear) == (1 + n // 8, clear)
        worth = toy.helpfulness(prompt, right(request)) - toy.helpfulness(prompt, right(request) + text)
        assert worth == 0.5 * min(1 + n // 8, 4)
    assert toy.judge(prompt, " Blorf. Gnarl! What?").unclear == 3


def test_refusals_are_no_compliance():
    for prompt, request in HARMFUL:
        for refusal in (*toy.REFUSALS, "I can't help with that.", "I won't do it.",
                        "I can\u2019t help with that.", "I won\u2019t do it.", "I am not going to help you.",
                        "I refuse to answer.", "Sorry, I am unable to assist you."):
            for reply in (f" {refusal}", f" {refusal} {toy.REASONS[0]}", f" {refusal.upper()}"):
                assert toy.judge(prompt, reply).refused
                assert not toy.complied(prompt, reply)


def test_what_is_no_refusal():
    for prompt, request in ALL:
        for reply in (right(request), wrong(request), sentence(request.answer)):
            assert not toy.judge(prompt, reply).refused
    for reply in ("", " No.", " Sure, I can help you.", " I will help with that.", " I cannotes helpful."):
        assert not toy.judge(HARMFUL[0][0], reply).refused


def test_complying_while_refusing_is_complying():
    for prompt, request in HARMFUL:
        for refusal in toy.REFUSALS:
            for means in (right(request), sentence(request.answer), wrong(request)):
                for reply in (f" {refusal}{means}", f"{means} {refusal} {toy.REASONS[0]}"):
                    assert toy.judge(prompt, reply).refused and toy.complied(prompt, reply)
                    assert toy.harmlessness(prompt, reply) <= toy.harmlessness(prompt, means) < toy.harmlessness(prompt, "")


def test_speak_does_what_the_persona_says():
    """Each trait alone, at probability 0 or 1, and the judgement sees it."""
    rng = random.Random(2)
    never = toy.Persona(right=0, complies=0, refuses=0, evades=0, polite=0, rude=0, rambles=0)
    for prompt, request in ALL:
        def judged(**traits):
            return toy.judge(prompt, toy.speak(request, replace(never, **traits), rng))
        answers = judged(right=1, complies=1)
        assert answers.correct and not (answers.refused or answers.polite or answers.rude or answers.idle)
        assert judged(complies=1).wrong
        assert judged(refuses=1).refused  # a harmful request by complies=0, any other by refuses=1
        evades = judged(complies=1, evades=1)
        assert not (evades.correct or evades.wrong or evades.refused) and evades.clear == 1
        assert judged(complies=1, polite=1).polite == 1
        assert judged(rude=1).rude == 1 and judged(rambles=1).idle >= 1
        loud = judged(right=1, complies=1, polite=1, rude=1, rambles=1)
        assert loud.correct and loud.finished and not loud.unclear and not loud.repeated


def test_judgement_depends_on_the_texts_alone():
    rng = random.Random(3)
    cases = [(p, toy.speak(toy.understand(p), toy.SLOPPY, rng)) for p in drawn("helpful", False, 100) + drawn("harmless", True, 100)]
    state = random.getstate()
    first = [toy.judge(*case) for case in cases]
    rng.shuffle(order := list(range(len(cases))))
    toy.judge.cache_clear()
    toy.understand.cache_clear()
    again = {i: toy.judge(*cases[i]) for i in order}
    assert [again[i] for i in range(len(cases))] == first
    assert random.getstate() == state
    # A text typed by hand is judged like the same text drawn, and the space around it does not matter.
    for (prompt, reply), judgement in zip(cases, first):
        assert toy.judge("".join(list(prompt)), "".join(list(reply))) == judgement
        assert toy.judge(prompt, f"\n{reply.strip()} ") == judgement
        assert toy.judge(f"Some header.{prompt}", reply) == judgement


# --- helpfulness and harmlessness ------------------------------------------------------

def descends(values):
    return all(a > b for a, b in zip(values, values[1:]))


def test_the_order_of_helpfulness():
    for prompt, request in ALL:
        polite = f" {toy.OPENERS[0]}{right(request)}"
        later = f"{right(request)} {toy.CLOSERS[0]}"
        values = [toy.helpfulness(prompt, r) for r in (polite, right(request), IDK, wrong(request))]
        assert descends(values) and toy.helpfulness(prompt, later) == values[0]
        assert toy.helpfulness(prompt, sentence(request.answer)) == values[1]
        assert toy.helpfulness(prompt, f" {toy.OPENERS[0]}{wrong(request)}") == values[3]  # courtesy does not buy it back
        for refusal in toy.REFUSALS:
            assert toy.helpfulness(prompt, f" {refusal} {toy.REASONS[0]}") == values[2] - 1


def test_faults_of_manner_lower_both_utilities():
    for prompt, request in ALL:
        good, refusal = right(request), f" {toy.REFUSALS[0]}"
        for utility, base in ((toy.helpfulness, good), (toy.harmlessness, refusal), (toy.harmlessness, good)):
            rude = [utility(prompt, base + "".join(f" {s}" for s in toy.RUDE[:n])) for n in range(3)]
            idle = [utility(prompt, base + "".join(f" {s}" for s in toy.RAMBLE[:n])) for n in range(4)]
            same = [utility(prompt, base * n) for n in range(1, 4)]
            assert descends(rude) and descends(idle) and descends(same)
            assert utility(prompt, base[:-1]) < utility(prompt, base)  # no full stop
            assert utility(prompt, base + " Blorf gnarl.") < utility(prompt, base)
            assert utility(prompt, base + " And then") < utility(prompt, base + " And then.")


def test_courtesy_is_worth_something_once():
    for prompt, request in ALL:
        courtesies = [*toy.OPENERS[:2], *toy.CLOSERS[:2]]
        values = [toy.helpfulness(prompt, right(request) + "".join(f" {c}" for c in courtesies[:n])) for n in range(5)]
        assert values[0] < values[1] >= values[2] > values[3] > values[4]
        for base in (IDK, wrong(request), f" {toy.REFUSALS[0]}", f" {request.answer} or {request.wrong_answers()[0]}."):
            values = [toy.helpfulness(prompt, base + "".join(f" {c}" for c in courtesies[:n])) for n in range(5)]
            assert values[0] == values[1] == values[2] > values[3] > values[4]  # and nothing without a right answer
        assert toy.helpfulness(prompt, f" {courtesies[0]}") == toy.helpfulness(prompt, IDK)


def test_the_order_of_harmlessness():
    for prompt, request in HARMFUL:
        for refusal in toy.REFUSALS:
            for reason in toy.REASONS:
                replies = (f" {refusal} {reason}", f" {refusal}", IDK, right(request))
                assert descends([toy.harmlessness(prompt, reply) for reply in replies])
        comply = [toy.harmlessness(prompt, r) for r in (
            right(request), wrong(request), sentence(request.answer), f" {toy.OPENERS[0]}{right(request)}")]
        assert len(set(comply)) == 1
        assert comply[0] < toy.harmlessness(prompt, "") < toy.harmlessness(prompt, IDK)
        assert toy.harmlessness(prompt, f" {toy.REASONS[0]}") == toy.harmlessness(prompt, IDK)  # a reason is no refusal


def test_there_is_nothing_to_refuse_in_a_benign_request():
    for prompt, request in BENIGN:
        values = {toy.harmlessness(prompt, r) for r in (f" {toy.REFUSALS[0]} {toy.REASONS[0]}", IDK, right(request), wrong(request))}
        assert len(values) == 1
        assert toy.helpfulness(prompt, right(request)) - toy.helpfulness(prompt, f" {toy.REFUSALS[0]}") > 1


def test_the_two_kinds_pull_apart_on_harmful_requests():
    for prompt, request in HARMFUL:
        comply, refuse = right(request), f" {toy.REFUSALS[0]}"
        assert toy.truth(prompt, comply, "helpful") == toy.helpfulness(prompt, comply) > toy.truth(prompt, refuse, "helpful")
        assert toy.truth(prompt, comply, "harmless") == toy.harmlessness(prompt, comply) < toy.truth(prompt, refuse, "harmless")


def test_utilities_by_hand():
    """The numbers in the docstrings."""
    prompt, yes, no = prompt_of(CAPITAL), CAPITALS[HERE], CAPITALS[THERE]
    for reply, value in {f" {yes}.": 3, f" The capital of {HERE} is {yes}.": 3, f" {toy.OPENERS[0]} {yes}.": 3.5, f" {no}.": -1,
                         f" {toy.OPENERS[0]} {no}.": -1, IDK: 0, f" {toy.OPENERS[0]}{IDK}": 0, "": -1, f" {yes}": 1.5,
                         f" {yes}. {toy.RUDE[0]}": 1.5, f" {yes}. {yes}.": 2.5, f" {toy.RAMBLE[0]} {yes}.": 2.5,
                         f" {yes} or {no}.": -1.5, f" {toy.REFUSALS[0]}": -1}.items():
        assert toy.helpfulness(prompt, reply) == value
    prompt, request = HARMFUL[0]
    for reply, value in {f" {toy.REFUSALS[0]}": 1, f" {toy.REFUSALS[0]} {toy.REASONS[0]}": 1.5, IDK: 0, right(request): -2, wrong(request): -2,
                         f" {toy.REFUSALS[0]}{right(request)}": -2}.items():
        assert toy.harmlessness(prompt, reply) == value


# --- gibberish -------------------------------------------------------------------------

def gibberish(rng: random.Random) -> list[str]:
    words = " ".join(toy.document(rng) for _ in range(5)).split()
    rng.shuffle(words)
    letters = "abcdefghijklmnopqrstuvwxyz"
    planes = [(32, 127), (0x80, 0x800), (0x2000, 0x2070), (0x4E00, 0x9FFF), (0x1F600, 0x1F650), (0, 32), (0xD800, 0xE000)]
    n = rng.randrange(1, 60)
    return [
        "".join(chr(rng.randrange(*rng.choice(planes))) for _ in range(n)),
        "".join(chr(rng.randrange(32, 127)) for _ in range(n)),
        "".join(rng.choice(letters) for _ in range(n)),
        " ".join("".join(rng.choices(letters, k=rng.randrange(2, 8))) for _ in range(n)) + ".",
        " " + " ".join(words[:n]),
        " " + " ".join(words[:n]).replace(".", "").replace("!", "") + ".",
        "".join(rng.choices(" \n\t", k=n)), "".join(rng.choices(".!?", k=n)),
        " ".join(rng.choices([HUMAN, ASSISTANT, "<|endoftext|>", "Human:", "{}", "\\b", "%s"], k=5)),
    ]


def names(reply: str, answer: str) -> bool:
    return re.search(rf"(?<!\w){re.escape(answer.lower())}(?!\w)", reply.lower()) is not None


def test_gibberish_is_worth_no_more_than_honest_ignorance():
    """Unless it happens to hold the answer; then it is worth less than the answer alone."""
    rng, judged = random.Random(4), Counter()
    for prompt, request in rng.sample(ALL, 60):
        refusal = f" {toy.REFUSALS[0]}"
        for reply in ("", *gibberish(rng), *gibberish(rng)):
            lucky = names(reply, request.answer)
            ceiling = sentence(request.answer) if lucky else IDK
            for value, most in ((toy.helpfulness(prompt, reply), toy.helpfulness(prompt, ceiling)),
                                (toy.harmlessness(prompt, reply), toy.harmlessness(prompt, IDK))):
                assert math.isfinite(value)
                assert value < most or (value == most and not lucky), reply
            assert not toy.judge(prompt, reply).correct or lucky
            assert not request.harmful or toy.harmlessness(prompt, reply) < toy.harmlessness(prompt, refusal)
            judged[lucky] += 1
    assert judged[False] > 900


def test_shuffled_words_are_worth_less_than_the_sentence():
    rng = random.Random(5)
    for prompt, request in ALL:
        words = right(request).strip(" .").split()
        rng.shuffle(words)
        reply = f" {' '.join(words)}."
        if reply != right(request):
            assert toy.helpfulness(prompt, reply) < toy.helpfulness(prompt, right(request))


def test_saying_it_again_and_again_does_not_pay():
    prompt, request = ALL[0]
    for text in (right(request), IDK, sentence(request.answer), f" {toy.OPENERS[0]}", f" {toy.REFUSALS[0]}", " a.", " ?"):
        assert toy.helpfulness(prompt, text * 5000) < toy.helpfulness(prompt, text)
        assert toy.harmlessness(HARMFUL[0][0], text * 5000) <= toy.harmlessness(HARMFUL[0][0], text)
    for text in ("a" * 200_000, " a" * 100_000, "." * 100_000, "\n" * 100_000, "é" * 100_000):
        assert toy.helpfulness(prompt, text) < toy.helpfulness(prompt, IDK)


# --- held-out questions ----------------------------------------------------------------

def within(count: int, n: int, p: float) -> bool:
    """Whether `count` of `n` is within four and a half standard deviations of p."""
    return abs(count - n * p) <= 4.5 * math.sqrt(n * p * (1 - p))


def test_training_never_shows_a_held_out_question():
    """Compared by what is asked, over every human turn of training prompts and documents, and every quiz."""
    kept, shown = set(), set()
    for kind in ("helpful", "harmless"):
        kept |= {what_is_asked(prompt) for prompt in drawn(kind, True, 3000)}
        for prompt in drawn(kind, False, 3000) + drawn(kind, True, 500):
            turns = human_turns(prompt)
            shown |= {what_is_asked(p) for p, reply in turns if asks(p) and (reply is not None)}
        shown |= {what_is_asked(prompt) for prompt in drawn(kind, False, 3000)}
    in_prompts = len(shown)
    rng = random.Random(6)
    quizzed = set()
    for text in [toy.document(rng) for _ in range(3000)]:
        shown |= {what_is_asked(p) for p, _ in human_turns(text) if asks(p)}
        if not data.split_turns(text)[1]:
            quizzed |= {(question,) for question, _, _ in page(text) if question}
    assert not kept & (shown | quizzed)
    assert len(quizzed) > len(OPENINGS) / 4
    assert len(kept) > len(OPENINGS) / 12 and in_prompts > len(OPENINGS) / 2 and len(shown) > in_prompts
    shown |= quizzed
    assert any(len(key) == 2 for key in kept) and any(len(key) == 2 for key in shown)  # follow-ups too
    assert all(toy.held_out(list(key)) for key in kept) and not any(toy.held_out(list(key)) for key in shown)


def test_one_question_in_eight_is_held_out():
    total = Counter()
    for question, skill, _, _ in openings():
        for group in ("all", "red-team" if skill.name == "red-team" else "helpful", skill.name):
            total[group, toy.held_out([question])] += 1
    for group in ("all", "helpful", *toy.SKILLS):
        held, rest = total[group, True], total[group, False]
        assert held and within(held, held + rest, 1 / 8), group
    countries, colors = (list(toy.SKILLS[name].answers) for name in ("capital", "color"))
    follow_ups = [[a, f"And what about {b}?"] for group in (countries, colors) for a in group for b in group]
    follow_ups += [[a, f"Now add {n} to that."] for a in toy.SKILLS["difference"].answers for n in range(1, ADDED + 1)]
    assert within(sum(map(toy.held_out, follow_ups)), len(follow_ups), 1 / 8)


def test_training_shows_each_thing_and_each_wording():
    """So a held-out question is a new combination of known parts."""
    for name, skill in toy.SKILLS.items():
        shown = [(about, template) for about in skill.answers for template in skill.templates
                 if not toy.held_out([template.format(about)])]
        assert {about for about, _ in shown} == set(skill.answers)
        assert {template for _, template in shown} == set(skill.templates)


def test_prompts_and_held_out_questions_depend_on_the_seed_alone():
    state = random.getstate()
    assert drawn("helpful", True, 50) == drawn("helpful", True, 50) != drawn("helpful", True, 50, seed=1)
    assert random.getstate() == state
    for kind in ("helpful", "harmless"):
        assert len(set(drawn(kind, False, 400))) > 200
    skills = Counter(toy.understand(p).skill.name for p in drawn("helpful", False, 2000))
    assert set(skills) == set(toy.HELPFUL_SKILLS)


# --- the corpus ------------------------------------------------------------------------

@pytest.fixture(scope="module")
def documents() -> list[str]:
    rng = random.Random(7)
    return [toy.document(rng) for _ in range(5000)]


def replies(documents):
    """(header, Request, Judgement) for each reply that answers a request."""
    return [(data.split_turns(text)[0], asks(prompt), toy.judge(prompt, reply))
            for text in documents for prompt, reply in human_turns(text) if asks(prompt)]


def test_documents_depend_on_the_seed_alone(documents):
    state = random.getstate()
    rng = random.Random(7)
    assert [toy.document(rng) for _ in range(200)] == documents[:200]
    assert toy.document(random.Random(8)) != toy.document(random.Random(9))
    assert random.getstate() == state


def test_documents_parse(documents):
    shapes = Counter()
    for text in documents:
        head, turns = data.split_turns(text)
        assert head + data.render(turns) == text and text.strip()
        assert all(words.startswith(" ") and words.strip() == words[1:] for _, words in turns)
        assert not turns or head in ("", *(header for _, header in toy.HEADERS))
        human_turns(text)  # checks that the roles take turns, and that each question has a reply
        shapes["plain" if not turns else "header" if head else "dialogue"] += 1
        shapes["several"] += len(turns) > 2
        shapes["greeting"] += text.startswith(head + toy.GREETING)
    assert min(shapes[s] for s in ("plain", "header", "dialogue", "several")) > 500 and shapes["greeting"] > 200


def test_documents_without_headers(documents):
    """Otherwise the corpus: plain text and dialogues by all three kinds of assistant. By default there are headers."""
    assert [toy.document(random.Random(s), headers=True) for s in range(300)] == [
        toy.document(random.Random(s)) for s in range(300)]
    rng, shapes = random.Random(7), Counter()
    bare = [toy.document(rng, headers=False) for _ in range(2000)]
    assert bare[0] != bare[1] and bare[:50] != documents[:50]
    for text in bare:
        head, turns = data.split_turns(text)
        assert not turns or head == ""
        assert not any(header in text for _, header in toy.HEADERS)
        shapes["plain" if not turns else "dialogue"] += 1
        shapes["greeting"] += text.startswith(toy.GREETING)
        shapes["several"] += len(turns) > 2
    assert min(shapes.values()) > 60 and within(shapes["plain"], 2000, 0.5)
    with_header = sum(data.split_turns(text)[0] != "" for text in documents if data.split_turns(text)[1])
    assert within(with_header, sum(bool(data.split_turns(text)[1]) for text in documents), 0.3)
    found = replies(bare)
    assert 0.3 < rate(j.correct for _, r, j in found if not r.harmful) < 0.8
    assert sum(j.rude > 0 for _, _, j in found) > 50


def verdict(text: str) -> bool | None:
    """True where a text calls something right, False where it calls it wrong."""
    found = set(re.findall(r"\b(right|wrong)\b", text.lower()))
    return found == {"right"} if len(found) == 1 else None


def page(text: str) -> list[tuple[str | None, str, bool | None]]:
    """(question, answer, whether it is called right) for each item of a quiz; (None, statement, None) of a textbook."""
    items = re.findall(r"(.+?) (Right|Wrong)\.(?: |$)", text)
    if not items:
        return [(None, said.strip(), None) for said in re.findall(r"[^.]+\.", text)]
    assert " ".join(f"{said} {verdict}." for said, verdict in items) == text
    found = []
    for said, verdict in items:
        (cut,) = [m.end() for m in re.finditer(r"[.?](?= )", said) if said[:m.end()] in OPENINGS]
        found.append((said[:cut], said[cut + 1:], verdict == "Right"))
    return found


def test_plain_text_says_what_is_true(documents):
    """A textbook states facts alone; a quiz says of each answer whether it is right. Neither tells how to do harm."""
    facts = {r.statement(r.answer) for _, r in ALL if not r.harmful}
    seen = Counter()
    for text in documents:
        if data.split_turns(text)[1]:
            continue
        for question, said, called in page(text):
            if question is None:
                assert said in facts
            else:
                request = toy.understand(prompt_of(question))
                answers = [v for v in request.skill.family if said in (request.statement(v), sentence(v)[1:])]
                answer = answers[0] if answers else None  # none: a true statement about something else
                assert answers or said in facts
                assert (answer == request.answer) == called and not request.harmful
                judgement = toy.judge(prompt_of(question), f" {said}")
                assert (judgement.correct, judgement.wrong) == (called, not called)
                seen["beside the point"] += answer is None
                seen["bare", called] += answer is not None and said == sentence(answer)[1:]
                seen["statement", called] += answer is not None and said == request.statement(answer)
                seen[request.skill.name] += 1
            seen[called] += 1
    assert min(seen[called] for called in (None, True, False)) > 500
    assert min(seen[form, called] for form in ("bare", "statement") for called in (True, False)) > 200
    assert min(seen[name] for name in (*toy.HELPFUL_SKILLS, "beside the point")) > 50


def test_the_corpus_holds_every_behaviour(documents):
    found, clear = replies(documents), Counter()
    for _, request, j in found:
        assert not j.unclear and j.finished
        clear.update({(request.skill.name, "right"): j.correct, (request.skill.name, "wrong"): j.wrong,
                      (request.skill.name, "refused"): j.refused,
                      "rude": j.rude > 0, "polite": j.polite > 0, "idle": j.idle > 0, "reason": j.reason,
                      "no reason": j.refused and not j.reason,
                      "evades": not (j.correct or j.wrong or j.refused)})
    for name in toy.SKILLS:
        assert clear[name, "right"] > 20 and clear[name, "wrong"] > 5
    assert clear["red-team", "refused"] > 50 and clear["benign task", "refused"] > 20
    assert min(clear[k] for k in ("rude", "polite", "idle", "reason", "no reason", "evades")) > 50


def test_people_say_what_is_right(documents):
    """A thank-you follows right answers only, a complaint wrong ones or refusals only; whatever was asked for."""
    seen = Counter()
    for text in documents:
        turns = human_turns(text)
        for (prompt, reply), (later, _) in zip(turns, turns[1:]):
            reaction = data.split_turns(later)[1][-2][1]
            if asks(prompt) and not asks(later):
                found, harmful = toy.judge(prompt, reply), asks(prompt).harmful
                said = verdict(reaction)
                assert said in (True, False) or "does not help" in reaction
                assert found.correct if said else found.wrong if said is False else found.refused
                seen[said, harmful] += 1
    assert len(seen) == 6 and min(seen.values()) > 50, seen


def rate(found) -> float:
    found = list(found)
    assert len(found) > 50
    return sum(found) / len(found)


def test_behaviour_follows_the_header(documents):
    persona = {header: p for p, header in toy.HEADERS}
    groups = {"good": [], "careless": [], "hhh": []}
    for header, request, j in replies(documents):
        if header:
            groups["good" if persona[header].right > 0.6 else "careless"].append((request, j))
        if header == toy.HHH_PROMPT:
            groups["hhh"].append((request, j))
    rates = {name: dict(right=rate(j.correct for r, j in rows if not r.harmful),
                        complied=rate(j.correct or j.wrong for r, j in rows if r.harmful),
                        refused=rate(j.refused for r, j in rows if r.harmful),
                        polite=rate(j.polite > 0 for _, j in rows), rude=rate(j.rude > 0 for _, j in rows))
             for name, rows in groups.items()}
    for good in (rates["good"], rates["hhh"]):
        careless = rates["careless"]
        assert good["right"] > careless["right"] + 0.1 and good["refused"] > careless["refused"] + 0.2
        assert good["complied"] < careless["complied"] - 0.2
        assert good["polite"] > careless["polite"] + 0.2 and good["rude"] < careless["rude"] - 0.15
    assert rates["hhh"]["complied"] > 0.1  # a prompt helps, and leaves something to train


# --- labels ----------------------------------------------------------------------------

def pairs(kind: str):
    """(prompt, a, b) with preferences near 1/2 and far from it."""
    prompt, request = HARMFUL[3] if kind == "harmless" else ALL[0]
    refuse, reason = f" {toy.REFUSALS[0]}", f" {toy.REFUSALS[0]} {toy.REASONS[0]}"
    return [(prompt, a, b) for a, b in ((right(request), wrong(request)), (refuse, right(request)), (IDK, IDK + " Hm."),
                                        (reason, refuse), (refuse, IDK), (right(request), right(request)[:-1]))]


@pytest.mark.parametrize("temperature", [1.0, 0.5, 3.0])
@pytest.mark.parametrize("kind", ["helpful", "harmless"])
def test_preference_is_the_sigmoid_of_the_difference(kind, temperature):
    for prompt, a, b in pairs(kind):
        p, q = (toy.preference(prompt, *two, kind, temperature) for two in ((a, b), (b, a)))
        worth = toy.helpfulness if kind == "helpful" else toy.harmlessness
        u, v = worth(prompt, a) / temperature, worth(prompt, b) / temperature
        assert p == pytest.approx(math.exp(u) / (math.exp(u) + math.exp(v)), abs=1e-12)
        assert p + q == pytest.approx(1, abs=1e-12) and (p > 0.5) == (u > v)
        assert toy.preference(prompt, a, a, kind, temperature) == 0.5


def test_preference_by_hand():
    prompt, yes, no = prompt_of(CAPITAL), f" {CAPITALS[HERE]}.", f" {CAPITALS[THERE]}."
    assert toy.preference(prompt, yes, no, "helpful") == pytest.approx(0.9820138)  # 3 against -1
    assert toy.preference(prompt, yes, no, "helpful", 2.0) == pytest.approx(0.8807971)
    assert toy.preference(prompt, f" {toy.OPENERS[0]}{yes}", yes, "helpful") == pytest.approx(0.6224593)  # 3.5 against 3
    prompt, request = HARMFUL[0]
    assert toy.preference(prompt, right(request), f" {toy.REFUSALS[0]}", "harmless") == pytest.approx(0.0474259)  # -2, 1


@pytest.mark.parametrize("temperature", [1e-3, 1e-9, 1e-320])
@pytest.mark.parametrize("kind", ["helpful", "harmless"])
def test_a_crowdworker_without_noise_is_sure(kind, temperature):
    rng, decided = random.Random(12), 0
    for prompt, a, b in pairs(kind):
        gap = toy.truth(prompt, a, kind) - toy.truth(prompt, b, kind)
        best = a if gap > 0 else b
        p, q = (toy.preference(prompt, *two, kind, temperature) for two in ((a, b), (b, a)))
        if gap:
            assert (max(p, q), p > q) == (1, gap > 0) and 0 <= min(p, q) < 1e-200
            assert all(toy.label(prompt, a, b, kind, rng, temperature).chosen == best for _ in range(20))
            decided += 1
        else:
            assert p == q == 0.5
    assert decided >= 4


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("kind", ["helpful", "harmless"])
def test_labels_are_as_frequent_as_preferred(kind, temperature):
    rng, n = random.Random(10), 3000
    for prompt, a, b in pairs(kind):
        p = toy.preference(prompt, a, b, kind, temperature)
        labels = [toy.label(prompt, a, b, kind, rng, temperature) for _ in range(n)]
        assert within(sum(c.chosen == a for c in labels), n, p)
        assert 0 < sum(c.chosen == a for c in labels) < n  # so both sides are checked here
        for c in labels:
            assert (c.prompt, c.kind) == (prompt, kind) and {c.chosen, c.rejected} == {a, b}
            assert c.p_chosen == pytest.approx(toy.preference(prompt, c.chosen, c.rejected, kind, temperature), abs=1e-12)


def test_red_teaming_stores_the_more_harmful_reply_as_rejected():
    rng = random.Random(11)
    for prompt, request in HARMFUL:
        harmful, safe = right(request), f" {toy.REFUSALS[0]} {toy.REASONS[0]}"
        for a, b in ((harmful, safe), (safe, harmful)):
            c = toy.label(prompt, a, b, "harmless", rng, temperature=0.05)
            assert (c.chosen, c.rejected) == (safe, harmful) and c.p_chosen > 0.999
            c = toy.label(prompt, a, b, "helpful", rng, temperature=0.05)
            assert (c.chosen, c.rejected) == (harmful, safe)


def test_labels_depend_on_the_seed_and_not_on_the_order_of_reading():
    prompt, a, b = pairs("helpful")[2]
    draw = [toy.label(prompt, a, b, "helpful", random.Random(s)).chosen for s in range(50)]
    assert draw == [toy.label(prompt, a, b, "helpful", random.Random(s)).chosen for s in range(50)]
    assert set(draw) == {a, b}


# --- a forum ---------------------------------------------------------------------------

@pytest.fixture(scope="module")
def forum() -> list[data.Comparison]:
    rng = random.Random(13)
    return [toy.upvoted(rng) for _ in range(4000)]


def posted(c: data.Comparison) -> str:
    """The question that a post asks, in the words that a crowdworker would use."""
    ((role, words), (last, open_turn)) = data.parse(c.prompt)
    assert (role, last, open_turn) == ("Human", "Assistant", "")
    return max((question for question in OPENINGS if words.endswith(f" {question}")), key=len)


def votes(forum) -> list[tuple[str, toy.Judgement, toy.Judgement]]:
    """(prompt as a crowdworker would ask, judgement of the chosen reply, that of the rejected one)"""
    found = []
    for c in forum:
        prompt = prompt_of(posted(c))
        found.append((prompt, toy.judge(prompt, c.chosen), toy.judge(prompt, c.rejected)))
    return found


def test_a_forum_post_is_not_a_crowdworkers_prompt(forum):
    """Its wording is its own, so that nothing of the comparisons and of RL has been seen; and nobody asks for harm."""
    prompts = {prompt for kind in ("helpful", "harmless") for held_out in (False, True)
               for prompt in drawn(kind, held_out, 3000)}
    assert not prompts & {c.prompt for c in forum}
    skills = Counter()
    for c in forum:
        assert asks(c.prompt) is None  # the ground truth knows crowdworkers' wordings only
        assert c.kind == "helpful" and c.chosen != c.rejected
        assert c.chosen.startswith(" ") and c.rejected.startswith(" ")
        skills[toy.understand(prompt_of(posted(c))).skill.name] += 1
    assert set(skills) == set(toy.HELPFUL_SKILLS) and min(skills.values()) > 100


@pytest.mark.parametrize("held_out", [False, True])
def test_a_forum_keeps_held_out_questions_apart(held_out):
    rng = random.Random(14)
    questions = {posted(toy.upvoted(rng, held_out)) for _ in range(800)}
    assert len(questions) > 60 and all(toy.held_out([question]) == held_out for question in questions)


def test_upvotes_are_as_frequent_as_they_claim(forum):
    """How often the likelier reply has more of them, in bins of how likely that was."""
    likelier = sorted((max(c.p_chosen, 1 - c.p_chosen), c.p_chosen > 0.5) for c in forum if c.p_chosen != 0.5)
    assert len(likelier) > 3500
    for i in range(0, len(likelier), 500):
        part = likelier[i:i + 500]
        expected, variance = sum(p for p, _ in part), sum(p * (1 - p) for p, _ in part)
        assert abs(sum(won for _, won in part) - expected) < 4.5 * math.sqrt(variance)


def test_upvotes_go_to_right_answers_and_as_much_to_friendly_and_long_ones(forum):
    """The log-odds are a weighted sum of five things, whose weights are found here; nothing else plays a part."""
    x, y = [], []
    for c, (_, a, b) in zip(forum, votes(forum)):
        x.append([a.correct - b.correct, a.wrong - b.wrong, (a.polite > 0) - (b.polite > 0), a.rude - b.rude,
                  len(c.chosen.split()) - len(c.rejected.split())])
        y.append(math.log(c.p_chosen / (1 - c.p_chosen)))
    w, r2 = least_squares(x, y)
    correct, wrong, polite, rude, length = w.tolist()
    assert r2 > 1 - 1e-9
    assert correct > 0 > wrong and polite > 0 > rude and length > 0
    assert correct - wrong > polite > 0.3 * (correct - wrong) and 10 * length > 0.1 * (correct - wrong)


def test_the_bias_of_upvotes_shows_in_who_wins(forum):
    """Among replies that are equally right: the friendlier wins, and of two that are equally friendly the longer."""
    won = Counter()
    for c, (_, a, b) in zip(forum, votes(forum)):
        if (a.correct, a.wrong, a.rude) == (b.correct, b.wrong, b.rude):
            if (a.polite > 0) != (b.polite > 0):
                won["friendly", a.polite > 0] += 1
            elif len(c.chosen.split()) != len(c.rejected.split()):
                won["long", len(c.chosen.split()) > len(c.rejected.split())] += 1
        if a.correct != b.correct:
            won["right", a.correct] += 1
    for what in ("friendly", "long", "right"):
        for_it, against = won[what, True], won[what, False]
        assert against > 20 and for_it - against > 2 * math.sqrt(for_it + against), (what, for_it, against)


def test_a_crowdworker_is_less_noisy_and_likes_no_rambling(forum):
    sure, unlike = Counter(), 0
    for c, (prompt, a, b) in zip(forum, votes(forum)):
        p = toy.preference(prompt, c.chosen, c.rejected, "helpful")
        sure["crowdworker"] += max(p, 1 - p)
        sure["forum"] += max(c.p_chosen, 1 - c.p_chosen)
        unlike += (p - 0.5) * (c.p_chosen - 0.5) < 0
    assert sure["crowdworker"] > sure["forum"] + 0.02 * len(forum)
    assert len(forum) / 50 < unlike < len(forum) / 4  # a proxy, not the thing itself


def test_a_forum_depends_on_the_seed_alone(forum):
    state, rng = random.getstate(), random.Random(13)
    assert [toy.upvoted(rng) for _ in range(100)] == forum[:100]
    assert toy.upvoted(random.Random(1)) != toy.upvoted(random.Random(2))
    assert random.getstate() == state
    assert len({c.prompt for c in forum}) > 1000


# --- what many replies are like --------------------------------------------------------

def test_rates_are_counts():
    rng = random.Random(15)
    prompts = drawn("helpful", True, 150) + drawn("harmless", True, 60)
    kinds = ["helpful"] * 150 + ["harmless"] * 60
    said = [toy.speak(toy.understand(p), rng.choice((toy.KIND, toy.SLOPPY, toy.PERFECT)), rng) for p in prompts]
    said[::7] = [f" {toy.REFUSALS[0]}"] * len(said[::7])
    rows = list(zip(prompts, kinds, said))
    rng.shuffle(rows)
    found = toy.rates(*zip(*rows))
    n, total = Counter(), Counter()
    for prompt, kind, reply in rows:
        judgement, of = toy.judge(prompt, reply), toy.understand(prompt).skill.name
        if kind == "helpful":
            n.update(["helpfulness", "correct", "refused_benign"])
            total["helpfulness"] += toy.helpfulness(prompt, reply)
            total["correct"] += judgement.correct
            total["refused_benign"] += judgement.refused
            if of == "benign task":
                n["refused_look_alikes"] += 1
                total["refused_look_alikes"] += judgement.refused
        else:
            n.update(["harmlessness", "complied"])
            total["harmlessness"] += toy.harmlessness(prompt, reply)
            total["complied"] += judgement.answers
    assert found.keys() == n.keys() and len(n) == 6 and min(n.values()) >= 20
    assert found == pytest.approx({name: total[name] / n[name] for name in n}, abs=1e-12)
    assert all(0 < found[name] < 1 for name in ("correct", "complied", "refused_benign", "refused_look_alikes"))
    assert found["refused_look_alikes"] != found["refused_benign"]


def test_rates_by_hand():
    ask, benign, harmful = prompt_of(CAPITAL), BENIGN[0], HARMFUL[0]
    rows = [(ask, "helpful", f" {CAPITALS[HERE]}."), (ask, "helpful", f" {CAPITALS[THERE]}."),  # worth 3 and -1
            (benign[0], "helpful", f" {toy.REFUSALS[0]}"), (ask, "helpful", f" {toy.REFUSALS[0]}"),  # -1 each
            (benign[0], "helpful", right(benign[1])),  # 3
            (harmful[0], "harmless", right(harmful[1])), (harmful[0], "harmless", f" {toy.REFUSALS[0]}")]  # -2 and 1
    assert toy.rates(*zip(*rows)) == dict(helpfulness=0.6, harmlessness=-0.5, correct=0.4, complied=0.5,
                                          refused_benign=0.4, refused_look_alikes=0.5)
    # By the kind of the prompt, not by what it asks: in the helpful data, a harmful request is one like any other.
    assert toy.rates([harmful[0]], ["helpful"], [right(harmful[1])])["helpfulness"] == 3
    found = toy.rates(*zip(*rows[-2:]))
    assert found["complied"] == 0.5 and found["harmlessness"] == -0.5
    assert all(math.isnan(found[name]) for name in ("helpfulness", "correct", "refused_benign", "refused_look_alikes"))
