"""Tests of data.py. Expected values are computed here in another, slower way, or by hand."""
import gzip
import hashlib
import json
import os
import random
import re
from collections import Counter

import pytest
import tiktoken
import torch

import data
from data import ASSISTANT, HUMAN, Comparison, Tokenizer
from test_weights import refused

CORPUS = [
    "the cat sat on the mat. the other cat sat on that mat, and that's the end of it!\n\n",
    "aaaa aaa aa aaaaaaa banana bananas ananas 1234 12 1212 __init__ x_y  \t two  spaces ",
    HUMAN + " Which is larger, 12 or 21?" + ASSISTANT + " 21 is larger than 12." + HUMAN
    + " Thanks, that's what I thought." + ASSISTANT + " You're welcome; they're easy to mix up. ",
    "Größe naïve café 日本語 日本 🙂🙂 ½ ² e\u0301e\u0301 the theme, these, there, then"] * 3


@pytest.fixture(scope="module")
def bpe() -> Tokenizer:
    return data.train_bpe(CORPUS, 400)


# ---- 1. Dialogues ------------------------------------------------------------


def test_parse_and_render():
    text = "\n\nHuman: Hi\n\nthere \n\n\nAssistant:  A\nB\n\nAssistant:\n\nHuman:x Human: y"
    assert data.parse(text) == [("Human", " Hi\n\nthere \n"), ("Assistant", "  A\nB"),
                                ("Assistant", ""), ("Human", "x Human: y")]
    assert data.render(data.parse(text)) == text
    for text in ("", "hello", "Human: hi", "\nHuman: hi", "x" + HUMAN, "\n\n\nHuman:", "\n\nHuman"):
        with pytest.raises(ValueError, match="not a dialogue"):
            data.parse(text)


# ---- 2. Comparisons ----------------------------------------------------------

Q = HUMAN + " q" + ASSISTANT
Q2 = Q + " a" + HUMAN + " r" + ASSISTANT
AB = " a" + ASSISTANT + " b"
GOOD = {"chosen": Q + " yes", "rejected": Q + " no"}


@pytest.mark.parametrize("chosen, rejected, expected", [
    (Q + " yes", Q + " no", (Q, " yes", " no")), (Q + " yes", Q + " yes ", (Q, " yes", " yes ")),
    (Q2 + " yes", Q2 + " no", (Q2, " yes", " no")),  # the cut is not after the first marker
    (Q + " yes, a", Q + " yes, b", (Q, " yes, a", " yes, b")),  # nor in the middle of a reply
    (Q + AB, Q + " c", (Q, AB, " c")), (Q + " c", Q2, (Q, " c", Q2[len(Q):])),  # nor at each last
    (Q + AB, Q + " a\n\nAssist", (Q, AB, " a\n\nAssist")),  # the shared part ends in a marker
    (Q + " a\n\nAssistant", Q + AB, (Q, " a\n\nAssistant", AB)),
    (ASSISTANT + " a", ASSISTANT + " b", (ASSISTANT, " a", " b")),  # a prompt of one marker
    (Q + " yes", Q + " yes", "identical pair"), (Q, Q, "identical pair"),
    (Q + " yes", Q, "empty reply"), (Q + " ", Q + " no", "empty reply"),
    (Q2 + " yes", Q2 + "\n", "empty reply"), (Q + " a", HUMAN + " p", "no shared prompt"),
    (HUMAN + " q\n\nAssistant", Q + " a", "no shared prompt")])
def test_split_comparison(chosen, rejected, expected):
    parts, reason = data.split_comparison(chosen, rejected)
    assert (parts or reason) == expected and bool(parts) != bool(reason)


def write_rows(path, *rows):
    lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
    raw = b"\n".join(lines) + b"\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else raw)
    return path


def test_read_comparisons_counts_what_it_drops(tmp_path):
    # The assistant may speak first, and half an emoji becomes "?".
    emoji = {"chosen": ASSISTANT + " \ud83d", "rejected": ASSISTANT + " no", "p_chosen": 0}
    path = write_rows(
        tmp_path / "x.jsonl.gz", GOOD | {"p_chosen": 0.75}, b" ", GOOD | {"rejected": Q},
        GOOD | {"rejected": GOOD["chosen"]}, GOOD | {"rejected": Q + "\u2028 \x85no"},
        GOOD | {"chosen": Q + " "}, GOOD | {"chosen": HUMAN + " else"}, emoji)
    rows, counter = data.read_comparisons(path, "helpful")
    assert rows == [Comparison(Q, " yes", " no", "helpful", 0.75),
                    Comparison(Q, " yes", "\u2028 \x85no", "helpful"),
                    Comparison(ASSISTANT, " ?", " no", "helpful", 0)]
    assert data.counts_line(counter + Counter(read=1700)) == (
        "read 1,707, kept 3, dropped 4 (empty reply 2, identical pair 1, no shared prompt 1)")
    assert data.counts_line(Counter(read=9, kept=9, zero=0)) == "read 9, kept 9, dropped 0"


@pytest.mark.parametrize("bad, words", [
    (b'{"chosen": ', "not JSON"), (b"[" * 100_000, "not JSON"), (b'["chosen"]', "object"),
    (b'{"chosen": "\xff"}', "UTF-8"), ({"rejected": Q + " no"}, "'chosen'"),
    (GOOD | {"rejected": None}, "'rejected'"),
    (GOOD | {"chosen": "Human: q"}, "'chosen' is not a dialogue"),
    (GOOD | {"p_chosen": "0.5"}, "p_chosen"), (GOOD | {"p_chosen": 1.5}, "p_chosen"),
    (GOOD | {"p_chosen": -0.1}, "p_chosen"), (GOOD | {"p_chosen": float("nan")}, "p_chosen")])
def test_a_bad_line_is_named(tmp_path, bad, words):
    for file in (tmp_path / "bad.jsonl", tmp_path / "bad.jsonl.gz"):
        message = refused(data.read_comparisons, write_rows(file, GOOD, b"", bad), "helpful")
        assert f"{file}:3:" in message and words in message


def test_a_bad_file_is_named(tmp_path):
    path = tmp_path / "x.jsonl.gz"
    raw = write_rows(path, *[GOOD | {"n": n} for n in range(2000)]).read_bytes()
    for content in (raw[:len(raw) // 2], raw[:300] + bytes([255] * 60) + raw[360:]):
        path.write_bytes(content)
        assert f"{path}: damaged or incomplete gzip" in refused(list, data.read_jsonl(path))
    path.write_bytes(b"{}\n")
    assert f"{path} is not a gzip file" in refused(list, data.read_jsonl(path))
    os.mkfifo(tmp_path / "pipe.jsonl")
    for name, words in (("", "is not a file"), ("pipe.jsonl", "is not a file"),
                        ("missing.jsonl", "does not exist")):
        assert f"{tmp_path / name} {words}" in refused(list, data.read_jsonl(tmp_path / name))


def test_a_line_may_not_fill_the_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "MAX_LINE", 100)
    path, longest = tmp_path / "x.jsonl.gz", b'{"a": "' + b"x" * 90 + b'"}\n'
    assert len(longest) == 100
    assert len(list(data.read_jsonl(write_rows(path, longest[:-1], longest[:-1])))) == 2
    message = refused(list, data.read_jsonl(write_rows(path, b"{}", b" " + longest[:-1])))
    assert message == f"{path}:2: the line has more than 100 bytes"


def test_a_byte_order_mark_is_read(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}\n{"a": 2}\n')
    assert list(data.read_jsonl(path)) == [(1, {"a": 1}), (2, {"a": 2})]


def test_load_a_folder(tmp_path):
    for root in (tmp_path, tmp_path / "missing"):
        assert "helpful-base/train.jsonl.gz" in refused(data.load_comparisons, root, "train")
    write_rows(tmp_path / "helpful-b" / "train.jsonl.gz", GOOD)
    write_rows(tmp_path / "harmless-a" / "train.jsonl", GOOD, GOOD | {"rejected": Q})
    write_rows(tmp_path / "harmless-a" / "train.jsonl.gz", GOOD)  # not read a second time
    write_rows(tmp_path / "helpful-b" / "test.jsonl", GOOD | {"rejected": Q})
    rows, counters = data.load_comparisons(tmp_path, "train")
    assert [c.kind for c in rows] == ["harmless", "helpful"]
    of_helpful = {"helpful-b": {"read": 1, "kept": 1}}
    assert counters == of_helpful | {"harmless-a": {"read": 2, "kept": 1, "empty reply": 1}}
    assert data.load_comparisons(str(tmp_path), "train", ["helpful-b"]) == (rows[1:], of_helpful)
    assert "it has helpful-b" in refused(data.load_comparisons, tmp_path, "test", ["harmless-a"])
    assert "'valid'" in refused(data.load_comparisons, tmp_path, "valid")
    assert "empty reply 1" in refused(data.load_comparisons, tmp_path, "test")


@pytest.mark.parametrize("name, kind", [
    ("my-harmless.jsonl", "harmless"), ("harmless-x/a.jsonl", "harmless"), ("a.jsonl", "helpful"),
    ("harmless/b/a.jsonl", "helpful")])  # only the last folder's name counts
def test_load_one_file_splits_by_first_question(tmp_path, name, kind):
    rows = []
    for n in range(900):
        prompt = f"{HUMAN} q{n % 450}{ASSISTANT}" + (f" a{HUMAN} {n}{ASSISTANT}" if n > 600 else "")
        rows.append({"chosen": prompt + f" a{n}", "rejected": prompt + f" b{n}"})
    path, questions, replies = write_rows(tmp_path / name, *rows), {}, []
    for split in ("train", "test"):
        kept, counters = data.load_comparisons(path, split)
        n_other = 900 - len(kept)
        counts = {"read": 900, "kept": len(kept), "in the other split": n_other}
        assert counters == {path.name: counts}
        questions[split] = {data.parse(c.prompt)[0][1] for c in kept}
        replies += [(c.kind, c.chosen) for c in kept]
    assert sorted(replies) == sorted((kind, f" a{n}") for n in range(900))
    assert not questions["train"] & questions["test"]
    # Every process must divide a file alike: the first byte of a hash, and not Python's `hash`.
    for question in questions["train"] | questions["test"]:
        is_test = hashlib.sha256(question.encode()).hexdigest()[1] == "0"  # a multiple of 16
        assert question in questions["test" if is_test else "train"]


def test_write_comparisons_can_be_read(tmp_path):
    rows = [Comparison(Q2, " \u2028é", " no", "", 0.0), Comparison(Q, " a", " b", "")]
    for path in (tmp_path / "helpful" / "train.jsonl", tmp_path / "helpful" / "train.jsonl.gz"):
        data.write_comparisons(path, rows)
        assert data.read_comparisons(path, "") == (rows, {"read": 2, "kept": 2})
        assert "cannot write" in refused(data.write_comparisons, path / "x.jsonl", rows)
    assert path.read_bytes()[4:8] == bytes(4)  # no time in gzip's header: same rows, same bytes


@pytest.mark.parametrize("replies", [(" yes, the cat", " no"), (" no", " yes, the cat")])
def test_encode_comparison_cuts_the_beginning_of_the_prompt_only(bpe, replies):
    question = HUMAN + " 1234567 times the cat sat on the mat, and why is that?" + ASSISTANT
    chosen, rejected = map(bpe.encode_reply, replies)
    longer = max(len(chosen), len(rejected))
    assert len(chosen) != len(rejected)
    for text in (question, ASSISTANT):  # a prompt shorter than the minimum is kept whole or not
        prompt = bpe.encode_dialogue(text)
        assert (len(prompt) > data.MIN_PROMPT + 3) == (text == question)
        for context in range(1, len(prompt) + longer + 4):
            room = context - 1 - longer  # 1 is for end_of_context
            kept = room >= min(data.MIN_PROMPT, len(prompt))
            expected = (prompt[-room:], chosen, rejected) if kept else None
            found = data.encode_comparison(bpe, Comparison(text, *replies, ""), context)
            assert found == expected


# ---- 3. Batches --------------------------------------------------------------


@pytest.mark.parametrize("seed", [None, 0, 1])
def test_batches_hold_each_row_once_within_the_budget(seed):
    lengths = random.Random(5).choices(range(1, 60), k=300) + [500, 0]
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    batches = data.batches_by_length(lengths, 256, generator)
    assert sorted(sum(batches, [])) == list(range(302))
    spans, n_padded = [], 0
    for batch in batches:
        spans.append((min(lengths[i] for i in batch), max(lengths[i] for i in batch)))
        assert len(batch) * spans[-1][1] <= 256 or len(batch) == 1
        n_padded += len(batch) * spans[-1][1]
    assert n_padded < 1.1 * sum(lengths)
    spans.sort()  # rows of a batch are alike in length, so two batches don't overlap
    assert all(a[1] <= b[0] for a, b in zip(spans, spans[1:]))


def test_batches_are_shuffled_by_the_generator_only():
    lengths = [7] * 40 + [3] * 40
    generator = torch.Generator().manual_seed(0)
    one, two = (data.batches_by_length(lengths, 35, generator) for _ in range(2))
    assert one == data.batches_by_length(lengths, 35, torch.Generator().manual_seed(0)) != two
    assert {frozenset(b) for b in one} != {frozenset(b) for b in two}  # ties change places
    assert [lengths[b[0]] for b in one] != sorted(lengths[b[0]] for b in one)
    plain = data.batches_by_length(lengths, 35)
    assert plain[0] == list(range(40, 51)) and plain[-1] == list(range(35, 40))
    assert data.batches_by_length([], 35) == []


def test_pad():
    tokens, lengths = data.pad([[1, 2, 3], [], [4]], value=9)
    assert tokens.tolist() == [[1, 2, 3], [9, 9, 9], [4, 9, 9]] and tokens.dtype == torch.int64
    assert lengths.tolist() == [3, 0, 1] and lengths.dtype == torch.int64
    assert data.pad([])[0].shape == (0, 0) and data.pad([[], [5]])[0].tolist() == [[0], [5]]


# ---- 4. Tokenizer ------------------------------------------------------------


def spelled(text: str) -> list[list[bytes]]:
    """The pieces of a text, each as a list of single bytes."""
    return [[bytes([b]) for b in piece.encode()] for piece in re.findall(data.PATTERN, text)]


def merge_in_place(parts: list[bytes], left: bytes, right: bytes):
    for i in range(len(parts)):
        if parts[i:i + 2] == [left, right]:
            parts[i:i + 2] = [left + right]


def test_train_bpe_equals_the_definition(bpe):
    """Count all the pairs of the corpus anew for each merge. tiktoken replays the merges."""
    words, tokens, merges = [], list(data.SINGLE_BYTES), []
    for text in CORPUS:
        words += spelled(text)
    while len(tokens) < 398:
        count = Counter()
        for word in words:
            count.update(zip(word, word[1:]))
        merges.append(min(count, key=lambda p: (-count[p], tokens.index(p[0]), tokens.index(p[1]))))
        tokens.append(merges[-1][0] + merges[-1][1])
        for word in words:
            merge_in_place(word, *merges[-1])
    assert bpe.tokens == tokens
    for parts in spelled("".join(random.Random(1).choices("aabbnnthes12 ", k=3000))):
        piece = b"".join(parts).decode()
        for pair in merges:
            merge_in_place(parts, *pair)
        assert bpe.encode(piece) == [tokens.index(part) for part in parts]


def test_train_bpe_by_hand(bpe):
    tok = data.train_bpe(["ab ab ab cd"], 5000)  # "ab" three times, " ab" twice; " cd" only once
    assert tok.tokens[256:] == [b"ab", b" ab"] and (tok.n_tokens, tok.n_vocab) == (260, 320)
    assert data.train_bpe(["dc", "ba", "dc", "ba"], 259).tokens[256:] == [b"ba"]  # ties: by id
    assert data.train_bpe([], 258).n_tokens == data.train_bpe(["a\ud800"], 258).n_tokens == 258
    assert "257" in refused(data.train_bpe, ["ab"], 257)
    assert data.merge_pair([1, 1, 1, 2, 1, 1], (1, 1), 9) == [9, 1, 2, 9]
    assert (bpe.end_of_turn, bpe.end_of_context, bpe.n_tokens, bpe.n_vocab) == (398, 399, 400, 448)
    assert Tokenizer("", bpe.pattern, bpe.tokens[:382]).n_vocab == 384  # 6 * 64 exactly
    assert len(bpe.encode(HUMAN)) == len(bpe.encode(ASSISTANT)) == 1


@pytest.mark.parametrize("name", ["bpe", "gpt2"])
def test_decode_inverts_encode_for_any_text(name, request):
    tok, rng = request.getfixturevalue(name), random.Random(2)
    texts = ["".join(map(chr, range(0x3000))), "typed: <|endoftext|> and <|endofcontext|>!"]
    for first, last in ((32, 127), (9, 33), (0x80, 0x370), (0x2000, 0x2070), (0xE000, 0x110000)):
        texts += ["".join(map(chr, rng.choices(range(first, last), k=60))) for _ in range(50)]
    for text in texts:
        ids = tok.encode(text)
        assert tok.decode(ids) == text and all(0 <= i < tok.end_of_turn for i in ids)
    tok.encode("a lone \ud800 surrogate does not crash")
    unused = [tok.end_of_turn, tok.end_of_context, tok.n_tokens, tok.n_vocab - 1]
    assert tok.decode(tok.encode("one") + unused + tok.encode(" two")) == "one two"
    assert tok.decode([tok.tokens.index(b"\xff")]) == "\ufffd"


def test_gpt2_has_its_published_ids(gpt2):
    assert (gpt2.end_of_turn, gpt2.end_of_context) == (50256, 50257)
    assert (gpt2.n_tokens, gpt2.n_vocab) == (50258, 50304)
    assert gpt2.encode_dialogue(HUMAN + " Hi" + ASSISTANT + " Hello world") == [
        198, 198, 20490, 25, 15902, 198, 198, 48902, 25, 18435, 995, 50256]


def test_end_of_turn_is_where_it_belongs(bpe):
    end, enc, dialogue = [bpe.end_of_turn], bpe.encode, bpe.encode_dialogue
    x, h, a = HUMAN + " x", enc(HUMAN), enc(ASSISTANT)
    assert dialogue(x) == h + enc(" x") and bpe.encode_reply("") == []
    assert dialogue("a header" + x + ASSISTANT) == enc("a header") + h + enc(" x") + a
    assert dialogue(x + ASSISTANT + " y") == h + enc(" x") + a + enc(" y") + end
    assert dialogue(ASSISTANT + " y" + x + ASSISTANT) == a + enc(" y") + end + h + enc(" x") + a
    assert dialogue(ASSISTANT + x) == a + end + h + enc(" x")  # empty, but another turn follows
    assert dialogue(ASSISTANT + " ") == a + enc(" ") + end     # a space is a turn, not a prompt
    assert dialogue("a plain document.") == enc("a plain document.") + end


@pytest.fixture(scope="module")
def merging_bpe() -> Tokenizer:
    """A BPE whose pattern lacks the markers, so that it may merge across their borders."""
    marker = r"\n\n(?:Human|Assistant):|"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "PATTERN", data.PATTERN.removeprefix(marker))
        return data.train_bpe(['a::) a:- a:" a:\n a\n\n\na?\n\na'] * 5, 400)


@pytest.mark.parametrize("name", ["bpe", "merging_bpe", "gpt2"])
def test_prompt_and_reply_have_an_exact_border(name, request):
    """Markers and turns are encoded apart, so a reply begins at a known index."""
    tok = request.getfixturevalue(name)
    human, assistant, end = tok.encode(HUMAN), tok.encode(ASSISTANT), [tok.end_of_turn]
    for reply in (":)", "- a", '"Yes"', " yes", "yes", " ", "\n", "\n\n", "  2 ", "\nHuman:", "é🙂"):
        for question in (" hi", " hi \n", "\n", "", ")", " why?\n"):
            prompt = "A header.\n" + HUMAN + question + ASSISTANT
            prompt_ids = tok.encode("A header.\n") + human + tok.encode(question) + assistant
            assert tok.encode_dialogue(prompt + reply) == prompt_ids + tok.encode(reply) + end
        assert tok.encode_reply(reply) == tok.encode(reply) + end
        # This test can fail: encoded jointly, these replies merge with the colon.
        if name != "bpe" and reply in (":)", "- a", '"Yes"'):
            assert tok.encode(ASSISTANT + reply) != assistant + tok.encode(reply)
    for reply in (AB, " a" + HUMAN + " b" + ASSISTANT, HUMAN + " b"):  # replies of several turns
        assert tok.encode_dialogue(Q + reply) == tok.encode_dialogue(Q) + tok.encode_reply(reply)


def test_save_and_load(bpe, tmp_path):
    path = tmp_path / "new" / "tokenizer.json"
    assert f"{path} does not exist" in refused(Tokenizer.load, path)
    files = [b"[]", b"{}", b"\x80 not json"]
    for tokens in (bpe.tokens + bpe.tokens[-1:], bpe.tokens[1:]):  # one twice; a byte is missing
        Tokenizer("", bpe.pattern, tokens).save(path)
        files.append(path.read_bytes())
    bpe.save(path)
    loaded, good = Tokenizer.load(path), json.loads(path.read_text())
    assert (loaded.fingerprint, loaded.name, loaded.tokens) == (bpe.fingerprint, "bpe", bpe.tokens)
    tokens = good["tokens"]
    for change in ({"tokens": tokens[1:]}, {"tokens": 3}, {"tokens": tokens + ["*"]},
                   {"tokens": tokens[:-1]}, {"tokens": tokens[:-2] + tokens[:-3:-1]},
                   {"pattern": "("}, {"pattern": r"\s+|\S+"}, {"pattern": 5}):
        files.append(json.dumps(good | change).encode())
    for content in files:
        path.write_bytes(content)
        assert f"{path} is not a tokenizer file" in refused(Tokenizer.load, path)


def test_gpt2_without_network_says_what_to_do(monkeypatch):
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: open("no such file"))  # OSError
    for word in ("vocab.bpe", "encoder.json", "TIKTOKEN_CACHE_DIR", "--tokenizer bpe"):
        assert word in refused(data.gpt2_tokenizer)
