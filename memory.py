"""How much memory a run takes, computed before anything is built.

Too large a model would otherwise end minutes later, in a traceback or with the operating system
killing the process. Read it in this order:
  1. Free       the memory that a device has left
  2. Sampling   what the Sampler takes for a number of slots, and how many slots fit
  3. Training   what the stages take

Legend:  D width
"""
from dataclasses import dataclass
from pathlib import Path

import torch

import ranks
from model import GPTConfig
from run import UserError, compute_dtype, logits_at_once, tokens_at_once

GIB = 2**30

# ---- 1. Free -----------------------------------------------------------------


def free_memory(device) -> float:
    """Bytes that can still be allocated; infinity where nothing says it (macOS, Windows)."""
    if torch.device(device).type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    try:
        meminfo = Path("/proc/meminfo").read_text()  # Linux
        free = 1024 * int(meminfo.split("MemAvailable:")[1].split()[0])
    except (OSError, IndexError, ValueError):
        free = float("inf")
    return min(free, free_in_container())


def free_in_container(root=Path("/sys/fs/cgroup")) -> float:
    """Bytes that a container (a Linux control group, version 2) may still allocate; infinity if
    this process is in none."""
    try:
        limit = int((root / "memory.max").read_text())  # "max" if there is no limit
        used = int((root / "memory.current").read_text())
        # Copies of files count as used, but the system drops them when memory is short.
        statistics = (root / "memory.stat").read_text()
        droppable = int(statistics.split("inactive_file ")[1].split()[0])
    except (OSError, IndexError, ValueError):
        return float("inf")
    return limit - used + droppable


# ---- 2. Sampling -------------------------------------------------------------

PREFILL_TOKENS = 8192  # tokens that one prefill batch holds
# On a CPU, sampling gains little from more than about 64 rows. On a GPU, more rows share one
# reading of the weights.
MOST_SLOTS = {"cpu": 64, "gpu": 512}


def sampling_memory(cfg: GPTConfig, slots: int, size: int, device="cpu") -> dict[str, int]:
    """Bytes that sampling takes besides the policy itself, for slots of up to `size` tokens."""
    number_bytes = compute_dtype(device).itemsize
    token_bytes = 2 * cfg.n_layer * cfg.d_model * number_bytes  # keys and values
    n_matrix_params = 12 * cfg.n_layer * cfg.d_model**2
    # Prefill needs, for each token at a block's widest point, 14 D floats: x, LN(x), q, k, v, the
    # attention's output, and 4 D twice.
    prefill_bytes = 14 * cfg.d_model * 4
    n_logit_copies = 4  # logits, log-probs, probabilities, their sums
    copy_bytes = 2 * n_matrix_params + 4 * (cfg.n_params() - n_matrix_params)
    return {
        "cache": slots * size * token_bytes,
        "logits": n_logit_copies * slots * cfg.vocab_size * 4,
        "prefill": max(PREFILL_TOKENS, size) * prefill_bytes,
        "copy": copy_bytes if number_bytes == 2 else 0,  # of the policy, in bf16
    }


def fitting_slots(cfg: GPTConfig, size: int, device="cpu", budget: float = 0.0) -> int:
    """Return the largest power of two, at most MOST_SLOTS, whose memory fits into `budget` bytes
    (0: half of what is free). Raises UserError if not even one slot fits."""
    has_own_memory = torch.device(device).type == "cuda"  # a Mac's GPU shares that of the CPU
    sharers = 1 if has_own_memory else ranks.n_on_machine()
    budget = budget or free_memory(device) / 2 / sharers
    slots = MOST_SLOTS["gpu" if has_own_memory else "cpu"]
    while slots > 1 and sum(sampling_memory(cfg, slots, size, device).values()) > budget:
        slots //= 2
    needed = sum(sampling_memory(cfg, slots, size, device).values())
    if needed > budget:
        raise UserError(f"sampling rows of {size} tokens takes {needed / GIB:.1f} GiB for one "
                        f"slot, and {budget / GIB:.1f} GiB are available; use a smaller --size "
                        "or --context")
    return slots


# ---- 3. Training -------------------------------------------------------------


@dataclass
class StageMemory:
    """What a stage's memory depends on, besides the shape of the models."""
    n_trained: int         # networks that learn
    n_frozen: int          # networks that do not
    n_rows: int = 0        # documents, comparisons or responses that are held at once
    step_tokens: int = 0   # the most tokens in a step, where the options say so (0: no limit)
    token_budget: int = 0  # tokens in a forward pass (0: run.tokens_at_once)
    slots: int = 0         # for sampling (0: as many as fit)


ROW_BYTES = 2048  # at least; a document of the toy world takes 2.9 kB, as text and list of ids


def training_memory(cfg: GPTConfig, stage: StageMemory, recompute: bool, device) -> dict[str, int]:
    """About how many bytes a stage takes on its device, by what they are for. What is not counted
    is small or depends on the data."""
    n_params = cfg.n_params()
    n_tokens = tokens_at_once(stage.token_budget, device)
    if stage.step_tokens:
        n_tokens = min(n_tokens, stage.step_tokens)
    # What the backward pass of a block needs, in D numbers a token: x, LN(x), q, k, v, the
    # attention's output; x, LN(x), and 4 D before and after the GELU.
    number_bytes = compute_dtype(device).itemsize  # at least: under autocast some stay float32
    block = 16 * n_tokens * cfg.d_model * number_bytes
    # Where a chunk of logits is differentiated: its log-probs, and the gradients of both.
    logits = 3 * 4 * min(n_tokens * cfg.vocab_size, logits_at_once(0, device))
    if recompute:  # every block keeps its x, and one at a time all the rest
        activations = cfg.n_layer * block // 16 + max(block, logits)
    else:
        activations = cfg.n_layer * block + logits
    return {
        "weights": 4 * n_params * (stage.n_trained + stage.n_frozen),
        "gradients": 4 * n_params * stage.n_trained,
        "optimizer": 8 * n_params * stage.n_trained,  # Adam's two moments
        "activations": activations,
    }


def check_stage(name: str, cfg: GPTConfig, stage: StageMemory, recompute: bool, device):
    """Raise UserError if a stage takes more memory than is free."""
    parts = training_memory(cfg, stage, recompute, device)
    if stage.slots:
        # One token a slot, at least: how long prompts and responses are is not known yet.
        parts["cache"] = sampling_memory(cfg, stage.slots, size=1, device=device)["cache"]
    # Several ranks share the CPU's memory. Rank 0 puts the state together there before it is
    # written: weights and Adam's two moments.
    n = ranks.n_on_machine()
    on_cpu = {"state to be saved": 12 * cfg.n_params() * stage.n_trained,
              "data": n * stage.n_rows * ROW_BYTES}
    if torch.device(device).type == "cuda":
        check_free(name, parts, device)
        check_free(name, on_cpu, "cpu")
    else:  # a Mac's GPU shares its memory with the CPU
        parts = {part: n * size for part, size in parts.items()}
        check_free(name, parts | on_cpu, device)


def check_free(name: str, parts: dict[str, int], device):
    needed, free = sum(parts.values()), free_memory(device)
    if needed <= free:
        return
    words = []
    for part, size in parts.items():
        if size >= 0.05 * GIB:
            words.append(f"{part} {size / GIB:,.1f}")
    kind = "GPU" if torch.device(device).type == "cuda" else "CPU"
    raise UserError(f"stage {name!r} takes about {needed / GIB:,.1f} GiB of {kind} memory "
                    f"({', '.join(words)}), and {free / GIB:,.1f} GiB are free: choose a smaller "
                    "--size or --context, fewer rows at once (see --help), or --recompute if it "
                    "is off")
