"""What tests of kernels for Hopper compare them with, and what stands in for softmax attention."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import flash_attention as kernels
from pallas_kernels.flash_attention.mosaic_gpu import TILE


def by_states(q, k, v, t, s, mask, *, scale, bias=None, interpret=False):
    """`mosaic_gpu.flash_attention` over whole matrices: what a tile's state says, and its mask."""
    (T, N), (S, K) = q.shape[1:3], k.shape[1:3]
    states = jnp.repeat(jnp.repeat(jnp.asarray(mask.states), TILE, 2), TILE, 3)[:, :, :T, :S]
    seen = states != kernels.EMPTY
    if mask.visible is not None:
        whole = [x for x in (t[None, None, :, None], s[None, None, None], *mask.arrays)]
        shape = np.broadcast_shapes(seen.shape, *(x.shape for x in whole))
        visible = mask.visible(*(jnp.broadcast_to(x, shape) for x in whole))
        seen = jnp.broadcast_to(seen, shape) & (visible | (states == kernels.FULL))
    k, v = (jnp.repeat(x, N // K, 2) for x in (k, v))
    x = jnp.einsum("btnh,bsnh->bnts", q, k) * q.dtype.type(scale)
    x = jnp.where(seen, x if bias is None else x + bias, -jnp.inf)
    lse = jax.nn.logsumexp(x, -1, keepdims=True)
    p = jnp.exp(x - jnp.where(lse == -jnp.inf, 0, lse))
    return jnp.einsum("bnts,bsnv->btnv", p, v), lse[..., 0].swapaxes(1, 2)


def assert_no_worse_than_naive(kernel, naive, arrays, gradients):
    """Neither on average nor anywhere, than what rounds to the arrays' dtype at each step.

    The output, and gradients by those names. Returns what the kernel gave.
    """
    run = functools.partial(_run, gradients=gradients)

    @jax.jit
    def runs(arrays):
        wide = jax.tree.map(lambda x: x.astype(jnp.float32), arrays)
        return [run(*x) for x in ((kernel, arrays), (naive, arrays), (naive, wide))]

    found, bar, exact = jax.tree.map(np.asarray, runs(arrays))
    for name, x in exact.items():
        errors = [abs(y[name] - x) for y in (found, bar)]
        for size in (lambda e: np.sqrt((e**2).mean()), np.max):
            assert size(errors[0]) <= size(errors[1]), name
    return found


def _run(attend, arrays, gradients):
    learned = {name: arrays[name] for name in gradients}
    o, pull = jax.vjp(lambda learned: attend(**(arrays | learned)), learned)
    cotangent = jnp.cos(jnp.arange(o.size, dtype=jnp.float32)).reshape(o.shape)
    found = dict(*pull(cotangent.astype(o.dtype)), o=o)
    return jax.tree.map(lambda x: x.astype(jnp.float32), found)
