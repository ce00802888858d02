"""Softmax attention by Pallas kernels for Hopper GPUs, and what they are called with."""

import functools

import jax.numpy as jnp
import numpy as np

from attnjax.ops import blocked_arguments, flash_attention, flash_mask
from attnjax.ops import dropout as dropouts
from pallas_kernels import flash_attention as kernels
from pallas_kernels.flash_attention import mosaic_gpu

_INSTEAD = "implementation='blocked' can"


def flash_attention_gpu(
    q,
    k,
    v,
    t,
    s,
    *,
    mask,
    bias,
    scale,
    softcap,
    sinks,
    dropout,
    score_mod,
    interpret=False,
):
    """(output, lse) as `ops.dot_product_attention` defines them; no forward-mode derivative.

    t (T) and s (S) are the positions of queries and keys; interpret is as the kernel's. Raises
    NotImplementedError for score_mod and what the kernel itself can't honour.
    """
    if score_mod is not None:
        raise NotImplementedError(f"the kernel for Hopper can't honour score_mod; {_INSTEAD}")
    dtype = jnp.result_type(q, k)
    q, k = q.astype(dtype), k.astype(dtype)
    tile = mosaic_gpu.TILE
    states = flash_attention.states_of(mask, t, s, (tile, tile))
    visible, arrays = flash_mask.translate(mask, t, s, (tile, tile))
    learned, static = (q, k, v, bias, sinks), isinstance(states, np.ndarray)
    given = t, s, arrays, dropout and dropout.seed, None if static else states
    # gradients of arrays that are whole in some axes of a mesh are summed where this casts
    learned, given = blocked_arguments.varying((learned, given), like=(learned, given))
    q, k, v, bias, sinks = learned
    t, s, arrays, seed, traced = given
    mask = kernels.Mask(states if static else traced, visible, arrays)
    if dropout is not None:
        dropout = kernels.Dropout(
            dropout.rate, functools.partial(dropouts.kept, dropout.rate), seed
        )
    options = dict(bias=bias, scale=scale, softcap=softcap, sinks=sinks, dropout=dropout)
    try:
        return mosaic_gpu.flash_attention(q, k, v, t, s, mask, **options, interpret=interpret)
    except NotImplementedError as error:
        raise NotImplementedError(f"{error}; {_INSTEAD}") from None
