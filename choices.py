"""People's choices between two replies: a line each, on the disk before the next turn appears.

chat.py and serve.py write such files, and train_pm.py --comparisons trains on them. They are in
HH-RLHF's format with more fields. Read it in this order:
  1. A choice    `choice_record`: who chose what, how surely, between which models' replies
  2. ChoiceFile  a file of choices that survives a crash
  3. Training    choices as comparisons, some of them held out

Papers: HH = Bai et al. 2022 (arXiv 2204.05862); a § or App. without a name is in HH.
"""
import contextlib
import datetime
import hashlib
import json
import os
import re
from collections import Counter
from pathlib import Path
from typing import Sequence

from data import HUMAN, Comparison, counts_line, parse, parse_json_object, read_comparisons
from run import UserError, check_is_file, lock

# ---- 1. A choice -------------------------------------------------------------

KINDS = ("helpful", "harmless")
UNSURE, SURE = 1, 4  # how sure a person was, from "barely" to "very"
FIELDS = {"chosen": str, "rejected": str, "kind": str, "who": str, "when": str, "strength": int,
          "models": list, "seeds": list, "conversation": str, "turn": int, "id": str}


def choice_record(dialogue: str, chosen: str, rejected: str, kind: str, who: str, strength: int,
                  models: list[str], seeds: list[int | None], conversation: str,
                  turn: int) -> dict:
    """One choice, as a line of a file in HH-RLHF's format with more fields.

    dialogue: what both replies answer. chosen, rejected: the replies. In red-teaming (kind
    "harmless") people pick the more harmful reply, and that one is `rejected` (§2.2). models,
    seeds: of the chosen reply, then of the rejected one. A person who edits a reply prefers the
    edit to the original (App. D.2): the edit's model is "person", and its seed None.
    strength: from UNSURE to SURE. turn: from 1. The id makes a choice that is sent twice count
    once."""
    when = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="milliseconds")
    return {"chosen": dialogue + chosen, "rejected": dialogue + rejected, "kind": kind, "who": who,
            "when": when, "strength": strength, "models": models, "seeds": seeds,
            "conversation": conversation, "turn": turn, "id": f"{conversation}-{turn}"}


def goes_on(record: dict) -> str:
    """The dialogue that a conversation goes on with after a choice: the picked reply's (§2.2)."""
    return record["chosen" if record["kind"] == "helpful" else "rejected"]


def check_record(record: dict, place: str):
    """Raise UserError that begins with `place` if `record` is not like those of `choice_record`."""
    for field, kind in FIELDS.items():
        if not isinstance(record.get(field), kind):
            raise UserError(f"{place}: not a choice: {field!r} is {record.get(field)!r:.40}")
    if record["kind"] not in KINDS or not UNSURE <= record["strength"] <= SURE:
        raise UserError(f"{place}: not a choice: kind {record['kind']!r:.40}, strength "
                        f"{record['strength']}")
    for field in ("chosen", "rejected"):
        if not record[field].startswith(HUMAN):
            raise UserError(f"{place}: not a choice: {field!r} does not begin with {HUMAN!r}")


# ---- 2. ChoiceFile -----------------------------------------------------------


class ChoiceFile:
    """People's choices on the disk, open for one program at a time.

    Choices of the weakest strength are kept apart, in ours.unsure.jsonl beside ours.jsonl: HH did
    not train on them (§2.2). `records` holds the choices of both files by time, and `notes` the
    sentences to tell the user. Raises UserError for a file that is damaged or already open."""

    def __init__(self, path):
        path = Path(path)
        self.path = path
        self.sure = _LineFile(path)
        try:
            self.unsure = _LineFile(path.with_name(f"{path.stem}.unsure{path.suffix}"))
        except UserError:
            self.sure.close()
            raise
        self.notes = self.sure.notes + self.unsure.notes
        records = self.sure.records + self.unsure.records
        self.records = sorted(records, key=lambda record: (record["when"], record["turn"]))
        self.ids = {record["id"] for record in self.records}

    def append(self, record: dict) -> bool:
        """Store a choice. When this returns, the choice survives a crash. Returns False if one with
        this id is already there. Raises UserError if the disk takes no more; the file then ends
        with its last whole line."""
        if record["id"] in self.ids:
            return False
        check_record(record, str(self.path))
        file = self.unsure if record["strength"] == UNSURE else self.sure
        file.append(record)
        self.ids.add(record["id"])
        self.records.append(record)
        return True

    def close(self):
        self.sure.close()
        self.unsure.close()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.close()


def is_half_written(line: bytes) -> bool:
    """Whether a line without its end is the beginning of one that `_LineFile.append` writes."""
    start = b'{"chosen": "'
    try:
        json.loads(line)
        return False
    except ValueError:
        return line.startswith(start) or start.startswith(line)


class _LineFile:
    """One file of a ChoiceFile: a JSON object a line, appended line by line."""

    def __init__(self, path: Path):
        self.path, self.notes, self.records = path, [], []
        if path.suffix == ".gz":
            raise UserError(f"{path}: choices are written as plain text; leave out .gz")
        if os.path.exists(path):
            check_is_file(path)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self.file = open(path, "a+b", buffering=0)
            if not lock(self.file):
                raise UserError(f"another program is adding choices to {path}: end it, or use "
                                "another file")
            self._read()
        except OSError as error:
            raise UserError(f"cannot open {path}: {error.strerror}") from None
        except UserError:
            self.file.close()
            raise

    def _read(self):
        """Read all records, and set a half-written last line aside."""
        self.file.seek(0)
        lines = self.file.read().split(b"\n")
        last = lines.pop()  # b"" after the last line break
        for number, line in enumerate(lines, start=1):
            if line.strip():
                self._add(line, number)
        if last:
            self._mend(last, number=len(lines) + 1)
        self.size = os.fstat(self.file.fileno()).st_size

    def _add(self, line: bytes, number: int):
        record = parse_json_object(line, f"{self.path}:{number}")
        check_record(record, f"{self.path}:{number}")
        self.records.append(record)

    def _mend(self, last: bytes, number: int):
        """End the last line, if only its line break is missing; or move it to another file, if it
        is the beginning of a choice. A program that is killed while it writes leaves such a line,
        whose choice was not confirmed to anyone. Raises UserError for any other line."""
        try:
            self._add(last, number)
            self.file.write(b"\n")
        except UserError:
            if not is_half_written(last):
                raise
            aside = self.path.with_name(self.path.name + ".half")
            with open(aside, "ab") as file:
                file.write(last + b"\n")
            self.file.truncate(os.fstat(self.file.fileno()).st_size - len(last))
            self.notes.append(f"line {number} of {self.path} is half-written and was moved to "
                              f"{aside.name}; all choices before it are kept")

    def append(self, record: dict):
        line = json.dumps(record).encode() + b"\n"
        try:
            now, here = os.stat(self.path), os.fstat(self.file.fileno())
        except OSError:
            now, here = None, None
        if now is None or (now.st_ino, now.st_dev, now.st_size) != (here.st_ino, here.st_dev,
                                                                   self.size):
            raise UserError(f"{self.path} was changed or deleted by another program; this choice "
                            "is not stored: start again")
        try:
            while line:
                line = line[self.file.write(line):]  # a full disk may take a part of it
            os.fsync(self.file.fileno())
        except OSError as error:
            with contextlib.suppress(OSError):  # the next start mends what is left of the line
                self.file.truncate(self.size)
            raise UserError(f"cannot write {self.path}: {error.strerror}; this choice is not "
                            "stored, all earlier ones are") from None
        self.size = os.fstat(self.file.fileno()).st_size

    def close(self):
        self.file.close()


# ---- 3. Training -------------------------------------------------------------


def people_comparisons(paths: Sequence[str]) -> tuple[list[Comparison], list[Comparison]]:
    """People's choices as comparisons -> (train, held out). Prints how many there are."""
    train, held_out, counter = read_choices(paths)
    if paths:
        print(f"    people's choices: {counts_line(counter)}; {len(held_out):,} are held out")
    return train, held_out


def check_people(paths: Sequence[str], alone: bool):
    """Raise UserError if there are files and no usable choice in them; or, for choices that are
    used `alone`, if none is held out or all are."""
    train, held_out, counter = read_choices(paths)
    files = ", ".join(str(path) for path in paths)
    if paths and not train + held_out:
        raise UserError(f"no usable choice in {files} ({counts_line(counter)})")
    if paths and alone and not (train and held_out):
        raise UserError(f"{files}: too few conversations: one opening question in eight is held "
                        f"out to measure the PM, and of {len(train + held_out):,} choices here "
                        f"{len(held_out):,} are; collect more, or add the simulated ones (without "
                        "--pm.helpful 0)")


def read_choices(paths: Sequence[str]) -> tuple[list[Comparison], list[Comparison], Counter]:
    """(train, held out, a counter like that of read_comparisons). A choice that is there twice
    counts once. Raises UserError as read_comparisons does."""
    train, held_out, seen, total = [], [], set(), Counter(read=0, kept=0)
    for path in paths:
        kind = "harmless" if "harmless" in Path(path).name else "helpful"  # where no row says it
        found, counter = read_comparisons(path, kind)
        total.update(counter)
        for c in found:
            if identity(c) in seen:
                total.update({"kept": -1, "there twice": 1})
            elif is_held_out(c.prompt):
                held_out.append(c)
            else:
                train.append(c)
            seen.add(identity(c))
    return train, held_out, total


def identity(c: Comparison) -> tuple:
    """What two lines share that hold the same choice."""
    return c.conversation, c.prompt, c.chosen, c.rejected


# A greeting does not say what a conversation is about, and many open with one.
GREETINGS = ("hello", "hello there", "hey", "hi", "hi there", "good morning", "good afternoon",
             "good evening")


def is_held_out(prompt: str) -> bool:
    """Whether people's choices after this prompt are kept for measuring. The opening question
    decides: the first human turn that is not a greeting, whatever its case and punctuation. One
    question in eight is held out. So all turns of a conversation are on the same side, and so are
    all conversations that open alike: many people of a class get the same prompt. A greeting alone
    is never held out."""
    opening = ""
    for role, text in parse(prompt):
        words = " ".join(re.findall(r"\w+", text.lower()))
        if role == "Human" and words not in GREETINGS:
            opening = words
            break
    return hashlib.sha256(opening.encode(errors="replace")).digest()[0] % 8 == 0
