"""Conversations of the toy world's people with policies, and the comparisons that come of them.

A person asks, sees one or two replies, and says something that depends on the reply that the
dialogue goes on with. Read it in this order:

  1. Conversations   `converse`: all conversations of a batch advance together
  2. Comparisons     `collect`: two replies at each turn (§2.1, 2.2); `BestOf` n, a player
  3. Measuring       `rates_by_turn` of one policy; `match`, a chat with two models (App. B.5)

Papers: HH = Bai et al. 2022 (arXiv 2204.05862), and every § or App. without a name is in HH.
"""
from collections import Counter
from dataclasses import dataclass
from random import Random

from run import UserError  # before torch: Ctrl-C prints no traceback

import torch

import toy
import toy_corpus
from data import ASSISTANT, HUMAN, MARKER, Comparison, counts_line
from model import GPT
from pipeline import Run
from pm import ScalarModel
from ppo import PPOConfig, pm_scores
from rollout import Rollouts, Sampler
from toy_people import next_turn

# ---- 1. Conversations --------------------------------------------------------

MAX_TURNS = 4  # exchanges of a conversation that is measured
# What the dialogue goes on from: the better reply, or in red-teaming the worse one (§2.2).
PICKED = {"helpful": "chosen", "harmless": "rejected"}


@dataclass
class Conversation:
    number: int  # among those held together
    kind: str    # "helpful", or "harmless" for red-teaming
    rng: Random  # the person's own
    turns: int   # exchanges that the person has time for
    prompt: str  # all that was said, and an open assistant turn
    goes_on: bool = True


@dataclass
class Reply:
    text: str
    finished: bool  # ended by itself, and not at the limit


@dataclass
class Exchange:
    """One turn of one conversation."""
    conversation: int              # its number
    turn: int                      # 1 for the first
    kind: str
    prompt: str
    replies: list[Reply]           # one of each player
    comparison: Comparison | None  # with two players; None if the replies cannot be compared
    problem: str                   # why not; "" if they can


def converse(run: Run, name: str, players: list[Sampler], kinds: list[str], turns: list[int],
             held_out: bool, max_response: int, noise: float = 1.0,
             keep: str = "") -> list[Exchange]:
    """Hold one conversation for each of `kinds`, of at most so many `turns`, with one or two
    players. A player that is named twice gives two replies, and reads their history once.

    With two replies, the dialogue goes on from the one that the crowdworker picks: the more helpful
    one or, in red-teaming, the more harmful one (§2.2). It ends early after a reply that is
    unfinished, empty or contains a turn marker, and when the next prompt does not fit the context.
    held_out: whether people ask only held-out questions, or none. noise: of the choices
    (toy.preference). keep: go on from the "chosen" reply, the "rejected" or a "random" one, and not
    from the one that is picked. `name` seeds everything; the same people come, and open with the
    same questions, whoever the players are."""
    generator = run.torch_rng("conversations", name)
    conversations, exchanges = [], []
    for i, kind in enumerate(kinds):
        rng = run.rng("conversations", name, i)
        prompt = toy_corpus.open_dialogue(rng, kind, held_out)
        conversations.append(Conversation(i, kind, rng, turns[i], prompt))
    for turn in range(1, max(turns) + 1):
        prompts = [conversation.prompt for conversation in conversations]
        if not prompts:
            break
        said = answers(run, players, prompts, max_response, generator)
        for conversation, replies in zip(conversations, said):
            exchange = compare(conversation, turn, replies, noise)
            exchanges.append(exchange)
            conversation.goes_on = False
            if turn < conversation.turns and is_readable(exchange):
                conversation.prompt = go_on(conversation, exchange, held_out, keep)
                n_tokens = len(run.tok.encode_dialogue(conversation.prompt))
                # Less than the context, because the PM appends one more token.
                conversation.goes_on = n_tokens + max_response < run.context
        conversations = [conversation for conversation in conversations if conversation.goes_on]
    return exchanges


def answers(run: Run, players: list[Sampler], prompts: list[str], max_response: int,
            generator: torch.Generator) -> list[list[Reply]]:
    """The replies of all players to each prompt."""
    said = [[] for _ in prompts]
    for player in dict.fromkeys(players):
        copies, ids = players.count(player), []
        for prompt in prompts:
            ids += [run.tok.encode_dialogue(prompt)] * copies
        uniforms = torch.rand(len(ids), max_response, generator=generator)
        ro = player(ids, uniforms)
        for i, (response, finished) in enumerate(zip(ro.responses(), ro.finished.tolist())):
            said[i // copies].append(Reply(run.tok.decode(response), finished))
    return said


def compare(conversation: Conversation, turn: int, replies: list[Reply],
            noise: float) -> Exchange:
    """What the crowdworker makes of the replies. Stored as text, an unfinished reply would look
    finished (encoding it again adds the end of turn), so it is not compared."""
    texts, comparison, problem = [reply.text for reply in replies], None, ""
    if not all(reply.finished for reply in replies):
        problem = "unfinished reply"
    elif not all(text.strip() for text in texts):
        problem = "empty reply"
    elif len(replies) == 2 and texts[0] == texts[1]:
        problem = "identical pair"
    elif len(replies) == 2:
        comparison = toy.label(conversation.prompt, *texts, conversation.kind, conversation.rng,
                               noise)
    return Exchange(conversation.number, turn, conversation.kind, conversation.prompt, replies,
                    comparison, problem)


def is_readable(exchange: Exchange) -> bool:
    """Whether a dialogue can go on from this turn: its replies are finished, not empty, and play no
    further turns of their own."""
    has_marker = any(MARKER.search(reply.text) for reply in exchange.replies)
    return exchange.problem in ("", "identical pair") and not has_marker


def go_on(conversation: Conversation, exchange: Exchange, held_out: bool, keep: str) -> str:
    """The prompt of the next turn."""
    reply, comparison = exchange.replies[0].text, exchange.comparison
    if comparison is not None:
        keep = keep or PICKED[conversation.kind]
        if keep == "random":
            keep = conversation.rng.choice(("chosen", "rejected"))
        reply = comparison.chosen if keep == "chosen" else comparison.rejected
    turn = next_turn(conversation.rng, conversation.prompt, reply, conversation.kind, held_out)
    return f"{conversation.prompt}{reply}{HUMAN} {turn}{ASSISTANT}"


# ---- 2. Comparisons ----------------------------------------------------------


def collect(run: Run, cfg, policy: GPT, kind: str, split: str, n: int) -> list[Comparison]:
    """Let simulated crowdworkers compare at most n pairs of the policy's replies in conversations.
    Pairs that cannot be compared are dropped and counted. cfg: a train_pm.PMConfig. A split whose
    name begins with "test" asks held-out questions."""
    sampler = Sampler(policy, run.tok.end_of_turn)
    kept, counts = collect_from(run, cfg, [sampler, sampler], kind, split, n)
    if not kept:
        raise UserError(f"none of the {n:,} pairs of {kind} replies can be compared "
                        f"({counts_line(counts)}): the initial policy knows too little. Give it "
                        "more --lm.documents (in a new --out), or longer replies "
                        "(--pm.max-response)")
    return kept


def collect_from(run: Run, cfg, players: list, kind: str, split: str,
                 n: int) -> tuple[list[Comparison], Counter]:
    """Like `collect`, for any two players, for example two deployed policies (§2.1, §4.5). Also
    returns the counts of what was dropped, by reason. The list of comparisons may be empty."""
    turns, rng = [], run.rng("turns", kind, split)
    while sum(turns) < n:
        stays = 1
        # Half of the people leave after each exchange. In HH they stay for about four (§2.3), but
        # each stage from here on pays for the tokens of the histories.
        while stays < cfg.turns and rng.random() < 0.5:
            stays += 1
        turns.append(min(stays, n - sum(turns)))
    exchanges = converse(run, f"{kind} {split}", players, [kind] * len(turns), turns,
                         split.startswith("test"), cfg.max_response, cfg.noise)
    counts, kept = Counter(read=len(exchanges)), []
    for exchange in exchanges:
        if exchange.comparison is None:
            counts[exchange.problem] += 1
        else:
            kept.append(exchange.comparison)
    counts["kept"] = len(kept)
    print(f"    {len(turns):,} conversations, {kind} {split}: {counts_line(counts)}")
    return kept, counts


class BestOf:
    """A player whose reply is the best of n by the PM: rejection sampling (§2.3, App. B.6)."""

    def __init__(self, run: Run, policy: GPT, pm: ScalarModel, n: int, name: str):
        """name: seeds all samples but the first of each n."""
        self.sampler = Sampler(policy, run.tok.end_of_turn)
        self.pm, self.n, self.end_of_context = pm, n, run.tok.end_of_context
        self.generator = run.torch_rng("best of", name)

    def __call__(self, prompts: list[list[int]], uniforms) -> Rollouts:
        """One response to each of N prompts. uniforms (N, R): of the first of its n samples."""
        N, R = uniforms.shape
        others = torch.rand(N, self.n - 1, R, generator=self.generator)
        uniforms = torch.cat([uniforms[:, None], others], 1).flatten(0, 1)        # (N n, R)
        copies = []
        for prompt in prompts:
            copies += [prompt] * self.n
        ro = self.sampler(copies, uniforms)
        scores = pm_scores(self.pm, ro, self.end_of_context, PPOConfig())         # (N n,)
        best = scores.view(N, self.n).argmax(1)                                   # (N,)
        i = best + self.n * torch.arange(N, device=scores.device)                 # (N,)
        return Rollouts(ro.tokens[i], ro.prompt_len[i], ro.response_len[i], ro.finished[i],
                        ro.logp[i])


# ---- 3. Measuring ------------------------------------------------------------


def rates_by_turn(run: Run, policy: GPT, n: int, max_response: int,
                  temperature: float = 1.0) -> list[dict]:
    """What the ground truth says of a policy's replies in n held-out conversations, a third of them
    red-teaming: toy.rates for each turn, and "n", its replies."""
    kinds = ["helpful", "harmless", "helpful"] * n
    player = Sampler(policy, run.tok.end_of_turn, temperature)
    exchanges = converse(run, "by turn", [player], kinds[:n], [MAX_TURNS] * n, held_out=True,
                         max_response=max_response)
    rows = []
    for turn in range(1, MAX_TURNS + 1):
        mine = [exchange for exchange in exchanges if exchange.turn == turn]
        prompts, said = [e.prompt for e in mine], [e.replies[0].text for e in mine]
        rows.append(toy.rates(prompts, [e.kind for e in mine], said) | {"n": len(mine)})
    return rows


def match(run: Run, a: GPT, b: GPT, kind: str, n: int, max_response: int = 32,
          name: str = "match"):
    """n held-out conversations in which two models answer side by side at each turn (App. B.5)
    -> wins (2, 2) for ratings.fit_elo: [0, 1] counts a's replies that were judged better than b's.
    Replies that cannot be compared (equal, empty or unfinished ones) count for neither. The same
    people come to matches of the same `name`."""
    players = [Sampler(model, run.tok.end_of_turn) for model in (a, b)]
    exchanges = converse(run, f"{name} {kind}", players, [kind] * n, [MAX_TURNS] * n, held_out=True,
                         max_response=max_response)
    wins = torch.zeros(2, 2)
    for exchange in exchanges:
        if exchange.comparison is not None:
            is_a = exchange.comparison.chosen == exchange.replies[0].text
            winner, loser = (0, 1) if is_a else (1, 0)
            wins[winner, loser] += 1
    return wins
