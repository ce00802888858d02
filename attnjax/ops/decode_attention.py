r"""Softmax attention of new queries to a paged cache: one step of decoding, or a few at once.

    y_ts  = softcap * tanh(scale * (q_t . k_s) / softcap)       (without softcap: no tanh)
    lse_t = log(sum_s exp(y_ts) + exp(sink))       over s <= t, s < length, s >= t - window
    o_t   = sum_s exp(y_ts - lse_t) v_s

The maths is in `pallas_kernels.decode_attention`; the pages are those of `core.paging`. Latent
attention in its absorbed form is this with one key head, a cache without v, and `value_dim` the
rank: a key is the latent with a rotated part behind it, and its front is the value.
"""

import jax
from jaxtyping import Array, Float, Int

from attnjax.core import paging
from pallas_kernels import decode_attention as kernels

Implementation = kernels.Implementation


def decode_attention(
    q: Float[Array, "B *T N H"],
    cache: paging.PagedCache,
    *,
    value_dim: int | None = None,
    q_offset: Int[Array, "B"] | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Float[Array, "N"] | None = None,
    window: int | None = None,
    splits: int | None = None,
    return_lse: bool = False,
    implementation: Implementation | None = None,
) -> Float[Array, "B *T N V"] | tuple[Float[Array, "B *T N V"], Float[Array, "B *T N"]]:
    """What each sequence's queries (B N H), or (B T N H), get from its own tokens.

    The cache holds the tokens of the queries too: `cache.append` comes first. Query t sees those up
    to its own position. Memory is that of a few pages of each sequence beside the cache.

    Args:
      value_dim: of a cache without v: how many features of a key, from the first, are its value.
      q_offset: position of each sequence's first query: its length before `append`, where
        sequences have been given different counts of tokens. None is the last T.
      scale: of the products; 1/sqrt(H) where None.
      softcap: bound of the scores.
      sinks: one more logit per head in the denominator.
      window: a query sees so many keys before its own position, as in `masks.Window`.
      splits: parts of each sequence that are computed at the same time and merged by their lse;
        None chooses by sizes.
      return_lse: also return lse in float32, by which outputs over other keys are merged.
      implementation: "xla", which takes as many steps as the longest sequence needs; "pallas", a
        kernel for TPU or Hopper GPUs, as many as each; "interpret" runs the one for TPU on any
        platform, slowly. None is the kernel where the call is lowered for TPU, runs whole on each
        device and fits.

    Returns the output in the dtype of values; a query that sees no key gives zeros. There is no
    gradient: a model is trained with `dot_product_attention`. Raises ValueError for shapes and
    dtypes that don't fit, NotImplementedError where a kernel is asked for that can't take them.
    """
    if q.ndim not in (3, 4):
        raise ValueError(f"q of shape {q.shape} must be (B N H) or (B T N H)")
    several = q if q.ndim == 4 else q[:, None]
    o, lse = kernels.decode_attention(
        several,
        *cache,
        scale=q.shape[-1] ** -0.5 if scale is None else scale,
        value_dim=value_dim,
        q_offset=q_offset,
        softcap=softcap,
        sinks=sinks,
        window=window,
        splits=splits,
        implementation=implementation,
    )
    o, lse = jax.tree.map(lambda x: x if q.ndim == 4 else x[:, 0], (o, lse))
    return (o, lse) if return_lse else o
