"""Tests of train_lm.py, train_pm.py and train_rl.py, run as a user runs them.

One small run of all three stages is trained once for the session; most cases start from a copy of its folder. True
subprocesses where exit code, traceback or a kill matter; elsewhere the same script runs inside this process
(runpy), which saves the second that importing torch takes.
"""
import dataclasses
import errno
import gzip
import json
import os
import pickle
import random
import re
import resource
import runpy
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from functools import partialmethod
from pathlib import Path

import pytest
import torch
import tqdm

import ppo
import run
import train_lm
import train_pm
import train_rl
from data import ASSISTANT, HUMAN

ROOT = Path(train_rl.__file__).resolve().parent
SCRIPTS = ["train_lm.py", "train_pm.py", "train_rl.py"]
ENV = {**os.environ, "TQDM_DISABLE": "1", "OMP_NUM_THREADS": "1"}
# Batches so small that the LM takes more than 200 steps and the PM more than 50: each then saves its state once.
LM = "--lm.documents 360 --lm.step-tokens 128 --lm.vocab 640".split()
PM = "--pm.helpful 60 --pm.harmless 30 --pm.test 15 --pm.batch 1".split()
RL = ("--rl.iterations 4 --rl.batch 8 --rl.minibatch 4 --rl.eval-prompts 6 --rl.eval-every 2 --rl.save-every 1 "
      "--rl.max-response 12").split()
SMALL = {"train_lm.py": LM, "train_pm.py": LM + PM, "train_rl.py": LM + PM + RL}
FINAL = ["lm.pt", "pm.pt", "policy.pt"]


# ------------------------------------------------------------------------------ running a command


@dataclass
class Result:
    code: int
    out: str
    err: str


def shell(script, *args, **kwargs) -> Result:
    """A command in a process of its own."""
    done = subprocess.run([sys.executable, script, *map(str, args)], cwd=ROOT, env=ENV, capture_output=True, text=True,
                          timeout=300, **kwargs)
    return Result(done.returncode, done.stdout, done.stderr)


@pytest.fixture
def call(monkeypatch, capsys):
    """The same in this process. Whatever would end in a traceback is raised, so a test that sees it fails with it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # another number of threads adds floats in another order
    monkeypatch.setattr(tqdm.tqdm, "__init__", partialmethod(tqdm.tqdm.__init__, disable=True))

    def call(script, *args) -> Result:
        monkeypatch.setattr(sys, "argv", [script, *map(str, args)])
        capsys.readouterr()
        code, message = 0, ""
        try:
            runpy.run_path(str(ROOT / script), run_name="__main__")
        except SystemExit as error:  # what the interpreter does with it: a text is printed and the status is 1
            code, message = (1, f"{error.code}\n") if isinstance(error.code, str) else (error.code or 0, "")
        captured = capsys.readouterr()
        return Result(code, captured.out, captured.err + message)
    yield call
    torch.set_num_threads(threads)


def assert_one_sentence(result: Result, *words):
    """The command failed and said so in one line."""
    assert result.code not in (0, None), result.out[-500:]
    assert "Traceback" not in result.err and "Traceback" not in result.out
    assert len(result.err.strip().splitlines()) == 1, result.err
    assert re.match(r"train_(lm|pm|rl)\.py: \S", result.err), result.err
    for word in words:
        assert str(word) in result.err


def metrics(out: Path) -> list[str]:
    """metrics.jsonl without the times, the one thing in it that may differ when a run is repeated."""
    return [re.sub(r', "seconds": [\d.]+', "", line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def weights(path: Path) -> dict:
    return torch.load(path, weights_only=True)["model"]


def assert_same_run(one: Path, two: Path):
    for name in FINAL:
        a, b = weights(one / name), weights(two / name)
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a), name
    assert metrics(one) == metrics(two)
    for file in ["samples.txt", "tokenizer.json", *sorted(f.relative_to(one) for f in one.glob("comparisons/*/*"))]:
        assert (one / file).read_bytes() == (two / file).read_bytes(), file


def files(out: Path) -> dict[str, bytes]:
    return {str(f.relative_to(out)): f.read_bytes() for f in sorted(out.rglob("*")) if f.is_file()}


@pytest.fixture(scope="session")
def trained(tmp_path_factory) -> tuple[Path, Result]:
    """All stages from an empty folder, in one command. Nothing may write into this folder: take a copy."""
    out = tmp_path_factory.mktemp("trained") / "new" / "folder"  # neither exists yet
    result = shell("train_rl.py", "--out", out, *SMALL["train_rl.py"])
    assert result.code == 0, result.err
    return out, result


@pytest.fixture
def copy(trained, tmp_path):
    """copy("policy.pt"): the trained folder without policy.pt."""
    def copy(*without) -> Path:
        out = tmp_path / "copy"
        shutil.copytree(trained[0], out)
        for name in without:
            (out / name).unlink()
        return out
    return copy


# ------------------------------------------------------------------------------ (1) a whole run


def test_rl_from_an_empty_folder_runs_all_stages(trained):
    out, result = trained
    names = {str(f.relative_to(out)) for f in out.rglob("*") if f.is_file()}
    assert names == {"config.json", "tokenizer.json", "metrics.jsonl", "lm.pt", "pm.pt", "policy.pt", "samples.txt"} | {
        f"comparisons/{kind}-base/{split}.jsonl" for kind in ("helpful", "harmless") for split in ("train", "test")}
    assert result.err == ""
    assert "lm.pt is missing, so that stage runs first" in result.out
    assert "pm.pt is missing, so that stage runs first" in result.out
    assert [result.out.index(f"[{stage}] ") for stage in (1, 2, 3)] == sorted(
        result.out.index(f"[{stage}] ") for stage in (1, 2, 3))
    assert [int(n) for n in re.findall(r"^  it +(\d+) \|", result.out, re.M)] == [0, 1, 2, 3]
    # The closing table: one row a number, before and after.
    closing = result.out[result.out.index("held-out prompts"):]
    for title in train_rl.TABLE.values():
        assert re.search(rf"^ +{re.escape(title)} +-?[\d.na]+ +-?[\d.na]+$", closing, re.M), title
    assert "policy.pt" in closing
    samples = (out / "samples.txt").read_text()
    assert samples.count("initial:") == samples.count("RLHF:") >= 4 and samples.strip() in result.out

    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert all({"stage", "step", "seconds"} <= line.keys() for line in lines)
    assert [line["step"] for line in lines if line["stage"] == "rl"] == [0, 1, 2, 3, 4, 5]
    steps = {stage: [line["step"] for line in lines if line["stage"] == stage] for stage in ("lm", "pm", "rl")}
    assert all(s == sorted(s) for s in steps.values())
    assert steps["lm"][-1] > 210 and steps["pm"][-1] > 60  # or the tests of kills below would not test what they say
    config = json.loads((out / "config.json").read_text())
    assert config["lm"]["documents"] == 360 and config["rl"]["iterations"] == 4 and config["run"]["seed"] == 0


def test_metrics_are_strict_json(copy, call):
    """NaN is no JSON: jq, JavaScript and others stop at it. One held-out prompt leaves the other kind without a mean."""
    def refuse(name):
        raise AssertionError(f"{name} in metrics.jsonl")
    out = copy("policy.pt")
    assert call("train_rl.py", "--out", out, *SMALL["train_rl.py"], "--rl.eval-prompts", 1, "--rl.iterations", 1).code == 0
    for line in (out / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=refuse)


def test_the_closing_table_says_what_metrics_say(trained):
    lines = [json.loads(line) for line in (trained[0] / "metrics.jsonl").read_text().splitlines()]
    first, last = ([line for line in lines if line["stage"] == "rl"][i] for i in (0, -1))
    for key, title in train_rl.TABLE.items():
        before, after = re.search(rf"^ +{re.escape(title)} +(\S+) +(\S+)$", trained[1].out, re.M).groups()
        for printed, written in ((before, first.get(f"eval_{key}")), (after, last.get(f"eval_{key}"))):
            assert written is None or written != written or abs(float(printed) - written) < 6e-4, title


def test_stages_that_are_there_are_not_run_again(trained, copy, call):
    """Also with --resume, when the last stage has not begun and there is nothing to resume."""
    out = copy("policy.pt")
    result = call("train_rl.py", "--out", out, *SMALL["train_rl.py"], "--resume")
    assert result.code == 0 and result.out.count("is there") == 2 and "trained first" not in result.out
    assert_same_run(trained[0], out)


# ------------------------------------------------------------------------------ (2) repeating


def test_same_seed_same_run(trained, tmp_path, call):
    assert call("train_rl.py", "--out", tmp_path / "again", *SMALL["train_rl.py"]).code == 0
    assert_same_run(trained[0], tmp_path / "again")


def test_stages_one_by_one_are_the_same_run(trained, copy, call):
    """train_pm.py, then train_rl.py, over what an earlier run left: nothing of it leaks into the new one."""
    out = copy()
    assert call("train_pm.py", "--out", out, *SMALL["train_pm.py"]).code == 0
    assert not any('"rl"' in line for line in metrics(out))  # they were about another PM
    assert call("train_rl.py", "--out", out, *SMALL["train_rl.py"]).code == 0
    assert_same_run(trained[0], out)


def test_another_seed_another_run(trained, copy, tmp_path, call):
    """Every stage depends on the seed: the LM; and, on top of one and the same LM, the PM and the policy."""
    for seed in (0, 1):
        args = ["--out", tmp_path / str(seed), *SMALL["train_lm.py"], "--lm.documents", 40, "--seed", seed]
        assert call("train_lm.py", *args).code == 0
    assert not set(metrics(tmp_path / "0")) & set(metrics(tmp_path / "1"))
    assert not torch.equal(*(weights(tmp_path / str(seed) / "lm.pt")["positions.weight"] for seed in (0, 1)))

    out = copy("pm.pt", "policy.pt")
    config = (out / "config.json").read_text()
    assert config.count('"seed": 0') == 1
    (out / "config.json").write_text(config.replace('"seed": 0', '"seed": 1'))
    assert call("train_rl.py", "--out", out, "--seed", 1, *SMALL["train_rl.py"]).code == 0
    differing = set(metrics(out)) ^ set(metrics(trained[0]))
    assert all(line in differing for line in metrics(out) if '"stage": "lm"' not in line)
    for name in ("pm.pt", "policy.pt"):
        a, b = weights(trained[0] / name), weights(out / name)
        assert all(not torch.equal(a[k], b[k]) for k in a if a[k].dim() == 2), name
    for file in ("samples.txt", "comparisons/helpful-base/train.jsonl", "comparisons/harmless-base/test.jsonl"):
        assert (out / file).read_bytes() != (trained[0] / file).read_bytes()


# ------------------------------------------------------------------------------ (3) kill and resume


class Killed(BaseException):
    """Stands for the death of the process: no handler of the commands may catch it."""


def kill_at(monkeypatch, name: str, k: int, before: bool = False):
    """From now on, die right after (or right before) the k-th time that a file called `name` gets its new content."""
    count, replace = [0], os.replace

    def dying(source, target):
        mine = Path(target).name == name
        count[0] += mine
        if mine and before and count[0] == k:
            raise Killed
        replace(source, target)
        if mine and count[0] == k:
            raise Killed
    monkeypatch.setattr(os, "replace", dying)


def test_killed_in_every_stage_and_resumed(trained, tmp_path, call, monkeypatch):
    """A real SIGKILL in the LM stage, then deaths in the PM and RL stages; the result is that of an undisturbed run."""
    out, args = tmp_path / "killed", ["--out", tmp_path / "killed", *SMALL["train_rl.py"]]
    process = subprocess.Popen([sys.executable, "train_rl.py", *map(str, args)], cwd=ROOT, env=ENV,
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not (out / "lm_state.pt").exists() and process.poll() is None:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL and not (out / "lm.pt").exists()

    for state, resumed in (("pm_state.pt", "from step 200"), ("rl_state.pt", "from step 50")):
        with monkeypatch.context() as patch:
            kill_at(patch, state, 2)  # the first one is saved before the first step
            with pytest.raises(Killed):
                call("train_rl.py", *args, "--resume")
        assert (out / state).exists()
    result = call("train_rl.py", *args, "--resume")
    assert result.code == 0 and "from iteration 1" in result.out and result.out.count("is there") == 2
    assert not list(out.glob("*_state.pt")) and not list(out.rglob("*.tmp"))
    assert_same_run(trained[0], out)


@pytest.mark.parametrize("k, before", [(3, True), (4, False)])
def test_killed_while_saving(trained, copy, call, monkeypatch, k, before):
    """Killed between writing the temporary file and renaming it, or right after: both ways resume."""
    out = copy("policy.pt")
    args = ["--out", out, *SMALL["train_rl.py"]]
    with monkeypatch.context() as patch:
        kill_at(patch, "rl_state.pt", k, before)
        with pytest.raises(Killed):
            call("train_rl.py", *args)
    assert len(list(out.glob("*.tmp"))) == before
    with open(out / "metrics.jsonl", "a") as file:
        file.write('{"stage": "rl", "step": 4, "sco')  # the line that was being written
    result = call("train_rl.py", *args, "--resume")
    assert result.code == 0 and f"from iteration {k - 1 - before}" in result.out
    assert_same_run(trained[0], out)
    assert not list(out.glob("*.tmp"))


def test_killed_and_not_resumed_starts_the_stage_over(trained, copy, call, monkeypatch):
    out = copy("policy.pt")
    args = ["--out", out, *SMALL["train_rl.py"]]
    with monkeypatch.context() as patch:
        kill_at(patch, "rl_state.pt", 2)
        with pytest.raises(Killed):
            call("train_rl.py", *args)
    result = call("train_rl.py", *args)
    assert result.code == 0 and "rl_state.pt" in result.out and "starts over" in result.out
    assert_same_run(trained[0], out)


def test_resume_with_other_options_is_refused(copy, call, monkeypatch):
    out = copy("policy.pt")
    with monkeypatch.context() as patch:
        kill_at(patch, "rl_state.pt", 2)
        with pytest.raises(Killed):
            call("train_rl.py", "--out", out, *SMALL["train_rl.py"])
    before = files(out)
    result = call("train_rl.py", "--out", out, *SMALL["train_rl.py"], "--resume", "--rl.lr", "1e-5")
    assert_one_sentence(result, out, "--rl.lr")
    assert files(out) == before


def test_resume_does_not_mix_in_comparisons_of_other_options(copy, call, monkeypatch):
    """Killed after the comparisons were labelled, before the PM's first state: there is nothing to go on from but
    these files, and with other options (here another temperature of the crowdworkers) they are wrong."""
    out = copy("pm.pt", "policy.pt")
    with monkeypatch.context() as patch:
        kill_at(patch, "test.jsonl", 2)
        with pytest.raises(Killed):
            call("train_pm.py", "--out", out, *SMALL["train_pm.py"])
    result = call("train_pm.py", "--out", out, *SMALL["train_pm.py"], "--pm.noise", 5, "--pm.helpful", 40, "--resume")
    assert result.code or "sampled helpful train: read 40" in result.out, result.out


@pytest.mark.parametrize("script, option, value", [
    ("train_lm.py", "--lm.vocab", 500), ("train_pm.py", "--lm.lr", 1e-4), ("train_rl.py", "--lm.documents", 400),
    ("train_rl.py", "--pm.noise", 3), ("train_rl.py", "--pm.lr", 1e-4)])
def test_other_options_of_a_finished_stage_are_not_ignored_in_silence(copy, call, script, option, value):
    """lm.pt and pm.pt are there, made with other options than now asked for: say so, or make them anew."""
    out = copy(*FINAL[SCRIPTS.index(script):])
    small = [*SMALL[script], *("--lm.documents 60".split() if script == "train_lm.py" else ())]
    result = call(script, "--out", out, *small, option, value)
    if option == "--lm.vocab" and result.code == 0:
        assert len(json.loads((out / "tokenizer.json").read_text())["tokens"]) + 2 == value
    else:
        told = result.out + result.err
        assert option in told or "other options" in told or "other --" in told or "trained first" in told, told[:600]


def test_a_new_lm_makes_the_old_pm_invalid(copy, call):
    """train_lm.py over a finished folder: pm.pt was made from, and for, another LM."""
    out = copy("policy.pt")
    assert call("train_lm.py", "--out", out, *SMALL["train_lm.py"], "--lm.documents", 50).code == 0
    result = call("train_rl.py", "--out", out, *SMALL["train_rl.py"], "--lm.documents", 50)
    assert result.code or "pm.pt is there" not in result.out, result.out[:400]


def test_ctrl_c_names_resume(copy, call, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt
    monkeypatch.setattr(ppo, "update", interrupted)
    result = call("train_rl.py", "--out", copy("policy.pt"), *SMALL["train_rl.py"])
    assert result.code not in (0, None) and "--resume" in result.err and len(result.err.strip().splitlines()) == 1


# ------------------------------------------------------------------------------ (4) mistakes: the data


def rows(n: int, name: str) -> list[dict]:
    """n comparisons of one to three exchanges, in the format of HH-RLHF."""
    rng = random.Random(name)
    things = "bread soup tea rice a kite a boat a song a letter".split()
    found = []
    for i in range(n):
        text = ""
        for turn in range(i % 3):
            text += f"{HUMAN} Tell me {turn} about {rng.choice(things)}.{ASSISTANT} It is {rng.choice(things)}."
        text += f"{HUMAN} Question {name} {i}: how do I make {rng.choice(things)}?{ASSISTANT}"
        found.append({"chosen": f"{text} Take your time, and ask for {rng.choice(things)} number {i}.",
                      "rejected": f"{text} No, {rng.choice(things)}."})
    return found


def write(path: Path, content: list) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    raw = b"".join((row if isinstance(row, bytes) else json.dumps(row).encode()) + b"\n" for row in content)
    path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else raw)
    return path


def write_set(root: Path, extra=()) -> Path:
    for subset in ("helpful-base", "harmless-base"):
        for split, n in (("train", 30), ("test", 12)):
            name = f"{subset}/{split}"
            write(root / f"{name}.jsonl.gz", [*rows(n, name), *(extra if name == "helpful-base/train" else ())])
    return root


GOOD = rows(3, "good")
REAL = "--tokenizer bpe --context 160 --lm.vocab 400 --lm.step-tokens 1000".split()


@pytest.mark.parametrize("bad, words", [
    (b'{"chosen": ', ":3:"),
    ({"rejected": GOOD[0]["rejected"]}, ":3: 'chosen'"),
    ({"chosen": "Hello.", "rejected": GOOD[0]["rejected"]}, ":3: not a dialogue"),
])
@pytest.mark.parametrize("script", SCRIPTS)
def test_a_bad_line_of_the_data(tmp_path, call, script, bad, words):
    root = write_set(tmp_path / "set")
    path = write(root / "helpful-base" / "train.jsonl.gz", [*GOOD[:2], bad, *GOOD])
    result = call(script, "--data", root, "--out", tmp_path / "out", *REAL)
    assert_one_sentence(result, f"{path}:3", *words.split()[1:])
    assert not (tmp_path / "out" / "lm.pt").exists()


def test_a_bad_line_in_the_test_split_is_found_before_training(tmp_path, call):
    """The LM stage needs the test split only at its end: minutes, or hours, after the start."""
    root = write_set(tmp_path / "set")
    path = write(root / "harmless-base" / "test.jsonl.gz", [*GOOD, b"{"])
    result = call("train_lm.py", "--data", root, "--out", tmp_path / "out", *REAL)
    assert_one_sentence(result, f"{path}:4")
    assert not any('"loss"' in line for line in metrics(tmp_path / "out")) if (
        tmp_path / "out" / "metrics.jsonl").exists() else True


def test_truncated_gzip(tmp_path, call):
    path = write(tmp_path / "cut.jsonl.gz", rows(200, "cut"))
    path.write_bytes(path.read_bytes()[:-300])
    assert_one_sentence(call("train_pm.py", "--data", path, "--out", tmp_path / "out", *REAL), "cut.jsonl.gz", "gzip")


@pytest.mark.parametrize("script", SCRIPTS)
def test_no_such_data(tmp_path, call, script):
    args = ["--data", tmp_path / "typo", "--out", tmp_path / "out"]
    results = [call(script, *args)] + ([shell(script, *args)] if script == "train_rl.py" else [])
    for result in results:  # in a process of its own too: exit status and standard error are what a user gets
        assert_one_sentence(result, tmp_path / "typo")
    assert results[0] == results[-1] and not (tmp_path / "out").exists()


def test_data_without_usable_rows(tmp_path, call):
    (tmp_path / "empty").mkdir()
    assert_one_sentence(call("train_pm.py", "--data", tmp_path / "empty", "--out", tmp_path / "o", *REAL), "empty")
    path = write(tmp_path / "same.jsonl", [{"chosen": GOOD[0]["chosen"], "rejected": GOOD[0]["chosen"]}])
    assert_one_sentence(call("train_pm.py", "--data", path, "--out", tmp_path / "p", *REAL), "identical pair 1")
    path = write(tmp_path / "few.jsonl", GOOD[:1])  # all of it lands in one split
    assert_one_sentence(call("train_pm.py", "--data", path, "--out", tmp_path / "q", *REAL), "few.jsonl")


def test_a_data_mistake_can_be_mended_in_place(tmp_path, call):
    """The folder of a command that failed at once must not refuse the corrected command."""
    bad, good = write(tmp_path / "bad.jsonl", [b"{"]), write_set(tmp_path / "set")
    out = ["--out", tmp_path / "out", *REAL]
    assert_one_sentence(call("train_lm.py", "--data", bad, *out), "bad.jsonl:1")
    assert call("train_lm.py", "--data", good, *out).code == 0


# ------------------------------------------------------------------------------ (4) mistakes: the options


@pytest.mark.parametrize("option, value, words", [
    ("--size", "7B", "toy gpt2 13M"), ("--tokenizer", "word", "bpe gpt2"), ("--device", "nosuch", "cpu"),
    ("--device", "cuda:99", "cpu"), ("--device", "mps", "cpu"),
    pytest.param("--device", "meta", "cpu"), ("--tokenizer", "gpt2", "toy"),
    ("--context", "-5", "-5")])
def test_unknown_choice(tmp_path, call, option, value, words):
    result = call("train_rl.py", option, value, "--out", tmp_path / "out", *SMALL["train_rl.py"])
    assert_one_sentence(result, option, value, *words.split())
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("args", [["--no-such-option"], ["--rl.batch", "many"], ["--lm.lr", "fast"], ["--seed", "1.5"],
                                  ["--out"], ["stray"]])
def test_argparse_speaks_for_itself(tmp_path, call, args):
    result = call("train_rl.py", *args)
    assert result.code == 2 and args[0] in result.err and "Traceback" not in result.err


def test_an_option_of_a_later_stage(call):
    result = call("train_lm.py", "--rl.batch", "3")
    assert result.code == 2 and "unrecognized arguments: --rl.batch" in result.err


NUMBERS = {
    "train_lm.py": [("--context", "1"), ("--lm.documents", "0"), ("--lm.documents", "-1"), ("--lm.vocab", "10"),
                    ("--lm.step-tokens", "0"), ("--lm.step-tokens", "-1"), ("--lm.warmup", "-1"), ("--lm.lr", "nan"),
                    ("--lm.lr", "-1"), ("--lm.max-grad-norm", "-1"), ("--lm.weight-decay", "-1")],
    "train_pm.py": [("--pm.helpful", "-1"), ("--pm.harmless", "-1"), ("--pm.test", "0"), ("--pm.noise", "0"),
                    ("--pm.noise", "-1"), ("--pm.max-response", "0"), ("--pm.max-response", "500"), ("--pm.batch", "0"),
                    ("--pm.lr", "nan"), ("--pm.lr", "-1"), ("--pm.warmup", "-1"), ("--pm.token-budget", "0"),
                    ("--pm.harmless-weight", "-1")],
    "train_rl.py": [("--rl.iterations", "-1"), ("--rl.batch", "0"), ("--rl.batch", "-1"), ("--rl.minibatch", "0"),
                    ("--rl.passes", "0"), ("--rl.max-response", "0"), ("--rl.max-response", "-1"),
                    ("--rl.max-response", "185"), ("--rl.lr", "nan"), ("--rl.lr", "-1"), ("--rl.critic-lr", "-1"),
                    ("--rl.warmup", "-1"), ("--rl.clip", "-0.1"), ("--rl.value-clip", "-0.1"), ("--rl.kl-coef", "-1"),
                    ("--rl.gamma", "1.5"), ("--rl.gae-lambda", "1.5"), ("--rl.temperature", "0"),
                    ("--rl.temperature", "-1"), ("--rl.token-budget", "0"), ("--rl.harmless-share", "2"),
                    ("--rl.harmless-share", "-1"), ("--rl.eval-every", "0"), ("--rl.eval-prompts", "0"),
                    ("--rl.save-every", "0")],
}


@pytest.mark.parametrize("script, option, value", [
    (s, *case) for s in SCRIPTS for case in NUMBERS[s]])
def test_impossible_number(copy, tmp_path, call, script, option, value):
    """One sentence that names the option, before anything is trained; the same command corrected then works."""
    out = tmp_path / "out" if script == "train_lm.py" else copy(*FINAL[SCRIPTS.index(script):])
    result = call(script, "--out", out, *SMALL[script], option, value)
    assert_one_sentence(result, option, value)
    assert not (out / FINAL[SCRIPTS.index(script)]).exists()


@pytest.mark.parametrize("script, option", [
    pytest.param("train_lm.py", "--lm.warmup"),
    pytest.param("train_pm.py", "--pm.warmup"), ("train_rl.py", "--rl.warmup"),
    pytest.param("train_pm.py", "--pm.harmless"),
    pytest.param("train_pm.py", "--pm.helpful"),
    ("train_rl.py", "--rl.harmless-share"), ("train_rl.py", "--rl.kl-coef")])
def test_zero_is_a_number(copy, tmp_path, call, script, option):
    """No warm-up, one kind of comparison only, no KL penalty: sensible wishes."""
    out = tmp_path / "out" if script == "train_lm.py" else copy(*FINAL[SCRIPTS.index(script):])
    small = [*SMALL[script], *("--lm.documents 50".split() if script == "train_lm.py" else ())]
    result = call(script, "--out", out, *small, option, "0")
    assert result.code == 0, result.err
    assert (out / FINAL[SCRIPTS.index(script)]).exists()


@pytest.mark.parametrize("context", [30, 60])
def test_context_too_short_for_the_toy_prompts(tmp_path, call, context):
    result = call("train_rl.py", "--out", tmp_path / "out", *SMALL["train_rl.py"], "--lm.documents", 60,
                  "--context", context)
    assert_one_sentence(result, f"--context {context}")
    assert not (tmp_path / "out" / "pm.pt").exists()


def test_context_too_short_for_real_prompts(tmp_path, call):
    root = write_set(tmp_path / "set")
    result = call("train_rl.py", "--data", root, "--out", tmp_path / "out", *REAL, *RL, "--context", 60,
                  "--rl.max-response", 50)
    assert_one_sentence(result, "--context 60")
    assert not (tmp_path / "out" / "lm.pt").exists()
    result = call("train_pm.py", "--data", root, "--out", tmp_path / "out2", *REAL, "--context", 12)
    assert_one_sentence(result, "context")


# ------------------------------------------------------------------------------ (4) mistakes: the output folder


def test_folder_of_another_run_is_refused(copy, call):
    out = copy()
    before = files(out)
    for args in (["--seed", 1], ["--context", 100], ["--size", "gpt2"]):
        for script in SCRIPTS:
            assert_one_sentence(call(script, "--out", out, *SMALL[script], *args), out, args[0].strip("-"))
    assert files(out) == before


@pytest.mark.parametrize("script", SCRIPTS)
def test_output_below_a_file(tmp_path, call, script):
    (tmp_path / "file").write_text("precious")
    for out in (tmp_path / "file", tmp_path / "file" / "out"):
        assert_one_sentence(call(script, "--out", out, *SMALL[script]), out)
    assert (tmp_path / "file").read_text() == "precious"


class Code:
    """Unpickling this would run a command."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def broken_checkpoints(out: Path, name: str):
    """(what is wrong, bytes or object to save) for a file that should hold a model."""
    good = torch.load(out / name, weights_only=True)
    raw = (out / name).read_bytes()
    other_config = {**good["config"], "d_model": 64}
    yield "another shape", dict(good, config=other_config)
    yield "another tokenizer", dict(good, tokenizer="0" * 16)
    yield "truncated", raw[:len(raw) // 2]
    yield "empty", b""
    yield "text", b"hello\n"
    yield "other weights", dict(good, model={k: v for k, v in list(good["model"].items())[1:]})
    yield "other sizes", dict(good, model={k: v[:1] if v.dim() else v for k, v in good["model"].items()})
    yield "no weights", {k: v for k, v in good.items() if k != "model"}
    yield "a tensor", torch.zeros(3)
    yield "a list", [1, 2]


@pytest.mark.parametrize("script, name", [("train_pm.py", "lm.pt"), ("train_rl.py", "lm.pt"), ("train_rl.py", "pm.pt")])
def test_broken_checkpoint(copy, call, script, name):
    out = copy(*FINAL[SCRIPTS.index(script):])
    wrong = {}
    for what, content in list(broken_checkpoints(out, name)):
        (out / name).unlink()
        (out / name).write_bytes(content) if isinstance(content, bytes) else torch.save(content, out / name)
        try:
            assert_one_sentence(call(script, "--out", out, *SMALL[script]), out / name)
        except Exception as error:
            wrong[what] = repr(error)
        except AssertionError as error:
            wrong[what] = str(error)[:200]
        if (out / FINAL[SCRIPTS.index(script)]).exists():
            wrong[what] = "was accepted"
            (out / FINAL[SCRIPTS.index(script)]).unlink()
    assert not wrong


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("script, name", [
    ("train_pm.py", "lm.pt"), ("train_rl.py", "pm.pt"), ("train_rl.py", "rl_state.pt")])
def test_code_in_a_checkpoint_is_not_run(copy, tmp_path, call, script, name):
    out = copy(*FINAL[SCRIPTS.index(script):])
    for save in (lambda x, p: torch.save(x, p), lambda x, p: p.write_bytes(pickle.dumps(x))):
        save({"model": Code(tmp_path / "ran")}, out / name)
        assert_one_sentence(call(script, "--out", out, *SMALL[script], "--resume"), out / name)
        assert not (tmp_path / "ran").exists()
    pickle.loads(pickle.dumps(Code(tmp_path / "ran")))
    assert (tmp_path / "ran").exists()  # the bait would have worked


def test_broken_state(copy, call, monkeypatch):
    out = copy("policy.pt")
    with monkeypatch.context() as patch:
        kill_at(patch, "rl_state.pt", 1)
        with pytest.raises(Killed):
            call("train_rl.py", "--out", out, *SMALL["train_rl.py"])
    raw = (out / "rl_state.pt").read_bytes()
    wrong = {}
    for what, content in {"truncated": raw[:1000], "of another kind": (out / "lm.pt").read_bytes(), "empty": b""}.items():
        (out / "rl_state.pt").write_bytes(content)
        try:
            assert_one_sentence(call("train_rl.py", "--out", out, *SMALL["train_rl.py"], "--resume"), "rl_state.pt")
        except (Exception, AssertionError) as error:
            wrong[what] = repr(error)[:200]
    assert not wrong


@pytest.mark.parametrize("name, content", [
    pytest.param("config.json", "[]"), ("config.json", "{"), ("config.json", '{"run": {}}'),
    pytest.param("config.json", '{"run": 3}'), ("config.json", b"\xff"),
    ("tokenizer.json", "{}"), ("tokenizer.json", ""),
    pytest.param("metrics.jsonl", b"\xff\xfe\n"),
    pytest.param("metrics.jsonl", "5\n"),
    pytest.param("metrics.jsonl", '{"step": 1}\n')])
def test_broken_text_file(copy, call, name, content):
    """One sentence that names the file; or the run goes on, where the file isn't needed (a line of metrics)."""
    out = copy("policy.pt")
    (out / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    result = call("train_rl.py", "--out", out, *SMALL["train_rl.py"])
    if name != "metrics.jsonl" or result.code:
        assert_one_sentence(result, out)


def test_deleted_tokenizer_with_a_checkpoint(copy, call):
    out = copy("policy.pt", "tokenizer.json")
    assert_one_sentence(call("train_rl.py", "--out", out, *SMALL["train_rl.py"]), out / "tokenizer.json")


# ------------------------------------------------------------------------------ (4) a full disk


def fill_disk(monkeypatch, name: str, k: int):
    """The k-th write of `name` finds the disk full half way."""
    count, write_bytes = [0], Path.write_bytes

    def full(self, content):
        count[0] += self.name.startswith(name)
        if self.name.startswith(name) and count[0] == k:
            write_bytes(self, bytes(content)[:len(content) // 2])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write_bytes(self, content)
    monkeypatch.setattr(Path, "write_bytes", full)


def test_full_disk_keeps_the_last_state(trained, copy, call, monkeypatch):
    out = copy("policy.pt")
    args = ["--out", out, *SMALL["train_rl.py"]]
    with monkeypatch.context() as patch:
        fill_disk(patch, "rl_state.pt", 4)
        assert_one_sentence(call("train_rl.py", *args), out / "rl_state.pt", "No space left")
    result = call("train_rl.py", *args, "--resume")
    assert result.code == 0 and "from iteration 2" in result.out
    assert_same_run(trained[0], out)


@pytest.mark.parametrize("name", FINAL + ["samples.txt", "metrics.jsonl", "config.json"])
def test_full_disk_keeps_the_last_checkpoint(copy, call, monkeypatch, name):
    script = SCRIPTS[FINAL.index(name)] if name in FINAL else "train_rl.py"
    out = copy()
    before = (out / name).read_bytes()
    # A shorter LM run: only whether it ends well matters here.
    with monkeypatch.context() as patch:
        fill_disk(patch, name, 1)
        result = call(script, "--out", out, *SMALL[script], "--lm.documents", 50 if name == "lm.pt" else 360)
    assert_one_sentence(result, out / name, "No space left")
    assert (out / name).read_bytes() == before


def test_a_write_that_really_fails(copy):
    """RLIMIT_FSIZE makes the kernel refuse the bytes beyond the first MB of a file, as a full disk does."""
    out = copy()
    before = (out / "policy.pt").read_bytes()
    assert len(before) > 2**20
    result = shell("train_rl.py", "--out", out, *SMALL["train_rl.py"], "--rl.save-every", 100,
                   preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20)))
    assert_one_sentence(result, out / "rl_state.pt", "File too large")
    assert (out / "policy.pt").read_bytes() == before


# ------------------------------------------------------------------------------ (5) training that goes wrong


def nan_at(monkeypatch, module, name: str, k: int):
    """The k-th call (from 0) of a loss gives NaN."""
    count, loss = [0], getattr(module, name)

    def broken(*args):
        count[0] += 1
        return loss(*args) * (float("nan") if count[0] == k + 1 else 1.0)
    monkeypatch.setattr(module, name, broken)


def test_nan_in_the_lm(copy, call, monkeypatch):
    out = copy("pm.pt", "policy.pt")
    (out / "lm.pt").rename(out / "kept.pt")
    nan_at(monkeypatch, train_lm, "lm_loss", 205)
    # Through train_pm.py, which trains the missing LM by the module that is patched here.
    assert_one_sentence(call("train_pm.py", "--out", out, *SMALL["train_pm.py"]), "step 205", "nan")
    assert not (out / "lm.pt").exists() and (out / "lm_state.pt").exists()
    assert torch.load(out / "lm_state.pt", weights_only=True)["step"] == 200


def test_nan_in_the_pm(copy, call, monkeypatch):
    out = copy("pm.pt", "policy.pt")
    lm = (out / "lm.pt").read_bytes()
    nan_at(monkeypatch, train_pm, "ranking_loss", 55)
    assert_one_sentence(call("train_rl.py", "--out", out, *SMALL["train_rl.py"]), "step 55", "nan")
    assert not (out / "pm.pt").exists() and (out / "lm.pt").read_bytes() == lm
    assert torch.load(out / "pm_state.pt", weights_only=True)["step"] == 50


@pytest.mark.parametrize("name", ["policy_loss", "value_loss"])
def test_nan_in_rl(trained, copy, call, monkeypatch, name):
    out = copy()
    old = (out / "policy.pt").read_bytes()
    with monkeypatch.context() as patch:
        nan_at(patch, ppo, name, 2 * 2)  # two minibatches an iteration
        assert_one_sentence(call("train_rl.py", "--out", out, *SMALL["train_rl.py"]), "iteration 2", "nan")
    assert (out / "policy.pt").read_bytes() == old
    state = torch.load(out / "rl_state.pt", weights_only=True)
    assert state["iteration"] == 2 and all(w.isfinite().all() for w in state["policy"].values())
    assert call("train_rl.py", "--out", out, *SMALL["train_rl.py"], "--resume").code == 0  # NaN was a passing thing
    assert_same_run(trained[0], out)


@pytest.mark.parametrize("stage, step", [
    *(pytest.param(*case)
      for case in [("lm", 199), ("pm", 5), ("pm", 49), ("pm", -1)]), ("rl", 3), ("rl", 7)])
def test_nan_gradients_never_reach_a_checkpoint(copy, call, monkeypatch, stage, step):
    """The loss is finite, its gradient is not (an overflow in the backward pass). The weights that this spoils must
    not be saved: neither as the next state (after steps 199 and 49), nor as the result (the last step)."""
    final = stage.replace("rl", "policy") + ".pt"
    out = copy(*FINAL[FINAL.index(final):])
    clip, count = torch.nn.utils.clip_grad_norm_, [0]
    step = step if step >= 0 else json.loads(metrics(out)[[json.loads(m)["stage"] for m in metrics(out)].index("rl") - 1]
                                             )["step"] - 1

    def broken(parameters, *args, **kwargs):
        parameters = list(parameters)
        if count[0] == step * (2 if stage == "rl" else 1):  # in RL twice a step: policy and critic
            parameters[0].grad.fill_(float("nan"))
        count[0] += 1
        return clip(parameters, *args, **kwargs)
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", broken)
    # Two minibatches an iteration.
    where = f"iteration {step // 2}" if stage == "rl" else f"step {step}"
    result = call("train_rl.py", "--out", out, *SMALL["train_rl.py"])
    assert not (out / final).exists() and result.code
    if (out / f"{stage}_state.pt").exists():
        state = torch.load(out / f"{stage}_state.pt", weights_only=True)
        assert all(w.isfinite().all() for w in state.get("model", state.get("policy")).values())
    assert_one_sentence(result, where)


# ------------------------------------------------------------------------------ (6) --help


@pytest.mark.parametrize("script, stages", [
    ("train_lm.py", {"": run.RunConfig, "lm.": train_lm.LMConfig}),
    ("train_pm.py", {"": run.RunConfig, "lm.": train_lm.LMConfig, "pm.": train_pm.PMConfig}),
    ("train_rl.py", {"": run.RunConfig, "lm.": train_lm.LMConfig, "pm.": train_pm.PMConfig, "rl.": train_rl.RLConfig})])
def test_help_documents_every_field(call, monkeypatch, script, stages):
    monkeypatch.setenv("COLUMNS", "200")
    result = call(script, "--help")
    assert result.code == 0 and result.err == ""
    # One entry an option: "--name VALUE   help (default: x)", folded; the folds are taken out again.
    entries = dict(re.findall(r"^  (--[\w.-]+)(.*(?:\n {4,}.*)*)", result.out, re.M))
    for prefix, cls in stages.items():
        for field in dataclasses.fields(cls):
            words = entries["--" + prefix + field.name.replace("_", "-")].split()
            text = " ".join(words if field.type is bool else words[1:])
            help_, default = re.fullmatch(r"(.*) \(default: ?(.*)\)", text).groups()
            assert len(help_) >= 4 and default == str(field.default), (field.name, text)


def test_help_in_a_process(tmp_path):
    result = subprocess.run([sys.executable, ROOT / "train_rl.py", "--help"], cwd=tmp_path, env=ENV, capture_output=True,
                            text=True)
    assert result.returncode == 0 and result.stderr == "" and "--rl.kl-coef" in result.stdout
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------ (7) real comparisons


def test_real_path_on_a_tiny_set(tmp_path, call):
    dropped = [{"chosen": GOOD[0]["chosen"], "rejected": GOOD[0]["chosen"]},
               {"chosen": GOOD[1]["chosen"], "rejected": GOOD[1]["chosen"].rsplit(ASSISTANT, 1)[0] + ASSISTANT + " "}]
    root, out = write_set(tmp_path / "set", dropped), tmp_path / "out"
    args = ["--data", root, "--out", out, *REAL]
    result = call("train_pm.py", *args)
    assert result.code == 0, result.err
    for line in ("helpful-base train: read 32, kept 30, dropped 2 (empty reply 1, identical pair 1)",
                 "harmless-base train: read 30, kept 30, dropped 0", "helpful-base test: read 12, kept 12, dropped 0",
                 "harmless-base test: read 12, kept 12, dropped 0"):
        assert line in result.out
    assert "60 comparisons" in result.out and "60 documents" in result.out
    assert re.search(r"held-out (harmless|helpful) *: accuracy .* on n = 12", result.out)

    result = call("train_rl.py", *args, *RL)
    assert result.code == 0, result.err
    assert result.out.count("is there") == 2 and "policy.pt" in result.out
    closing = result.out[result.out.index("held-out prompts"):]
    assert "PM score, red-team prompts" in closing and "true helpfulness" not in closing  # no ground truth here
    assert (out / "policy.pt").exists() and not (out / "comparisons").exists()
    assert "Question h" in (out / "samples.txt").read_text()
    before = files(out)
    (out / "policy.pt").unlink()
    assert call("train_rl.py", *args, *RL).code == 0
    assert files(out)["samples.txt"] == before["samples.txt"]


def test_one_file_as_data(tmp_path, call):
    path = write(tmp_path / "mine.jsonl.gz", rows(80, "mine"))
    result = call("train_pm.py", "--data", path, "--out", tmp_path / "out", *REAL)
    assert result.code == 0, result.err
    kept = [int(n) for n in re.findall(r"mine\.jsonl\.gz (?:train|test): read 80, kept (\d+)", result.out)]
    assert 80 in {a + b for a in kept for b in kept}


def test_default_output_folder(tmp_path, call, monkeypatch):
    """out/<name of the data>-<seed>, below the folder one stands in."""
    monkeypatch.chdir(tmp_path)
    write_set(tmp_path / "my.set")
    assert call("train_lm.py", "--data", "my.set", "--seed", 3, *REAL).code == 0
    assert len(list((tmp_path / "out").iterdir())) == 1
    assert next((tmp_path / "out").iterdir()).name.startswith("my") and (
        next((tmp_path / "out").iterdir()).name.endswith("-3"))


def test_some_rows_of_the_real_data(hh_rlhf_dir, tmp_path, call):
    """A few real rows of each file: real characters, lengths and turns, through all stages."""
    for subset in ("helpful-base", "harmless-base"):
        for split, n in (("train", 24), ("test", 8)):
            with gzip.open(hh_rlhf_dir / subset / f"{split}.jsonl.gz") as file:
                write(tmp_path / "hh" / subset / f"{split}.jsonl", [next(file).strip() for _ in range(n)])
    out = tmp_path / "out"
    result = call("train_rl.py", "--data", tmp_path / "hh", "--out", out, "--tokenizer", "bpe", "--context", 300,
                  "--lm.documents", 30, "--lm.vocab", 500, "--pm.batch", 8, *RL, "--rl.iterations", 2)
    assert result.code == 0, result.err
    assert "helpful-base train: read 24, kept" in result.out and "harmless-base test: read 8, kept" in result.out
    assert "30 documents" in result.out and (out / "policy.pt").exists()
