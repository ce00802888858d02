"""Only what is particular to Titans; the rest is tests/conformance_test.py."""

import functools

import chex
import jax
import jax.numpy as jnp
import pytest

from attnjax.core import masks
from attnjax.linear_recurrent import delta_net
from attnjax.linear_recurrent import titans as lib

KEY = jax.random.key(0)
OFF = -100.0  # the logarithm of no momentum, or of nothing kept


def linear(T, **changes):
    """Arguments with a linear memory that begins empty."""
    args = lib.SPEC.example(KEY, T)
    return args | dict(memory=jnp.zeros((2, 1, 4, 4))) | changes


def test_without_momentum_and_forgetting_a_linear_memory_is_delta_net():
    args = linear(150)
    gates = dict(log_momentum=jnp.full((2, 150, 2), OFF), log_keep=jnp.zeros((2, 150, 2)))
    o, state = lib.titans(**args | gates, return_state=True)
    arrays = (args[name] for name in ("q", "k", "v", "rate"))
    expected = delta_net.delta_net(*arrays, return_state=True)
    chex.assert_trees_all_close((o, state.weights[:, :, 0]), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("depth", [1, 3])
def test_without_steps_the_memory_stays_what_it_was_learned_to_be(depth):
    args, none = lib.SPEC.example(KEY, 9), jnp.zeros((2, 9, 2))
    memory = jax.random.normal(KEY, (2, depth, 4, 4))
    args |= dict(memory=memory, rate=none, log_keep=none)
    _, state = lib.titans(**args, return_state=True)
    expected = jnp.broadcast_to(memory[None], (2, *memory.shape))
    chex.assert_trees_all_close(state.weights, expected, rtol=1e-6)


def test_what_is_forgotten_is_cleared_at_once():
    """A gate that closes leaves of the past only its momentum; without that, nothing."""
    args = linear(20, log_momentum=jnp.full((2, 20, 2), OFF))
    args["log_keep"] = args["log_keep"].at[:, 12].set(OFF)
    later = {name: x if name == "memory" else x[:, 12:] for name, x in args.items()}
    # the memory is read for its error before it is cleared, so the first token's error differs
    later["v"] = later["v"].at[:, 0].add(-stored(args, 12))
    expected = lib.titans(**later)
    chex.assert_trees_all_close(lib.titans(**args)[:, 12:], expected, rtol=1e-4, atol=1e-5)


def stored(args, t):
    """What the memory before token t answers to the key of t."""
    before = {name: x if name == "memory" else x[:, :t] for name, x in args.items()}
    _, state = lib.titans(**before, return_state=True)
    return jnp.einsum("BNHV,BNH->BNV", state.weights[:, :, 0], args["k"][:, t])


def test_surprise_lasts_by_its_momentum():
    """One step and then none: the memory moves on by eta + eta^2 + ... of it."""
    args = linear(4, log_keep=jnp.zeros((2, 4, 2)), log_momentum=jnp.full((2, 4, 2), jnp.log(0.5)))
    args["rate"] = jnp.zeros((2, 4, 2)).at[:, 0].set(1.0)
    _, state = lib.titans(**args, return_state=True)
    first = jnp.einsum("BNH,BNV->BNHV", args["k"][:, 0], args["v"][:, 0])
    chex.assert_trees_all_close(state.weights[:, :, 0], first * 1.875, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("depth", [1, 2])
def test_large_chunks_approximate_small_ones(depth):
    """The closer, the smaller the steps: gradients of a chunk are all at its beginning."""
    args = lib.SPEC.example(KEY, 32)
    args |= dict(memory=args["memory"][:, :depth], log_keep=jnp.zeros((2, 32, 2)))

    @jax.jit
    def gap(scale):
        small = args | dict(rate=scale * args["rate"])
        exact, coarse = lib.titans(**small), lib.titans(**small, chunk=8)
        nothing = lib.titans(**small | dict(rate=jnp.zeros((2, 32, 2))))
        return jnp.linalg.norm(coarse - exact) / jnp.linalg.norm(exact - nothing)

    assert 0 < 20 * gap(1e-3) < 2 * gap(1e-1) and gap(1e-3) < 0.01


def test_a_deep_memory_learns_at_test_time_what_a_linear_one_cannot():
    """The headline: associations that are no linear map, recalled better with more depth."""
    keys = jnp.eye(4)[jnp.array([0, 0, 1, 1])] * jnp.array([1.0, -1, 1, -1])[:, None]
    values = jnp.eye(4)[jnp.zeros(4, int)] * jnp.array([1.0, 1, -1, -1])[:, None]  # of k and of -k
    k, v = (jnp.tile(x, (200, 1))[None, :, None] for x in (keys, values))

    @functools.partial(jax.jit, static_argnums=0)
    def error(depth):
        gate = jnp.zeros((1, 800, 1))
        memory = jax.random.normal(KEY, (1, depth, 4, 4)) / 2
        o = lib.titans(k, k, v, gate + 0.1, gate + jnp.log(0.5), gate, memory)
        return ((o - v) ** 2)[:, -4:].sum(-1).mean()

    assert error(2) < 0.2 and error(1) > 0.6  # each answer is read after a step towards it


def test_module_is_a_gated_memory_with_a_norm():
    module = lib.Titans(num_heads=2, head_dim=4, depth=1, chunk=2, conv_width=1)
    x = jax.random.normal(KEY, (1, 5, 8))
    params = module.init(KEY, x)
    for name in ("rate", "momentum", "forget"):
        params["params"][name]["dense"]["bias"] += jax.random.normal(KEY, (2,))
    w = params["params"]
    unit = lambda x: x / jnp.sqrt((x**2).sum(-1, keepdims=True) + 1e-6)
    gate = lambda name: jax.nn.sigmoid(
        x @ w[name]["dense"]["kernel"] + w[name]["dense"]["bias"][None, None]
    )

    def project(name):
        y = jnp.einsum("BTD,DNH->BTNH", x, w[name]["project"]["heads"]["kernel"])
        return unit(jax.nn.silu(y * w[name]["conv"]["kernel"]["table"][None]))

    logs = jnp.log(gate("momentum")), jnp.log(1 - gate("forget"))
    arrays = (*map(project, ("query", "key", "value")), gate("rate"), *logs)
    o = lib.titans(*arrays, w["memory"]["table"], chunk=2)
    swish = jax.nn.silu(jnp.einsum("BTD,DNH->BTNH", x, w["gate"]["heads"]["kernel"]))
    o = o / jnp.sqrt((o**2).mean(-1, keepdims=True) + 1e-6) * swish
    expected = jnp.einsum("BTNV,NVD->BTD", o, w["out"]["merge"]["kernel"])
    chex.assert_trees_all_close(module.apply(params, x), expected, rtol=1e-4, atol=1e-5)


def test_refuses_what_it_cannot_honour():
    with pytest.raises(NotImplementedError, match="titans can't honour Window"):
        lib.titans(**lib.SPEC.example(KEY, 8), mask=masks.Window(3))
    with pytest.raises(ValueError, match="depth=0 must be at least 1"):
        lib.Titans(num_heads=2, head_dim=4, depth=0).init(KEY, jnp.zeros((1, 2, 8)))
