"""What the kernels of softmax attention are called with, the same for TPU and for Hopper GPUs."""

import functools

import jax.numpy as jnp
import numpy as np

from attnjax.ops import blocked_arguments, flash_mask, score_factors
from attnjax.ops import dropout as dropouts
from pallas_kernels import flash_attention as kernels


def arguments(
    q,
    k,
    v,
    t,
    s,
    states,
    blocks,
    *,
    mask,
    bias,
    scale,
    softcap,
    sinks,
    dropout,
    score_mod,
    whole=None,
):
    """(arguments, options) of a kernel, for what `ops.dot_product_attention` takes.

    t (T) and s (S) are the positions of queries and keys; states say what is seen of tiles of
    `blocks` queries and keys. `whole`: see `ops.part_of_attention`. Raises NotImplementedError for
    a score_mod that looks up by position.
    """
    modify, factors, numbers = None, (), ()
    if score_mod is not None:
        modify, factors, numbers = score_factors.factored(score_mod, q.shape[0], q.shape[2])
    dtype = jnp.result_type(q, k)
    visible, arrays = flash_mask.translate(mask, t, s, blocks)
    learned = q.astype(dtype), k.astype(dtype), v, bias, sinks, factors
    static = isinstance(states, np.ndarray)
    given = t, s, arrays, dropout and dropout.seed, None if static else states, numbers
    # gradients of arrays that are whole in some axes of a mesh are summed where this casts
    learned, given = blocked_arguments.varying((learned, given), like=(learned, given, whole))
    q, k, v, bias, sinks, factors = learned
    t, s, arrays, seed, traced, numbers = given
    mask = kernels.Mask(states if static else traced, visible, arrays)
    if dropout is not None:
        keep = functools.partial(dropouts.kept, dropout.rate)
        dropout = kernels.Dropout(dropout.rate, keep, seed)
    options = dict(bias=bias, scale=scale, softcap=softcap, sinks=sinks, dropout=dropout)
    options |= dict(whole=whole)
    if modify is not None:
        options |= dict(score_mod=kernels.ScoreMod(modify, factors, numbers))
    return (q, k, v, t, s, mask), options
