"""The rollout hot loop: sample one response to each prompt, fast.

Sampling is most of RLHF's time, and most of that time is easily wasted: on reading the prompt again for each token,
on keys and values that are copied to grow, on waiting for the longest response of a batch, on a host that asks the
device after each token whether it is done. Read it in this order:

  Rollouts    what comes out
  Sampler     slots, one step for all of them, and the host's loop around it: admit, step, look, refill
  rollout     the same as one function call
  memory      what a number of slots takes, and how many fit a budget

A SLOT is a row of the key-value cache. It holds one response while that is being sampled, and takes the next prompt
of the queue when it ends. Slots are at different positions of different responses; a step adds a token to each.

Legend:  N responses   B slots in use   P prompt tokens   R response tokens   S = P + R   C cache length looked at
"""
import copy
from dataclasses import dataclass

import torch
import torch.nn as nn

from data import UserError, batches_by_length, pad
from model import GPT, GPTConfig, KVCache, autocast, sample

PREFILL_TOKENS = 8192  # tokens that one prefill batch holds
BUCKET = 32            # cache lengths that a step looks at are multiples of this
# On a CPU a step's time grows with its rows from some 64 on; on a GPU more rows share one reading of the weights.
MOST_SLOTS = {"cpu": 64, "cuda": 512}


@dataclass
class Rollouts:
    """One response to each of N prompts, all on the models' device."""
    tokens: torch.Tensor        # (N, S) prompt, response, pads
    prompt_len: torch.Tensor    # (N,)
    response_len: torch.Tensor  # (N,) at least 1; counts the end-of-turn token
    finished: torch.Tensor      # (N,) bool: ended its turn before running out of room
    logp: torch.Tensor          # (N, R) of the behaviour policy, as sampled

    @property
    def mask(self):
        """(N, R) bool, by position and never by token id: an id equal to a pad's is still an action."""
        return torch.arange(self.logp.shape[1], device=self.logp.device) < self.response_len[:, None]

    @property
    def lengths(self):
        return self.prompt_len + self.response_len  # (N,)

    @property
    def actions(self):
        """(N, R) the response's tokens; what stands where `mask` is False means nothing."""
        at = self.prompt_len[:, None] + torch.arange(self.logp.shape[1], device=self.logp.device)
        return self.tokens.gather(1, at.clamp(max=self.tokens.shape[1] - 1))

    def rows(self, i) -> torch.Tensor:
        """Token rows of some responses, padded no further than the longest of them."""
        return self.tokens[i, : int(self.lengths[i].max())]

    def responses(self) -> list[list[int]]:
        return [t[p:p + r] for t, p, r in zip(*(x.tolist() for x in (self.tokens, self.prompt_len, self.response_len)))]


# ------------------------------------------------------------------------------ the sampler


class Sampler:
    """Samples from one policy, call after call, while its weights change in place.

    Everything a step reads or writes stays where it is from one step to the next and keeps its shape. So on a GPU a
    step is recorded once as a CUDA graph, one for each (slots, cache length) in use, and replayed: one launch instead
    of some hundred, and none of the host's time in between."""

    def __init__(self, policy: GPT, end_of_turn: int, temperature: float = 1.0, slots: int = 0, look: int = 0,
                 graphs: bool = True):
        """`slots`: responses sampled side by side (0: as `fitting_slots` finds). `look`: steps between two looks of the
        host (0: 8 on a GPU, where a look waits for the device; else 2). `graphs` False: no CUDA graphs on a GPU."""
        self.policy, self.end_of_turn, self.temperature = policy, end_of_turn, temperature
        self.device = policy.embed.weight.device
        cuda = self.device.type == "cuda"
        self.wanted, self.look, self.use_graphs = slots, look or (8 if cuda else 2), cuda and graphs
        # Under autocast a float32 matrix is turned to bf16 at each use, which reads and writes more bytes than the
        # use itself. A copy with bf16 matrices is refreshed once a call instead; the arithmetic is the same.
        self.model = copy.deepcopy(policy).requires_grad_(False) if cuda else policy
        for module in self.model.modules() if cuda else ():
            if isinstance(module, nn.Linear):
                module.to(torch.bfloat16)
        self.cache, self.stream = None, torch.cuda.Stream() if self.use_graphs else None
        self.steps = self.slot_steps = 0  # made so far; what is over and above the tokens sampled was wasted

    def _reserve(self, size: int, N: int, R: int):
        """Make the cache and the buffers, unless those of earlier calls will do."""
        if self.cache and size <= self.cache.k.shape[3] and N <= self.spare and R == self.uniforms.shape[1]:
            return
        self.cache, self.graphs, self.spare = None, {}, N  # frees the old ones first
        cfg, to = self.policy.cfg, dict(device=self.device)
        B = self.slots = min(self.wanted or fitting_slots(cfg, size, self.device), _power_of_two(N))
        self.cache = KVCache(cfg, B, size, self.device, _dtype(self.device))
        # A slot's state: the response it works on (`spare`: none, it is idle), the token to read next, tokens sampled.
        self.row, self.token, self.count = (torch.zeros(B, dtype=torch.long, **to) for _ in range(3))
        # A response's: its random numbers and its limit come in, its tokens and log-probs go out. One spare response,
        # the last, takes what idle slots write, so that a step does the same for every slot.
        self.uniforms, self.logp = torch.zeros(N + 1, R, **to), torch.zeros(N + 1, R, **to)
        self.tokens = torch.zeros(N + 1, R, dtype=torch.long, **to)
        self.limit = torch.ones(N + 1, dtype=torch.long, **to)

    def _step(self, B: int, C: int):
        """One more token for the first B slots, of which none holds more than C - 1 tokens.

        Fixed shapes, and nothing here asks for a value on the host (no item(), no if on a tensor)."""
        row, count, cache = self.row[:B], self.count[:B], self.cache.part(B, C)
        with autocast(self.device):
            hidden = self.model(self.token[:B, None], cache)[:, 0]  # (B, D)
        new, logp = sample(self.model.logits(hidden), self.uniforms[row, count], self.temperature)  # (B,), (B,)
        self.tokens[row, count], self.logp[row, count] = new, logp
        self.token[:B] = new
        over = (new == self.end_of_turn) | (count + 1 >= self.limit[row])  # the end-of-turn token is kept: an action
        # A slot whose response is over becomes idle, here on the device. It goes on at position 0 of its own row of
        # the cache, where nothing of value is left, until the host gives it another prompt.
        cache.lengths.copy_(torch.where(over, 0, cache.lengths + 1))
        count.copy_(torch.where(over, 0, count + 1))
        row.copy_(torch.where(over, self.spare, row))

    def _run_step(self, B: int, C: int):
        self.steps, self.slot_steps = self.steps + 1, self.slot_steps + B
        if not self.use_graphs:
            return self._step(B, C)
        if (B, C) in self.graphs:
            return self.graphs[B, C].replay()
        # First time: a step outside the graph, as warm-up, which counts; recording runs nothing.
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            self._step(B, C)
        torch.cuda.current_stream().wait_stream(self.stream)
        # Graphs run one after another and leave nothing behind but what is in the buffers, so they share their memory.
        shared = next((graph.pool() for graph in self.graphs.values()), None)
        self.graphs[B, C] = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graphs[B, C], pool=shared):
            self._step(B, C)

    def _admit(self, slots: list[int], rows: list[int], prompts: list[list[int]]):
        """Give prompts to idle slots. All of a prompt but its last token is read at once (prefill); the last one is
        what the slot's first step reads. A prompt that several rows share is read once, and its keys and values are
        copied (the two replies of a comparison, best-of-n)."""
        prefixes = {}  # prefix -> the slots that start from it
        for slot, row in zip(slots, rows):
            prefixes.setdefault(tuple(prompts[row][:-1]), []).append(slot)
        distinct = [p for p in prefixes if p]
        for batch in batches_by_length([len(p) for p in distinct], PREFILL_TOKENS):
            ids = pad([list(distinct[i]) for i in batch])[0].to(self.device)  # (n, P)
            read = KVCache(self.policy.cfg, *ids.shape, self.device, _dtype(self.device))
            with autocast(self.device):
                self.model(ids, read, fill_only=True)
            to = torch.tensor([s for i in batch for s in prefixes[distinct[i]]], device=self.device)
            source = torch.tensor([j for j, i in enumerate(batch) for _ in prefixes[distinct[i]]], device=self.device)
            for layer in range(self.policy.cfg.n_layer):  # one by one, so that the copies in between are small
                self.cache.k[layer, to, :, :ids.shape[1]] = read.k[layer, source]
                self.cache.v[layer, to, :, :ids.shape[1]] = read.v[layer, source]
        slots = torch.tensor(slots, device=self.device)
        self.row[slots] = torch.tensor(rows, device=self.device)
        self.token[slots] = torch.tensor([prompts[i][-1] for i in rows], device=self.device)
        self.cache.lengths[slots] = torch.tensor([len(prompts[i]) - 1 for i in rows], device=self.device)
        self.count[slots] = 0

    def _compact(self, busy: list[int], C: int):
        """Move busy slots, of at most C tokens, to the front, so that steps can be made on fewer slots."""
        at = torch.tensor(busy, device=self.device)
        for x in (self.row, self.token, self.count, self.cache.lengths):
            x[:len(busy)] = x[at]
        self.row[len(busy):] = self.spare
        for layer in (*self.cache.k, *self.cache.v):
            layer[:len(busy), :, :C] = layer[at, :, :C]

    @torch.no_grad()
    def __call__(self, prompts: list[list[int]], uniforms, limits: list[int] | None = None) -> Rollouts:
        """Sample a response of at most R tokens (limits[i], where given and less) to each of N prompts (ids).

        uniforms (N, R) in [0, 1), on the CPU: row i is all the randomness of response i, so the response does not
        depend on its slot, on when it is admitted, nor on the others (up to rounding)."""
        (N, R), lengths = uniforms.shape, [len(p) for p in prompts]
        if not N or not R or min(lengths) < 1:
            raise UserError("no prompt, an empty prompt or no room for a response: there is nothing to sample")
        if max(lengths) + R >= self.policy.cfg.context:  # one more than both: the PM appends its end-of-context token
            raise UserError(f"--context {self.policy.cfg.context} is too short for a prompt of {max(lengths)} tokens "
                            f"and a response of {R}; make it longer")
        self._reserve(min(self.policy.cfg.context, _round_up(max(lengths) + R + self.look)), N, R)
        if self.model is not self.policy:
            for mine, theirs in zip(self.model.parameters(), self.policy.parameters()):
                mine.copy_(theirs)
        spare = self.spare
        self.row.fill_(spare), self.cache.lengths.zero_(), self.count.zero_(), self.tokens.fill_(-1)
        self.uniforms[:N].copy_(uniforms)
        self.limit[:N].copy_(torch.tensor([min(R, n) for n in limits or [R] * N]))

        # Short prompts first: those admitted together are of like length, and early steps look at a short cache.
        queue = sorted(range(N), key=lengths.__getitem__, reverse=True)  # taken from its end
        B = min(self.slots, _power_of_two(N))
        owner, depth = [spare] * B, [0] * B  # as of the last look: the response of each slot, the tokens it holds
        while True:
            idle = [s for s in range(B) if owner[s] == spare]
            # Refill in groups: a prefill of a few prompts costs nearly as much as one of many.
            if queue and len(idle) * 8 >= B:
                rows = [queue.pop() for _ in idle[:len(queue)]]
                self._admit(idle[:len(rows)], rows, prompts)
                for slot, row in zip(idle, rows):
                    owner[slot], depth[slot] = row, lengths[row] - 1
            busy = [s for s in range(B) if owner[s] != spare]
            if not busy:
                break
            # The queue is empty and half of the slots are idle: go on with half as many.
            if not queue and len(busy) * 2 <= B:
                self._compact(busy, max(depth))
                B = _power_of_two(len(busy))
                owner = [owner[s] for s in busy] + [spare] * (B - len(busy))
                depth = [depth[s] for s in busy] + [0] * (B - len(busy))
            C = min(self.cache.k.shape[3], _round_up(max(depth) + self.look))
            for _ in range(self.look):
                self._run_step(B, C)
            owner = self.row[:B].tolist()  # the host's only question to the device
            depth = [d + self.look if o != spare else 0 for d, o in zip(depth, owner)]

        mask = self.tokens[:N] >= 0  # (N, R) what was sampled
        prompt_len, response_len = torch.tensor(lengths, device=self.device), mask.sum(1)
        finished = self.tokens[:N].gather(1, response_len[:, None] - 1)[:, 0] == self.end_of_turn
        tokens = torch.zeros(N, max(lengths) + R, dtype=torch.long, device=self.device)
        tokens[:, :max(lengths)] = pad(prompts)[0].to(self.device)
        tokens.scatter_(1, prompt_len[:, None] + torch.arange(R, device=self.device), self.tokens[:N].clamp(min=0))
        return Rollouts(tokens, prompt_len, response_len, finished, torch.where(mask, self.logp[:N], 0))


def _round_up(n: int) -> int:
    return -(-n // BUCKET) * BUCKET


def _power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()


def rollout(policy: GPT, prompts: list[list[int]], uniforms, end_of_turn: int, temperature=1.0, slots=0) -> Rollouts:
    """Sample one response to each prompt, once (Sampler.__call__ says how)."""
    return Sampler(policy, end_of_turn, temperature, slots)(prompts, uniforms)


# ------------------------------------------------------------------------------ memory


def _dtype(device) -> torch.dtype:
    return torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32


def memory(cfg: GPTConfig, slots: int, size: int, device="cpu") -> dict[str, int]:
    """Bytes that sampling takes beside the policy itself, for this many slots of up to `size` tokens."""
    number = torch.tensor([], dtype=_dtype(device)).element_size()
    per_token = 2 * cfg.n_layer * cfg.d_model * number  # keys and values
    matrices = 12 * cfg.n_layer * cfg.d_model**2
    return dict(cache=slots * size * per_token,
                logits=4 * slots * cfg.vocab_size * 4,  # logits, log-probs, probabilities and their sums; float32
                # A prefill batch's own cache, what each token may see (as bool and as float), and the widest point of a
                # block: x, LN(x), q, k, v, what attention gave, and 4 D twice around the GELU.
                prefill=max(PREFILL_TOKENS, size) * (per_token + 5 * size + 14 * cfg.d_model * 4),
                copy=2 * matrices + 4 * (cfg.n_params() - matrices) if number == 2 else 0)


def free_memory(device) -> float:
    """Bytes that can still be had; infinity where the system does not say."""
    if torch.device(device).type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    try:
        with open("/proc/meminfo") as f:  # Linux
            return 1024 * int(f.read().split("MemAvailable:")[1].split()[0])
    except (OSError, IndexError, ValueError):
        return float("inf")


def fitting_slots(cfg: GPTConfig, size: int, device="cpu", budget: float = 0.0) -> int:
    """The number of slots: a power of two, at most MOST_SLOTS, that `budget` bytes hold (0: half of what is free).

    Raises UserError where not even one fits."""
    budget = budget or free_memory(device) / 2
    slots = MOST_SLOTS[torch.device(device).type]
    while slots > 1 and sum(memory(cfg, slots, size, device).values()) > budget:
        slots //= 2
    needed = sum(memory(cfg, slots, size, device).values())
    if needed > budget:
        raise UserError(f"sampling rows of {size} tokens takes {needed / 2**30:.1f} GiB for one slot, and "
                        f"{budget / 2**30:.1f} GiB are to be had; take a smaller --size or --context")
    return slots
