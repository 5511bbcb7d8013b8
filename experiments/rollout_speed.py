"""How fast is the rollout, and what does each trick bring? (The papers state no speeds.)

    python experiments/rollout_speed.py                     # toy size, three spreads of lengths
    python experiments/rollout_speed.py --size 10M
    python experiments/rollout_speed.py --size gpt2 --responses 1024 --slots 256   # wants a GPU

One process; the same random weights, prompts and response lengths in every row; rows are timed in
turn, and the median of some repetitions counts. The first table times sampling alone:

  (a) re-run the prefix        rollout.plain_rollout: no cache at all (timed on a few prompts)
  (b) KV cache, padded batch   the cache grows by a copy for each token, and a batch waits for its
                               longest response
  (c) static cache             the cache is allocated once
  (d) + slot refill            rollout.Sampler without CUDA graphs
  (e) + CUDA graphs            rollout.Sampler, on a GPU
  (f) Hugging Face generate    where transformers is installed: the same weights, SDPA, its KV
                               cache, prompts sorted by length, no top-k, and each row stopped at
                               the same length

The column `tokens/s` counts response tokens. `wasted` is the share of slot-steps that sample
nothing wanted. `memory` is the bytes that the decode steps need (weights once a step, the cached
tokens of each busy slot), `FLOPs` what decode steps and prefills need (two a weight and token, and
attention's), each as a share of what a large copy and a large matmul reach here, in this process.
`roofline` is the tokens/s at which the larger of the two shares would be 1. The last lines time a
PPO iteration by phase, beside the seconds that a large matmul would take for a phase's FLOPs; with
--profile, they also say which operators the time goes to.

Read it in this order:
  1. Workload       prompts and lengths
  2. Slower ways    (a), (b), (c) and (f)
  3. Measuring      clocks, peak memory, and what sampling cannot do without
  4. Tables         sampling, and a PPO iteration
  5. Command

Legend:  B rows of a batch   P prompt tokens   R response tokens   D width
"""
import argparse
import csv
import gc
import statistics
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Callable

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torch

from cache import KVCache, forward_cached
from data import pad
from hub import FIXED, tensor_names
from model import GPT, SIZES, GPTConfig, sample
from pm import ScalarModel
from ppo import (Experience, PPOConfig, all_logprobs, all_values, gae, pm_scores, shaped_rewards,
                 update, whiten)
from rollout import Sampler, plain_rollout
from run import autocast, choose_device, compute_dtype, errors_in_one_sentence, rng, torch_rng

# ---- 1. Workload -------------------------------------------------------------

# Shape, vocabulary, and a context with room for HH's lengths at every size.
SHAPES = {"toy": (SIZES["toy"], 1024, 512),
          "10M": (GPTConfig(6, 6, 384), 1024, 640),
          "gpt2": (SIZES["gpt2"], 50304, 1024)}
# Ten equally likely lengths (quantiles 5%, 15%, ..., 95%) of prompts and of responses, in tokens.
SPREADS = {
    # 1,500 comparisons of HH-RLHF's test files in GPT-2's encoding, the chosen reply, cut at the
    # 128 tokens of the paper's samples (App. B.1).
    "hh": ((16, 21, 36, 64, 87, 115, 148, 185, 251, 372), (8, 14, 19, 25, 32, 41, 53, 68, 92, 128)),
    # Held-out prompts, and the LM's replies.
    "toy": ((12, 13, 14, 15, 16, 18, 20, 29, 33, 37), (3, 7, 9, 10, 11, 12, 13, 15, 18, 25)),
    "constant": ((64,), (64,)),
    # As in the script that times TRL's PPO, which is not in the repository (experiments/README.md).
    "uniform": (tuple(range(12, 40)), (32,)),
}
NEVER = -1  # as the end-of-turn token: responses end at their limits only


@dataclass
class Work:
    prompts: list[list[int]]
    uniforms: torch.Tensor  # (N, R)
    limits: list[int]       # how long each response is to be

    def first(self, n: int) -> "Work":
        return Work(self.prompts[:n], self.uniforms[:n], self.limits[:n])


def workload(cfg: GPTConfig, spread: str, n: int, seed: int) -> Work:
    """n prompts of random ids; the deciles of lengths come in random order."""
    generator, random = torch_rng(seed, spread), rng(seed, spread)
    prompt_deciles, response_deciles = SPREADS[spread]
    prompt_lengths = [prompt_deciles[i % len(prompt_deciles)] for i in range(n)]
    limits = [response_deciles[i % len(response_deciles)] for i in range(n)]
    random.shuffle(prompt_lengths)
    random.shuffle(limits)
    prompts = []
    for length in prompt_lengths:
        prompts.append(torch.randint(cfg.vocab_size, (length,), generator=generator).tolist())
    return Work(prompts, torch.rand(n, max(limits), generator=generator), limits)


# ---- 2. Slower ways ----------------------------------------------------------


@dataclass
class Sampled:
    replies: list[list[int]]
    slot_steps: int = 0  # the sum over steps of the rows that they compute; 0: not counted
    steps: int = 0


def rerun_prefix(policy: GPT, work: Work) -> Sampled:
    """(a)"""
    ro = plain_rollout(policy, work.prompts, work.uniforms, NEVER, limits=work.limits)
    return Sampled(ro.responses())


@torch.no_grad()
def padded(policy: GPT, work: Work, slots: int, grow: bool) -> Sampled:
    """(b) and (c): batches in the order of arrival, each of which waits for its longest response.
    grow: whether the cache grows by a copy for each token."""
    device, result = policy.embed.weight.device, Sampled([])
    dtype = compute_dtype(device)
    for start in range(0, len(work.prompts), slots):
        group = range(len(work.prompts))[start:start + slots]
        ids, lengths = pad([work.prompts[i] for i in group])               # (B, P), (B,)
        ids, lengths = ids.to(device), lengths.to(device)
        (B, P), R = ids.shape, max(work.limits[i] for i in group)
        tokens = torch.zeros(B, R, dtype=torch.long, device=device)
        uniforms = work.uniforms[group.start:group.stop].to(device)        # (B, R)
        with autocast(device):
            cache = KVCache(policy.cfg, B, P if grow else P + R, device, dtype)
            hidden = forward_cached(policy, ids, cache)                    # (B, P, D)
            hidden = hidden[torch.arange(B, device=device), lengths - 1]   # (B, D)
            cache.lengths = lengths.clone()
            for t in range(R):
                tokens[:, t] = sample(policy.logits(hidden), uniforms[:, t])[0]
                if grow:
                    column = torch.zeros_like(cache.k[:, :, :, :1])
                    cache.k = torch.cat((cache.k, column), 3)
                    cache.v = torch.cat((cache.v, column), 3)
                hidden = forward_cached(policy, tokens[:, t:t + 1], cache)[:, 0]  # (B, D)
                cache.lengths += 1
        result.slot_steps += B * R
        result.steps += R
        for row, i in zip(tokens.tolist(), group):
            result.replies.append(row[:work.limits[i]])
    return result


def refill(sampler: Sampler, work: Work) -> Sampled:
    """(d) and (e)"""
    slot_steps, steps = sampler.slot_steps, sampler.steps
    replies = sampler(work.prompts, work.uniforms, work.limits).responses()
    return Sampled(replies, sampler.slot_steps - slot_steps, sampler.steps - steps)


def hugging_face(policy: GPT):
    """(f): a function of work and slots; None where transformers is not installed."""
    try:
        import transformers
    except ImportError:
        return None
    transformers.logging.set_verbosity_error()
    cfg, state, weights = policy.cfg, policy.state_dict(), {}
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=cfg.vocab_size, n_positions=cfg.context, n_embd=cfg.d_model,
        n_layer=cfg.n_layer, n_head=cfg.n_head, bos_token_id=0, eos_token_id=0,
        attn_implementation="sdpa", **FIXED))
    for ours, name, transposed in tensor_names(cfg.n_layer):
        weights[name] = state[ours].t() if transposed else state[ours]
    theirs.transformer.load_state_dict(weights)
    device = policy.embed.weight.device
    theirs.to(device, torch.bfloat16 if device.type == "cuda" else torch.float32).eval()

    class Stop(transformers.StoppingCriteria):
        def __init__(self, lengths):
            self.lengths = lengths

        def __call__(self, ids, scores, **_):
            return ids.shape[1] >= self.lengths

    @torch.no_grad()
    def generate(work: Work, slots: int) -> Sampled:
        order = sorted(range(len(work.prompts)), key=lambda i: len(work.prompts[i]))
        result = Sampled([[]] * len(order))
        for start in range(0, len(order), slots):
            group = order[start:start + slots]
            P = len(work.prompts[group[-1]])  # sorted: the last is the longest
            R = max(work.limits[i] for i in group)
            ids = torch.zeros(len(group), P, dtype=torch.long)  # padded on the left
            mask = torch.zeros_like(ids)
            for row, i in enumerate(group):
                n = len(work.prompts[i])
                ids[row, P - n:] = torch.tensor(work.prompts[i])
                mask[row, P - n:] = 1
            stop = Stop(torch.tensor([P + work.limits[i] for i in group], device=device))
            full = theirs.generate(
                ids.to(device), attention_mask=mask.to(device), do_sample=True, top_k=0, top_p=1.0,
                max_new_tokens=R, pad_token_id=0, eos_token_id=None, use_cache=True,
                stopping_criteria=transformers.StoppingCriteriaList([stop]))
            result.steps += full.shape[1] - P
            result.slot_steps += len(group) * (full.shape[1] - P)
            for i, row in zip(group, full.tolist()):
                result.replies[i] = row[P:P + work.limits[i]]
        return result
    return generate


# ---- 3. Measuring ------------------------------------------------------------


def sync(device):
    if device.type == "cuda":
        torch.cuda.synchronize()


def clock(function: Callable, device) -> float:
    """Seconds."""
    sync(device)
    start = time.perf_counter()
    function()
    sync(device)
    return time.perf_counter() - start


def machine(device) -> tuple[float, float]:
    """Bytes/s of a large copy (read and written) and FLOP/s of a large matmul, the best of five."""
    dtype = compute_dtype(device)
    n_bytes, d = (2**30, 8192) if device.type == "cuda" else (2**27, 1536)
    a, b = torch.ones(n_bytes // 4, device=device), torch.empty(n_bytes // 4, device=device)
    x = torch.ones(d, d, device=device, dtype=dtype)
    copy_seconds = min(clock(lambda: b.copy_(a), device) for _ in range(5))
    matmul_seconds = min(clock(lambda: x @ x, device) for _ in range(5))
    return 2 * n_bytes / copy_seconds, 2 * d**3 / matmul_seconds


class PeakMemory:
    """Bytes that a block of code holds at its peak beyond what was held before; None if the system
    does not say."""

    def __init__(self, device):
        self.on_gpu = device.type == "cuda"
        self.before, self.bytes = None, None

    def __enter__(self):
        gc.collect()
        if self.on_gpu:
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
            return self
        try:
            Path("/proc/self/clear_refs").write_text("5")  # Linux: restarts VmHWM, the peak
            self.before = self._read("VmRSS")
        except OSError:
            pass
        return self

    def __exit__(self, *_):
        if self.on_gpu:
            self.bytes = torch.cuda.max_memory_allocated() - self.before
        elif self.before is not None:
            self.bytes = self._read("VmHWM") - self.before

    @staticmethod
    def _read(name: str) -> int:
        status = Path("/proc/self/status").read_text()
        return 1024 * int(status.split(name + ":")[1].split()[0])


def needed(cfg: GPTConfig, work: Work, steps: int, number_bytes: int) -> tuple[float, float]:
    """Bytes and FLOPs that sampling cannot do without: the weights once a step, each response's
    cached tokens at each of its steps; two FLOPs a weight and token, and attention's."""
    weights = cfg.n_params() - cfg.context * cfg.d_model
    per_token = 2 * cfg.n_layer * cfg.d_model  # numbers in the cache
    read, attended = 0.0, 0.0                  # cached tokens, over all steps; with the prefills
    for prompt, limit in zip(work.prompts, work.limits):
        read += (len(prompt) + (limit - 1) / 2) * limit
        attended += len(prompt) ** 2 / 2
    attended += read
    n_prompt, n_response = sum(map(len, work.prompts)), sum(work.limits)
    trunk = 12 * cfg.n_layer * cfg.d_model**2 * (n_prompt + n_response)
    logits = cfg.vocab_size * cfg.d_model * n_response
    n_bytes = number_bytes * (steps * weights + per_token * read)
    return n_bytes, 2 * (trunk + logits) + 2 * per_token * attended


def trunk_flops(cfg: GPTConfig, lengths: list[int], n_read: int) -> float:
    """FLOPs of a forward pass over rows of these lengths, of which n_read positions are read: the
    others end at the last block's attention (GPT.forward)."""
    n, D2 = sum(lengths), cfg.d_model**2
    attended = sum(length**2 / 2 for length in lengths)
    matrices = (12 * (cfg.n_layer - 1) + 3) * D2 * n + 9 * D2 * n_read
    return 2 * matrices + 4 * cfg.n_layer * cfg.d_model * attended


def iteration_flops(cfg: GPTConfig, work: Work, passes: int) -> dict[str, float]:
    """FLOPs that each phase of a PPO iteration cannot do without. A backward pass takes twice those
    of its forward pass."""
    lengths = [len(prompt) + limit for prompt, limit in zip(work.prompts, work.limits)]
    n_tokens = sum(work.limits)
    trunk, logits = trunk_flops(cfg, lengths, n_tokens), 2 * cfg.vocab_size * cfg.d_model * n_tokens
    pm = trunk_flops(cfg, lengths, n_read=len(lengths))
    return {"rollout": needed(cfg, work, 0, 0)[1], "scoring": 3 * trunk + 2 * logits + pm,
            "update": 3 * passes * (2 * trunk + logits)}


KINDS = {"matrix products": ("aten::addmm", "aten::mm", "aten::bmm"),
         "attention": ("aten::_scaled_dot", "aten::_flash", "aten::_efficient"),
         "GELU": ("aten::gelu",),
         "optimizer": ("Optimizer", "aten::_fused_adam", "aten::_foreach", "aten::linalg_vector"),
         "other operators": ("",)}


def shares(phase: Callable, device) -> dict[str, float]:
    """The share of a phase's time that each kind of operator takes on the host. What is left is
    Python's, to which the profiler adds a little."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        seconds = clock(phase, device)
    result = dict.fromkeys(KINDS, 0.0)
    for event in profiler.key_averages():
        for kind, names in KINDS.items():
            if event.key.startswith(names):
                result[kind] += event.self_cpu_time_total / 1e6 / seconds
                break
    result["Python"] = 1 - sum(result.values())
    return result


# ---- 4. Tables ---------------------------------------------------------------

RERUN, PADDED, STATIC = "(a) re-run the prefix", "(b) KV cache, padded batch", "(c) static cache"
REFILL, GRAPHS, THEIRS = "(d) + slot refill", "(e) + CUDA graphs", "(f) Hugging Face generate"


@dataclass
class Way:
    """One row of the first table."""
    sample: Callable[[], Sampled]
    seconds: list[float] = field(default_factory=list)
    result: Sampled | None = None
    peak: int | None = None

    def run(self):
        self.result = self.sample()


def ways_to_sample(policy: GPT, work: Work, args, device) -> dict[str, Way]:
    plain = Sampler(policy, NEVER, slots=args.slots, use_graphs=False)
    few = work.first(args.few)
    ways = {RERUN: Way(lambda: rerun_prefix(policy, few)),
            PADDED: Way(lambda: padded(policy, work, args.slots, grow=True)),
            STATIC: Way(lambda: padded(policy, work, args.slots, grow=False)),
            REFILL: Way(lambda: refill(plain, work))}
    if device.type == "cuda":
        recorded = Sampler(policy, NEVER, slots=args.slots)
        ways[GRAPHS] = Way(lambda: refill(recorded, work))
    generate = hugging_face(policy)
    if generate:
        ways[THEIRS] = Way(lambda: generate(work, args.slots))
    return ways


def time_ways(ways: dict[str, Way], repeats: int, device):
    for way in ways.values():  # once for warm-up, and for what does not vary
        with PeakMemory(device) as memory:
            way.seconds.append(clock(way.run, device))
        way.peak = memory.bytes
    for _ in range(repeats):
        for name, way in ways.items():
            if name != RERUN:  # it takes longer than all others, and once will do
                way.seconds.append(clock(way.run, device))


def sampling_table(policy: GPT, spread: str, args, device) -> list[dict]:
    work = workload(policy.cfg, spread, args.responses, args.seed)
    ways = ways_to_sample(policy, work, args, device)
    time_ways(ways, args.repeats, device)
    want = ways[REFILL].result.replies
    assert [len(reply) for reply in want] == work.limits
    copy_speed, matmul_speed = machine(device)
    lengths = [len(prompt) for prompt in work.prompts]
    print(f"\n{spread}: prompts of {min(lengths)} to {max(lengths)} tokens, responses of "
          f"{min(work.limits)} to {max(work.limits)} (mean {statistics.mean(work.limits):.0f}); "
          f"copy {copy_speed / 1e9:.0f} GB/s, matmul {matmul_speed / 1e9:,.0f} GFLOP/s")
    print(f"    {'':28} tokens/s   x (b)   ms a step   wasted   memory    FLOPs   roofline   "
          "peak MiB   same tokens")
    rows, rate = [], {}
    for name, way in ways.items():
        found, seconds = way.result, statistics.median(way.seconds[1:] or way.seconds)
        n_tokens = sum(map(len, found.replies))
        rate[name] = n_tokens / seconds
        row = {"size": args.size, "spread": spread, "way": name, "tokens_per_s": rate[name],
               "ratio": None, "step_ms": None, "wasted": None, "memory": None, "flops": None,
               "roofline": None,
               "peak_mib": way.peak / 2**20 if way.peak else None, "same": None}
        if name != THEIRS:  # it draws its own random numbers
            row["same"] = statistics.mean(a == b for a, b in zip(found.replies, want))
        if name != RERUN:
            number_bytes = 2 if device.type == "cuda" else 4
            n_bytes, n_flops = needed(policy.cfg, work, found.steps, number_bytes)
            row |= {"ratio": rate[name] / rate[PADDED], "step_ms": 1e3 * seconds / found.steps,
                    "wasted": 1 - n_tokens / found.slot_steps,
                    "memory": n_bytes / seconds / copy_speed,
                    "flops": n_flops / seconds / matmul_speed,
                    "roofline": n_tokens / max(n_bytes / copy_speed, n_flops / matmul_speed)}
        rows.append(row)
        print_row(row)
    if THEIRS in ways:
        print(f"    (d) is {rate[REFILL] / rate[THEIRS]:.2f} x (f)")
    else:
        print("    Hugging Face generate is not timed: pip install transformers")
    return rows


def print_row(row: dict):
    cells = [f"    {row['way']:28} {row['tokens_per_s']:8,.0f}"]
    for key, width, digits in (("ratio", 7, 2), ("step_ms", 11, 2), ("wasted", 8, 2),
                               ("memory", 8, 2), ("flops", 8, 2), ("roofline", 10, 0),
                               ("peak_mib", 10, 0), ("same", 13, 3)):
        if row[key] is None:
            cells.append(f"{'-':>{width}}")
        else:
            cells.append(f"{row[key]:{width}.{digits}f}")
    print(" ".join(cells))


class Iteration:
    """One PPO iteration in three phases, with the functions that train_rl.Learner.iterate calls."""

    def __init__(self, policy: GPT, spread: str, args, device):
        self.policy, self.cfg = policy, PPOConfig(passes=args.passes)
        self.work = workload(policy.cfg, spread, self.cfg.batch, args.seed)
        self.reference = GPT(policy.cfg).to(device).eval()
        self.reference.load_state_dict(policy.state_dict())
        self.pm = ScalarModel(policy).to(device).eval()
        self.critic = ScalarModel(policy, zero_head=True).to(device)
        parameters = [*policy.parameters(), *self.critic.parameters()]
        self.optimizer = torch.optim.Adam(parameters, lr=0.0, fused=True)
        self.sampler = Sampler(policy, NEVER, slots=args.slots)

    def rollout(self):
        self.ro = self.sampler(self.work.prompts, self.work.uniforms, self.work.limits)

    def scoring(self):
        ro, cfg = self.ro, self.cfg
        scores = pm_scores(self.pm, ro, 1, cfg)
        logp = all_logprobs(self.policy, ro, cfg)
        ref_logp = all_logprobs(self.reference, ro, cfg)
        rewards = shaped_rewards(scores, logp, ref_logp, ro.mask, cfg.kl_coef)
        values = all_values(self.critic, ro, cfg)
        advantages, returns = gae(rewards, values, ro.mask, cfg.gamma, cfg.gae_lambda)
        self.experience = Experience(logp, values, whiten(advantages, ro.mask), returns)

    def update(self):
        update(self.policy, self.critic, self.optimizer, self.ro, self.experience, self.cfg,
               torch_rng(0), "benchmark")


def iteration_table(policy: GPT, spread: str, args, device):
    it, seconds = Iteration(policy, spread, args, device), {}
    phases = {"rollout": it.rollout, "scoring": it.scoring, "update": it.update}
    for _ in range(args.repeats + 1):  # the first is for warm-up
        for name, phase in phases.items():
            seconds.setdefault(name, []).append(clock(phase, device))
    middle = {name: statistics.median(times[1:]) for name, times in seconds.items()}
    total = sum(middle.values())
    flops, matmul_speed = iteration_flops(policy.cfg, it.work, args.passes), machine(device)[1]
    words = []
    for name, taken in middle.items():
        words.append(f"{name} {taken:.2f} s ({taken / total:.0%}; matmul alone "
                     f"{flops[name] / matmul_speed:.2f} s)")
    print(f"\nPPO iteration, {spread}: {it.cfg.batch} responses, minibatches of "
          f"{it.cfg.minibatch}, passes: {it.cfg.passes}: {', '.join(words)}; "
          f"{it.cfg.batch / total:,.0f} samples/s, roofline "
          f"{it.cfg.batch * matmul_speed / sum(flops.values()):,.0f}")
    if args.profile:
        for name, phase in phases.items():
            found = shares(phase, device)
            print(f"    {name}: " + ", ".join(f"{kind} {x:.0%}" for kind, x in found.items()))


# ---- 5. Command --------------------------------------------------------------


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--size", default="toy", choices=SHAPES,
                        help="shape of the model; 10M is 6 layers, 384 wide")
    parser.add_argument("--spread", default="all", choices=["all", *SPREADS],
                        help="of prompt and response lengths")
    parser.add_argument("--responses", type=int, default=512)
    parser.add_argument("--slots", type=int, default=128,
                        help="rows of the cache, and of a padded batch")
    parser.add_argument("--few", type=int, default=8, help="prompts on which (a) is timed")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--passes", type=int, default=1,
                        help="over the responses, in the PPO iteration")
    parser.add_argument("--profile", action="store_true",
                        help="shares of operators in the phases of the PPO iteration")
    parser.add_argument("--only", default="", choices=["", "sampling", "iteration"],
                        help="one of the two tables")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--csv", default="", help="write the rows to this file too")
    return parser.parse_args()


def main():
    args = arguments()
    device = choose_device(args.device)
    shape, vocab, context = SHAPES[args.size]
    torch.manual_seed(args.seed)
    policy = GPT(GPTConfig(shape.n_layer, shape.n_head, shape.d_model, vocab, context)).to(device)
    where = f"{torch.get_num_threads()} CPU threads"
    if device.type == "cuda":
        where = torch.cuda.get_device_name()
    print(f"{args.size}: {policy.cfg.n_params():,} parameters, {args.responses} responses, "
          f"{args.slots} slots, on {where}, PyTorch {torch.__version__}")
    spreads, iteration_spread = ["hh", "toy", "constant"], "toy"
    if args.spread != "all":
        spreads, iteration_spread = [args.spread], args.spread
    rows = []
    if args.only != "iteration":
        for spread in spreads:
            rows += sampling_table(policy, spread, args, device)
    if args.only != "sampling":
        iteration_table(policy, iteration_spread, args, device)
    if args.csv and rows:
        with open(args.csv, "w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    with errors_in_one_sentence():
        main()
