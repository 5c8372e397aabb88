"""The built-in data sets and models: one contract for all, and what is special to each."""

from __future__ import annotations

import inspect
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap
from torch.nn import functional

from recipefuzz.engines.lanewise import LanewiseForms
from recipefuzz.recipe import NORMS
from recipefuzz.targets.builtin.data import DATA, adding, digits, text, text_alphabet
from recipefuzz.targets.builtin.models import MODELS


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Run these tiny operations on one thread: on a busy machine two take five times as long."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


TEXT = {"length": 48, "size": 4000}
LOADS = [
    # name, arguments, train rows, test rows, shape of a row of x and of y, dtypes
    ("digits", {}, 1437, 360, (64,), (), torch.float32, torch.int64),
    ("digits", {"images": True}, 1437, 360, (1, 8, 8), (), torch.float32, torch.int64),
    ("breast_cancer", {}, 455, 114, (30,), (), torch.float32, torch.int64),
    ("wine", {}, 142, 36, (13,), (), torch.float32, torch.int64),
    ("diabetes", {}, 353, 89, (10,), (1,), torch.float32, torch.float32),
    ("text", {}, 2998, 334, (48,), (48,), torch.int64, torch.int64),
    ("text", TEXT, 73, 9, (48,), (48,), torch.int64, torch.int64),
    ("adding", {}, 3276, 820, (30, 2), (1,), torch.float32, torch.float32),
    ("adding", {"length": 5, "rows": 10}, 8, 2, (5, 2), (1,), torch.float32, torch.float32),
]


@pytest.mark.parametrize(("name", "arguments", "train", "test", "row_x", "row_y", "of_x", "of_y"), LOADS)
def test_loader_contract(name, arguments, train, test, row_x, row_y, of_x, of_y):
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()
    x_train, y_train, x_test, y_test = DATA[name](**arguments)
    assert torch.equal(torch.get_rng_state(), torch_state)
    np.testing.assert_equal(np.random.get_state(), numpy_state)
    assert (x_train.shape, y_train.shape) == ((train, *row_x), (train, *row_y))
    assert (x_test.shape, y_test.shape) == ((test, *row_x), (test, *row_y))
    assert {x_train.dtype, x_test.dtype} == {of_x}
    assert {y_train.dtype, y_test.dtype} == {of_y}
    torch.manual_seed(torch.seed() % 1000 + 1)
    for again, first in zip(DATA[name](**arguments), (x_train, y_train, x_test, y_test), strict=True):
        assert torch.equal(again, first)


@pytest.mark.parametrize("name", DATA)
def test_loaders_take_keywords_with_defaults_only(name):
    for parameter in inspect.signature(DATA[name]).parameters.values():
        assert parameter.kind is parameter.KEYWORD_ONLY
        assert parameter.default is not parameter.empty


@pytest.mark.parametrize(("name", "classes"), [("digits", 10), ("breast_cancer", 2), ("wine", 3)])
def test_every_class_is_in_both_splits(name, classes):
    _, y_train, _, y_test = DATA[name]()
    assert y_train.unique().tolist() == y_test.unique().tolist() == list(range(classes))


@pytest.mark.parametrize("name", ["digits", "breast_cancer", "wine", "diabetes"])
def test_no_row_is_lost_or_doubled(name):
    x_train, _, x_test, _ = DATA[name]()
    from sklearn import datasets

    options = {"scaled": False} if name == "diabetes" else {}
    raw = getattr(datasets, f"load_{name}")(**options).data / (16 if name == "digits" else 1)
    together = torch.cat([x_train, x_test]).numpy()
    expected = raw.astype(np.float32)
    assert np.array_equal(together[np.lexsort(together.T)], expected[np.lexsort(expected.T)])


def test_digits_are_scaled_and_images_are_the_same_pixels():
    flat, images = digits()[0], digits(images=True)[0]
    assert (flat.min(), flat.max()) == (0, 1)
    assert torch.equal(images.flatten(1), flat)


def test_text_is_next_character_prediction_without_leakage():
    x_train, y_train, x_test, y_test = text()
    assert torch.equal(x_train.flatten()[1:], y_train.flatten()[:-1])
    assert torch.equal(x_test.flatten()[1:], y_test.flatten()[:-1])
    everything = text(size=160_000, length=1)[0].flatten()  # windows of one: the text from its start
    used = len(x_train) * 48
    assert torch.equal(everything[:used], x_train.flatten())
    assert torch.equal(everything[used], y_train[-1, -1])
    held_out = "".join(text_alphabet()[i] for i in x_test.flatten())
    assert held_out[:200] not in "".join(text_alphabet()[i] for i in x_train.flatten())


def test_text_alphabet_covers_the_ids():
    x_train, _, x_test, y_test = text()
    alphabet = text_alphabet()
    assert len(set(alphabet)) == len(alphabet) < 32
    assert int(x_train.max()) + 1 == len(alphabet)  # so the vocabulary can be read off the training ids
    assert set(x_test.unique().tolist()) | set(y_test.unique().tolist()) <= set(x_train.unique().tolist())
    words = "".join(alphabet[i] for i in x_train.flatten()).split()
    assert {"the", "statement", "python"} <= set(words)


def test_adding_sums_two_marked_numbers():
    x, y, _, _ = adding(length=7)
    numbers, marks = x.unbind(-1)
    assert (marks[:, :3].sum(1) == 1).all()
    assert (marks[:, 3:].sum(1) == 1).all()
    torch.testing.assert_close((numbers * marks).sum(1, keepdim=True), y)
    assert float(y.var()) == pytest.approx(1 / 6, rel=0.05)


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("text", {"length": 0}, r"length = 0 makes 0 windows of 160000 .* a length of 1 to 15999"),
        ("text", {"length": 50, "size": 100}, r"length = 50 makes 1 windows .* expected 10 or more"),
        ("text", {"size": -1}, r"makes 0 windows of 0 characters"),
        ("adding", {"length": 1}, r"got length = 1, rows = 4096; expected 2 or more of each"),
        ("adding", {"rows": 1}, r"got length = 30, rows = 1; expected 2 or more of each"),
    ],
)
def test_impossible_sizes(name, arguments, message):
    with pytest.raises(ValueError, match=message):
        DATA[name](**arguments)


def numbers(*shape: int) -> Tensor:
    return torch.randn(32, *shape, generator=torch.Generator().manual_seed(0))


def tokens(steps: int) -> Tensor:
    return torch.randint(0, 11, (32, steps), generator=torch.Generator().manual_seed(0))


SEQUENCE_MODELS = ("rnn", "gru", "lstm", "transformer")
PER_POSITION = {"per_position": True}
INPUTS = {
    "features": (numbers(16), {}, ("mlp", "cnn", *SEQUENCE_MODELS)),
    "images": (numbers(3, 6, 6), {}, ("mlp", "cnn")),
    "vectors": (numbers(9, 2), {}, ("mlp", *SEQUENCE_MODELS)),
    "vectors, all": (numbers(9, 2), PER_POSITION, SEQUENCE_MODELS),
    "tokens": (tokens(9), {"vocab": 11}, SEQUENCE_MODELS),
    "tokens, all": (tokens(9), {"vocab": 11} | PER_POSITION, SEQUENCE_MODELS),
}
CASES = [(name, kind) for kind, (_, _, models) in INPUTS.items() for name in models]


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize(("name", "kind"), CASES)
def test_a_step_of_training_moves_every_parameter(name, kind, norm):
    x, arguments, _ = INPUTS[kind]
    torch.manual_seed(0)
    model = MODELS[name](x[:2], 5, norm=norm, **arguments)
    output = model(x)
    assert output.shape == ((32, 9, 5) if "all" in kind else (32, 5))
    target = torch.randint(0, 5, output.shape[:-1])
    loss = functional.cross_entropy(output.flatten(0, -2), target.flatten())
    assert loss.isfinite()
    before = {key: value.detach().clone() for key, value in model.named_parameters()}
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01, eps=1e-20)  # a bias before a norm has 1e-9
    loss.backward()
    optimizer.step()
    same = [key for key, value in model.named_parameters() if torch.equal(value, before[key])]
    assert not same
    assert model.eval()(x).isfinite().all()


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("name", MODELS)
def test_gradients_of_lanes_are_batched(name, norm):
    x = numbers(16)
    lanes = [MODELS[name](x, 5, norm=norm) for _ in range(3)]
    parameters, buffers = stack_module_state(lanes)

    def loss(p: dict[str, Tensor], b: dict[str, Tensor]) -> Tensor:
        return functional_call(lanes[0], (p, b), (x,)).square().mean()

    with LanewiseForms():
        losses = vmap(loss)(parameters, buffers)  # a fallback warns: an error
    gradients = dict(zip(parameters, torch.autograd.grad(losses.sum(), list(parameters.values())), strict=True))
    lanes[1](x).square().mean().backward()
    for key, parameter in lanes[1].named_parameters():
        torch.testing.assert_close(gradients[key][1], parameter.grad, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("name", MODELS)
def test_norm_changes_no_initial_weight(name, norm):
    arguments = INPUTS["features"][1]

    def weights(kind: str) -> list[Tensor]:
        torch.manual_seed(3)
        model = MODELS[name](numbers(16), 5, norm=kind, **arguments)
        return [p for p in model.parameters() if p.dim() >= 2]

    for one, other in zip(weights(norm), weights("none"), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("norm", [kind for kind in NORMS if kind != "batch"])  # it averages over time
@pytest.mark.parametrize("kind", ["tokens, all", "vectors, all"])
@pytest.mark.parametrize("name", SEQUENCE_MODELS)
def test_earlier_outputs_do_not_see_later_inputs(name, kind, norm):
    x, arguments, _ = INPUTS[kind]
    model = MODELS[name](x[:2], 5, norm=norm, depth=2, **arguments).eval()
    changed = x.clone()
    changed[:, 6:] = x[:, 6:].flip(0)
    one, other = model(x), model(changed)
    torch.testing.assert_close(one[:, :6], other[:, :6], rtol=1e-5, atol=1e-6)
    assert not torch.allclose(one[:, 6:], other[:, 6:])


@pytest.mark.parametrize("norm", [kind for kind in NORMS if kind != "batch"])
@pytest.mark.parametrize("name", SEQUENCE_MODELS)
def test_one_output_is_that_of_the_last_position(name, norm):
    x, arguments, _ = INPUTS["tokens"]
    torch.manual_seed(0)
    last = MODELS[name](x, 5, norm=norm, **arguments)
    every = MODELS[name](x, 5, norm=norm, per_position=True, **arguments)
    every.load_state_dict(last.state_dict())
    torch.testing.assert_close(every(x)[:, -1], last(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", MODELS)
def test_dropout_acts_in_training_alone(name):
    model = MODELS[name](numbers(16), 5, dropout=0.5)
    x = numbers(16)
    assert not torch.equal(model(x), model(x))
    model.eval()
    assert torch.equal(model(x), model(x))


@pytest.mark.parametrize("name", MODELS)
def test_factory_signatures(name):
    """What resolve.py reads: explicit keywords, so that a recipe's unknown axis can be refused."""
    sample, outputs, *keywords = inspect.signature(MODELS[name]).parameters.values()
    assert (sample.name, outputs.name) == ("sample_x", "outputs")
    assert {"vocab", "per_position", "norm", "width", "depth", "dropout"} <= {k.name for k in keywords}
    for keyword in keywords:
        assert keyword.kind is keyword.KEYWORD_ONLY
        assert keyword.default is not keyword.empty


def test_mlp_layers_in_order():
    model = MODELS["mlp"](numbers(64), 10, norm="layer", width=64, depth=3)
    expected = [nn.Linear, nn.LayerNorm, nn.ReLU, nn.Linear, nn.LayerNorm, nn.ReLU, nn.Linear]
    assert [type(layer) for layer in model] == expected
    assert [type(layer) for layer in MODELS["mlp"](numbers(64), 10, depth=1)] == [nn.Linear]


def test_cnn_takes_flat_images_as_images():
    torch.manual_seed(0)
    flat, image = numbers(16), numbers(16).view(-1, 1, 4, 4)
    model, other = MODELS["cnn"](flat, 5), MODELS["cnn"](image, 5)
    other.load_state_dict(dict(zip(other.state_dict(), model.state_dict().values(), strict=True)))
    torch.testing.assert_close(model(flat), other(image))


@pytest.mark.parametrize(("name", "activation"), [("mlp", "tanh"), ("mlp", "gelu"), ("rnn", "relu")])
def test_activations_differ(name, activation):
    def output(**arguments: str) -> Tensor:
        torch.manual_seed(0)
        return MODELS[name](numbers(16), 5, **arguments)(numbers(16))

    assert not torch.allclose(output(activation=activation), output())


def test_attention_is_torchs():
    model = MODELS["transformer"](tokens(9), 5, vocab=11)
    attention = model.blocks[0].attention
    x = numbers(9, 32)
    query, key, value = (t.unflatten(-1, (4, 8)).transpose(1, 2) for t in attention.qkv(x).chunk(3, -1))
    expected = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
    torch.testing.assert_close(attention(x), attention.out(expected.transpose(1, 2).flatten(2)))


def test_transformer_takes_shorter_sequences():
    assert MODELS["transformer"](tokens(9), 5, vocab=11)(tokens(4)).shape == (32, 5)


X = SimpleNamespace(flat=numbers(16), odd=numbers(17), rows=numbers(), image=numbers(3, 6, 6), ids=tokens(9))


@pytest.mark.parametrize(
    ("name", "x", "arguments", "message"),
    [
        ("mlp", X.ids, {"vocab": 11}, r"mlp: got torch.int64 inputs \(N, 9\), .* tokens use rnn, gru"),
        ("cnn", X.ids, {}, r"cnn: got torch.int64 inputs \(N, 9\), expected floating-point numbers"),
        ("mlp", X.flat, PER_POSITION, r"mlp: got a target for each position .* use rnn, gru, lstm and trans"),
        ("mlp", X.rows, {}, r"mlp: got inputs \(N\), expected \(N, features\)"),
        ("cnn", X.odd, {}, r"cnn: got inputs \(N, 17\), expected images \(N, C, H, W\), .* use mlp"),
        ("cnn", numbers(9, 2), {}, r"cnn: got inputs \(N, 9, 2\), .* for sequences rnn, gru, lstm and trans"),
        ("rnn", X.image, {}, r"rnn: got torch.float32 inputs \(N, 3, 6, 6\), .* for images use cnn"),
        ("gru", X.rows, {}, r"gru: got torch.float32 inputs \(N\), expected int64 tokens \(N, T\)"),
        ("lstm", X.ids, {}, r"lstm: got tokens, but no vocab; expected the number of token ids"),
        ("transformer", X.ids, {"vocab": 11, "width": 30}, r"width = 30 and heads = 4, .* such as 32"),
        ("transformer", X.flat, {"heads": 0}, r"transformer: got heads = 0, expected a whole number"),
        ("mlp", X.flat, {"width": 64.0}, r"mlp: got width = 64.0, expected a whole number of 1 or more"),
        ("gru", X.flat, {"depth": 0}, r"gru: got depth = 0, expected a whole number of 1 or more"),
        ("mlp", X.flat, {"activation": "swish"}, r"activation = 'swish', expected one of relu, tanh, gelu"),
        ("rnn", X.flat, {"activation": "gelu"}, r"rnn: got activation = 'gelu', expected one of tanh, relu"),
        ("lstm", X.flat, {"norm": "spectral"}, r"norm = 'spectral': expected one of none, batch"),
    ],
)
def test_wrong_inputs_are_explained(name, x, arguments, message):
    with pytest.raises(ValueError, match=message):
        MODELS[name](x, 5, **arguments)
