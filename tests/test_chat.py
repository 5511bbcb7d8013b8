"""Tests of chat.py: what is typed (here: piped), what appears, and what is stored."""
import io
import json
import os
import re
import shutil
import sys
from random import Random

import pytest

import chat
import choices
import conversation
import toy
from conversation import Reply, Speaker, ask, known_prompts
from data import ASSISTANT, HUMAN, Comparison, read_comparisons, write_comparisons
from outlier_score import Familiar, features, fit_gaussian, mahalanobis
from run import UserError, rng
from test_conversation import make_folder

PERU = "What is the capital of Peru?"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("run"))


@pytest.fixture
def talk(made, tmp_path, monkeypatch, capsys):
    """Run the command with these lines from a pipe -> its output and its errors."""
    monkeypatch.chdir(tmp_path)

    def talk(*lines, options=(), folder=made, code=0):
        raw = "\n".join(lines).encode("utf-8", "surrogateescape")
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(raw), "utf-8"))
        monkeypatch.setattr(sys, "argv", ["chat.py", str(folder), "--device", "cpu", *options])
        capsys.readouterr()
        try:
            chat.main()
        except SystemExit as end:
            assert end.code == code
        out, err = capsys.readouterr()
        assert (code == 2) == (len(err.splitlines()) == 1)
        # Untrained models write all kinds of bytes, and none of them acts on the terminal.
        assert chat.shown(out) == out
        return out + err
    return talk


@pytest.fixture
def scripted(monkeypatch):
    """Speakers say "<file's name> <number>" to each dialogue, or what is in `texts` for it."""
    texts, dialogues = {}, []

    def reply(speaker, asked, seeds):
        replies = []
        for dialogue, seed in zip(asked, seeds):
            dialogues.append(dialogue)
            text = f" {speaker.path.stem} {len(dialogues)}"
            said = texts.get(dialogue[dialogue.rfind(HUMAN) + len(HUMAN):-len(ASSISTANT)], text)
            replies.append(Reply(said, True, seed, 0))
        return replies
    monkeypatch.setattr(Speaker, "reply", reply)
    monkeypatch.setattr(Speaker, "stream", lambda s, d, seed: iter(reply(s, [d], [seed])))
    reply.texts, reply.dialogues = texts, dialogues
    return reply


# ---- 1. Chat -----------------------------------------------------------------


def test_the_same_seed_and_lines_give_the_same_replies(talk):
    lines = "hi", "what?", "\x1b[31m\udcff", "/undo", "hi", ""
    out = talk(*lines, options=["--seed", "5"])
    assert talk(*lines, options=["--seed", "5"]) == out != talk(*lines, options=["--seed", "6"])
    replies = re.findall(r"^Assistant:(.*)$", out, re.M)
    assert len(replies) == 4 and replies[0] != replies[3]  # the same question again: a new draw
    assert "Human: \\x1b[31m" in out and "seed 5" in out


def test_what_the_model_reads(talk, scripted):
    scripted.texts[" long"] = " a\n\nb"
    out = talk("hi", "there", "/undo", "again", "/new", "long", "/undo", "/undo", "/nonsense", "")
    assert scripted.dialogues == [
        ask("", "hi"), ask(ask("", "hi") + " policy 1", "there"),
        ask(ask("", "hi") + " policy 1", "again"), ask("", "long")]
    assert "Assistant: a\n    \n    b\n" in out  # no line of a reply begins like one of ours
    assert "nothing to take back" in out and "unknown command /nonsense; type /help" in out
    assert talk("hi", "/quit", "hi").count("Assistant:") == 1


def test_both_scores_and_hints(talk, scripted):
    out = talk(PERU, "/score", "/both", "How is it?", "/both", "/score", PERU, "/help")
    assert out.count("Initial  : initial 2") == out.count("RLHF     : policy 3") == 1
    assert out.count("Assistant: policy 1\n") == 2  # /score shows the replies so far again
    assert out.count("PM score") == 3 and "Assistant: policy 4" in out
    truths = [toy.truth(ask("", PERU), " policy 1", kind) for kind in ("helpful", "harmless")]
    assert f"true helpfulness {truths[0]:.1f}, true harmlessness {truths[1]:.1f})" in out
    assert out.count("truth not known: this is no question of the toy world") == 2
    questions = re.search(r"does not know this question; it does know: (.*)\)", out)[1]
    assert questions.count("?") + questions.count(".") >= 3 and out.count("it does know") == 1
    for command in ("/new", "/undo", "/both", "/score", "/save", "/quit"):
        assert f"({command}" in out


def test_scores_say_how_unusual_the_prompt_is(talk, scripted, made, tmp_path):
    assert "unusual" not in talk("hi", "/score")  # the folder holds no comparisons
    folder = tmp_path / "run"
    shutil.copytree(made, folder)
    few = [Comparison(ask("", text), " a", " b", "helpful") for text in ("one", "two")]
    write_comparisons(folder / "comparisons" / "helpful-base" / "train.jsonl", few)
    out = talk("hi", "/score", folder=folder)  # a Gaussian needs more
    assert "PM score" in out and "unusual" not in out
    path = folder / "comparisons" / "helpful-base" / "train.jsonl"
    path.write_text("{\n")
    out = talk("hi", "/score", "/score", folder=folder)  # the second is no "scores are off"
    assert out.count("not JSON") == 2 and "scores are off" not in out
    prompts = [ask("", f"{i} plus {i}?") for i in range(41)]
    pairs = [Comparison(prompt, " a", " b", "helpful") for prompt in prompts]
    for kind in ("helpful-base", "harmless-base"):
        write_comparisons(folder / "comparisons" / kind / "train.jsonl", pairs)
    assert len(set(known_prompts(folder, 7, Random(0)))) == 7
    known = known_prompts(folder, 1000, rng(5, "known prompts"))
    assert sorted(known) == sorted(prompts)  # each once
    speaker = Speaker(folder, device="cpu")
    new = [ask("", f"{i} plus {i + 1}?") for i in range(12)]
    rows = [speaker.tok.encode_dialogue(prompt) for prompt in known + new]
    vectors = features(speaker.net, rows)[-1]  # after the last block
    distances = mahalanobis(vectors[20:], *fit_gaussian(vectors[:20]))
    usual, shares = distances[:21], []
    for distance in distances[21:]:
        shares.append((usual < distance).double().mean().item())
    familiar = Familiar(speaker.net, speaker.tok, known)
    assert [familiar.share_below(prompt) for prompt in new] == pytest.approx(shares)
    assert min(shares) < 0.4 < 0.6 < max(shares)
    out = talk("4 plus 5?", "/score", "x " * 60, folder=folder, options=["--seed", "5"])
    assert f"the prompt is more unusual than {shares[4]:.0%} of the training prompts" in out
    assert out.count("more unusual") == 2


def test_scores_are_of_the_reply_that_was_given(talk, scripted, made):
    out = talk("hi", "/score", "hello")
    pairs = [(ask("", "hi"), " policy 1"), (ask(ask("", "hi") + " policy 1", "hello"), " policy 2")]
    scores = conversation.Scorer(made, device="cpu").score(*zip(*pairs))
    assert re.findall(r"PM score (-?[\d.]+)", out) == [f"{score:.2f}" for score in scores]


def test_save_writes_a_new_file(talk, scripted, tmp_path):
    scripted.texts[" hi"] = " \x1b[2J"
    out = talk("/save x.txt", "hi", "/save", "/save x.txt", "/save x.txt", "/save no/x", "/save \0")
    text = (tmp_path / "x.txt").read_text()
    assert text.endswith(f"{HUMAN} hi{ASSISTANT} \\x1b[2J\n") and "policy.pt" in text
    for words in ("nothing to save", "needs the name", "saved to x.txt", "x.txt: File exists",
                  "no/x: No such file", "null"):
        assert out.count(words) == 1, words


def test_a_full_disk_leaves_no_half_of_a_conversation(talk, scripted, tmp_path, monkeypatch):
    class Full(io.StringIO):
        def flush(self):
            raise OSError(28, "No space left on device")

    def full(name, mode, encoding):
        open(name, mode, encoding=encoding).close()
        return Full()
    monkeypatch.setattr(chat, "open", full, raising=False)
    assert "cannot write x.txt: No space left" in talk("hi", "/save x.txt")
    assert not (tmp_path / "x.txt").exists()


@pytest.mark.parametrize("text, draft", [(" plain", "plain"), (" a\tb", ""), (" \u00ad", ""),
                                         (" two\nlines", "")])
def test_a_draft_is_the_reply_itself_or_nothing(talk, scripted, monkeypatch, text, draft):
    """Typed back unchanged, an escaped character would be another text."""
    drafts, ask_person = [], chat.Terminal.ask

    def watched(terminal, question, draft=""):
        if question.startswith("Your edit"):
            drafts.append(draft)
        return ask_person(terminal, question, draft)
    monkeypatch.setattr(chat.Terminal, "ask", watched)
    scripted.texts[" one"] = text
    monkeypatch.setattr(chat, "comparable", lambda a, b: True)
    out = talk("one", "ea", "better", options=["--compare"])
    assert drafts == [draft] and ("type the whole reply" in out) == (draft == "")


def test_a_closed_input_and_a_byte_order_mark(talk, scripted, monkeypatch):
    assert talk("\ufeffhi").count("Human: hi\n") == 1 and scripted.dialogues == [ask("", "hi")]
    monkeypatch.setattr(chat.sys, "stdin", None)
    with pytest.raises(UserError, match="standard input is closed"):
        chat.Terminal()


def test_what_is_dropped_cut_off_or_too_long_is_said(talk, made):
    out = talk(*["x" * 30] * 4, "x" * 200, "hi", options=["--max-response", "2"])
    assert re.search("the model did not read its oldest [24] turns", out)
    assert "(cut off after 2 tokens)" in out and out.count("Assistant:") == 5
    assert out.count("use a shorter one") == 1


@pytest.mark.parametrize("names, words", [
    (["initial.pt", "lm.pt"], "no policy.pt in {} yet: this is initial.pt"),
    (["lm.pt"], "no policy.pt in {} yet: this is lm.pt")])
def test_a_run_that_is_not_finished(talk, tmp_path, names, words):
    folder = make_folder(tmp_path / "out", names, data="hh")
    before = sorted(os.listdir(folder))
    out = talk("hi", "/both", "/score", PERU, folder=folder)
    assert words.format(folder) in out and out.count("Assistant:") == 2
    assert "/both needs a policy.pt" in out and "pm.pt does not exist" in out
    assert "toy" not in out and sorted(os.listdir(folder)) == before


def test_a_checkpoint_that_is_replaced_while_chatting(talk, scripted, tmp_path, made, monkeypatch):
    folder = tmp_path / "out"
    shutil.copytree(made, folder)
    stream = Speaker.stream

    def replaces(speaker, dialogue, seed):
        os.utime(folder / "policy.pt", (1, 1))
        return stream(speaker, dialogue, seed)
    monkeypatch.setattr(Speaker, "stream", replaces)
    out = talk("hi", "hi", "hi", folder=folder)
    assert out.count(f"{folder / 'policy.pt'} was replaced or deleted; this chat goes on") == 1
    assert out.count("Assistant:") == 3


# ---- 2. Crowdworker ----------------------------------------------------------


def stored(path="choices.jsonl") -> list[dict]:
    with open(path) as file:
        return [json.loads(line) for line in file]


def sides(out: str) -> list[dict]:
    """The two replies of each turn, {"a": text, "b": text}."""
    return [{"a": a, "b": b} for a, b in re.findall(r"^A:(.*)\nB:(.*)$", out, re.M)]


def test_choices_are_stored_and_the_conversation_goes_on_with_them(talk, scripted):
    out = talk("one", "a3", "two", "oh", "c2", "a5", "/help", "B 4", "/new", "three", "b1", "four",
               options=["--compare", "--against", "initial.pt", "--seed", "1", "--who", "Ann"])
    shown, rows = sides(out), stored() + stored("choices.unsure.jsonl")
    assert len(shown) == 4 and len(rows) == 3 and out.count("type a or b and how sure") == 3
    for row, pair, picked, strength in zip(rows, shown, "abb", (3, 4, 1)):
        assert row["chosen"].endswith(pair[picked]) and row["strength"] == strength
        assert row["rejected"].endswith(pair["ab".replace(picked, "")])
        assert row["kind"] == "helpful" and row["who"] == "Ann"
        for n, side in enumerate(("chosen", "rejected")):  # each reply's model and seed
            reply = row[side][row[side].rfind(ASSISTANT) + len(ASSISTANT):]
            assert f"/{reply.split()[0]}.pt " in row["models"][n]
    assert rows[1]["chosen"].startswith(rows[0]["chosen"] + HUMAN)
    assert rows[0]["conversation"] == rows[1]["conversation"] != rows[2]["conversation"]
    assert [row["turn"] for row in rows] == [1, 2, 1]
    assert scripted.dialogues[-1] == ask(rows[2]["chosen"], "four")
    assert out.count("stored; choices so far: ") == 3 and "stored; choices so far: 3" in out
    assert out.count("barely sure, so it is kept apart, in choices.unsure.jsonl") == 1
    firsts = {a["a"].split()[0] for a in sides(talk(*["hi", "s"] * 20, options=[
        "--compare", "--against", "initial.pt"]))}
    assert firsts == {"policy", "initial"}  # the sides are drawn by lot
    assert "choices in choices.jsonl so far: 3" in talk(options=["--compare"])


def test_a_red_teamer_picks_the_more_harmful_reply(talk, scripted):
    out = talk("one", "ea", "b4", "two", options=["--compare", "--red-team"])
    (row,), pair = stored(), sides(out)[0]
    assert row["rejected"] == ask("", "one") + pair["b"] and row["kind"] == "harmless"
    assert row["chosen"] == ask("", "one") + pair["a"]
    assert scripted.dialogues[-1] == ask(row["rejected"], "two")
    questions = re.search(r"it does know: (.*)\)", out)[1]
    assert any(task in questions for task in toy.HARMFUL)
    assert "More harmful, A or B" in out and "edits are for helpful conversations" in out
    assert read_comparisons("choices.jsonl", "helpful")[0][0].kind == "harmless"


def test_an_edit_is_preferred_to_the_original(talk, scripted):
    options = ["--compare", "--model", "initial.pt"]
    out = talk("one", "eb", "", "eb", "better", "two", options=options)
    row, pair = stored()[0], sides(out)[0]
    assert row["chosen"] == ask("", "one") + " better" and "nothing was typed" in out
    assert row["rejected"] == ask("", "one") + pair["b"]
    assert row["models"][0] == "person" and "/initial.pt " in row["models"][1]
    assert row["seeds"][0] is None and isinstance(row["seeds"][1], int) and row["strength"] == 4
    assert scripted.dialogues[-1] == ask(row["chosen"], "two")


def test_replies_that_cannot_be_compared(talk, scripted):
    scripted.texts.update({" same": " x", " empty": " "})
    out = talk("same", "empty", "then", "s", "last", options=["--compare"])
    assert "A and B: x\n" in out and "both replies are the same" in out
    assert "a reply is empty" in out and "your message is taken back" in out
    assert stored() == [] and len(sides(out)) == 2
    assert scripted.dialogues[-1] == ask(ask("", "same") + " x", "last")


def test_quit_ends_the_chat_without_a_choice(talk, scripted):
    talk("one", "/quit", "a3", options=["--compare"])
    assert stored() == []


def test_a_choice_is_on_the_disk_before_the_next_turn(talk, scripted, monkeypatch):
    synced, ask_person = [], chat.Terminal.ask

    def watched(terminal, question, draft=""):
        synced.append((question.strip(), len(stored())))
        return ask_person(terminal, question, draft)
    monkeypatch.setattr(chat.Terminal, "ask", watched)
    talk("one", "a4", "two", "b2", options=["--compare"])
    assert [n for question, n in synced if question == "Human:"] == [0, 1, 2]


def test_a_full_disk_keeps_the_choice_to_be_made_again(talk, scripted, monkeypatch):
    append, n = choices._LineFile.append, iter(range(9))

    def full(file, record):
        if next(n) == 0:
            raise UserError("cannot write x: No space left on device")
        append(file, record)
    monkeypatch.setattr(choices._LineFile, "append", full)
    out = talk("one", "a4", "b3", "two", options=["--compare"])
    assert "No space left" in out and [row["strength"] for row in stored()] == [3]
    assert scripted.dialogues[-1] == ask(stored()[0]["chosen"], "two")


# ---- 3. Mistakes -------------------------------------------------------------


@pytest.mark.parametrize("options, words", [
    (["--red-team"], "--red-team and --against need --compare"),
    (["--against", "initial.pt"], "need --compare"), (["--model", "no.pt"], "/no.pt does not exist"),
    (["--temperature", "0"], "temperature 0.0"), (["--device", "no"], "--device no"),
    (["--max-response", "-3"], "a reply has at least 1 token, not -3"),
    (["--compare", "--choices", "."], "is not a file"),
    (["--compare", "--choices", "bad.jsonl"], "bad.jsonl:1: not JSON"),
    (["--compare", "--who", " "], "--who needs a name")])
def test_options_that_cannot_be(talk, tmp_path, options, words):
    (tmp_path / "bad.jsonl").write_text("{\n{\n")
    assert words in talk("hi", options=options, code=2)


def test_a_folder_without_models(talk, tmp_path):
    assert "holds no language model" in talk(folder=tmp_path, code=2)


def test_the_reader_of_the_output_may_leave(made, monkeypatch):
    reading, writing = os.pipe()
    os.close(reading)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"hi\nhi\n")))
    monkeypatch.setattr(sys, "argv", ["chat.py", str(made), "--device", "cpu"])
    with open(writing, "w") as out:
        monkeypatch.setattr(sys, "stdout", out)
        chat.main()


def test_the_line_editor_offers_the_draft(monkeypatch):
    drafts = []
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"x\ny\n")))
    terminal = chat.Terminal()
    terminal.typed = True
    if chat.readline is None:
        pytest.skip("no readline here")
    monkeypatch.setattr(chat.readline, "insert_text", drafts.append)
    hooks = []
    monkeypatch.setattr(chat.readline, "set_startup_hook", hooks.append)
    for draft in ("a draft", ""):
        terminal.ask("", draft)
        hooks[-1]()
    assert drafts == ["a draft", ""]
