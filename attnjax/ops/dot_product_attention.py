r"""Softmax attention over heads, with every option that an implementation may honour.

    x_ts   = softcap * tanh(scale * (q_t . k_s) / softcap) + bias_ts      (without softcap: no tanh)
    y_ts   = score_mod(x_ts, b, n, t, s)                where the mask lets t see s, else -inf
    lse_t  = log(sum_s exp(y_ts) + exp(sink))
    o_t    = sum_s dropout(exp(y_ts - lse_t)) v_s

Source: Vaswani et al., "Attention Is All You Need", eq. 1; grouped heads as in GQA; the sink is a
learned logit per head that takes weight and gives no value.
"""

import functools
from collections.abc import Callable
from typing import Literal, get_args

import jax
import numpy as np
from jaxtyping import Array, Float, Int

from attnjax.core.masks import Mask
from attnjax.ops import flash_attention, flash_attention_gpu, flash_mask, lowered_for
from attnjax.ops.blocked_attention import blocked_attention
from attnjax.ops.dense_attention import dense_attention
from attnjax.ops.dropout import Dropout
from pallas_kernels import flash_attention as kernels
from pallas_kernels import placing

Implementation = Literal["dense", "blocked", "pallas", "interpret"]

_DENSE_UP_TO = 256 * 256  # scores of one head; measured: docs/benchmarks/attention_cpu.json


def dot_product_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K V"],
    *,
    mask: Mask | None = None,
    bias: Float[Array, "#B #N #T #S"] | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Float[Array, "N"] | None = None,
    dropout: Dropout | None = None,
    score_mod: Callable[..., jax.Array] | None = None,
    q_offset: int | Int[Array, ""] = 0,
    positions: tuple[Int[Array | np.ndarray, "T"], Int[Array | np.ndarray, "S"]] | None = None,
    return_lse: bool = False,
    implementation: Implementation | None = None,
) -> Float[Array, "B T N V"] | tuple[Float[Array, "B T N V"], Float[Array, "B T N"]]:
    """Softmax attention; query head n uses key head n // (N / K).

    Args:
      mask: what a query may see, by position (`core.masks`); None is everything. A query that may
        see nothing gives zeros, with zero gradients and lse -inf.
      bias: added to the scores; has a gradient.
      scale: of the products; 1/sqrt(H) where None.
      softcap: bound of the scores, applied before bias and score_mod.
      sinks: one more logit per head in the denominator; has a gradient.
      dropout: of the weights, decided by position.
      score_mod: (score, b, n, t, s) -> score, of scalars: a float32 score, batch and head index,
        query and key position. Arrays that it captures have gradients.
      q_offset: position of the first query; keys begin at 0.
      positions: those of all queries and keys, where they are pieces of a longer sequence.
      return_lse: also return lse in float32.
      implementation: "dense" holds the matrix (and alone has forward-mode derivatives), "blocked"
        is exact with O(T) memory and skips tiles that the mask empties; so is "pallas", a kernel
        for TPU or for Hopper GPUs, and "interpret" runs that for TPU on any platform, slowly. None
        chooses by size, and above the sizes of "dense" the kernel where the call is lowered for TPU
        and runs whole on each device: there is but one, or it is within a shard_map over all axes
        of its mesh. On GPU it is "blocked" until someone has measured that the kernel is faster.

    Returns the output in v's dtype. Raises ValueError for shapes that don't fit, and
    NotImplementedError for what the kernel can't honour, where it is lowered for its platform:
    score_mod and masks with too many tiles; on GPU bias, dropout, other dtypes than bfloat16 and
    float16, and heads of more than 256 too.
    """
    _check(q, k, v, implementation, positions, q_offset)
    T, S = q.shape[1], k.shape[1]
    # numpy, where they can be: then the mask's tiles are known while tracing
    t, s = positions or (q_offset + np.arange(T), np.arange(S))
    if implementation is None and T * S <= _DENSE_UP_TO:
        implementation = "dense"
    attend = {
        None: _by_platform,
        "dense": dense_attention,
        "blocked": blocked_attention,
        "pallas": _by_kernel,
        "interpret": functools.partial(flash_attention.flash_attention, interpret=True),
    }[implementation]
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    options = dict(mask=mask, bias=bias, scale=scale, softcap=softcap)
    options |= dict(sinks=sinks, dropout=dropout, score_mod=score_mod)
    o, lse = attend(q, k, v, t, s, **options)
    return (o, lse) if return_lse else o


def _by_platform(q, k, v, t, s, **options):
    """The kernel where it is lowered for TPU and can be had; blocked elsewhere."""
    small = min(len(t), len(s)) < kernels.LANES
    if small or options["score_mod"] is not None or not placing.whole():
        return blocked_attention(q, k, v, t, s, **options)
    plan = flash_attention.plan_of(q, k, v, t, s, options["mask"], options["bias"])
    if not kernels.fits(plan.states.shape) or flash_mask.grows(options["mask"], t, s, plan.sizes):
        return blocked_attention(q, k, v, t, s, **options)
    return jax.lax.platform_dependent(
        tpu=lambda: flash_attention.flash_attention(q, k, v, t, s, plan=plan, **options),
        default=lambda: blocked_attention(q, k, v, t, s, **options),
    )


def _by_kernel(q, k, v, t, s, **options):
    """The kernel for what it is lowered for."""
    dropout = options["dropout"]
    learned = q, k, v, options["bias"], options["sinks"]
    given = t, s, options["mask"], dropout and dropout.seed
    kernels = dict(
        tpu=lambda: flash_attention.flash_attention(q, k, v, t, s, **options),
        cuda=lambda: flash_attention_gpu.flash_attention_gpu(q, k, v, t, s, **options),
    )
    lse = jax.ShapeDtypeStruct(q.shape[:3], "float32")
    out = jax.ShapeDtypeStruct((*q.shape[:3], v.shape[-1]), v.dtype), lse
    otherwise = "there is a kernel for TPU and for Hopper GPUs; implementation='interpret' runs "
    otherwise += "the first on any platform, and 'blocked' needs none"
    return lowered_for.one_of(kernels, learned, given, out, otherwise=otherwise)


def _check(q, k, v, implementation, positions, q_offset):
    if implementation not in (None, *get_args(Implementation)):
        raise ValueError(f"{implementation=} must be one of {get_args(Implementation)}")
    N, K = q.shape[2], k.shape[2]
    if N % K:
        raise ValueError(f"{N} query heads must be a multiple of {K} key heads")
    if positions is not None and not (isinstance(q_offset, int) and q_offset == 0):
        raise ValueError("q_offset and positions must not both be given")
    if k.shape[:3] != v.shape[:3] or q.shape[0] != k.shape[0] or q.shape[-1] != k.shape[-1]:
        raise ValueError(f"shapes don't fit: q {q.shape}, k {k.shape}, v {v.shape}")
