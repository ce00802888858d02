"""Only what is particular to HGRN2; the rest is tests/conformance_test.py."""

import chex
import jax
import jax.numpy as jnp

from attnjax.core import edit
from attnjax.linear_recurrent import gated_linear_attention as gla
from attnjax.linear_recurrent import hgrn
from attnjax.linear_recurrent import hgrn2 as lib

KEY = jax.random.key(0)


def test_is_gated_linear_attention_whose_keys_are_what_is_forgotten():
    args = lib.SPEC.example(KEY, 70)
    k = 1 - jnp.exp(args["log_forget"])
    expected = gla.gated_linear_attention(args["q"], k, args["v"], args["log_forget"])
    chex.assert_trees_all_close(lib.hgrn2(**args), expected, rtol=1e-4, atol=1e-5)


def test_without_expansion_it_is_hgrn_without_angles():
    """H = V = 1, with each entry of HGRN a head of its own; its imaginary part has no inputs."""
    args = lib.SPEC.example(KEY, 70)
    q, log_forget, v = (x[..., :1] for x in args.values())
    both = jnp.concatenate([v, jnp.zeros_like(v)], -1)
    h = hgrn.hgrn(both, log_forget, jnp.zeros((4, 1)))[..., :1]
    chex.assert_trees_all_close(lib.hgrn2(q, log_forget, v), q * h, rtol=1e-4, atol=1e-5)


def test_rows_of_the_state_are_averages_of_values():
    args = lib.SPEC.example(KEY, 150) | dict(v=jnp.ones((2, 150, 4, 8)))
    _, state = lib.hgrn2(**args, return_state=True)
    chex.assert_trees_all_close(state, jnp.ones_like(state), rtol=1e-4)  # all else is forgotten
    w = jax.jit(
        lambda: edit.matrix(lib.hgrn2, *(args[name] for name in ("q", "log_forget", "v")))
    )()
    chex.assert_trees_all_close(w[:, :, -1].sum(-1), args["q"][:, -1].sum(-1), rtol=1e-4)


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
    args = lib.SPEC.example(KEY, 6)
    start = jax.random.normal(KEY, (2, 4, 8, 8))
    args["log_forget"] = args["log_forget"].at[..., 3].set(0.0).at[:, -1, :, 5].set(-50.0)
    _, state = lib.hgrn2(**args, initial_state=start, return_state=True)
    chex.assert_trees_all_close(state[:, :, 3], start[:, :, 3], rtol=1e-5, atol=1e-6)
    chex.assert_trees_all_close(state[:, :, 5], args["v"][:, -1], rtol=1e-5, atol=1e-6)


def test_module_bounds_its_gate_by_its_layer():
    module = lib.HGRN2(num_heads=2, head_dim=4, layer=3, num_layers=4)
    x = jax.random.normal(KEY, (1, 5, 8))
    params = module.init(KEY, x)
    w = params["params"]
    heads = lambda name: jnp.einsum("BTD,DNH->BTNH", x, w[name]["heads"]["kernel"])
    f = 0.75 + 0.25 * jax.nn.sigmoid(heads("forget"))
    o = lib.hgrn2(jax.nn.sigmoid(heads("query")), jnp.log(f), jax.nn.silu(heads("value")))
    o = o / jnp.sqrt((o**2).mean((-2, -1), keepdims=True) + 1e-6)
    expected = jnp.einsum("BTNV,NVD->BTD", o, w["out"]["merge"]["kernel"])
    chex.assert_trees_all_close(module.apply(params, x), expected, rtol=1e-4, atol=1e-5)
