"""How people who choose between replies agree: with each other, themselves, the truth and the PM.

serve.py shows the table to the lecturer. Read this file in this order:
  1. The table   counts and rates of each person, and of everybody
  2. The judge   adds the preference model's opinion

Legend:
  item   a prompt with the same two replies, on whichever sides
  rate   a pair [agreements, cases]
"""
import threading
from collections import Counter, defaultdict
from dataclasses import dataclass

from run import UserError  # before torch: Ctrl-C prints no traceback

from choices import UNSURE
from conversation import Scorer, shown, truth
from data import split_comparison

# ---- 1. The table ------------------------------------------------------------

HEADS = ("name", "choices", "helpful", "red-team", "barely sure", "with others", "with themselves",
         "with the truth", "with the PM")
NOTES = ("With others and with themselves: on the same prompt with the same two replies, on "
         "whichever sides. With the truth: where the toy world knows the better reply. Barely sure "
         "choices count here, but the preference model does not learn from them (HH §2.2).")


@dataclass
class Rate:
    hits: int = 0
    cases: int = 0

    def count(self, hits: int, cases: int = 1):
        self.hits += hits
        self.cases += cases


class Row:
    """The line of one person in the lecturer's table, or of everybody."""

    def __init__(self, who: str):
        self.who = who
        self.choices, self.helpful, self.harmless, self.unsure = 0, 0, 0, 0
        self.others, self.oneself, self.truth, self.pm = Rate(), Rate(), Rate(), Rate()

    def rates(self) -> list[Rate]:
        return [self.others, self.oneself, self.truth, self.pm]

    def cells(self) -> list:
        """Numbers, and pairs [agreements, cases]."""
        found = [shown(self.who), self.choices, self.helpful, self.harmless, self.unsure]
        return found + [[rate.hits, rate.cases] for rate in self.rates()]


def table(records: list[dict], is_toy: bool, margins: dict[str, float | None]) -> dict:
    """The lecturer's table. margins: {a choice's id: the PM's score of its chosen reply minus that
    of its rejected one}. Choices without a margin, or with None, do not count in that column."""
    everybody, people, n_odd = Row("everybody"), {}, 0
    first_picks = defaultdict(dict)  # item -> {person: what they chose when they first saw it}
    for record in records:
        parts, _ = split_comparison(record["chosen"], record["rejected"])
        if parts is None:  # somebody has edited the file by hand
            n_odd += 1
            continue
        prompt, chosen, rejected = parts
        person = record["conversation"].rpartition("-")[0] or record["who"]  # who: of chat.py
        row = people.setdefault(person, Row(record["who"]))
        item = (record["kind"], prompt, frozenset((chosen, rejected)))
        earlier = first_picks[item].get(person)
        if earlier is None:
            first_picks[item][person] = chosen
        gap = true_gap(prompt, chosen, rejected, record["kind"]) if is_toy else 0.0
        for line in (row, everybody):
            line.choices += 1
            line.helpful += record["kind"] == "helpful"
            line.harmless += record["kind"] == "harmless"
            line.unsure += record["strength"] == UNSURE
            if earlier is not None:
                line.oneself.count(earlier == chosen)
            if gap:
                line.truth.count(gap > 0)
            if margins.get(record["id"]) is not None:
                line.pm.count(margins[record["id"]] > 0)
    for picks in first_picks.values():
        votes = Counter(picks.values())
        for person, pick in picks.items():
            people[person].others.count(votes[pick] - 1, len(picks) - 1)
        for n in votes.values():
            everybody.others.hits += n * (n - 1) // 2  # here each two people count once
        everybody.others.cases += len(picks) * (len(picks) - 1) // 2
    rows = sorted((row.cells() for row in people.values()), key=lambda cells: cells[0].lower())
    notes = NOTES
    if n_odd:
        notes += f" Choices that were edited by hand and cannot be read: {n_odd:,}."
    return {"heads": HEADS, "rows": rows + [everybody.cells()], "notes": notes}


def true_gap(prompt: str, chosen: str, rejected: str, kind: str) -> float:
    """How much better `chosen` is by the toy's ground truth, in nats; 0 if that is not known."""
    better, worse = truth(prompt, chosen, kind), truth(prompt, rejected, kind)
    return 0.0 if better is None or worse is None else better - worse


# ---- 2. The judge ------------------------------------------------------------


class Judge:
    """The lecturer's table. The preference model is read when it appears, and again when it is
    replaced: by one that learned from this class, for example."""

    def __init__(self, folder: str, name: str, device: str, is_toy: bool):
        self.folder, self.name, self.device, self.is_toy = folder, name, device, is_toy
        self.lock = threading.Lock()
        self.scorer, self.margins = None, {}  # a choice's id -> chosen minus rejected, in logits

    def overview(self, records: list[dict]) -> dict:
        """The table of these choices, with a summary and notes for the lecturer."""
        with self.lock:  # one at a time: the second request finds the scores of the first
            note = self.score(records)
            found = table(records, self.is_toy, self.margins)
        *people, everybody = found["rows"]
        found["notes"] += note
        choices = "choice" if len(records) == 1 else "choices"
        persons = "person" if len(people) == 1 else "people"
        found["summary"] = f"{len(records):,} {choices} by {len(people)} {persons}."
        for words, (hits, cases) in (("with each other", everybody[5]),
                                     ("with the truth", everybody[7])):
            if cases:
                found["summary"] += f" Agreement {words}: {hits / cases:.0%} of {cases:,}."
        return found

    def score(self, records: list[dict]) -> str:
        """Add the margins that are missing, and say which PM they are from."""
        try:
            if self.scorer is None or self.scorer.was_replaced():
                self.scorer = Scorer(self.folder, self.name, self.device)
                self.margins = {}
        except UserError as error:
            self.scorer, self.margins = None, {}
            return f" No PM: {error}."
        ids, prompts, chosen, rejected = [], [], [], []
        for record in records:
            parts, _ = split_comparison(record["chosen"], record["rejected"])
            if parts is not None and record["id"] not in self.margins:
                ids.append(record["id"])
                prompts.append(parts[0])
                chosen.append(parts[1])
                rejected.append(parts[2])
        if ids:
            better, worse = self.scorer.score(prompts, chosen), self.scorer.score(prompts, rejected)
            for i, a, b in zip(ids, better, worse):
                self.margins[i] = None if a is None or b is None else a - b
        return f" PM: {self.scorer.label}."
