"""What tests of this folder share: inputs by numpy, and programs that are compiled once."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np

from attnjax.core import masks
from attnjax.ops import dot_product_attention as ops
from tests import cotangents
from tests.initial import initial

KEY = jax.random.key(0)


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def one_hot(at, size):
    return np.eye(size, dtype=np.float32)[np.asarray(at)]


def example(T, N=4, K=2, H=8):
    """Queries of N heads, keys and values of K."""
    q, k, v = normal(3, 2, T, N, H)
    return q, k[:, :, :K], v[:, :, :K]


@functools.lru_cache(maxsize=64)
def program(fn, **options):
    """`fn` with options, compiled once for all inputs of the same shapes; it gives numpy arrays."""
    run = jax.jit(functools.partial(fn, **options))
    return lambda *args: jax.device_get(run(*args))


@functools.partial(program, mask=masks.Causal())
def causal(*args, **options):
    return ops.dot_product_attention(*args, **options)


def weights(q, k, is_causal=True):
    """Those of softmax attention (B N T S), in plain numpy."""
    x = np.einsum("BTNH,BSNH->BNTS", q, np.repeat(k, q.shape[2] // k.shape[2], 2))
    x = x * q.shape[-1] ** -0.5
    if is_causal:
        x = np.where(np.tri(*x.shape[2:], dtype=bool), x, -np.inf)
    w = np.exp(x - x.max(-1, keepdims=True))
    return w / w.sum(-1, keepdims=True)


def tokens(selected, rows, columns=None):
    """The pairs of tokens (... T S) in pairs of blocks (... I L)."""
    return selected.repeat(rows, -2).repeat(columns or rows, -1)


def error(q, k, v, seen, is_causal=True):
    """Of attention to what is `seen` alone (B N T S), the mean."""
    w = weights(q, k, is_causal)
    few = np.where(seen, w, 0)
    lost = w - few / few.sum(-1, keepdims=True)
    v = np.repeat(v, q.shape[2] // v.shape[2], 2)
    return np.abs(np.einsum("BNTS,BSNV->BTNV", lost, v)).mean()


def assert_same(fn, other, args):
    """Two functions agree in their outputs and gradients; both in one program."""

    def both(fn, args):
        out, pull = jax.vjp(fn, *args)
        return out, pull(cotangents.like(out))

    actual, expected = program(lambda *args: (both(fn, args), both(other, args)))(*args)
    chex.assert_trees_all_close(actual, expected, rtol=1e-5, atol=1e-5)


def assert_streams(module, x, cuts, length, change=lambda params: params):
    """Pieces that end at `cuts`, and the rest in pieces of 4, give what all at once gives.

    The last state is returned, for changed parameters as well where `change` gives others.
    """
    params = change(initial(module.init, KEY, x))
    run = program(_streamed, module=module, cuts=cuts, length=length)
    streamed, y, state = run(params, x)
    chex.assert_trees_all_close(streamed, y, rtol=1e-5, atol=1e-5)
    return state


def _streamed(params, x, *, module, cuts, length):
    extend = lambda *args: module.apply(params, *args, method="extend")
    state, ys = module.apply(params, len(x), length, method="init_state"), []
    *pieces, rest = jnp.split(x, cuts, 1)
    for piece in pieces:
        state, y = extend(state, piece)
        ys.append(y)
    rest = rest.reshape(len(x), -1, 4, x.shape[-1]).swapaxes(0, 1)
    state, y = jax.lax.scan(extend, state, rest)
    ys.append(y.swapaxes(0, 1).reshape(len(x), -1, x.shape[-1]))
    return jnp.concatenate(ys, 1), module.apply(params, x), state


def assert_goes_on_in_full(module):
    """A prompt, and more after it, by a cache gives full attention."""
    dense = module.clone(fn=lambda *x, mask, **_: ops.dot_product_attention(*x, mask=mask))
    x = normal(2, 20, 16)
    params = initial(dense.init, KEY, x)

    @jax.jit
    def run(params, x):
        extend = lambda *args: module.apply(params, *args, method="extend")
        state, a = extend(module.apply(params, 2, 24, method="init_state"), x[:, :15])
        _, b = extend(state, x[:, 15:])
        full = dense.apply(params, x, mask=masks.Causal())
        return jnp.concatenate([a, b], 1), full, module.apply(params, x)

    steps, full, sparse = jax.device_get(run(params, x))
    chex.assert_trees_all_close(steps, full, rtol=1e-5, atol=1e-5)
    assert np.abs(sparse - full).max() > 1e-2


def assert_learns_from_its_own_loss_alone(module, x, weight, tables):
    """`tables` learn from a loss with this `weight` and from nothing else, and others not from it.

    With the weights 1 and 4, gradients of the tables would differ by another factor than 4 if
    they had a part of any other origin.
    """
    params = initial(module.init, KEY, x)
    loss = lambda params, x, w: (module.clone(**{weight: w}).apply(params, x) ** 2).sum()
    run = jax.jit(lambda *args: [jax.grad(loss)(*args, w) for w in (1.0, 4.0)])
    once, more = (g["params"] for g in jax.device_get(run(params, x)))
    for name in tables:
        a, b = (g.pop(name)["table"] for g in (once, more))
        assert a.any()
        chex.assert_trees_all_close(b, 4 * a, rtol=1e-6)
    chex.assert_trees_all_equal(once, more)
