"""Demonstrations: prompts, and the replies that people wrote to them (InstructGPT, "IG", §3.2).

Read it in this order:
  1. Files      {"prompt": text, "reply": text} per line, read and written
  2. Examples   demonstrations as ids
"""
from collections import Counter
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from data import (ASSISTANT, HUMAN, MARKER, Tokenizer, counts_line, cut_prompt, in_test,
                  read_jsonl)
from run import UserError, write_jsonl

# ---- 1. Files ----------------------------------------------------------------


@dataclass
class Demonstration:
    prompt: str              # ends in "\n\nAssistant:"
    reply: str               # with its leading space
    kind: str = "helpful"    # "helpful" or "harmless" (red-teaming)
    source: str = ""         # of the prompt, where it is known
    labeler: str = ""        # who wrote the reply, where it is known


def read_demonstrations(path, split: str) -> tuple[list[Demonstration], Counter]:
    """Read a file of {"prompt": text, "reply": text} -> (the demonstrations of a split, "train" or
    "test", and how many were dropped and why). A hash of the prompt decides the split.
    Raises UserError with the line of the first row in another format."""
    found, counts = [], Counter(read=0, kept=0)
    for number, row in read_jsonl(path):
        for field in ("prompt", "reply"):
            if not isinstance(row.get(field), str):
                raise UserError(f"{path}:{number}: no text in the field {field!r}")
        prompt, reply = as_prompt(row["prompt"], f"{path}:{number}"), as_reply(row["reply"])
        counts["read"] += 1
        if not reply.strip():
            counts["empty reply"] += 1
        elif MARKER.search(reply):
            counts["turns in the reply"] += 1  # the model would learn to speak for the human
        else:
            demonstration = Demonstration(prompt, reply, kind_of(row))
            is_wanted = in_test(demonstration) == (split == "test")
            counts["kept" if is_wanted else "in the other split"] += 1
            if is_wanted:
                found.append(demonstration)
    if not found:
        part = "training" if split == "train" else "held-out"
        raise UserError(f"{path}: no usable {part} demonstration ({counts_line(counts)}); one "
                        "prompt in sixteen is held out, so add more")
    return found, counts


def as_prompt(text: str, place: str) -> str:
    """A prompt in the format of the models. A text without turns is what the human says. Raises
    UserError, which begins with `place`, for a dialogue that does not end with the assistant."""
    text = text.encode("utf-8", "replace").decode()  # half an emoji becomes "?"
    if not MARKER.search(text):
        if not text.strip():
            raise UserError(f"{place}: the prompt is empty")
        return f"{HUMAN} {text.strip()}{ASSISTANT}"
    text = text.rstrip()
    if not (text.startswith((HUMAN, ASSISTANT)) and text.endswith(ASSISTANT)):
        raise UserError(f"{place}: the prompt has turns, so it must begin with {HUMAN!r} and end "
                        f"with {ASSISTANT!r}")
    return text


def as_reply(text: str) -> str:
    """A reply as the models write it, with one leading space."""
    return " " + text.encode("utf-8", "replace").decode().strip()


def kind_of(row: dict) -> str:
    return "harmless" if row.get("kind") == "harmless" else "helpful"


def write(path, found: list[Demonstration]):
    """Write a file that `read_written` reads."""
    write_jsonl(path, [asdict(demonstration) for demonstration in found])


def read_written(path: Path) -> list[Demonstration]:
    """Read all that `write` wrote, without a split."""
    found, names = [], {field.name for field in fields(Demonstration)}
    for number, row in read_jsonl(path):
        if set(row) != names or not all(isinstance(text, str) for text in row.values()):
            raise UserError(f"{path}:{number}: not written by train_sft.py; delete sft.pt to train "
                            "again")
        found.append(Demonstration(**row))
    return found


# ---- 2. Examples -------------------------------------------------------------


@dataclass
class Example:
    ids: list[int]  # prompt and reply
    start: int      # index of the reply's first token


def encode(tok: Tokenizer, found: list[Demonstration], context: int) -> list[Example]:
    """Encode the demonstrations whose reply fits the context; others are dropped and counted. A
    prompt that does not fit loses its beginning."""
    examples = []
    for demonstration in found:
        reply = tok.encode_reply(demonstration.reply)
        prompt = cut_prompt(tok.encode_dialogue(demonstration.prompt), context - len(reply))
        if prompt is not None:
            examples.append(Example(prompt + reply, len(prompt)))
    n_dropped = len(found) - len(examples)
    if n_dropped:
        print(f"    dropped {n_dropped} of {len(found)} demonstrations: a reply too long for the "
              f"context of {context}")
    if not examples:
        raise UserError(f"no demonstration fits a context of {context} tokens; try a larger "
                        "--context")
    return examples
