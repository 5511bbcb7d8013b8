"""Tests of train_lm.py, train_pm.py and train_rl.py, run as a user runs them.

One small run of all five stages is trained once for the session; most cases start from a copy of its folder. True
subprocesses where exit code, traceback or a kill matter; elsewhere the same script runs inside this process
(runpy), which saves the second that importing torch takes.
"""
import dataclasses
import errno
import gzip
import importlib.util
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

import data
import hub
import ppo
import run
import train_lm
import train_pm
import train_rl
from data import ASSISTANT, HUMAN
from model import GPT, GPTConfig

ROOT = Path(train_rl.__file__).resolve().parent
SCRIPTS = ["train_lm.py", "train_pm.py", "train_rl.py"]
ENV = {**os.environ, "TQDM_DISABLE": "1", "OMP_NUM_THREADS": "1"}
# Batches so small that stage 1 takes more than 200 steps and stages 2 to 4 more than 50: each saves its state twice.
LM = "--lm.documents 360 --lm.step-tokens 128 --lm.vocab 640".split()
CD = "--cd.documents 56 --cd.batch 1".split()
PMP = "--pmp.pairs 56 --pmp.batch 1".split()
PM = "--pm.helpful 70 --pm.harmless 30 --pm.test 15 --pm.batch 1".split()
RL = ("--rl.iterations 4 --rl.batch 8 --rl.minibatch 4 --rl.eval-prompts 6 --rl.eval-every 2 --rl.save-every 1 "
      "--rl.max-response 12").split()
SMALL = {"train_lm.py": LM + CD, "train_pm.py": LM + CD + PMP + PM, "train_rl.py": LM + CD + PMP + PM + RL}
FINAL = ["lm.pt", "initial.pt", "pmp.pt", "pm.pt", "policy.pt"]  # what stages 1 to 5 leave
STAGE = dict(zip(["lm", "cd", "pmp", "pm", "rl"], FINAL))
MAKES = {"train_lm.py": "lm.pt", "train_pm.py": "pm.pt", "train_rl.py": "policy.pt"}  # what a script is there for


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


def since(name: str) -> list[str]:
    """A stage's result, and those of all later stages."""
    return FINAL[FINAL.index(name):]


def spoil(path: Path):
    """Make a checkpoint another one, as if trained anew: it loads, and all but one of its weights are the same."""
    content = torch.load(path, weights_only=True)
    next(w for name, w in content["model"].items() if name.endswith("ln_f.bias")).add_(0.125)
    torch.save(content, path)


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
    assert names == {"config.json", "tokenizer.json", "metrics.jsonl", "samples.txt", *FINAL} | {
        f"comparisons/{kind}-base/{split}.jsonl" for kind in ("helpful", "harmless") for split in ("train", "test")}
    assert result.err == ""
    milestones = []
    for stage, name in enumerate(FINAL, start=1):
        missing = [f"{name} is missing, so that stage runs first"] if name != "policy.pt" else []
        milestones += [result.out.index(words) for words in (*missing, f"[{stage}] ", f"-> {out / name}")]
    assert milestones == sorted(milestones)
    for words in ("held-out loss", "held-out KL from", "held-out: accuracy", "held-out harmless: accuracy"):
        assert words in result.out
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
    steps = {stage: [line["step"] for line in lines if line["stage"] == stage] for stage in STAGE}
    assert all(s == sorted(s) for s in steps.values())
    assert steps["lm"][-1] > 210  # or the tests of kills below would not test what they say
    assert min(steps[stage][-1] for stage in ("cd", "pmp", "pm")) > 52
    config = json.loads((out / "config.json").read_text())
    assert config["lm"]["documents"] == 360 and config["rl"]["iterations"] == 4 and config["run"]["seed"] == 0
    assert config["cd"]["documents"] == 56 and config["pmp"]["pairs"] == 56 and config["pm"]["helpful"] == 70


def test_each_stage_rests_on_those_before_it(trained):
    """Read off the weights: what was trained moved, from where it should have started; and the parents are noted."""
    out, w = trained[0], {name: weights(trained[0] / name) for name in FINAL}
    lm, initial, policy = w["lm.pt"], w["initial.pt"], w["policy.pt"]
    pmp, pm = ({k.removeprefix("trunk."): v for k, v in w[name].items()} for name in ("pmp.pt", "pm.pt"))

    def apart(one, two):
        return sum((one[k] - two[k]).square().sum().item() for k in lm) ** 0.5
    assert 0 < apart(initial, lm) and 0 < apart(pmp, lm) and 0 < apart(pm, pmp) < apart(pm, lm)
    assert 0 < apart(policy, initial) < apart(policy, lm)
    parents = {name: torch.load(out / name, weights_only=True)["parents"] for name in FINAL}
    rests_on = {"lm.pt": [], "initial.pt": ["lm.pt"], "pmp.pt": ["lm.pt"], "pm.pt": ["initial.pt", "pmp.pt"],
                "policy.pt": ["initial.pt", "pm.pt"]}
    assert parents == {name: run.file_hash(*(out / parent for parent in rests_on[name])) for name in FINAL}
    assert len(set(parents.values())) == 4


def test_metrics_are_strict_json(copy, call):
    """NaN is no JSON: jq, JavaScript and others stop at it. One held-out prompt leaves a kind without a mean."""
    def refuse(name):
        raise AssertionError(f"{name} in metrics.jsonl")
    out = copy("policy.pt")
    args = ["--out", out, *SMALL["train_rl.py"], "--rl.eval-prompts", 1, "--rl.iterations", 1]
    assert call("train_rl.py", *args).code == 0
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
    assert result.code == 0 and result.out.count("is there") == 4 and "runs first" not in result.out
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
    """Every stage depends on the seed: the LM; and, on top of one and the same LM, the other four."""
    for seed in (0, 1):
        args = ["--out", tmp_path / str(seed), *LM, "--lm.documents", 40, "--cd.documents", 0, "--seed", seed]
        assert call("train_lm.py", *args).code == 0
    assert not set(metrics(tmp_path / "0")) & set(metrics(tmp_path / "1"))
    assert not torch.equal(*(weights(tmp_path / str(seed) / "lm.pt")["positions.weight"] for seed in (0, 1)))

    out = copy(*since("initial.pt"))
    config = (out / "config.json").read_text()
    assert config.count('"seed": 0') == 1
    (out / "config.json").write_text(config.replace('"seed": 0', '"seed": 1'))
    assert call("train_rl.py", "--out", out, "--seed", 1, *SMALL["train_rl.py"]).code == 0
    differing = set(metrics(out)) ^ set(metrics(trained[0]))
    assert all(line in differing for line in metrics(out) if '"stage": "lm"' not in line)
    for name in since("initial.pt"):
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


def test_killed_in_every_stage_and_resumed(trained, tmp_path, call, monkeypatch, capsys):
    """A real SIGKILL in stage 1, then a death in the middle of each stage; the result is that of an undisturbed run."""
    out, args = tmp_path / "killed", ["--out", tmp_path / "killed", *SMALL["train_rl.py"]]
    process = subprocess.Popen([sys.executable, "train_rl.py", *map(str, args)], cwd=ROOT, env=ENV,
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not (out / "lm_state.pt").exists() and process.poll() is None:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL and not (out / "lm.pt").exists()

    resumed = "[1] "  # what a command says of the stage that died in the one before
    for (stage, name), then in zip(STAGE.items(), ("from step 200", *["from step 50"] * 3, "from iteration 1")):
        with monkeypatch.context() as patch:
            # Two are saved before the first step, the first of them empty; of stage 1 that was before the SIGKILL.
            kill_at(patch, f"{stage}_state.pt", 2 if stage == "lm" else 3)
            with pytest.raises(Killed):
                call("train_rl.py", *args, "--resume")
        said = capsys.readouterr().out
        assert resumed in said and (out / f"{stage}_state.pt").exists() and not (out / name).exists(), (stage, said)
        resumed = then
    result = call("train_rl.py", *args, "--resume")
    assert result.code == 0 and "from iteration 1" in result.out and result.out.count("is there") == 4
    assert not list(out.glob("*_state.pt")) and not list(out.rglob("*.tmp"))
    assert_same_run(trained[0], out)


@pytest.mark.parametrize("k, before", [(4, True), (5, False)])
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
    assert result.code == 0 and f"from iteration {k - 2 - before}" in result.out
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


@pytest.mark.parametrize("stage", STAGE)
def test_resume_with_other_options_is_refused(copy, call, monkeypatch, stage):
    out = copy(*since(STAGE[stage]))
    with monkeypatch.context() as patch:
        kill_at(patch, f"{stage}_state.pt", 1)
        with pytest.raises(Killed):
            call("train_rl.py", "--out", out, *SMALL["train_rl.py"])
    before = files(out)
    result = call("train_rl.py", "--out", out, *SMALL["train_rl.py"], "--resume", f"--{stage}.lr", "1e-5")
    assert_one_sentence(result, out, f"--{stage}.lr")
    assert files(out) == before


def test_resume_does_not_mix_in_comparisons_of_other_options(copy, call, monkeypatch):
    """Killed after the comparisons were labelled, before the PM's first state: there is nothing to go on from but
    these files, and with other options (here another temperature of the crowdworkers) they are wrong."""
    out = copy(*since("pm.pt"))
    with monkeypatch.context() as patch:
        kill_at(patch, "test.jsonl", 2)
        with pytest.raises(Killed):
            call("train_pm.py", "--out", out, *SMALL["train_pm.py"])
    result = call("train_pm.py", "--out", out, *SMALL["train_pm.py"], "--pm.noise", 5, "--pm.helpful", 40, "--resume")
    assert result.code or "sampled helpful train: read 40" in result.out, result.out


@pytest.mark.parametrize("script, option, value", [
    ("train_lm.py", "--lm.vocab", 500), ("train_pm.py", "--lm.lr", 1e-4), ("train_rl.py", "--lm.documents", 400),
    ("train_pm.py", "--cd.lr", 1e-4), ("train_rl.py", "--cd.documents", 0), ("train_pm.py", "--pmp.pairs", 0),
    ("train_rl.py", "--pm.noise", 3), ("train_rl.py", "--pm.lr", 1e-4)])
def test_other_options_of_a_finished_stage_are_not_ignored_in_silence(copy, call, script, option, value):
    """What earlier stages leave is there, made with other options than now asked for: say so, or make it anew."""
    out = copy(*since(MAKES[script]))
    small = [*SMALL[script], *("--lm.documents 60 --cd.documents 0".split() if script == "train_lm.py" else ())]
    result = call(script, "--out", out, *small, option, value)
    if option == "--lm.vocab" and result.code == 0:
        assert len(json.loads((out / "tokenizer.json").read_text())["tokens"]) + 2 == value
    else:
        told = result.out + result.err
        assert option in told or "other options" in told or "other --" in told or "runs first" in told, told[:600]


def test_a_new_lm_makes_the_old_pm_invalid(copy, call):
    """train_lm.py over a finished folder: pm.pt was made from, and for, another LM."""
    out, short = copy("policy.pt"), "--lm.documents 50 --cd.documents 0".split()
    assert call("train_lm.py", "--out", out, *SMALL["train_lm.py"], *short).code == 0
    result = call("train_rl.py", "--out", out, *SMALL["train_rl.py"], *short)
    assert result.code or "pm.pt is there" not in result.out, result.out[:400]


@pytest.mark.parametrize("changed, missing", [
    ("lm.pt", ["pmp.pt", "pm.pt", "policy.pt"]), ("lm.pt", ["initial.pt", "pm.pt", "policy.pt"]),
    ("lm.pt", ["pm.pt", "policy.pt"]), ("initial.pt", ["policy.pt"]), ("pmp.pt", ["policy.pt"])])
def test_what_rests_on_another_checkpoint_is_not_used(copy, call, changed, missing):
    """E.g. lm.pt was made anew and initial.pt was not. What is missing is made, and then there is one sentence."""
    out = copy(*missing)
    spoil(out / changed)
    result = call("train_rl.py", "--out", out, *SMALL["train_rl.py"])
    assert result.code and not (out / "policy.pt").exists()
    assert_one_sentence(result, out / changed)


@pytest.mark.parametrize("stage, changed", [
    ("cd", "lm.pt"), ("pmp", "lm.pt"), ("pm", "initial.pt"), ("pm", "pmp.pt"), ("rl", "initial.pt"), ("rl", "pm.pt")])
def test_a_state_that_rests_on_another_checkpoint_is_not_resumed(copy, call, monkeypatch, stage, changed):
    out = copy(*since(STAGE[stage]))
    with monkeypatch.context() as patch:
        kill_at(patch, f"{stage}_state.pt", 2)
        with pytest.raises(Killed):
            call("train_rl.py", "--out", out, *SMALL["train_rl.py"])
    spoil(out / changed)
    result = call("train_rl.py", "--out", out, *SMALL["train_rl.py"], "--resume")
    assert result.code and (out / f"{stage}_state.pt").exists() and not (out / STAGE[stage]).exists()
    assert_one_sentence(result, out / changed)


@pytest.mark.parametrize("script, changed, stale", [
    ("train_lm.py", "lm.pt", "initial.pt"), ("train_pm.py", "initial.pt", "pm.pt"), ("train_rl.py", "pm.pt", "policy.pt")])
def test_a_result_that_rests_on_another_checkpoint_is_not_complete(copy, call, script, changed, stale):
    """--resume has nothing to resume, but what is there was not trained from what is there."""
    out = copy()
    spoil(out / changed)
    assert_one_sentence(call(script, "--out", out, *SMALL[script], "--resume"), out / stale, out / changed)


def test_resume_of_a_finished_stage_names_other_options(copy, call):
    result = call("train_rl.py", "--out", copy(), *SMALL["train_rl.py"], "--resume", "--rl.iterations", 9)
    assert result.code == 0 and "in spite of --rl.iterations was 4, now 9" in result.out


def test_stopped_before_the_first_step(copy, call, monkeypatch):
    """Trained anew over a finished folder, with other options, and stopped while the comparisons are sampled: the old
    PM is not taken for the new one."""
    out, args = copy(), [*SMALL["train_rl.py"], "--pm.helpful", 40]
    with monkeypatch.context() as patch:
        kill_at(patch, "train.jsonl", 1)
        with pytest.raises(Killed):
            call("train_pm.py", "--out", out, *SMALL["train_pm.py"], "--pm.helpful", 40)
    result = call("train_rl.py", "--out", out, *args)
    assert result.code == 0 and "pm.pt is unfinished" in result.out and "sampled helpful train: read 40" in result.out


def test_distillation_that_is_left_out_after_all(copy, call, monkeypatch):
    """Killed in stage 2, then asked for --cd.documents 0: nothing of the first attempt is left."""
    out = copy(*since("initial.pt"))
    with monkeypatch.context() as patch:
        kill_at(patch, "cd_state.pt", 1)
        with pytest.raises(Killed):
            call("train_pm.py", "--out", out, *SMALL["train_pm.py"])
    args = ["--out", out, *SMALL["train_pm.py"], "--cd.documents", 0, "--pmp.pairs", 0]
    result = call("train_pm.py", *args)
    assert result.code == 0 and "[2] context distillation: none" in result.out
    assert "[3] preference-model pretraining: none" in result.out
    lm, initial = weights(out / "lm.pt"), weights(out / "initial.pt")
    assert all(torch.equal(lm[k], initial[k]) for k in lm) and not list(out.glob("*_state.pt"))
    result = call("train_pm.py", *args)
    assert result.code == 0 and result.out.count("is there and used as it is") == 3, result.out


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
REAL = "--tokenizer bpe --context 160 --lm.vocab 400 --lm.step-tokens 1000 --cd.documents 0".split()


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
                    ("--lm.lr", "-1"), ("--lm.max-grad-norm", "-1"), ("--lm.weight-decay", "-1"),
                    ("--cd.documents", "-1"), ("--cd.batch", "0"), ("--cd.top", "0"), ("--cd.lr", "nan"),
                    ("--cd.max-grad-norm", "0")],
    "train_pm.py": [("--pm.helpful", "-1"), ("--pm.harmless", "-1"), ("--pm.test", "0"), ("--pm.noise", "0"),
                    ("--pm.noise", "-1"), ("--pm.max-response", "0"), ("--pm.max-response", "500"), ("--pm.batch", "0"),
                    ("--pm.lr", "nan"), ("--pm.lr", "-1"), ("--pm.warmup", "-1"), ("--pm.token-budget", "-1"),
                    ("--pm.harmless-weight", "-1"), ("--pmp.pairs", "-1"), ("--pmp.batch", "0"), ("--pmp.lr", "inf"),
                    ("--pmp.warmup", "-1"), ("--pmp.token-budget", "-1"), ("--pmp.max-grad-norm", "0")],
    "train_rl.py": [("--rl.iterations", "-1"), ("--rl.batch", "0"), ("--rl.batch", "-1"), ("--rl.minibatch", "0"),
                    ("--rl.passes", "0"), ("--rl.max-response", "0"), ("--rl.max-response", "-1"),
                    ("--rl.max-response", "185"), ("--rl.lr", "nan"), ("--rl.lr", "-1"), ("--rl.critic-lr", "-1"),
                    ("--rl.warmup", "-1"), ("--rl.clip", "-0.1"), ("--rl.value-clip", "-0.1"), ("--rl.kl-coef", "-1"),
                    ("--rl.gamma", "1.5"), ("--rl.gae-lambda", "1.5"), ("--rl.temperature", "0"),
                    ("--rl.temperature", "-1"), ("--rl.token-budget", "-1"), ("--rl.harmless-share", "2"),
                    ("--rl.harmless-share", "-1"), ("--rl.eval-every", "0"), ("--rl.eval-prompts", "0"),
                    ("--rl.save-every", "0"), ("--rl.slots", "-1")],
}


@pytest.mark.parametrize("script, option, value", [
    (s, *case) for s in SCRIPTS for case in NUMBERS[s]])
def test_impossible_number(copy, tmp_path, call, script, option, value):
    """One sentence that names the option, before anything is trained; the same command corrected then works."""
    out = tmp_path / "out" if script == "train_lm.py" else copy(*since(MAKES[script]))
    result = call(script, "--out", out, *SMALL[script], option, value)
    assert_one_sentence(result, option, value)
    assert not (out / MAKES[script]).exists()


@pytest.mark.parametrize("script, option", [
    ("train_lm.py", "--lm.warmup"), ("train_lm.py", "--cd.documents"),
    ("train_pm.py", "--pmp.pairs"), ("train_pm.py", "--pmp.warmup"),
    ("train_pm.py", "--pm.warmup"), ("train_pm.py", "--pm.token-budget"), ("train_pm.py", "--pm.harmless"),
    ("train_pm.py", "--pm.helpful"), ("train_pm.py", "--pm.harmless-weight"), ("train_rl.py", "--rl.warmup"),
    ("train_rl.py", "--rl.harmless-share"), ("train_rl.py", "--rl.kl-coef"), ("train_rl.py", "--rl.slots")])
def test_zero_is_a_number(copy, tmp_path, call, script, option):
    """No warm-up, one kind of comparison only, no KL penalty, a stage left out: sensible wishes."""
    out = tmp_path / "out" if script == "train_lm.py" else copy(*since("pmp.pt" if "pmp" in option else MAKES[script]))
    small = [*SMALL[script], *("--lm.documents 50 --cd.documents 4".split() if script == "train_lm.py" else ())]
    result = call(script, "--out", out, *small, option, "0")
    assert result.code == 0, result.err
    assert (out / MAKES[script]).exists()


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
    other_config = {**good["config"], "d_model": 96}
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


@pytest.mark.parametrize("script, name", [
    ("train_pm.py", "lm.pt"), ("train_pm.py", "initial.pt"), ("train_pm.py", "pmp.pt"),
    ("train_rl.py", "initial.pt"), ("train_rl.py", "pm.pt")])
def test_broken_checkpoint(copy, call, script, name):
    out = copy(*since("pmp.pt" if name == "lm.pt" else MAKES[script]))
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
        if (out / MAKES[script]).exists():
            wrong[what] = "was accepted"
            (out / MAKES[script]).unlink()
    assert not wrong


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("script, name", [
    ("train_pm.py", "lm.pt"), ("train_pm.py", "initial.pt"), ("train_pm.py", "pmp.pt"), ("train_rl.py", "pm.pt"),
    *(("train_rl.py", f"{stage}_state.pt") for stage in STAGE)])
def test_code_in_a_checkpoint_is_not_run(copy, tmp_path, call, script, name):
    out = copy(*since("pmp.pt" if name == "lm.pt" else MAKES[script]))
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
    contents = {"truncated": raw[:1000], "of another kind": (out / "lm.pt").read_bytes(), "empty": b""}
    for what, content in contents.items():
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
        fill_disk(patch, "rl_state.pt", 5)
        assert_one_sentence(call("train_rl.py", *args), out / "rl_state.pt", "No space left")
    result = call("train_rl.py", *args, "--resume")
    assert result.code == 0 and "from iteration 2" in result.out
    assert_same_run(trained[0], out)


@pytest.mark.parametrize("name", FINAL + ["samples.txt", "metrics.jsonl", "config.json"])
def test_full_disk_keeps_the_last_checkpoint(copy, call, monkeypatch, name):
    script = dict(zip(FINAL, ("train_lm.py", "train_lm.py", "train_pm.py", "train_pm.py"))).get(name, "train_rl.py")
    out = copy()
    before = (out / name).read_bytes()
    if name == "pmp.pt":
        (out / "pmp_state.pt").touch()  # or what is there would be used
    # Shorter stages 1 and 2: only whether they end well matters here.
    short = "--lm.documents 50 --cd.documents 4".split() if script == "train_lm.py" else []
    with monkeypatch.context() as patch:
        fill_disk(patch, name, 1)
        result = call(script, "--out", out, *SMALL[script], *short)
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
    out = copy(*since("pm.pt"))
    (out / "lm.pt").rename(out / "kept.pt")
    nan_at(monkeypatch, train_lm, "lm_loss", 205)
    # Through train_pm.py, which trains the missing LM by the module that is patched here.
    assert_one_sentence(call("train_pm.py", "--out", out, *SMALL["train_pm.py"]), "step 205", "nan")
    assert not (out / "lm.pt").exists() and (out / "lm_state.pt").exists()
    assert torch.load(out / "lm_state.pt", weights_only=True)["step"] == 200


@pytest.mark.parametrize("stage, module, loss", [
    ("cd", train_lm, "distillation_loss"), ("pmp", train_pm, "ranking_loss"), ("pm", train_pm, "ranking_loss")])
def test_nan_in_stages_2_to_4(copy, call, monkeypatch, stage, module, loss):
    out = copy(*since(STAGE[stage]))
    earlier = {name: (out / name).read_bytes() for name in FINAL if (out / name).exists()}
    nan_at(monkeypatch, module, loss, 51)
    assert_one_sentence(call("train_rl.py", "--out", out, *SMALL["train_rl.py"]), "step 51", "nan")
    assert earlier and {name: (out / name).read_bytes() for name in FINAL if (out / name).exists()} == earlier
    assert torch.load(out / f"{stage}_state.pt", weights_only=True)["step"] == 50


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
    ("lm", 199), ("cd", 49), ("cd", -1), ("pmp", 49), ("pmp", -1), ("pm", 5), ("pm", 49), ("pm", -1),
    ("rl", 3), ("rl", 7)])
def test_nan_gradients_never_reach_a_checkpoint(copy, call, monkeypatch, stage, step):
    """The loss is finite, its gradient is not (an overflow in the backward pass). The weights that this spoils must
    not be saved: neither as the next state (after steps 199 and 49), nor as the result (the last step)."""
    out = copy(*since(STAGE[stage]))
    clip, count = torch.nn.utils.clip_grad_norm_, [0]
    written = [json.loads(line) for line in metrics(out)]  # the last line of stages 2 to 4 comes after the last step
    step = step if step >= 0 else max(line["step"] for line in written if line["stage"] == stage) - 1

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
    assert not (out / STAGE[stage]).exists() and result.code
    if (out / f"{stage}_state.pt").exists():
        state = torch.load(out / f"{stage}_state.pt", weights_only=True)
        assert all(w.isfinite().all() for w in state.get("model", state.get("policy")).values())
    assert_one_sentence(result, where)


# ------------------------------------------------------------------------------ (6) --help


OPTIONS = {"": run.RunConfig, "lm.": train_lm.LMConfig, "cd.": train_lm.CDConfig, "pmp.": train_pm.PMPConfig,
           "pm.": train_pm.PMConfig, "rl.": train_rl.RLConfig}


@pytest.mark.parametrize("script, n", [("train_lm.py", 3), ("train_pm.py", 5), ("train_rl.py", 6)])
def test_help_documents_every_field(call, monkeypatch, script, n):
    monkeypatch.setenv("COLUMNS", "200")
    result = call(script, "--help")
    assert result.code == 0 and result.err == ""
    # One entry an option: "--name VALUE   help (default: x)", folded; the folds are taken out again.
    entries = dict(re.findall(r"^  (--[\w.-]+)(.*(?:\n {4,}.*)*)", result.out, re.M))
    for prefix, cls in list(OPTIONS.items())[:n]:
        for field in dataclasses.fields(cls):
            words = entries["--" + prefix + field.name.replace("_", "-")].split()
            text = " ".join(words if field.type is bool else words[1:])
            help_, default = re.fullmatch(r"(.*) \(default: ?(.*)\)", text).groups()
            assert len(help_) >= 4 and default == str(field.default), (field.name, text)


def test_help_in_a_process(tmp_path):
    result = subprocess.run([sys.executable, ROOT / "train_rl.py", "--help"], cwd=tmp_path, env=ENV,
                            capture_output=True, text=True)
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
    assert "[2] context distillation: none" in result.out
    assert "[3] preference-model pretraining: none, no --pmp.data is given" in result.out
    for line in ("helpful-base train: read 32, kept 30, dropped 2 (empty reply 1, identical pair 1)",
                 "harmless-base train: read 30, kept 30, dropped 0", "helpful-base test: read 12, kept 12, dropped 0",
                 "harmless-base test: read 12, kept 12, dropped 0"):
        assert line in result.out
    assert "60 comparisons" in result.out and "60 documents" in result.out
    assert re.search(r"held-out (harmless|helpful) *: accuracy .* on n = 12", result.out)

    result = call("train_rl.py", *args, *RL)
    assert result.code == 0, result.err
    assert result.out.count("is there") == 4 and "policy.pt" in result.out
    closing = result.out[result.out.index("held-out prompts"):]
    assert "PM score, red-team prompts" in closing and "true helpfulness" not in closing  # no ground truth here
    assert (out / "policy.pt").exists() and not (out / "comparisons").exists()
    assert "Question h" in (out / "samples.txt").read_text()
    before = files(out)
    (out / "policy.pt").unlink()
    assert call("train_rl.py", *args, *RL).code == 0
    assert files(out)["samples.txt"] == before["samples.txt"]


def test_pretraining_on_a_file_of_comparisons(tmp_path, call):
    root, cheap = write_set(tmp_path / "set"), write(tmp_path / "cheap.jsonl", rows(80, "cheap"))
    args = ["--data", root, "--out", tmp_path / "out", *REAL]
    assert call("train_pm.py", *args).code == 0
    for option, times in ((), 1), (["--pmp.binarised"], 2):  # each comparison is two questions, or one
        (tmp_path / "out" / "pmp.pt").unlink()
        result = call("train_pm.py", *args, "--pmp.data", cheap, *option)
        assert result.code == 0, result.err
        assert "runs first" in result.out and f"[3] preference-model pretraining: {cheap}" in result.out
        found = [int(n) for n in re.findall(r"cheap\.jsonl (?:train|test): read 80, kept (\d+)", result.out)]
        kept, held_out = found[0], 80 - found[0]
        assert f"    {times * kept} comparisons" in result.out
        # A small file may have no row whose first question is held out; that is said, and no reason to stop.
        assert (f"on n = {times * held_out}," if held_out else "not measured on held-out") in result.out
    (tmp_path / "out" / "pmp.pt").unlink()
    assert_one_sentence(call("train_pm.py", *args, "--pmp.data", tmp_path / "typo"), tmp_path / "typo")


def test_some_subsets_only(tmp_path, call):
    root, out = write_set(tmp_path / "set"), ["--out", tmp_path / "out", *REAL]
    for script in SCRIPTS:
        result = call(script, "--data", root, "--subsets", "helpful-base,harmfull-base", *out)
        assert_one_sentence(result, "'harmfull-base'", "harmless-base, helpful-base")
        assert result.code == 2
    result = call("train_rl.py", "--data", root, "--subsets", " harmless-base ,", *out, *RL)
    assert result.code == 0, result.err
    assert "30 documents" in result.out and "30 comparisons" in result.out and "helpful-base" not in result.out
    assert "Question harmless-base" in (tmp_path / "out" / "samples.txt").read_text()
    assert_one_sentence(call("train_rl.py", "--data", root, *out, *RL), tmp_path / "out", "subsets")
    assert_one_sentence(call("train_lm.py", "--subsets", "helpful-base", "--out", tmp_path / "toy"), "--subsets")
    assert not (tmp_path / "toy").exists()


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
                  "--lm.documents", 30, "--lm.vocab", 500, "--cd.documents", 0, "--pm.batch", 8,
                  *RL, "--rl.iterations", 2)
    assert result.code == 0, result.err
    assert "helpful-base train: read 24, kept" in result.out and "harmless-base test: read 8, kept" in result.out
    assert "30 documents" in result.out and (out / "policy.pt").exists()


# ------------------------------------------------------------------------------ (8) a GPT-2 from a folder


@pytest.fixture(params=["small", "gpt2"])
def pretrained(request, tmp_path, monkeypatch) -> tuple[Path, data.Tokenizer]:
    """A folder with random weights in GPT-2's format, and its encoding: a small one, or GPT-2's own."""
    if request.param == "gpt2":
        tok = request.getfixturevalue("gpt2")
    else:
        tok = data.train_bpe([row["chosen"] for row in rows(200, "tokens")], 400)
        for module in (data, train_lm):
            monkeypatch.setattr(module, "gpt2_tokenizer", lambda: tok)
    torch.manual_seed(0)
    gpt = GPT(GPTConfig(2, 1, 64, vocab_size=tok.n_tokens - 1, context=256))  # it does not know <|endofcontext|>
    hub.export_gpt2(gpt, tmp_path / "gpt2", tok)
    return tmp_path / "gpt2", tok


INIT = "--context 250 --pmp.batch 8 --pm.batch 8 --cd.documents 6 --cd.batch 3".split()


def test_a_gpt2_through_all_stages(tmp_path, call, pretrained, monkeypatch):
    folder, tok = pretrained
    if tok.name == "bpe":  # a small encoding makes more tokens of the prompt than fit here
        monkeypatch.setattr(train_lm, "HHH_PROMPT", f"{HUMAN} Hello.{ASSISTANT} Hello! How can I help?")
    root, out, export = write_set(tmp_path / "set"), tmp_path / "out", tmp_path / "export"
    args = ["--data", root, "--out", out, "--init", folder, *INIT, "--pmp.data", root]
    result = call("train_pm.py", *args)
    assert result.code == 0, result.err
    assert f"parameters from {folder}" in result.out and "[2] context distillation: 6 documents" in result.out
    assert f"[3] preference-model pretraining: {root}" in result.out
    given, lm = hub.load_gpt2(folder, tok.n_vocab, 250).state_dict(), weights(out / "lm.pt")
    assert lm.keys() == given.keys() and all(torch.equal(lm[k], given[k]) for k in lm)
    assert lm["embed.weight"].shape == (tok.n_vocab, 64) and lm["positions.weight"].shape == (250, 64)
    assert not torch.equal(weights(out / "initial.pt")["embed.weight"], lm["embed.weight"])

    result = call("train_rl.py", *args, *RL, "--rl.iterations", 2, "--export", export)
    assert result.code == 0, result.err
    assert result.out.count("is there and used as it is") == 4 and "in spite of" not in result.out
    assert str(export) in result.out
    # Prompts of several human turns came by.
    assert any(text.count(HUMAN) > 1 for text in (out / "samples.txt").read_text().split("RLHF:"))
    policy, exported = weights(out / "policy.pt"), hub.load_gpt2(export, tok.n_vocab)
    assert exported.cfg == GPTConfig(2, 1, 64, tok.n_vocab, 250)
    assert policy.keys() == exported.state_dict().keys()
    assert all(torch.equal(policy[k], w) for k, w in exported.state_dict().items())
    if importlib.util.find_spec("transformers"):
        import transformers
        theirs = transformers.AutoModelForCausalLM.from_pretrained(export)
        ids = torch.tensor([tok.encode_dialogue(f"{HUMAN} Hi.{ASSISTANT} Hello.{HUMAN} How do I make tea?{ASSISTANT}")])
        with torch.no_grad():
            assert torch.allclose(theirs(ids).logits, exported.logits(exported(ids)), atol=1e-4)
        theirs = transformers.AutoTokenizer.from_pretrained(export)
        assert theirs.encode(" How do I make tea?") == tok.encode(" How do I make tea?")

    # A finished run is exported without training it again; what is exported can be started from.
    before = (out / "policy.pt").read_bytes()
    result = call("train_rl.py", *args, *RL, "--rl.iterations", 2, "--export", tmp_path / "later", "--resume")
    assert result.code == 0 and "nothing to resume" in result.out and (out / "policy.pt").read_bytes() == before
    assert files(tmp_path / "later") == files(export)
    result = call("train_lm.py", "--data", root, "--out", tmp_path / "on", "--init", export, "--context", 200,
                  "--cd.documents", 0)
    assert result.code == 0 and torch.equal(weights(tmp_path / "on" / "lm.pt")["embed.weight"], policy["embed.weight"])


@pytest.mark.parametrize("pretrained", ["small"], indirect=True)
def test_init_that_cannot_be(tmp_path, call, pretrained):
    folder, tok = pretrained
    root, out = write_set(tmp_path / "set"), tmp_path / "out"
    hub.export_gpt2(GPT(GPTConfig(2, 1, 64, vocab_size=tok.n_tokens + 200, context=256)), tmp_path / "other", tok)
    (tmp_path / "empty").mkdir()
    for script in SCRIPTS:
        for option, words in {
            ("--init", tmp_path / "typo"): [tmp_path / "typo"],
            ("--init", tmp_path / "empty"): [tmp_path / "empty", "model.safetensors"],
            ("--init", root / "helpful-base" / "train.jsonl.gz"): ["train.jsonl.gz"],
            ("--init", tmp_path / "other"): [tmp_path / "other", "vocabulary"],
            ("--init", folder, "--context", 257): [folder, "256 positions", "257"],
            ("--init", folder): [folder, "256 positions", "512"],  # the default for real data
            ("--init", folder, "--tokenizer", "bpe"): ["--init", "--tokenizer bpe"],
            ("--init", folder, "--data", "toy"): ["--init", "toy"],
        }.items():
            result = call(script, "--data", root, "--out", out, "--cd.documents", 0, *option)
            assert_one_sentence(result, *words)
            assert result.code == 2 and not out.exists(), option


@pytest.mark.parametrize("pretrained", ["small"], indirect=True)
def test_a_folder_made_with_init(tmp_path, call, pretrained):
    """Its options are held against later ones, and its lm.pt, which says the shape of all models, is not trusted."""
    folder, tok = pretrained
    root, out = write_set(tmp_path / "set"), tmp_path / "out"
    args = ["--data", root, "--out", out, "--context", 160, "--cd.documents", 0]
    assert call("train_lm.py", *args, "--init", folder).code == 0
    before = files(out)
    for other in ([], ["--init", tmp_path / "another"], ["--init", folder, "--context", 100]):
        assert_one_sentence(call("train_pm.py", *args, *other), out)
    assert files(out) == before
    good, wrong = torch.load(out / "lm.pt", weights_only=True), {}
    for what, content in [*broken_checkpoints(out, "lm.pt"), ("no shape", {"model": {}}),
                          ("a shape of text", {**good, "config": "12 layers"})]:
        (out / "lm.pt").unlink()
        (out / "lm.pt").write_bytes(content) if isinstance(content, bytes) else torch.save(content, out / "lm.pt")
        try:
            assert_one_sentence(call("train_pm.py", *args, "--init", folder), out / "lm.pt")
        except Exception as error:
            wrong[what] = repr(error)
        except AssertionError as error:
            wrong[what] = str(error)[:200]
    assert not wrong


def test_a_policy_of_the_toy_world_can_be_exported(copy, tmp_path, call):
    out = copy()
    args = ["--out", out, *SMALL["train_rl.py"], "--resume", "--export"]
    assert call("train_rl.py", *args, tmp_path / "export").code == 0
    policy = weights(out / "policy.pt")
    exported = hub.load_gpt2(tmp_path / "export", len(policy["embed.weight"])).state_dict()
    assert all(torch.equal(policy[k], exported[k]) for k in policy)
    before = files(out)  # a run's own folder has a config.json and a tokenizer.json of its own
    assert_one_sentence(call("train_rl.py", *args, out), out)
    assert files(out) == before
