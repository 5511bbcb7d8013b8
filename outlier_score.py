"""Does a prompt look unlike the prompts that the model should answer (HH §5.4, App. B.9)?

chat.py says so beside its scores; experiments/outliers.py measures how well it can be told.
Read it in this order:
  1. Vectors    what the model makes of a prompt
  2. Distances  how far a vector is from those of known prompts
  3. A prompt   how many known prompts are less unusual

Legend:  L layers   D width   B rows of a batch   T tokens of the longest row
"""
import torch

from data import Tokenizer, batches_by_length, pad
from model import GPT
from ratings import to_float64
from run import autocast, tokens_at_once

# ---- 1. Vectors --------------------------------------------------------------


@torch.no_grad()
def features(model: GPT, rows: list[list[int]], mean=False, token_budget: int = 0, device="cpu"):
    """One hidden vector a row and layer (§5.4) -> (L, rows, D) float32 on the CPU.

    Entry [i] is the residual stream after block i, counted from 0. `rows` hold token ids, at least
    one each. The vector is read on a row's last token or, with `mean`, averaged over all its tokens
    (which tokens HH read: not stated)."""
    lengths = [len(row) for row in rows]
    vectors = torch.empty(len(model.blocks), len(rows), model.cfg.d_model)
    for batch in batches_by_length(lengths, tokens_at_once(token_budget, device)):
        ids, n_tokens = pad([rows[i] for i in batch])
        ids, n_tokens = ids.to(device), n_tokens.to(device)[:, None]  # (B, T), (B, 1)
        positions = torch.arange(ids.shape[1], device=device)  # (T,)
        if mean:
            weights = (positions < n_tokens) / n_tokens  # (B, T), 0 on pads
        else:
            weights = (positions == n_tokens - 1).float()  # (B, T)
        with autocast(device):
            hidden = model.embed_at(ids, positions)  # (B, T, D), as in GPT.forward
            for layer, block in enumerate(model.blocks):
                hidden = block(hidden)
                vectors[layer, batch] = (weights[..., None] * hidden.float()).sum(1).cpu()  # (B, D)
    return vectors


# ---- 2. Distances ------------------------------------------------------------


def fit_gaussian(inliers, ridge=1e-6):
    """Mean (D,) and covariance (D, D) of the inliers' vectors, by 1 / rows (§5.4).

    `ridge` times the mean variance is added to each variance (HH mention no such term). Without it,
    the covariance of D or fewer vectors cannot be inverted; with few vectors, take a larger one."""
    inliers = to_float64(inliers)
    mean = inliers.mean(0)
    centered = inliers - mean
    covariance = centered.T @ centered / len(inliers)
    covariance.diagonal().add_(ridge * covariance.diagonal().mean())
    return mean, covariance


def mahalanobis(vectors, mean, covariance, relative=True):
    """Outlier scores (rows,) of vectors (rows, D): z' S^-1 z, z = vector - mean, S the covariance.

    `relative` is the simplified relative Mahalanobis score (§5.4, Fig. 22). It subtracts the same
    expression with only the diagonal of S, which ignores correlations. The difference says how
    unusual the coordinates are together. HH find it better at every layer and size (Fig. 39)."""
    z = (to_float64(vectors) - mean).T  # (D, rows)
    # Cholesky: S = C C' with C lower triangular, so z' S^-1 z = (C^-1 z)' (C^-1 z) = |C^-1 z|^2.
    # Solving with C needs no inverse, and `cholesky` raises an error where S has none.
    C = torch.linalg.cholesky(covariance)
    whitened = torch.linalg.solve_triangular(C, z, upper=False)  # C^-1 z, (D, rows)
    distance = (whitened**2).sum(0)  # (rows,)
    if relative:
        distance = distance - (z**2 / covariance.diagonal()[:, None]).sum(0)
    return distance


# ---- 3. A prompt -------------------------------------------------------------


class Familiar:
    """Prompts that a model knows, to compare others with: the detector of experiments/outliers.py
    that needs no outliers (relative distance, the last token, the last block)."""

    def __init__(self, model: GPT, tok: Tokenizer, prompts: list[str], device="cpu"):
        """One half of the prompts gives the Gaussian, and the other half the usual scores. A
        Gaussian knows the vectors that it was fitted to too well."""
        self.model, self.tok, self.device = model, tok, device
        half = len(prompts) // 2
        self.gaussian = fit_gaussian(self.vectors(prompts[:half]))
        self.usual = mahalanobis(self.vectors(prompts[half:]), *self.gaussian)  # (rows,)

    def vectors(self, prompts: list[str]):
        """(rows, D); a prompt that is too long loses its beginning."""
        rows = []
        for prompt in prompts:
            rows.append(self.tok.encode_dialogue(prompt)[-self.model.cfg.context:])
        return features(self.model, rows, device=self.device)[-1]

    def share_below(self, prompt: str) -> float:
        """The share of known prompts that are less unusual than this one."""
        score, = mahalanobis(self.vectors([prompt]), *self.gaussian)
        return (self.usual < score).double().mean().item()
