"""Rollouts: sample one response to each prompt, first plainly, then fast.

Read it in this order:
  1. Rollouts       what comes out, and the indexing that PPO relies on
  2. plain_rollout  the obvious loop. If you only want PPO, you may stop after it
  3. Sampler        returns the same, token for token (up to rounding), several times faster

Sampling is most of RLHF's time, and the plain loop wastes most of that: it reads the prompt again
for each token, and waits for the longest response. The Sampler caches keys and values, and starts a
new response wherever one has ended. A SLOT is a row of the cache. It holds one response until that
ends, and then takes the next prompt from the queue. Each slot is at its own position; one step adds
one token to every slot. experiments/rollout_speed.py measures each trick.

Legend:  N responses   n those still running   P prompt tokens   R response tokens   S = P + R
         B slots that a step covers, or responses of a batch   T longest row   D width
         C cache length that a step reads
"""
import copy
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

import ranks
from cache import KVCache, forward_cached, prefill
from data import batches_by_length, pad
from memory import PREFILL_TOKENS, fitting_slots
from model import GPT, sample
from run import UserError, autocast, compute_dtype

# ---- 1. Rollouts -------------------------------------------------------------


@dataclass
class Rollouts:
    """One response to each of N prompts, all on the models' device."""
    tokens: torch.Tensor        # (N, S) prompt, response, pads
    prompt_len: torch.Tensor    # (N,)
    response_len: torch.Tensor  # (N,) at least 1; counts the end-of-turn token
    finished: torch.Tensor      # (N,) bool: its last token is end-of-turn
    logp: torch.Tensor          # (N, R) recorded while sampling; 0 where mask is False

    @property
    def mask(self):
        """(N, R) bool: which response tokens exist. It goes by position and never by token id: an
        id equal to that of a pad is still an action."""
        R = self.logp.shape[1]
        return torch.arange(R, device=self.logp.device) < self.response_len[:, None]

    @property
    def lengths(self):
        """(N,) tokens of each prompt and response together."""
        return self.prompt_len + self.response_len

    @property
    def actions(self):
        """(N, R) the tokens of the responses. Where `mask` is False they mean nothing."""
        R = self.logp.shape[1]
        position = self.prompt_len[:, None] + torch.arange(R, device=self.logp.device)  # (N, R)
        last_column = self.tokens.shape[1] - 1  # the mask hides what is picked beyond it
        return self.tokens.gather(1, position.clamp(max=last_column))

    def rows(self, i):
        """(B, T) the token rows of responses i, padded no further than the longest of them."""
        return self.tokens[i, :int(self.lengths[i].max())]

    def responses(self) -> list[list[int]]:
        """The responses as lists of ids, without prompts and pads."""
        result = []
        for row, start, length in zip(self.tokens.tolist(), self.prompt_len.tolist(),
                                      self.response_len.tolist()):
            result.append(row[start:start + length])
        return result


# ---- 2. plain_rollout --------------------------------------------------------


@torch.no_grad()
def plain_rollout(policy: GPT, prompts: list[list[int]], uniforms, end_of_turn: int,
                  temperature=1.0, limits: list[int] | None = None) -> Rollouts:
    """Sample a response of at most R tokens to each of N prompts (ids), without any cache.

    uniforms (N, R) in [0, 1): response i uses only the random numbers of row i, so it depends
    neither on the others nor on how they are batched. limits: for each response the most tokens
    that it may have, at least 1."""
    device = policy.embed.weight.device
    N, R = uniforms.shape
    uniforms = uniforms.to(device)
    limit = torch.tensor(limits or [R] * N, device=device)                # (N,)
    tokens, prompt_len = pad(prompts)
    tokens, prompt_len = tokens.to(device), prompt_len.to(device)         # (N, P), (N,)
    tokens = F.pad(tokens, (0, R))                                        # (N, S) room for R more
    logp = torch.zeros(N, R, dtype=sampling_dtype(policy), device=device)
    response_len = torch.zeros(N, dtype=torch.long, device=device)
    finished = torch.zeros(N, dtype=torch.bool, device=device)
    for t in range(R):
        running = (~finished & (t < limit)).nonzero()[:, 0]               # (n,) still running
        if len(running) == 0:
            break
        position = prompt_len[running] + t                                # (n,) of the new token
        with autocast(device):
            hidden = policy(tokens[running, :position.max()])             # (n, T, D) all read again
        row_index = torch.arange(len(running), device=device)             # (n,)
        last = hidden[row_index, position - 1]                            # (n, D)
        token, token_logp = sample(policy.logits(last), uniforms[running, t], temperature)
        tokens[running, position] = token
        logp[running, t] = token_logp
        response_len[running] += 1
        finished[running] = token == end_of_turn  # end-of-turn is an action, so it is kept
    return Rollouts(tokens, prompt_len, response_len, finished, logp)


# ---- 3. Sampler --------------------------------------------------------------

BUCKET = 32  # steps read a multiple of this many cache positions, or the whole cache


class Sampler:
    """Samples from one policy, call after call, while its weights change in place.

    Each trick saves work that the plain loop, or a plain cache, does again and again:
      cache         a token's keys and values are computed once
      static shape  the cache is allocated once; nothing is copied to make room for a token
      refill        a slot takes the next prompt at once and does not wait for its neighbors
      shared prompt several responses to one prompt read it once (comparisons, best of n)
      few polls     the host asks the device only every few steps which responses have ended
      CUDA graphs   a step does the same on the same memory each time, so on a GPU it is recorded
                    once for each (slots, cache length) and replayed: one launch, not hundreds
    """

    def __init__(self, policy: GPT, end_of_turn: int, temperature: float = 1.0, slots: int = 0,
                 poll_every: int = 0, use_graphs: bool = True):
        """slots: responses sampled side by side (0: as many as `fitting_slots` finds).
        poll_every: steps between two polls (0: 8 on a GPU, where a poll waits for the device; else
        2). use_graphs=False: no CUDA graphs on a GPU."""
        self.policy, self.end_of_turn, self.temperature = policy, end_of_turn, temperature
        self.device = policy.embed.weight.device
        on_gpu = self.device.type == "cuda"
        self.wanted_slots = slots
        self.poll_every = poll_every or (8 if on_gpu else 2)
        self.use_graphs = on_gpu and use_graphs
        self.model = policy
        if compute_dtype(self.device) == torch.bfloat16:
            # Under autocast every use converts a float32 matrix to bf16, which costs more than the
            # multiplication. A bf16 copy, refreshed once per call, gives the same numbers.
            self.model = copy.deepcopy(policy).requires_grad_(False)
            for module in self.model.modules():
                if isinstance(module, nn.Linear):
                    module.to(torch.bfloat16)
        self.cache = None
        self.stream = torch.cuda.Stream() if self.use_graphs else None
        self.steps = 0        # steps so far, over all calls
        self.slot_steps = 0   # slots, summed over steps; tokens / slot_steps is the share kept busy

    @torch.no_grad()
    def __call__(self, prompts: list[list[int]], uniforms,
                 limits: list[int] | None = None) -> Rollouts:
        """`plain_rollout` with the policy given at construction: the same responses. Of several
        processes (ranks.py) each samples its share, and each gets all the responses."""
        N, R = uniforms.shape
        self._check(prompts, R)
        lengths = [len(prompt) for prompt in prompts]
        self._reserve(longest=max(lengths) + R, n_responses=N, max_response=R)
        self._refresh_weights()
        self._clear(uniforms, limits or [R] * N)

        # Short prompts first, so that prompts prefilled together have similar lengths, and early
        # steps read a short part of the cache.
        queue = sorted(ranks.share(lengths), key=lengths.__getitem__, reverse=True)  # from its end
        B = min(self.slots, _power_of_two(len(queue)))
        owner = [self.idle_response] * B  # the response in each slot, as of the last poll
        depth = [0] * B                   # the most tokens that each slot's row can hold by now
        while True:
            # 1. Refill once an eighth of the slots are idle: a prefill of few prompts costs almost
            #    as much as one of many.
            idle = [slot for slot in range(B) if owner[slot] == self.idle_response]
            if queue and len(idle) * 8 >= B:
                slots = idle[:len(queue)]
                responses = [queue.pop() for _ in slots]
                self._admit(slots, responses, prompts)
                for slot, response in zip(slots, responses):
                    owner[slot], depth[slot] = response, lengths[response] - 1
            busy = [slot for slot in range(B) if owner[slot] != self.idle_response]
            if not busy:
                break
            # 2. When the queue is empty and at most half of the slots are busy, shrink to the
            #    smallest power of two that is enough for the busy ones.
            if not queue and len(busy) * 2 <= B:
                self._compact(busy, C=max(depth))
                B = _power_of_two(len(busy))
                n_idle = B - len(busy)
                owner = [owner[slot] for slot in busy] + [self.idle_response] * n_idle
                depth = [depth[slot] for slot in busy] + [0] * n_idle
            # 3. A few steps, each of which adds a token to every busy slot.
            C = min(self.cache.k.shape[3], _round_up(max(depth) + self.poll_every))
            for _ in range(self.poll_every):
                self._run_step(B, C)
            # 4. Poll: which responses have ended? This is the host's only question to the device.
            owner = self.response[:B].tolist()
            for slot in range(B):
                if owner[slot] == self.idle_response:
                    depth[slot] = 0
                else:
                    depth[slot] += self.poll_every
        return self._collect(prompts, N)

    def _step(self, B: int, C: int):
        """One more token for the first B slots, none of which holds more than C - 1 tokens.

        All shapes are fixed, and nothing here asks for a value on the host (no item(), no `if` on a
        tensor)."""
        response, count, cache = self.response[:B], self.count[:B], self.cache.part(B, C)
        with autocast(self.device):
            hidden = forward_cached(self.model, self.token[:B, None], cache)[:, 0]  # (B, D)
        uniform = self.uniforms[response, count]                                   # (B,)
        token, logp = sample(self.model.logits(hidden), uniform, self.temperature)
        self.tokens[response, count] = token
        self.logp[response, count] = logp
        self.token[:B] = token
        has_ended = (token == self.end_of_turn) | (count + 1 >= self.limit[response])
        # A slot whose response has ended becomes idle, here on the device. Until the host refills
        # it, it keeps stepping at position 0 of its row, whose content is no longer needed, and
        # writes to the idle response.
        cache.lengths.copy_(torch.where(has_ended, 0, cache.lengths + 1))
        count.copy_(torch.where(has_ended, 0, count + 1))
        response.copy_(torch.where(has_ended, self.idle_response, response))

    def _run_step(self, B: int, C: int):
        """Run one step. On a GPU a shape's first step runs as it is; the second one is recorded,
        and from then on it is replayed."""
        self.steps += 1
        self.slot_steps += B
        if not self.use_graphs:
            self._step(B, C)
        elif (B, C) in self.graphs:
            self.graphs[B, C].replay()
        elif (B, C) not in self.seen:
            # The first step of a shape runs eagerly as a warm-up. Recording takes long, and some
            # shapes never come again.
            self.seen.add((B, C))
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                self._step(B, C)
            torch.cuda.current_stream().wait_stream(self.stream)
        else:
            # Graphs run one at a time and keep results only in the buffers, so they can share the
            # memory of their intermediate results.
            pool = None
            if self.graphs:
                pool = next(iter(self.graphs.values())).pool()
            graph = torch.cuda.CUDAGraph()
            # thread_local: with several GPUs, a thread of NCCL's queries this one now and then,
            # which would otherwise end the recording with an error.
            with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
                self._step(B, C)  # recorded, not executed
            self.graphs[B, C] = graph
            graph.replay()

    def _admit(self, slots: list[int], responses: list[int], prompts: list[list[int]]):
        """Give prompts to idle slots. All of a prompt but its last token is read at once (prefill);
        the last token is what the slot's first step reads."""
        slots_of = {}  # prefix (a prompt without its last token) -> the slots that start from it
        for slot, response in zip(slots, responses):
            slots_of.setdefault(tuple(prompts[response][:-1]), []).append(slot)
        distinct = [prefix for prefix in slots_of if prefix]
        for batch in batches_by_length([len(prefix) for prefix in distinct], PREFILL_TOKENS):
            prefixes = [distinct[i] for i in batch]
            self._prefill(prefixes, [slots_of[prefix] for prefix in prefixes])
        to = torch.tensor(slots, device=self.device)
        self.response[to] = torch.tensor(responses, device=self.device)
        self.token[to] = torch.tensor([prompts[i][-1] for i in responses], device=self.device)
        self.cache.lengths[to] = torch.tensor([len(prompts[i]) - 1 for i in responses],
                                              device=self.device)

    def _prefill(self, prefixes: list[tuple[int, ...]], slots_of: list[list[int]]):
        """Read each prefix once, and copy its keys and values to the slots that start from it."""
        ids = pad(prefixes)[0].to(self.device)  # (prefixes, longest prefix)
        source, to = [], []
        for row, slots in enumerate(slots_of):
            for slot in slots:
                source.append(row)
                to.append(slot)
        source, to = torch.tensor(source, device=self.device), torch.tensor(to, device=self.device)
        with autocast(self.device):
            for layer, (k, v) in enumerate(prefill(self.model, ids)):
                self.cache.k[layer, to, :, :ids.shape[1]] = k[source]
                self.cache.v[layer, to, :, :ids.shape[1]] = v[source]

    def _compact(self, busy: list[int], C: int):
        """Move the busy slots, which hold at most C tokens, to the front."""
        at = torch.tensor(busy, device=self.device)
        for state in (self.response, self.token, self.count, self.cache.lengths):
            state[:len(busy)] = state[at]
        self.response[len(busy):] = self.idle_response
        for layer in (*self.cache.k, *self.cache.v):
            layer[:len(busy), :, :C] = layer[at, :, :C]

    def _check(self, prompts: list[list[int]], max_response: int):
        """Raise UserError for prompts that cannot be answered."""
        if not prompts or max_response < 1:
            raise UserError("no prompt, or no room for a response: there is nothing to sample")
        lengths = [len(prompt) for prompt in prompts]
        if min(lengths) < 1:
            raise UserError(f"prompt {lengths.index(0)} is empty: there is nothing to answer")
        longest, context = max(lengths), self.policy.cfg.context
        if longest + max_response >= context:  # the PM appends one more token
            raise UserError(f"--context {context} is too short for a prompt of {longest} tokens "
                            f"and a response of {max_response}; use a larger one")

    def _reserve(self, longest: int, n_responses: int, max_response: int):
        """Make the cache and the buffers, unless those of earlier calls are large enough."""
        size = min(self.policy.cfg.context, _round_up(longest + self.poll_every))
        if (self.cache and size <= self.cache.k.shape[3] and n_responses <= self.idle_response
                and max_response == self.uniforms.shape[1]):
            return
        self.cache, self.graphs, self.seen = None, {}, set()  # frees the old ones first
        cfg, N, device = self.policy.cfg, n_responses, self.device
        dtype = sampling_dtype(self.policy)
        n_own = -(-N // ranks.n_ranks())  # responses that this rank samples, at most
        B = min(self.wanted_slots or fitting_slots(cfg, size, device), _power_of_two(n_own))
        self.slots = B
        self.cache = KVCache(cfg, B, size, device, cache_dtype(self.policy))
        # Per slot: the response it works on, the token to read next, the tokens sampled so far.
        self.response = torch.zeros(B, dtype=torch.long, device=device)
        self.token = torch.zeros(B, dtype=torch.long, device=device)
        self.count = torch.zeros(B, dtype=torch.long, device=device)
        # Per response: inputs are its random numbers and its length limit, outputs are its tokens
        # and log-probs. One more response takes what idle slots write, so that a step does the same
        # for every slot.
        self.idle_response = N
        self.uniforms = torch.zeros(N + 1, max_response, device=device)
        self.limit = torch.ones(N + 1, dtype=torch.long, device=device)
        self.tokens = torch.zeros(N + 1, max_response, dtype=torch.long, device=device)
        self.logp = torch.zeros(N + 1, max_response, dtype=dtype, device=device)

    def _refresh_weights(self):
        """Copy the policy's present weights into the bf16 copy."""
        if self.model is not self.policy:
            for copied, original in zip(self.model.parameters(), self.policy.parameters()):
                copied.copy_(original)

    def _clear(self, uniforms, limits: list[int]):
        """Make all slots idle, forget the last call's responses, and take this call's inputs."""
        N, R = uniforms.shape
        self.uniforms[:N].copy_(uniforms)
        self.limit[:N].copy_(torch.tensor(limits).clamp(max=R))
        self.response.fill_(self.idle_response)
        self.cache.lengths.zero_()
        self.count.zero_()
        self.tokens.fill_(-1)  # no id is negative: what is -1 in the end was not sampled

    def _collect(self, prompts: list[list[int]], N: int) -> Rollouts:
        """The Rollouts of the N responses, in tensors of their own."""
        # What this process did not sample has the id -1: 0 after adding 1, as `add_up` needs it.
        logp = ranks.add_up(torch.where(self.tokens[:N] >= 0, self.logp[:N], 0))  # (N, R)
        sampled = ranks.add_up(self.tokens[:N] + 1) - 1                     # (N, R)
        mask = sampled >= 0                                                 # (N, R)
        response_len = mask.sum(1)                                          # (N,)
        last = sampled.gather(1, response_len[:, None] - 1)[:, 0]           # (N,)
        tokens, prompt_len = pad(prompts)
        tokens, prompt_len = tokens.to(self.device), prompt_len.to(self.device)  # (N, P), (N,)
        tokens = F.pad(tokens, (0, sampled.shape[1]))                       # (N, S)
        at = prompt_len[:, None] + torch.arange(sampled.shape[1], device=self.device)
        tokens.scatter_(1, at, sampled.clamp(min=0))
        return Rollouts(tokens, prompt_len, response_len, last == self.end_of_turn, logp)


def rollout(policy: GPT, prompts: list[list[int]], uniforms, end_of_turn: int, temperature=1.0,
            slots=0) -> Rollouts:
    """Sample one response to each prompt with a Sampler that is used once."""
    return Sampler(policy, end_of_turn, temperature, slots)(prompts, uniforms)


def sampling_dtype(policy: GPT) -> torch.dtype:
    """The dtype of log-probs: float32, or float64 in tests with a float64 policy."""
    return torch.promote_types(policy.embed.weight.dtype, torch.float32)


def cache_dtype(policy: GPT) -> torch.dtype:
    """The dtype of keys and values: what the matrix products give."""
    if compute_dtype(policy.embed.weight.device) == torch.bfloat16:
        return torch.bfloat16
    return sampling_dtype(policy)


def _round_up(n: int) -> int:
    return (n + BUCKET - 1) // BUCKET * BUCKET


def _power_of_two(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << (n - 1).bit_length()
