"""
From text to tensors: dialogues, tokenizers, comparisons, batches.

Read it in this order (top to bottom):
  1. Dialogues      "\\n\\nHuman: ...\\n\\nAssistant: ..." and its turns: `parse`, `render`.
  2. Tokenizer      a thin shell around tiktoken: GPT-2's vocabulary, or one that
                    `train_bpe` learns from scratch, plus two special tokens.
  3. Comparisons    one prompt, two replies, and the one that a crowdworker preferred:
                    what the preference model (PM) learns from.
  4. Batching       rows of like length together, padded on the right.

Legend: B rows in a batch, T tokens in the longest row of a batch.
  ids      list[int], the tokens of one text        prompt   ends in "\\n\\nAssistant:"
  reply    the text after such a prompt, with its leading space
Papers: HH = Bai et al. 2022 (arXiv 2204.05862), the default.
"""
import base64
import contextlib
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
from tqdm import tqdm


class UserError(Exception):
    """A mistake of the user's, told in one sentence. The commands print the sentence
    and exit with status 2: a traceback would point at our code, not at the mistake."""


def write_atomically(path, data: bytes):
    """Write `data` to `path`, which is at every moment the old file or the whole new one.
    The bytes go to a temporary name first; renaming within a folder is one step."""
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(data)
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()  # a full disk needs the room
        raise UserError(f"cannot write {path}: {error.strerror}") from error


# ---------------------------------------------------------------------------------------
# 1. Dialogues

HUMAN = "\n\nHuman:"
ASSISTANT = "\n\nAssistant:"
MARKER = re.compile(r"\n\n(Human|Assistant):")


def split_turns(text: str) -> tuple[str, list[tuple[str, str]]]:
    """-> (head, turns): what stands before the first marker, then (role, text) pairs."""
    # A pattern with one group makes re.split keep the roles: [head, role, text, role, text].
    head, *rest = MARKER.split(text)
    return head, list(zip(rest[0::2], rest[1::2]))


def parse(text: str) -> list[tuple[str, str]]:
    """The turns of a dialogue: [("Human", " Hi!"), ("Assistant", " Hello."), ...].

    A turn's text runs to the next marker and is kept raw, leading space included, so that
    render(parse(text)) == text. Raises ValueError when `text` doesn't begin with a marker."""
    head, turns = split_turns(text)
    if head or not turns:
        raise ValueError(f"not a dialogue (does not begin with {HUMAN!r}): {text[:40]!r}")
    return turns


def render(turns: list[tuple[str, str]]) -> str:
    """The inverse of `parse`."""
    return "".join(f"\n\n{role}:{text}" for role, text in turns)


# ---------------------------------------------------------------------------------------
# 2. Tokenizer

class Tokenizer:
    """Byte-level BPE, run by tiktoken, with two special tokens after the ordinary ones.

    end_of_turn     "<|endoftext|>": ends every assistant turn. It is an action: sampling it
                    is how the policy stops. GPT-2 already knows it as the end of a document.
    end_of_context  "<|endofcontext|>": appended once, after everything. The PM reads its
                    score there (HH App. A.2); the policy never sees it.
    n_tokens        how many ids mean something.
    n_vocab         n_tokens rounded up to a multiple of 64, the size of the embedding (GPUs
                    multiply such matrices faster). `encode` never yields an id of the gap.
    fingerprint     names the vocabulary. A checkpoint stores it, because weights that were
                    trained with another tokenizer would load, run, and speak nonsense.
    """

    def __init__(self, name: str, pattern: str, tokens: Sequence[bytes]):
        """pattern: the regex that cuts text into pieces, which no token crosses.
        tokens: the bytes of each ordinary token; a token's index is its id and its rank."""
        self.name, self.pattern, self.tokens = name, pattern, list(tokens)
        self.end_of_turn, self.end_of_context = len(tokens), len(tokens) + 1
        self.n_tokens = len(tokens) + 2
        self.n_vocab = (self.n_tokens + 63) // 64 * 64
        specials = {"<|endoftext|>": self.end_of_turn, "<|endofcontext|>": self.end_of_context}
        self.encoding = tiktoken.Encoding(
            name, pat_str=pattern, special_tokens=specials,
            mergeable_ranks={token: rank for rank, token in enumerate(tokens)})
        self._tokens_base64 = [base64.b64encode(token).decode() for token in tokens]
        identity = json.dumps([pattern, self._tokens_base64, specials])
        self.fingerprint = hashlib.sha256(identity.encode()).hexdigest()[:16]
        self._marker_ids = {"Human": self.encode(HUMAN), "Assistant": self.encode(ASSISTANT)}

    def encode(self, text: str) -> list[int]:
        """Text -> ids, never a special one: "<|endoftext|>" inside a text is thirteen plain
        characters, or any user could end the assistant's turn by typing them."""
        return self.encoding.encode_ordinary(text)

    def decode(self, ids: Iterable[int]) -> str:
        """Ids -> text. Special ids and ids of the gap give ''; bytes that are not UTF-8
        (an untrained policy produces them) give the replacement character U+FFFD."""
        return self.encoding.decode([i for i in ids if i < self.end_of_turn], errors="replace")

    def encode_dialogue(self, text: str) -> list[int]:
        """A whole text -> ids, with end_of_turn after each assistant turn.

        The last turn gets none if it is an empty assistant turn: "...\\n\\nAssistant:" is a
        prompt, still open. Text before the first marker (a header that describes the
        assistant) comes first, as it is. A text without turns is a plain document, which
        end_of_turn ends.

        Markers and turns are encoded one by one. BPE over the joined text may merge across
        a border, and then no token index would say where the reply begins. So it is exact:
            encode_dialogue(prompt + reply) == encode_dialogue(prompt) + encode_reply(reply)
        """
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
        """What follows "\\n\\nAssistant:" -> ids, end_of_turn included. A reply may hold
        further turns (a few rows of the real data do). '' gives []."""
        return self.encode_dialogue(ASSISTANT + reply)[len(self._marker_ids["Assistant"]):]

    def save(self, path):
        """Write a JSON file that `load` reads. Tokens are raw bytes, hence the base64."""
        fields = {"name": self.name, "pattern": self.pattern, "tokens": self._tokens_base64,
                  "fingerprint": self.fingerprint}
        write_atomically(path, json.dumps(fields).encode())

    @classmethod
    def load(cls, path) -> "Tokenizer":
        """Raises UserError for a file that is missing, is no tokenizer, or was changed."""
        try:
            fields = json.loads(Path(path).read_bytes())
            tokens = [base64.b64decode(token, validate=True) for token in fields["tokens"]]
            # Every text is made of these 256; tiktoken panics where one is missing.
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
    """GPT-2's 50,256 tokens and <|endoftext|> = 50256, to which we add
    <|endofcontext|> = 50257. The embedding has n_vocab = 50304 rows."""
    try:
        # tiktoken downloads two files on first use and keeps them in its cache.
        gpt2 = tiktoken.get_encoding("gpt2")
    except (OSError, ValueError) as error:  # no network, or a download that was cut short
        raise UserError(
            "GPT-2's tokenizer files vocab.bpe and encoder.json could not be downloaded: set "
            "TIKTOKEN_CACHE_DIR to a folder where tiktoken has cached them, or train a "
            "tokenizer of your own with --tokenizer bpe") from error
    # The underscores are tiktoken's own advice for extending an encoding (its README).
    ranks = gpt2._mergeable_ranks
    return Tokenizer("gpt2", gpt2._pat_str, sorted(ranks, key=ranks.get))


# The marker of a turn is one piece, and so becomes one token. The rest is GPT-2's way to cut text
# (a contraction; a word, a number or punctuation with the space before it; white space), written
# so that both Python's `re` and tiktoken's Rust accept it. Each character belongs to one of the
# classes, so nothing can be lost. The two disagree on a few rare characters, which costs a
# little compression there and no more.
PATTERN = r"\n\n(?:Human|Assistant):|'(?:[sdmt]|ll|ve|re)| ?[^\W\d_]+| ?\d+| ?(?:[^\w\s]|_)+|\s+(?!\S)|\s+"
SINGLE_BYTES = [bytes([byte]) for byte in range(256)]


def train_bpe(texts: Iterable[str], n_vocab: int) -> Tokenizer:
    """Learn a vocabulary by byte-pair encoding (Sennrich et al. 2016, arXiv 1508.07909).

    Start from the 256 bytes, so that every text can be spelled. Then again and again: find
    the pair of neighbouring tokens that is most frequent in the corpus, and make it a new
    token. Ties go to the pair of smaller ids, so the result depends on nothing but the text.

    n_vocab: bytes + merges + 2 special tokens, before rounding; fewer where no pair is left
    that occurs twice. To encode, tiktoken merges the pair of lowest rank first. A rank is
    an index into the order of training, so it replays these merges exactly.
    """
    if n_vocab < 258:
        raise UserError(f"a BPE vocabulary of {n_vocab} is too small for 256 bytes and 2 specials")
    # Merges never cross pieces, so it is enough to treat each distinct piece once.
    pieces = Counter()
    for text in tqdm(texts, desc="train BPE", unit=" texts", leave=False, delay=2):
        pieces.update(re.findall(PATTERN, text))
    words = [list(piece.encode(errors="replace")) for piece in pieces]  # byte values = ids
    repeats = list(pieces.values())

    count = Counter()         # pair of ids -> occurrences in the corpus
    where = defaultdict(set)  # pair of ids -> the words that hold it (or once did)
    for w, word in enumerate(words):
        for pair in zip(word, word[1:]):
            count[pair] += repeats[w]
            where[pair].add(w)
    # The most frequent pair is on top. When a count changes we push the new one and leave
    # the old entry where it is: it no longer agrees with `count` and is skipped later.
    heap = [(-n, pair) for pair, n in count.items()]
    heapq.heapify(heap)

    tokens = list(SINGLE_BYTES)
    while heap and len(tokens) + 2 < n_vocab:
        negative_n, pair = heapq.heappop(heap)
        if count[pair] != -negative_n:
            continue
        if count[pair] < 2:
            break  # a pair seen once is a fact about one word, not about the language
        new_id = len(tokens)
        tokens.append(tokens[pair[0]] + tokens[pair[1]])
        # Only words that hold the pair change, so only their pairs are counted anew.
        # A scan of the whole corpus for each merge would take hours instead of seconds.
        change = Counter()
        for w in where.pop(pair):
            merged = merge_pair(words[w], pair, new_id)
            for old in zip(words[w], words[w][1:]):
                change[old] -= repeats[w]
            for new in zip(merged, merged[1:]):
                change[new] += repeats[w]
                where[new].add(w)
            words[w] = merged
        for changed, difference in change.items():
            if difference:
                count[changed] += difference
                heapq.heappush(heap, (-count[changed], changed))
    return Tokenizer("bpe", PATTERN, tokens)


def merge_pair(word: list[int], pair: tuple[int, int], new_id: int) -> list[int]:
    """`word` with each occurrence of `pair`, from the left, replaced by `new_id`."""
    merged, i = [], 0
    while i < len(word):
        if tuple(word[i:i + 2]) == pair:
            merged.append(new_id)
            i += 2
        else:
            merged.append(word[i])
            i += 1
    return merged


# ---------------------------------------------------------------------------------------
# 3. Comparisons

@dataclass
class Comparison:
    """One prompt, two replies: the unit of human feedback (HH §2.1)."""
    prompt: str                     # ends in "\n\nAssistant:"
    chosen: str                     # the reply the crowdworker preferred, raw text
    rejected: str                   # the other one; in red teaming, the more harmful one
    kind: str                       # "helpful" or "harmless"
    p_chosen: float | None = None   # probability that the crowdworker prefers `chosen`,
                                    # where it is known (the toy world)


def split_comparison(chosen: str, rejected: str) -> tuple[tuple[str, str, str] | None, str]:
    """Two dialogues -> ((prompt, chosen reply, rejected reply), "") or (None, why not).

    The data holds two full dialogues. The prompt is what they share, cut after the last
    "\\n\\nAssistant:" in it. Cutting at the first marker instead is wrong for every dialogue of
    several turns (71% of harmless-base/test), and cutting each text at its own last marker gives
    two different prompts where one reply holds a further turn (0.2%)."""
    if chosen == rejected:
        return None, "identical pair"
    # A shared part may end inside a marker ("...\n\nAssis"): rfind sees only whole ones.
    shared = os.path.commonprefix([chosen, rejected])
    start = shared.rfind(ASSISTANT)
    if start < 0:
        return None, "no shared prompt"
    end = start + len(ASSISTANT)
    if not chosen[end:].strip() or not rejected[end:].strip():
        return None, "empty reply"
    return (chosen[:end], chosen[end:], rejected[end:]), ""


def read_jsonl(path) -> Iterator[tuple[int, dict]]:
    """Yield (line number from 1, object) for each line of a .jsonl or .jsonl.gz file; blank
    lines are passed over. Raises UserError that names the file, and the line where there is one."""
    path, number = Path(path), 0
    try:
        # Bytes, cut at "\n" and nowhere else: a line's number is then what an editor shows.
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
            for number, line in enumerate(file, start=1):
                if not line.strip():
                    continue
                try:
                    row = json.loads(line.decode("utf-8"))
                except UnicodeDecodeError as error:
                    raise UserError(f"{path}:{number}: not UTF-8 text") from error
                except (ValueError, RecursionError) as error:
                    raise UserError(f"{path}:{number}: not JSON ({error})") from error
                if not isinstance(row, dict):
                    raise UserError(f"{path}:{number}: expected a JSON object {{...}}, "
                                    f"found {line[:40].decode(errors='replace')!r}")
                yield number, row
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{path}: damaged or incomplete gzip file (readable up to line "
                        f"{number}): download it again") from error
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error


def read_comparisons(path, kind: str) -> tuple[list[Comparison], Counter]:
    """Read a file in the format of HH-RLHF: {"chosen": dialogue, "rejected": dialogue} a
    line, and "p_chosen" where it is known.

    -> (comparisons, counter). The counter has "read", "kept" and one entry for each reason
    to drop, so that nothing disappears unseen: read = kept + all the reasons.
    Raises UserError that names file and line for a row of another format."""
    comparisons, counter = [], Counter(read=0, kept=0)
    for number, row in read_jsonl(path):
        for field in ("chosen", "rejected"):
            text = row.get(field)
            if not isinstance(text, str):
                raise UserError(f"{path}:{number}: no text in the field {field!r}")
            text = row[field] = text.encode("utf-8", "replace").decode()  # half an emoji ("\\ud83d") has no UTF-8 form
            if not text.startswith((HUMAN, ASSISTANT)):
                raise UserError(f"{path}:{number}: {field!r} is not a dialogue: it begins with "
                                f"{text[:20]!r} instead of {HUMAN!r}")
        p_chosen = row.get("p_chosen")
        if p_chosen is not None and not (isinstance(p_chosen, (int, float)) and 0 <= p_chosen <= 1):
            raise UserError(f"{path}:{number}: 'p_chosen' is {p_chosen!r}, not a probability")
        counter["read"] += 1
        parts, reason = split_comparison(row["chosen"], row["rejected"])
        counter["kept" if parts else reason] += 1
        if parts:
            comparisons.append(Comparison(*parts, kind, p_chosen))
    return comparisons, counter


def load_comparisons(root, split: str, subsets: Sequence[str] | None = None
                     ) -> tuple[list[Comparison], dict[str, Counter]]:
    """Load "train" or "test" of a folder laid out as the official data are,
    root/<subset>/<split>.jsonl.gz (or .jsonl), or of one single file.

    subsets: names of folders under root; None takes all that have the split, in
    alphabetical order. A subset whose name begins with "harmless" is of that kind.
    A single file is split here, one first question in sixteen to "test".
    -> (comparisons, {subset: counter}). Raises UserError when there is nothing to load."""
    root = Path(root)
    if split not in ("train", "test"):
        raise UserError(f"the split {split!r} is neither 'train' nor 'test'")
    comparisons, counters = [], {}
    if root.is_file():
        kind = "harmless" if "harmless" in "/".join(root.parts[-2:]) else "helpful"
        rows, counter = read_comparisons(root, kind)
        comparisons = [c for c in rows if in_test(c) == (split == "test")]
        counter["kept"] = len(comparisons)
        counter["in the other split"] = len(rows) - len(comparisons)
        counters[root.name] = counter
    else:
        files = {}  # subset -> its file; where both stand, the unpacked one is read
        for ending in (".jsonl.gz", ".jsonl"):
            files |= {file.parent.name: file for file in root.glob(f"*/{split}{ending}")}
        for name in subsets or sorted(files):
            if name not in files:
                raise UserError(f"no {split}.jsonl[.gz] of a subset {name!r} in {root}: "
                                f"it has {', '.join(sorted(files)) or 'none'}")
            kind = "harmless" if name.startswith("harmless") else "helpful"
            rows, counters[name] = read_comparisons(files[name], kind)
            comparisons += rows
    if not counters:
        raise UserError(f"no comparisons at {root}: expected a .jsonl[.gz] file, or a folder "
                        f"like the official data, with helpful-base/{split}.jsonl.gz in it")
    if not comparisons:
        raise UserError(f"{root}: no usable comparison in the split {split!r} "
                        f"({counts_line(sum(counters.values(), Counter()))})")
    return comparisons, counters


def in_test(comparison: Comparison) -> bool:
    """Which side of a single file a row is on: by a hash of the first turn, so that all
    rows that open with the same question are on one side, in any order of the file."""
    first_turn = parse(comparison.prompt)[0][1]
    return hashlib.sha256(first_turn.encode(errors="replace")).digest()[0] % 16 == 0


def counts_line(counter: Counter) -> str:
    """-> "read 1,617, kept 1,609, dropped 8 (empty reply 5, identical pair 3)"."""
    reasons = {k: n for k, n in sorted(counter.items()) if n and k not in ("read", "kept")}
    line = f"read {counter['read']:,}, kept {counter['kept']:,}, dropped {sum(reasons.values()):,}"
    return line + (f" ({', '.join(f'{k} {n:,}' for k, n in reasons.items())})" if reasons else "")


def write_comparisons(path, comparisons: Iterable[Comparison]):
    """The inverse of `read_comparisons`; the kind is in the folder's name, not in the file."""
    lines = []
    for c in comparisons:
        row = {"chosen": c.prompt + c.chosen, "rejected": c.prompt + c.rejected}
        lines.append(json.dumps(row if c.p_chosen is None else row | {"p_chosen": c.p_chosen}))
    data = "".join(line + "\n" for line in lines).encode()
    # mtime=0 keeps the clock out of the file: same comparisons, same bytes.
    write_atomically(path, gzip.compress(data, mtime=0) if str(path).endswith(".gz") else data)


MIN_PROMPT = 16  # tokens of a cut prompt that must remain, or the replies answer nothing


def encode_comparison(tok: Tokenizer, c: Comparison, context: int
                      ) -> tuple[list[int], list[int], list[int]] | None:
    """-> (prompt ids, chosen ids, rejected ids), or None when a reply is too long.

    context: the most tokens the PM can read; one is kept free for end_of_context. A prompt
    that doesn't fit loses its beginning, the same for both replies, since the PM must
    compare two ends of one text. Replies are never cut: the two might differ only in what
    is lost. None is for the caller to count ("reply longer than the context")."""
    prompt, chosen, rejected = (
        tok.encode_dialogue(c.prompt), tok.encode_reply(c.chosen), tok.encode_reply(c.rejected))
    room = context - 1 - max(len(chosen), len(rejected))
    if room < min(len(prompt), MIN_PROMPT):
        return None
    return prompt[max(0, len(prompt) - room):], chosen, rejected


# ---------------------------------------------------------------------------------------
# 4. Batching

def batches_by_length(lengths: Sequence[int], token_budget: int,
                      generator: torch.Generator | None = None) -> list[list[int]]:
    """Cut the rows 0..len(lengths)-1 into batches of at most `token_budget` tokens, padding
    included: rows * longest <= budget. A row longer than the budget is a batch alone.

    Rows of like length share a batch, so little is wasted on padding. With a generator the
    batches come in random order, and rows of equal length change places from call to call;
    without one, from short to long. Each row is in exactly one batch."""
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
    """-> (tokens (B, T), lengths (B,)), both int64, padded with `value` on the right.

    On the right, because causal attention looks left only: no real token ever sees a pad,
    and token t stands at position t. So neither a mask nor position ids are needed. Padding
    on the left would need both. Losses must skip positions >= length, whatever `value` is."""
    lengths = torch.tensor([len(row) for row in rows], dtype=torch.int64)         # (B,)
    tokens = torch.full((len(rows), max(map(len, rows), default=0)), value)       # (B, T)
    for b, row in enumerate(rows):
        tokens[b, :len(row)] = torch.tensor(row, dtype=torch.int64)
    return tokens, lengths
