"""The preference model (PM), the scalar head it shares with the critic, and what is measured on a PM.

Read it in this order: ScalarModel, score_rows, ranking_loss, PMReport.

Legend:  B rows   T time   D width   N comparisons
A score r is a logit: P(A is preferred to B) = sigmoid(r_A - r_B) (Eq. 4.2). One unit of it is 174 Elo (Eq. 2.1).
Only differences mean anything, so a PM's mean on held-out replies is subtracted before scores are compared (B.2).
"""
import copy
import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

from data import Comparison, batches_by_length, pad
from model import GPT, autocast


class ScalarModel(nn.Module):
    """A transformer with one number at each position instead of V logits.

    As a preference model, the number that counts is the one on the end-of-context token (App. A.2). As a critic,
    the one at position t - 1 is the value of the state in which token t is chosen."""

    def __init__(self, trunk: GPT, zero_head: bool = False):
        """`trunk` is copied. A PM's head starts small and random, normal(0, 1 / sqrt(D + 1)) as in OpenAI's first RLHF
        code (HH does not state it); a critic's starts at zero, so its first values are all 0."""
        super().__init__()
        self.trunk = copy.deepcopy(trunk)
        self.head = nn.Linear(trunk.cfg.d_model, 1)
        nn.init.normal_(self.head.weight, std=0.0 if zero_head else (trunk.cfg.d_model + 1) ** -0.5)
        nn.init.zeros_(self.head.bias)
        self.register_buffer("mean", torch.zeros(()))  # subtracted from every score; set once, after training

    def forward(self, ids):
        """ids (B, T) -> (B, T), float32 also under autocast: in bf16 a score of 2 moves in steps of 1/64."""
        hidden = self.trunk(ids).float()  # (B, T, D)
        with torch.autocast(ids.device.type, enabled=False):
            return self.head(hidden)[..., 0] - self.mean

    def score(self, ids, lengths):
        """ids (B, T) padded on the right, lengths (B,) -> scores (B,), read on each row's last real token."""
        return self(ids)[torch.arange(len(ids), device=ids.device), lengths - 1]


@torch.no_grad()
def score_rows(pm: ScalarModel, rows: list[list[int]], token_budget: int = 8192, device="cpu"):
    """Score rows of ids, each of which ends with the end-of-context token -> (N,) float32 on the CPU.

    The evaluation of the PM and PPO score through this one function, so that an accuracy that was measured is the
    accuracy that RL gets (but for RL's ids being those sampled, not text encoded again)."""
    out = torch.empty(len(rows))
    for batch in batches_by_length([len(r) for r in rows], token_budget):
        ids, lengths = (t.to(device) for t in pad([rows[i] for i in batch]))
        with autocast(device):
            out[batch] = pm.score(ids, lengths).float().cpu()
    return out


def ranking_loss(chosen, rejected, weight=None):
    """L = -log sigmoid(r_chosen - r_rejected) = log(1 + exp(r_rejected - r_chosen)), mean over (N,) pairs.

    This is the log-likelihood of Eq. 4.2; GL §3.1 gives the loss. Written with softplus, as log(sigmoid(x))
    is -inf for x = -110. `weight` (N,) is the lambda of §5.1.2, which scales the harmless comparisons."""
    loss = F.softplus(rejected - chosen)  # (N,)
    return loss.mean() if weight is None else (weight * loss).sum() / weight.sum()


def wilson(hits: float, n: int) -> tuple[float, float]:
    """95% confidence interval of a proportion (Wilson's; it stays inside [0, 1] where n is small)."""
    if n == 0:
        return 0.0, 1.0
    z, p = 1.959964, hits / n
    middle, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, (middle - half) / (1 + z * z / n)), min(1.0, (middle + half) / (1 + z * z / n))


@dataclass
class PMReport:
    """How well margins r_chosen - r_rejected agree with the labels of one set of comparisons."""
    n: int
    accuracy: float       # ties count half
    low: float            # 95% confidence interval
    high: float
    loss: float           # nats; log 2 = 0.693 is what a PM that knows nothing gets
    length_rule: float    # accuracy of "the longer reply is better", a baseline any PM should beat
    bayes: float | None   # accuracy of someone who knows the true preferences: the ceiling, where it is known

    def __str__(self):
        ceiling = "" if self.bayes is None else f", Bayes ceiling {self.bayes:.3f}"
        return (f"accuracy {self.accuracy:.3f} [{self.low:.3f}, {self.high:.3f}] on n = {self.n}, loss {self.loss:.3f}, "
                f"longer-is-better {self.length_rule:.3f}{ceiling}")


def report(margins, comparisons: list[Comparison]) -> PMReport:
    """margins (N,): score of the chosen reply minus score of the rejected one, in logits."""
    n = len(comparisons)
    right = ((margins > 0).double() + 0.5 * (margins == 0).double()).sum().item()
    lengths = [len(c.chosen) - len(c.rejected) for c in comparisons]
    known = [max(c.p_chosen, 1 - c.p_chosen) for c in comparisons if c.p_chosen is not None]
    return PMReport(n, right / max(n, 1), *wilson(right, n), F.softplus(-margins.double()).mean().item(),
                    sum(1.0 if d > 0 else 0.5 if d == 0 else 0.0 for d in lengths) / max(n, 1),
                    sum(known) / n if known and len(known) == n else None)
