r"""Softmax attention of many small groups of queries, each with the few keys that it needs.

    o_t = sum_s softmax_s(q_t . k_s / sqrt(H) + bias_ts) v_s      over the s that t sees

Windows of an image and neighborhoods of a grid are such groups. One by one they are too small for
`ops.dot_product_attention` to fill a TPU, whose kernel takes tiles of 128 queries at least;
`pallas_kernels.neighborhood` packs several into one.
"""

import functools
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from attnjax.core import masks
from attnjax.ops import dot_product_attention as ops
from pallas_kernels import neighborhood as kernels
from pallas_kernels import placing, tables
from pallas_kernels.neighborhood import mosaic_gpu

Implementation = Literal["xla", "pallas", "interpret"]


def neighborhood_attention(
    q: Float[Array, "B G T N H"],
    k: Float[Array, "B G S K H"],
    v: Float[Array, "B G S K V"],
    *,
    near: kernels.Near | None = None,
    bias: Float[Array, "1 N T S"] | None = None,
    implementation: Implementation | None = None,
) -> Float[Array, "B G T N V"]:
    """Attention within each of G groups, in v's dtype.

    Args:
      near: what queries see of their group; None is everything. A query that sees nothing gives
        zeros.
      bias: added to the scores of every group; has a gradient.
      implementation: "xla" is `ops.dot_product_attention` over groups, "pallas" a kernel for TPU
        or for Hopper GPUs without forward-mode derivatives, and "interpret" runs that for TPU on
        any platform, slowly. None is what the table of the device says, or without a row the
        kernel where the call is lowered for TPU; if it runs whole on each device (`placing`) and,
        on TPU, a group fits into the kernel's memory. XLA elsewhere, which has no size to choose:
        the tiles of `ops.dot_product_attention` are those of its own rows.

    Raises ValueError for shapes and rows of the table that don't fit, and NotImplementedError for
    what the kernel that was asked for can't honour: on TPU groups that are too large, on GPU what
    `pallas_kernels.flash_attention.mosaic_gpu` refuses.
    """
    _check(q, k, v, near, bias, implementation)
    by_kernel = functools.partial(_by_kernel, scale=q.shape[-1] ** -0.5)
    args = q, k, v, near, bias
    fits = kernels.fits(*args)
    row = tables.here().find(kernels.NAME, **kernels.case_of(q, v))
    by_gpu = functools.partial(by_kernel, attend=mosaic_gpu.neighborhood_attention)
    options = dict(xla=_by_xla, tpu=by_kernel, gpu=by_gpu, fits=fits, row=row)
    return placing.run(args, implementation, **options)


def _by_kernel(
    q, k, v, near, bias, *, scale, attend=kernels.neighborhood_attention, interpret=False
):
    bias = None if bias is None else bias[0]
    return attend(q, k, v, near=near, bias=bias, scale=scale, interpret=interpret)


def _by_xla(q, k, v, near, bias):
    kernels.tiles(q, v, kernel_for=None)  # none is free
    mask = None if near is None else masks.Dense(seen(near)[:, None])
    return jax.vmap(functools.partial(ops.dot_product_attention, mask=mask, bias=bias))(q, k, v)


def seen(near: kernels.Near) -> Bool[Array, "G T S"]:
    """Which keys of its group each query sees."""
    along = lambda at, low, high: (low[..., None] <= at[:, None]) & (at[:, None] <= high[..., None])
    return functools.reduce(jnp.logical_and, [along(*axis) for axis in zip(*near, strict=True)])


def _check(q, k, v, near, bias, implementation):
    if implementation not in (None, *get_args(Implementation)):
        raise ValueError(f"{implementation=} must be one of {get_args(Implementation)}")
    (B, G, T, N, H), (_, _, S, K, V) = q.shape, v.shape
    if k.shape != (B, G, S, K, H) or v.shape != (B, G, S, K, V) or N % K:
        raise ValueError(f"shapes don't fit: q {q.shape}, k {k.shape}, v {v.shape}")
    if bias is not None and bias.shape != (1, N, T, S):
        raise ValueError(f"bias of shape {bias.shape} must have shape {(1, N, T, S)}")
    if near is not None:
        A = len(near.at)
        shapes = [x.shape for x in near]
        if shapes not in ([(A, g, S), (A, G, T), (A, G, T)] for g in (1, G)):
            raise ValueError(f"near of shapes {shapes} must be of {A=} axes, {G=}, {T=} and {S=}")
