"""The preference model (PM): a transformer that scores a dialogue; its loss and its accuracy.

Read it in this order:
  1. The model   the scalar head (which the critic has, too), and scores of many rows
  2. The loss    of a comparison: which of two replies did a person prefer?
  3. The report  accuracy, its interval, a baseline and the ceiling
  4. Faster      replies to one prompt in one row (the same scores; skip it at first)

Legend:  B rows   T time   D width   N comparisons
A score r is a logit: P(A is preferred to B) = sigmoid(r_A - r_B) (Eq. 4.2). A difference of 1 is
174 Elo (Eq. 2.1). A PM's scores have an arbitrary offset, so each PM's mean on held-out replies is
subtracted before scores of different PMs are compared (App. B.2).
"""
import copy
import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

import ranks
from data import Comparison, pad
from model import GPT, at_least_float32
from run import autocast, tokens_at_once

# ---- 1. The model ------------------------------------------------------------


class ScalarModel(nn.Module):
    """A transformer with one number at each position instead of a logit for each possible token.

    A preference model is read at the end-of-context token (App. A.2). A critic is read at each
    position t - 1: the value of the state in which token t is chosen."""

    def __init__(self, trunk: GPT, zero_head: bool = False):
        """`trunk` is copied. A PM's head starts random, with a standard deviation of
        1 / sqrt(D + 1), as in OpenAI's first RLHF code (openai/lm-human-preferences at cbfd210,
        language/model.py L251-252, L368); HH does not state it. With zero_head it starts at zero,
        so a critic's first values are 0 (unless --rl.keep-head: see train_rl.Learner)."""
        super().__init__()
        D = trunk.cfg.d_model
        self.trunk = copy.deepcopy(trunk)
        self.head = nn.Linear(D, 1)
        nn.init.normal_(self.head.weight, std=0.0 if zero_head else (D + 1) ** -0.5)
        nn.init.zeros_(self.head.bias)
        self.register_buffer("mean", torch.zeros(()))  # subtracted; set once, after training

    def forward(self, ids, at=None, positions=None, mask=None):
        """ids (B, T) -> (B, T), or (n,) at the positions `at`; positions and mask as in
        `GPT.forward`. Float32 also under autocast: between 2 and 4, bf16 can only represent
        multiples of 1/64."""
        hidden = at_least_float32(self.trunk(ids, at, positions, mask))  # (B, T, D) or (n, D)
        with torch.autocast(ids.device.type, enabled=False):
            return self.head(hidden)[..., 0] - self.mean  # (B, T) or (n,)

    def score(self, ids, lengths):
        """ids (B, T) padded on the right, lengths (B,) -> scores (B,) on each row's last token."""
        rows = torch.arange(len(ids), device=ids.device)
        return self(ids, (rows, lengths - 1))


@torch.no_grad()
def score_rows(pm: ScalarModel, rows: list[list[int]], token_budget: int = 0, device="cpu"):
    """Score rows of ids that end with the end-of-context token -> one score per row, on the CPU.

    RL uses this same function, on the ids that it sampled."""
    scores = torch.zeros(len(rows), dtype=pm.head.weight.dtype)
    lengths = [len(row) for row in rows]
    for batch in ranks.own_batches(lengths, tokens_at_once(token_budget, device)):
        ids, n_tokens = pad([rows[i] for i in batch])  # (B, T), (B,)
        with autocast(device):
            scores[batch] = pm.score(ids.to(device), n_tokens.to(device)).cpu()
    return ranks.add_up(scores)


# ---- 2. The loss -------------------------------------------------------------


def ranking_loss(chosen, rejected):
    """-log sigmoid(r_chosen - r_rejected) = log(1 + exp(r_rejected - r_chosen)) of each pair, not
    averaged: (N,), (N,) -> (N,). It is the negative log-likelihood of Eq. 4.2, and the loss of GL
    §3.1.

    It is written with softplus, because log(sigmoid(-110)) is -inf in float32."""
    return F.softplus(rejected - chosen)


# ---- 3. The report -----------------------------------------------------------


@dataclass
class PMReport:
    """How well margins r_chosen - r_rejected agree with the labels of one set of comparisons."""
    n: int
    accuracy: float       # ties count half
    low: float            # 95% confidence interval
    high: float
    loss: float           # nats; a PM that knows nothing gets log 2 = 0.693
    length_rule: float    # accuracy of "the reply with more characters is better": a baseline
    bayes: float | None   # the ceiling: accuracy of someone who knows the true preferences

    def __str__(self):
        few = " (too few to rely on)" if self.n < 100 else ""
        text = (f"accuracy {self.accuracy:.3f} [{self.low:.3f}, {self.high:.3f}] on n = {self.n}"
                f"{few}, loss {self.loss:.3f}, longer-is-better {self.length_rule:.3f}")
        return text if self.bayes is None else f"{text}, Bayes ceiling {self.bayes:.3f}"


def report(margins, comparisons: list[Comparison]) -> PMReport:
    """margins (N,): score of the chosen reply minus score of the rejected one, in logits."""
    n = len(comparisons)
    margins = margins.double()
    longer = torch.tensor([len(c.chosen) - len(c.rejected) for c in comparisons])
    ceilings = []
    for c in comparisons:
        if c.p_chosen is not None:
            ceilings.append(max(c.p_chosen, 1 - c.p_chosen))
    hits = count_positive(margins)
    low, high = wilson(hits, n)
    bayes = None
    if n > 0 and len(ceilings) == n:
        bayes = sum(ceilings) / n
    return PMReport(n=n, accuracy=hits / max(n, 1), low=low, high=high,
                    loss=F.softplus(-margins).mean().item(),
                    length_rule=count_positive(longer) / max(n, 1), bayes=bayes)


def count_positive(margins) -> float:
    """How many margins are above 0; a tie counts half."""
    return (margins > 0).sum().item() + 0.5 * (margins == 0).sum().item()


def wilson(hits: float, n: int) -> tuple[float, float]:
    """95% confidence interval of a proportion (Wilson's, which stays inside [0, 1] for small n)."""
    if n == 0:
        return 0.0, 1.0
    z, p = 1.959964, hits / n
    middle = p + z * z / (2 * n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    return max(0.0, (middle - half) / scale), min(1.0, (middle + half) / scale)


# ---- 4. Faster: rows that share their prompt ---------------------------------


def score_branches(pm: ScalarModel, rows: list[list[list[int]]], device):
    """Scores (B, K), differentiable, of K rows of ids for each of B comparisons: rows[b][k].

    The K rows of a comparison begin with the same prompt, and a token's hidden state depends only
    on what stands before it. So one row can hold the shared part once, and after it the rest of
    each row: K branches. A branch sees the shared part and itself, and its positions continue
    those of the shared part. The scores are the same as those of K separate rows. Where
    comparisons have different numbers of rows, K is the largest, and the others' last score is
    repeated."""
    ids, positions, branches, ends = [], [], [], []
    K = max(len(comparison) for comparison in rows)
    for comparison in rows:
        shared = shared_length(comparison)
        row = comparison[0][:shared]
        position, branch, end = list(range(shared)), [0] * shared, []
        for number, whole in enumerate(comparison, start=1):
            row = row + whole[shared:]
            position.extend(range(shared, len(whole)))
            branch.extend([number] * (len(whole) - shared))
            end.append(len(row) - 1)
        end += end[-1:] * (K - len(end))
        ids.append(row)
        positions.append(position)
        branches.append(branch)
        ends.append(end)
    ids = pad(ids)[0].to(device)              # (B, T)
    positions = pad(positions)[0].to(device)  # (B, T)
    branch = pad(branches)[0].to(device)      # (B, T); 0 is the shared part
    ends = torch.tensor(ends, device=device)  # (B, K)
    T = ids.shape[1]
    # Entry [b, i, j] says whether token i sees token j. No token sees the pads, which come last.
    is_before = torch.ones(T, T, dtype=torch.bool, device=device).tril()  # (T, T)
    is_own = branch[:, :, None] == branch[:, None, :]                     # (B, T, T)
    is_shared = branch[:, None, :] == 0                                   # (B, 1, T)
    mask = is_before & (is_own | is_shared)                               # (B, T, T)
    with autocast(device):
        rows_of_ends = torch.arange(len(ids), device=device)[:, None]     # (B, 1)
        return pm(ids, (rows_of_ends, ends), positions, mask[:, None])    # (B, K)


def shared_length(rows: list[list[int]]) -> int:
    """How many ids the rows have in common at their beginning. The last id of a row never counts,
    so each row has a branch."""
    most = min(len(row) for row in rows) - 1
    for position in range(most):
        if len({row[position] for row in rows}) > 1:
            return position
    return most
