"""Tests of choices.py: people's choices on the disk, and as comparisons."""
import contextlib
import errno
import hashlib
import json
import os
import resource
import signal

import pytest

import choices
import data
from choices import (ChoiceFile, check_people, choice_record, goes_on, is_held_out,
                     people_comparisons, read_choices)
from conversation import ask
from data import Comparison
from run import UserError

Q = ask("", "What is the capital of Peru?")


def record(conversation="c", turn=1, strength=3, kind="helpful", dialogue=Q, chosen=" Lima.",
           rejected=" Rome.") -> dict:
    return choice_record(dialogue, chosen, rejected, kind, "me", strength, ["a/policy.pt 12", "b"],
                         [7, None], conversation, turn)


def ids(path) -> list[str]:
    return [json.loads(line)["id"] for line in path.read_text().splitlines()]


@pytest.fixture
def path(tmp_path):
    """A file of four choices, the third of which was barely sure."""
    path = tmp_path / "deep" / "ours.jsonl"
    with ChoiceFile(path) as file:
        for turn, strength in enumerate((4, 3, 1, 2), start=1):
            assert file.append(record(turn=turn, strength=strength))
    return path


# ---- 1. A choice, and the file -----------------------------------------------


def test_a_choice_is_a_line_of_hh_rlhf(path):
    """And the most harmful reply is `rejected`, and what a red-team conversation goes on with."""
    harmful = record("d", kind="harmless", chosen=" No.\r\u2028\x1b", rejected=" A drill.")
    with ChoiceFile(path) as file:
        file.append(harmful)
        assert [r["id"] for r in file.records] == ["c-1", "c-2", "c-3", "c-4", "d-1"]
    assert ids(path) == ["c-1", "c-2", "c-4", "d-1"]
    assert ids(path.with_name("ours.unsure.jsonl")) == ["c-3"]
    rows, counter = data.read_comparisons(path, "helpful")
    assert rows[0] == Comparison(Q, " Lima.", " Rome.", "helpful", conversation="c")
    assert rows[3] == Comparison(Q, " No.\r\u2028\x1b", " A drill.", "harmless", conversation="d")
    assert counter["kept"] == 4
    assert data.load_comparisons(path, "test" if data.in_test(rows[0]) else "train")[0] == rows
    assert goes_on(harmful) == Q + " A drill." and goes_on(record()) == Q + " Lima."


def test_a_choice_that_is_sent_twice_counts_once(path):
    for _ in range(2):  # also after a restart, and whichever file it is in
        with ChoiceFile(path) as file:
            assert not file.append(record(turn=2, strength=1))
            assert not file.append(record(turn=3, strength=4))
            assert len(file.records) == 4
    assert ids(path) == ["c-1", "c-2", "c-4"]


@pytest.mark.parametrize("cut", [1, 2, 9, 150, -1])
def test_a_half_written_line_is_set_aside(path, cut):
    whole = path.read_bytes()
    last = whole.splitlines(keepends=True)[-1]
    path.write_bytes(whole[:-cut] if cut > 0 else whole[:-len(last) + 1])
    rest = path.read_bytes().splitlines()[-1]
    with ChoiceFile(path) as file:
        assert file.append(record(turn=9))
        notes = file.notes
    if cut == 1:  # all but the line break is there
        assert notes == [] and ids(path) == ["c-1", "c-2", "c-4", "c-9"]
        return
    assert len(notes) == 1 and f"line 3 of {path} is half-written" in notes[0]
    assert ids(path) == ["c-1", "c-2", "c-9"]
    assert path.with_name("ours.jsonl.half").read_bytes() == rest + b"\n"
    with ChoiceFile(path) as file:
        assert file.notes == []


@pytest.mark.parametrize("content", [
    b'{"vocabulary": [1, 2]}', b"no choices here", b'{"chosen": "x", "strength": 7}'])
def test_another_file_without_a_last_line_break_is_left_alone(tmp_path, content):
    other = tmp_path / "tokenizer.json"
    other.write_bytes(content)
    with pytest.raises(UserError, match="tokenizer.json:1: "):
        ChoiceFile(other)
    assert other.read_bytes() == content and not list(tmp_path.glob("*.half"))
    with pytest.raises(UserError, match="leave out .gz"):
        ChoiceFile(tmp_path / "ours.jsonl.gz")


@pytest.mark.parametrize("line, words", [
    (b"{", "not JSON"), (b"\xff", "not UTF-8"), (b"[]", "expected a JSON object"),
    ({"chosen": 3}, "'chosen' is 3"), ({"rejected": "Hello."}, "'rejected' does not begin"),
    ({"strength": 5}, "strength 5"), ({"strength": 0}, "strength 0"), ({"kind": "x"}, "kind 'x'"),
    ({"id": None}, "'id' is None"), ({"conversation": ["x" * 99]}, "'conversation' is ['xxx")])
def test_other_damage_is_named_and_left_alone(path, line, words):
    if isinstance(line, dict):
        line = json.dumps(record() | line).encode()
    for name in ("ours.jsonl", "ours.unsure.jsonl"):
        file = path.with_name(name)
        good = file.read_bytes()
        file.write_bytes(good + b"\n" + line + b"\n" + good)
        number = good.count(b"\n") + 2
        with pytest.raises(UserError) as error:
            ChoiceFile(path)
        assert f"{file}:{number}: " in str(error.value) and words in str(error.value)
        assert "\n" not in str(error.value) and len(str(error.value)) < len(str(file)) + 120
        assert file.read_bytes() == good + b"\n" + line + b"\n" + good
        file.write_bytes(good)
    ChoiceFile(path).close()  # both files were unlocked again
    with ChoiceFile(path) as file, pytest.raises(UserError, match="not a choice"):
        file.append(record(turn=9) | {"strength": 9})


def test_one_program_at_a_time(path):
    with ChoiceFile(path):
        with pytest.raises(UserError, match="another program .* choices to .*ours.jsonl: end"):
            ChoiceFile(path)
        other = path.with_name("other.jsonl")
        os.link(path.with_name("ours.unsure.jsonl"), path.with_name("other.unsure.jsonl"))
        with pytest.raises(UserError, match="another program .* choices to .*unsure.jsonl") as kept:
            ChoiceFile(other)
    ChoiceFile(other).close()  # a refusal leaves neither file locked, while `kept` holds on to it
    assert kept.value
    ChoiceFile(path).close()
    with pytest.raises(UserError, match="is not a file"):
        ChoiceFile(path.parent)
    with pytest.raises(UserError, match="cannot open .*: File exists"):
        ChoiceFile(path / "more.jsonl")


@pytest.mark.parametrize("change", [
    lambda path: path.unlink(), lambda path: os.replace(path.with_name("ours.unsure.jsonl"), path),
    lambda path: path.write_bytes(path.read_bytes()[:-30]),
    lambda path: path.write_bytes(path.read_bytes() + b"{}\n")])
def test_a_file_that_changes_under_our_feet(path, change):
    with ChoiceFile(path) as file:
        change(path)
        before = path.read_bytes() if path.exists() else None
        with pytest.raises(UserError, match="was changed or deleted by another program; this choi"):
            file.append(record(turn=9))
        assert (path.read_bytes() if path.exists() else None) == before
        assert len(file.records) == 4 and "c-9" not in file.ids


@contextlib.contextmanager
def full_disk(size: int):
    """No file can grow beyond `size` bytes: the system writes a part and then refuses."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)


def test_a_full_disk_leaves_whole_lines(path, monkeypatch):
    before = path.read_bytes()

    def fsync(_):
        raise OSError(errno.ENOSPC, "No space left on device")
    with ChoiceFile(path) as file:
        with full_disk(len(before) + 40), pytest.raises(UserError, match="cannot write .*: File t"):
            file.append(record(turn=8))
        assert path.read_bytes() == before
        monkeypatch.setattr(choices.os, "fsync", fsync)
        with pytest.raises(UserError, match="No space left on device; this choice is not stored"):
            file.append(record(turn=9))
        assert path.read_bytes() == before and len(file.records) == 4
        monkeypatch.undo()
        assert file.append(record(turn=9))  # when there is room again
    assert ids(path) == ["c-1", "c-2", "c-4", "c-9"]


def test_what_was_acknowledged_survives_kill_9(path):
    """A child writes choices, and says so after each; it is killed while it writes."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        with ChoiceFile(path) as file:
            for turn in range(5, 10**6):
                file.append(record(turn=turn, strength=1 + turn % 4))
                os.write(writing, b".")
        os._exit(1)
    os.close(writing)
    n_confirmed = 0
    while n_confirmed < 40:
        n_confirmed += len(os.read(reading, 1))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    while more := os.read(reading, 100):
        n_confirmed += len(more)
    os.close(reading)
    with ChoiceFile(path) as file:
        n_more = len(file.records) - 4
        assert n_confirmed <= n_more <= n_confirmed + 1
        assert file.ids == {f"c-{turn}" for turn in range(1, n_more + 5)}


# ---- 2. Training -------------------------------------------------------------


def test_which_choices_are_held_out(tmp_path, capsys):
    """One opening question in eight, with all turns of all conversations that open with it; and
    each choice is there once."""
    path, more = tmp_path / "ours.jsonl", tmp_path / "harmless.jsonl"
    rows = []
    for n in range(600):
        opening = ask("", f"Question {n // 2}?")
        if n % 2:  # another person asks the same, in other letters and after a greeting
            opening = ask(ask("", "Hi!") + " Hello.", f"question {n // 2}")
        kind = ("helpful", "harmless")[n % 2]
        first = record(f"conversation {n}", kind=kind, dialogue=opening)
        rows += [first, record(f"conversation {n}", 2, dialogue=ask(goes_on(first), "And?"))]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    foreign = {"chosen": ask("", "a") + " b", "rejected": ask("", "a") + " c", "conversation": None}
    more.write_text(json.dumps(rows[0]) + "\n" + json.dumps(foreign) + "\n")
    train, held_out = people_comparisons([str(path), str(more)])
    assert len(train) + len(held_out) == 1201
    assert f"read 1,202, kept 1,201, dropped 1 (there twice 1); {len(held_out)} are held out" in (
        capsys.readouterr().out)
    foreign = [c for c in train + held_out if not c.conversation]
    assert [c.kind for c in foreign] == ["harmless"]
    n_held_out = 0
    for n in range(300):
        expected = hashlib.sha256(f"question {n}".encode()).digest()[0] % 8 == 0
        n_held_out += expected
        names = {f"conversation {2 * n}", f"conversation {2 * n + 1}"}
        for side, n_turns in ((held_out, 4 * expected), (train, 4 * (not expected))):
            assert sum(c.conversation in names for c in side) == n_turns
    # One in eight of 300, and four standard errors of it.
    assert abs(n_held_out - 300 / 8) < 4 * (300 / 8 * 7 / 8) ** 0.5
    assert is_held_out(foreign[0].prompt) == (hashlib.sha256(b"a").digest()[0] % 8 == 0)
    assert not is_held_out(ask("", "Hi!")) and not is_held_out(ask("", "..."))
    assert [c.kind for c in train + held_out].count("harmless") == 301
    assert people_comparisons([]) == ([], []) and capsys.readouterr().out == ""


def test_files_that_cannot_be_trained_on(tmp_path):
    path, same = tmp_path / "ours.jsonl", {"chosen": Q + " a", "rejected": Q + " a"}
    path.write_text(json.dumps(same) + "\n")
    with pytest.raises(UserError, match=r"no usable choice in .*ours.jsonl \(read 1, .*identical"):
        check_people([path], alone=False)
    rows = [record("c0"), record("c2")]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert [len(part) for part in read_choices([path])[:2]] == [2, 0]
    check_people([path], alone=False)
    check_people([], alone=True)
    with pytest.raises(UserError, match="too few conversations.* of 2 choices here 0 are"):
        check_people([path], alone=True)
    with pytest.raises(UserError, match="no.jsonl does not exist"):
        check_people([path, tmp_path / "no.jsonl"], alone=False)
