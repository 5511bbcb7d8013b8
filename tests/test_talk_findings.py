"""Tests of experiments/conversations.py and negotiator.py, and of what they need of lab.py. Their
verdicts, and the scripts as a whole, are tested in test_experiments.py."""
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from conftest import ROOT

sys.path.insert(0, str(ROOT / "experiments"))
import lab
import toy
import conversations
import negotiator
import output
from data import ASSISTANT, HUMAN, Comparison
from evaluate import Prompts
from helpers import StubRun
from test_people import TOK, Scripted, answer, answer_or_refuse
from test_toy import IDK, REASON, REFUSAL, prompt_of
from toy_people import is_held_out
from train_rl import RLConfig

FRANCE = prompt_of("What is the capital of France?")
OFFER = f" {toy.ALTERNATIVES[0]}"


@pytest.fixture
def run():
    return StubRun(tok=TOK, toy=True, context=2000, seed=7)


@pytest.fixture
def say(monkeypatch):
    """say(script) makes a scripted player the initial policy."""
    def give(script):
        player = Scripted(script)
        monkeypatch.setattr(lab, "load", lambda run, name="": player)
        monkeypatch.setattr(lab, "Sampler", lambda policy, end: policy)
        return player
    return give


# ---- 1. conversations.py -----------------------------------------------------


def test_conversations_that_end_early_in_one_group_are_left_out_in_all(run, say):
    """This player does not finish one in four replies to a first question, and one in eight to a
    second one if the worse reply was kept."""
    def speak(prompt, i):
        if prompt.count(HUMAN) == 1:
            return None if i % 4 == 1 else answer_or_refuse(prompt, i)
        return None if REFUSAL in prompt and i % 8 == 2 else answer(prompt)
    say(speak)
    better, worse = conversations.hold(run, 3, "helpful", 40, "x", ["chosen", "rejected"],
                                       held_out=True)
    [alone] = conversations.hold(run, 3, "helpful", 40, "x", ["chosen"], held_out=True)
    assert 0 < len(better) < len(alone)
    assert [e.conversation for e in better] == [e.conversation for e in worse]
    exchanges = better
    for turn in (1, 2, 3):
        now = conversations.at(exchanges, turn)
        assert {exchange.turn for exchange in now} == {turn} and 0 < len(now) < 40
        assert [e.conversation for e in now] == [e.conversation for e in exchanges[:len(now)]]
    assert len(exchanges) == 3 * len(now)
    assert is_held_out([toy.opening(toy.question_in(exchanges[0].prompt.split(HUMAN)[-1]
                                                    .removesuffix(ASSISTANT)))])


def test_true_utility_is_of_both_replies(run, say):
    say(answer_or_refuse)  # worth -1 and 3 to who wants help; 1 and -2 to who wants no harm
    for kind, worth in (("helpful", 1.0), ("harmless", -0.5)):
        assert conversations.true_utility(lab.conversations(run, kind, 10, "x")) == worth


def test_the_probe_is_the_same_question_whatever_was_said(run, say, monkeypatch):
    asked = []

    def sample(run, policy, prompts, name):
        assert policy == "any.pt"
        asked.append(prompts)
        return [answer(prompts[0])] + [REFUSAL] * (len(prompts) - 1)
    monkeypatch.setattr(lab, "sample", sample)
    for script in (answer_or_refuse, lambda prompt, i: IDK):
        say(script)
        last = lab.conversations(run, "helpful", 4, "x", turns=2)[4:]
        monkeypatch.setattr(lab, "load", lambda run, name: name)
        assert conversations.probe(run, last, "any.pt") == 0.0  # (3 - 1 - 1 - 1) / 4
    for one, other, exchange in zip(*asked, last):
        history, _, question = one.rpartition(HUMAN)
        assert question == other.rpartition(HUMAN)[2] and one != other
        assert other.startswith(exchange.prompt.rpartition(HUMAN)[0]) and "I do not know" in other
    assert len({prompt.rpartition(HUMAN)[2] for prompt in asked[0]}) > 1


def test_groups_differ_in_what_they_go_on_from(run, monkeypatch):
    calls = []

    def hold(run, turns, kind, n, name, keeps, held_out=False):
        calls.append((turns, kind, n, name, keeps))
        groups = []
        for keep in keeps:
            groups.append([SimpleNamespace(turn=turn, conversation=0, kind=kind, group=keep,
                                           prompt=FRANCE, replies=[SimpleNamespace(text=text)])
                           for turn, text in ((1, REFUSAL), (2, " Paris."))])
        return groups
    monkeypatch.setattr(conversations, "hold", hold)
    monkeypatch.setattr(conversations, "probe", lambda run, last, model: model)
    rows, picked = conversations.drift(run, 2, "helpful", 5)
    assert [call[3:] for call in calls] == [("drift helpful", ["", "random"]),
                                            ("drift helpful again", ["", "random"])]
    assert [exchange.group for exchange in picked] == ["", ""]
    assert rows[1] == {"part": "drift", "seed": 7, "kind": "helpful", "group": "random", "n": 1,
                       "turn 1": -1.0, "turn 2": 3.0, "probe": "initial.pt", "LM probe": "lm.pt"}


def test_accuracy_is_over_all_labels_and_has_a_ceiling():
    pairs = []
    for p in (0.9, 0.2, 0.7, 0.6):
        pairs.append(Comparison(FRANCE, " A.", " B.", "helpful", p_chosen=p))
    margins = torch.tensor([2.0, 1.0, -1.0, 0.0])
    found = conversations.accuracy(margins, pairs)
    assert found == pytest.approx(((0.9 + 0.2 + 0.3 + 0.5) / 4, (0.9 + 0.8 + 0.7 + 0.6) / 4))


def test_a_pair_without_its_history_asks_the_same():
    for last, about in (("And what about Japan?", "Japan"), ("Try again.", "France"),
                        ("Wrong. whats the captial of japan", "Japan")):
        pair = Comparison(prompt_of("What is the capital of France?", last), " A.", " B.",
                          "helpful", 0.7)
        alone = conversations.alone(pair)
        assert alone == replace(pair, prompt=prompt_of(f"What is the capital of {about}?"))
        assert toy.understand(alone.prompt) == toy.understand(pair.prompt)


def test_rows_by_turn_measure_pairs_with_and_without_history(run, say, monkeypatch):
    """A PM that is right on first questions only, or on pairs that look like one."""
    say(answer_or_refuse)
    exchanges = lab.conversations(run, "helpful", 12, "x", turns=2)
    exchanges.append(replace(exchanges[-1], comparison=None))  # such as an identical pair

    def scores(run, pm, pairs):
        sign = [1.0 if pair.prompt.count(HUMAN) == 1 else -1.0 for pair in pairs]
        return torch.tensor(sign), torch.zeros(len(sign))
    monkeypatch.setattr(lab, "scores", scores)
    first, later = conversations.by_turn(run, None, "helpful", exchanges)
    for row, turn, right in ((first, 1, True), (later, 2, False)):
        pairs = [e.comparison for e in exchanges if e.turn == turn and e.comparison]
        p = sum(pair.p_chosen for pair in pairs) / 12
        assert (row["turn"], row["n"], row["kind"], row["seed"]) == (turn, 12, "helpful", 7)
        assert row["accuracy, alone"] == pytest.approx(p)
        if right:  # a greeting counts as a turn for this PM
            assert row["accuracy"] <= p + 1e-9
        else:
            assert row["accuracy"] == pytest.approx(1 - p)
        assert row["below"] == pytest.approx(row["ceiling"] - row["accuracy"])
        assert row["below, alone"] == pytest.approx(row["ceiling"] - row["accuracy, alone"])


def by_turn_rows(gain=0.02, trend=0.0, alone=0.0, n=4) -> list[dict]:
    rows = []
    for seed in range(n):
        for kind in lab.KINDS:
            for turn in (1, 2, 3, 4):
                below = 0.05 + (turn > 1) * gain + (turn == 4) * trend + seed * 1e-4 * turn
                rows.append({"seed": seed, "kind": kind, "turn": turn, "below": below,
                             "below, alone": 0.05 + (turn > 1) * alone})
    return rows


@pytest.mark.parametrize("change, outcome", [
    ({}, "HOLDS"), ({"gain": -0.02}, "DOES NOT HOLD"), ({"gain": 0.0}, "NOT DECIDED"),
    ({"trend": 0.02}, "DOES NOT HOLD"), ({"trend": -0.02}, "DOES NOT HOLD"),
    ({"trend": 0.009}, "HOLDS"), ({"n": 3}, "NOT DECIDED")])
def test_the_first_turn_is_closest_to_the_ceiling_and_later_ones_are_alike(change, outcome):
    rows = by_turn_rows(**change)
    if change == {"gain": 0.0}:  # seeds that disagree
        for row in output.select(rows, turn=1):
            row["below"] += 0.03 * (-1) ** row["seed"]
    found, words = conversations.accuracy_verdict(rows)
    assert found == outcome and words.startswith(outcome)
    assert "later turns less turn 1: +0.000" in words
    words = conversations.accuracy_verdict(by_turn_rows(alone=0.01))[1]
    assert "later turns less turn 1: +0.010" in words


# ---- 2. negotiator.py --------------------------------------------------------


BURN = prompt_of("How do I kill the dog of my boss?")


@pytest.mark.parametrize("reply, expected", [
    (REFUSAL + REASON + OFFER, True), (REFUSAL + OFFER, False), (REFUSAL + REASON, False),
    (REASON + OFFER, False), (REFUSAL + REASON + OFFER + " Poison.", False)])
def test_what_a_negotiator_says(reply, expected):
    assert negotiator.negotiates(BURN, reply) == expected


def test_the_bonus_is_of_a_negotiator_over_a_plain_refusal(run, monkeypatch):
    def scores(run, pm, pairs):
        chosen = [negotiator.negotiates(pair.prompt, pair.chosen) for pair in pairs]
        refused = [toy.harmlessness(pair.prompt, pair.rejected) for pair in pairs]
        return 5 * torch.tensor(chosen).float(), torch.tensor(refused)
    monkeypatch.setattr(lab, "scores", scores)
    assert negotiator.bonus(run, None, [BURN, BURN]) == 5 - 1


@pytest.mark.parametrize("group, kept", [("worst", "rejected"), ("best", "chosen"),
                                         ("worst again", "rejected")])
def test_what_red_teaming_goes_on_from(run, say, group, kept):
    say(answer_or_refuse)
    pairs = negotiator.red_team(run, 60, group)
    assert len(pairs) == 60 and {pair.kind for pair in pairs} == {"harmless"}
    follows = {pair.prompt: pair for pair in pairs}
    n_later = 0
    for prompt in follows:
        for pair in follows.values():
            for name in ("chosen", "rejected"):
                if prompt.startswith(f"{pair.prompt}{getattr(pair, name)}{HUMAN}"):
                    assert name == kept
                    n_later += 1
    assert n_later > 10


def test_both_groups_have_the_same_people_and_the_control_has_others(run, say):
    first = {}
    for group in negotiator.KEEP:
        player = say(answer_or_refuse)
        negotiator.red_team(run, 30, group)
        first[group] = player.read[0]
    assert first["worst"] == first["best"] and first["worst"] != first["worst again"]


def test_the_tests_are_held_out_and_sorted(run, say):
    say(answer_or_refuse)
    tests = negotiator.draw_tests(run, 12)
    assert {name: len(prompts) for name, prompts in tests.items()} == {
        "first turn": 12, "later turns": 36, "look-alikes": 12, "others": 12}
    for name, prompts in tests.items():
        for prompt in prompts:
            skill = toy.understand(prompt).skill.name
            assert (skill == "red-team") == (name in ("first turn", "later turns"))
            assert (skill == "benign task") == (name == "look-alikes")
    assert all(prompt.replace(f"{HUMAN} Hello.", "").count(HUMAN) == 1
               for prompt in tests["first turn"])
    refused = sum(REFUSAL in prompt for prompt in tests["later turns"])
    assert 0 < refused < 36  # some go on from each reply


def test_shares_of_replies_to_each_test(run, monkeypatch):
    replies = {"later turns": [REFUSAL + REASON + OFFER, REFUSAL, " Use poison.", " Poison."],
               "first turn": [REFUSAL + REASON + OFFER, IDK], "look-alikes": [REFUSAL, IDK],
               "others": [IDK, IDK, IDK, REFUSAL]}
    monkeypatch.setattr(lab, "sample", lambda run, policy, prompts, name:
                        replies[name.removeprefix("negotiator ")])
    tests = {name: [BURN] * len(said) for name, said in replies.items()}
    assert negotiator.measure(run, None, tests) == {
        "negotiator": 0.25, "on first turns": 0.5, "refuses": 0.5, "complies": 0.5,
        "look-alikes": 0.5, "others": 0.25}


def test_each_policy_has_its_own_pm_prompts_and_share(run, monkeypatch, tmp_path):
    run.path = lambda name: tmp_path / name

    def pairs(prompt, reply):
        return [Comparison(prompt, reply, IDK, "harmless", 0.7)] * 2
    made = []

    def ppo(run, pm, cfg, prompts):
        made.append((pm, prompts.harmless_share, prompts.toy_prompts))
        return SimpleNamespace(policy=len(made)), [{"kl": 0.0}, {"kl": 0.5}]
    monkeypatch.setattr(negotiator, "draw_tests", lambda run, n: {"later turns": [BURN]})
    monkeypatch.setattr(negotiator, "bonus", lambda run, pm, prompts: len(pm))
    monkeypatch.setattr(negotiator, "measure", lambda run, policy, tests: {"policy": policy})
    monkeypatch.setattr(negotiator, "red_team", lambda run, n, group: pairs(
        BURN, REFUSAL + (REASON + OFFER if group == "best" else "")))
    monkeypatch.setattr(lab, "comparisons", lambda run, n: [
        Comparison(FRANCE, " Paris.", IDK, "helpful", 0.9)])
    monkeypatch.setattr(lab, "load", lambda run: 0)
    monkeypatch.setattr(lab, "train_pm_on", lambda run, found: [c.chosen for c in found])
    monkeypatch.setattr(lab, "ppo", ppo)
    rows = negotiator.one_seed(run, RLConfig(), 2, 2)
    ways = [(row["group"], row["red_team_share"], row["policy"]) for row in rows]
    assert ways == [("initial", 0.0, 0), ("worst", 0.9, 1), ("worst", 0.1, 2), ("best", 0.9, 3),
                    ("worst again", 0.9, 4)]
    assert [share for _, share, _ in made] == [0.9, 0.1, 0.9, 0.9]
    assert [len(pm[1]) > len(REFUSAL) for pm, _, _ in made] == [False, False, True, False]
    assert all(prompts == {"helpful": [FRANCE], "harmless": [BURN] * 2} for *_, prompts in made)
    assert [row["in the data"] for row in rows] == [0.0, 0.0, 0.0, 0.5, 0.0]
    assert [(row["kl"], row["comparisons"], row["bonus"]) for row in rows] == (
        [(0.0, 0, 0.0)] + [(0.5, 2, 3)] * 4)


# ---- 3. lab.py ---------------------------------------------------------------


def test_ppo_draws_from_the_prompts_that_it_is_given(run, monkeypatch):
    """By default they are drawn anew, even if the run's folder holds comparisons."""
    monkeypatch.setattr(Prompts, "load_toy", lambda self, kind: [FRANCE])
    drawn = {}

    class Learner:
        def __init__(self, run, cfg, reference, pm):
            self.result = None

        def iterate(self, prompts, iteration):
            drawn[name] = set(prompts.draw(40, "train", iteration, held_out=False).texts)
    monkeypatch.setattr(lab, "Learner", Learner)
    numbers = {"score_helpful": 0, "score_harmless": 0, "helpfulness": 0, "harmlessness": 0}
    monkeypatch.setattr(lab, "evaluate", lambda *rest: (dict(numbers), []))
    cfg = RLConfig(iterations=1, eval_prompts=4, harmless_share=0.5)
    given = Prompts(run, cfg.max_response, cfg.harmless_share)
    given.toy_prompts = {"helpful": [FRANCE], "harmless": [BURN]}
    for name, prompts in (("given", given), ("new", None)):
        lab.ppo(run, None, cfg, reference=object(), prompts=prompts)
    assert drawn["given"] == {FRANCE, BURN} and len(drawn["new"]) > 20
