"""Talk with a trained model: dialogues, and the models that reply to them and score the replies.

chat.py (a terminal) and serve.py (a page in a browser) share this file. It prints nothing and asks
nobody; choices.py keeps people's choices between two replies. Read it in this order:
  1. Texts     what a person or a model wrote: cleaned, cut, shortened, made visible
  2. Models    `Speaker` replies to dialogues; `Scorer` is the preference model

A dialogue here is a text that ends in "\\n\\nAssistant:", an open assistant turn. A reply is the
text after it, with its leading space.
Legend: B rows   T new tokens   P prompt tokens   R most tokens of a reply
"""
import dataclasses
import os
import re
import unicodedata
from dataclasses import dataclass
from pathlib import Path
from typing import Iterator

from run import (  # before torch: Ctrl-C prints no traceback
    UserError, autocast, check_is_file, choose_device, file_hash, load, rng, torch_rng)

import torch

import toy
from cache import KVCache, forward_cached
from data import (ASSISTANT, HUMAN, MARKER, MIN_PROMPT, Comparison, Tokenizer, encode_comparison,
                  parse, read_comparisons, render)
from model import GPT, GPTConfig, sample
from pm import ScalarModel, score_rows
from rollout import Sampler, cache_dtype
from stage import read_config

# ---- 1. Texts ----------------------------------------------------------------

MAX_CHARACTERS = 10_000  # of one message: a tokenizer is slow on a pasted book


def one_turn(text: str) -> str:
    """What a person typed, as the text of one turn, with its leading space. It cannot open another
    turn: "\\n\\nHuman:" becomes "\\nHuman:". Raises UserError if the text is empty or too long."""
    text = text.encode("utf-8", "replace").decode()  # half an emoji becomes "?"
    text = text.replace("\r\n", "\n").strip()
    if not text:
        raise UserError("nothing was typed")
    if len(text) > MAX_CHARACTERS:
        raise UserError(f"a message has at most {MAX_CHARACTERS:,} characters, and this one has "
                        f"{len(text):,}")
    return " " + re.sub(r"\n{2,}(?=(Human|Assistant):)", "\n", text)


def ask(dialogue: str, message: str) -> str:
    """`dialogue`, whose last reply is complete ("" at the beginning), with a person's next message
    and an open assistant turn. Raises UserError as `one_turn` does."""
    return f"{dialogue}{HUMAN}{one_turn(message)}{ASSISTANT}"


def cut_at_human(text: str) -> str:
    """A reply without the turns that a model wrote after it, as the human or as itself."""
    return MARKER.split(text)[0]


def fit(tok: Tokenizer, dialogue: str, room: int) -> tuple[str, int]:
    """Drop the oldest turns until `dialogue` has at most `room` tokens -> (text, turns dropped).
    The text still begins with a human turn. Raises UserError if the last message alone is too
    long."""
    turns, start = parse(dialogue), 0
    while True:
        text = render(turns[start:])
        n_tokens = len(tok.encode_dialogue(text))
        if n_tokens <= room:
            return text, start
        start += 1
        while start < len(turns) and turns[start][0] != "Human":
            start += 1
        if start == len(turns):
            raise UserError(f"this message has {n_tokens:,} tokens, and the model reads at most "
                            f"{room:,}: use a shorter one")


def shown(text: str) -> str:
    """`text` as a terminal can print it safely. Characters that would move the cursor, change
    colors or turn the direction of writing become visible, like "\\x1b"; line breaks stay."""
    characters = []
    for character in text:
        # Control, format and half characters; separators of lines and paragraphs.
        is_safe = unicodedata.category(character) not in ("Cc", "Cf", "Cs", "Zl", "Zp")
        if character == "\n" or is_safe:
            characters.append(character)
        else:
            characters.append(character.encode("unicode_escape").decode())
    return "".join(characters)


# ---- 2. Models ---------------------------------------------------------------

# The best model that a folder has: the result of stage 5, else of stage 2, else of stage 1.
SPEAKERS = ("policy.pt", "initial.pt", "lm.pt")


def best_speaker(folder) -> str:
    """The name of the language model to talk with. Raises UserError if there is none."""
    for name in SPEAKERS:
        if os.path.exists(Path(folder, name)):
            return name
    raise UserError(f"{folder} holds no language model ({', '.join(SPEAKERS)}): train one there, "
                    "or name the output folder of a run")


class Model:
    """A model of a folder's checkpoint, in memory. The folder is only read: it is not locked, and
    its run may go on."""

    def __init__(self, folder, name: str, device="auto"):
        """name: a checkpoint of the folder, or the path of another one with the same tokenizer.
        A checkpoint with a scalar head becomes a ScalarModel. Raises UserError if it cannot be
        used."""
        self.folder, self.device = Path(folder), choose_device(str(device))
        self.tok = Tokenizer.load(self.folder / "tokenizer.json")
        self.path = self.folder / name
        if not os.path.exists(self.path) and os.path.exists(name):
            self.path = Path(name)
        check_is_file(self.path)
        self.stamp = self._stamp()
        saved = load(self.path)
        # The file's hash says later which weights wrote a reply.
        self.label = f"{self.path.resolve().parent.name}/{self.path.name} {file_hash([self.path])}"
        if self.was_replaced():
            raise UserError(f"{self.path} was replaced while it was read; try again")
        if saved.get("tokenizer") != self.tok.fingerprint:
            raise UserError(f"{self.path} was trained with another tokenizer than {folder}")
        try:
            model = GPT(GPTConfig(**saved["config"]))
            if "head.weight" in saved["model"]:
                model = ScalarModel(model)
            model.load_state_dict(saved["model"])
        except (KeyError, TypeError, RuntimeError):
            raise UserError(f"{self.path} does not hold a model of this project") from None
        self.context = saved["config"]["context"]
        self.net = model.to(self.device).eval().requires_grad_(False)

    def was_replaced(self) -> bool:
        """Whether the checkpoint on the disk is another one now. The model in memory stays."""
        return self._stamp() != self.stamp

    def _stamp(self):
        try:
            found = os.stat(self.path)
        except OSError:
            return None  # deleted
        return found.st_ino, found.st_size, found.st_mtime_ns


@dataclass
class Reply:
    text: str        # with its leading space; without turns that the model wrote after it
    finished: bool   # it ended by itself; otherwise it was cut off at max_response tokens
    seed: int        # draws the same reply to the same dialogue again
    dropped: int     # the oldest turns that the model did not read, because they did not fit


class Speaker(Model):
    """A language model that replies to dialogues. Use it from one thread at a time."""

    def __init__(self, folder, name="policy.pt", temperature: float = 1.0, device="auto",
                 max_response: int = 0):
        """max_response: most tokens of a reply (0: as in the folder's RLHF)."""
        super().__init__(folder, name, device)
        if not isinstance(self.net, GPT):
            raise UserError(f"{self.path} is a preference model, which cannot speak")
        if not 0.01 <= temperature <= 100:
            raise UserError(f"the temperature {temperature} is not between 0.01 and 100")
        config = read_config(self.folder)
        self.toy = config.get("run", {}).get("data") == "toy"
        default = config.get("rl", {}).get("max_response", 32 if self.toy else 128)
        self.max_response = min(max_response or default, self.context - 1 - MIN_PROMPT)
        if self.max_response < 1:
            raise UserError(f"a reply has at least 1 token, not {self.max_response} (the context "
                            f"has {self.context})")
        self.temperature = temperature
        self.sampler = Sampler(self.net, self.tok.end_of_turn, temperature)

    def fit(self, dialogue: str) -> tuple[str, int]:
        """`fit` with the room that this model's replies leave. `reply` and `stream` call it. A
        server calls it first, because one message that is too long would stop a whole batch."""
        return fit(self.tok, dialogue, self.context - self.max_response - 1)

    def uniforms(self, seed: int):
        """(R,) the random numbers of one reply. They belong to its seed, so a reply does not depend
        on its batch."""
        return torch.rand(self.max_response, generator=torch_rng(seed, "reply"))

    def reply(self, dialogues: list[str], seeds: list[int]) -> list[Reply]:
        """One reply to each dialogue, all sampled in one batch. Raises UserError as `fit` does."""
        fitted = [self.fit(dialogue) for dialogue in dialogues]
        prompts = [self.tok.encode_dialogue(text) for text, _ in fitted]
        ro = self.sampler(prompts, torch.stack([self.uniforms(seed) for seed in seeds]))
        replies = []
        for ids, (_, dropped), seed in zip(ro.responses(), fitted, seeds):
            replies.append(self._read(ids, seed, dropped))
        return replies

    def stream(self, dialogue: str, seed: int) -> Iterator[Reply]:
        """The same reply as it grows: each text begins with the one before it, and the last is
        complete."""
        text, dropped = self.fit(dialogue)
        ids, sent = [], ""
        for token in self.sample_ids(self.tok.encode_dialogue(text), seed):
            ids.append(token)
            reply = self._read(ids, seed, dropped)
            if reply.finished:
                break
            # Wait with half a character, and with what may be the beginning of a turn's marker.
            certain = re.sub(r"(\n\n?|\n\n[A-Z][a-z]*)\Z", "", reply.text.rstrip("\ufffd"))
            if len(certain) > len(sent):
                sent = certain
                yield dataclasses.replace(reply, text=sent)
        yield reply

    @torch.no_grad()
    def sample_ids(self, prompt: list[int], seed: int) -> Iterator[int]:
        """The tokens of one response, one by one: rollout.plain_rollout with a cache."""
        size = len(prompt) + self.max_response
        cache = KVCache(self.net.cfg, 1, size, self.device, cache_dtype(self.net))
        ids = torch.tensor([prompt], device=self.device)       # (1, P), later (1, 1)
        for uniform in self.uniforms(seed).to(self.device):
            with autocast(self.device):
                hidden = forward_cached(self.net, ids, cache)  # (1, T, D)
            cache.lengths += ids.shape[1]
            token, _ = sample(self.net.logits(hidden[:, -1]), uniform[None], self.temperature)
            ids = token[:, None]                               # (1, 1)
            yield token.item()
            if token.item() == self.tok.end_of_turn:
                break

    def _read(self, ids: list[int], seed: int, dropped: int) -> Reply:
        """The reply whose tokens so far are `ids`."""
        whole = self.tok.decode(ids)
        text = cut_at_human(whole)
        finished = ids[-1] == self.tok.end_of_turn or text != whole
        return Reply(text, finished, seed, dropped)


def two_replies(first: Speaker, second: Speaker, dialogues: list[str], seeds: list[int],
                tries: int = 4) -> list[tuple[Reply, Reply]]:
    """A pair of replies to each dialogue, one of each speaker. A pair that cannot be compared
    (`comparable`), or of which a reply is not finished, is drawn again, up to `tries` times."""
    pairs = [None] * len(dialogues)
    open_pairs = list(range(len(dialogues)))
    for attempt in range(tries):
        texts, first_seeds, second_seeds = [], [], []
        for i in open_pairs:
            texts.append(dialogues[i])
            first_seeds.append(rng(seeds[i], "first", attempt).getrandbits(32))
            second_seeds.append(rng(seeds[i], "second", attempt).getrandbits(32))
        if first is second:  # one batch; `rollout` reads a dialogue once for both
            both = first.reply(texts + texts, first_seeds + second_seeds)
            a, b = both[:len(texts)], both[len(texts):]
        else:
            a, b = first.reply(texts, first_seeds), second.reply(texts, second_seeds)
        again = []
        for i, one, other in zip(open_pairs, a, b):
            pairs[i] = (one, other)
            if not (comparable(one.text, other.text) and one.finished and other.finished):
                again.append(i)
        open_pairs = again
        if not open_pairs:
            break
    return pairs


def comparable(a: str, b: str) -> bool:
    """Whether a person can choose between two replies, and a file can hold the choice."""
    return a.strip() != b.strip() and a.strip() != "" and b.strip() != ""


class Scorer(Model):
    """A preference model."""

    def __init__(self, folder, name="pm.pt", device="auto"):
        super().__init__(folder, name, device)
        if not isinstance(self.net, ScalarModel):
            raise UserError(f"{self.path} is a language model, which gives no scores")

    def score(self, dialogues: list[str], replies: list[str]) -> list[float | None]:
        """The score of each reply to its dialogue, in logits; None for a reply that is too long for
        the context. A dialogue that is too long loses its beginning, as in training."""
        rows, scored = [], []
        for i, (dialogue, reply) in enumerate(zip(dialogues, replies)):
            pair = Comparison(dialogue, reply, reply, "helpful")
            encoded = encode_comparison(self.tok, pair, self.context)
            if encoded is not None:
                prompt, ids, _ = encoded
                rows.append(prompt + ids + [self.tok.end_of_context])
                scored.append(i)
        scores = [None] * len(dialogues)
        for i, score in zip(scored, score_rows(self.net, rows, device=self.device).tolist()):
            scores[i] = score
        return scores


def known_prompts(folder, n: int, generator) -> list[str]:
    """n different prompts from the comparisons in a run's folder, or all if there are fewer. Real
    comparisons are not kept there."""
    texts = set()
    for path in Path(folder, "comparisons").glob("*/train.jsonl"):
        texts |= {comparison.prompt for comparison in read_comparisons(path, "helpful")[0]}
    return generator.sample(sorted(texts), min(n, len(texts)))


def truth(dialogue: str, reply: str, kind: str) -> float | None:
    """The toy world's utility of a reply in nats; None if it does not know the question."""
    return toy.truth(dialogue, reply, kind) if toy.is_known(dialogue) else None
