"""A class of crowdworkers: who is in which conversation, and the two replies they choose from.

There is no HTTP here; serve.py has it. Read this file in this order:
  1. Replies     one thread samples the replies for everybody who waits, in one batch
  2. Classroom   joining, a person's line, a person's choice

A Classroom knows no conversation but those in the choices file. A request says all that it is
about: the person, the conversation, the turn, the human's line. The replies follow from the
dialogue and the seed. So after the server was killed and started again, the page repeats its
request, and the new server finds the same two replies.

Legend:
  person        a random name that the server gives; the name that somebody typed is `who`
  conversation  "<person>-<number>"; a person has one at a time, and the numbers go up by one
  turn          from 1; each turn ends with a choice
"""
import hashlib
import hmac
import re
import secrets
import threading
import unicodedata
import zlib
from collections import Counter, OrderedDict, defaultdict
from concurrent.futures import Future, TimeoutError as FutureTimeout
from dataclasses import dataclass
from queue import Empty, Full, Queue

from run import UserError, rng  # before torch: Ctrl-C prints no traceback

import toy
import toy_people
from choices import KINDS, SURE, UNSURE, ChoiceFile, choice_record, goes_on, is_held_out
from conversation import Reply, Speaker, ask, comparable, shown, two_replies
from data import ASSISTANT, split_turns
from toy_corpus import draw_prompt

CONVERSATION = re.compile(r"([0-9a-f]{12})-([0-9]{1,9})")
MAX_NAME, MAX_TEXT = 40, 500  # characters
MAX_TURNS = 12                # of a conversation
MAX_SUGGESTIONS = 50          # in one turn
MOVED_ON = "This conversation has moved on, probably in another tab: this was not stored."


class Refusal(Exception):
    """A request that is answered with a status and one sentence; `more` goes along with it."""

    def __init__(self, status: int, sentence: str, **more):
        super().__init__(sentence)
        self.status, self.more = status, more


# ---- 1. Replies --------------------------------------------------------------


@dataclass(frozen=True)
class Pair:
    """Two replies to a dialogue, and the labels of the models that gave them."""
    replies: tuple[Reply, Reply]
    models: tuple[str, str]

    @property
    def digest(self) -> str:
        """Names the pair, so that a choice is stored only for the replies that were seen."""
        return digest([reply.text for reply in self.replies])


def digest(texts: list[str]) -> str:
    return hashlib.sha256(repr(texts).encode()).hexdigest()[:16]


class Replies(threading.Thread):
    """Samples pairs of replies. Requests that arrive while a batch is sampled wait, and all of them
    make up the next batch."""
    MAX_BATCH = 64      # dialogues
    MAX_WAITING = 500   # requests; more are refused
    MAX_KEPT = 2000     # pairs that are remembered, to sample each only once

    def __init__(self, first: Speaker, second: Speaker, seed: int, patience: float = 60.0):
        """first, second: the models that give one reply each; they may be the same object.
        patience: seconds that a request waits."""
        super().__init__(daemon=True)
        self.first, self.second, self.seed, self.patience = first, second, seed, patience
        self.waiting = Queue(self.MAX_WAITING)
        self.kept = OrderedDict()  # dialogue -> Pair

    def pair(self, dialogue: str) -> Pair:
        """The two replies to a dialogue, the same ones each time. Raises Refusal."""
        pair = self.kept.get(dialogue) or self.wait_for(dialogue)
        a, b = pair.replies
        if not (a.finished and b.finished and comparable(a.text, b.text)):
            raise Refusal(422, "The model gave the same reply twice, or one that was cut off, so "
                               "there is nothing to compare: send a different message.")
        return pair

    def wait_for(self, dialogue: str) -> Pair:
        wanted = Future()
        try:
            self.first.fit(dialogue)  # here, because it would stop a whole batch
            self.second.fit(dialogue)
            self.waiting.put_nowait((dialogue, wanted))
            return wanted.result(self.patience)
        except UserError as error:
            raise Refusal(422, str(error)) from None
        except (Full, FutureTimeout):
            raise Refusal(503, "too many people are waiting for replies") from None

    def run(self):
        while True:
            batch = [self.waiting.get()]
            while len(batch) < self.MAX_BATCH:
                try:
                    batch.append(self.waiting.get_nowait())
                except Empty:
                    break
            try:
                self.sample([dialogue for dialogue, _ in batch])
                for dialogue, wanted in batch:
                    wanted.set_result(self.kept[dialogue])
            except Exception as error:  # nobody may wait in vain
                for _, wanted in batch:
                    wanted.set_exception(error)
            while len(self.kept) > self.MAX_KEPT:
                self.kept.popitem(last=False)

    def sample(self, dialogues: list[str]):
        """Put a Pair for each dialogue into `kept`. Its seed is made from the dialogue, so whoever
        says the same gets the same replies, and so does a person who says it again."""
        new = [text for text in dict.fromkeys(dialogues) if text not in self.kept]
        if not new:
            return
        seeds = [zlib.crc32(repr((self.seed, text)).encode()) for text in new]
        models = (self.first.label, self.second.label)
        for text, replies in zip(new, two_replies(self.first, self.second, new, seeds)):
            self.kept[text] = Pair(replies, models)


# ---- 2. Classroom ------------------------------------------------------------


class Classroom:
    """What people may do. Every method may be called from many threads at once."""

    def __init__(self, choices: ChoiceFile, replies: Replies, key: bytes, code: str = "",
                 goal: int = 20, is_toy: bool = True, seed: int = 0):
        """key: what the people's tokens are signed with. code: what one must know to join. goal:
        choices of each person at which the progress bar is full."""
        self.choices, self.replies, self.key, self.code = choices, replies, key, code
        self.goal, self.is_toy, self.seed = goal, is_toy, seed
        self.lock = threading.Lock()
        self.talks = defaultdict(dict)  # conversation -> {turn: record}
        self.numbers = {}               # person -> the number of their last conversation
        self.done = Counter()           # person -> choices
        self.names = set()              # every `who`, so that no two people have the same
        for record in choices.records:
            self.take(record)

    def take(self, record: dict):
        """Remember a choice that is in the file."""
        self.names.add(record["who"])
        self.talks[record["conversation"]][record["turn"]] = record
        ours = CONVERSATION.fullmatch(record["conversation"])
        if ours:  # chat.py may have written to this file as well
            person, number = ours[1], int(ours[2])
            self.done[person] += 1
            self.numbers[person] = max(self.numbers.get(person, 0), number)

    # -- joining

    def sign(self, words: str) -> str:
        return hmac.new(self.key, as_bytes(words), hashlib.sha256).hexdigest()[:32]

    def join(self, name, code) -> dict:
        name = " ".join(checked_line(name, "name", MAX_NAME).split())
        if not name.isprintable():
            raise Refusal(400, "the name has characters that cannot be shown")
        given = code.strip().upper() if isinstance(code, str) else ""
        if self.code and not hmac.compare_digest(as_bytes(given), as_bytes(self.code)):
            raise Refusal(403, "The join code is wrong: ask the lecturer for it.")
        with self.lock:
            who, number = name, 1
            while who in self.names:
                number += 1
                who = f"{name} {number}"
            self.names.add(who)
        person = secrets.token_hex(6)
        return {"name": who, "token": f"{person}:{self.sign(f'{person}:{who}')}:{who}"}

    def person(self, token) -> tuple[str, str]:
        """A token -> (person, who). The signature proves that this class gave it out, also before
        the server was restarted."""
        person, _, rest = str(token).partition(":")
        signature, _, who = rest.partition(":")
        valid = self.sign(f"{person}:{who}")
        if not hmac.compare_digest(as_bytes(signature), as_bytes(valid)):
            raise Refusal(401, "Please join: this class does not know you yet.")
        with self.lock:
            self.names.add(who)  # of a person who joined before a restart and has not chosen yet
        return person, who

    # -- talking

    def state(self, token) -> dict:
        """Where a person is: in the conversation of their last choice, or in their first one."""
        person, who = self.person(token)
        with self.lock:
            number = self.numbers.get(person, 0)
            talk = self.talks.get(f"{person}-{number}", {})
            kind, dialogue = "helpful", ""
            if talk:
                last = talk[max(talk)]
                kind, dialogue = last["kind"], goes_on(last)
            return {"name": who, "number": number, "turn": next_turn(talk), "kind": kind,
                    "lines": lines(dialogue), "done": self.done[person], "goal": self.goal,
                    "suggests": self.is_toy}

    def prompt(self, person: str, request: dict, again: bool = False) -> tuple[str, int, str, str]:
        """What a request is about: (conversation, turn, kind, the dialogue up to the replies).
        again: it may be about a turn that has its choice."""
        number, turn, kind = (request.get(field) for field in ("number", "turn", "kind"))
        if type(number) is not int or type(turn) is not int or kind not in KINDS:
            raise Refusal(400, "the request does not say which turn it is about")
        conversation, dialogue = f"{person}-{number}", ""
        with self.lock:
            last = self.numbers.get(person, -1)
            talk = self.talks.get(conversation, {})
            is_next = number in (last, last + 1) and number >= 0 and turn == next_turn(talk)
            if not is_next and not (again and turn in talk):
                raise Refusal(409, MOVED_ON)
            if turn > 1:
                before = talk[turn - 1]
                if before["kind"] != kind:
                    raise Refusal(400, "a conversation cannot change its kind")
                dialogue = goes_on(before)
        if turn > MAX_TURNS:
            raise Refusal(422, "This conversation has reached its limit: start the next one.")
        if "suggest" in request:
            dialogue = self.suggestion(person, number, turn, kind, dialogue, request["suggest"])
        else:
            dialogue = ask(dialogue, checked_line(request.get("text"), "line", MAX_TEXT))
        return conversation, turn, kind, dialogue

    def suggestion(self, person: str, number: int, turn: int, kind: str, dialogue: str,
                   attempt) -> str:
        """A prompt of the toy world; after the first turn, what its people would say to the last
        reply of `dialogue`. Of four conversations, the first opens with a prompt that everybody
        gets, and the fourth opens with it again, so that people can be compared with each other and
        with themselves. All others are the person's own. A shared prompt is one that the PM learns
        from: held out, it would be most of what the PM is measured on."""
        if not self.is_toy:
            raise Refusal(400, "only the toy world has suggestions")
        if type(attempt) is not int or not 0 <= attempt < MAX_SUGGESTIONS:
            raise Refusal(422, "There are no more suggestions: write a line of your own.")
        block, place = divmod(number, 4)
        if turn == 1 and attempt == 0 and place in (0, 3):
            generator = rng(self.seed, "shared", kind, block)
            while True:
                prompt = draw_prompt(generator, kind, held_out=False)
                if not is_held_out(prompt):
                    return prompt
        generator = rng(self.seed, "own", person, number, turn, attempt)
        if turn == 1:
            return draw_prompt(generator, kind, held_out=False)
        cut = dialogue.rindex(ASSISTANT) + len(ASSISTANT)
        prompt, reply = dialogue[:cut], dialogue[cut:]
        if toy.is_known(prompt):
            line = toy_people.next_turn(generator, prompt, reply, kind, held_out=False)
        else:
            line, _ = toy_people.next_question(generator, kind, before=None, from_held_out=False)
        return ask(dialogue, line)

    def say(self, token, request: dict) -> dict:
        """A person's line -> two replies."""
        person, _ = self.person(token)
        conversation, turn, _, dialogue = self.prompt(person, request)
        return self.offer(conversation, turn, dialogue)

    def offer(self, conversation: str, turn: int, dialogue: str) -> dict:
        """What the page shows of a pair."""
        pair = self.replies.pair(dialogue)
        replies = [shown(reply.text.strip()) for reply in pair.replies]
        if self.is_swapped(conversation, turn):
            replies.reverse()
        return {"lines": lines(dialogue), "replies": replies, "pair": pair.digest,
                "dropped": max(reply.dropped for reply in pair.replies)}

    def is_swapped(self, conversation: str, turn: int) -> bool:
        """The sides are drawn by lot, and the lot is the same when the page asks again."""
        return rng(self.seed, "sides", conversation, turn).random() < 0.5

    def choose(self, token, request: dict) -> dict:
        """Store a choice and return the new state. When this returns, this very choice is on the
        disk. One that is sent again, because its answer was lost, counts once."""
        person, who = self.person(token)
        side, strength = request.get("side"), request.get("strength")
        if type(side) is not int or side not in (0, 1):
            raise Refusal(400, "the side is neither 0 nor 1")
        if type(strength) is not int or not UNSURE <= strength <= SURE:
            raise Refusal(400, f"the strength is not a number from {UNSURE} to {SURE}")
        conversation, turn, kind, dialogue = self.prompt(person, request, again=True)
        if self.is_stored(conversation, turn, dialogue, request):
            return self.state(token)
        pair = self.replies.pair(dialogue)
        if request.get("pair") != pair.digest:
            raise Refusal(409, "The model has changed, and its replies with it: choose again.",
                          **self.offer(conversation, turn, dialogue))
        picked = 1 - side if self.is_swapped(conversation, turn) else side
        # In red-teaming people pick the more harmful reply, which is stored as `rejected` (§2.2).
        i, j = (picked, 1 - picked) if kind == "helpful" else (1 - picked, picked)
        record = choice_record(
            dialogue, pair.replies[i].text, pair.replies[j].text, kind, who, strength,
            models=[pair.models[i], pair.models[j]],
            seeds=[pair.replies[i].seed, pair.replies[j].seed], conversation=conversation,
            turn=turn)
        with self.lock:
            is_new = self.choices.append(record)
            if is_new:
                self.take(record)
        if not is_new:  # the turn got its choice while this one was made
            self.is_stored(conversation, turn, dialogue, request)
        return self.state(token)

    def is_stored(self, conversation: str, turn: int, dialogue: str, request: dict) -> bool:
        """Whether the choice of a request is in the file. Raises Refusal if the turn has another
        one: made in another tab, for example."""
        with self.lock:
            record = self.talks.get(conversation, {}).get(turn)
        if record is None:
            return False
        picked, other = record["chosen"], record["rejected"]
        if record["kind"] == "harmless":
            picked, other = other, picked
        texts = [picked[len(dialogue):], other[len(dialogue):]]
        if (request["side"] == 1) != self.is_swapped(conversation, turn):  # the second of the pair
            texts.reverse()
        is_same = (picked.startswith(dialogue) and request.get("pair") == digest(texts)
                   and (record["kind"], record["strength"]) == (request["kind"],
                                                                request["strength"]))
        if not is_same:
            raise Refusal(409, MOVED_ON)
        return True

    def records(self) -> list[dict]:
        with self.lock:
            return list(self.choices.records)


def as_bytes(text: str) -> bytes:
    """Different bytes for different texts; JSON can hold half an emoji, which UTF-8 cannot."""
    return text.encode("utf-8", "surrogatepass")


def next_turn(talk: dict[int, dict]) -> int:
    """The turn that has no choice yet. talk: {turn: record}."""
    return max(talk, default=0) + 1


def checked_line(text, what: str, most: int) -> str:
    """A line that a person typed. It cannot open another turn, because that takes line breaks."""
    if not isinstance(text, str):
        raise Refusal(400, f"the {what} is not a text")
    text = text.strip()
    if not text or len(text) > most:
        raise Refusal(400, f"the {what} must have 1 to {most} characters")
    for character in text:
        if unicodedata.category(character) in ("Cc", "Cs"):
            raise Refusal(400, f"the {what} has characters that are not allowed: use plain text")
    return text


def lines(dialogue: str) -> list[list[str]]:
    """A dialogue as the page shows it: [["Human", text], ...], without the open turn."""
    found = []
    for role, text in split_turns(dialogue)[1]:
        if text.strip():
            found.append([role, shown(text.strip())])
    return found
