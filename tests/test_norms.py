"""The norm axis: each kind against its formula, and its exchange in models that were built without it."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap

from recipefuzz.targets.norms import EPS, NORMS, make_norm, replace_norms

KINDS = [kind for kind in NORMS if kind != "none"]
SHAPES = [
    ((6, 8), True),
    ((6, 8, 5), True),
    ((6, 8, 5, 3), True),
    ((6, 8, 2, 5, 3), True),
    ((6, 8), False),
    ((6, 5, 8), False),
    ((6, 2, 5, 8), False),
]


def standardized(x: Tensor, dims: tuple[int, ...]) -> Tensor:
    return (x - x.mean(dims, keepdim=True)) / (x.var(dims, correction=0, keepdim=True) + EPS).sqrt()


def formula(kind: str, x: Tensor, channels_first: bool) -> Tensor:
    """Compute the table in make_norm's docstring, over 8 features in 4 groups."""
    feature = 1 if channels_first else x.dim() - 1
    positions = tuple(range(2, x.dim())) if channels_first else ()
    if kind == "none":
        return x
    if kind == "rms":
        return x / (x.square().mean(feature, keepdim=True) + EPS).sqrt()
    if kind == "batch":
        return standardized(x, tuple(d for d in range(x.dim()) if d != feature))
    if kind == "layer":
        return standardized(x, (feature, *positions))
    groups = x.unflatten(feature, (4, 2))
    return standardized(groups, (feature + 1, *(d + 1 for d in positions))).flatten(feature, feature + 1)


@pytest.mark.parametrize(("shape", "channels_first"), SHAPES)
@pytest.mark.parametrize("kind", NORMS)
def test_output_is_the_formula(kind, shape, channels_first):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 3 + 2
    norm = make_norm(kind, 8, channels_first=channels_first)
    torch.testing.assert_close(norm(x), formula(kind, x, channels_first), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("shape", "channels_first"), SHAPES)
@pytest.mark.parametrize("kind", KINDS)
def test_gains_and_biases_belong_to_features(kind, shape, channels_first):
    norm = make_norm(kind, 8, channels_first=channels_first)
    gain, bias = torch.arange(1.0, 9.0), torch.arange(8.0) if hasattr(norm, "bias") else torch.zeros(8)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    plain = norm(x).detach()
    with torch.no_grad():
        norm.weight.copy_(gain)
        if hasattr(norm, "bias"):
            norm.bias.copy_(bias)
    feature = 1 if channels_first else x.dim() - 1
    along = [8 if d == feature else 1 for d in range(x.dim())]
    torch.testing.assert_close(norm(x), plain * gain.view(along) + bias.view(along), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("channels_first", [True, False])
@pytest.mark.parametrize("kind", NORMS)
def test_construction_draws_nothing_and_starts_plain(kind, channels_first):
    before = torch.get_rng_state()
    norm = make_norm(kind, 8, channels_first=channels_first)
    assert torch.equal(torch.get_rng_state(), before)
    expected = {"none": set(), "rms": {"weight"}}.get(kind, {"weight", "bias"})
    assert {name for name, _ in norm.named_parameters()} == expected
    for name, parameter in norm.named_parameters():
        assert torch.equal(parameter, torch.ones(8) if name == "weight" else torch.zeros(8))


@pytest.mark.parametrize(
    ("features", "groups"),
    [(64, 8), (48, 8), (16, 8), (20, 5), (8, 4), (6, 3), (4, 2), (3, 1), (2, 1), (1, 1), (13, 1), (14, 7)],
)
def test_group_count(features, groups):
    assert make_norm("group", features, channels_first=True).num_groups == groups
    assert make_norm("group", features, channels_first=False).num_groups == groups


@pytest.mark.parametrize("channels_first", [True, False])
def test_batch_norm_evaluates_with_running_statistics(channels_first):
    x = torch.randn(400, 8, generator=torch.Generator().manual_seed(0)) * 3 + 2
    norm = make_norm("batch", 8, channels_first=channels_first)
    for _ in range(60):
        norm(x)
    norm.eval()
    torch.testing.assert_close(norm(x)[:1], norm(x[:1]))
    torch.testing.assert_close(norm(x), standardized(x, (0,)), rtol=0.02, atol=0.02)


@pytest.mark.parametrize("channels_first", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_large_half_precision_values_do_not_overflow(kind, channels_first):
    x = torch.full((4, 8), 1000.0, dtype=torch.float16)
    x[:, ::2] = -1000
    x[::2] *= -1
    norm = make_norm(kind, 8, channels_first=channels_first).half()
    assert (norm(x).abs() - 1).abs().max() < 0.01


@pytest.mark.parametrize(("shape", "channels_first"), [((6, 8, 5, 3), True), ((6, 5, 8), False)])
@pytest.mark.parametrize("kind", KINDS)
def test_lanes_run_under_vmap_without_a_fallback(kind, shape, channels_first):
    norms = [make_norm(kind, 8, channels_first=channels_first) for _ in range(3)]
    x = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))
    parameters, buffers = stack_module_state(norms)
    call = vmap(lambda p, b, rows: functional_call(norms[0], (p, b), (rows,)))
    together = call(parameters, buffers, x)  # a missing batching rule warns, and warnings are errors
    torch.testing.assert_close(together, torch.stack([n(rows) for n, rows in zip(norms, x, strict=True)]))


def test_unknown_kind():
    with pytest.raises(ValueError, match=r"norm = 'instance': expected one of none, batch, layer, group"):
        make_norm("instance", 8, channels_first=True)
    with pytest.raises(ValueError, match=r"norm = 'Batch': expected one of none, batch"):
        replace_norms(nn.Sequential(nn.Linear(2, 2)), "Batch")


class ResNetLike(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.conv1, self.bn1 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.GroupNorm(2, 8)
        self.head = nn.ModuleDict({"norm": nn.BatchNorm1d(8), "out": nn.Linear(8, 2)})

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = torch.relu(x + self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x))))))
        return self.head["out"](self.head["norm"](x.mean((2, 3))))


@pytest.mark.parametrize("kind", NORMS)
def test_replace_in_a_residual_network(kind):
    model = ResNetLike().double()
    before = torch.get_rng_state()
    assert replace_norms(model, kind) == 4
    assert torch.equal(torch.get_rng_state(), before)
    assert replace_norms(model, kind) == (0 if kind == "none" else 4)
    kinds = [type(make_norm(kind, 8, channels_first=True))] * 4
    assert [type(n) for n in (model.stem[1], model.bn1, model.bn2, model.head["norm"])] == kinds
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    for training in (True, False):
        output = model.train(training)(torch.randn(4, 3, 6, 6).double())
        assert output.shape == (4, 2)
        assert output.isfinite().all()


class LayerNorm2d(nn.LayerNorm):
    """As torchvision's: channels first."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


REPLACED = [
    (nn.BatchNorm1d(8), (6, 8, 5)),
    (nn.BatchNorm2d(8), (6, 8, 5, 3)),
    (nn.BatchNorm3d(8), (6, 8, 2, 5, 3)),
    (nn.SyncBatchNorm(8), (6, 8, 5)),
    (nn.InstanceNorm1d(8), (6, 8, 5)),
    (nn.InstanceNorm2d(8, affine=True), (6, 8, 5, 3)),
    (nn.InstanceNorm3d(8), (6, 8, 2, 5, 3)),
    (nn.GroupNorm(2, 8), (6, 8, 5, 3)),
    (LayerNorm2d(8), (6, 8, 5, 3)),
    (nn.LayerNorm(8), (6, 5, 8)),
    (nn.LayerNorm(8, elementwise_affine=False), (6, 8)),
    (nn.RMSNorm(8), (6, 5, 8)),
    *[(make_norm(kind, 8, channels_first=True), (6, 8, 5)) for kind in KINDS],
    *[(make_norm(kind, 8, channels_first=False), (6, 5, 8)) for kind in KINDS],
]


@pytest.mark.parametrize("kind", NORMS)
@pytest.mark.parametrize(("old", "shape"), REPLACED)
def test_replaced_layer_keeps_features_layout_and_mode(old, shape, kind):
    model = nn.Sequential(copy.deepcopy(old)).eval()
    assert replace_norms(model, kind) == 1
    assert not model[0].training
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    expected = formula(kind, x, channels_first=shape[1] == 8)
    torch.testing.assert_close(model.train()(x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "other",
    [nn.LocalResponseNorm(2), nn.LayerNorm((5, 8)), nn.RMSNorm((5, 8)), nn.Identity(), nn.Linear(8, 8)],
)
def test_other_layers_stay(other):
    model = nn.Sequential(other)
    assert replace_norms(model, "batch") == 0
    assert model[0] is other


def test_a_norm_that_is_the_model_stays():
    model = nn.BatchNorm1d(8)
    assert replace_norms(model, "layer") == 0


def test_dtype_and_device_come_from_the_old_layer():
    model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8, dtype=torch.float64, device="meta"))
    assert replace_norms(model, "batch") == 1
    assert model[1].weight.dtype is torch.float64
    assert model[1].running_mean.device.type == "meta"
    bare = nn.Sequential(nn.Linear(8, 8, dtype=torch.bfloat16), nn.InstanceNorm1d(8))
    replace_norms(bare, "rms")
    assert bare[1].weight.dtype is torch.bfloat16


def test_a_shared_layer_stays_shared_and_counts_once():
    shared = nn.LayerNorm(8)
    model = nn.ModuleDict({"a": shared, "b": nn.Sequential(nn.Linear(8, 8), shared)})
    assert replace_norms(model, "rms") == 1
    assert isinstance(model["a"], nn.RMSNorm)
    assert model["b"][1] is model["a"]


def test_a_norm_that_does_more_is_refused():
    fused = nn.BatchNorm2d(8)
    fused.act = nn.ReLU()
    with pytest.raises(ValueError, match=r"stem.0 is a BatchNorm2d, .* layers of its own \(act\)"):
        replace_norms(nn.ModuleDict({"stem": nn.Sequential(fused)}), "layer")


def test_a_norm_of_unknown_features_is_refused():
    with pytest.raises(ValueError, match=r"0 is a LazyBatchNorm1d that has not seen data"):
        replace_norms(nn.Sequential(nn.LazyBatchNorm1d()), "layer")


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("kind", NORMS)
def test_transformer_encoder_runs_its_new_norms(kind, norm_first, batch_first):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 4, 32, 0.0, batch_first=batch_first, norm_first=norm_first)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="enable_nested_tensor is True")  # torch's, at construction
        model = nn.TransformerEncoder(layer, 2, norm=nn.LayerNorm(16))
    assert replace_norms(model, kind) == 5
    x = torch.randn(4, 4, 16, generator=torch.Generator().manual_seed(0))
    padding = torch.zeros(4, 4, dtype=torch.bool)
    padding[:, 3] = True
    for mask in (None, padding):
        trained = model.train()(x, src_key_padding_mask=mask)
        model.eval()
        with torch.no_grad():  # where torch would take its fast path
            evaluated = model(x, src_key_padding_mask=mask)
        assert evaluated.isfinite().all()
        if kind != "batch":
            torch.testing.assert_close(evaluated, trained, rtol=1e-4, atol=1e-5)
