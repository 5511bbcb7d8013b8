"""Thirty simulated people choose twenty times each, over the loopback; then again while the server
is killed and started anew.

    python tests/class_of_thirty.py out/toy-0      # nobody thinks before they act
    python tests/class_of_thirty.py out/toy-0 2    # each person thinks for 2 seconds on average

This is not part of the suite. It needs the folder of a finished toy run, which it only reads, and
Linux or macOS. Of the choices, one in five is sent twice at the same moment, and one in five again
later. It checks that no confirmed choice is lost, that none is stored twice, and that each
conversation goes on from what was picked, and prints how long people waited.
"""
import http.client
import json
import random
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from conftest import ROOT  # which also makes the project importable
from choices import goes_on

PEOPLE, CHOICES, KILLS = 30, 20, 4


class Server:
    """serve.py in a process of its own. A new one takes the old one's port."""

    def __init__(self, run: str, choices: Path):
        self.run, self.choices, self.port = run, choices, 0
        self.start()

    def start(self):
        command = [sys.executable, str(ROOT / "serve.py"), self.run, "--port", str(self.port),
                   "--choices", str(self.choices)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        for line in self.process.stdout:
            found = re.search(r"127\.0\.0\.1:(\d+)/#lecturer=(\w+)", line)
            if found:
                self.port, self.lecturer = int(found[1]), found[2]
            if line.startswith("choices:"):
                return
        sys.exit("the server did not start")

    def kill(self):
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def post(self, path: str, **fields) -> dict:
        """As the page does it: try until the answer is not the server's trouble."""
        while True:
            try:
                connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=100)
                connection.request("POST", path, json.dumps(fields),
                                   {"Content-Type": "application/json"})
                answer = connection.getresponse()
                content = json.loads(answer.read())
                if answer.status < 500:
                    return content | {"status": answer.status}
            except (OSError, http.client.HTTPException, ValueError):
                pass  # the server is dead, or died before it had answered
            time.sleep(0.2)


class Person(threading.Thread):
    def __init__(self, server: Server, number: int, think: float):
        super().__init__()
        self.server, self.think, self.rng = server, think, random.Random(number)
        self.name, self.confirmed = f"person {number}", []
        self.waits = {"replies": [], "choice": []}

    def timed(self, what: str, path: str, **fields) -> dict:
        clock = time.perf_counter()
        found = self.server.post(path, **fields)
        self.waits[what].append(time.perf_counter() - clock)
        return found

    def run(self):
        token = self.server.post("/join", name=self.name, code="")["token"]
        here, n_suggested = self.server.post("/state", token=token), 0
        while here["done"] < CHOICES:
            about = {"token": token, "number": here["number"], "turn": here["turn"],
                     "kind": here["kind"], "suggest": n_suggested}
            if here["turn"] == 1:
                about["kind"] = self.rng.choice(("helpful", "harmless"))
            time.sleep(self.rng.expovariate(1 / self.think) if self.think else 0)
            offer = self.timed("replies", "/say", **about)
            n_suggested += 1
            if offer["status"] != 200:  # two equal replies: another line
                continue
            time.sleep(self.rng.expovariate(1 / self.think) if self.think else 0)
            choice = about | {"pair": offer["pair"], "side": self.rng.randrange(2),
                              "strength": self.rng.randint(1, 4)}
            fate = self.rng.random()
            if fate < 0.2:
                with ThreadPoolExecutor(1) as twin:
                    twin.submit(self.server.post, "/choose", **choice)
                    here = self.timed("choice", "/choose", **choice)
            else:
                here = self.timed("choice", "/choose", **choice)
            if here["status"] != 200:  # the replies are others than before the server was killed
                here = self.server.post("/state", token=token)
                continue
            self.confirmed.append((about["number"], about["turn"], here["lines"][-1][1]))
            if fate > 0.8:
                again = self.server.post("/choose", **choice)
                assert again["done"] == here["done"], "a choice that was sent again counted twice"
            n_suggested = 0
            if here["turn"] > 3:  # about as many turns as in HH (§2.3)
                here |= {"number": here["number"] + 1, "turn": 1}


def check(path: Path, people: list[Person]):
    """Stop unless the files hold each confirmed choice once, and each conversation in order."""
    talks = {}
    for file in (path, path.with_name(f"{path.stem}.unsure{path.suffix}")):
        for line in file.read_text().splitlines():
            record = json.loads(line)
            key = record["who"], int(record["conversation"].split("-")[1])
            talk = talks.setdefault(key, {})
            assert record["turn"] not in talk, f"twice in the file: {record['id']}"
            talk[record["turn"]] = record
    for person in people:
        assert len(person.confirmed) == CHOICES
        for number, turn, picked in person.confirmed:
            record = talks[person.name, number][turn]  # KeyError: a confirmed choice is lost
            assert goes_on(record).endswith(picked), f"not what was confirmed: {record['id']}"
    assert sum(map(len, talks.values())) == PEOPLE * CHOICES
    for talk in talks.values():
        assert sorted(talk) == list(range(1, len(talk) + 1)), "a turn is missing"
        for turn in range(2, len(talk) + 1):
            assert talk[turn]["chosen"].startswith(goes_on(talk[turn - 1]))
            assert talk[turn - 1]["when"] <= talk[turn]["when"]


def hold_class(run: str, folder: Path, think: float, n_kills: int):
    path = folder / f"class{n_kills}.jsonl"
    server = Server(run, path)
    people = [Person(server, number, think) for number in range(PEOPLE)]
    clock = time.perf_counter()
    for person in people:
        person.start()
    for kill in range(1, n_kills + 1):  # after a fifth of the choices, two fifths, ...
        while sum(len(p.confirmed) for p in people) < PEOPLE * CHOICES * kill / (n_kills + 1):
            time.sleep(0.01)
        server.kill()
        server.start()
    for person in people:
        person.join()
    seconds = time.perf_counter() - clock
    table = server.post("/class", key=server.lecturer)
    server.kill()
    check(path, people)
    print(f"{PEOPLE} people, {CHOICES} choices each, {think:g} s of thought, server killed "
          f"{n_kills} times: {seconds:.0f} s; none lost, none doubled, all in order")
    for what in ("replies", "choice"):
        waits = sorted(wait for person in people for wait in person.waits[what])
        at = {share: waits[int(share * (len(waits) - 1))] for share in (0.5, 0.95, 1)}
        print(f"    wait for {what:8}: median {at[0.5]:.3f} s, 95% {at[0.95]:.3f} s, longest "
              f"{at[1]:.3f} s")
    print(f"    {table['summary']}", flush=True)


def main():
    run, think = sys.argv[1], float(sys.argv[2]) if len(sys.argv) > 2 else 0.0
    with tempfile.TemporaryDirectory() as folder:
        hold_class(run, Path(folder), think, 0)
        hold_class(run, Path(folder), think, KILLS)


if __name__ == "__main__":
    main()
