"""Tests of conversation.py: texts, and a Speaker and a Scorer of a tiny folder."""
import dataclasses
import json
import os
import shutil
import unicodedata

import pytest
import torch

import conversation
from conversation import (Reply, Scorer, Speaker, ask, best_speaker, comparable, cut_at_human, fit,
                          one_turn, shown, truth, two_replies)
from data import ASSISTANT, HUMAN, PATTERN, SINGLE_BYTES, Tokenizer
from helpers import doubled, exact_score, shaken
from model import GPT, GPTConfig
from pm import ScalarModel
from run import UserError, save

TOK = Tokenizer("bytes", PATTERN, SINGLE_BYTES)  # a token is a byte
CONTEXT, R = 160, 12


def make_folder(out, names=("policy.pt", "initial.pt", "pm.pt"), data="toy"):
    """The output folder of a run, with untrained models."""
    out.mkdir(parents=True, exist_ok=True)
    TOK.save(out / "tokenizer.json")
    config = {"run": {"data": data}, "rl": {"max_response": R}}
    (out / "config.json").write_text(json.dumps(config))
    cfg = GPTConfig(n_layer=2, n_head=2, d_model=32, vocab_size=TOK.n_vocab, context=CONTEXT)
    for seed, name in enumerate(names):
        torch.manual_seed(seed)
        net = ScalarModel(GPT(cfg)) if name in ("pm.pt", "pmp.pt") else GPT(cfg)
        save(out / name, model=shaken(net, seed).state_dict(), config=dataclasses.asdict(cfg),
             tokenizer=TOK.fingerprint)
    return out


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("run"))


# ---- 1. Texts ----------------------------------------------------------------


@pytest.mark.parametrize("text, turn", [
    (" Hi! ", " Hi!"), ("a\r\nb", " a\nb"), ("half \ud83d", " half ?"), ("Human: x", " Human: x"),
    ("a\n\nHuman: b", " a\nHuman: b"), ("a\n\n\n\nAssistant: b", " a\nAssistant: b"),
    ("a\n\nb", " a\n\nb")])
def test_a_message_is_one_turn(text, turn):
    assert one_turn(text) == turn
    assert ask(f"{HUMAN} q{ASSISTANT} r", text) == f"{HUMAN} q{ASSISTANT} r{HUMAN}{turn}{ASSISTANT}"
    assert len(conversation.parse(ask("", text))) == 2


def test_an_empty_or_endless_message_is_refused():
    assert len(one_turn("x" * 10_000)) == 10_001
    for text, words in (("", "nothing was typed"), (" \n\t ", "nothing was typed"),
                        ("x" * 10_001, "a message has at most 10,000 characters")):
        with pytest.raises(UserError, match=words):
            one_turn(text)


def test_fit_drops_the_oldest_exchanges():
    parts = [f"{HUMAN} {'q' * n}{ASSISTANT} {'r' * n}" for n in (30, 3, 8)]
    last = f"{HUMAN} and?{ASSISTANT}"
    whole = "".join(parts) + last
    for n_left in range(4):
        text = "".join(parts[3 - n_left:]) + last
        room = len(TOK.encode_dialogue(text))
        for more in (0, 1):
            assert fit(TOK, whole, room + more) == (text, 6 - 2 * n_left)
    n_tokens = len(TOK.encode_dialogue(last))
    with pytest.raises(UserError, match=f"has {n_tokens} tokens.* at most {n_tokens - 1}: use"):
        fit(TOK, whole, n_tokens - 1)


def test_no_character_acts_on_the_terminal():
    text = "é ∑ 漢 \n" + "".join(map(chr, range(0x100))) + "\u202e\u2066\u200f\u2028\ud800\ufeff"
    safe = shown(text)
    assert safe.startswith("é ∑ 漢 \n")
    assert safe.endswith("\\u202e\\u2066\\u200f\\u2028\\ud800\\ufeff")
    assert "\\x1b" in safe and "\\r" in safe and "\\x9b" in safe
    kinds = {unicodedata.category(character) for character in safe.replace("\n", "")}
    assert not kinds & {"Cc", "Cf", "Cs", "Zl", "Zp"}


# ---- 2. Models ---------------------------------------------------------------


def test_a_reply_is_the_same_alone_in_a_batch_and_as_a_stream(made):
    """In float64, where the order of sums hardly ever decides about a token."""
    speaker = Speaker(made, temperature=1.3, device="cpu")
    speaker.net.double()
    dialogues, seeds = [], []
    for n in range(32):
        dialogues.append(ask("", "x" * (1 + n * 7 % 60)))
        seeds.append(n // 2 + 2**40)
    batch = speaker.reply(dialogues, seeds)
    assert {reply.finished for reply in batch} == {True, False}
    assert len({reply.text for reply in batch}) > 15
    for i, (dialogue, seed) in enumerate(zip(dialogues, seeds)):
        *_, last = speaker.stream(dialogue, seed)
        assert last == batch[i] and last.seed == seed and last.dropped == 0
        if i % 12 == 0:
            assert speaker.reply([dialogue], [seed]) == [last]
    tokens = list(speaker.sample_ids(TOK.encode_dialogue(dialogues[0]), seeds[0]))
    assert len(tokens) <= R and TOK.decode(tokens) == batch[0].text


@pytest.mark.parametrize("whole, finished", [
    (" Hi é ∑.", True), (" Hi.\n\nHe left.\n\nHuman", True), (" A\n\nHuman: you", True),
    (" A\n\nAssistant: I", True), (" A\n", False), (" \ud83d\ude00", False)])
def test_a_stream_grows_and_ends_where_the_human_begins(made, monkeypatch, whole, finished):
    whole = whole.encode("utf-16", "surrogatepass").decode("utf-16")
    ids = TOK.encode(whole)
    if "Human: " not in whole and finished:
        ids.append(TOK.end_of_turn)
    speaker = Speaker(made, device="cpu")
    monkeypatch.setattr(speaker, "sample_ids", lambda prompt, seed: iter(ids))
    replies = list(speaker.stream(ask("", "hi"), 0))
    assert replies[-1] == Reply(cut_at_human(whole), finished, 0, 0)
    for before, after in zip(replies, replies[1:]):
        assert after.text.startswith(before.text) and "\ufffd" not in before.text
        assert not before.text.endswith(("\n\nHuman", "\n\nH", "\n"))
    assert len(replies) > 1


def test_a_long_conversation_loses_its_beginning(made):
    speaker, dialogue = Speaker(made, device="cpu"), ""
    for n in range(20):
        dialogue = ask(dialogue, f"question {n}") + " yes"
    dialogue = ask(dialogue, "x")
    reply = speaker.reply([dialogue], [1])[0]
    text, dropped = speaker.fit(dialogue)
    assert reply == dataclasses.replace(speaker.reply([text], [1])[0], dropped=dropped)
    assert dropped > 30 and len(TOK.encode_dialogue(text)) <= CONTEXT - R - 1
    *_, last = speaker.stream(dialogue, 1)
    assert last.dropped == dropped
    n_longest = CONTEXT - R - 1 - len(TOK.encode_dialogue(ask("", "x"))) + 1  # characters
    assert speaker.reply([ask("", "x" * n_longest)], [1])[0].dropped == 0
    with pytest.raises(UserError, match=f"reads at most {CONTEXT - R - 1}: use a shorter one"):
        speaker.reply([ask("", "hi"), ask("", "x" * (n_longest + 1))], [1, 2])


def test_which_model_a_folder_talks_with(tmp_path):
    for name in ("lm.pt", "initial.pt", "policy.pt"):  # each is better than the one before
        make_folder(tmp_path, [name])
        assert best_speaker(tmp_path) == name
    speaker = Speaker(tmp_path, device="cpu")
    assert speaker.max_response == R and speaker.toy and not speaker.was_replaced()
    assert speaker.label.startswith(f"{tmp_path.name}/policy.pt ")
    assert Speaker(tmp_path, str(tmp_path / "lm.pt"), device="cpu").label != speaker.label
    assert Speaker(tmp_path, max_response=10**6, device="cpu").max_response < CONTEXT
    shutil.copy(tmp_path / "lm.pt", tmp_path / "new.pt")
    os.replace(tmp_path / "new.pt", tmp_path / "policy.pt")
    assert speaker.was_replaced() and len(speaker.reply([ask("", "hi")], [0])) == 1
    (tmp_path / "policy.pt").unlink()
    assert speaker.was_replaced()


@pytest.mark.parametrize("name, content, words", [
    ("policy.pt", {"tokenizer": "other"}, "trained with another tokenizer"),
    ("policy.pt", {"config": {"layers": 3}}, "does not hold a model"),
    ("policy.pt", {"model": {}}, "does not hold a model"),
    ("policy.pt", {"head": 1, "model": {"head.weight": torch.zeros(1)}}, "does not hold a model"),
    ("config.json", b"[]", "is not a config"), ("tokenizer.json", b"{}", "not a tokenizer"),
    ("policy.pt", b"half", "is not a checkpoint"), ("policy.pt", None, "does not exist")])
def test_a_folder_that_cannot_be_used(tmp_path, made, name, content, words):
    out = tmp_path / "out"
    shutil.copytree(made, out)
    if content is None:
        (out / name).unlink()
    elif isinstance(content, bytes):
        (out / name).write_bytes(content)
    else:
        save(out / name, **torch.load(out / name) | content)
    with pytest.raises(UserError, match=words):
        Speaker(out, device="cpu")


def test_models_of_the_wrong_kind(tmp_path, made):
    for make, words in ((lambda: Speaker(made, "pm.pt", device="cpu"), "cannot speak"),
                        (lambda: Scorer(made, "policy.pt", "cpu"), "gives no scores"),
                        (lambda: Speaker(made, temperature=0.0, device="cpu"), "temperature 0.0"),
                        (lambda: Speaker(made, temperature=float("nan")), "temperature nan"),
                        (lambda: best_speaker(tmp_path), "holds no language model")):
        with pytest.raises(UserError, match=words):
            make()


class Script:
    """Stands in for a Speaker: its replies come from a list, and it remembers the seeds."""

    def __init__(self, *texts):
        self.texts, self.seeds = list(texts), []

    def reply(self, dialogues, seeds):
        self.seeds += seeds
        return [Reply(text.rstrip("~"), not text.endswith("~"), seed, 0)
                for text, seed in zip([self.texts.pop(0) for _ in dialogues], seeds)]


def test_pairs_that_cannot_be_compared_are_drawn_again():
    a = Script(" a", " b", " c", " d", " e", " e", " e")
    b = Script(" x", " b ", "", " y~", " y", " e", " e")
    pairs = two_replies(a, b, ["1", "2", "3", "4"], [1, 2, 3, 3], tries=2)
    texts = [(one.text, other.text) for one, other in pairs]
    assert texts == [(" a", " x"), (" e", " y"), (" e", " e"), (" e", " e")] and not b.texts
    assert a.seeds[2] == a.seeds[3] and len(set(a.seeds + b.seeds)) == 10
    same = Script(" a", " b", " c", " d")  # one model: all first replies, then all second ones
    assert [(one.text, other.text) for one, other in two_replies(same, same, ["1", "2"], [1, 2])
            ] == [(" a", " c"), (" b", " d")]
    assert comparable(" a", " b") and not comparable(" a", "a ") and not comparable(" a", " ")


def test_scores_are_those_of_the_training(made):
    scorer = Scorer(made, device="cpu")
    dialogues = [ask("", "hi"), ask("", "x" * 300), ask("", "hi")]
    replies = [" yes", " no", " " + "x" * CONTEXT]
    scores, exact = scorer.score(dialogues, replies), doubled(scorer.net)
    for n, score in enumerate(scores[:2]):
        ids = TOK.encode_dialogue(dialogues[n]) + TOK.encode_reply(replies[n])
        expected = exact_score(exact, [*ids, TOK.end_of_context][-CONTEXT:])
        # float32: 2 layers of sums of 128 terms of size 1 at most, each rounded by 2**-24.
        assert abs(score - expected) < 2 * 128 * 2**-24 * 100
    assert scores[2] is None


def test_the_truth_is_known_inside_the_toy_world_only():
    known, unknown = ask("", "What is the capital of Peru?"), ask("", "Who are you, friend?")
    assert truth(known, " Lima.", "helpful") == 3 and truth(unknown, " Lima.", "helpful") is None
