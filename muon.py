"""Muon, the optimizer of the language model's matrices in stage 1 (Jordan et al. 2024,
kellerjordan.github.io/posts/muon).

AdamW scales each number of a gradient by itself. Muon takes a matrix as a whole. The momentum of
its gradient has a singular value decomposition G = U S V'. A few of the singular values are much
larger than the others, so a step along G moves the weights in a few directions only. Muon steps
along U V' instead: all directions, each equally far.

PyTorch has torch.optim.Muon, but it computes in bf16. On a CPU without bf16 instructions a step of
it took six times as long as the rest of the language model's step (LOG.md). This one computes in
the matrices' own dtype. Embeddings, biases and LayerNorms stay with AdamW.
"""
import torch


class Muon(torch.optim.Optimizer):
    """Momentum with Nesterov's correction, made orthogonal. All parameters must be matrices."""

    def __init__(self, matrices, lr: float, momentum: float = 0.95, weight_decay: float = 0.0):
        super().__init__(matrices, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            beta = group["momentum"]
            for matrix in group["params"]:
                state = self.state[matrix]
                if not state:
                    state["momentum"] = torch.zeros_like(matrix)
                momentum = state["momentum"].lerp_(matrix.grad, 1 - beta)
                direction = orthogonal(matrix.grad.lerp(momentum, beta))  # Nesterov
                # In a tall matrix the same singular value moves each of its many rows less.
                rows, columns = matrix.shape
                scale = max(1.0, rows / columns) ** 0.5
                matrix.mul_(1 - group["lr"] * group["weight_decay"])
                matrix.add_(direction, alpha=-group["lr"] * scale)


def orthogonal(matrix, steps: int = 5):
    """About U V', for a matrix U S V' of any shape.

    p(X) = a X + b (X X') X + c (X X')^2 X has the singular vectors of X and turns each singular
    value s into a s + b s^3 + c s^5. Jordan chose a, b and c so that five rounds take any s from
    0.003 to 1 to between 0.68 and 1.21, which is near enough to 1. This needs matrix products
    only (a Newton-Schulz iteration); an exact decomposition is many times slower."""
    a, b, c = 3.4445, -4.7750, 2.0315
    rows, columns = matrix.shape
    X = matrix.T if rows > columns else matrix  # so that X X' is the smaller of the two products
    X = X / (X.norm() + 1e-7)                   # now no singular value is above 1
    for _ in range(steps):
        XX = X @ X.T
        X = a * X + (b * XX + c * XX @ XX) @ X
    return X.T if rows > columns else X
