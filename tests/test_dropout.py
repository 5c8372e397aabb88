"""Dropout by a hash: the right share, no pattern, the same everywhere."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from recipefuzz.engines.dropout import SeededDropout, seed_dropout


def dropped(x: torch.Tensor) -> torch.Tensor:
    return (x == 0).double()


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_share_and_mean_are_those_of_dropout(p):
    layer, x = SeededDropout(p, 12345), torch.ones(400, 500)
    out = layer(x)
    error = 4 * (p * (1 - p) / x.numel()) ** 0.5  # four standard errors
    assert abs(float(dropped(out).mean()) - p) < error
    assert torch.equal(out.unique(), torch.tensor([0, 1 / (1 - p)]))


def test_masks_show_no_pattern():
    """Between rows, columns, calls, layers and seeds: all correlations are those of chance."""
    x, p = torch.ones(300, 300), 0.3
    layer, other = SeededDropout(p, 1), SeededDropout(p, 2)
    first, second, third = (dropped(one(x)) - p for one in (layer, layer, other))
    pairs = [(first[1:], first[:-1]), (first[:, 1:], first[:, :-1]), (first, second), (first, third), (first, first.T)]
    for a, b in pairs:
        assert abs(float((a * b).mean()) / (p * (1 - p))) < 0.02
    for sums in (first.mean(0), first.mean(1)):
        assert float(sums.std()) == pytest.approx((p * (1 - p) / 300) ** 0.5, rel=0.15)


def test_nothing_is_dropped_in_evaluation_and_all_at_one():
    x = torch.randn(5, 7)
    layer = SeededDropout(0.5, 3).eval()
    assert torch.equal(layer(x), x)
    assert int(layer.calls) == 0
    assert not SeededDropout(1.0, 3)(x).any()
    assert torch.equal(SeededDropout(0.0, 3)(x), x)


def test_layers_differ_trials_repeat_and_generators_are_left_alone():
    def model(seed: int) -> nn.Module:
        shared = nn.Dropout(0.5)
        made = nn.Sequential(nn.Dropout(0.5), nn.Sequential(shared, shared), nn.Dropout1d(0.5), nn.Identity())
        seed_dropout(made, seed)
        return made

    made = model(7)
    kinds = [type(layer) for layer in made.modules() if not list(layer.children())]
    assert kinds == [SeededDropout, SeededDropout, nn.Dropout1d, nn.Identity]
    assert made[1][0] is made[1][1]
    x, state = torch.ones(40, 50), torch.get_rng_state()
    outs = [layer(x) for layer in (made[0], made[1][0], model(7)[0], model(8)[0], model(2**40)[0])]
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(outs[0], outs[2])
    assert not any(torch.equal(outs[0], outs[i]) for i in (1, 3, 4))
