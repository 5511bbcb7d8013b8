"""Tests of data.py. Expected values are computed here in another, slower way, or by hand."""
import gzip
import json
import random
import re
from collections import Counter

import pytest
import tiktoken
import torch

import data
from data import ASSISTANT, HUMAN, Comparison, Tokenizer, UserError

CORPUS = [
    "the cat sat on the mat. the other cat sat on that mat, and that's the end of it!\n\n",
    "aaaa aaa aa aaaaaaa banana bananas ananas 1234 12 1212 __init__ x_y  \t two  spaces ",
    HUMAN + " Which is larger, 12 or 21?" + ASSISTANT + " 21 is larger than 12." + HUMAN
    + " Thanks, that's what I thought." + ASSISTANT + " You're welcome; they're easy to mix up.",
    "Größe naïve café 日本語 日本 🙂🙂 ½ ² e\u0301e\u0301 the theme, these, there, then",
] * 3


@pytest.fixture(scope="module")
def bpe() -> Tokenizer:
    return data.train_bpe(CORPUS, 400)


def random_text(rng: random.Random, n: int) -> str:
    """Code points of every kind: ASCII, white space, marks, other planes; no surrogates."""
    ranges = [(32, 127), (9, 14), (28, 32), (0x80, 0x800), (0x300, 0x370), (0x2000, 0x2070),
              (0xE000, 0x110000), (0x1F600, 0x1F650)]
    return "".join(chr(rng.randrange(*rng.choice(ranges))) for _ in range(n))


# --- 1. dialogues ----------------------------------------------------------------------

def test_parse_by_hand():
    text = "\n\nHuman: Hi\n\nthere \n\n\nAssistant:  A\nB\n\nAssistant:\n\nHuman:x Human: y"
    assert data.parse(text) == [("Human", " Hi\n\nthere \n"), ("Assistant", "  A\nB"),
                                ("Assistant", ""), ("Human", "x Human: y")]
    assert data.render(data.parse(text)) == text


@pytest.mark.parametrize("text", ["", "hello", "Human: hi", "\nHuman: hi", "x" + HUMAN + " hi",
                                  "\n\n\nHuman: hi", "\n\nHuman hi"])
def test_parse_refuses_what_is_no_dialogue(text):
    with pytest.raises(ValueError, match="not a dialogue"):
        data.parse(text)


def test_render_inverts_parse():
    rng = random.Random(0)
    parts = [HUMAN, ASSISTANT, "\n", "\n\n", "Human:", "Assistant:", " hi", ":", "é"]
    for _ in range(500):
        text = rng.choice([HUMAN, ASSISTANT]) + "".join(rng.choices(parts, k=rng.randrange(9)))
        turns = data.parse(text)
        assert data.render(turns) == text
        assert not any(HUMAN in words or ASSISTANT in words for _, words in turns)


# --- 2. tokenizer ----------------------------------------------------------------------

def naive_merges(n_merges: int) -> list[bytes]:
    """BPE as its definition reads: count all the pairs of the corpus anew for each merge."""
    words = [[bytes([b]) for b in piece.encode()]
             for text in CORPUS for piece in re.findall(data.PATTERN, text)]
    tokens = [bytes([b]) for b in range(256)]
    while len(tokens) < 256 + n_merges:
        count = Counter(pair for word in words for pair in zip(word, word[1:]))
        index = {token: i for i, token in enumerate(tokens)}
        best = max(count, key=lambda p: (count[p], -index[p[0]], -index[p[1]]), default=None)
        if best is None or count[best] < 2:
            break
        tokens.append(best[0] + best[1])
        for word in words:
            i = 0
            while i < len(word) - 1:
                if (word[i], word[i + 1]) == best:
                    word[i:i + 2] = [best[0] + best[1]]
                i += 1
    return tokens


def test_train_bpe_equals_the_definition(bpe):
    assert bpe.tokens == naive_merges(400 - 258)
    assert bpe.n_tokens == 400


def test_train_bpe_stops_when_pairs_run_out():
    tok = data.train_bpe(["ab ab ab"], 5000)
    # "ab" three times, " ab" twice; then every word is one token.
    assert tok.tokens[256:] == [b"ab", b" ab"]
    assert (tok.n_tokens, tok.n_vocab) == (260, 320)
    assert len(data.train_bpe(CORPUS, 5000).tokens) == len(naive_merges(5000))


def test_train_bpe_breaks_ties_by_id_and_takes_no_less_than_the_bytes():
    assert data.train_bpe(["dc", "ba", "dc", "ba"], 259).tokens[256:] == [b"ba"]
    assert data.train_bpe([], 258).n_tokens == 258
    with pytest.raises(UserError, match="257"):
        data.train_bpe(["ab"], 257)


def test_encode_replays_the_merges_in_order(bpe):
    """Apply each learned merge in turn to each piece; tiktoken must find the same tokens."""
    rank = {token: i for i, token in enumerate(bpe.tokens)}
    words = "the that bananaananas aaaaa aaaaaaaaaaa 1212121 theretheme sattat nananan".split()
    rng = random.Random(1)
    words += ["".join(rng.choices("abnthes12", k=rng.randrange(1, 25))) for _ in range(300)]
    for word in words:
        for piece in re.findall(data.PATTERN, word):
            parts = [bytes([b]) for b in piece.encode()]
            for token in bpe.tokens[256:]:
                i = 0
                while i < len(parts) - 1:
                    if parts[i] + parts[i + 1] == token:
                        parts[i:i + 2] = [token]
                    i += 1
            assert bpe.encode(piece) == [rank[part] for part in parts]


def test_every_token_is_reachable(bpe):
    for i, token in enumerate(bpe.tokens):
        try:
            text = token.decode()
        except UnicodeDecodeError:
            continue  # a part of a character has no text of its own
        if len(re.findall(data.PATTERN, text)) > 1:
            continue  # a part of a turn's marker; elsewhere its characters are separate pieces
        assert bpe.encode(text) == [i]


def test_round_trip_of_arbitrary_unicode(bpe):
    rng = random.Random(2)
    for _ in range(300):
        text = random_text(rng, rng.randrange(60))
        ids = bpe.encode(text)
        assert bpe.decode(ids) == text
        assert all(0 <= i < bpe.end_of_turn for i in ids)
    everything = "".join(chr(c) for c in range(0x3000))
    assert bpe.decode(bpe.encode(everything)) == everything
    bpe.encode("a lone \ud800 surrogate does not crash")


def test_special_strings_in_text_are_plain_text(bpe):
    text = "say <|endoftext|> and <|endofcontext|>!"
    ids = bpe.encode(text)
    assert not {bpe.end_of_turn, bpe.end_of_context} & set(ids)
    assert bpe.decode(ids) == text
    reply = bpe.encode_reply(" <|endoftext|>")
    assert reply.count(bpe.end_of_turn) == 1 and reply[-1] == bpe.end_of_turn


def test_decode_leaves_out_specials_and_the_gap(bpe):
    assert (bpe.n_tokens, bpe.n_vocab) == (400, 448)
    assert (bpe.end_of_turn, bpe.end_of_context) == (398, 399)
    ids = bpe.encode("one") + [398] + bpe.encode(" two") + [399, 400, 447]
    assert bpe.decode(ids) == "one two"
    assert bpe.decode([0xFF]) == "\ufffd"


def test_end_of_turn_is_where_it_belongs(bpe):
    e, enc = [bpe.end_of_turn], bpe.encode
    h, a = enc(HUMAN), enc(ASSISTANT)
    d = bpe.encode_dialogue
    assert d(HUMAN + " x") == h + enc(" x")
    assert d(HUMAN + " x" + ASSISTANT) == h + enc(" x") + a
    assert d(HUMAN + " x" + ASSISTANT + " y") == h + enc(" x") + a + enc(" y") + e
    assert d(HUMAN + " x" + ASSISTANT + " y" + HUMAN + " z" + ASSISTANT) == (
        h + enc(" x") + a + enc(" y") + e + h + enc(" z") + a)
    # An empty assistant turn that another turn follows did end.
    assert d(ASSISTANT + HUMAN + " x") == a + e + h + enc(" x")
    assert d("a header" + HUMAN + " x" + ASSISTANT) == enc("a header") + h + enc(" x") + a
    assert d("a plain document.") == enc("a plain document.") + e
    # A space is a turn; only nothing at all is an open prompt.
    assert d(HUMAN + " x" + ASSISTANT + " ") == h + enc(" x") + a + enc(" ") + e
    assert bpe.encode_reply("") == []


@pytest.mark.parametrize("reply", [" yes", "yes", " ", "\n", "\n\n", "  two  spaces ", " y\n",
                                   " a" + HUMAN + " b", " a" + ASSISTANT + " b", HUMAN + " b",
                                   " a" + HUMAN + " b" + ASSISTANT, "\nHuman: x", "é 🙂"])
def test_prompt_and_reply_have_an_exact_border(bpe, reply):
    for question in (" hi", " hi \n", "\n", "", " hi" + ASSISTANT + " a" + HUMAN + " b"):
        for head in ("", "A header.\n"):
            prompt = head + HUMAN + question + ASSISTANT
            ids = bpe.encode_dialogue(prompt + reply)
            assert ids == bpe.encode_dialogue(prompt) + bpe.encode_reply(reply)
            assert bpe.decode(ids) == prompt + reply


def test_fingerprint_names_the_vocabulary(bpe):
    more, shorter = data.train_bpe(CORPUS, 401), data.train_bpe(CORPUS, 399)
    other_pattern = Tokenizer(bpe.name, r"\s+|\S+", bpe.tokens)
    swapped = Tokenizer(bpe.name, bpe.pattern, bpe.tokens[:-2] + bpe.tokens[:-3:-1])
    tokenizers = [bpe, more, shorter, other_pattern, swapped]
    assert len({t.fingerprint for t in tokenizers}) == len(tokenizers)
    assert data.train_bpe(CORPUS, 400).fingerprint == bpe.fingerprint


def test_save_and_load(bpe, tmp_path):
    path = tmp_path / "new" / "tokenizer.json"
    bpe.save(path)
    loaded = Tokenizer.load(path)
    assert (loaded.fingerprint, loaded.name, loaded.tokens) == (bpe.fingerprint, "bpe", bpe.tokens)
    assert loaded.encode(CORPUS[2]) == bpe.encode(CORPUS[2])
    assert [p.name for p in path.parent.iterdir()] == ["tokenizer.json"]  # nothing temporary


def test_load_refuses_other_files(bpe, tmp_path):
    path = tmp_path / "tokenizer.json"
    with pytest.raises(UserError, match="tokenizer.json"):
        Tokenizer.load(path)
    bpe.save(path)
    good = json.loads(path.read_text())
    for broken in ([], {}, good | {"tokens": good["tokens"][1:]}, good | {"tokens": 3},
                   good | {"tokens": good["tokens"] + good["tokens"][-1:]},
                   good | {"tokens": good["tokens"] + ["*"]}, good | {"pattern": "("},
                   good | {"tokens": good["tokens"][:-1]}, good | {"pattern": 5}):
        path.write_text(json.dumps(broken))
        with pytest.raises(UserError, match="tokenizer.json"):
            Tokenizer.load(path)
    path.write_bytes(b"\x80 not json")
    with pytest.raises(UserError, match="tokenizer.json"):
        Tokenizer.load(path)


def test_gpt2_tokenizer(gpt2, tmp_path):
    assert (gpt2.end_of_turn, gpt2.end_of_context) == (50256, 50257)
    assert (gpt2.n_tokens, gpt2.n_vocab) == (50258, 50304)
    # These ids are those of GPT-2's published vocabulary.
    assert gpt2.encode("Hello world") == [15496, 995]
    assert gpt2.encode_dialogue(HUMAN + " Hi" + ASSISTANT + " Hi") == [
        198, 198, 20490, 25, 15902, 198, 198, 48902, 25, 15902, 50256]
    rng = random.Random(3)
    for _ in range(100):
        text = random_text(rng, 40)
        assert gpt2.decode(gpt2.encode(text)) == text
    assert gpt2.fingerprint != data.train_bpe(CORPUS, 300).fingerprint
    gpt2.save(tmp_path / "gpt2.json")
    assert Tokenizer.load(tmp_path / "gpt2.json").fingerprint == gpt2.fingerprint


def test_gpt2_without_network_says_what_to_do(monkeypatch):
    def no_network(name):
        raise OSError("no route to host")
    monkeypatch.setattr(tiktoken, "get_encoding", no_network)
    with pytest.raises(UserError) as error:
        data.gpt2_tokenizer()
    for word in ("vocab.bpe", "encoder.json", "TIKTOKEN_CACHE_DIR", "--tokenizer bpe"):
        assert word in str(error.value)


# --- 3. comparisons --------------------------------------------------------------------

Q = HUMAN + " q" + ASSISTANT
Q2 = Q + " a" + HUMAN + " r" + ASSISTANT


@pytest.mark.parametrize("chosen, rejected, expected", [
    (Q + " yes", Q + " no", (Q, " yes", " no")),
    # Several turns: the cut is after the last shared marker, not after the first.
    (Q2 + " yes", Q2 + " no", (Q2, " yes", " no")),
    # Replies that begin alike are not cut in the middle.
    (Q + " yes, a", Q + " yes, b", (Q, " yes, a", " yes, b")),
    # One reply holds a further turn: the last marker of each text would be wrong.
    (Q + " a" + ASSISTANT + " b", Q + " c", (Q, " a" + ASSISTANT + " b", " c")),
    (Q + " c", Q + " a" + HUMAN + " r" + ASSISTANT + " b",
     (Q, " c", " a" + HUMAN + " r" + ASSISTANT + " b")),
    # The shared part ends inside a marker.
    (Q + " a" + ASSISTANT + " b", Q + " a\n\nAssist", (Q, " a" + ASSISTANT + " b", " a\n\nAssist")),
    (Q + " a\n\nAssistant", Q + " a" + ASSISTANT + " b", (Q, " a\n\nAssistant", " a" + ASSISTANT + " b")),
    (Q + " yes", Q + " yes ", (Q, " yes", " yes ")),
    (Q + " yes", Q + " yes", "identical pair"),
    (Q, Q, "identical pair"),
    (Q + " yes", Q, "empty reply"),
    (Q + " ", Q + " no", "empty reply"),
    (Q2 + " yes", Q2 + "\n", "empty reply"),
    (HUMAN + " q" + ASSISTANT + " a", HUMAN + " p" + ASSISTANT + " a", "no shared prompt"),
    (HUMAN + " q\n\nAssistant", HUMAN + " q\n\nAssistant: a", "no shared prompt"),
])
def test_split_comparison_golden(chosen, rejected, expected):
    parts, reason = data.split_comparison(chosen, rejected)
    assert (parts or reason) == expected and bool(parts) != bool(reason)


def write_rows(path, *rows):
    lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
    raw = b"\n".join(lines) + b"\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else raw)
    return path


GOOD = {"chosen": Q + " yes", "rejected": Q + " no"}


def test_read_comparisons_counts_what_it_drops(tmp_path):
    path = write_rows(tmp_path / "x.jsonl.gz", GOOD | {"p_chosen": 0.75}, b"", GOOD | {"rejected": Q},
                      GOOD | {"rejected": GOOD["chosen"]}, GOOD | {"rejected": Q + "\u2028 \x85no"},
                      GOOD | {"chosen": Q + " "}, GOOD | {"chosen": HUMAN + " else"})
    rows, counter = data.read_comparisons(path, "helpful")
    assert rows == [Comparison(Q, " yes", " no", "helpful", 0.75),
                    Comparison(Q, " yes", "\u2028 \x85no", "helpful")]
    assert counter == {"read": 6, "kept": 2, "empty reply": 2, "identical pair": 1, "no shared prompt": 1}
    assert data.counts_line(counter) == (
        "read 6, kept 2, dropped 4 (empty reply 2, identical pair 1, no shared prompt 1)")
    assert data.counts_line(Counter(read=1617, kept=1617)) == "read 1,617, kept 1,617, dropped 0"


@pytest.mark.parametrize("bad, words", [
    (b'{"chosen": ', "not JSON"),
    (b'["chosen"]', "object"),
    (b'{"chosen": "\xff"}', "UTF-8"),
    ({"rejected": Q + " no"}, "'chosen'"),
    ({"chosen": Q + " yes", "rejected": None}, "'rejected'"),
    ({"chosen": "Human: q", "rejected": Q + " no"}, "'chosen' is not a dialogue"),
    (GOOD | {"p_chosen": "0.5"}, "p_chosen"),
    (GOOD | {"p_chosen": 1.5}, "p_chosen"),
    (b'{"chosen": "\\n\\nHuman:", "rejected": "\\n\\nHuman:", "p_chosen": NaN}', "p_chosen"),
])
@pytest.mark.parametrize("name", ["bad.jsonl", "bad.jsonl.gz"])
def test_a_bad_line_is_named(tmp_path, name, bad, words):
    path = write_rows(tmp_path / name, GOOD, b"", bad, GOOD)
    with pytest.raises(UserError) as error:
        data.read_comparisons(path, "helpful")
    assert f"{path}:3:" in str(error.value) and words in str(error.value)


def test_a_bad_file_is_named(tmp_path):
    whole = write_rows(tmp_path / "whole.jsonl.gz", *[GOOD | {"n": n} for n in range(2000)])
    raw = whole.read_bytes()
    damaged = raw[:300] + bytes([255] * 60) + raw[360:]
    for name, content in {"cut.jsonl.gz": raw[:len(raw) // 2], "plain.jsonl.gz": b"{}\n",
                          "damaged.jsonl.gz": damaged}.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=f"{name}.*gzip"):
            list(data.read_jsonl(tmp_path / name))
    with pytest.raises(UserError, match="missing.jsonl"):
        list(data.read_jsonl(tmp_path / "missing.jsonl"))
    with pytest.raises(UserError, match="cannot read"):
        list(data.read_jsonl(tmp_path))


def test_load_a_folder(tmp_path):
    write_rows(tmp_path / "helpful-b" / "train.jsonl.gz", GOOD)
    write_rows(tmp_path / "harmless-a" / "train.jsonl", GOOD, GOOD | {"rejected": Q})
    write_rows(tmp_path / "harmless-a" / "train.jsonl.gz", GOOD)  # not read a second time
    write_rows(tmp_path / "helpful-b" / "test.jsonl", GOOD, GOOD)
    rows, counters = data.load_comparisons(tmp_path, "train")
    assert [c.kind for c in rows] == ["harmless", "helpful"]
    assert {k: (n["read"], n["kept"]) for k, n in counters.items()} == {
        "harmless-a": (2, 1), "helpful-b": (1, 1)}
    assert len(data.load_comparisons(tmp_path, "test")[0]) == 2
    only, counters = data.load_comparisons(str(tmp_path), "train", ["helpful-b"])
    assert [c.kind for c in only] == ["helpful"] and list(counters) == ["helpful-b"]
    with pytest.raises(UserError, match="harmless-a.*it has helpful-b"):
        data.load_comparisons(tmp_path, "test", ["harmless-a"])


def test_load_nothing_says_what_is_expected(tmp_path):
    for root in (tmp_path, tmp_path / "missing"):
        with pytest.raises(UserError, match="helpful-base/train.jsonl.gz"):
            data.load_comparisons(root, "train")
    write_rows(tmp_path / "helpful-b" / "train.jsonl", GOOD | {"rejected": Q})
    with pytest.raises(UserError, match="empty reply 1"):
        data.load_comparisons(tmp_path, "train")
    with pytest.raises(UserError, match="valid"):
        data.load_comparisons(tmp_path, "valid")


def test_load_one_file_splits_by_first_question(tmp_path):
    rows = [{"chosen": HUMAN + f" q{n % 300}" + ASSISTANT + f" a{n}",
             "rejected": HUMAN + f" q{n % 300}" + ASSISTANT + f" b{n}"} for n in range(900)]
    path = write_rows(tmp_path / "my-harmless.jsonl", *rows)
    sides = {split: data.load_comparisons(path, split) for split in ("train", "test")}
    train, test = sides["train"][0], sides["test"][0]
    assert {c.kind for c in train} == {"harmless"}
    assert not {c.prompt for c in train} & {c.prompt for c in test}
    assert sorted(c.chosen for c in train + test) == sorted(f" a{n}" for n in range(900))
    assert 20 <= len(test) <= 110  # 1/16 of 900 is 56; each question brings three rows
    for kept, counters in sides.values():
        counter = counters["my-harmless.jsonl"]
        assert counter["read"] == 900 and counter["kept"] == len(kept)
        assert counter["in the other split"] == 900 - len(kept)


@pytest.mark.parametrize("name", ["helpful/train.jsonl", "helpful/train.jsonl.gz"])
def test_write_comparisons_can_be_read(tmp_path, name):
    rows = [Comparison(Q2, " yes \u2028é", " no", "helpful", 0.25), Comparison(Q, " a", " b", "helpful")]
    data.write_comparisons(tmp_path / name, rows)
    first = (tmp_path / name).read_bytes()
    assert data.read_comparisons(tmp_path / name, "helpful") == (rows, {"read": 2, "kept": 2})
    data.write_comparisons(tmp_path / name, rows)
    assert (tmp_path / name).read_bytes() == first
    assert not name.endswith(".gz") or first[4:8] == bytes(4)  # gzip's header holds no time
    with pytest.raises(UserError, match="cannot write"):
        data.write_comparisons(tmp_path / name / "below-a-file.jsonl", rows)


def test_a_killed_write_leaves_the_old_file(tmp_path, monkeypatch):
    data.write_atomically(tmp_path / "x", b"old")

    def killed(source, target):
        raise KeyboardInterrupt
    monkeypatch.setattr(data.os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        data.write_atomically(tmp_path / "x", b"new")
    assert (tmp_path / "x").read_bytes() == b"old"


def test_encode_comparison_cuts_the_beginning_of_the_prompt_only(bpe):
    c = Comparison(HUMAN + " 1234567 times the cat sat on the mat, and why is that?" + ASSISTANT,
                   " yes, the cat", " no", "helpful")
    prompt, chosen, rejected = (bpe.encode_dialogue(c.prompt), bpe.encode_reply(c.chosen),
                                bpe.encode_reply(c.rejected))
    whole = len(prompt) + len(chosen) + 1
    assert len(prompt) > data.MIN_PROMPT + 3 and len(chosen) > len(rejected)
    for context in range(1, whole + 3):
        result = data.encode_comparison(bpe, c, context)
        kept = min(len(prompt), context - 1 - len(chosen))
        if kept < data.MIN_PROMPT:
            assert result is None
        else:
            assert result == (prompt[len(prompt) - kept:], chosen, rejected)
            assert kept + max(len(chosen), len(rejected)) + 1 <= context
    # A prompt shorter than the minimum is kept whole or not at all.
    short = Comparison(ASSISTANT, c.chosen, c.rejected, "helpful")
    n = len(bpe.encode(ASSISTANT)) + len(chosen) + 1
    assert data.encode_comparison(bpe, short, n)[0] == bpe.encode(ASSISTANT)
    assert data.encode_comparison(bpe, short, n - 1) is None


# --- 4. batching -----------------------------------------------------------------------

@pytest.mark.parametrize("seed", [None, 0, 1])
def test_batches_hold_each_row_once_within_the_budget(seed):
    rng = random.Random(5)
    lengths = [rng.randrange(1, 60) for _ in range(300)] + [500, 0]
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    batches = data.batches_by_length(lengths, 256, generator)
    assert sorted(i for batch in batches for i in batch) == list(range(302))
    for batch in batches:
        assert len(batch) * max(lengths[i] for i in batch) <= 256 or len(batch) == 1
    # Alike in length: batches, put in order, don't overlap.
    spans = sorted((min(lengths[i] for i in b), max(lengths[i] for i in b)) for b in batches)
    assert all(a[1] <= b[0] for a, b in zip(spans, spans[1:]))
    padded = sum(len(b) * max(lengths[i] for i in b) for b in batches)
    assert padded < 1.1 * sum(lengths)


def test_batches_are_shuffled_by_the_generator_only():
    lengths = [7] * 40 + [3] * 40
    generator = torch.Generator().manual_seed(0)
    one, two = (data.batches_by_length(lengths, 35, generator) for _ in range(2))
    again = data.batches_by_length(lengths, 35, torch.Generator().manual_seed(0))
    assert one == again and one != two
    assert {frozenset(b) for b in one} != {frozenset(b) for b in two}  # ties change places
    assert [lengths[b[0]] for b in one] != sorted(lengths[b[0]] for b in one)
    plain = data.batches_by_length(lengths, 35)
    assert plain[0] == list(range(40, 51)) and plain[-1] == list(range(35, 40))
    assert data.batches_by_length([], 35) == []


def test_pad():
    tokens, lengths = data.pad([[1, 2, 3], [], [4]], value=9)
    assert tokens.tolist() == [[1, 2, 3], [9, 9, 9], [4, 9, 9]] and lengths.tolist() == [3, 0, 1]
    assert tokens.dtype == lengths.dtype == torch.int64
    assert data.pad([])[0].shape == (0, 0)


# --- the real data ---------------------------------------------------------------------

def test_real_rows(hh_rlhf_dir, bpe):
    """Every row parses back; prompts and counts agree with another way to split, by turns."""
    for subset in ("helpful-base", "harmless-base"):
        for split in ("train", "test"):
            kept, counters = data.load_comparisons(hh_rlhf_dir, split, [subset])
            expected, dropped = [], 0
            with gzip.open(hh_rlhf_dir / subset / f"{split}.jsonl.gz") as file:
                rows = [json.loads(line) for line in file]
            for row in rows:
                assert data.render(data.parse(row["chosen"])) == row["chosen"]
                assert data.render(data.parse(row["rejected"])) == row["rejected"]
                # Turn by turn: the first turn that differs is the reply.
                a, b = (re.split(r"(\n\n(?:Human|Assistant):)", row[k])[1:] for k in ("chosen", "rejected"))
                n = next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))
                while n and a[n - 1] != ASSISTANT:
                    n -= 1  # replies that differ by a further turn only begin one turn earlier
                parts = ["".join(a[:n]), "".join(a[n:]), "".join(b[n:])]
                if n and parts[1] != parts[2] and parts[1].strip() and parts[2].strip():
                    expected.append(tuple(parts))
                else:
                    dropped += 1
            assert [(c.prompt, c.chosen, c.rejected) for c in kept] == expected
            counter = counters[subset]
            assert (counter["read"], counter["kept"]) == (len(rows), len(rows) - dropped)
            assert sum(counter.values()) == 2 * counter["read"]
            for c in kept[::20]:
                assert c.kind == subset.split("-")[0] and c.prompt.endswith(ASSISTANT)
                ids = bpe.encode_dialogue(c.prompt + c.chosen)
                assert ids == bpe.encode_dialogue(c.prompt) + bpe.encode_reply(c.chosen)
                assert bpe.decode(ids) == c.prompt + c.chosen


def test_half_an_emoji_can_be_written_again(tmp_path):
    """JSON may hold one half of a surrogate pair, which no file can: it is read as "?"."""
    path = tmp_path / "train.jsonl"
    path.write_text(r'{"chosen": "\n\nHuman: Hi \ud83d\n\nAssistant: Yes.", "rejected": "\n\nHuman: Hi \ud83d\n\nAssistant: No."}')
    [found], counts = data.read_comparisons(path, "helpful")
    assert found.prompt.encode() == b"\n\nHuman: Hi ?\n\nAssistant:" and counts["kept"] == 1
