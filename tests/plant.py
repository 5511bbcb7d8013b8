"""Plant the bugs of planted_bugs.txt, one at a time, and say which ones the tests miss.

    python tests/plant.py                  # all of them: minutes
    python tests/plant.py ppo.py pm.py     # those of some files

This is not part of the suite. A test that cannot fail is worse than none, and the only way to know
is to break the code. Whenever a bug is found in the project, it goes onto the list, together with
the test that would have caught it.

A bug is written like this; "-" is a text that stands in the file exactly once, "+" is what replaces
it (nothing, if there is no such line), and both may have several lines:

    @ ppo.py  test_ppo.py::test_gae_is_the_double_sum_and_the_mixture
    - gamma * gae_lambda * advantage
    + gamma * advantage

Each bug is planted in a copy of the project. Its test must then fail, or not end in time. A test
that is skipped notices nothing: set HH_RLHF_DIR and TIKTOKEN_CACHE_DIR as for the whole suite.
"""
import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import Queue

ROOT = Path(__file__).resolve().parent.parent
LIST = Path(__file__).with_name("planted_bugs.txt")
JOBS = os.cpu_count() or 1
TIMEOUT = 300  # seconds for one bug; some bugs make a loop endless
PYTEST_FAILED = 1, 2  # pytest's exit codes: a test failed; a file could not even be imported


@dataclass
class Bug:
    line: int   # of the list
    file: str   # where it is planted
    test: str   # what must notice it: a file in tests/, or one test of it
    old: str
    new: str


def read_list() -> list[Bug]:
    bugs = []
    for number, line in enumerate(LIST.read_text("utf-8").splitlines(), start=1):
        mark, text = line[:2], line[2:]
        if mark == "@ ":
            file, test = text.split()
            bugs.append(Bug(number, file, test, old="", new=""))
        elif mark == "- ":
            bugs[-1].old += text + "\n"
        elif mark == "+ ":
            bugs[-1].new += text + "\n"
        elif line.strip() and not line.startswith("#"):
            sys.exit(f"{LIST.name}:{number}: begins with none of '@ ', '- ', '+ ', '#'")
    for bug in bugs:
        bug.old, bug.new = bug.old.removesuffix("\n"), bug.new.removesuffix("\n")
        found = (ROOT / bug.file).read_text("utf-8").count(bug.old)
        if found != 1 or not bug.old:
            sys.exit(f"{LIST.name}:{bug.line}: its text stands {found} times in {bug.file}, not "
                     "once")
    return bugs


def make_copy() -> Path:
    copy = Path(tempfile.mkdtemp(prefix="plant-"))
    skipped = shutil.ignore_patterns(".*", "out", "__pycache__")
    shutil.copytree(ROOT, copy, ignore=skipped, dirs_exist_ok=True)
    return copy


def run_tests(copy: Path, tests: list[str], timeout: int | None = TIMEOUT) -> int | None:
    """The exit code of pytest in a copy; None if it does not end in time."""
    paths = [f"tests/{test}" for test in tests]
    command = [sys.executable, "-B", "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *paths]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    try:
        done = subprocess.run(command, cwd=copy, env=environment, timeout=timeout,
                              stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    except subprocess.TimeoutExpired:
        return None
    return done.returncode


def is_noticed(bug: Bug, copies: Queue) -> bool:
    copy = copies.get()
    path = copy / bug.file
    good = path.read_text("utf-8")
    try:
        path.write_text(good.replace(bug.old, bug.new), "utf-8")
        code = run_tests(copy, [bug.test])
    finally:
        path.write_text(good, "utf-8")
        copies.put(copy)
    return code is None or code in PYTEST_FAILED


def main():
    bugs = read_list()
    if len(sys.argv) > 1:
        bugs = [bug for bug in bugs if bug.file in sys.argv[1:]]
    if not bugs:
        sys.exit("no bug on the list is in these files")
    copies = Queue()
    for _ in range(JOBS):
        copies.put(make_copy())
    try:
        # A test that fails anyway would notice everything.
        first = copies.get()
        code = run_tests(first, sorted({bug.test for bug in bugs}), timeout=None)
        copies.put(first)
        if code != 0:
            sys.exit("the tests on the list do not all pass without a bug; run them first")
        noticed, planted = {}, {}
        with ThreadPoolExecutor(JOBS) as pool:
            results = pool.map(lambda bug: is_noticed(bug, copies), bugs)
            for bug, was_noticed in zip(bugs, results):
                planted[bug.file] = planted.get(bug.file, 0) + 1
                noticed[bug.file] = noticed.get(bug.file, 0) + was_noticed
                if not was_noticed:
                    print(f"missed: {LIST.name}:{bug.line}, {bug.file}: {bug.old!r} -> "
                          f"{bug.new!r}", flush=True)
    finally:
        while not copies.empty():
            shutil.rmtree(copies.get())
    for file, n in planted.items():
        print(f"{file:16} {noticed[file]:3d} of {n:3d} noticed")
    print(f"{'together':16} {sum(noticed.values()):3d} of {sum(planted.values()):3d} noticed")
    sys.exit(noticed != planted)


if __name__ == "__main__":
    main()
