"""Kill a run at random moments, resume it, and compare its files with those of a whole run.

    python tests/kill.py [seed]     # 28 x kill -9, 5 x Ctrl-C, 3 x SIGTERM: minutes

This is not part of the suite; test_commands.py kills a run at each file that it writes, which is
quicker and misses what happens in between. It needs Linux or macOS.
"""
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from conftest import ROOT  # which also makes the project importable
from test_run import content

OPTIONS = ("--preset tiny --lm.documents 1500 --pm.helpful 200 --pm.harmless 100 --pm.test 50 "
           "--rl.iterations 6 --rl.eval-prompts 24 --rl.eval-conversations 6 --rl.save-every 2 "
           "--device cpu").split()
SIGNALS = [signal.SIGKILL] * 28 + [signal.SIGINT] * 5 + [signal.SIGTERM] * 3


def start(out: Path, *more) -> subprocess.Popen:
    command = [sys.executable, str(ROOT / "train_rl.py"), "--out", str(out), *OPTIONS, *more]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL,
                            stderr=subprocess.PIPE)


def finish(process: subprocess.Popen, killed_by: int = 0):
    """Wait for the end. Its status must be 0 or the signal's, and there must be no traceback."""
    errors = process.communicate()[1].decode(errors="replace")
    if process.returncode not in (0, -killed_by) or "Traceback" in errors:
        sys.exit(f"status {process.returncode} after signal {killed_by}:\n{errors}")


def main():
    rng = random.Random(int(sys.argv[1]) if len(sys.argv) > 1 else 0)
    signals = rng.sample(SIGNALS, len(SIGNALS))
    with tempfile.TemporaryDirectory() as folder:
        whole, clock = Path(folder, "whole"), time.perf_counter()
        finish(start(whole))
        duration = time.perf_counter() - clock
        expected = content(whole)
        print(f"an uninterrupted run takes {duration:.0f} s", flush=True)
        n_runs = 0
        while signals:
            n_runs += 1
            out, n_killed, is_complete = Path(folder, f"run{n_runs}"), 0, False
            while not is_complete:
                process = start(out, "--resume")
                try:
                    process.wait(rng.uniform(0, duration) if signals else None)
                    finish(process)
                    is_complete = True
                except subprocess.TimeoutExpired:
                    killed_by = signals.pop()
                    process.send_signal(killed_by)
                    finish(process, killed_by)
                    n_killed += 1
            found = content(out)
            if found != expected:
                names = expected | found
                differ = [name for name in names if found.get(name) != expected.get(name)]
                sys.exit(f"run {n_runs}, killed {n_killed} times: other content in {differ}")
            print(f"run {n_runs}: killed {n_killed} times, and ended with the same bytes",
                  flush=True)


if __name__ == "__main__":
    main()
