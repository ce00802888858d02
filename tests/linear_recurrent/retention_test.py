"""Only what is particular to retention; the rest is tests/conformance_test.py."""

import chex
import jax
import jax.numpy as jnp
import numpy as np

from attnjax.core import edit, positions
from attnjax.linear_recurrent import retention as lib
from tests.cotangents import like

KEY = jax.random.key(0)


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def test_is_a_recurrence_of_complex_numbers():
    """Eqs. 1 to 4: a state that a factor gamma e^(-i theta) turns and fades, and its real part."""
    base = 100.0

    @jax.jit
    def both(q, k, v):
        log_decay = lib.log_decays(2)
        theta = jnp.broadcast_to(base ** -(jnp.arange(4) / 4)[None], (2, 4))
        turn = jnp.exp(jax.lax.complex(jnp.broadcast_to(log_decay[:, None], (2, 4)), -theta))
        pairs = lambda x: jax.lax.complex(*jnp.split(x, 2, -1))

        def step(state, token):
            q, k, v = token
            state = turn[None, ..., None] * state + k[..., None] * v[:, :, None]
            return state, jnp.einsum("BNH,BNHV->BNV", q.conj(), state).real / 8**0.5

        tokens = [x.swapaxes(0, 1) for x in (pairs(q), pairs(k), v)]
        _, o = jax.lax.scan(step, jnp.zeros((1, 2, 4, 8), jnp.complex64), tokens)
        rotate = lambda x: positions.rotary(x, jnp.arange(10), base=base)
        return lib.retention(rotate(q), rotate(k), v, log_decay), o.swapaxes(0, 1)

    chex.assert_trees_all_close(*both(*normal(3, 1, 10, 2, 8)), rtol=1e-4, atol=1e-5)


@jax.jit
def matrix(args):
    return edit.matrix(lib.retention, **args)


def test_without_decay_all_of_the_past_counts_alike():
    q, k, v = normal(3, 2, 180, 4, 16)
    scores = np.einsum("BTNH,BSNH->BNTS", q, k) / 4 * np.tri(180, dtype=np.float32)
    w = jax.device_get(matrix(dict(q=q, k=k, v=v, log_decay=np.zeros(4, np.float32))))
    chex.assert_trees_all_close(w, scores, rtol=1e-5, atol=1e-4)


def test_heads_remember_for_longer_and_longer():
    """Multi-scale: half of a weight is gone after 22, 44, 89, 177 tokens."""
    log_decay = jax.device_get(jax.jit(lambda: lib.log_decays(4))())
    gamma = np.float32([31 / 32, 63 / 64, 127 / 128, 255 / 256])
    chex.assert_trees_all_close(np.exp(log_decay), gamma, rtol=1e-6)
    q = np.ones((2, 180, 4, 16), np.float32)
    w = jax.device_get(matrix(dict(q=q, k=q, v=q, log_decay=log_decay)))[0] / 4  # a product is 4
    for head, half in enumerate((22, 44, 89, 177)):
        assert w[head, 179, 179 - half + 1] > 0.5 > w[head, 179, 179 - half - 1]


def test_module_is_gated_and_normed_by_head_and_depends_on_distances_alone():
    """A token before all others, whose values are seen to be zero, moves nothing."""
    module = lib.Retention(num_heads=2, head_dim=4, value_dim=6)
    x = normal(1, 5, 8)
    params = like(jax.eval_shape(module.init, KEY, x))
    params = jax.tree.map(lambda p: p / 3, jax.device_get(params))

    @jax.jit
    def run(params, x):
        w = {name: jax.tree.leaves(leaf)[0] for name, leaf in params["params"].items()}
        names = "query", "key", "value", "gate"
        q, k, v, gate = (jnp.einsum("BTD,DNH->BTNH", x, w[name]) for name in names)
        rotate = lambda x: positions.rotary(x, jnp.arange(5))
        o = lib.retention(rotate(q), rotate(k), v, lib.log_decays(2))
        centred = o - o.mean(-1, keepdims=True)
        o = centred / jnp.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6)
        expected = jnp.einsum("BTNV,NVD->BTD", gate * jax.nn.sigmoid(gate) * o, w["out"])
        later = module.apply(params, jnp.pad(x, ((0, 0), (40, 0), (0, 0))))[:, 40:]
        return (module.apply(params, x), later), (expected, expected)

    chex.assert_trees_all_close(*run(params, x), rtol=1e-4, atol=1e-5)


def test_what_decoding_remembers_does_not_grow_with_the_past():
    """The headline, beside a cache of keys and values."""
    module = lib.Retention(num_heads=2, head_dim=4)
    start = lambda length: module.apply({}, 1, length, method="init_state")
    short, long = (jax.eval_shape(lambda n=n: start(n)) for n in (8, 8192))
    chex.assert_trees_all_equal_shapes(short, long)
