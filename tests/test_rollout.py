"""Tests of rollout.py. plain_rollout must sample what a reference written out here samples, one row
and one token at a time; the Sampler must return what plain_rollout returns, token for token. Both
in float64, where log-probs agree to 1e-9 on any machine."""
import copy
import csv
import random
import subprocess
import sys
from collections import Counter
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses import fake_tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

import rollout as rollout_module
from helpers import (
    CFG, END, R, doubled, exact_logits, exact_response, max_difference, random_prompts,
    random_uniforms, shaken)
from model import GPT, GPTConfig
from rollout import Rollouts, Sampler, plain_rollout, rollout
from run import UserError

BENCHMARK = Path(rollout_module.__file__).parent / "experiments" / "rollout_speed.py"
LONG = replace(CFG, context=160)  # so that steps read caches of many lengths


def new_policy(cfg: GPTConfig) -> GPT:
    torch.manual_seed(0)
    return doubled(shaken(GPT(cfg), 1))


@pytest.fixture(scope="module")
def many():
    """50 prompts of 1 to 110 tokens in random order, and the plain rollouts of up to 24 tokens,
    without and with limits."""
    policy, rng, prompts = new_policy(LONG), random.Random(2), [[3] * 110]
    while len(prompts) < 50:
        length = rng.choice([1, 1, 2, 10, 31, 32, 33, 64, rng.randint(1, 110)])
        prompts.append([rng.randrange(16) for _ in range(length)])
    rng.shuffle(prompts)
    uniforms, limits = random_uniforms(50, 24, 2), rng.choices([1, 3, 10, 17, 24, 60], k=50)
    free = plain_rollout(policy, prompts, uniforms, END)
    limited = plain_rollout(policy, prompts, uniforms, END, limits=limits)
    # Ends of turn at many times, and responses cut off by R and by each of the limits.
    assert len(set(free.response_len[free.finished].tolist())) > 12
    assert set(limited.response_len[~limited.finished].tolist()) == {1, 3, 10, 17, 24}
    return SimpleNamespace(policy=policy, prompts=prompts, uniforms=uniforms, limits=limits,
                           free=free, limited=limited)


def the_same(a: Rollouts, b: Rollouts):
    for name in ("tokens", "prompt_len", "response_len", "finished"):
        assert torch.equal(getattr(a, name), getattr(b, name)), name
    assert max_difference(a.logp, b.logp) < 1e-9


def spy(monkeypatch, owner, name, note):
    """Call `note` with the arguments of each call of owner.name, just before it."""
    method = getattr(owner, name)

    def watched(*args):
        note(*args)
        return method(*args)
    monkeypatch.setattr(owner, name, watched)


def test_mask_actions_and_responses_by_hand():
    """Token 0 is the pad and here also the end of turn; it is an action wherever it was sampled."""
    ro = Rollouts(tokens=torch.tensor([[7, 8, 9, 0, 0, 0], [5, 0, 0, 6, 0, 0], [1, 2, 3, 4, 0, 0]]),
                  prompt_len=torch.tensor([2, 1, 3]), response_len=torch.tensor([1, 3, 2]),
                  finished=torch.tensor([False, False, True]), logp=torch.zeros(3, 3))
    assert ro.mask.tolist() == [[True, False, False], [True, True, True], [True, True, False]]
    assert ro.responses() == [[9], [0, 0, 6], [4, 0]] and ro.lengths.tolist() == [3, 4, 5]
    assert ro.rows(torch.tensor([0])).tolist() == [[7, 8, 9]]
    assert ro.rows(torch.tensor([1, 0])).tolist() == [[5, 0, 0, 6], [7, 8, 9, 0]]
    # A rectangle of tokens without room for R columns after the longest prompt changes nothing.
    for one in (ro, replace(ro, tokens=ro.tokens[:, :5])):
        assert one.actions.shape == (3, 3) and one.actions[ro.mask].tolist() == [9, 0, 0, 6, 4, 0]


def reference_response(net64: GPT, prompt, uniforms, temperature, limit) -> list[int]:
    """One response by inverting the distribution, token by token, everything read again."""
    row = list(prompt)
    for u in uniforms.tolist()[:limit]:
        cdf = (exact_logits(net64, row)[-1] / temperature).softmax(0).cumsum(0)
        row.append(min(int((cdf <= u).sum()), 15))
        if row[-1] == END:
            break
    return row[len(prompt):]


@pytest.mark.parametrize("temperature, limits", [(1.0, [R] * 24), (0.7, [1, 4, 10, 60] * 6)])
def test_plain_rollout_samples_from_the_policy(temperature, limits):
    policy, prompts, uniforms = new_policy(CFG), random_prompts(24, 0), random_uniforms(24, R, 0)
    ro = plain_rollout(policy, prompts, uniforms, END, temperature, limits)
    assert 4 < ro.finished.sum() < 20 and not ro.logp.requires_grad
    assert ro.prompt_len.tolist() == [len(prompt) for prompt in prompts]
    for n, prompt in enumerate(prompts):
        response = reference_response(policy, prompt, uniforms[n], temperature, limits[n])
        pads = [0] * (20 + R - len(prompt) - len(response))  # the longest prompt has 20 tokens
        assert ro.tokens[n].tolist() == prompt + response + pads
        assert ro.response_len[n] == len(response) and ro.finished[n] == (response[-1] == END)
        logp, _ = exact_response(policy, prompt, ro, n, temperature)
        assert max_difference(ro.logp[n, :len(response)], logp) < 1e-9
        assert (ro.logp[n, len(response):] == 0).all()


class Operations(TorchDispatchMode):
    """Every operation, with the shapes of its tensors and its constants."""
    WAITING = ("_local_scalar_dense", "is_nonzero", "nonzero", "masked_select", "equal", "unique")

    def __init__(self):
        super().__init__()
        self.seen, self.waiting = [], 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        leaves = tree_leaves((args, kwargs, out))
        self.seen.append((str(func), *(getattr(x, "shape", x) for x in leaves)))
        self.waiting += func.overloadpacket.__name__ in self.WAITING
        return out


@pytest.mark.parametrize("slots, poll_every", [
    (0, 0), (2, 1), (3, 2), (4, 3), (8, 5), (13, 8), (50, 4), (64, 1), (256, 50)])
def test_a_sampler_returns_what_plain_rollout_returns(many, slots, poll_every, monkeypatch):
    """With few slots that are refilled, all at once, and in the shipped defaults (0).
    Short prompts are admitted first. The host waits for the device in its polls only."""
    sampler = Sampler(many.policy, END, slots=slots, poll_every=poll_every)
    uses, lengths, polls = Counter(), [], []

    def note(slots, responses, prompts):
        uses.update(slots)
        lengths.extend(len(prompts[i]) for i in responses)
    spy(monkeypatch, sampler, "_admit", note)
    spy(monkeypatch, torch.Tensor, "tolist", lambda x: polls.append(x.numel()))
    with Operations() as operations:
        ro = sampler(many.prompts, many.uniforms)
        assert operations.waiting == 0
        ro.response_len[0].item()
        assert operations.waiting == 1  # so a wait would have been seen
    the_same(ro, many.free)
    assert not ro.logp.requires_grad
    B = sampler.slots
    assert B == min(slots or 64, 64) and len(lengths) == 50 and lengths == sorted(lengths)
    assert len(uses) == min(B, 50) and (max(uses.values()) > 1) == (B < 50)      # refilled
    assert sampler.steps * B > sampler.slot_steps or B == 1 or poll_every == 50  # compacted
    assert len(polls) * (poll_every or 2) == sampler.steps
    assert sum(polls) * (poll_every or 2) == sampler.slot_steps  # a number for each slot in use
    the_same(sampler(many.prompts, many.uniforms, many.limits), many.limited)


@pytest.mark.parametrize("n, r, slots, temperature", [
    (1, R, 4, 1.0), (3, R, 8, 0.7), (5, 1, 2, 1.0), (4, 1, 4, 1.0), (24, R, 6, 2.0)])
def test_few_prompts_short_responses_and_temperatures(many, n, r, slots, temperature):
    for prompts in (many.prompts[:n], [[i % 16] for i in range(n)]):  # one token: no prefill
        args = many.policy, prompts, many.uniforms[:n, :r], END, temperature
        the_same(rollout(*args, slots), plain_rollout(*args))


@pytest.mark.parametrize("slots, poll_every", [(2, 1), (3, 8), (1, 64)])
def test_rows_may_fill_the_whole_context(slots, poll_every):
    policy, prompts = new_policy(CFG), [[5, 2] * 21 + [11], [1] * 43, [7]]
    sampler, uniforms = Sampler(policy, -1, 1.0, slots, poll_every), random_uniforms(3, 20, 4)
    the_same(sampler(prompts, uniforms), plain_rollout(policy, prompts, uniforms, -1))
    assert sampler.cache.k.shape[3] == 64  # 43 + 20, and one more for the end-of-context token


def test_a_shared_prompt_is_read_once_in_batches_of_like_length(many, monkeypatch):
    """A pair as in a comparison, a best-of-five, and two prompts that differ in the last token only
    and so share all that is prefilled. Few slots may read one again, and disturb nobody."""
    pair, best, last, alone = ([seed, 5, 9] * (4 + seed) for seed in range(4))
    prompts = [best, pair, best, last, best, alone, best, last[:-1] + [1], pair, best]
    uniforms, reads = random_uniforms(10, 40, 5), []
    expected = plain_rollout(many.policy, prompts, uniforms, -1)
    spy(monkeypatch, rollout_module, "prefill", lambda net, ids: reads.append(ids.tolist()))
    for slots, prefill_tokens in ((16, 8192), (16, 45), (4, 8192)):
        monkeypatch.setattr(rollout_module, "PREFILL_TOKENS", prefill_tokens)
        reads.clear()
        the_same(rollout(many.policy, prompts, uniforms, -1, slots=slots), expected)
        assert all(len(ids) * len(ids[0]) <= prefill_tokens for ids in reads)
        assert sum(len(ids) for ids in reads) == (4 if slots == 16 else 6)


def state(sampler: Sampler) -> dict[str, torch.Tensor]:
    tensors = vars(sampler) | {f"cache.{name}": x for name, x in vars(sampler.cache).items()}
    return {name: x for name, x in tensors.items() if isinstance(x, torch.Tensor)}


def spoil(sampler: Sampler):
    """Overwrite all that an earlier call could have left behind with other numbers."""
    for name, x in state(sampler).items():
        x.fill_({"uniforms": 0.999, "limit": 1, "response": 0, "cache.lengths": 80}.get(name, 3))


@pytest.mark.parametrize("is_spoiled, poll_every", [(False, 1), (True, 1), (True, 3)])
def test_a_sampler_can_be_used_again_while_its_policy_changes(is_spoiled, poll_every):
    """Buffers are kept, or made anew; and what was returned stays as it was."""
    policy, rng, kept, earlier = new_policy(LONG), random.Random(8), 0, []
    sampler = Sampler(policy, END, slots=6, poll_every=poll_every)
    for n, longest, r, is_limited in (
            (20, 60, 30, True), (20, 60, 30, False), (3, 10, 30, False), (5, 100, 30, True),
            (6, 100, 30, False), (1, 1, 30, False), (7, 64, 5, True), (30, 2, 30, False)):
        prompts = random_prompts(n, rng.randrange(999), longest)
        uniforms = random_uniforms(n, r, rng.randrange(999))
        limits = [rng.randint(1, r) for _ in range(n)] if is_limited else None
        if is_spoiled and sampler.cache:
            spoil(sampler)
        cache = sampler.cache
        ro = sampler(prompts, uniforms, limits)
        kept += sampler.cache is cache
        the_same(ro, plain_rollout(policy, prompts, uniforms, END, limits=limits))
        earlier.append((ro, copy.deepcopy(ro)))
        policy.ln_f.bias.data += 0.3 * torch.randn(32, generator=torch.Generator().manual_seed(n))
    assert 2 <= kept <= 5  # else there would be nothing stale, or nothing that has grown
    for ro, as_returned in earlier:
        the_same(ro, as_returned)


def test_a_cache_is_kept_while_it_is_large_enough():
    """It holds the prompt, 8 tokens and the 2 steps between polls, in multiples of 32."""
    policy, uniforms = new_policy(LONG), random_uniforms(2, 8, 0)
    sampler = Sampler(policy, END, slots=2, poll_every=2)
    for longest, size in ((22, 32), (5, 32), (23, 64), (7, 64)):
        prompts = [[1] * longest, [2]]
        the_same(sampler(prompts, uniforms), plain_rollout(policy, prompts, uniforms, END))
        assert sampler.cache.k.shape[3] == size


def run_without_values(question):
    """Steps on tensors that have shapes but no values: to ask for a value on the host raises."""
    with fake_tensor.FakeTensorMode(), torch.no_grad():
        sampler = Sampler(GPT(LONG), END, slots=4)
        sampler._reserve(longest=96, n_responses=6, max_response=R)
        for B, C in ((4, 32), (4, 96), (2, 64), (1, 32)):
            shapes = {name: x.shape for name, x in state(sampler).items()}
            sampler._step(B, C)
            question(sampler.count)
            assert {name: x.shape for name, x in state(sampler).items()} == shapes


def test_a_step_asks_for_no_value_on_the_host():
    run_without_values(lambda count: None)


@pytest.mark.parametrize("question", [lambda count: count[0].item(), lambda count: count.nonzero()])
def test_the_test_above_can_fail(question):
    with pytest.raises((fake_tensor.DataDependentOutputException,
                        fake_tensor.DynamicOutputShapeException)):
        run_without_values(question)


def test_all_steps_are_the_same_operations_in_the_same_place(many, monkeypatch):
    """As a CUDA graph must: whatever the slots do, for each (B, C) the same operations, shapes and
    constants; the state stays where it is. A step reads no more of the cache than it must."""
    sampler, operations, places = Sampler(many.policy, END, slots=8, poll_every=3), {}, set()
    step = sampler._step

    def watched(B, C):
        if sampler.steps % 3 == 1:  # just after a poll
            longest = int(sampler.cache.lengths[:B].max()) + 3
            assert C == (longest + 31) // 32 * 32
        with Operations() as seen:
            step(B, C)
        operations.setdefault((B, C), []).append(tuple(seen.seen))
        for name, x in state(sampler).items():
            places.add((name, x.data_ptr(), x.shape, x.stride(), x.dtype))
    monkeypatch.setattr(sampler, "_step", watched)
    sampler(many.prompts, many.uniforms)
    sampler(many.prompts, many.uniforms, many.limits)
    sampler([[1] * 100] + [[1]] * 7, torch.zeros(8, 24), [3] + [24] * 7)  # the longest ends first
    assert {B for B, _ in operations} == {8, 4, 2, 1} and len({C for _, C in operations}) > 3
    assert all(len(set(seen)) == 1 and len(seen[0]) > 50 for seen in operations.values())
    assert len(places) == len(state(sampler)) == 10


def test_steps_by_hand():
    """Of prompts of one length the last comes first. Two slots polled after each step: 1 and 2
    tokens start; the second of them gets 3 as its neighbor, then 1; the 3 goes on alone."""
    def counted(lengths, slots, poll_every, prompts=None):
        sampler = Sampler(GPT(CFG), -1, slots=slots, poll_every=poll_every)
        uniforms = torch.rand(len(lengths), max(lengths))
        ro = sampler(prompts or [[1, 2]] * len(lengths), uniforms, lengths)
        assert ro.response_len.tolist() == lengths
        return sampler.steps, sampler.slot_steps
    assert counted([1, 3, 2, 1], 2, 1) == (4, 7)   # no waste at all
    assert counted([1, 3, 2, 1], 2, 2) == (6, 10)  # 1 and 2; 1 and 3; 3 alone, seen one step late
    assert counted([1, 3, 2, 1], 4, 1) == counted([1, 3, 2, 1], 64, 1) == (3, 4 + 2 + 1)
    assert counted([5, 5, 5], 64, 1) == (5, 4 * 5) and counted([5, 5, 5], 3, 1) == (5, 3 * 5)
    assert counted([3, 3, 1, 1, 9, 1, 1, 1], 8, 1) == (9, 8 + 4 + 4 + 6 * 1)  # 9 moves to slot 0
    assert counted([2, 2, 2, 9], 3, 1, [[1], [1], [1], [1, 1]]) == (11, 3 * 2 + 1 * 9)
    # One idle slot of 16 waits for a second one: steps 4 to 9 sample the last response.
    assert counted([6] * 15 + [3, 1], 16, 1) == (9, 6 * 16 + 3 * 1)


def test_the_bf16_copy_follows_the_policy(many, monkeypatch):
    """The arithmetic of a GPU, run on the CPU: autocast to bf16, and a cache in bf16."""
    class SaysGpu(torch.nn.Parameter):
        device = torch.device("cuda")
    monkeypatch.setattr(rollout_module, "autocast", lambda _: torch.autocast("cpu", torch.bfloat16))
    monkeypatch.setattr(rollout_module, "compute_dtype", lambda device: torch.bfloat16)
    policy, responses = copy.deepcopy(many.policy).float(), []
    policy.embed.weight = SaysGpu(policy.embed.weight.data)
    sampler = Sampler(policy, END, slots=8, use_graphs=False)
    assert sampler.poll_every == 8
    sampler.device = torch.device("cpu")
    for _ in range(2):
        responses.append(sampler(many.prompts, many.uniforms).responses())
        for (name, mine), theirs in zip(sampler.model.named_parameters(), policy.parameters()):
            is_matrix = "blocks" in name and "ln_" not in name
            assert mine.dtype == (torch.bfloat16 if is_matrix else torch.float32), name
            assert theirs.dtype == torch.float32 and torch.equal(mine, theirs.to(mine.dtype))
            theirs.data *= 1.5
    assert responses[0] != responses[1]


def test_a_step_of_each_shape_that_comes_again_is_recorded_once_and_replayed(many, monkeypatch):
    """On a stand-in for CUDA in which recording executes nothing and a replay makes the step."""
    sampler, graphs, events = Sampler(many.policy, END, slots=8), [], []
    main, side = SimpleNamespace(), SimpleNamespace()
    main.wait_stream = lambda other: events.append("main waits")
    side.wait_stream = lambda other: events.append("side waits")
    step = sampler._step

    class Graph:
        shape = None

        def replay(self):
            assert self.cache is sampler.cache  # else it would write to memory that was freed
            events.append("replay")
            step(*self.shape)

        def pool(self):
            return self

    @contextmanager
    def record(graph, pool, capture_error_mode):
        assert capture_error_mode == "thread_local"  # NCCL has a thread of its own
        assert pool is (graphs[0] if graphs else None)
        graphs.append(graph)
        yield

    def step_or_record(B, C):
        if graphs and graphs[-1].shape is None:
            graphs[-1].shape, graphs[-1].cache = (B, C), sampler.cache
        else:
            events.append("step")
            step(B, C)
    sampler._step, sampler.use_graphs, sampler.stream = step_or_record, True, side
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", record)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext(events.append("enter")))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: main)
    the_same(sampler(many.prompts, many.uniforms), many.free)
    the_same(sampler(many.prompts, many.uniforms, many.limits), many.limited)
    assert len({graph.shape for graph in graphs}) == len(graphs) > 5
    assert events[:4] == ["side waits", "enter", "step", "main waits"]
    # The first step of a shape is eager, the second is recorded, and from then on it is replayed.
    assert events.count("step") + events.count("replay") == sampler.steps
    assert len(graphs) <= events.count("step") < 2 * len(graphs)
    graphs.clear()  # another R needs other buffers, and what was recorded is of no use
    args = many.prompts, many.uniforms[:, :5]
    the_same(sampler(*args), plain_rollout(many.policy, *args, END))


def test_a_rollout_refuses_what_it_cannot_sample():
    net = GPT(CFG)
    rollout(net, [[1] * 59, [1]], torch.rand(2, 4), END)  # 59 + 4, and one for end-of-context
    with pytest.raises(UserError, match="--context 64 .*60 tokens.* 4"):
        rollout(net, [[1] * 60, [1]], torch.rand(2, 4), END)
    for prompts, r in (([[1, 2], [], [3]], 4), ([], 4), ([[1]], 0)):
        with pytest.raises(UserError, match="is empty|no room for a response"):
            rollout(net, prompts, torch.rand(len(prompts), r), END)


def test_the_benchmark_runs(tmp_path):
    """It takes seconds: a process of its own imports PyTorch."""
    table = tmp_path / "rows.csv"
    options = ("--size toy --spread constant --responses 4 --slots 2 --few 2 --repeats 1 "
               "--only sampling --device cpu --csv").split()
    done = subprocess.run([sys.executable, BENCHMARK, *options, table], capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    with open(table, newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) >= 4 and all(float(row["tokens_per_s"]) > 0 for row in rows)
    assert all(float(row["roofline"]) > 0 for row in rows[1:4])


def test_flops_of_an_iteration_are_those_that_torch_counts(monkeypatch):
    """Rows of one length, so that no pad is counted; attention and the PM's head are left out."""
    monkeypatch.syspath_prepend(BENCHMARK.parent)
    benchmark = __import__("rollout_speed")
    cfg, ids = GPTConfig(3, 2, 32, 64, 64), torch.ones(4, 20, dtype=torch.long)
    at = torch.zeros(4, 20, dtype=torch.bool)
    at[:, 12:] = True
    with FlopCounterMode(display=False) as counter:
        GPT(cfg)(ids, at).sum().backward()
    attention = 4 * 3 * 32 * 4 * 20**2 / 2
    counted = counter.get_flop_counts()["Global"]
    matrices = sum(n for name, n in counted.items() if "mm" in str(name))
    # The first layer's matrices pass a gradient to their input, the embedding, too.
    assert matrices == 3 * (benchmark.trunk_flops(cfg, [20] * 4, 32) - attention)
