"""Tests of ranks.py: two processes train as one would, and they fail as one.

The processes run on the CPU, with gloo, and this file is also the script that they run. Training is
compared in float64: there the sums that two processes round differently are some 1e-16 apart."""
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections import namedtuple
from dataclasses import dataclass
from pathlib import Path

from conftest import ROOT  # which also makes the project importable
import pytest
import torch
import torch.distributed as dist

import memory
import ranks
from helpers import CFG, END, R, random_prompts, random_uniforms, shaken
from model import GPT, GPTConfig, token_logprobs
from pipeline import RunConfig
from pm import ScalarModel, score_rows
from ppo import PPOConfig, all_logprobs, states_at, tokens_at
from rollout import Sampler
from run import (TrainingError, UserError, check_finite, errors_in_one_sentence, is_first, load,
                 write_atomically)
from stage import Folder
from test_commands import execute
from test_run import Killed
from train_rl import Learner

# Odd numbers: two processes divide neither the batches nor the last minibatch, of one response.
OPTIONS = ("--lm.documents 150 --lm.step-tokens 512 --lm.vocab 500 --cd.documents 7 --cd.batch 3 "
           "--pmp.pairs 9 --pmp.batch 4 --pm.helpful 24 --pm.harmless 22 --pm.test 20 --pm.batch 3 "
           "--pm.max-response 60 "
           "--rl.iterations 4 --rl.batch 7 --rl.minibatch 3 --rl.max-response 12 "
           "--rl.eval-prompts 5 --rl.eval-every 2 --rl.save-every 2").split()
Result = namedtuple("Result", "code out err")


# ---- 1. What the processes run -----------------------------------------------


def train(out: Path, *more):
    assert execute("train_rl.py", "--out", out, *OPTIONS, *more) == 0


def interrupt_rl(out: Path, copy: Path):
    """A copy of a finished run whose stage 5 is run again and stops in iteration 3."""
    if is_first():
        shutil.copytree(out, copy)
    ranks.wait()
    iterate = Learner.iterate

    def iterate_or_die(self, prompts, iteration):
        if iteration == 3:
            raise Killed
        return iterate(self, prompts, iteration)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Learner, "iterate", iterate_or_die)
        with pytest.raises(Killed):
            train(copy)


def train_and_resume(folder: Path):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ranks, "together", lambda command: command)  # they are together already
        train(folder / "two")
        interrupt_rl(folder / "two", folder / "begun by two")
        train(folder / "begun by one", "--resume")


def work_and_agree(folder: Path):
    """Then rank 1 dies, as by kill -9: without a word."""
    print("one voice")
    for n in (1, 5):  # of one row, rank 1 has no share
        parts = work(n)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ranks, "n_ranks", lambda: 1)
            expected = work(n)
        for found, wanted in zip(parts, expected):
            assert found.shape == wanted.shape and found.dtype == wanted.dtype
            assert (found.double() - wanted.double()).abs().max() < 1e-9
    agree(folder)
    if not is_first():
        os._exit(9)


def work(n: int) -> list:
    """What the ranks compute by shares: n responses, log-probs, scores, a gradient."""
    torch.manual_seed(0)
    policy, pm = shaken(GPT(CFG), 1, size=4), ScalarModel(shaken(GPT(CFG), 2, size=4))
    sampler = Sampler(policy, END)
    ro = sampler(random_prompts(7, 5), random_uniforms(7, R, 5))  # leaves traces in the buffers
    ro = sampler(random_prompts(n, 3), random_uniforms(n, R, 3))
    parts = list(vars(ro).values())
    parts.append(all_logprobs(policy, ro, PPOConfig(token_budget=40)))
    parts.append(score_rows(pm, random_prompts(n, 4), token_budget=40))
    for batch in ranks.own_batches(ro.lengths.tolist(), 40):
        i = torch.tensor(batch)
        at = tokens_at(ro, i)
        states = policy(ro.rows(i), states_at(ro, i, at))
        token_logprobs(policy, states, ro.actions[i][at]).sum().backward()
    ranks.add_up_gradients(policy)
    return parts + [parameter.grad for parameter in policy.parameters()]


def agree(folder: Path):
    rank, path = dist.get_rank(), folder / "download"
    assert ranks.gather(rank) == [0, 1] and is_first() == (rank == 0)
    assert (ranks.add_up(torch.tensor([rank, 5])) == torch.tensor([1, 10])).all()
    assert ranks.add_up_numbers({"a": 2.0} if rank else {"a": 1.0, "b": 4.0}) == {"a": 3, "b": 4}

    def download():
        was_there = path.exists()
        time.sleep(0.1 * (1 - rank))  # without `first_alone`, rank 1 would be earlier
        path.touch()
        return was_there
    assert ranks.first_alone(download) == (rank == 1)
    write_atomically(folder / f"of rank {rank}", b"")
    assert ranks.gather((folder / f"of rank {rank}").exists()) == [True, False]
    with pytest.raises(UserError, match="same options: --seed is . in one and . in process .$"):
        ranks.check_same({"run": RunConfig(seed=rank)})
    net = torch.nn.Linear(1, 1)
    for weight, is_equal in ((1.0, True), (float("nan"), True), (1.0 + rank, False)):
        torch.nn.init.constant_(net.weight, weight)
        torch.nn.init.zeros_(net.bias)
        if is_equal:
            ranks.check_equal({"net": net})
        else:
            with pytest.raises(TrainingError, match="hold different weights"):
                ranks.check_equal({"net": net})


@dataclass
class NoOptions:
    pass


def meet_nan(folder: Path):
    """Six steps that add 1 to a weight; in step 3, rank 1 meets a loss that is NaN."""
    folder = Folder(folder, {"toy": ("toy.pt", ())}, {}, (), 0, resume=False)
    stage = folder.begin("toy", NoOptions())
    net = torch.nn.Linear(1, 1)
    torch.nn.init.zeros_(net.weight)
    torch.nn.init.zeros_(net.bias)
    stage.start(net=net)
    for step, _ in stage.steps(range(6), save_every=1):
        loss = float("nan") if step == 3 and not is_first() else 1.0
        check_finite(f"toy step {step}", loss=loss)
        net.weight.data += sum(ranks.gather(loss)) / 2


# ---- 2. Starting them --------------------------------------------------------


def start(action: str, folder: Path) -> list[Result]:
    """Two processes, as torchrun starts them; the store, in this process, stands for torchrun's."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    processes = []
    for rank in ("0", "1"):
        environment = os.environ | {
            "RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "OMP_NUM_THREADS": "1",
            "TORCHELASTIC_USE_AGENT_STORE": "True"}
        processes.append(subprocess.Popen([sys.executable, __file__, action, folder], text=True,
                                          cwd=ROOT, env=environment, stdout=subprocess.PIPE,
                                          stderr=subprocess.PIPE))
    results = []
    try:
        for process in processes:
            out, err = process.communicate(timeout=1500)  # a bug may make them wait
            results.append(Result(process.returncode, out, err))
    finally:
        for process in processes:
            process.kill()
    return results


def with_torchrun(action: str, folder: Path) -> Result:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node",
               "2", __file__, action, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1500)
    return Result(done.returncode, done.stdout, done.stderr)


@pytest.fixture
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def assert_same_run(out: Path, expected: Path):
    """The same files and texts; numbers up to rounding. A number in metrics.jsonl has 6 decimals,
    so what is 1e-9 apart may differ by 1e-6 there."""
    names = sorted(str(path.relative_to(expected)) for path in expected.rglob("*"))
    assert names == sorted(str(path.relative_to(out)) for path in out.rglob("*"))
    for name in names:
        if name.endswith(".pt"):
            found, wanted = load(out / name), load(expected / name)
            assert found.keys() == wanted.keys()
            for key, weight in wanted["model"].items():
                assert (found["model"][key] - weight).abs().max() < 1e-9, (name, key)
        elif name == "metrics.jsonl":
            found = [json.loads(line) for line in (out / name).read_text().splitlines()]
            wanted = [json.loads(line) for line in (expected / name).read_text().splitlines()]
            assert len(found) == len(wanted)
            for line, other in zip(found, wanted):
                assert line.keys() == other.keys()
                for key, value in other.items():
                    if isinstance(value, float) and key != "seconds":
                        assert abs(line[key] - value) < 1.5e-6, (line, key)
                    elif key != "seconds":
                        assert line[key] == value, (line, key)
        elif (expected / name).is_file() and name != "report.html":  # it names its folder
            assert (out / name).read_bytes() == (expected / name).read_bytes(), name


# ---- 3. Together -------------------------------------------------------------


def test_two_processes_train_as_one(tmp_path, float64):
    """All five stages; then a run that one process has begun and two resume, and vice versa. It
    takes some seconds, most of them to import torch three times and to train three times."""
    one = tmp_path / "one"
    train(one)
    interrupt_rl(one, tmp_path / "interrupted")
    shutil.copytree(tmp_path / "interrupted", tmp_path / "begun by one")  # this process locks it
    first, other = start("train_and_resume", tmp_path)
    assert (first.code, other.code) == (0, 0), first.err + other.err
    assert other.out == other.err == first.err == ""  # also no warning at the end
    assert first.out.count("[5] RLHF: 4 iterations") == 3 and ", from step 2" in first.out
    train(tmp_path / "begun by two", "--resume")
    for name in ("two", "begun by one", "begun by two"):
        assert_same_run(tmp_path / name, one)


@pytest.mark.parametrize("n_rows, n", [(0, 2), (1, 2), (2, 3), (7, 2), (40, 3), (64, 8)])
def test_shares_are_disjoint_complete_and_balanced(monkeypatch, n_rows, n):
    lengths = [(37 * i) % 101 + 1 for i in range(n_rows)]
    shares, batches = [], []
    for rank in range(n):
        monkeypatch.setattr(ranks, "n_ranks", lambda: n)
        monkeypatch.setattr(dist, "get_rank", lambda: rank)
        shares.append(ranks.share(lengths))
        assert shares[-1] == sorted(shares[-1])
        batches += ranks.own_batches(lengths, 150)
    assert sorted(sum(shares, [])) == sorted(sum(batches, [])) == list(range(n_rows))
    assert all(len(batch) * max(lengths[i] for i in batch) <= 150 for batch in batches)
    sizes = [len(own) for own in shares]
    tokens = [sum(lengths[i] for i in own) for own in shares]
    # Dealt in order of length, the last rank gets at most one longest row more than the first.
    assert max(sizes) - min(sizes) <= 1 and max(tokens) - min(tokens) <= max(lengths, default=0)


def test_one_process_changes_nothing():
    x, command = torch.ones(2), lambda: None
    assert ranks.share([3, 1, 2]) == [0, 1, 2] and ranks.add_up(x) is x
    assert ranks.add_up_numbers({"a": 0.1}) == {"a": 0.1} and ranks.gather(4) == [4]
    net = torch.nn.Linear(1, 1)
    ranks.add_up_gradients(net)
    assert net.weight.grad is None and ranks.together(command) is command
    assert ranks.device("mps") == "mps" and ranks.n_on_machine() == 1


# ---- 4. Failures -------------------------------------------------------------


def test_nan_on_one_rank_ends_all_with_one_sentence(tmp_path):
    """With torchrun itself. Its long report comes after the sentence, and repeats it."""
    result = with_torchrun("meet_nan", tmp_path)
    sentence = "toy step 3: the loss is nan; the last good checkpoint is kept"
    assert result.code == 1 and result.err.count(sentence) == 2, result.err
    assert result.err.splitlines().count(f"test_ranks.py: {sentence}") == 1
    assert "another process" not in result.err
    assert result.err.index("test_ranks.py: ") < result.err.index("Traceback")  # torchrun's own
    state = load(tmp_path / "toy_state.pt")
    assert state["step"] == 2 and state["parts"]["net"]["weight"].item() == 2


def test_ranks_do_their_shares_until_one_dies(tmp_path):
    """It takes some seconds to import torch twice."""
    first, other = start("work_and_agree", tmp_path)
    assert (first.code, other.code) == (2, 9), first.err + other.err
    assert (first.out, other.out, other.err) == ("one voice\n", "", "")
    assert len(first.err.splitlines()) == 1, first.err
    assert first.err.startswith("test_ranks.py: another process has ended")


@pytest.mark.parametrize("has_gloo", [True, False])
def test_processes_that_cannot_connect(monkeypatch, has_gloo):
    """A port that is in use, and a PyTorch without gloo."""
    monkeypatch.setattr(dist, "is_gloo_available", lambda: has_gloo)
    with socket.socket() as busy:
        busy.bind(("127.0.0.1", 0))
        busy.listen()
        for name, value in (("RANK", 0), ("WORLD_SIZE", 2), ("MASTER_ADDR", "127.0.0.1"),
                            ("MASTER_PORT", busy.getsockname()[1])):
            monkeypatch.setenv(name, str(value))
        words = "cannot connect.*: start them with torchrun" if has_gloo else "lacks gloo"
        with pytest.raises(UserError, match=words):
            ranks.join()


@pytest.mark.parametrize("name, n_gpus, expected", [
    ("auto", 0, "cpu"), ("auto", 2, "cuda:1"), ("cpu", 2, "cpu"), ("cuda", 2, "cuda:1"),
    ("cuda", 1, "2 processes on a machine with 1 GPUs"), ("cuda:1", 2, "with torchrun use cuda"),
    ("mps", 0, "with torchrun use cuda or cpu")])
def test_each_rank_has_a_device_of_its_own(monkeypatch, name, n_gpus, expected):
    monkeypatch.setattr(ranks, "n_ranks", lambda: 4)  # on two machines
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: n_gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: n_gpus)
    if len(expected) < 8:
        assert ranks.device(name) == expected
    else:
        with pytest.raises(UserError, match=expected):
            ranks.device(name)


def test_ranks_share_the_memory_of_a_cpu(monkeypatch):
    """Weights, data and slots are needed once for each rank; only rank 0 puts a state together."""
    checked, cfg = [], GPTConfig(2, 2, 64, vocab_size=500, context=192)
    monkeypatch.setattr(memory, "check_free", lambda name, parts, device: checked.append(parts))
    monkeypatch.setattr(memory, "free_memory", lambda device: 3e8)
    slots = []
    for n in (1, 4):
        monkeypatch.setattr(ranks, "n_on_machine", lambda: n)
        memory.check_stage("rl", cfg, memory.StageMemory(2, 2, n_rows=100), False, "cpu")
        memory.check_stage("rl", cfg, memory.StageMemory(2, 2, n_rows=100), False, "cuda")
        slots.append(memory.fitting_slots(cfg, 192, "cpu"))
    cpu_1, gpu_1, beside_gpu_1, cpu_4, gpu_4, beside_gpu_4 = checked
    for part, size in (cpu_1 | beside_gpu_1).items():
        times = 1 if part == "state to be saved" else 4
        assert cpu_4[part] == times * size and beside_gpu_4.get(part, times * size) == times * size
    assert gpu_1 == gpu_4 and "data" in beside_gpu_4 and slots[0] > slots[1] >= 1


if __name__ == "__main__":
    torch.set_default_dtype(torch.float64)
    with errors_in_one_sentence():
        ranks.together(lambda run: globals()[sys.argv[1]](Path(sys.argv[2])))(run=RunConfig())
