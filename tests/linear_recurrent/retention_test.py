"""Only what is particular to retention; the rest is tests/conformance_test.py."""

import chex
import jax
import jax.numpy as jnp

from attnjax.core import edit, positions
from attnjax.linear_recurrent import retention as lib

KEY = jax.random.key(0)


def test_is_a_recurrence_of_complex_numbers():
    """Eqs. 1 to 4: a state that a factor gamma e^(-i theta) turns and fades, and its real part."""
    q, k, v = jax.random.normal(KEY, (3, 1, 10, 2, 8))
    log_decay, base = lib.log_decays(2), 100.0
    theta = jnp.broadcast_to(base ** -(jnp.arange(4) / 4)[None], (2, 4))
    turn = jnp.exp(jax.lax.complex(jnp.broadcast_to(log_decay[:, None], (2, 4)), -theta))
    pairs = lambda x: jax.lax.complex(*jnp.split(x, 2, -1))

    @jax.jit
    def recurrent():
        state, os = jnp.zeros((1, 2, 4, 8), jnp.complex64), []
        for t in range(10):
            state = turn[None, ..., None] * state + pairs(k[:, t])[..., None] * v[:, t, :, None]
            os.append(jnp.einsum("BNH,BNHV->BNV", pairs(q[:, t]).conj(), state).real / 8**0.5)
        return jnp.stack(os, 1)

    rotate = lambda x: positions.rotary(x, jnp.arange(10), base=base)
    actual = lib.retention(rotate(q), rotate(k), v, log_decay)
    chex.assert_trees_all_close(actual, recurrent(), rtol=1e-4, atol=1e-5)


def test_without_decay_all_of_the_past_counts_alike():
    args = lib.SPEC.example(KEY, 20) | dict(log_decay=jnp.zeros(4))
    scores = jnp.einsum("BTNH,BSNH->BNTS", args["q"], args["k"]) / 4 * jnp.tri(20)[None, None]
    expected = jnp.einsum("BNTS,BSNV->BTNV", scores, args["v"])
    chex.assert_trees_all_close(lib.retention(**args), expected, rtol=1e-5, atol=1e-4)


def test_heads_remember_for_longer_and_longer():
    """Multi-scale: half of a weight is gone after 22, 44, 89, 177 tokens."""
    gamma = jnp.exp(lib.log_decays(4))
    chex.assert_trees_all_close(gamma, jnp.array([31 / 32, 63 / 64, 127 / 128, 255 / 256]))
    args = lib.SPEC.example(KEY, 180) | dict(log_decay=lib.log_decays(4))
    same = args | dict(q=jnp.ones_like(args["q"]), k=jnp.ones_like(args["k"]))
    w = jax.jit(lambda: edit.matrix(lib.retention, **same))()[0] / 4  # a product of ones is 4
    for head, half in enumerate((22, 44, 89, 177)):
        assert w[head, 179, 179 - half + 1] > 0.5 > w[head, 179, 179 - half - 1]


def test_module_depends_on_distances_alone():
    """A token before all others, whose values are seen to be zero, moves nothing."""
    module = lib.Retention(num_heads=2, head_dim=4)
    x = jax.random.normal(KEY, (1, 6, 8))
    params = module.init(KEY, x)
    y = module.apply(params, x)
    later = module.apply(params, jnp.pad(x, ((0, 0), (40, 0), (0, 0))))[:, 40:]
    chex.assert_trees_all_close(later, y, rtol=1e-4, atol=1e-5)


def test_module_is_gated_and_normed_by_head():
    module = lib.Retention(num_heads=2, head_dim=4, value_dim=6)
    x = jax.random.normal(KEY, (1, 5, 8))
    params = module.init(KEY, x)
    w = {name: jax.tree.leaves(leaf)[0] for name, leaf in params["params"].items()}
    q, k, v, gate = (
        jnp.einsum("BTD,DNH->BTNH", x, w[name]) for name in ("query", "key", "value", "gate")
    )
    rotate = lambda x: positions.rotary(x, jnp.arange(5))
    o = lib.retention(rotate(q), rotate(k), v, lib.log_decays(2))
    centred = o - o.mean(-1, keepdims=True)
    o = centred / jnp.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6)
    expected = jnp.einsum("BTNV,NVD->BTD", gate * jax.nn.sigmoid(gate) * o, w["out"])
    chex.assert_trees_all_close(module.apply(params, x), expected, rtol=1e-4, atol=1e-5)


def test_what_decoding_remembers_does_not_grow_with_the_past():
    """The headline, beside a cache of keys and values."""
    module = lib.Retention(num_heads=2, head_dim=4)
    start = lambda length: module.apply({}, 1, length, method="init_state")
    short, long = (jax.eval_shape(lambda n=n: start(n)) for n in (8, 8192))
    chex.assert_trees_all_equal_shapes(short, long)
