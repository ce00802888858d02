r"""Softmax attention over heads, with every option that an implementation may honour.

    x_ts   = softcap * tanh(scale * (q_t . k_s) / softcap) + bias_ts      (without softcap: no tanh)
    y_ts   = score_mod(x_ts, b, n, t, s)                where the mask lets t see s, else -inf
    lse_t  = log(sum_s exp(y_ts) + exp(sink))
    o_t    = sum_s dropout(exp(y_ts - lse_t)) v_s

Source: Vaswani et al., "Attention Is All You Need", eq. 1; grouped heads as in GQA; the sink is a
learned logit per head that takes weight and gives no value.
"""

import functools
import math
from collections.abc import Callable
from typing import Literal, get_args

import jax
import numpy as np
from jaxtyping import Array, Float, Int

from attnjax.core.masks import Mask
from attnjax.ops import (
    cudnn_attention,
    flash_attention,
    flash_attention_gpu,
    flash_mask,
    lowered_for,
    score_factors,
)
from attnjax.ops.blocked_attention import blocked_attention
from attnjax.ops.dense_attention import dense_attention
from attnjax.ops.dropout import Dropout
from attnjax.ops.forward_mode import with_forward_mode
from pallas_kernels import flash_attention as kernels
from pallas_kernels import placing, tables

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
      implementation: "dense" holds the matrix, "blocked" is exact with O(T) memory and skips tiles
        that the mask empties; so is "pallas", a kernel for TPU or for Hopper GPUs, and "interpret"
        runs that for TPU on any platform, slowly. None takes what the table of the device says
        (`pallas_kernels.tables`): "dense" up to some size, and above it the kernel where the call
        is lowered for TPU and runs whole on each device: there is but one, or it is within a
        shard_map over all axes of its mesh. On GPU that is cuDNN where a table names it and it
        honours the options, and "blocked" elsewhere.

    All have forward-mode derivatives (jax.jvp, `jax.jvp` of `jax.grad`), by tiles in XLA but for
    "dense", which alone has reverse-mode derivatives of gradients.

    Returns the output in v's dtype. Raises ValueError for shapes that don't fit, and
    NotImplementedError for what the kernel can't honour, where it is lowered for its platform:
    masks with too many tiles and a score_mod that looks up by position; on GPU any score_mod, other
    dtypes than bfloat16, float16 and float32, float32 where `jax.default_matmul_precision` forbids
    TF32, heads of more than 256 (128 in float32), and devices known to be other GPUs than Hopper.
    """
    _check(q, k, v, bias, implementation, positions, q_offset)
    T, S = q.shape[1], k.shape[1]
    # numpy, where they can be: then the mask's tiles are known while tracing
    t, s = positions or (q_offset + np.arange(T), np.arange(S))
    attend = {
        None: functools.partial(_by_table, return_lse=return_lse),
        "dense": dense_attention,
        "blocked": _blocked,
        "pallas": _by_kernel,
        "interpret": functools.partial(_kernel, interpret=True),
    }[implementation]
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    options = dict(mask=mask, bias=bias, scale=scale, softcap=softcap)
    options |= dict(sinks=sinks, dropout=dropout, score_mod=score_mod)
    o, lse = attend(q, k, v, t, s, **options)
    return (o, lse) if return_lse else o


def _by_table(q, k, v, t, s, *, return_lse, **options):
    """What the table in force says; without one "dense" up to a size, and then `_by_platform`."""
    table, width = tables.here(), max(q.shape[-1], v.shape[-1])
    case = dict(dtype=q.dtype, head_dim=width, length=math.sqrt(len(t) * len(s)))
    row = table.find("dot_product_attention", **case)
    if row is None:
        small = len(t) * len(s) <= _DENSE_UP_TO
        return (dense_attention if small else _by_platform)(q, k, v, t, s, **options)
    on_cuda = functools.partial(_on_cuda, return_lse=return_lse)
    match row.implementation, table.platform:
        case "dense", _:
            attend = dense_attention
        case "blocked", "tpu":
            attend = _blocked
        case ("blocked", _) | ("pallas", "tpu"):
            attend = _by_platform
        case "pallas", "cuda":
            attend = functools.partial(on_cuda, _kernel_gpu)
        case "cudnn", "cuda":
            attend = _by_platform if return_lse else functools.partial(on_cuda, _cudnn)
        case _:
            raise ValueError(f"{row} must name an implementation that there is on {table.kind}")
    return attend(q, k, v, t, s, **options)


def _on_cuda(kernel, q, k, v, t, s, *, return_lse, **options):
    """`kernel` where it is lowered for CUDA and honours the options, and else `_by_platform`."""
    args = q, k, v, t, s
    try:
        fits = placing.whole() and jax.eval_shape(lambda: kernel(*args, **options))
    except NotImplementedError:
        fits = False
    if not fits:
        return _by_platform(*args, **options)
    wanted = lambda out: out if return_lse else (out[0], None)
    return jax.lax.platform_dependent(
        cuda=lambda: wanted(kernel(*args, **options)),
        default=lambda: wanted(_by_platform(*args, **options)),
    )


def _blocked(*args, **options):
    return with_forward_mode(blocked_attention)(*args, **options)


def _kernel(*args, plan=None, interpret=False, **options):
    kernel = functools.partial(flash_attention.flash_attention, plan=plan, interpret=interpret)
    return with_forward_mode(kernel)(*args, **options)


def _kernel_gpu(*args, **options):
    return with_forward_mode(flash_attention_gpu.flash_attention_gpu)(*args, **options)


def _cudnn(*args, **options):
    return with_forward_mode(cudnn_attention.cudnn_attention)(*args, **options)


def _by_platform(q, k, v, t, s, **options):
    """The kernel where it is lowered for TPU and can be had; blocked elsewhere."""
    small = min(len(t), len(s)) < kernels.LANES
    modified = score_factors.honoured(options["score_mod"], q.shape[0], q.shape[2])
    if small or not modified or not placing.whole():
        return _blocked(q, k, v, t, s, **options)
    plan = flash_attention.plan_of(
        q, k, v, t, s, *(options[name] for name in ("mask", "bias", "score_mod"))
    )
    if not kernels.fits(plan.states.shape) or flash_mask.grows(options["mask"], t, s, plan.sizes):
        return _blocked(q, k, v, t, s, **options)
    return jax.lax.platform_dependent(
        tpu=lambda: _kernel(q, k, v, t, s, plan=plan, **options),
        default=lambda: _blocked(q, k, v, t, s, **options),
    )


def _by_kernel(q, k, v, t, s, **options):
    """The kernel for what it is lowered for."""
    dropout = options["dropout"]
    learned = q, k, v, options["bias"], options["sinks"]
    given = t, s, options["mask"], dropout and dropout.seed
    kernels = dict(
        tpu=lambda: _kernel(q, k, v, t, s, **options),
        cuda=lambda: _kernel_gpu(q, k, v, t, s, **options),
    )
    lse = jax.ShapeDtypeStruct(q.shape[:3], "float32")
    out = jax.ShapeDtypeStruct((*q.shape[:3], v.shape[-1]), v.dtype), lse
    otherwise = "there is a kernel for TPU and for Hopper GPUs; implementation='interpret' runs "
    otherwise += "the first on any platform, and 'blocked' needs none"
    return lowered_for.one_of(kernels, learned, given, out, otherwise=otherwise)


def _check(q, k, v, bias, implementation, positions, q_offset):
    if implementation not in (None, *get_args(Implementation)):
        raise ValueError(f"{implementation=} must be one of {get_args(Implementation)}")
    N, K = q.shape[2], k.shape[2]
    if N % K:
        raise ValueError(f"{N} query heads must be a multiple of {K} key heads")
    if positions is not None and not (isinstance(q_offset, int) and q_offset == 0):
        raise ValueError("q_offset and positions must not both be given")
    if k.shape[:3] != v.shape[:3] or q.shape[0] != k.shape[0] or q.shape[-1] != k.shape[-1]:
        raise ValueError(f"shapes don't fit: q {q.shape}, k {k.shape}, v {v.shape}")
    if bias is not None:
        wanted = q.shape[0], N, q.shape[1], k.shape[1]
        if bias.ndim != 4 or any(n not in (1, m) for n, m in zip(bias.shape, wanted, strict=True)):
            raise ValueError(
                f"bias of shape {bias.shape} must have shape {wanted}, or 1 in a place"
            )
