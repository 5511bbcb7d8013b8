"""From text to tensors: dialogues, comparisons, batches and the tokenizer.

Read it in this order:
  1. Dialogues     "\\n\\nHuman: ...\\n\\nAssistant: ..." and its turns: `parse`, `render`
  2. Comparisons   one prompt, two replies, and the crowdworker's choice between them
  3. Batches       rows of similar length are batched together and padded on the right
  4. Tokenizer     a thin layer over tiktoken, and byte-pair encoding (BPE): `train_bpe`

Legend: B rows in a batch, T tokens in the longest row of a batch. A prompt is a text that ends in
"\\n\\nAssistant:"; a reply is the text after it, with its leading space.
Papers: HH = Bai et al. 2022 (arXiv 2204.05862); a § or Fig. without a name is in HH.
"""
import base64
import gzip
import hashlib
import heapq
import json
import os
import re
import zlib
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Iterable, Iterator, Sequence

import tiktoken
import torch

from run import UserError, check_is_file, progress, write_atomically, write_jsonl

# ---- 1. Dialogues ------------------------------------------------------------

HUMAN = "\n\nHuman:"
ASSISTANT = "\n\nAssistant:"
MARKER = re.compile(r"\n\n(Human|Assistant):")


def split_turns(text: str) -> tuple[str, list[tuple[str, str]]]:
    """Split a text into (head, turns): what precedes the first marker, then (role, text) pairs."""
    # MARKER has a group, so re.split keeps the roles: [head, role, text, role, text, ...].
    head, *rest = MARKER.split(text)
    return head, list(zip(rest[0::2], rest[1::2]))


def parse(text: str) -> list[tuple[str, str]]:
    """The turns of a dialogue: [("Human", " Hi!"), ("Assistant", " Hello."), ...], as raw text, so
    render(parse(text)) == text. Raises ValueError if `text` does not begin with a marker."""
    head, turns = split_turns(text)
    if head or not turns:
        raise ValueError(f"not a dialogue (does not begin with {HUMAN!r}): {text[:40]!r}")
    return turns


def render(turns: list[tuple[str, str]]) -> str:
    """The inverse of `parse`."""
    return "".join(f"\n\n{role}:{text}" for role, text in turns)


# ---- 2. Comparisons ----------------------------------------------------------

MIN_PROMPT = 16  # tokens; a prompt cut to fewer no longer says what the replies answer


@dataclass
class Comparison:
    """One prompt and two replies: the unit of human feedback (HH §2.1)."""
    prompt: str                    # ends in "\n\nAssistant:"
    chosen: str                    # the reply labeled better; in red-teaming, the one not picked
    rejected: str                  # the other reply; in red-teaming, the more harmful one
    kind: str                      # "helpful" or "harmless"
    p_chosen: float | None = None  # probability of this label; known in the toy world
    conversation: str = ""         # the name of its conversation; known for people's choices


def split_comparison(chosen: str, rejected: str) -> tuple[tuple[str, str, str] | None, str]:
    """Split two dialogues into ((prompt, chosen reply, rejected reply), ""), or (None, reason).
    A row holds two full dialogues. Their prompt is the text they share, cut after its last
    "\\n\\nAssistant:". Cutting at the first marker instead is wrong for every dialogue of several
    turns: 71% of harmless-base/test, by our own count. Cutting each dialogue at its own last marker
    gives two different prompts if one reply holds a further turn (0.2%)."""
    if chosen == rejected:
        return None, "identical pair"
    # The shared text may end inside a marker ("...\n\nAssis"). rfind sees whole markers only.
    shared = os.path.commonprefix([chosen, rejected])
    start = shared.rfind(ASSISTANT)
    if start < 0:
        return None, "no shared prompt"
    end = start + len(ASSISTANT)
    if not chosen[end:].strip() or not rejected[end:].strip():
        return None, "empty reply"
    return (chosen[:end], chosen[end:], rejected[end:]), ""


MAX_LINE = 2**24  # bytes; a small .gz file can hold a line of 3 GB. Real lines have a few thousand


def read_jsonl(path) -> Iterator[tuple[int, dict]]:
    """Yield (line number from 1, object) for each line of a .jsonl or .jsonl.gz file; blank lines
    are skipped. Raises UserError that names the file and, where possible, the line."""
    path, number = Path(path), 0
    check_is_file(path)
    open_file = gzip.open if path.suffix == ".gz" else open
    try:
        # Binary files break lines at "\n" only, so the numbers are those that an editor shows.
        with open_file(path, "rb") as file:
            lines = iter(lambda: file.readline(MAX_LINE + 1), b"")
            for number, line in enumerate(lines, start=1):
                if len(line) > MAX_LINE:
                    raise UserError(f"{path}:{number}: the line has more than {MAX_LINE:,} bytes")
                if line.strip():
                    yield number, parse_json_object(line, f"{path}:{number}")
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        if str(error).startswith("Not a gzipped file"):
            raise UserError(f"{path} is not a gzip file, in spite of its name") from error
        raise UserError(f"{path}: damaged or incomplete gzip file (readable up to line {number}): "
                        "download it again") from error
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error


def parse_json_object(line: bytes, place: str) -> dict:
    """The JSON object in `line`. Raises UserError that begins with `place`, "file:line"."""
    try:
        row = json.loads(line.decode("utf-8-sig"))  # "sig": some editors begin a file with a mark
    except UnicodeDecodeError as error:
        raise UserError(f"{place}: not UTF-8 text") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{place}: not JSON ({error})") from error
    if not isinstance(row, dict):
        found = line[:40].decode(errors="replace")
        raise UserError(f"{place}: expected a JSON object {{...}}, found {found!r}")
    return row


def read_comparisons(path, kind: str) -> tuple[list[Comparison], Counter]:
    """Read a file in the format of HH-RLHF: {"chosen": dialogue, "rejected": dialogue} per line,
    with "p_chosen", "kind" and "conversation" where they are known. Returns (comparisons, counter):
    "read", "kept" and one entry for each reason to drop a row, so that read = kept + the reasons'
    sum. Raises UserError with the line of the first row in another format."""
    comparisons, counter = [], Counter(read=0, kept=0)
    for number, row in read_jsonl(path):
        for field in ("chosen", "rejected"):
            if not isinstance(row.get(field), str):
                raise UserError(f"{path}:{number}: no text in the field {field!r}")
            # JSON can hold half an emoji ("\ud83d"), which UTF-8 cannot. It becomes "?".
            row[field] = row[field].encode("utf-8", "replace").decode()
            if not row[field].startswith((HUMAN, ASSISTANT)):
                raise UserError(f"{path}:{number}: {field!r} is not a dialogue: it begins with "
                                f"{row[field][:20]!r} instead of {HUMAN!r}")
        p = row.get("p_chosen")
        if p is not None and not (isinstance(p, (int, float)) and 0 <= p <= 1):
            raise UserError(f"{path}:{number}: 'p_chosen' is {p!r}, not a probability")
        parts, reason = split_comparison(row["chosen"], row["rejected"])
        counter["read"] += 1
        counter["kept" if parts else reason] += 1
        if parts:
            own_kind = row["kind"] if row.get("kind") in ("helpful", "harmless") else kind
            comparisons.append(Comparison(*parts, own_kind, p, str(row.get("conversation") or "")))
    return comparisons, counter


def load_comparisons(root, split: str, subsets: Sequence[str] | None = None
                     ) -> tuple[list[Comparison], dict[str, Counter]]:
    """Load the "train" or "test" split. Returns (comparisons, {subset: counter}).
    root: a folder in the official layout, root/<subset>/<split>.jsonl.gz (or .jsonl), or a single
    file, which `in_test` divides. subsets: names of folders under root; None takes all that have
    the split, in alphabetical order. A subset whose name begins with "harmless" gets the kind
    "harmless" (a single file does if its name or its folder's name contains the word); all others
    get "helpful". Raises UserError if there is nothing to load."""
    root = Path(root)
    if split not in ("train", "test"):
        raise UserError(f"the split {split!r} is neither 'train' nor 'test'")
    comparisons, counters = [], {}
    if root.is_file():
        kind = "harmless" if "harmless" in "/".join(root.parts[-2:]) else "helpful"
        rows, counter = read_comparisons(root, kind)
        comparisons = [row for row in rows if in_test(row) == (split == "test")]
        counter["kept"] = len(comparisons)
        counter["in the other split"] = len(rows) - len(comparisons)
        counters[root.name] = counter
    else:
        files = {}  # subset -> its file; ".jsonl" comes last and wins where both are there
        for ending in (".jsonl.gz", ".jsonl"):
            for file in root.glob(f"*/{split}{ending}"):
                files[file.parent.name] = file
        for name in subsets or sorted(files):
            if name not in files:
                raise UserError(f"no {split}.jsonl[.gz] of a subset {name!r} in {root}: "
                                f"it has {', '.join(sorted(files)) or 'none'}")
            kind = "harmless" if name.startswith("harmless") else "helpful"
            rows, counters[name] = read_comparisons(files[name], kind)
            comparisons += rows
    if not counters:
        raise UserError(f"no {split} comparisons at {root}: expected a .jsonl[.gz] file, or a "
                        f"folder with files like helpful-base/{split}.jsonl.gz in it")
    if not comparisons:
        total = counts_line(sum(counters.values(), Counter()))
        raise UserError(f"{root}: no usable comparison in the split {split!r} ({total})")
    return comparisons, counters


def in_test(comparison: Comparison) -> bool:
    """Whether a comparison of a single file belongs to the test split, as one in sixteen does. The
    hash of the first turn decides, so all rows that open with the same question are on the same
    side."""
    first_turn = parse(comparison.prompt)[0][1]
    return hashlib.sha256(first_turn.encode(errors="replace")).digest()[0] % 16 == 0


def counts_line(counter: Counter) -> str:
    """Format a counter as "read 1,617, kept 1,615, dropped 2 (empty reply 2)"."""
    dropped = counter - Counter(read=counter["read"], kept=counter["kept"])
    reasons = ", ".join(f"{reason} {n:,}" for reason, n in sorted(dropped.items()))
    line = f"read {counter['read']:,}, kept {counter['kept']:,}, dropped {dropped.total():,}"
    return f"{line} ({reasons})" if reasons else line


def write_comparisons(path, comparisons: Iterable[Comparison]):
    """The inverse of `read_comparisons`. The kind is in the folder's name, not in the file."""
    rows = []
    for c in comparisons:
        row = {"chosen": c.prompt + c.chosen, "rejected": c.prompt + c.rejected}
        if c.p_chosen is not None:
            row["p_chosen"] = c.p_chosen
        rows.append(row)
    write_jsonl(path, rows)


def cut_prompt(prompt: list[int], room: int) -> list[int] | None:
    """Drop the beginning of a prompt that does not fit. None if too little of it would be left."""
    if room < min(len(prompt), MIN_PROMPT):
        return None
    return prompt[max(0, len(prompt) - room):]


def encode_comparison(tok: "Tokenizer", comparison: Comparison, context: int
                      ) -> tuple[list[int], list[int], list[int]] | None:
    """Encode a comparison as (prompt ids, chosen ids, rejected ids), or None if a reply is too
    long. context: the most tokens that the PM can read; one is kept free for end_of_context. The
    longer reply decides how the prompt is cut. Replies are never cut: they may differ there."""
    chosen = tok.encode_reply(comparison.chosen)
    rejected = tok.encode_reply(comparison.rejected)
    room = context - 1 - max(len(chosen), len(rejected))
    prompt = cut_prompt(tok.encode_dialogue(comparison.prompt), room)
    return None if prompt is None else (prompt, chosen, rejected)


# ---- 3. Batches --------------------------------------------------------------


def batches_by_length(lengths: Sequence[int], token_budget: int,
                      generator: torch.Generator | None = None) -> list[list[int]]:
    """Divide the rows 0 to len(lengths) - 1 into batches; each row is in exactly one.
    A batch has rows * longest <= token_budget. A row longer than the budget is a batch by itself.
    Rows of similar length share a batch, which saves padding. With a generator, batches and rows of
    equal length are shuffled."""
    order = list(range(len(lengths)))
    if generator is not None:
        order = torch.randperm(len(lengths), generator=generator).tolist()
    order.sort(key=lambda i: lengths[i])  # a stable sort: ties stay in random order
    batches = []
    for i in order:  # row i is the longest so far, so it sets the width of its batch
        if batches and (len(batches[-1]) + 1) * lengths[i] <= token_budget:
            batches[-1].append(i)
        else:
            batches.append([i])
    if generator is not None:
        batches = [batches[b] for b in torch.randperm(len(batches), generator=generator).tolist()]
    return batches


def pad(rows: Sequence[Sequence[int]], value: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Pad rows to (tokens (B, T), lengths (B,)), both int64. Pads of `value` go on the right:
    causal attention looks left only, so no real token sees a pad, and token t is at position t.
    Left padding would need a mask and position ids. Losses must skip positions >= length."""
    lengths = [len(row) for row in rows]
    tokens = torch.full((len(rows), max(lengths, default=0)), value)  # (B, T)
    for b, row in enumerate(rows):
        tokens[b, :len(row)] = torch.tensor(row, dtype=torch.int64)
    return tokens, torch.tensor(lengths, dtype=torch.int64)


# ---- 4. Tokenizer ------------------------------------------------------------
# PATTERN cuts text into pieces, and no token crosses the border of two pieces. A turn's marker is
# one piece, so a BPE trained here can make it one token. The rest is cut in GPT-2's way: a
# contraction; a word, a number or punctuation with the space before it; white space. No character
# is lost. Python's `re` and tiktoken's Rust both accept it; they differ on a few rare characters.
PATTERN = (r"\n\n(?:Human|Assistant):|'(?:[sdmt]|ll|ve|re)| ?[^\W\d_]+| ?\d+| ?(?:[^\w\s]|_)+"
           r"|\s+(?!\S)|\s+")
SINGLE_BYTES = [bytes([byte]) for byte in range(256)]


class Tokenizer:
    """Byte-level BPE, run by tiktoken, with two special tokens after the ordinary ones.

    end_of_turn     "<|endoftext|>" ends every assistant turn. It is an action: the policy stops
                    by sampling it. GPT-2 already knows it as the end of a document.
    end_of_context  "<|endofcontext|>" is appended once, after everything else. The PM reads its
                    score there (HH App. A.2); the policy never sees it.
    n_tokens        The number of ids that mean something. n_vocab, the rows of the embedding, is
                    n_tokens rounded up to a multiple of 64 (faster on GPUs).
    fingerprint     Identifies the vocabulary. Checkpoints store it, because weights trained with
                    another tokenizer would load, run and produce nonsense."""

    def __init__(self, name: str, pattern: str, tokens: Sequence[bytes]):
        """pattern: the regex that cuts text into pieces, which no token crosses.
        tokens: the bytes of each ordinary token. A token's index is its id and its rank."""
        self.name, self.pattern, self.tokens = name, pattern, list(tokens)
        self.end_of_turn, self.end_of_context = len(tokens), len(tokens) + 1
        self.n_tokens = len(tokens) + 2
        self.n_vocab = (self.n_tokens + 63) // 64 * 64
        specials = {"<|endoftext|>": self.end_of_turn, "<|endofcontext|>": self.end_of_context}
        ranks = {token: rank for rank, token in enumerate(tokens)}
        self.encoding = tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks,
                                          special_tokens=specials)
        self._tokens_base64 = [base64.b64encode(token).decode() for token in tokens]
        identity = json.dumps([pattern, self._tokens_base64, specials])
        self.fingerprint = hashlib.sha256(identity.encode()).hexdigest()[:16]
        self._marker_ids = {"Human": self.encode(HUMAN), "Assistant": self.encode(ASSISTANT)}

    def encode(self, text: str) -> list[int]:
        """Turn text into ids, none of them special. "<|endoftext|>" inside a text is encoded as
        ordinary text. Otherwise any user could end the assistant's turn by typing it."""
        return self.encoding.encode_ordinary(text)

    def decode(self, ids: Iterable[int]) -> str:
        """Turn ids into text. Ids from end_of_turn on (the special ones, and those that only round
        up n_vocab) give "". The pads of `pad` are id 0, an ordinary token: cut them off first.
        Bytes that are not UTF-8 (an untrained policy produces them) give U+FFFD."""
        return self.encoding.decode([i for i in ids if i < self.end_of_turn], errors="replace")

    def encode_dialogue(self, text: str) -> list[int]:
        """Turn a whole text into ids, with end_of_turn after each assistant turn.
        A prompt, which ends in an empty assistant turn, is still open and gets none there. A text
        may open with a header before the first marker. A text without turns is a plain document,
        which end_of_turn ends. Markers and turns are encoded one by one, because BPE over the
        joined text may merge across a border. So the reply begins at a known index:
            encode_dialogue(prompt + reply) == encode_dialogue(prompt) + encode_reply(reply)"""
        head, turns = split_turns(text)
        ids = self.encode(head)
        if not turns:
            return ids + [self.end_of_turn]
        for number, (role, words) in enumerate(turns, start=1):
            ids += self._marker_ids[role] + self.encode(words)
            is_open_prompt = number == len(turns) and words == ""
            if role == "Assistant" and not is_open_prompt:
                ids.append(self.end_of_turn)
        return ids

    def encode_reply(self, reply: str) -> list[int]:
        """The ids of a reply, end_of_turn included. It may hold further turns. "" gives []."""
        return self.encode_dialogue(ASSISTANT + reply)[len(self._marker_ids["Assistant"]):]

    def save(self, path):
        """Write a JSON file that `load` reads. Tokens are raw bytes, hence the base64."""
        fields = {"name": self.name, "pattern": self.pattern, "tokens": self._tokens_base64,
                  "fingerprint": self.fingerprint}
        write_atomically(path, json.dumps(fields).encode())

    @classmethod
    def load(cls, path) -> "Tokenizer":
        """Raises UserError if the file is missing, is no tokenizer, or was changed."""
        check_is_file(path)
        try:
            fields = json.loads(Path(path).read_bytes())
            tokens = [base64.b64decode(token, validate=True) for token in fields["tokens"]]
            # Every text is made of these 256; tiktoken crashes if one is missing.
            if len(set(tokens)) < len(tokens) or not set(SINGLE_BYTES) <= set(tokens):
                raise ValueError("its tokens are not a byte-level vocabulary")
            tokenizer = cls(fields["name"], fields["pattern"], tokens)
            if tokenizer.fingerprint != fields["fingerprint"]:
                raise ValueError("its contents do not match its fingerprint")
        except OSError as error:
            raise UserError(f"cannot read the tokenizer {path}: {error.strerror}") from error
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path} is not a tokenizer file: {error}") from error
        return tokenizer


def gpt2_tokenizer() -> Tokenizer:
    """GPT-2's 50,256 tokens, its <|endoftext|> and our <|endofcontext|>. n_vocab is 50304."""
    try:
        gpt2 = tiktoken.get_encoding("gpt2")  # downloads two files on first use and caches them
    except (OSError, ValueError) as error:  # no network, or an incomplete download
        raise UserError("GPT-2's tokenizer files vocab.bpe and encoder.json could not be "
                        "downloaded: set TIKTOKEN_CACHE_DIR to a folder where tiktoken has cached "
                        "them, or train your own tokenizer with --tokenizer bpe") from error
    # tiktoken's README itself uses these private names to extend an encoding.
    ranks = gpt2._mergeable_ranks
    return Tokenizer("gpt2", gpt2._pat_str, sorted(ranks, key=ranks.get))


def train_bpe(texts: Iterable[str], n_vocab: int) -> Tokenizer:
    """Learn a vocabulary by byte-pair encoding (Sennrich et al. 2016, arXiv 1508.07909).
    Start from the 256 bytes, so that every text can be spelled. Then repeat: find the most
    frequent pair of neighboring tokens in the corpus and make it a new token. Ties go to the pair
    with the smaller ids, so the result depends on nothing but the text. To encode, tiktoken merges
    the pair of lowest rank first. Ranks follow the order of training, so it replays the merges.
    n_vocab: bytes + merges + 2 special tokens, at least 258; the vocabulary is smaller if no pair
    occurs twice any more."""
    if n_vocab < 258:
        raise UserError(f"a BPE vocabulary of {n_vocab} is too small for 256 bytes and 2 specials")
    # No token crosses the border of two pieces, so each distinct piece is treated once.
    pieces = Counter()
    for text in progress(texts, "train BPE", "texts"):
        pieces.update(re.findall(PATTERN, text))
    words = [list(piece.encode(errors="replace")) for piece in pieces]  # byte values are ids
    repeats = list(pieces.values())
    count = Counter()         # pair of ids -> how often it occurs in the corpus
    where = defaultdict(set)  # pair of ids -> the words that hold it, or once did
    change = Counter()        # pair of ids -> change of its count since the last merge
    for w, word in enumerate(words):
        for pair in zip(word, word[1:]):
            change[pair] += repeats[w]
            where[pair].add(w)
    tokens = list(SINGLE_BYTES)
    heap = []  # (-count, pair), the most frequent pair first
    while len(tokens) + 2 < n_vocab:
        for pair, difference in change.items():
            if difference:
                count[pair] += difference
                heapq.heappush(heap, (-count[pair], pair))
        change.clear()
        while heap and -heap[0][0] != count[heap[0][1]]:
            heapq.heappop(heap)  # pushed before the count changed
        if not heap or count[heap[0][1]] < 2:
            break  # a pair that occurs once is not worth a token
        best = heapq.heappop(heap)[1]
        # Only words that hold the pair are visited. A scan of all words per merge takes hours.
        for w in where.pop(best):
            merged = merge_pair(words[w], best, new_id=len(tokens))
            for old in zip(words[w], words[w][1:]):
                change[old] -= repeats[w]
            for new in zip(merged, merged[1:]):
                change[new] += repeats[w]
                where[new].add(w)
            words[w] = merged
        tokens.append(tokens[best[0]] + tokens[best[1]])
    return Tokenizer("bpe", PATTERN, tokens)


def merge_pair(word: list[int], pair: tuple[int, int], new_id: int) -> list[int]:
    """`word` with each occurrence of `pair`, from the left, replaced by `new_id`."""
    merged = []
    for token in word:
        if merged and (merged[-1], token) == pair:
            merged[-1] = new_id
        else:
            merged.append(token)
    return merged
