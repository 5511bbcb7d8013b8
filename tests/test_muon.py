"""Tests of muon.py against a singular value decomposition in float64, and against PyTorch's."""
import pytest
import torch

from helpers import max_difference
from muon import Muon, orthogonal


@pytest.mark.parametrize("shape", [(5, 5), (4, 12), (12, 4), (1, 7)])
def test_each_singular_value_goes_through_the_polynomial(shape):
    """The singular vectors stay, and every singular value s becomes p(p(... s)), computed here one
    number at a time."""
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
    expected = []
    for s in (S / (S.square().sum().sqrt() + 1e-7)).tolist():
        for _ in range(5):
            s = 3.4445 * s - 4.7750 * s ** 3 + 2.0315 * s ** 5
        expected.append(s)
    found = orthogonal(matrix)
    assert max_difference(found, U @ torch.diag(torch.tensor(expected).double()) @ Vh) < 1e-5
    assert found.shape == matrix.shape


def test_five_rounds_bring_singular_values_near_1():
    """The range that the docstring states, on diagonal matrices with one large singular value."""
    for s in torch.logspace(-2.5, -0.01, 400, dtype=torch.float64).tolist():
        large = (1 - s * s) ** 0.5  # so that the norm is 1
        small, other = orthogonal(torch.diag(torch.tensor([s, large], dtype=torch.float64))).diag()
        assert 0.68 < small < 1.21 and 0.68 < other < 1.21
    assert not orthogonal(torch.zeros(3, 4)).any()  # a gradient of 0 moves nothing


def test_steps_follow_pytorchs_muon():
    """PyTorch's orthogonalizes in bf16, which has 8 bits: its directions agree to a few percent of
    their length, so after three steps the weights agree to that share of the distance moved."""
    torch.manual_seed(0)
    shapes = [(12, 4), (4, 12), (6, 6)]
    ours = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
    theirs = [torch.nn.Parameter(matrix.detach().clone()) for matrix in ours]
    before = [matrix.detach().clone() for matrix in ours]
    optimizers = [Muon(ours, lr=0.1, weight_decay=0.3),
                  torch.optim.Muon(theirs, lr=0.1, weight_decay=0.3, momentum=0.95)]
    for _ in range(3):
        for a, b in zip(ours, theirs):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for a, b, start in zip(ours, theirs, before):
        assert max_difference(a.detach(), b.detach()) < 0.05 * (a - start).norm()
        assert (a - start).norm() > 0.3


def test_it_continues_from_its_state():
    def run(n_steps, state=None, weights=None):
        matrix = torch.nn.Parameter(torch.ones(3, 2) if weights is None else weights.clone())
        optimizer = Muon([matrix], lr=0.1)
        if state is not None:
            optimizer.load_state_dict(state)
        for step in n_steps:
            matrix.grad = torch.randn(3, 2, generator=torch.Generator().manual_seed(step))
            optimizer.step()
        return matrix.detach(), optimizer.state_dict()
    weights, state = run(range(3))
    assert torch.equal(run(range(3, 5), state, weights)[0], run(range(5))[0])
