"""Only what is particular to Titans; the rest is tests/conformance_test.py."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnjax.core import masks
from attnjax.linear_recurrent import delta_net
from attnjax.linear_recurrent import titans as lib
from tests.cotangents import like

KEY = jax.random.key(0)
OFF = -100.0  # the logarithm of no momentum, or of nothing kept


def draw(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def example(T, depth=2):
    """As that of the record, of two heads, by numpy."""
    unit = draw(3, 2, T, 2, 4)
    q, k, v = unit / np.linalg.norm(unit, axis=-1, keepdims=True)
    gates = np.random.default_rng(1).uniform(0.1, 0.9, (3, 2, T, 2)).astype(np.float32)
    logs = dict(log_momentum=np.log(gates[1]), log_keep=np.log(gates[2]))
    return dict(q=q, k=k, v=v, rate=gates[0], memory=draw(2, depth, 4, 4) / 2) | logs


def linear(T, **changes):
    """Arguments with a linear memory that begins empty; a number is that of all tokens."""
    args, zero = example(T, depth=1), np.zeros((2, T, 2), np.float32)
    full = {name: zero + np.float32(x) for name, x in changes.items()}
    return args | dict(memory=0 * args["memory"]) | full


@jax.jit
def run(args):
    return lib.titans(**args, return_state=True)


def test_without_momentum_and_forgetting_a_linear_memory_is_delta_net():
    @jax.jit
    def both(args):
        o, state = lib.titans(**args, return_state=True)
        arrays = (args[name] for name in ("q", "k", "v", "rate"))
        return (o, state.weights[:, :, 0]), delta_net.delta_net(*arrays, return_state=True)

    actual, expected = both(linear(150, log_momentum=OFF, log_keep=0.0))
    chex.assert_trees_all_close(actual, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("depth", [1, 3])
def test_without_steps_the_memory_stays_what_it_was_learned_to_be(depth):
    args, none = example(9, depth), np.zeros((2, 9, 2), np.float32)
    _, state = run(args | dict(rate=none, log_keep=none))
    expected = np.broadcast_to(args["memory"][None], (2, *args["memory"].shape))
    chex.assert_trees_all_close(state.weights, expected, rtol=1e-6)


def test_what_is_forgotten_is_cleared_at_once():
    """A gate that closes leaves of the past only its momentum; without that, nothing."""
    args = linear(20, log_momentum=OFF)
    args["log_keep"][:, 12] = OFF
    cut = lambda part: {n: x if n == "memory" else x[:, part] for n, x in args.items()}

    @jax.jit
    def both(args, before, later):
        # the memory is read for its error before it is cleared, so the first token's error differs
        _, state = lib.titans(**before, return_state=True)
        stored = jnp.einsum("BNHV,BNH->BNV", state.weights[:, :, 0], later["k"][:, 0])
        later = later | dict(v=later["v"].at[:, 0].add(-stored))
        return lib.titans(**args)[:, 12:], lib.titans(**later)

    actual, expected = both(args, cut(slice(0, 12)), cut(slice(12, 20)))
    chex.assert_trees_all_close(actual, expected, rtol=1e-4, atol=1e-5)


def test_surprise_lasts_by_its_momentum():
    """One step and then none: the memory moves on by eta + eta^2 + ... of it."""
    args = linear(9, log_keep=0.0, log_momentum=np.log(0.5), rate=0.0)  # of the size used above
    args["rate"][:, 0], args["log_momentum"][:, 4:] = 1.0, OFF
    _, state = run(args)
    first = np.einsum("BNH,BNV->BNHV", args["k"][:, 0], args["v"][:, 0])
    chex.assert_trees_all_close(state.weights[:, :, 0], first * 1.875, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("depth", [1, 2])
def test_large_chunks_approximate_small_ones(depth):
    """The closer, the smaller the steps: gradients of a chunk are all at its beginning."""
    args = example(32, depth) | dict(log_keep=np.zeros((2, 32, 2), np.float32))

    @jax.jit
    def outputs(scale, args):
        small = args | dict(rate=scale * args["rate"])
        return lib.titans(**small), lib.titans(**small, chunk=8)

    def gap(scale):
        (exact, coarse), (nothing, _) = jax.device_get([outputs(s, args) for s in (scale, 0.0)])
        return np.linalg.norm(coarse - exact) / np.linalg.norm(exact - nothing)

    assert 0 < 20 * gap(1e-3) < 2 * gap(1e-1) and gap(1e-3) < 0.01


def test_a_deep_memory_learns_at_test_time_what_a_linear_one_cannot():
    """The headline: associations that are no linear map, recalled better with more depth."""
    signs = np.array([[1, -1, 1, -1]]).T
    keys = np.eye(4, dtype=np.float32)[[0, 0, 1, 1]] * signs
    values = np.eye(4, dtype=np.float32)[[0, 0, 0, 0]] * np.abs(signs) * [[1], [1], [-1], [-1]]
    k, v = (np.tile(x.astype(np.float32), (200, 1))[None, :, None] for x in (keys, values))

    @jax.jit
    def recall(memory, k, v):
        gate = jnp.zeros((1, 800, 1))
        return lib.titans(k, k, v, gate + 0.1, gate + jnp.log(0.5), gate, memory)

    error = lambda depth: (
        ((jax.device_get(recall(draw(1, depth, 4, 4) / 2, k, v)) - v) ** 2)[:, -4:].sum(-1).mean()
    )
    assert error(2) < 0.2 and error(1) > 0.6  # each answer is read after a step towards it


def test_module_is_a_gated_memory_with_a_norm():
    module = lib.Titans(num_heads=2, head_dim=4, depth=1, chunk=2, conv_width=1)
    x = draw(1, 5, 8)
    params = like(jax.eval_shape(module.init, KEY, x))

    @jax.jit
    def both(params, x):
        w = params["params"]
        unit = lambda x: x / jnp.sqrt((x**2).sum(-1, keepdims=True) + 1e-6)
        gate = lambda name: x @ w[name]["dense"]["kernel"] + w[name]["dense"]["bias"][None, None]

        def project(name):
            y = jnp.einsum("BTD,DNH->BTNH", x, w[name]["project"]["heads"]["kernel"])
            return unit(jax.nn.silu(y * w[name]["conv"]["kernel"]["table"][None]))

        logs = jax.nn.log_sigmoid(gate("momentum")), jax.nn.log_sigmoid(-gate("forget"))
        arrays = *map(project, ("query", "key", "value")), jax.nn.sigmoid(gate("rate")), *logs
        o = lib.titans(*arrays, w["memory"]["table"], chunk=2)
        swish = jax.nn.silu(jnp.einsum("BTD,DNH->BTNH", x, w["gate"]["heads"]["kernel"]))
        o = o / jnp.sqrt((o**2).mean(-1, keepdims=True) + 1e-6) * swish
        o = o * w["norm"]["scale"][None, None, None]
        return module.apply(params, x), jnp.einsum("BTNV,NVD->BTD", o, w["out"]["merge"]["kernel"])

    chex.assert_trees_all_close(*both(params, x), rtol=1e-4, atol=1e-5)


def test_refuses_what_it_cannot_honour():
    run = lambda args: lib.titans(**args, mask=masks.Window(3))
    with pytest.raises(NotImplementedError, match="titans can't honour Window"):
        jax.eval_shape(run, example(8))
    init = lib.Titans(num_heads=2, head_dim=4, depth=0).init
    with pytest.raises(ValueError, match="depth=0 must be at least 1"):
        jax.eval_shape(init, KEY, np.zeros((1, 2, 8), np.float32))
