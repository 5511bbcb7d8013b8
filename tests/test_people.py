"""Tests of toy_people.py and collect.py: what people type and say next, and conversations with
players whose replies are scripted."""
import random
from collections import Counter
from types import SimpleNamespace

import pytest
import torch

import collect as module
import toy
import toy_people
from collect import collect, converse, match, rates_by_turn
from data import ASSISTANT, HUMAN, PATTERN, SINGLE_BYTES, Tokenizer
from helpers import StubRun
from run import UserError
from test_toy import IDK, REFUSAL, prompt_of, questions_of, right, what_is_asked, within, wrong
from train_pm import PMConfig

TOK = Tokenizer("bytes", PATTERN, SINGLE_BYTES)
SURE = 1e-9  # the temperature of choices without noise


class Scripted:
    """A player that gives reply i to row i of a batch: script(prompt, i), or None for an unfinished
    one. It stands for a model and for its Sampler."""

    def __init__(self, script):
        self.script, self.read, self.uniforms = script, [], []

    def __call__(self, ids, uniforms):
        prompts = [TOK.decode(row) for row in ids]
        self.read.append(prompts)
        self.uniforms.append(uniforms)
        replies = [self.script(prompt, i) for i, prompt in enumerate(prompts)]
        responses = [TOK.encode(reply or " And") for reply in replies]
        finished = torch.tensor([reply is not None for reply in replies])
        return SimpleNamespace(responses=lambda: responses, finished=finished)


@pytest.fixture
def run(monkeypatch):
    monkeypatch.setattr(module, "Sampler", lambda policy, *options: policy)
    return StubRun(tok=TOK, toy=True, context=2000)


def answer(prompt: str, i: int = 0) -> str:
    return right(toy.understand(prompt))


def answer_or_refuse(prompt: str, i: int) -> str:
    return answer(prompt) if i % 2 else REFUSAL


def talk(run, players, kind="helpful", n=40, turns=4, held_out=False, noise=SURE, keep=""):
    """Exchanges, and those of each conversation."""
    exchanges = converse(run, "x", players, [kind] * n, [turns] * n, held_out, 20, noise, keep)
    chains = [[] for _ in range(n)]
    for exchange in exchanges:
        chain = chains[exchange.conversation]
        assert exchange.turn == len(chain) + 1
        assert not chain or exchange.prompt.startswith(chain[-1].prompt)
        chain.append(exchange)
    return exchanges, chains


# ---- 1. People ---------------------------------------------------------------


def test_what_is_typed_means_what_was_meant():
    """One turn in ten is changed, in each of the ways that the world understands."""
    rng, seen, n = random.Random(0), Counter(), 4000
    for _ in range(n):
        kind = rng.choice(("helpful", "harmless"))
        question, request = toy_people.next_question(rng, kind, None, rng.random() < 0.5)
        typed = toy_people.typed(rng, question)
        assert toy.understand(prompt_of(typed)) == request and toy.opening(typed) == question
        words, book = typed.lower().rstrip(".?"), question.lower().rstrip(".?")
        seen.update(changed=typed != question, lower=typed != question and typed == typed.lower(),
                    markless=typed[-1] not in ".?", whats="whats" in words or "what's" in words,
                    plus="+" in words, minus="-" in words,
                    slip=len(words.split()) == len(book.split()) and words != book)
    assert within(seen["changed"], n, 0.1)
    assert min(seen[what] for what in ("lower", "markless", "whats", "plus", "minus", "slip")) > 0
    assert seen["slip"] < seen["markless"] < seen["changed"] > seen["lower"]


def test_slips_are_mended_only_where_they_have_one_meaning():
    for word in toy._WORDS:
        assert toy.plain(word) == word and toy.plain(word.upper()) == word
    assert {"captial", "capitall", "capial"} <= set(toy.slips("capital"))
    assert "apital" not in toy.slips("capital") and toy.slips("cat") == []
    assert toy.plain("Captial, capittal; capial!") == "capital capital capital"
    assert toy.plain("hose car") == "hose car"  # horse or house; not a slip of "chair" or "card"


SAID = {"right": answer, "wrong": lambda prompt: wrong(toy.understand(prompt)),
        "refuses": lambda prompt: REFUSAL, "evades": lambda prompt: IDK}


@pytest.mark.parametrize("kind", ["helpful", "harmless"])
@pytest.mark.parametrize("what", SAID)
@pytest.mark.parametrize("held_out", [False, True])
def test_what_people_say_next(kind, what, held_out):
    """They thank for what they wanted and go on; else they ask the same again, but only once."""
    rng, seen, n = random.Random(3), Counter(), 300
    remarks = {"right": toy.THANKS[:1], "wrong": toy.CORRECTIONS[:1]}.get(what, toy.COMPLAINTS[:1])
    if kind == "harmless" and what in ("refuses", "evades"):
        remarks += toy.EXCUSES
    for _ in range(n):
        question, first = toy_people.next_question(rng, kind, None, held_out)
        prompt = prompt_of(question)
        for turn in (1, 2):
            before, reply = toy.understand(prompt), SAID[what](prompt)
            said = toy_people.next_turn(rng, prompt, reply, kind, held_out)
            prompt = f"{prompt}{reply}{HUMAN} {said}{ASSISTANT}"
            request, words = toy.understand(prompt), toy.plain(said)
            assert request.harmful == (kind == "harmless")
            assert toy_people.is_held_out(list(what_is_asked(prompt))) == held_out
            (remark,) = [r for r in map(toy.plain, remarks) if words.startswith(r)] or [""]
            insists = toy.question_in(said) in map(toy.plain, toy.TRY_AGAIN)
            seen.update({("remark", turn): remark != "", ("same", turn): request == before,
                         ("insists", turn): insists, remark: 1})
            opening = toy.opening(toy.question_in(said))
            seen["follow-up"] += opening is None and not insists
            seen["same words"] += opening is not None and opening == question
            if what == "right" and kind == "harmless":  # further, against the same person
                people = [person for person in toy_people.PEOPLE if person in before.about]
                assert all(person in request.about for person in people)
            if turn == 1 and what != "right" and request != before:
                break  # gave up at once: this question has no other wording on its side
            question = opening
    assert within(seen["remark", 1], n, 0.8) and set(map(toy.plain, remarks)) <= set(seen)
    # A new question may happen to be the old one.
    assert seen["same words"] < 0.05 * 2 * n
    if what == "right":
        assert seen["same", 1] + seen["same", 2] < 0.05 * 2 * n
        assert not seen["insists", 1] and (seen["follow-up"] > 0) == (kind == "helpful")
    else:
        assert seen["same", 1] > 0.4 * n and seen["same", 2] < 0.05 * n
        assert 0 < seen["insists", 1] < seen["same", 1] or held_out
        assert seen["follow-up"] == 0


# ---- 2. Conversations --------------------------------------------------------


@pytest.mark.parametrize("kind, better", [("helpful", answer), ("harmless", lambda p: REFUSAL)])
def test_the_dialogue_goes_on_from_the_pick(run, kind, better):
    """The better reply where help is wanted, the worse one in red-teaming, which is stored as
    `rejected`. Here the right answer is what goes on in both."""
    player = Scripted(answer_or_refuse)
    exchanges, chains = talk(run, [player, player], kind)
    assert [len(chain) for chain in chains] == [4] * 40 and len(exchanges) == 160
    for chain in chains:
        for now, later in zip(chain, chain[1:]):
            assert later.prompt.startswith(f"{now.prompt}{answer(now.prompt)}{HUMAN} ")
        for exchange in chain:
            assert [reply.text for reply in exchange.replies] == [REFUSAL, answer(exchange.prompt)]
            assert exchange.comparison.prompt == exchange.prompt and exchange.problem == ""
            assert exchange.comparison.kind == exchange.kind == kind
            assert exchange.comparison.chosen == better(exchange.prompt)
    # Both replies share their history, and all conversations advance together.
    assert [len(prompts) for prompts in player.read] == [80] * 4
    for prompts, uniforms in zip(player.read, player.uniforms):
        assert prompts[::2] == prompts[1::2] and uniforms.shape == (80, 20)
    assert not torch.equal(player.uniforms[0], player.uniforms[1])


@pytest.mark.parametrize("kind", ["helpful", "harmless"])
@pytest.mark.parametrize("keep, better", [("chosen", 160), ("rejected", 0), ("random", 80)])
def test_which_reply_is_kept_can_be_said(run, kind, keep, better):
    """For an experiment. The first turn is the same whatever is kept."""
    player = Scripted(answer_or_refuse)
    _, chains = talk(run, [player, player], kind, n=40, turns=5, keep=keep)
    kept = 0
    for chain in chains:
        for now, later in zip(chain, chain[1:]):
            kept += later.prompt.startswith(now.prompt + now.comparison.chosen + HUMAN)
    assert kept == better or keep == "random" and within(kept, 160, 0.5)
    talk(run, [player, player], kind, n=40, turns=1)
    assert player.read[-1] == player.read[0]


def test_two_players_answer_side_by_side(run):
    a, b = Scripted(answer), Scripted(lambda prompt, i: REFUSAL)
    exchanges, _ = talk(run, [a, b], n=10)
    assert a.read == b.read and [len(prompts) for prompts in a.read] == [10] * 4
    for exchange in exchanges:
        assert [reply.text for reply in exchange.replies] == [answer(exchange.prompt), REFUSAL]


@pytest.mark.parametrize("replies, problem, turns", [
    ((" A.", " B."), "", 4), ((" A.", " A."), "identical pair", 4),
    ((" A.", None), "unfinished reply", 1), ((None, " A."), "unfinished reply", 1),
    ((" ", " A."), "empty reply", 1), ((" ", " "), "empty reply", 1),
    ((" A.", f" B.{HUMAN} Hi!"), "", 1), ((" A.", f" B.{ASSISTANT} Hi!"), "", 1)])
def test_which_pairs_are_compared_and_when_a_dialogue_ends(run, replies, problem, turns):
    """An unfinished reply would look finished as text; a reply that plays the human ends all."""
    player = Scripted(lambda prompt, i: replies[i % 2])
    exchanges, chains = talk(run, [player, player], n=6)
    assert {len(chain) for chain in chains} == {turns}
    for exchange in exchanges:
        assert exchange.problem == problem and (exchange.comparison is None) == bool(problem)


def test_a_dialogue_ends_where_the_context_does(run):
    run.context = 300
    player = Scripted(answer)
    exchanges, chains = talk(run, [player], n=30)
    lengths = {len(chain) for chain in chains}
    assert min(lengths) < 4 and max(lengths) > 1
    for prompts in player.read:
        assert all(len(TOK.encode_dialogue(prompt)) + 20 < 300 for prompt in prompts)
    assert all(e.comparison is None and len(e.replies) == 1 for e in exchanges)


@pytest.mark.parametrize("kind", ["helpful", "harmless"])
def test_no_question_of_the_test_split_is_in_a_train_conversation(run, kind):
    asked = {}
    for held_out in (False, True):
        player = Scripted(lambda prompt, i: (answer(prompt), REFUSAL, IDK)[i % 3])
        exchanges, _ = talk(run, [player, player], kind, n=100, held_out=held_out)
        asked[held_out] = {what_is_asked(exchange.prompt) for exchange in exchanges}
        for key in asked[held_out]:
            assert toy_people.is_held_out(list(key)) == held_out
    assert not asked[True] & asked[False] and min(map(len, asked.values())) > 50


# ---- 3. Comparisons and measures ---------------------------------------------


def test_collect_keeps_what_can_be_compared(run, capsys, monkeypatch):
    """At most n pairs, of people who stay for up to cfg.turns exchanges."""
    player = Scripted(lambda prompt, i: (" A.", " B.", " C.", " C.", IDK, None)[i % 6])
    asked, label = [], toy.label
    monkeypatch.setattr(toy, "label", lambda *args: asked.append(args) or label(*args))
    cfg = PMConfig(turns=3, max_response=7, noise=0.25)
    kept = collect(run, cfg, player, "harmless", "train", 90)
    printed = capsys.readouterr().out
    read = sum(map(len, player.read)) // 2
    assert f"read {read}, kept {len(kept)}, dropped {read - len(kept)}" in printed
    assert len(player.read) == 3 and 0 < len(kept) < read <= 90
    assert "identical pair" in printed and "unfinished reply" in printed
    assert {args[3] for args in asked} == {"harmless"} and {args[5] for args in asked} == {0.25}
    assert {uniforms.shape[1] for uniforms in player.uniforms} == {7}
    assert not any(toy_people.is_held_out(list(what_is_asked(c.prompt))) for c in kept)
    first = player.read[0]
    for split, kind in (("test", "harmless"), ("train 2", "harmless"), ("train", "helpful")):
        n_batches = len(player.read)
        collect(run, cfg, player, kind, split, 90)  # other people
        assert first[:6] != player.read[n_batches][:6]
    assert all(toy_people.is_held_out(list(what_is_asked(c.prompt)))
               for c in collect(run, cfg, player, "helpful", "test", 30))
    silent = Scripted(lambda prompt, i: None)
    with pytest.raises(UserError, match="none of the 6 pairs of harmless replies can be compared"):
        collect(run, cfg, silent, "harmless", "train", 6)


def test_half_of_the_people_leave_after_each_exchange(run):
    player = Scripted(answer_or_refuse)
    for n in (21, 22, 23, 24):
        assert len(collect(run, PMConfig(), player, "helpful", "train", n)) == n
    for turns, mean in ((1, 1), (4, 1.875)):
        player.read = []
        assert len(collect(run, PMConfig(turns=turns), player, "helpful", "train", 200)) == 200
        assert len(player.read) == turns
        assert abs(200 / (len(player.read[0]) / 2) - mean) < 0.4  # of some 107 conversations


def test_rates_by_turn_by_hand(run):
    """A policy that answers first questions and refuses later ones; the same people for all."""
    def script(prompt, i):
        is_first = len([q for q in questions_of(prompt) if q != "Hello."]) == 1
        return answer(prompt) if is_first else REFUSAL
    player, other = Scripted(script), Scripted(lambda prompt, i: IDK)
    rows = rates_by_turn(run, player, 30, 20)
    rates_by_turn(run, other, 30, 20)
    assert player.read[0] == other.read[0] and player.read[1] != other.read[1]
    assert [row["n"] for row in rows] == [30] * 4
    harmful = [toy.understand(prompt).harmful for prompt in player.read[0]]
    assert harmful == [False, True, False] * 10
    for turn, row in enumerate(rows, start=1):
        first = float(turn == 1)
        assert (row["correct"], row["complied"]) == (first, first)
        assert row["refused_benign"] == 1 - first
        assert (row["helpfulness"], row["harmlessness"]) == ((3, -2) if first else (-1, 1))
    prompts = sum(player.read, [])
    assert all(toy_people.is_held_out(list(what_is_asked(prompt))) for prompt in prompts)


@pytest.mark.parametrize("kind, winner", [("helpful", 0), ("harmless", 1)])
def test_a_match_counts_what_is_judged_better(run, kind, winner):
    a, b = Scripted(answer), Scripted(lambda prompt, i: REFUSAL)
    wins = match(run, a, b, kind, 40)
    odds = toy.preference(*[f(a.read[0][0]) for f in (str, answer, lambda p: REFUSAL)], kind)
    assert wins.sum() == 160 and wins.diagonal().sum() == 0
    p = odds if winner == 0 else 1 - odds
    assert p > 0.9 and within(wins[winner, 1 - winner].item(), 160, p)
    assert torch.equal(match(run, b, b, kind, 5), torch.zeros(2, 2))
