"""How fast is the rollout, and what does each trick bring? (No finding of the paper; it does not state speeds.)

    python experiments/rollout_speed.py                     # toy size, three spreads of lengths
    python experiments/rollout_speed.py --size 10M
    python experiments/rollout_speed.py --size gpt2 --responses 1024 --slots 256        # wants a GPU

One process, the same random weights, prompts and response lengths in every row, rows taken in turn, the median of
some repetitions. First table, sampling alone:

  (a) re-run the prefix each token      no cache at all (timed on a few of the prompts)
  (b) KV cache, one padded batch        the cache grows by a copy a token; a batch waits for its longest response
  (c) static cache                      allocated once
  (d) + slot refill                     rollout.Sampler without CUDA graphs
  (e) + CUDA graphs                     rollout.Sampler, on a GPU
  (f) Hugging Face generate             where transformers is installed: the same weights, SDPA, its KV cache, prompts
                                        sorted by length, no top-k, stopped row by row at the same lengths

Columns: `tokens/s` counts response tokens. `wasted` is the share of slot-steps that sample nothing wanted. `memory` and
`FLOPs` are what the decode steps and prefills need (weights once a step, the cached tokens of each busy slot, two
FLOPs a weight and token) as a share of what a large copy and a large matmul reach here, in this process. The second
table times a PPO iteration by phase.
"""
import argparse
import csv
import gc
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torch

from data import UserError, pad
from model import GPT, SIZES, GPTConfig, KVCache, autocast, sample
from pm import ScalarModel
from ppo import PPOConfig, experience, pm_scores, update
from rollout import Sampler
from run import choose_device, rng, torch_rng

SHAPES = {"toy": (SIZES["toy"], 1024, 512), "10M": (GPTConfig(6, 6, 384), 1024, 640),
          "gpt2": (SIZES["gpt2"], 50304, 1024)}  # shape, vocabulary, context: room for HH's lengths at every size
# Deciles (5%, 15%, ..., 95%) of prompt and response lengths in tokens. HH: 1,500 comparisons of HH-RLHF's test files in
# GPT-2's encoding, the chosen reply, cut at the 128 tokens of the paper's samples (App. B.1). Toy: held-out prompts
# and the LM's replies.
SPREADS = {
    "hh": ((16, 21, 36, 64, 87, 115, 148, 185, 251, 372), (8, 14, 19, 25, 32, 41, 53, 68, 92, 128)),
    "toy": ((12, 13, 14, 15, 16, 18, 20, 29, 33, 37), (3, 7, 9, 10, 11, 12, 13, 15, 18, 25)),
    "constant": ((64,), (64,)),
    "uniform": (tuple(range(12, 40)), (32,)),  # as the script that times TRL's PPO draws them (README)
}


# ------------------------------------------------------------------------------ the slower ways


@torch.no_grad()
def rerun_prefix(policy: GPT, prompts, uniforms, limits, end_of_turn=-1):
    """(a) The plain loop: read everything again for each token. Also what the tests compare the Sampler with."""
    device, rows = policy.embed.weight.device, [list(p) for p in prompts]
    running, count = list(range(len(rows))), 0
    while running:
        ids, lengths = (x.to(device) for x in pad([rows[i] for i in running]))
        with autocast(device):
            hidden = policy(ids)[torch.arange(len(running), device=device), lengths - 1]  # (B, D)
        new = sample(policy.logits(hidden), uniforms[running, count].to(device))[0].tolist()
        count += 1
        for i, token in zip(running, new):
            rows[i].append(token)
        running = [i for i, token in zip(running, new) if token != end_of_turn and count < limits[i]]
    return [r[len(p):] for r, p in zip(rows, prompts)], None, None


@torch.no_grad()
def padded(policy: GPT, prompts, uniforms, limits, slots: int, grow: bool):
    """(b) and (c): batches in the order of arrival, each of which waits for its longest response."""
    device, out, slot_steps, steps = policy.embed.weight.device, [], 0, 0
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    for start in range(0, len(prompts), slots):
        group = list(range(start, min(start + slots, len(prompts))))
        ids, lengths = (x.to(device) for x in pad([prompts[i] for i in group]))  # (B, P), (B,)
        (B, P), R = ids.shape, max(limits[i] for i in group)
        tokens, u = torch.zeros(B, R, dtype=torch.long, device=device), uniforms[group].to(device)
        with autocast(device):
            cache = KVCache(policy.cfg, B, P if grow else P + R, device, dtype)
            hidden = policy(ids, cache)[torch.arange(B, device=device), lengths - 1]
            cache.lengths = lengths.clone()
            for t in range(R):
                tokens[:, t] = sample(policy.logits(hidden), u[:, t])[0]
                if grow:
                    column = torch.zeros_like(cache.k[:, :, :, :1])
                    cache.k, cache.v = torch.cat((cache.k, column), 3), torch.cat((cache.v, column), 3)
                hidden = policy(tokens[:, t:t + 1], cache)[:, 0]
                cache.lengths += 1
        slot_steps, steps = slot_steps + B * R, steps + R
        out += [row[:limits[i]] for row, i in zip(tokens.tolist(), group)]
    return out, slot_steps, steps


def refill(sampler: Sampler, prompts, uniforms, limits):
    before = sampler.slot_steps, sampler.steps
    replies = sampler(prompts, uniforms, limits).responses()
    return replies, sampler.slot_steps - before[0], sampler.steps - before[1]


def hugging_face(policy: GPT):
    """(f), or None where transformers is not installed."""
    try:
        import transformers
    except ImportError:
        return None
    transformers.logging.set_verbosity_error()
    from hub import FIXED, names
    cfg, state = policy.cfg, policy.state_dict()
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=cfg.vocab_size, n_positions=cfg.context, n_embd=cfg.d_model, n_layer=cfg.n_layer, n_head=cfg.n_head,
        bos_token_id=0, eos_token_id=0, attn_implementation="sdpa", **FIXED))
    theirs.transformer.load_state_dict({name: state[ours].t() if transposed else state[ours]
                                        for ours, name, transposed in names(cfg.n_layer)})
    device = policy.embed.weight.device
    theirs = theirs.to(device, torch.bfloat16 if device.type == "cuda" else torch.float32).eval()

    class Stop(transformers.StoppingCriteria):
        def __init__(self, lengths):
            self.lengths = lengths

        def __call__(self, ids, scores, **_):
            return ids.shape[1] >= self.lengths

    @torch.no_grad()
    def generate(prompts, uniforms, limits, slots):
        order, out, slot_steps, steps = sorted(range(len(prompts)), key=lambda i: len(prompts[i])), {}, 0, 0
        for start in range(0, len(prompts), slots):
            group = order[start:start + slots]
            P, R = max(len(prompts[i]) for i in group), max(limits[i] for i in group)
            ids = torch.tensor([[0] * (P - len(prompts[i])) + prompts[i] for i in group], device=device)
            mask = torch.tensor([[0] * (P - len(prompts[i])) + [1] * len(prompts[i]) for i in group], device=device)
            stop = Stop(torch.tensor([P + limits[i] for i in group], device=device))
            full = theirs.generate(ids, attention_mask=mask, do_sample=True, top_k=0, top_p=1.0, max_new_tokens=R,
                                   pad_token_id=0, eos_token_id=None, use_cache=True,
                                   stopping_criteria=transformers.StoppingCriteriaList([stop]))
            slot_steps, steps = slot_steps + len(group) * (full.shape[1] - P), steps + full.shape[1] - P
            out |= {i: row[P:P + limits[i]] for i, row in zip(group, full.tolist())}
        return [out[i] for i in range(len(prompts))], slot_steps, steps
    return generate


# ------------------------------------------------------------------------------ measuring


def sync(device):
    if device.type == "cuda":
        torch.cuda.synchronize()


def clock(function, device) -> float:
    sync(device)
    start = time.perf_counter()
    function()
    sync(device)
    return time.perf_counter() - start


def machine(device) -> tuple[float, float]:
    """Bytes/s of a large copy (read and written bytes) and FLOP/s of a large matmul, the best of five."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    n, d = (2**30, 8192) if device.type == "cuda" else (2**27, 1536)
    a, b = torch.ones(n // 4, device=device), torch.empty(n // 4, device=device)
    copy = 2 * n / min(clock(lambda: b.copy_(a), device) for _ in range(5))
    x = torch.ones(d, d, device=device, dtype=dtype)
    return copy, 2 * d**3 / min(clock(lambda: x @ x, device) for _ in range(5))


class PeakMemory:
    """Bytes that a piece of code holds at its peak beyond what was held before; None where that can't be told."""

    def __init__(self, device):
        self.cuda = device.type == "cuda"

    def __enter__(self):
        gc.collect()
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
        else:
            try:
                Path("/proc/self/clear_refs").write_text("5")  # Linux: starts VmHWM, the peak, anew
                self.before = self._status("VmRSS")
            except OSError:
                self.before = None
        return self

    def __exit__(self, *_):
        self.bytes = None
        if self.cuda:
            self.bytes = torch.cuda.max_memory_allocated() - self.before
        elif self.before is not None:
            self.bytes = self._status("VmHWM") - self.before

    @staticmethod
    def _status(name):
        return 1024 * int(Path("/proc/self/status").read_text().split(name + ":")[1].split()[0])


def needed(cfg: GPTConfig, prompts, limits, steps: int, dtype_bytes: int) -> tuple[float, float]:
    """Bytes and FLOPs that sampling can't do without: the weights once a step, each response's cached tokens at each
    of its steps; two FLOPs a weight and token, and attention's."""
    weights = cfg.n_params() - cfg.context * cfg.d_model
    token = 2 * cfg.n_layer * cfg.d_model  # numbers in the cache
    read = sum((len(p) + (n - 1) / 2) * n for p, n in zip(prompts, limits))  # cached tokens, over all steps
    trunk = cfg.n_layer * 12 * cfg.d_model**2
    tokens, answered = sum(map(len, prompts)) + sum(limits), sum(limits)
    attended = read + sum(len(p) ** 2 / 2 for p in prompts)
    return (dtype_bytes * (steps * weights + token * read),
            2 * (trunk * tokens + cfg.vocab_size * cfg.d_model * answered) + 2 * token * attended)


# ------------------------------------------------------------------------------ the two tables


def workload(cfg: GPTConfig, spread: str, n: int, seed: int):
    """n prompts of random ids, random numbers, and how long each response is to be; the deciles in random order."""
    generator, random = torch_rng(seed, spread), rng(seed, spread)
    P, R = ([values[i % len(values)] for i in range(n)] for values in SPREADS[spread])
    random.shuffle(P), random.shuffle(R)
    prompts = [torch.randint(cfg.vocab_size, (p,), generator=generator).tolist() for p in P]
    return prompts, torch.rand(n, max(R), generator=generator), R


def sampling_table(policy: GPT, spread: str, args, device, writer):
    prompts, uniforms, limits = workload(policy.cfg, spread, args.responses, args.seed)
    n_few = min(args.few, len(prompts))
    few = prompts[:n_few], uniforms[:n_few], limits[:n_few]
    plain = Sampler(policy, -1, slots=args.slots, graphs=False)
    rows = {"(a) re-run the prefix": lambda: rerun_prefix(policy, *few),
            "(b) KV cache, padded batch": lambda: padded(policy, prompts, uniforms, limits, args.slots, grow=True),
            "(c) static cache": lambda: padded(policy, prompts, uniforms, limits, args.slots, grow=False),
            "(d) + slot refill": lambda: refill(plain, prompts, uniforms, limits)}
    if device.type == "cuda":
        recorded = Sampler(policy, -1, slots=args.slots)
        rows["(e) + CUDA graphs"] = lambda: refill(recorded, prompts, uniforms, limits)
    generate = hugging_face(policy)
    if generate:
        rows["(f) Hugging Face generate"] = lambda: generate(prompts, uniforms, limits, args.slots)

    seconds, results, peaks = {name: [] for name in rows}, {}, {}
    for name, function in rows.items():  # once for warm-up, and for what does not vary
        with PeakMemory(device) as memory:
            seconds[name].append(clock(lambda: results.update({name: function()}), device))
        peaks[name] = memory.bytes
    for _ in range(args.repeats):
        for name, function in list(rows.items())[1:]:  # (a) takes longer than all others, and once will do
            seconds[name].append(clock(function, device))
    want = results["(d) + slot refill"][0]
    assert [len(r) for r in want] == limits
    copy, flops = machine(device)
    print(f"\n{spread}: prompts of {min(map(len, prompts))} to {max(map(len, prompts))} tokens, responses of "
          f"{min(limits)} to {max(limits)} (mean {statistics.mean(limits):.0f}); copy {copy / 1e9:.0f} GB/s, "
          f"matmul {flops / 1e9:,.0f} GFLOP/s")
    print(f"    {'':28} tokens/s   x (b)   ms a step   wasted   memory    FLOPs   peak MiB   same tokens")
    rate = {}
    for name, (replies, slot_steps, steps) in results.items():
        middle = statistics.median(seconds[name][1:] or seconds[name])
        tokens = sum(map(len, replies))
        rate[name] = tokens / middle
        need = needed(policy.cfg, prompts, limits, steps or 0, 2 if device.type == "cuda" else 4)
        same = statistics.mean(a == b for a, b in zip(replies, want))
        row = dict(size=args.size, spread=spread, way=name, tokens_per_s=rate[name],
                   ratio=None if name.startswith("(a)") else rate[name] / rate["(b) KV cache, padded batch"],
                   step_ms=1e3 * middle / steps if steps else None,
                   wasted=1 - tokens / slot_steps if slot_steps else None,
                   memory=need[0] / middle / copy if steps else None, flops=need[1] / middle / flops if steps else None,
                   peak_mib=peaks[name] / 2**20 if peaks[name] else None,
                   same=None if name.startswith("(f)") else same)  # (f) draws its own random numbers
        writer.append(row)
        print(f"    {name:28} {row['tokens_per_s']:8,.0f} " + " ".join(
            f"{'-':>{width}}" if row[key] is None else f"{row[key]:{width}.{digits}f}"
            for key, width, digits in (("ratio", 7, 2), ("step_ms", 11, 2), ("wasted", 8, 2), ("memory", 8, 2),
                                       ("flops", 8, 2), ("peak_mib", 10, 0), ("same", 13, 3))))
    print(f"    (d) is {rate['(d) + slot refill'] / rate['(f) Hugging Face generate']:.2f} x (f)" if generate else
          "    Hugging Face generate is not timed: pip install transformers")


def iteration_table(policy: GPT, spread: str, args, device):
    """One PPO iteration by phase, as train_rl.py runs it."""
    cfg = PPOConfig(passes=args.passes)
    prompts, uniforms, limits = workload(policy.cfg, spread, cfg.batch, args.seed)
    reference, pm = GPT(policy.cfg).to(device).eval(), ScalarModel(policy).to(device).eval()
    reference.load_state_dict(policy.state_dict())
    critic = ScalarModel(policy, zero_head=True).to(device)
    optimizer = torch.optim.Adam([*policy.parameters(), *critic.parameters()], lr=0.0, fused=True)
    sampler, times = Sampler(policy, -1, slots=args.slots), {"rollout": [], "scoring": [], "update": []}
    for _ in range(args.repeats + 1):
        state = {}

        def sampling(): state["ro"] = sampler(prompts, uniforms, limits)

        def scoring():
            scores = pm_scores(pm, state["ro"], 1, cfg)
            state["ex"] = experience(policy, reference, critic, scores, state["ro"], cfg, "benchmark", first=True)[0]

        def updating(): update(policy, critic, optimizer, state["ro"], state["ex"], cfg, torch_rng(0), "benchmark")
        for name, phase in zip(times, (sampling, scoring, updating)):
            times[name].append(clock(phase, device))
    middle = {name: statistics.median(t[1:]) for name, t in times.items()}
    total = sum(middle.values())
    print(f"\nPPO iteration, {spread}: {cfg.batch} responses, minibatches of {cfg.minibatch}, {cfg.passes} pass: "
          + ", ".join(f"{name} {t:.2f} s ({t / total:.0%})" for name, t in middle.items())
          + f"; {cfg.batch / total:,.0f} samples/s")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--size", default="toy", choices=SHAPES, help="shape of the model; 10M is 6 layers, 384 wide")
    parser.add_argument("--spread", default="all", choices=["all", *SPREADS], help="of prompt and response lengths")
    parser.add_argument("--responses", type=int, default=512)
    parser.add_argument("--slots", type=int, default=128, help="rows of the cache, and of a padded batch")
    parser.add_argument("--few", type=int, default=8, help="prompts on which (a) is timed")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--passes", type=int, default=1, help="over the responses, in the PPO iteration")
    parser.add_argument("--only", default="", choices=["", "sampling", "iteration"], help="one of the two tables")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--csv", default="", help="write the rows to this file too")
    args = parser.parse_args()
    device = choose_device(args.device)
    shape, vocab, context = SHAPES[args.size]
    torch.manual_seed(args.seed)
    policy = GPT(GPTConfig(shape.n_layer, shape.n_head, shape.d_model, vocab, context)).to(device)
    print(f"{args.size}: {policy.cfg.n_params():,} parameters, {args.responses} responses, {args.slots} slots, on "
          + (torch.cuda.get_device_name() if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads")
          + f", PyTorch {torch.__version__}")
    rows = []
    spreads = ("hh", "toy", "constant") if args.spread == "all" else (args.spread,)
    for spread in () if args.only == "iteration" else spreads:
        sampling_table(policy, spread, args, device, rows)
    if args.only != "sampling":
        iteration_table(policy, args.spread if args.spread != "all" else "toy", args, device)
    if args.csv and rows:
        with open(args.csv, "w", newline="") as f:
            out = csv.DictWriter(f, rows[0])
            out.writeheader()
            out.writerows(rows)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"rollout_speed.py: {error}")
