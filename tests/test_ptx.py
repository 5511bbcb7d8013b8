"""Tests of experiments/skills.py and ptx.py. The verdict, and the script as a whole, are tested in
test_experiments.py."""
import re
import sys
from random import Random
from types import SimpleNamespace

import pytest
import torch

from conftest import ROOT

sys.path.insert(0, str(ROOT / "experiments"))
import lab
import ptx
import skills
import toy_corpus
from skills import Exercise
from test_experiments import taxed
from train_sft import PretrainingText


def test_a_sentence_is_translated_word_by_word_with_the_adjective_after_its_noun():
    english = {**skills.ADJECTIVES, **skills.NOUNS, **skills.VERBS}
    assert len(set(english.values())) == len(english) == 26  # no word has two meanings
    meaning = {norvish: word for word, norvish in english.items()}
    for seed in range(50):
        exercise = skills.translation(Random(seed), held_out=seed % 2 == 0)
        words = re.fullmatch("Norvish: (.*)[.] English:", exercise.question)[1].split()
        noun, adjective, verb, other_noun, other_adjective = [meaning[word] for word in words]
        assert exercise.answer == f" {adjective} {noun} {verb} {other_adjective} {other_noun}."
        assert skills.is_held_out(exercise.answer[1:]) == (seed % 2 == 0)


def test_a_passage_answers_each_of_its_questions():
    firsts = set()
    for seed in range(50):
        text, questions = skills.passage(Random(seed), held_out=seed % 2 == 0)
        assert skills.is_held_out(text) == (seed % 2 == 0)
        answer = {exercise.question: exercise.answer for exercise in questions}
        assert len(answer) == 4
        who, what, where, when = [answer[question][:-1] for question in (
            "Who found it?", "What was found?", "Where was it found?", "When was it found?")]
        assert text == f"{who[1:]} found{what.lower()}{where.lower()} on{when[3:]}."
        firsts.add(questions[0].question)
    assert len(firsts) == 4


def test_the_corpus_teaches_only_exercises_that_are_not_held_out():
    rng, n_pages = Random(0), 0
    for _ in range(1000):
        text = skills.document(rng)
        passages = re.findall(r"^\w+ found the .*?[.]", text)
        translations = re.findall(r"English: (.*?[.])", text)
        n_pages += bool(passages or translations)
        assert (len(passages), len(translations)) in ((0, 0), (1, 0), (0, 3))
        assert not passages or text.count("?") == 3
        assert not any(skills.is_held_out(sentence) for sentence in passages + translations)
    assert abs(n_pages - 250) < 4 * (1000 * 0.25 * 0.75) ** 0.5
    asked = skills.exercises(Random(0), 20)
    assert [e.skill for e in asked].count("reading") == len(asked) // 2 == 20
    for exercise in asked:
        sentence = exercise.answer[1:]
        if exercise.skill == "reading":
            sentence, question = re.fullmatch(r"(.*?[.]) (W[^.]*[?])", exercise.question).groups()
        assert skills.is_held_out(sentence)


def test_a_corpus_without_the_skills_never_uses_their_words():
    words, rng = set(), Random(1)
    for _ in range(100):
        assert "\n\nHuman:" in skills.dialogue(rng)
    for _ in range(2000):
        words |= set(re.findall(r"\w+", skills.without_skills(rng)))
    for ours in (skills.ADJECTIVES, skills.NOUNS, skills.VERBS, skills.PEOPLE, skills.THINGS,
                 skills.PLACES, skills.DAYS):
        assert not words & set(ours)


class NextLetter:
    """A model that expects b after a, c after b and so on, with probability 0.9."""
    cfg = SimpleNamespace(vocab_size=26)

    def __call__(self, ids):
        return torch.nn.functional.one_hot((ids + 1) % 26, 26).float()  # (1, T, 26)

    def logits(self, hidden):
        return torch.log(torch.where(hidden > 0, 0.9, 0.1 / 25))


def test_an_answer_is_right_if_each_token_is_the_likeliest():
    tok = SimpleNamespace(encode=lambda text: [ord(c) - ord("a") for c in text])
    run, log = SimpleNamespace(tok=tok, device="cpu"), torch.log
    is_right, logp = skills.answered(run, NextLetter(), Exercise("reading", "xa", "bcd"))
    assert is_right and logp == pytest.approx(log(torch.tensor(0.9)).item())
    is_right, logp = skills.answered(run, NextLetter(), Exercise("reading", "xa", "bce"))
    assert not is_right
    assert logp == pytest.approx(log(torch.tensor([0.9, 0.9, 0.004])).mean().item())
    numbers = skills.measure(run, NextLetter(), [
        Exercise("reading", "xa", "bcd"), Exercise("reading", "xa", "z"),
        Exercise("translation", "m", "n")])
    high, low = torch.tensor([0.9, 0.004]).log().tolist()
    assert numbers == pytest.approx({
        "reading": 0.5, "reading log-prob": (high + low) / 2, "translation": 1.0,
        "translation log-prob": high, "skill": (high + low) / 4 + high / 2})


def test_a_stage_draws_from_the_corpus_that_it_is_given():
    original = toy_corpus.document
    text = PretrainingText(SimpleNamespace(toy=True, context=9, rng=lambda *name: Random(0), tok=(
        SimpleNamespace(encode_dialogue=lambda text: [ord(c) for c in text]))), "rl")
    with pytest.raises(KeyError), ptx.corpus(lambda rng, headers=True: "abc"):
        assert text.draw(2) == [[97, 98, 99]] * 2
        raise KeyError
    assert toy_corpus.document is original is skills.without_skills


def test_the_arms_differ_in_what_they_are_named_for(monkeypatch):
    """PPO stands still; each arm's options, and where its text comes from, are recorded."""
    seen = []

    def stub(run, rm, cfg, reference):
        assert (cfg.ema, cfg.lr) == (0.0, 1e-3)
        seen.append((cfg.ptx_coef, cfg.kl_coef, toy_corpus.document, reference))
        path = [{"score": 1.0}, {"score": 1.5 + len(seen), "kl": 0.25}]
        return SimpleNamespace(policy=f"policy {len(seen)}"), path
    run = SimpleNamespace(rng=lambda name: Random(0), load_model=str, tok=None, context=9,
                          device="")
    monkeypatch.setattr(ptx, "initial", lambda seed, tiny: run)
    monkeypatch.setattr(ptx, "encode", lambda tok, texts, context: (texts, 0))
    monkeypatch.setattr(ptx, "measure", lambda run, model, asked: {"skill": model})
    monkeypatch.setattr(ptx, "mean_loss", lambda model, rows, device: len(rows))
    monkeypatch.setattr(lab, "ppo", stub)
    rows = ptx.one_seed(3, ptx.ARMS, 5, 2, tiny=True)
    with_skills, sft = skills.document, "initial.pt"
    assert seen == [(0.0, 0.02, with_skills, sft), (0.1, 0.02, with_skills, sft),
                    (0.3, 0.02, with_skills, sft), (1.0, 0.02, with_skills, sft),
                    (0.0, 0.2, with_skills, sft), (0.0, 2.0, with_skills, sft),
                    (0.3, 0.02, skills.without_skills, sft), (0.3, 0.02, skills.dialogue, sft)]
    assert [row["policy"] for row in rows] == [ptx.LM, ptx.SFT, *ptx.ARMS]
    assert [row["skill"] for row in rows][:3] == ["lm.pt", "initial.pt", "policy 1"]
    assert rows[2]["gain"] == 1.5 and rows[2]["kl"] == 0.25 and rows[0]["gain"] == 0.0
    assert {row["text loss"] for row in rows} == {5} and {row["seed"] for row in rows} == {3}


def test_a_contrast_is_taken_within_a_seed():
    rows = []
    for seed, (sft, ppo) in enumerate(((5.0, 1.0), (7.0, 2.0))):
        rows += [{"policy": ptx.SFT, "skill": sft, "seed": seed},
                 {"policy": ptx.PPO, "skill": ppo, "seed": seed}]
    assert ptx.contrast(rows, {ptx.SFT: 1, ptx.PPO: -0.5}) == [4.5, 6.0]


def test_the_reward_has_a_verdict_of_its_own_and_without_a_tax_there_is_none():
    assert "DOES NOT HOLD: it costs at most a tenth" in ptx.verdict(taxed(gain=0.89))[1]
    assert " HOLDS: it costs at most a tenth" in ptx.verdict(taxed(gain=0.91))[1]
    _, words = ptx.verdict(taxed(ppo=1.1))
    assert words.startswith("DOES NOT HOLD: PPO costs the skills something") and "ptx" not in words
