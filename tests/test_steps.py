"""runtime/steps.py: one optimiser step and one reading by hand and passes that do not count."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from runtime import steps

LENGTHS = [5, 3, 4, 2]
X = torch.tensor([[3.0, 0], [0, 4], [3, -1], [0, 5]])  # the gradient of X @ w, summed, is [6, 8]: norm 10


def linear_step(micro_tokens, rows=(0, 1, 2, 3), most=5.0, poison=1.0, times=1):
    """`times` steps of SGD on the sum of X @ w, with w = [1, 2] at first: the last metrics, and w."""
    network, cfg = nn.Linear(2, 1, bias=False), SimpleNamespace(micro_tokens=micro_tokens, max_grad_norm=most)
    network.weight.data = torch.tensor([[1.0, 2.0]])
    adam = torch.optim.SGD(network.parameters(), lr=0.1)

    def loss_of(rows):
        x = X[rows]
        report = {"loss": network(x).sum() * poison, "rows": torch.tensor(len(rows)), "max_second": -x[:, 1].min()}
        return report["loss"], report

    try:
        for _ in range(times):
            metrics = steps.step(network, adam, rows, LENGTHS, cfg, loss_of)
    except FloatingPointError as error:
        metrics = str(error)
    return metrics, network.weight[0].tolist()


@pytest.mark.parametrize("micro_tokens", [1, 6, 8, 99])
def test_a_step_sums_its_micro_batches_and_clips_once(micro_tokens):
    """Loss 6 + 16 = 22, of what is named max the largest, the norm 10 as it was; w moves by .1 * 5 / 10 * [6, 8]."""
    metrics, w = linear_step(micro_tokens)
    assert metrics == pytest.approx({"loss": 22, "rows": 4, "max_second": 1, "grad_norm": 10})
    assert w == pytest.approx([0.7, 1.6])
    assert linear_step(micro_tokens, most=99.0)[1] == pytest.approx([0.4, 1.2])
    assert linear_step(micro_tokens, rows=(3,), most=99.0)[1] == pytest.approx([1, 1.5])
    assert linear_step(micro_tokens, most=99.0, times=2)[1] == pytest.approx([-0.2, 0.4])  # nothing is left over


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_no_step_is_taken_on_nan(poison):
    error, w = linear_step(6, poison=poison)
    assert "loss is nan" in error or "loss is inf" in error
    assert w == [1, 2]


def test_a_reading_puts_every_row_in_its_place_without_a_gradient(monkeypatch):
    scale = torch.ones((), requires_grad=True)

    def reader(rows):
        T = max(LENGTHS[row] for row in rows) - 1
        cells = torch.tensor([[10 * row + t if t < LENGTHS[row] - 1 else 0 for t in range(T)] for row in rows]) * scale
        return torch.stack([cells, -cells])  # (2, b, t)

    expected = torch.tensor([[0, 1, 2, 3], [10, 11, 0, 0], [20, 21, 22, 0], [30, 0, 0, 0]]).float()
    for micro_tokens in (1, 8, 99):
        found = steps.read(LENGTHS, micro_tokens, reader, torch.zeros(4, 4))
        assert torch.equal(found, torch.stack([expected, -expected])) and not found.requires_grad


def test_rows_are_read_in_the_micro_batches_in_which_they_are_learned(monkeypatch):
    """Another shape, or another order, would round differently."""
    seen, batches = [], [[3, 0, 1], [2]]
    reader = lambda rows: seen.append(rows) or torch.ones(1, len(rows), 1)
    assert steps.read(LENGTHS, 8, reader, torch.zeros(4, 1), batches).sum() == 4
    read, seen = seen, []
    network, cfg = nn.Linear(2, 1), SimpleNamespace(micro_tokens=8, max_grad_norm=1)
    for rows in batches:
        loss_of = lambda rows: seen.append(rows) or (network(X[rows]).sum(), {"rows": torch.ones(1).sum()})
        steps.step(network, torch.optim.SGD(network.parameters()), rows, LENGTHS, cfg, loss_of)
    assert read == seen == [[0], [1, 3], [2]]


def test_a_pass_that_only_keeps_other_ranks_company_does_not_count(monkeypatch):
    """This rank's share is rows 3 and 0; it reads row 1 because another rank has one pass more."""
    monkeypatch.setattr(steps, "shares", lambda *_: iter([([3], True), ([0], True), ([1], False)]))
    metrics, w = linear_step(99, most=99.0)
    assert metrics == pytest.approx({"loss": 13, "rows": 2, "max_second": 0, "grad_norm": 34**0.5})
    assert w == pytest.approx([0.7, 1.5])
    found = steps.read(LENGTHS, 99, lambda rows: X[rows].T[:, :, None], torch.zeros(4, 1))
    assert found[:, :, 0].T.tolist() == [[3, 0], [0, 0], [0, 0], [0, 5]]
