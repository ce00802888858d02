"""Only what is particular to HGRN2; the rest is tests/conformance_test.py."""

import chex
import jax
import jax.numpy as jnp
import numpy as np

from attnjax.linear_recurrent import gated_linear_attention as gla
from attnjax.linear_recurrent import hgrn
from attnjax.linear_recurrent import hgrn2 as lib
from tests.cotangents import like

KEY = jax.random.key(0)


def draw(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def example(T):
    """As that of the record, by numpy."""
    q, gate, v = draw(3, 2, T, 4, 8)
    return dict(q=q, log_forget=np.log(0.2 + 0.8 / (1 + np.exp(-2 * gate))), v=v)


@jax.jit
def run(args):
    return lib.hgrn2(**args, return_state=True)


def test_is_gated_linear_attention_whose_keys_are_what_is_forgotten():
    @jax.jit
    def both(q, log_forget, v):
        k = 1 - jnp.exp(log_forget)
        expected = gla.gated_linear_attention(q, k, v, log_forget)
        return lib.hgrn2(q, log_forget, v), expected

    chex.assert_trees_all_close(*both(**example(70)), rtol=1e-4, atol=1e-5)


def test_without_expansion_it_is_hgrn_without_angles():
    """H = V = 1, with each entry of HGRN a head of its own; its imaginary part has no inputs."""

    @jax.jit
    def both(q, log_forget, v):
        both = jnp.concatenate([v, jnp.zeros_like(v)], -1)
        h = hgrn.hgrn(both, log_forget, jnp.zeros((4, 1)))[..., :1]
        return lib.hgrn2(q, log_forget, v), q * h

    one = {name: x[..., :1] for name, x in example(70).items()}
    chex.assert_trees_all_close(*both(**one), rtol=1e-4, atol=1e-5)


def test_rows_of_the_state_are_averages_of_values():
    """What a query gets is its product with rows that are all 1."""
    args = example(150) | dict(v=np.ones((2, 150, 4, 8), np.float32))
    args["q"] = np.abs(args["q"])  # so that nothing cancels
    o, state = jax.device_get(run(args))
    chex.assert_trees_all_close(state, np.ones_like(state), rtol=1e-4)  # all else is forgotten
    expected = np.broadcast_to(args["q"][:, -1].sum(-1, keepdims=True), (2, 4, 8))
    chex.assert_trees_all_close(o[:, -1], expected, rtol=1e-4)


def test_a_larger_state_needs_no_more_parameters():
    """The headline: the state grows with head_dim at the same N H; HGRN's has N H entries."""
    x, sizes, counts = jnp.zeros((1, 1, 16)), [], []
    for heads, head_dim in ((16, 1), (4, 4), (1, 16)):
        module = lib.HGRN2(num_heads=heads, head_dim=head_dim)
        params = jax.eval_shape(module.init, KEY, x)
        counts.append(sum(p.size for p in jax.tree.leaves(params)))
        sizes.append(module.apply({}, 1, 8, method="init_state").memory.size)
    assert counts[0] == counts[1] == counts[2] and sizes == [16, 64, 256]


def test_learned_gates_write_where_they_forget():
    """A token whose gate is open on a channel leaves there what was, and writes nothing."""
    args, start = example(6), draw(2, 4, 8, 8, seed=1)
    args["log_forget"][..., 3], args["log_forget"][:, -1, :, 5] = 0.0, -50.0
    _, state = jax.device_get(run(args | dict(initial_state=start)))
    chex.assert_trees_all_close(state[:, :, 3], start[:, :, 3], rtol=1e-5, atol=1e-6)
    chex.assert_trees_all_close(state[:, :, 5], args["v"][:, -1], rtol=1e-5, atol=1e-6)


def test_module_bounds_its_gate_by_its_layer():
    module = lib.HGRN2(num_heads=2, head_dim=4, layer=3, num_layers=4)
    x = draw(1, 5, 8)
    params = like(jax.eval_shape(module.init, KEY, x))

    @jax.jit
    def both(params, x):
        w = params["params"]
        heads = lambda name: jnp.einsum("BTD,DNH->BTNH", x, w[name]["heads"]["kernel"])
        f = 0.75 + 0.25 * jax.nn.sigmoid(heads("forget"))
        o = lib.hgrn2(jax.nn.sigmoid(heads("query")), jnp.log(f), jax.nn.silu(heads("value")))
        o = o / jnp.sqrt((o**2).mean((-2, -1), keepdims=True) + 1e-6)
        o = o * w["norm"]["scale"][None, None]
        return module.apply(params, x), jnp.einsum("BTNV,NVD->BTD", o, w["out"]["merge"]["kernel"])

    chex.assert_trees_all_close(*both(params, x), rtol=1e-4, atol=1e-5)
