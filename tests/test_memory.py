"""Tests of memory.py and of the choice of a device (run.py). What memory.py states is compared with
the bytes that tensors really hold. GPUs are faked: what torch says of them is replaced."""
import math
from dataclasses import replace

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import memory
import rollout
import run
from helpers import CFG, END, random_uniforms
from memory import (
    MOST_SLOTS, StageMemory, check_stage, fitting_slots, free_in_container, free_memory,
    sampling_memory, training_memory)
from model import SIZES, GPT, GPTConfig, token_logprobs
from rollout import Sampler
from run import UserError, autocast, choose_device, compute_dtype

@pytest.fixture(autouse=True)
def a_gpu_with_bf16(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)


LONG = replace(CFG, context=160)  # so that steps read caches of many lengths


class LiveBytes(TorchDispatchMode):
    """The most bytes that tensors made in here held at once, by storage."""

    def __init__(self, known):
        super().__init__()
        self.known, self.live, self.peak = {x.untyped_storage()._cdata for x in known}, {}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            storage = x.untyped_storage() if isinstance(x, torch.Tensor) else None
            if storage is not None and storage._cdata not in self.known:
                self.live[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.live = {key: value for key, value in self.live.items() if not value[0].expired()}
        self.peak = max(self.peak, sum(n for _, n in self.live.values()))
        return out


WIDE = GPTConfig(4, 2, 128, 64, 256)


@pytest.mark.parametrize("most, cfg, prefill_tokens, prompts, limits", [
    ("cache", WIDE, 400, [[3] * 100] * 32, [20] * 32),  # a shared prompt
    ("cache", WIDE, 400, [[i] * 100 for i in range(32)], [2] * 16 + [20] * 16),  # compacted
    ("logits", GPTConfig(1, 2, 64, 20000, 64), 400, [[i, 1] for i in range(32)], [5] * 32),
    ("prefill", GPTConfig(2, 2, 64, 64, 160), 8192, [[i] * 127 for i in range(64)], [2] * 64)])
def test_stated_memory_bounds_what_is_held(most, cfg, prefill_tokens, prompts, limits, monkeypatch):
    """2% are for what is not stated: the buffers of the responses, and masks."""
    for module in (memory, rollout):
        monkeypatch.setattr(module, "PREFILL_TOKENS", prefill_tokens)
    policy, uniforms = GPT(cfg), random_uniforms(len(prompts), max(limits), 0)
    sampler = Sampler(policy, -1, slots=len(prompts))
    with LiveBytes([*policy.parameters(), uniforms]) as live:
        sampler(prompts, uniforms, limits)
    stated = sampling_memory(cfg, len(prompts), sampler.cache.k.shape[3])
    assert stated["cache"] == sampler.cache.k.nbytes + sampler.cache.v.nbytes
    assert stated[most] > sum(stated.values()) / 2
    assert sum(stated.values()) / 3 < live.peak <= 1.02 * sum(stated.values())


def test_memory_by_hand():
    """GPT-2, 8 slots of 1,024 tokens: in bf16 on a GPU, with a copy whose matrices are in bf16."""
    matrices = 12 * 12 * 768**2  # the rest: embeddings, positions, LayerNorms and biases
    for device, number, copied in (("cpu", 4, 0), ("cuda", 2, 1)):
        per_token, rest = 2 * 12 * 768 * number, SIZES["gpt2"].n_params() - matrices
        assert sampling_memory(SIZES["gpt2"], 8, 1024, device) == {
            "cache": 8 * 1024 * per_token, "logits": 4 * 8 * 50304 * 4,
            "prefill": 8192 * 14 * 768 * 4,
            "copy": copied * (2 * matrices + 4 * rest)}
    # A row longer than a prefill batch is a batch alone.
    one_row = 9000 * 14 * 32 * 4
    assert sampling_memory(CFG, 1, 9000)["prefill"] == one_row


@pytest.mark.parametrize("cfg, size", [(CFG, 64), (SIZES["gpt2"], 1024), (SIZES["13B"], 8192)])
@pytest.mark.parametrize("device", ["cpu", "cuda", "mps"])
def test_fitting_slots_is_the_largest_power_of_two_that_fits(cfg, size, device):
    def needed(slots):
        return sum(sampling_memory(cfg, slots, size, device).values())
    most = MOST_SLOTS["gpu" if device == "cuda" else "cpu"]
    for slots in (2, 8, most):
        assert fitting_slots(cfg, size, device, needed(slots)) == slots
        assert fitting_slots(cfg, size, device, needed(slots) - 1) == slots // 2
    assert fitting_slots(cfg, size, device, needed(1)) == 1
    assert fitting_slots(cfg, size, device, 1e18) == most
    with pytest.raises(UserError, match=f"rows of {size} tokens takes .* GiB"):
        fitting_slots(cfg, size, device, needed(1) - 1)


def test_half_of_the_free_memory_is_the_budget(monkeypatch):
    free = 2 * sum(sampling_memory(LONG, 4, 160).values())
    monkeypatch.setattr(memory, "free_memory", lambda device: free)
    sampler = Sampler(GPT(LONG), END)
    sampler([[1] * 5] * 64, random_uniforms(64, 40, 0))
    assert sampler.slots == fitting_slots(LONG, 64) > 4 and sampler.cache.k.shape[3] == 64
    sampler([[1] * 110] * 64, random_uniforms(64, 40, 0))
    assert sampler.slots == fitting_slots(LONG, 160) == 4


# ---- Free memory -------------------------------------------------------------


@pytest.mark.parametrize("text, expected", [
    ("MemTotal: 9 kB\nMemAvailable:   1234 kB\n", 1234 * 1024), ("MemTotal: 9 kB\n", math.inf)])
def test_free_memory_is_what_the_system_says(text, expected, monkeypatch):
    for name, answer in (("memory_reserved", 70), ("memory_allocated", 50), ("mem_get_info", (3,))):
        monkeypatch.setattr(torch.cuda, name, lambda device, answer=answer: answer)
    assert free_memory("cuda") == 3 + 70 - 50
    monkeypatch.setattr(memory.Path, "read_text", lambda path: text)
    monkeypatch.setattr(memory, "free_in_container", lambda: math.inf)
    assert free_memory("cpu") == expected
    monkeypatch.setattr(memory, "free_in_container", lambda: 1000)
    assert free_memory("cpu") == 1000


def test_free_memory_in_a_container(tmp_path):
    assert free_in_container(tmp_path) == math.inf
    (tmp_path / "memory.current").write_text("700\n")
    (tmp_path / "memory.stat").write_text("anon 500\ninactive_file 60\nactive_file 9\n")
    for limit, free in (("1000\n", 360), ("max\n", math.inf)):
        (tmp_path / "memory.max").write_text(limit)
        assert free_in_container(tmp_path) == free


# ---- Training ----------------------------------------------------------------


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("cfg", [GPTConfig(4, 4, 128, 256, 64), GPTConfig(1, 2, 64, 20_000, 64)])
def test_a_training_step_takes_what_is_stated(cfg, recompute):
    """The first shape is mostly blocks and the second mostly logits. The excess is what the
    backward pass and the optimizer hold for a moment."""
    with LiveBytes([]) as live:
        model = GPT(cfg)
        model.recompute = recompute
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        for _ in range(2):  # at the second step, Adam has its moments
            optimizer.zero_grad(set_to_none=True)
            ids = torch.zeros(1280 // 64, 64, dtype=torch.long)  # tokens_at_once
            hidden = model(ids).flatten(0, 1)
            token_logprobs(model, hidden, ids.flatten()).sum().backward()
            optimizer.step()
    stated = training_memory(cfg, StageMemory(1, 0), recompute, "cpu")
    assert 0.95 * sum(stated.values()) < live.peak < 1.5 * sum(stated.values())


def test_training_memory_by_hand():
    """The toy's shape with 1,024 tokens: 2 blocks of width 128."""
    cfg, n = SIZES["toy"], SIZES["toy"].n_params()
    stage = StageMemory(n_trained=2, n_frozen=1, token_budget=100)
    assert training_memory(cfg, stage, False, "cpu") == {
        "weights": 4 * n * 3, "gradients": 4 * n * 2, "optimizer": 8 * n * 2,
        "activations": 100 * 2 * 16 * 128 * 4 + 3 * 100 * cfg.vocab_size * 4}
    stage.step_tokens = 50
    half = training_memory(cfg, stage, False, "cuda")["activations"]
    assert half == 50 * 2 * 16 * 128 * 2 + 3 * 50 * cfg.vocab_size * 4
    for n_vocab, most in ((2, 50 * 16 * 128 * 4), (2000, 3 * 50 * 2000 * 4)):  # a block, or logits
        parts = training_memory(replace(cfg, vocab_size=n_vocab), stage, True, "cpu")
        assert parts["activations"] == 50 * 2 * 128 * 4 + most


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_stage_that_does_not_fit_is_refused(device, monkeypatch):
    cfg, stage = SIZES["13B"], StageMemory(1, 1, n_rows=10**6, slots=4)
    needed = sum(training_memory(cfg, stage, False, device).values())
    needed += sampling_memory(cfg, 4, 1, device)["cache"]
    on_cpu = 12 * cfg.n_params() + 10**6 * 2048  # the saved state, and the data
    free = {"cpu": on_cpu, "cuda": needed}
    if device == "cpu":
        free["cpu"] += needed
    monkeypatch.setattr(memory, "free_memory", lambda device: free[str(device)])
    check_stage("cd", cfg, stage, False, device)
    for short in {"cpu", device}:
        free[short] -= 1
        with pytest.raises(UserError, match=r"'cd' takes about .* GiB of .PU memory \((wei|state)"):
            check_stage("cd", cfg, stage, False, device)
        free[short] += 1


# ---- Devices -----------------------------------------------------------------


@pytest.fixture
def machine(monkeypatch):
    """machine("cuda", bf16=False): a machine with this kind of GPU, if any, and a record of what
    torch was told."""
    def machine(gpu: str, bf16=True, free_gib=80) -> list:
        told, zeros = [], torch.zeros

        def fake_zeros(*size, device):
            if device.type not in ("cpu", gpu):
                raise RuntimeError("no such device")
            return zeros(*size)
        monkeypatch.setattr(torch, "zeros", fake_zeros)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu == "cuda")
        monkeypatch.setattr(torch.cuda, "is_bf16_supported",
                            lambda including_emulation: bf16 or including_emulation)
        monkeypatch.setattr(torch.cuda, "set_device", lambda device: told.append(str(device)))
        monkeypatch.setattr(torch.backends.cuda, "enable_cudnn_sdp",
                            lambda is_on: told.append(("cudnn", is_on)))
        monkeypatch.setattr(torch, "set_float32_matmul_precision", told.append)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (int(free_gib * 2**30), 2**40))
        return told
    monkeypatch.setattr(run, "_precision", "auto")
    monkeypatch.setattr(run, "_gpu_tokens", 16384)
    return machine


@pytest.mark.parametrize("gpu, name, expected, told", [
    ("none", "auto", "cpu", []), ("cuda", "auto", "cuda", [("cudnn", False), "high"]),
    ("cuda", "cuda:1", "cuda:1", ["cuda:1", ("cudnn", False), "high"]), ("cuda", "cpu", "cpu", []),
    ("mps", "auto", "cpu", []), ("mps", "mps", "mps", [])])
def test_the_device_that_is_chosen(machine, gpu, name, expected, told):
    found = machine(gpu)
    assert choose_device(name) == torch.device(expected) and found == told


@pytest.mark.parametrize("gpu, options, words", [
    ("none", ["cuda"], "--device cuda is not available here"), ("cuda", ["mps"], "--device mps is"),
    ("none", ["typo"], "--device typo is"), ("meta", ["meta"], "--device meta is"),
    ("mps", ["mps", "bf16"], "--precision bf16 needs an NVIDIA GPU"),
    ("none", ["cpu", "fp8"], "--precision fp8: choose auto, bf16 or float32")])
def test_a_device_that_is_not_there(machine, gpu, options, words):
    machine(gpu)
    with pytest.raises(UserError, match=words):
        choose_device(*options)


@pytest.mark.parametrize("free_gib, n_tokens", [
    (0.5, 512), (14.6, 4096), (23.9, 8192), (32, 16384), (139, 16384)])
def test_a_small_gpu_reads_fewer_tokens_at_once(machine, free_gib, n_tokens):
    machine("cuda", free_gib=free_gib)
    device = choose_device("cuda")
    assert run.tokens_at_once(0, device) == n_tokens and run.tokens_at_once(7, device) == 7
    assert run.tokens_at_once(0, "cpu") == 1280


@pytest.mark.parametrize("has_bf16, precision, is_bf16", [
    (True, "auto", True), (False, "auto", False),  # a T4 has none
    (True, "float32", False), (False, "bf16", True)])
def test_the_precision_of_a_gpu(machine, has_bf16, precision, is_bf16):
    machine("cuda", bf16=has_bf16)
    device = choose_device("cuda", precision)
    assert compute_dtype(device) == (torch.bfloat16 if is_bf16 else torch.float32)
    assert compute_dtype("cpu") == compute_dtype("mps") == torch.float32
    cache = sampling_memory(SIZES["gpt2"], 1, 512, device)["cache"]
    assert cache == 512 * 2 * 12 * 768 * (2 if is_bf16 else 4)
    assert not autocast("cpu")._enabled and not autocast("mps")._enabled
