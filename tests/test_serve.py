"""A class in the browser: what a choice becomes, what is refused, and what outlives a kill."""
import dataclasses
import http.client
import json
import re
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import agreement
import classroom
import serve
from choices import ChoiceFile, choice_record, goes_on, is_held_out
from classroom import Classroom, Refusal, Replies
from conftest import ROOT
from conversation import Reply, ask
from data import ASSISTANT, HUMAN, train_bpe
from model import GPT, GPTConfig
from run import UserError, save

QUESTION = "What is the capital of Peru?"
PROMPT = f"{HUMAN} {QUESTION}{ASSISTANT}"


class StubSpeaker:
    """Replies with the seed's number, so that equal seeds give equal replies."""

    def __init__(self, label="stub", finished=True, reply=None):
        self.label, self.finished, self.fixed = label, finished, reply
        self.batches, self.gate, self.entered = [], threading.Event(), threading.Event()
        self.gate.set()

    def fit(self, dialogue):
        if "too long" in dialogue:
            raise UserError("this message has too many tokens")
        return dialogue, 0

    def reply(self, dialogues, seeds):
        self.batches.append(list(dialogues))
        self.entered.set()
        assert self.gate.wait(60)
        if any("poison" in dialogue for dialogue in dialogues):
            raise RuntimeError("a bug")
        return [Reply(self.fixed or f" {self.label} {seed}", self.finished, seed, 0)
                for seed in seeds]


def start_replies(speaker=None, second=None, **options) -> Replies:
    speaker = speaker or StubSpeaker()
    replies = Replies(speaker, second or speaker, seed=0, **options)
    replies.start()
    return replies


@pytest.fixture
def path(tmp_path):
    return tmp_path / "class.jsonl"


@pytest.fixture
def room(path):
    with ChoiceFile(path) as choices:
        yield Classroom(choices, start_replies(), b"key")


def about(**fields) -> dict:
    return {"number": 0, "turn": 1, "kind": "helpful", "text": QUESTION} | fields


def choose(room, token, side=0, strength=4, **fields) -> dict:
    request = about(**fields)
    offer = room.say(token, request)
    return room.choose(token, request | {"pair": offer["pair"], "side": side, "strength": strength})


def on_disk(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def refused(status: int, action, *args, **options) -> Refusal:
    with pytest.raises(Refusal) as caught:
        action(*args, **options)
    assert caught.value.status == status
    return caught.value


# ---- Choices -----------------------------------------------------------------


@pytest.mark.parametrize("kind", ["helpful", "harmless"])
@pytest.mark.parametrize("side", [0, 1])
def test_a_choice_becomes_a_comparison(room, path, kind, side):
    """In red-teaming what people pick is `rejected` (§2.2). Over 16 turns both sides are drawn."""
    token, lots = room.join("Ann", "")["token"], set()
    for number in range(4):
        for turn in range(1, 5):
            request = about(number=number, turn=turn, kind=kind)
            offer = room.say(token, request)
            assert offer == room.say(token, request)  # the lot is the same when the page asks again
            choice = request | {"pair": offer["pair"], "side": side, "strength": 2 + side}
            state = room.choose(token, choice)
            record = on_disk(path)[-1]
            field, other = ("chosen", "rejected") if kind == "helpful" else ("rejected", "chosen")
            assert record[field].endswith(f"{PROMPT} {offer['replies'][side]}")
            assert record[other].endswith(f"{PROMPT} {offer['replies'][1 - side]}")
            seeds = [record[name].split()[-1] for name in ("chosen", "rejected")]
            assert [str(seed) for seed in record["seeds"]] == seeds
            assert (record["turn"], record["kind"], record["who"]) == (turn, kind, "Ann")
            assert record["strength"] == 2 + side and record["models"] == ["stub", "stub"]
            assert state["lines"] == offer["lines"] + [["Assistant", offer["replies"][side]]]
            assert (state["turn"], state["done"]) == (turn + 1, 4 * number + turn)
            lots.add(room.is_swapped(record["conversation"], turn))
    assert lots == {False, True} and len(on_disk(path)) == 16


def test_two_models_give_one_reply_each(path):
    with ChoiceFile(path) as choices:
        replies = start_replies(StubSpeaker("one"), StubSpeaker("two"))
        room = Classroom(choices, replies, b"key")
        token = room.join("Ann", "")["token"]
        for number in range(4):  # all of 32 on the same sides: a chance of 5e-10
            for turn in range(1, 9):
                choose(room, token, number=number, turn=turn)
    models = [record["models"] for record in on_disk(path)]
    assert ["one", "two"] in models and ["two", "one"] in models
    for record in on_disk(path):
        for field, model in zip(("chosen", "rejected"), record["models"]):
            assert model in record[field].split(ASSISTANT)[-1]


def test_a_choice_that_is_sent_again_counts_once(room, path):
    token = room.join("Ann", "")["token"]
    request = about()
    choice = request | {"pair": room.say(token, request)["pair"], "side": 0, "strength": 4}
    pair, nested = room.replies.pair, []

    def overtaken(dialogue):  # by the same choice, after this one was found to be new
        if not nested:
            nested.append(None)
            room.choose(token, choice)
        return pair(dialogue)

    room.replies.pair = overtaken
    first = room.choose(token, choice)
    room.replies.pair = None  # a choice that is stored needs no model
    assert first == room.choose(token, choice) == room.state(token)
    assert (first["done"], first["turn"], len(on_disk(path))) == (1, 2, 1)


@pytest.mark.parametrize("kind", ["helpful", "harmless"])
def test_another_choice_of_the_same_turn_is_not_taken_for_it(room, path, kind):
    """As from two tabs. Its page must not say "Stored."."""
    token, choices = room.join("Ann", "")["token"], []
    for text in ("What is 2 + 1?", "What is 1 + 1?"):  # both tabs ask before either chooses
        request = about(kind=kind, text=text)
        choices.append(request | {"pair": room.say(token, request)["pair"], "side": 1,
                                  "strength": 4})
    done = room.choose(token, choices[0])
    assert done["done"] == 1 and room.choose(token, choices[0]) == done
    for other in (choices[1], choices[0] | {"side": 0}, choices[0] | {"strength": 3},
                  choices[0] | {"pair": "?"},
                  choices[0] | {"kind": "harmless" if kind == "helpful" else "helpful"}):
        refused(409, room.choose, token, other)
    assert len(on_disk(path)) == 1


def ann_in_turn_4(room) -> str:
    """Ann has made one choice in her first conversation and three in her second."""
    token = room.join("Ann", "")["token"]
    for number, turn in ((0, 1), (1, 1), (1, 2), (1, 3)):
        choose(room, token, number=number, turn=turn)
    return token


@pytest.mark.parametrize("status, fields", [
    (409, {"turn": 5}), (409, {"turn": 0}), (409, {"turn": -1}), (409, {"number": 0, "turn": 2}),
    (409, {"number": 2, "turn": 2}), (409, {"number": 3, "turn": 1}),
    (409, {"number": -1, "turn": 1}), (400, {"turn": True}), (400, {"turn": "4"}),
    (400, {"number": "1"}), (400, {"number": "0", "turn": 1}), (400, {"number": None}),
    (400, {"kind": "other"}), (400, {"kind": ["helpful"]}), (400, {"kind": "harmless"}),
    (400, {"text": ["a list"]}), (422, {"text": "too long"}), (422, {"suggest": "0"})])
def test_requests_that_fit_no_turn(room, path, status, fields):
    token = ann_in_turn_4(room)
    request = about(number=1, turn=4) | fields
    refused(status, room.say, token, request)
    refused(status, room.choose, token, request | {"pair": "", "side": 0, "strength": 4})
    assert len(on_disk(path)) == 4


@pytest.mark.parametrize("status, fields", [
    (400, {"side": 2}), (400, {"side": True}), (400, {"side": None}), (400, {"strength": 0}),
    (400, {"strength": 5}), (400, {"strength": 2.0}), (409, {"pair": "other"}),
    (409, {"pair": []})])
def test_what_a_choice_may_not_be(room, path, status, fields):
    token = ann_in_turn_4(room)
    request = about(number=1, turn=4)
    request |= {"pair": room.say(token, request)["pair"], "side": 0, "strength": 4}
    refused(status, room.choose, token, request | fields)
    assert len(on_disk(path)) == 4
    assert room.choose(token, request)["turn"] == 5
    refused(409, room.say, token, request)  # it has its choice


def test_a_conversation_has_an_end(room, monkeypatch):
    monkeypatch.setattr(classroom, "MAX_TURNS", 2)
    token = room.join("Ann", "")["token"]
    for turn in (1, 2):
        choose(room, token, turn=turn)
    refused(422, room.say, token, about(turn=3))
    choose(room, token, number=1)


@pytest.mark.parametrize("text", ["", "  ", "x" * 501, "a\n\nAssistant: b", "\x1b[2J", "\x85",
                                  "\ud83d", None, 7])
def test_lines_that_are_refused(room, text):
    refused(400, room.say, room.join("Ann", "")["token"], about(text=text))


def test_what_cannot_be_seen_is_shown(room):
    offer = room.say(room.join("Ann", "")["token"], about(text="<b>\u202e</b>"))
    assert offer["lines"] == [["Human", r"<b>\u202e</b>"]]


def test_a_model_that_has_changed_asks_again(room, path):
    """Its replies are not those that the person saw, so nothing is stored."""
    token = room.join("Ann", "")["token"]
    seen = room.say(token, about())
    room.replies = start_replies(StubSpeaker("new"))
    choice = about() | {"pair": seen["pair"], "side": 0, "strength": 4}
    refusal = refused(409, room.choose, token, choice)
    assert "new" in refusal.more["replies"][0] and on_disk(path) == []
    room.choose(token, choice | {"pair": refusal.more["pair"]})
    assert "new" in on_disk(path)[0]["chosen"]


# ---- People ------------------------------------------------------------------


def test_names_and_tokens(room):
    names = [room.join(" Ann ", "")["name"] for _ in range(3)]
    assert names == ["Ann", "Ann 2", "Ann 3"]
    token = room.join("Bea", "")["token"]
    assert room.state(token)["name"] == "Bea"
    refused(409, room.say, token, about(number=-1))
    person, signature, _ = token.split(":")
    for forged in (f"{person}:{signature}:Cleo", f"{person}0:{signature}:Bea", "", None, "::",
                   f"{person}:{'0' * 32}:Bea", f"{person}:{signature}:Bea\ud83d",
                   f"{person[:-1]}:{signature}:{person[-1]}:Bea"):
        refused(401, room.state, forged)
    refused(401, Classroom(room.choices, room.replies, b"other key").state, token)
    for name in ("", "x" * 41, "a\u202eb", "a\nb", None):
        refused(400, room.join, name, "")
    assert room.join("\u5c71\u3000\u7530", "a code that nobody asked for")["name"] == "\u5c71 \u7530"


def test_a_name_stays_taken_after_a_restart(path):
    """Also that of a person who has made no choice yet."""
    with ChoiceFile(path) as choices:
        token = Classroom(choices, start_replies(), b"key").join("Ann", "")["token"]
        room = Classroom(choices, start_replies(), b"key")
        assert room.state(token)["name"] == "Ann"
        assert room.join("Ann", "")["name"] == "Ann 2"


def test_the_join_code(path):
    with ChoiceFile(path) as choices:
        room = Classroom(choices, start_replies(), b"key", code="K7QPXM")
        for code in ("", "K7QPX", "K7QPXN", None, "\ud83d"):
            refused(403, room.join, "Ann", code)
        assert room.join("Ann", " k7qpxm ")["name"] == "Ann"


def test_a_new_server_knows_what_the_file_knows(path):
    """The choices are all that the second Classroom gets; the barely sure ones are apart."""
    other = choice_record(PROMPT, " a", " b", "helpful", "Cleo", 4, ["m", "m"], [0, 0], "chat", 1)
    with ChoiceFile(path) as choices:
        choices.append(other)
        room = Classroom(choices, start_replies(), b"key")
        token = room.join("Ann", "")["token"]
        choose(room, token, strength=1)
        choose(room, token, turn=2, strength=3)
        choose(room, token, number=1, kind="harmless", strength=1)
        state = room.state(token)
        offer = room.say(token, about(number=1, turn=2, kind="harmless"))
    with ChoiceFile(path) as choices:
        room = Classroom(choices, start_replies(), b"key")
        assert room.state(token) == state and state["done"] == 3
        assert (state["number"], state["turn"], state["kind"]) == (1, 2, "harmless")
        request = about(number=1, turn=2, kind="harmless")
        room.choose(token, request | {"pair": offer["pair"], "side": 0, "strength": 4})
        assert room.state(token)["done"] == 4
        assert [room.join(name, "")["name"] for name in ("Ann", "Cleo")] == ["Ann 2", "Cleo 2"]
    assert [record["turn"] for record in on_disk(path)] == [1, 2, 2]


def test_suggestions(room):
    """Prompts that all share at conversations 0, 4, ..., again at 3, 7, ...; all others differ."""
    def suggest(person, number, turn=1, kind="helpful", attempt=0, dialogue=""):
        return room.suggestion(person, number, turn, kind, dialogue, attempt)

    for block in (0, 4):
        assert suggest("a", block) == suggest("a", block + 3) == suggest("b", block)
        assert len({suggest(person, block + i) for person in "ab" for i in (1, 2)}) == 4
        assert not is_held_out(suggest("a", block))
    assert suggest("a", 0) != suggest("a", 4)
    assert suggest("a", 0) != suggest("a", 0, kind="harmless")
    assert len({suggest("a", 0, attempt=i) for i in range(10)}) == 10
    question, remarks = ask("", "What is the capital of Peru?"), set()
    for attempt in range(10):  # people react to the reply
        for answer, expected in ((" Lima.", "Right, thank you."), (" Rome.", "Wrong.")):
            dialogue = question + answer
            prompt = suggest("a", 0, turn=2, attempt=attempt, dialogue=dialogue)
            assert prompt.startswith(f"{dialogue}{HUMAN} ") and prompt.count(HUMAN) == 2
            if prompt.startswith(f"{dialogue}{HUMAN} {expected}"):
                remarks.add(expected)
        unknown = ask("", "Who am I?") + " You."
        assert suggest("a", 0, turn=2, attempt=attempt, dialogue=unknown).count(HUMAN) == 2
    assert len(remarks) == 2
    for attempt in (-1, classroom.MAX_SUGGESTIONS, True, "0"):
        refused(422, suggest, "a", 0, attempt=attempt)
    room.is_toy = False
    refused(400, suggest, "a", 0)


# ---- Replies -----------------------------------------------------------------


def in_threads(action, items) -> list:
    """Start a thread for each item; their results, or exceptions, come in the list's end."""
    results = [None] * len(items)

    def work(i):
        try:
            results[i] = action(items[i])
        except Exception as error:
            results[i] = error

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(items))]
    for thread in threads:
        thread.start()
    return threads, results


def test_all_who_wait_are_one_batch():
    speaker = StubSpeaker()
    speaker.gate.clear()
    replies = start_replies(speaker)
    first, _ = in_threads(replies.pair, ["first"])
    assert speaker.entered.wait(60)
    rest, results = in_threads(replies.pair, [f"dialogue {i % 20}" for i in range(30)])
    while replies.waiting.qsize() < 30:
        pass
    speaker.gate.set()
    for thread in first + rest:
        thread.join()
    assert [len(batch) for batch in speaker.batches] == [2, 40]  # 20 dialogues, two replies to each
    assert results[0] is results[20] and len({pair.digest for pair in results}) == 20
    assert replies.pair("dialogue 7").digest == start_replies().pair("dialogue 7").digest


@pytest.mark.parametrize("speaker", [StubSpeaker(reply=" same"), StubSpeaker(finished=False)])
def test_replies_that_cannot_be_compared(speaker):
    refused(422, start_replies(speaker).pair, "a")


def test_nobody_waits_in_vain():
    replies = start_replies()
    with pytest.raises(RuntimeError):
        replies.pair("poison")
    refused(422, replies.pair, "too long")
    assert replies.pair("after that")
    replies.MAX_KEPT = 3
    for i in range(9):
        replies.pair(str(i))
    assert replies.pair("last") and len(replies.kept) <= 4
    speaker = StubSpeaker()
    speaker.gate.clear()
    replies = Replies(speaker, speaker, seed=0, patience=0.01)
    refused(503, replies.pair, "nobody samples it")
    replies.waiting.maxsize = 1
    refused(503, replies.pair, "no room to wait")


# ---- Agreement ---------------------------------------------------------------


def pick(person, n, chosen=" Lima.", rejected=" Rome.", kind="helpful", prompt=PROMPT, strength=4):
    return choice_record(prompt, chosen, rejected, kind, f"who {person}", strength, ["m", "m"],
                         [0, 0], f"{person}-{n}", 1)


def test_the_table():
    right, wrong = {"chosen": " Lima."}, {"chosen": " Rome.", "rejected": " Lima."}
    records = [
        pick("a", 0, **right), pick("b", 0, **right), pick("c", 0, **wrong),  # shared
        pick("a", 3, **wrong), pick("b", 3, **right), pick("b", 7, **right),  # again
        pick("a", 4, " x", " y", prompt=f"{HUMAN} Who are you?{ASSISTANT}"),  # no truth
        pick("c", 1, " Lima.", " Sure! Lima.", kind="harmless", strength=1),  # equal truth
        pick("d", 0) | {"rejected": HUMAN}]  # no comparison
    margins = {"a-0-1": 1.0, "a-3-1": -1.0, "c-0-1": 0.5}
    rows = {row[0]: row[1:] for row in agreement.table(records, True, margins)["rows"]}
    assert rows == {
        "who a": [3, 3, 0, 0, [1, 2], [0, 1], [1, 2], [1, 2]],
        "who b": [3, 3, 0, 0, [1, 2], [2, 2], [3, 3], [0, 0]],
        "who c": [2, 1, 1, 1, [0, 2], [0, 0], [0, 1], [1, 1]],
        "everybody": [8, 7, 1, 1, [1, 3], [2, 3], [4, 6], [2, 3]]}
    assert agreement.table(records, False, {})["rows"][-1][7:] == [[0, 0], [0, 0]]


def test_the_judge_reads_a_new_preference_model(monkeypatch):
    """Scores are those of the model that is there now, and each choice is scored once by it."""
    sign, scored, replaced = [1], [], [False]

    class StubScorer:
        label = "stub.pt"

        def __init__(self, *args):
            if not sign:
                raise UserError("pm.pt does not exist")

        def was_replaced(self):
            return replaced[0]

        def score(self, prompts, replies):
            scored.extend(replies)
            return [None if reply == " y" else sign[0] * len(reply) for reply in replies]

    monkeypatch.setattr(agreement, "Scorer", StubScorer)
    judge = agreement.Judge("folder", "pm.pt", "cpu", is_toy=True)
    records = [pick("a", 0, " longer", " it"), pick("a", 1, " x", " y")]
    for _ in range(2):
        found = judge.overview(records)
        assert found["rows"][-1][8] == [1, 1] and len(scored) == 4 and "stub.pt" in found["notes"]
    assert found["summary"].startswith("2 choices by 1 person.")
    sign[0], replaced[0] = -1, True
    assert judge.overview(records)["rows"][-1][8] == [0, 1]
    sign.clear()
    assert "does not exist" in judge.overview(records)["notes"]


# ---- Server ------------------------------------------------------------------


@pytest.fixture
def server(room, tmp_path):
    judge = SimpleNamespace(overview=lambda records: {"rows": len(records)})
    secret = SimpleNamespace(lecturer="secret")
    server = serve.Server("127.0.0.1", 0, room, secret, judge)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def request(server, method="POST", path="/state", body="{}", **headers):
    """-> (status, headers, content)"""
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=60)
    given = {"Content-Type": "application/json"}
    for name, value in headers.items():
        given[name.replace("_", "-")] = value
    connection.request(method, path, body, given)
    answer = connection.getresponse()
    return answer.status, answer.headers, answer.read()


def test_the_page_runs_nothing_but_its_own_script(server):
    status, headers, content = request(server, "GET", "/", None)
    text, policy = content.decode(), headers["Content-Security-Policy"]
    assert status == 200 and headers.get_content_type() == "text/html"
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe" not in policy and headers["X-Content-Type-Options"] == "nosniff"
    for word in ("innerHTML", "outerHTML", "insertAdjacent", "document.write", "eval(", "://",
                 " onclick=\"", "@import", "url("):
        assert word not in text, word
    page = serve.Page(text.replace("here = null", "here = alert(1)"))
    assert page.headers["Content-Security-Policy"] != policy


def test_a_choice_through_the_network(server, path):
    def post(action, **fields):
        status, headers, content = request(server, path=action, body=json.dumps(fields))
        assert status == 200 and headers["Cache-Control"] == "no-store"
        return json.loads(content)

    token = post("/join", name="Ann", code="")["token"]
    offer = post("/say", token=token, **about())
    state = post("/choose", token=token, pair=offer["pair"], side=1, strength=3, **about())
    assert state == post("/state", token=token) and state["done"] == 1
    assert goes_on(on_disk(path)[0]).endswith(offer["replies"][1])
    assert post("/class", key="secret") == {"rows": 1}


@pytest.mark.parametrize("status, options", [
    (404, {"method": "GET", "path": "/page.html"}), (404, {"method": "GET", "path": "/../run.py"}),
    (404, {"method": "GET", "path": "/#"}), (404, {"path": "/"}), (404, {"path": "/class.jsonl"}),
    (501, {"method": "PUT"}), (501, {"method": "OPTIONS"}), (501, {"method": "DELETE"}),
    (421, {"Host": "evil.example"}), (421, {"Host": "127.0.0.1.evil.example:80"}),
    (421, {"method": "GET", "path": "/", "Host": "evil.example"}), (421, {"Host": ""}),
    (403, {"Origin": "http://evil.example"}), (403, {"Origin": "null"}),
    (415, {"Content_Type": "text/plain"}), (400, {"body": "{"}), (400, {"body": "[]"}),
    (400, {"body": "[" * 9000}), (400, {"body": b"\xff"}), (413, {"body": " " * 1_000_000}),
    (411, {"Content_Length": "-1"}), (411, {"Content_Length": "1e3"}),
    (401, {"body": '{"token": {}}'}), (401, {"path": "/class", "body": '{"key": "\\ud83d"}'}),
    (400, {"path": "/join", "body": "{}"})])
def test_requests_that_are_refused(server, status, options):
    found, headers, content = request(server, **options)
    assert found == status and json.loads(content)["error"]
    assert headers.get_content_type() == "application/json"


@pytest.mark.parametrize("host", ["localhost:80", "127.0.0.1", "192.168.0.7:8000", "[::1]:8000"])
def test_its_own_addresses(server, host):
    assert request(server, Host=host, Origin=f"http://{host}")[0] == 401  # no token, nothing worse


def test_a_full_disk_and_a_bug(server, room, path, monkeypatch):
    """Neither is confirmed; after the disk has room again, the same request is."""
    has_traceback = threading.Event()
    monkeypatch.setattr(serve.traceback, "print_exc", has_traceback.set)
    token = room.join("Ann", "")["token"]
    choice = about() | {"token": token, "pair": room.say(token, about())["pair"], "side": 0,
                        "strength": 4}

    def full(record):
        raise UserError("cannot write class.jsonl: no space left")

    with monkeypatch.context() as patch:
        patch.setattr(room.choices, "append", full)
        status, _, content = request(server, path="/choose", body=json.dumps(choice))
        assert status == 507 and b"class.jsonl" not in content
        assert not has_traceback.is_set()
        assert room.state(token)["done"] == 0
        patch.setattr(room.choices, "append", lambda record: 1 / 0)
        status, _, content = request(server, path="/choose", body=json.dumps(choice))
        assert status == 500 and b"division" not in content
    assert request(server, path="/choose", body=json.dumps(choice))[0] == 200
    assert len(on_disk(path)) == 1
    assert has_traceback.wait(60)


def test_silent_clients_block_nobody_and_are_closed(server, monkeypatch):
    """Here they would have all the time in the world, were it not for their lifetime."""
    monkeypatch.setattr(server, "MAX_FROM_ONE_ADDRESS", 6)
    monkeypatch.setattr(serve.Handler, "timeout", None)
    silent = []
    for start in (b"", b"GET", b"POST /say HTTP/1.1\r\nHost: a\r\nContent-Length: 9\r\n\r\n{"):
        silent.append(socket.create_connection(("127.0.0.1", server.server_port), timeout=60))
        silent[-1].sendall(start)
    assert request(server, "GET", "/", None)[0] == 200
    while len(server.open) > 3:
        pass
    for _ in range(3):
        silent.append(socket.create_connection(("127.0.0.1", server.server_port), timeout=60))
    while len(server.open) < 6:
        pass
    with pytest.raises((ConnectionError, http.client.HTTPException)):
        request(server, "GET", "/", None)  # one too many
    with server.guard:
        for connection, (address, _) in server.open.items():
            server.open[connection] = address, 0.0  # their time is over
    for connection in silent:
        connection.recv(1)  # times out if nobody ends the connection
        connection.close()
    while server.open:
        pass
    assert request(server, "GET", "/", None)[0] == 200


def test_a_wrong_code_takes_time(server, room, monkeypatch):
    slept, sleep = [], serve.time.sleep

    def nap(seconds):
        slept.append(seconds)
        sleep(min(seconds, 0.01))

    monkeypatch.setattr(room, "code", "K7QPXM")
    monkeypatch.setattr(serve.Handler, "WRONG_CODE", 99.0)
    monkeypatch.setattr(serve.time, "sleep", nap)
    assert request(server, path="/join", body='{"name": "Ann", "code": "K7QPXM"}')[0] == 200
    assert 99.0 not in slept
    assert request(server, path="/join", body='{"name": "Ann", "code": "A"}')[0] == 403
    assert 99.0 in slept


def test_a_busy_port_and_other_addresses(server, room):
    for host, port in (("127.0.0.1", server.server_port), ("127.0.0.1", 70_000), ("no such", 0),
                       ("203.0.113.1", 0)):
        with pytest.raises(UserError, match="cannot listen on --host"):
            serve.Server(host, port, room, None, None)


def test_secrets_outlive_the_server(tmp_path):
    path = tmp_path / "keys.json"
    first, second = serve.Secrets(path), serve.Secrets(path)
    assert vars(first) == vars(second) and re.fullmatch("[A-Z2-9]{6}", first.code)
    assert path.stat().st_mode & 0o077 == 0 or sys.platform == "win32"
    assert vars(first) != vars(serve.Secrets(tmp_path / "others.json"))
    for content in ("", "[]", "{}", '{"code": "A", "key": "not hex", "lecturer": "b"}'):
        path.write_text(content)
        with pytest.raises(UserError, match="delete it"):
            serve.Secrets(path)


# ---- The whole program -------------------------------------------------------


def tiny_run(folder: Path):
    """A folder with an untrained model that ends a reply after some tokens."""
    folder.mkdir()
    tok = train_bpe([QUESTION], 300)
    tok.save(folder / "tokenizer.json")
    cfg = GPTConfig(1, 1, 16, vocab_size=tok.n_vocab, context=192)
    torch.manual_seed(0)
    model = GPT(cfg)
    model.ln_f.bias.data[0] = 2.0                    # in every hidden state
    model.embed.weight.data[tok.end_of_turn, 0] = 2.0  # so the end is likely
    for name in ("initial.pt", "policy.pt"):
        save(folder / name, model=model.state_dict(), config=dataclasses.asdict(cfg),
             tokenizer=tok.fingerprint)
    (folder / "config.json").write_text('{"run": {"data": "toy"}}')


def heed_ctrl_c():
    """A shell's background jobs, and their children, ignore Ctrl-C. Perhaps this is one."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def start_server(folder, *options):
    command = [sys.executable, str(ROOT / "serve.py"), str(folder), "--port", "0", *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               preexec_fn=heed_ctrl_c)
    printed = ""
    for line in process.stdout:
        printed += line
        if line.startswith("choices:"):
            break
    return process, printed


def test_a_server_that_is_killed_goes_on(tmp_path):
    """It takes seconds, because the program starts twice."""
    folder = tmp_path / "run"
    tiny_run(folder)
    process, printed = start_server(folder)
    at = SimpleNamespace(server_port=int(re.search(r":(\d+)/", printed)[1]))

    def post(path, **fields):
        return json.loads(request(at, path=path, body=json.dumps(fields))[2])

    token = post("/join", name="Ann", code="")["token"]
    offer = post("/say", token=token, **about())
    post("/choose", token=token, pair=offer["pair"], side=0, strength=4, **about())
    offer, state = post("/say", token=token, **about(turn=2)), post("/state", token=token)
    process.send_signal(signal.SIGKILL)  # between the replies and the choice
    process.communicate()
    with open(folder / "class.jsonl", "a") as file:
        file.write('{"chosen": "')  # half a line
    process, printed = start_server(folder)
    at.server_port = int(re.search(r":(\d+)/", printed)[1])
    assert "1 so far" in printed and post("/state", token=token) == state
    state = post("/choose", token=token, pair=offer["pair"], side=0, strength=4, **about(turn=2))
    assert state["lines"][-1] == ["Assistant", offer["replies"][0]]
    assert [record["turn"] for record in on_disk(folder / "class.jsonl")] == [1, 2]
    process.send_signal(signal.SIGINT)
    errors = process.communicate()[1]
    assert process.returncode == 0 and "2 choices are in" in errors and "half-written" in errors
