"""Exercises on the skills of the corpus's plain text, for alignment_tax.py.

  state    complete a textbook's statement ("The capital of France is" -> "Paris.")
  answer   answer a quiz question
  judge    say whether a quiz's answer is right ("Right.") or wrong ("Wrong.")
Each is asked with nothing before the question (zero-shot) and after four examples (few-shot).
"""
import dataclasses

import toy
import toy_people

SKILLS, SHOTS = ("state", "answer", "judge"), ("zero", "few")  # toy.SKILLS are kinds of request
RIGHT, WRONG = " Right.", " Wrong."


@dataclasses.dataclass
class Exercise:
    text: str                # what the model reads
    right: tuple[str, ...]   # the continuations that count as right
    wrong: str = ""          # of "judge": the other verdict


def bare(answer: str) -> str:
    return f" {answer[0].upper()}{answer[1:]}."  # as assistants and quizzes give a bare answer


def exercises(run) -> dict[str, list[Exercise]]:
    """{"state zero": its exercises, "answer zero": ...}: three skills, zero-shot and few-shot."""
    rng, found = run.rng("tax"), {}
    for shots in SHOTS:
        for skill in SKILLS:
            found[f"{skill} {shots}"] = []

    def add(kind: str, examples: list[str], exercise: Exercise):
        found[f"{kind} zero"].append(exercise)
        text = " ".join([*examples, exercise.text])
        found[f"{kind} few"].append(dataclasses.replace(exercise, text=text))

    for name in toy_people.HELPFUL_SKILLS:
        skill = toy.SKILLS[name]
        for about, answer in skill.answers.items():
            request, others = toy.Request(skill, about), []
            for other in rng.sample([x for x in skill.answers if x != about], 4):
                others.append(toy.Request(skill, other))
            until_answer = request.statement("|").split(" |")[0]
            examples = [other.statement(other.answer) for other in others]
            add("state", examples, Exercise(until_answer, (f" {answer}.",)))
            question = held_out_question(request)
            if question:
                right, mixed = quiz_examples(rng, others)
                both_forms = (bare(answer), " " + request.statement(answer))
                add("answer", right, Exercise(question, both_forms))
                wrong_answer = rng.choice(request.wrong_answers())
                add("judge", mixed, Exercise(question + bare(answer), (RIGHT,), WRONG))
                add("judge", mixed, Exercise(question + bare(wrong_answer), (WRONG,), RIGHT))
    return found


def held_out_question(request: toy.Request) -> str | None:
    for template in request.skill.templates:
        question = template.format(request.about)
        if toy_people.is_held_out([question]):
            return question
    return None


def quiz_examples(rng, requests: list[toy.Request]) -> tuple[list[str], list[str]]:
    """Examples that are all answered right, and others of which every second one is wrong."""
    right, mixed = [], []
    for i, request in enumerate(requests):
        question = request.skill.templates[0].format(request.about)
        right.append(question + bare(request.answer) + RIGHT)
        if i % 2 == 1:
            mixed.append(question + bare(rng.choice(request.wrong_answers())) + WRONG)
        else:
            mixed.append(right[-1])
    return right, mixed
