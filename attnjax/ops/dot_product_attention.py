r"""Softmax attention over heads, with every option that an implementation may honour.

    x_ts   = softcap * tanh(scale * (q_t . k_s) / softcap) + bias_ts      (without softcap: no tanh)
    y_ts   = score_mod(x_ts, b, n, t, s)                where the mask lets t see s, else -inf
    lse_t  = log(sum_s exp(y_ts) + exp(sink))
    o_t    = sum_s dropout(exp(y_ts - lse_t)) v_s

Source: Vaswani et al., "Attention Is All You Need", eq. 1; grouped heads as in GQA; the sink is a
learned logit per head that takes weight and gives no value.
"""

from collections.abc import Callable
from typing import Literal, get_args

import jax
import numpy as np
from jaxtyping import Array, Float, Int

from attnjax.core.masks import Mask
from attnjax.ops import softmax_choice
from attnjax.ops.dropout import Dropout

Implementation = Literal["dense", "blocked", "pallas", "interpret"]


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
        shard_map over all axes of its mesh. On GPU that is "blocked". A table may name cuDNN, and
        tokamax on GPU and TPU, which are taken where they are installed and honour the options.

    All have forward-mode derivatives (jax.jvp, `jax.jvp` of `jax.grad`), by tiles in XLA but for
    "dense", which alone has reverse-mode derivatives of gradients.

    Returns the output in v's dtype. Raises ValueError for shapes that don't fit, and
    NotImplementedError for what the kernel can't honour, where it is lowered for its platform:
    masks with too many tiles and a score_mod that looks up by position; on GPU a score_mod of what
    Mosaic doesn't lower, other dtypes than bfloat16, float16 and float32, float32 where
    `jax.default_matmul_precision` forbids TF32, heads of more than 256 (128 in float32), and
    devices known to be other GPUs than Hopper.
    """
    _check(q, k, v, bias, implementation, positions, q_offset)
    options = dict(mask=mask, bias=bias, scale=scale, softcap=softcap)
    options |= dict(sinks=sinks, dropout=dropout, score_mod=score_mod)
    attend = softmax_choice.by_name(implementation, return_lse=return_lse)
    o, lse = _placed(attend, q, k, v, positions, q_offset, **options)
    return (o, lse) if return_lse else o


def part_of_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K V"],
    whole: tuple[Float[Array, "B T N V"], Float[Array, "B T N"]],
    *,
    mask: Mask | None = None,
    bias: Float[Array, "#B #N #T #S"] | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    dropout: Dropout | None = None,
    score_mod: Callable[..., jax.Array] | None = None,
    positions: tuple[Int[Array | np.ndarray, "T"], Int[Array | np.ndarray, "S"]],
    implementation: Implementation | None = None,
) -> tuple[Float[Array, "B T N V"], Float[Array, "B T N"]]:
    """`whole`, with the gradients that some of its keys have, for who adds them up over all keys.

    As `weights = exp(score - lse)` is known of each score alone, nothing of the forward pass is
    computed again: a ring of devices calls this in its backward pass, for the keys that it has.

    Args:
      whole: (o, lse) of all keys, without sinks. No gradient goes to it.

    The others, and what is raised, are those of `dot_product_attention`; reverse mode only.
    """
    _check(q, k, v, bias, implementation, positions, 0)
    wanted = (*q.shape[:3], v.shape[-1]), q.shape[:3]
    if (found := tuple(x.shape for x in whole)) != wanted:
        raise ValueError(f"whole of shapes {found} must have shapes {wanted}")
    options = dict(mask=mask, bias=bias, scale=scale, softcap=softcap)
    options |= dict(sinks=None, dropout=dropout, score_mod=score_mod, whole=whole)
    return _placed(
        softmax_choice.by_name(implementation, return_lse=True), q, k, v, positions, 0, **options
    )


def _placed(attend, q, k, v, positions, q_offset, *, scale, **options):
    # numpy, where they can be: then the mask's tiles are known while tracing
    t, s = positions or (q_offset + np.arange(q.shape[1]), np.arange(k.shape[1]))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return attend(q, k, v, t, s, scale=scale, **options)


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
