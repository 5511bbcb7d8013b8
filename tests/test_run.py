"""Tests of run.py, stage.py and pipeline.py: options, files, and the life of a stage.

The stages here train four numbers each, so that they can die at every file that they write."""
import dataclasses
import errno
import io
import json
import math
import os
import pickle
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import pipeline
import run as general
import stage as stages
from data import train_bpe
from memory import StageMemory
from model import GPT, SIZES, GPTConfig
from pipeline import PIPELINE, PRESETS, RULES, Run, RunConfig, check_choices
from pm import ScalarModel
from run import (TrainingError, UserError, check_finite, check_is_file, file_hash, first_sentence,
                 flag, load, read_text, rng, save, torch_rng)
from stage import Folder
from tournament import EloConfig
from train_lm import CDConfig, LMConfig
from train_online import OnlineConfig
from train_pm import PMConfig, PMPConfig
from train_rl import RLConfig
from rankings import RMConfig
from train_sft import SelectConfig, SFTConfig

CONFIGS = {"run": RunConfig, "lm": LMConfig, "cd": CDConfig, "pmp": PMPConfig, "pm": PMConfig,
           "rl": RLConfig, "sft": SFTConfig, "rm": RMConfig, "select": SelectConfig,
           "online": OnlineConfig, "elo": EloConfig}
FIELDS = {f"{prefix}.{field.name}": field
          for prefix, config in CONFIGS.items() for field in dataclasses.fields(config)}


# ---- 1. Options --------------------------------------------------------------


@pytest.fixture
def parse(monkeypatch):
    def parse(*args, configs=CONFIGS):
        monkeypatch.setattr(sys, "argv", ["train.py", *map(str, args)])
        return general.options("What it does.", configs, presets=PRESETS, **RULES)
    return parse


def value_of(parsed: dict, name: str):
    return getattr(parsed[name.split(".")[0]], name.split(".")[1])


# What is allowed besides numbers above 0, written out again.
ZERO_IS_FINE = """run.seed run.context lm.warmup lm.weight_decay cd.documents pmp.pairs pmp.warmup
    pmp.token_budget pm.comparisons pm.helpful pm.harmless pm.warmup pm.harmless_weight
    pm.token_budget rl.warmup rl.kl_coef rl.gamma rl.gae_lambda rl.unfinished_penalty rl.slots
    rl.token_budget rl.harmless_share rl.model_prompts rl.ptx_coef rl.ema sft.dropout
    sft.pretraining rm.token_budget online.helpful online.harmless""".split()
AT_MOST_ONE = ["rl.gamma", "rl.gae_lambda", "rl.harmless_share", "rl.model_prompts", "rl.ema",
               "sft.dropout", "sft.pretraining"]


@pytest.mark.parametrize("name", [n for n, field in FIELDS.items() if field.type in (int, float)])
def test_range_of_each_number(parse, name):
    kind, configs = FIELDS[name].type, {name.split(".")[0]: CONFIGS[name.split(".")[0]]}
    bad, words = [-1], "must be above 0"
    if kind is float:
        bad += [-0.01, float("nan"), float("inf")]
    if name in ZERO_IS_FINE:
        assert value_of(parse(flag(name), 0, configs=configs), name) == 0
        words = "must be at least 0"
    else:
        bad.append(0)
    if name in AT_MOST_ONE:
        bad.append(1.01)
        words += " and at most 1"
    for value in bad:
        said = words if math.isfinite(value) else "must be a finite number"
        with pytest.raises(UserError, match=f"^{flag(name)} {kind(value)}: {said}$"):
            parse(f"{flag(name)}={value}", configs=configs)
    assert value_of(parse(flag(name), 1, configs=configs), name) == 1
    if kind is int and name != "run.seed":
        assert value_of(parse(flag(name), 10**9, configs=configs), name) == 10**9
        with pytest.raises(UserError, match=f"^{flag(name)} {10**9 + 1}: must be at most 1,000,0"):
            parse(flag(name), 10**9 + 1, configs=configs)
    elif name == "run.seed":
        assert value_of(parse(flag(name), 10**12, configs=configs), name) == 10**12


def default_of(field):
    return [] if field.type is list else field.default


def test_an_option_that_may_be_repeated_has_two_names(parse):
    assert parse("--comparisons", "a", "--pm.people", "b")["pm"].people == ["a", "b"]
    assert parse("--preset", "tiny", "--comparisons", "a")["pm"].people == ["a"]
    assert parse()["pm"].people == []  # no list is shared


@pytest.mark.parametrize("preset", PRESETS)
def test_presets(parse, preset):
    parsed = parse("--preset", preset)
    for name, field in FIELDS.items():
        expected = PRESETS[preset].get(name, preset if name == "run.preset" else default_of(field))
        assert value_of(parsed, name) == expected, name
    assert set(PRESETS[preset]) <= set(FIELDS) and parse("--resume")["run"].resume
    check_choices(parsed["run"], can_export=False)
    if preset.endswith("-hh"):  # the paper's multiples of the rates in GPT-3's table
        assert parsed["run"].init + "-hh" == preset and parsed["run"].data == "hh-rlhf"
        rate = {"gpt2": 6e-4, "gpt2-medium": 3e-4}[parsed["run"].init]
        for stage, multiple in {"cd": 0.05, "pmp": 0.1, "pm": 0.01, "rl": 0.01}.items():
            assert parsed[stage].lr == pytest.approx(multiple * rate)
    # An option that is given wins, even where it is given its default; others stay the preset's.
    parsed = parse("--rl.iterations", RLConfig.iterations, "--preset", preset, "--seed", 3)
    assert parsed["rl"].iterations == RLConfig.iterations and parsed["run"].seed == 3
    some = {"run": RunConfig, "lm": LMConfig, "cd": CDConfig}  # a command of two stages
    assert parse("--preset", preset, configs=some)["lm"] == parse("--preset", preset)["lm"]
    with pytest.raises(UserError, match="--preset huge: choose one of tiny, gpt2-hh"):
        parse("--preset", "huge")


@pytest.mark.parametrize("error, code, words", [
    (UserError("too bad"), 2, "train.py: too bad"), (TrainingError("nan"), 2, "train.py: nan"),
    (torch.OutOfMemoryError("CUDA out of memory. Tried"), 2,
     "memory (CUDA out of memory): add --resume"),
    (MemoryError(), 2, "out of memory (MemoryError): "),
    (None, 2, "memory: you tried to allocate 4000000000000000 bytes")])
def test_how_a_command_ends(monkeypatch, capsys, error, code, words):
    def command(cd):
        assert cd == CDConfig(batch=3)
        if error is None:
            torch.empty(10**15)  # more than a process can address
        raise error
    monkeypatch.setattr(sys, "argv", ["somewhere/train.py", "--cd.batch", "3"])
    with pytest.raises(SystemExit) as end:
        general.main(command, "What it does.", {"cd": CDConfig})
    err = capsys.readouterr().err
    assert end.value.code == code and words in err and len(err.strip().splitlines()) == 1


def test_a_plain_terminal_and_a_bug(monkeypatch):
    """A character that a stream cannot print becomes a question mark. A bug keeps its traceback."""
    streams = {name: io.TextIOWrapper(io.BytesIO(), "ascii") for name in ("stdout", "stderr")}
    monkeypatch.setattr(sys, "argv", ["train.py"])
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        for name, stream in streams.items():
            patch.setattr(sys, name, stream)
        with general.errors_in_one_sentence():
            print("\u00e9t\u00e9")
            raise UserError("na\u00efve")
    for name, words in (("stdout", b"?t?\n"), ("stderr", b"train.py: na?ve\n")):
        streams[name].flush()
        assert streams[name].buffer.getvalue() == words
    assert general.progress([], "read", "row").disable  # no bar where stderr is not a terminal
    with pytest.raises(RuntimeError, match="a bug"), general.errors_in_one_sentence():
        raise RuntimeError("a bug")


@pytest.mark.parametrize("error, words", [
    (ValueError("no key a.b in x. And more\nand more"), "no key a.b in x"),
    (ValueError(""), "ValueError"), (ValueError("word " * 30), "word " * 19 + "...")])
def test_the_first_sentence_of_an_error(error, words):
    assert first_sentence(error) == words


@pytest.mark.parametrize("script", ["train_lm.py", "train_pm.py", "train_rl.py"])
def test_ctrl_c_while_torch_loads(tmp_path, script):
    """A module in place of torch raises what Ctrl-C raises, or what a broken installation does."""
    path = Path(general.__file__).with_name(script)
    for error, words in (("KeyboardInterrupt", "\nstopped;"), ("OSError('no CUDA')", "no CUDA")):
        (tmp_path / "torch.py").write_text(f"raise {error}")
        done = subprocess.run([sys.executable, "-B", path], capture_output=True, text=True,
                              env=os.environ | {"PYTHONPATH": str(tmp_path)})
        assert done.returncode != 0 and words in done.stderr
        assert ("Traceback" in done.stderr) == (words == "no CUDA")


def test_numbers_and_generators():
    """Equal names give equal numbers, and each part of a name counts."""
    for number in (float("nan"), float("inf"), -float("inf")):
        with pytest.raises(TrainingError, match=f"step 3: the policy loss is {number}"):
            check_finite("step 3", gradient=1.0, policy_loss=number)
    names = [(0, "a"), (1, "a"), (0, "b"), (0, "a", 1), (0, "a", 2), (0, "a1")]
    assert len({rng(*name).random() for name in names}) == len(names)
    assert len({torch.rand(1, generator=torch_rng(*name)).item() for name in names}) == len(names)


# ---- 2. Checkpoints ----------------------------------------------------------


class Code:
    """Unpickling this would create a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_what_load_refuses(tmp_path):
    path, ran = tmp_path / "x.pt", tmp_path / "ran"
    save(path, model={"w": torch.arange(3.0)}, parents="")
    good = path.read_bytes()
    bad = [good[:len(good) // 2], b"", b"hello\n", pickle.dumps({"model": Code(ran)})]
    for found in ({"model": Code(ran)}, [1, 2], torch.zeros(3)):
        torch.save(found, path)
        bad.append(path.read_bytes())
    for content in bad:
        path.write_bytes(content)
        with pytest.raises(UserError) as error:
            load(path)
        assert str(path) in str(error.value) and "\n" not in str(error.value)
    assert not ran.exists()
    pickle.loads(pickle.dumps(Code(ran)))
    assert ran.exists()  # the bait would have worked
    with pytest.raises(UserError, match="does not exist"):
        load(tmp_path / "y.pt")
    path.write_bytes(good)
    assert load(path)["model"]["w"].tolist() == [0, 1, 2]


def test_what_cannot_be_read(tmp_path, monkeypatch):
    def broken(*_, **__):
        raise OSError(errno.EIO, "Input/output error")

    def too_large(*_, **__):
        raise MemoryError
    file, link = tmp_path / "file", tmp_path / "link"
    file.write_bytes(b"\xff")
    link.symlink_to(file)
    assert read_text(link) == "\ufffd" and file_hash([link]) == file_hash([file])
    with pytest.raises(UserError, match="cannot read .*file/x: Not a directory"):
        check_is_file(file / "x")
    monkeypatch.setattr(Path, "read_text", broken)
    monkeypatch.setattr(Path, "read_bytes", broken)
    for read in (read_text, lambda path: file_hash([path])):
        with pytest.raises(UserError, match="cannot read .*file: Input/output error"):
            read(file)
    monkeypatch.setattr(torch, "load", too_large)  # a lack of memory says nothing of the file
    with pytest.raises(MemoryError):
        load(file)


def test_a_full_disk_keeps_the_old_file(tmp_path, monkeypatch):
    path, write_bytes = tmp_path / "x.pt", Path.write_bytes

    def full(self, content):
        write_bytes(self, bytes(content)[:20])
        raise OSError(errno.ENOSPC, "No space left")
    save(path, step=0)
    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(UserError, match=f"cannot write {path}: No space left"):
        save(path, step=1)
    assert load(path) == {"step": 0} and list(tmp_path.iterdir()) == [path]


# ---- 3. The life of a stage --------------------------------------------------

STAGES = {"one": ("one.pt", ()), "two": ("two.pt", ("one.pt",)),
          "three": ("three.pt", ("one.pt", "two.pt"))}


@dataclass
class Cfg:
    lr: float = 0.1
    steps: int = 7


def folder(out: Path, resume=False, **options) -> Folder:
    return Folder(out, STAGES, {"data": "toy", **options}, (), seed=0, resume=resume)


def train(where: Folder, name: str, cfg=Cfg()) -> list[int] | None:
    """A stage as the trainers have it -> the steps that it took, or None."""
    stage = where.begin(name, cfg)
    if stage is None:
        return None
    net = torch.nn.Linear(4, 1, bias=False)
    torch.nn.init.zeros_(net.weight)
    for parent in stage.parents:
        net.load_state_dict(load(parent)["model"])
    optimizer = torch.optim.Adam(net.parameters(), lr=cfg.lr)
    stage.start(net=net, optimizer=optimizer)
    if stage.n_lines == 0:
        stage.log(0, before=1.0)
    done = []
    for step, target in stage.steps(range(cfg.steps), save_every=3):
        x = torch.randn(5, 4, generator=where.torch_rng(name, step))
        loss = (net(x) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        stage.log(step, every=4, loss=loss.item())
        if step % 2 == 0:
            stage.log_record(step, loss=loss.item())
        done.append(step)
    stage.log(cfg.steps, norm=net.weight.norm().item(), nothing=float("nan"))
    stage.end(model=net.state_dict())
    return done


def train_all(where: Folder):
    for name, (result, _) in STAGES.items():
        if not where.reuse(name, Cfg()):
            train(where, name)


def content(out: Path) -> dict:
    """All that a folder holds, but for the times in metrics.jsonl. The report is drawn from the
    rest, and names its folder."""
    found = {}
    for path in sorted(out.rglob("*")):
        if path.suffix == ".pt":
            found[path.name] = file_hash([path])
        elif path.is_file() and path.name != "report.html":
            # Two subsets have files of the same name.
            found[str(path.relative_to(out))] = path.read_bytes()
    lines = [json.loads(line) for line in found["metrics.jsonl"].splitlines()]
    found["metrics.jsonl"] = [{k: v for k, v in line.items() if k != "seconds"} for line in lines]
    return found


class Killed(BaseException):
    """Stands for the death of the process: no handler of the commands may catch it."""


def die_at_a_new_write(monkeypatch, seen: set, before_odd: bool):
    """Die at the first write that is not in `seen`: a file's name, and the step for a state. Every
    other death comes before the new file gets its name, which leaves the temporary one behind."""
    replace = os.replace

    def replace_and_die(source, target):
        key = str(target)
        if key.endswith(("_state.pt", "_state.next.pt")):
            key = key, torch.load(source, weights_only=True).get("step")
        if key not in seen:
            seen.add(key)
            if len(seen) % 2 == before_odd:
                raise Killed
            replace(source, target)
            raise Killed
        replace(source, target)
    monkeypatch.setattr(os, "replace", replace_and_die)


@pytest.mark.parametrize("before_odd", [False, True])
def test_killed_at_each_write_and_resumed(tmp_path, monkeypatch, before_odd):
    """The same weights and the same lines as in a run that nothing disturbs."""
    train_all(folder(tmp_path / "whole"))
    expected, seen, deaths = content(tmp_path / "whole"), set(), 0
    while True:
        with monkeypatch.context() as patch:
            die_at_a_new_write(patch, seen, before_odd)
            try:
                train_all(folder(tmp_path / "killed", resume=True))
                break
            except Killed:
                deaths += 1
        if (tmp_path / "killed" / "metrics.jsonl").exists():
            with open(tmp_path / "killed" / "metrics.jsonl", "ab") as file:  # broken lines, and
                file.write(b'\xff\n5\n{"step": 1}\n[]\n{"stage": "two", "lo')  # one half written
    # config, metrics, record, and of three stages: the result, the empty state, and the states 0,
    # 3 and 6, which wait as "next" until their step is done
    assert deaths == 3 + 3 * 8
    assert content(tmp_path / "killed") == expected
    assert set(expected) == {".lock", "config.json", "metrics.jsonl", "record.jsonl", "one.pt",
                             "two.pt", "three.pt"}
    lines = [line for line in expected["metrics.jsonl"] if line["stage"] == "two"]
    assert [line["step"] for line in lines] == [0, 0, 4, 6, 7] and "before" in lines[0]
    assert "loss" in lines[1] and lines[-1]["nothing"] is None  # JSON has no NaN


def interrupted(out: Path, name: str):
    """A stage that dies after its state of step 3."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        seen = {(str(out / f"{name}_state.pt"), step) for step in (None, 0, 3)}
        seen |= {(str(out / f"{name}_state.next.pt"), step) for step in (0, 3)}
        seen |= {str(out / file) for file in ("metrics.jsonl", "record.jsonl", "config.json")}
        die_at_a_new_write(patch, seen, before_odd=False)
        train(folder(out), name)


def test_resume_or_start_over(tmp_path, capsys):
    train_all(folder(tmp_path))
    expected = content(tmp_path)
    interrupted(tmp_path, "three")
    state = (tmp_path / "three_state.pt").read_bytes()
    (tmp_path / "three_state.next.pt").unlink(missing_ok=True)  # the state alone marks it
    assert not folder(tmp_path).reuse("three", Cfg()) and "is unfinished" in capsys.readouterr().out
    assert train(folder(tmp_path), "three") == list(range(7))
    assert "starts over" in capsys.readouterr().out and content(tmp_path) == expected
    (tmp_path / "three_state.pt").write_bytes(state)
    stage = folder(tmp_path, resume=True).begin("three", Cfg())
    stage.start()
    assert stage.resumed_note() == ", from step 3"
    assert train(folder(tmp_path, resume=True), "three") == [3, 4, 5, 6]
    assert content(tmp_path) == expected
    assert train(folder(tmp_path, resume=True), "three", Cfg(lr=0.2)) is None  # it is complete
    said = capsys.readouterr().out
    assert "nothing to resume" in said and "(ignored: --three.lr was 0.1, now 0.2)" in said
    assert content(tmp_path) == expected
    assert folder(tmp_path).reuse("two", Cfg(steps=9))
    assert "used as it is (ignored: --two.steps was 7, now 9)" in capsys.readouterr().out
    assert folder(tmp_path).reuse("two", Cfg()) and "ignored" not in capsys.readouterr().out


def test_a_stage_resumes_with_the_files_that_it_began_with(tmp_path):
    data = tmp_path / "ours.jsonl"
    data.write_text("a")
    stage, net = folder(tmp_path).begin("one", Cfg(), data=[data]), torch.nn.Linear(1, 1)
    stage.start(net=net)
    steps = stage.steps(range(7), save_every=1)
    next(steps), next(steps)
    assert folder(tmp_path, resume=True).begin("one", Cfg(), data=[data]).state["step"] == 0
    data.write_text("ab")
    for files in ([data], []):
        with pytest.raises(UserError, match="one_state.pt was made: restore what was there"):
            folder(tmp_path, resume=True).begin("one", Cfg(), data=files)
    fresh = folder(tmp_path).begin("one", Cfg(), data=[data])
    fresh.start()
    fresh.end()
    assert load(tmp_path / "one.pt")["data"] == file_hash([data])


def test_a_state_whose_step_fails_is_not_kept(tmp_path, monkeypatch):
    """The step finds out that the update before it has led to NaN."""
    stage, net = folder(tmp_path).begin("one", Cfg()), torch.nn.Linear(4, 1, bias=False)
    stage.start(net=net, optimizer=torch.optim.Adam(net.parameters()))
    with pytest.raises(TrainingError):
        for step, _ in stage.steps(range(7), save_every=3):
            check_finite(f"step {step}", loss=math.nan if step == 3 else 1.0)
    assert load(tmp_path / "one_state.pt")["step"] == 0
    assert load(tmp_path / "one_state.next.pt")["step"] == 3
    assert train(folder(tmp_path, resume=True), "one") == list(range(7))
    assert not list(tmp_path.glob("*state*"))
    # The state goes when the new result is there, and with it what a failed attempt left.
    (tmp_path / "one_state.next.pt").touch()
    stage = folder(tmp_path).begin("one", Cfg())
    stage.start()
    with monkeypatch.context() as patch, pytest.raises(TrainingError):
        patch.setattr(stages, "save", lambda path, **content: check_finite("end", x=math.nan))
        stage.end()
    assert len(list(tmp_path.glob("*state*"))) == 2
    stage.end()
    assert not list(tmp_path.glob("*state*"))


def test_the_numbers_of_a_line(tmp_path):
    """Six digits, or all of them in a table; JSON has neither NaN nor infinity."""
    stage = folder(tmp_path).begin("one", Cfg())
    stage.start()
    stage.log(0, third=1 / 3, n=3, none=-math.inf, table={"third": 1 / 3, "none": math.nan})
    assert content(tmp_path)["metrics.jsonl"] == [
        {"stage": "one", "step": 0, "third": 0.333333, "n": 3, "none": None,
         "table": {"third": 1 / 3, "none": None}}]
    assert stage.resumed_note() == ""


@pytest.mark.parametrize("who", ["the system", "the disk"])
def test_where_nothing_can_be_locked(tmp_path, monkeypatch, who):
    def flock(*_):
        raise OSError(errno.ENOLCK, "No locks available")
    if who == "the system":
        monkeypatch.setattr(general, "fcntl", None)
    else:
        monkeypatch.setattr(general.fcntl, "flock", flock)
    assert train(folder(tmp_path), "one") == list(range(7))


def test_an_output_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot make .*file/out: Not a directory"):
        train(folder(tmp_path / "file" / "out"), "one")
    stage = folder(tmp_path).begin("one", Cfg())
    stage.start()
    stage.metrics_path.unlink()
    stage.metrics_path.mkdir()
    with pytest.raises(UserError, match="cannot write .*metrics.jsonl"):
        stage.log(0, loss=1.0)


def test_parents_are_those_that_were_read(tmp_path):
    train(folder(tmp_path), "one")
    was = file_hash([tmp_path / "one.pt"])
    stage = folder(tmp_path).begin("two", Cfg())
    stage.start()
    save(tmp_path / "one.pt", model={})
    stage.end()
    assert load(tmp_path / "two.pt")["parents"] == was != file_hash([tmp_path / "one.pt"])


def test_two_processes_in_one_folder(tmp_path):
    """The second one is refused, whether or not the folder was there when it began; the lock goes
    with the process that holds it, however that ends."""
    script = (f"import sys, time; sys.path[:0] = {sys.path!r}; from test_run import Cfg, folder; "
              f"from pathlib import Path; folder(Path({str(tmp_path / 'out')!r})).begin('one', "
              "Cfg()).start(); print('started', flush=True); time.sleep(60)")
    train(folder(tmp_path / "other" / "out"), "one")  # a lock there is none here
    early = folder(tmp_path / "out").begin("one", Cfg())
    other = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE)
    try:
        assert other.stdout.readline() == b"started\n"
        before = content(tmp_path / "out")
        for attempt in (early.start, lambda: folder(tmp_path / "out").begin("one", Cfg()),
                        lambda: folder(tmp_path / "out").reuse("one", Cfg())):
            with pytest.raises(UserError, match="another run is working in .*out"):
                attempt()
        assert content(tmp_path / "out") == before
    finally:
        other.kill()
        other.wait()
    assert train(folder(tmp_path / "out"), "one") == list(range(7))


def test_a_folder_that_is_only_read_can_be_unlocked(tmp_path):
    script = (f"import sys; sys.path[:0] = {sys.path!r}; from test_run import Cfg, folder; "
              f"from pathlib import Path; folder(Path({str(tmp_path)!r})).reuse('one', Cfg())")
    held = folder(tmp_path)
    train(held, "one")
    for free in (False, True, False):
        if free:
            held.unlock()
            held.unlock()  # once more does no harm
        else:
            held.reuse("one", Cfg())  # locks it, again in the end
        reader = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
        assert (reader.returncode == 0) == free
        assert ("another run is working in" in reader.stderr) == (not free)


def test_a_state_does_not_outlive_the_options_it_was_made_with(tmp_path, monkeypatch):
    train_all(folder(tmp_path))
    interrupted(tmp_path, "three")  # with lr 0.1
    fresh = folder(tmp_path).begin("three", Cfg(lr=0.2))
    fresh.record()                  # ... and a new run with lr 0.2 is killed before its first step
    assert train(folder(tmp_path, resume=True), "three", Cfg(lr=0.2)) == list(range(7))


def test_options_of_speed_may_change_when_a_stage_is_resumed(tmp_path):
    train_all(folder(tmp_path))
    interrupted(tmp_path, "three")
    lenient = folder(tmp_path, resume=True)
    lenient.speed_options = ("lr",)
    assert train(lenient, "three", Cfg(lr=0.2)) == [3, 4, 5, 6]


def test_a_complete_folder_of_other_options_is_refused(tmp_path):
    train_all(folder(tmp_path))
    other = folder(tmp_path, resume=True, data="real")
    for refused in (other.begin, other.reuse):
        with pytest.raises(UserError, match="with other options .*--data was 'toy', now 'real'"):
            refused("three", Cfg())
    assert folder(tmp_path, newer="option").reuse("three", Cfg())  # it was not recorded


def test_only_what_depends_on_a_stage_is_stale(tmp_path):
    pipeline = {"one": ("one.pt", ()), "left": ("left.pt", ("one.pt",)),
                "right": ("right.pt", ("one.pt",)), "end": ("end.pt", ("left.pt", "right.pt"))}
    tree = Folder(tmp_path, pipeline, {}, (), seed=0, resume=False)
    for name, stale in {"one": {"left", "right", "end"}, "left": {"end"}, "end": set()}.items():
        assert tree.descendants(name) == stale
    for name in pipeline:
        train(tree, name)
    train(tree, "left", Cfg(steps=1))
    kept = [line["stage"] for line in content(tmp_path)["metrics.jsonl"]]
    assert kept == ["one"] * 5 + ["right"] * 5 + ["left"] * 3
    config = json.loads((tmp_path / "config.json").read_text())
    assert config == {"run": {}, "left": {"lr": 0.1, "steps": 1}} | dict.fromkeys(
        ("one", "right", "end"), {"lr": 0.1, "steps": 7})
    (tmp_path / "left.pt").write_bytes((tmp_path / "right.pt").read_bytes())
    with pytest.raises(UserError, match="end.pt was not trained from the present .*left.pt"):
        tree.reuse("end", Cfg())


def test_other_options_are_refused(tmp_path):
    train(folder(tmp_path), "one")
    interrupted(tmp_path, "two")
    before = content(tmp_path)
    for resume in (False, True):
        with pytest.raises(UserError, match="--data was 'toy', now 'hh'.*another --out"):
            folder(tmp_path, resume=resume, data="hh").begin("two", Cfg())
    with pytest.raises(UserError, match=r"--two.lr was 0.1, now 0.2\): resume with the same ones"):
        folder(tmp_path, resume=True).begin("two", Cfg(lr=0.2))
    assert content(tmp_path) == before
    assert folder(tmp_path).begin("two", Cfg(lr=0.2)) is not None  # it starts over


@pytest.mark.parametrize("stage, parent", [("two", "one"), ("three", "one"), ("three", "two")])
def test_stale_parents(tmp_path, stage, parent):
    train_all(folder(tmp_path))
    interrupted(tmp_path, stage)
    saved = load(tmp_path / f"{parent}.pt")
    save(tmp_path / f"{parent}.pt", **saved | {"more": 1})
    with pytest.raises(UserError, match=f"{stage}_state.pt was not made with .*{parent}.pt"):
        train(folder(tmp_path, resume=True), stage)
    (tmp_path / f"{stage}_state.pt").unlink()
    with pytest.raises(UserError, match=f"{stage}.pt was not trained from .*{parent}.pt"):
        train(folder(tmp_path, resume=True), stage)
    with pytest.raises(UserError, match=f"{stage}.pt was not trained from"):
        folder(tmp_path).check_parents(f"{stage}.pt", {})
    train(folder(tmp_path), stage)
    folder(tmp_path).check_parents(f"{stage}.pt", load(tmp_path / f"{stage}.pt"))


def test_a_state_of_other_networks(tmp_path):
    two_groups = {"state": {}, "param_groups": [{"params": []}, {"params": []}]}
    for parts in ({}, {"net": {}}, {"net": {"weight": torch.ones(2, 4)}}, {"net": 5}, None,
                  {"net": {"weight": torch.ones(1, 4)}, "optimizer": two_groups}):
        save(tmp_path / "one_state.pt", stage="one", parents="", step=3, lines=1, parts=parts)
        with pytest.raises(UserError, match="one_state.pt does not fit this stage .*; delete it"):
            train(folder(tmp_path, resume=True), "one")
        assert load(tmp_path / "one_state.pt")["step"] == 3


@pytest.mark.parametrize("name", ["config.json", "metrics.jsonl", "one.pt", "two_state.pt"])
def test_a_folder_or_a_pipe_in_place_of_a_file(tmp_path, name):
    train(folder(tmp_path), "one")
    for make in (os.mkdir, os.mkfifo):
        (tmp_path / name).unlink(missing_ok=True)
        make(tmp_path / name)
        with pytest.raises(UserError, match=f"{name} is not a file"):
            train(folder(tmp_path, resume=True), "two")
        if make == os.mkdir:
            (tmp_path / name).rmdir()


@pytest.mark.parametrize("state", [b"", b"half", [1], {"model": {}}, {"stage": "one", "step": 3}])
def test_broken_state(tmp_path, state):
    """Neither a checkpoint, nor one of this stage."""
    train(folder(tmp_path), "one")
    path = tmp_path / "two_state.pt"
    if isinstance(state, bytes):
        path.write_bytes(state)
    else:
        torch.save(state, path)
    what = "the state of an interrupted two stage" if isinstance(state, dict) else "a checkpoint"
    with pytest.raises(UserError, match=f"{path} is not {what}") as error:
        folder(tmp_path, resume=True).begin("two", Cfg())
    assert "\n" not in str(error.value)
    assert train(folder(tmp_path), "two") == list(range(7))  # what the sentence proposes, or so


@pytest.mark.parametrize("config", [b"[]", b"{", b'{"run": 3}', b"\xff", b"", b"5"])
def test_broken_config(tmp_path, config):
    (tmp_path / "config.json").write_bytes(config)
    with pytest.raises(UserError, match="config.json is not a config of this project"):
        folder(tmp_path).begin("one", Cfg())
    assert (tmp_path / "config.json").read_bytes() == config


# ---- 4. Run ------------------------------------------------------------------


@pytest.mark.parametrize("options, words", [
    ({"size": "7B"}, "--size 7B: choose one of toy, gpt2"),
    ({"tokenizer": "word"}, "--tokenizer word: choose auto, bpe or gpt2"),
    ({"tokenizer": "gpt2"}, "--tokenizer gpt2, --init and --subsets apply to real data"),
    ({"init": "gpt2"}, "--init and --subsets apply to real"), ({"subsets": "x"}, "--subsets apply"),
    ({"data": "x", "init": "gpt2", "tokenizer": "bpe"}, "leave out --tokenizer bpe"),
    ({"export": "x"}, "--export works only with train_rl.py"),
    ({"context": 15}, "--context 15 is too"),
    ({"context": -5}, "--context -5 is too short"), ({"data": "typo"}, "typo"),
    *[({"device": name}, f"--device {name} is not available")
      for name in ("nosuch", "cuda:99", "mps", "meta", "cuda")
      if name != "cuda" or not torch.cuda.is_available()]])
def test_choices_that_cannot_be(tmp_path, monkeypatch, options, words):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=words):
        Run(RunConfig(**options))
    assert not list(tmp_path.iterdir())


def test_options_of_a_folder_and_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my.set").mkdir()
    for cfg, name in ((RunConfig(), "out/toy-0"), (RunConfig(preset="tiny", seed=2), "out/tiny-2"),
                      (RunConfig(data="my.set", seed=3), "out/my-3"), (RunConfig(out="x"), "x"),
                      (RunConfig(data="."), f"out/{tmp_path.name}-0")):
        assert Run(cfg).out == Path(name)
    free = {"out": "a", "device": "cpu", "resume": True, "recompute": True, "compile": True,
            "export": "b", "precision": "float32"}
    run = Run(RunConfig(**free), can_export=True)
    kept = dataclasses.asdict(RunConfig())
    assert run.options == {k: v for k, v in kept.items() if k not in free}
    assert run.resume and run.context == 192 and run.toy and run.seed == 0
    assert Run(RunConfig(data="my.set")).context == 512 and Run(RunConfig(context=16)).context == 16
    assert Run(RunConfig(data="my.set", subsets=" a ,b,")).subsets == ["a", "b"]
    real = Run(RunConfig(data="my.set"))
    assert real.subsets is None and real.speed_options == ("token_budget", "slots")
    assert (real.tokenizer_name(), run.tokenizer_name()) == ("gpt2", "bpe")
    assert Run(RunConfig(data="my.set", tokenizer="bpe")).tokenizer_name() == "bpe"
    for size in SIZES:
        check_choices(RunConfig(size=size), can_export=False)
    Run(RunConfig(context=100)).check_room("--rl.max-response", 83)
    with pytest.raises(UserError, match="--rl.max-response 84 leaves no room .* --context 100"):
        Run(RunConfig(context=100)).check_room("--rl.max-response", 84)
    assert run.rng("a").random() == rng(0, "a").random() != Run(RunConfig(seed=1)).rng("a").random()


def test_memory_is_checked_for_the_stages_that_will_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    seen, size = {}, SIZES["gpt2"]
    monkeypatch.setattr(pipeline, "check_stage", lambda name, *rest: seen.update({name: rest}))
    configs = (LMConfig(documents=5, vocab=704, step_tokens=11), CDConfig(documents=6),
               PMPConfig(pairs=7, token_budget=12),
               PMConfig(helpful=8, harmless=9, test=10, token_budget=13),
               RLConfig(batch=14, eval_prompts=15, slots=16, token_budget=17))
    for data, n, n_vocab in (("toy", 1, 704), (".", 0, 50304)):
        run = Run(RunConfig(data=data, out="out", size="gpt2", context=99, recompute=True))
        run.check_memory(*configs)
        expected = {"lm": StageMemory(1, 0, 5 * n, step_tokens=11),
                    "cd": StageMemory(1, 1, 6 * n),
                    "pmp": StageMemory(1, 0, 7 * n, token_budget=12),
                    "pm": StageMemory(1, 0, 37 * n, token_budget=13),
                    "rl": StageMemory(2, 2, 15, token_budget=17, slots=16)}
        shape = dataclasses.replace(size, vocab_size=n_vocab, context=99)
        assert seen == {name: (shape, s, True, run.device) for name, s in expected.items()}
        seen.clear()
    (tmp_path / "out").mkdir()  # in which stage 1 is complete and stage 2 is not
    for name in ("lm.pt", "initial.pt", "cd_state.pt"):
        run.path(name).touch()
    run.check_memory(*configs[:2])
    assert list(seen) == ["cd"]
    seen.clear()
    run.path("cd_state.pt").rename(run.path("lm_state.pt"))
    run.check_memory(*configs[:2])
    assert list(seen) == ["lm", "cd"]
    seen.clear()
    run.path("lm_state.pt").unlink()
    run.check_memory(*configs[:2])  # complete, but without --resume the command starts it over
    assert list(seen) == ["cd"]
    seen.clear()
    run.resume = True
    run.check_memory(*configs[:2])
    assert not seen
    run.resume = False
    run.check_memory(configs[0], CDConfig(documents=0))  # the LM is copied, and nothing trained
    assert seen["cd"][1] == StageMemory(0, 1)
    Run(RunConfig(data=".", init="gpt2-xl", out="x")).check_memory(*configs)
    assert "lm" not in seen and seen["rl"][0] == dataclasses.replace(SIZES["gpt2-xl"], context=512)
    seen.clear()
    run = Run(RunConfig(data=".", init="a/path", out="x"))  # a shape that stage 1 finds out
    run.check_memory(*configs)
    assert not seen
    run.checks.append(lambda: seen.update(other=[run.shape]))
    run.shape = shape
    run.use_tokenizer(SimpleNamespace())
    assert set(seen) == {"cd", "pmp", "pm", "rl", "other"}
    assert all(found[0] == shape for found in seen.values())


def broken_checkpoints(good: dict):
    """(what is wrong, what to save) for a file that should hold a model."""
    model = good["model"]
    yield "another shape", good | {"config": good["config"] | {"d_model": 96}}
    yield "a shape of text", good | {"config": "12 layers"}
    yield "no shape", {k: v for k, v in good.items() if k != "config"}
    yield "another tokenizer", good | {"tokenizer": "0" * 16}
    yield "fewer weights", good | {"model": dict(list(model.items())[1:])}
    yield "more weights", good | {"model": model | {"more": torch.zeros(3)}}
    yield "other sizes", good | {"model": {k: v[:1] if v.dim() else v for k, v in model.items()}}
    yield "no weights", {k: v for k, v in good.items() if k != "model"}


@pytest.mark.parametrize("name", ["lm.pt", "pmp.pt"])
def test_load_model(tmp_path, monkeypatch, name):
    monkeypatch.setitem(SIZES, "toy", GPTConfig(1, 2, 8, context=64))
    run = Run(RunConfig(out=str(tmp_path), device="cpu", recompute=True, context=48))
    run.tok = train_bpe(["some text, and some more text"] * 3, 264)
    lm = GPT(run.model_config())
    assert lm.cfg == GPTConfig(1, 2, 8, vocab_size=320, context=48)
    save(run.path("lm.pt"), **run.checkpoint(lm), parents="")
    model = lm if name == "lm.pt" else ScalarModel(lm)
    parents = file_hash(run.path(parent) for parent in dict(PIPELINE.values())[name])
    save(run.path(name), **run.checkpoint(model), parents=parents)
    found = run.load_model(name)
    assert type(found) is type(model) and not found.training
    assert run.shape is None  # only with --init is it that of lm.pt
    assert not any(p.requires_grad for p in found.parameters())
    for key, weight in model.state_dict().items():
        assert torch.equal(weight, found.state_dict()[key])
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile",
                        lambda *args, **how: compiled.append((args, how)))
    trunk = getattr(run.prepare(found), "trunk", found)
    assert trunk.recompute and all(p.requires_grad for p in found.parameters()) and not compiled
    run.cfg = dataclasses.replace(run.cfg, recompute=False, compile=True)
    run.prepare(found)
    assert not trunk.recompute and compiled == [((trunk.blocks[0],), {"dynamic": True})]
    good, other = load(run.path(name)), ScalarModel(lm) if name == "lm.pt" else lm
    broken = dict(broken_checkpoints(good))
    broken["of the other kind"] = good | {"model": other.state_dict()}
    if name == "pmp.pt":
        broken["other parents"] = good | {"parents": "0" * 16}
    for what, wrong in broken.items():
        torch.save(wrong, run.path(name))
        with pytest.raises(UserError, match=str(run.path(name))) as error:
            run.load_model(name)
        assert "\n" not in str(error.value), what
