r"""Softmax attention of a few new queries to the keys of each sequence, which lie in pages.

    y_ts  = softcap * tanh(scale * (q_t . k_s) / softcap)       (without softcap: no tanh)
    lse_t = log(sum_s exp(y_ts) + exp(sink))       over s <= t, s < length, s >= t - window
    o_t   = sum_s exp(y_ts - lse_t) v_s

A table names the pages of each sequence, so that sequences of any lengths share one pool. Keys are
taken in parts, each of which gives (o, lse) of its own, and parts are merged exactly: over `splits`
at once and within each one after the other. Source: Kwon et al., "Efficient Memory Management for
Large Language Model Serving with PagedAttention", arXiv:2309.06180; Dao et al., "Flash-Decoding for
long-context inference", for the splits.

The table of a device (`pallas_kernels.tables`) says what is taken at once: `keys` of a step, and
with "xla" the `rows` of queries, on a GPU the `blocks` of threads. Splits follow from these and the
sequences there are, as a row is for any number of them; on a TPU there are as many as cores that
share a grid.

`part` is the maths of one part, `xla`, `mosaic_tpu` and `mosaic_gpu` (Hopper) drive it.

Letters: B sequences, T queries, N query heads, K key heads, H key dim, V value dim, P pages of C
tokens, L pages of a sequence.
"""

import functools
from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from pallas_kernels import placing
from pallas_kernels.decode_attention import (
    arguments,
    device_table,
    mosaic_gpu,
    mosaic_tpu,
    part,
    xla,
)

Implementation = Literal["xla", "pallas", "interpret"]


def decode_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "P K C H"],
    v: Float[Array, "P K C V"] | None,
    table: Int[Array | np.ndarray, "B L"],
    lengths: Int[Array | np.ndarray, "B"],
    *,
    scale: float,
    value_dim: int | None = None,
    q_offset: Int[Array | np.ndarray, "B"] | None = None,
    softcap: float | None = None,
    sinks: Float[Array, "N"] | None = None,
    window: int | None = None,
    splits: int | None = None,
    implementation: Implementation | None = None,
) -> tuple[Float[Array, "B T N V"], Float[Array, "B T N"]]:
    """(o in the dtype of values, lse in float32); query head n uses key head n // (N / K).

    Args:
      k, v: the pool; page p has C tokens, those of a head one after the other. Without v the first
        `value_dim` features of a key are its value, as in latent attention.
      table: page numbers; token s of sequence b lies in page table[b, s // C]. What stands after
        the last token's page is of no matter.
      lengths: tokens of each sequence, at most L C.
      q_offset: position of each sequence's first query; lengths - T, the last tokens, where None.
      sinks: one more logit per head in the denominator.
      window: how many keys before its own position a query sees; pages before it cost nothing.
      splits: parts of each sequence that are computed at the same time; None chooses by sizes.
      implementation: "xla", "pallas", a kernel for TPU or Hopper GPUs, or "interpret", which runs
        the one for TPU on any platform, slowly. None is what the table of the device says, or
        without a row the kernel where the call is lowered for TPU; if it runs whole on each device
        (`placing`) and memory suffices. XLA elsewhere.

    A query that sees no key gives zeros, with lse -inf unless there is a sink. No gradient.
    Raises ValueError for arguments and rows of the table that don't fit, NotImplementedError where
    a kernel is asked for and lowered that hasn't the memory, or on a GPU other dtypes than bfloat16
    and float16, pages of other than 8 n tokens and heads of other than 16 n features.
    """
    if implementation not in (None, *get_args(Implementation)):
        raise ValueError(f"{implementation=} must be one of {get_args(Implementation)}")
    arguments.check(q, k, v, table, lengths, q_offset, sinks)
    arguments.check_options(k, v, value_dim, window, splits)
    (B, T, N, H), K = q.shape, k.shape[1]
    options = part.Options(scale, softcap, window, T, N // K)
    lengths = jnp.clip(lengths, 0, table.shape[1] * k.shape[2])
    starts = lengths - T if q_offset is None else jnp.asarray(q_offset)
    rows = q.reshape(B, T, K, -1, H).transpose(0, 2, 1, 3, 4).reshape(B, K, -1, H)
    arrays = rows, k, v, jnp.asarray(table), lengths, starts
    V = v.shape[-1] if value_dim is None else value_dim
    attend = _attend_with(implementation, arrays, options, V=V, splits=splits)
    o, lse = _run(attend, *arrays)
    if sinks is not None:  # a part with a logit and no value
        sinks = jnp.broadcast_to(sinks.reshape(K, 1, -1), (K, T, N // K)).reshape(1, K, -1, 1)
        sinks = jnp.broadcast_to(sinks.astype(jnp.float32), lse.shape)
        o, lse = part.merge(jnp.stack([o, jnp.zeros_like(o)]), jnp.stack([lse, sinks]))
    of_heads = lambda x: x.reshape(B, K, T, N // K, -1).swapaxes(1, 2).reshape(B, T, N, -1)
    o, lse = of_heads(o), of_heads(lse)[..., 0]
    return o.astype((k if v is None else v).dtype), lse


def _attend_with(implementation, arrays, options, **sizes):
    """What attends, called with arrays alone."""
    xla_, tpu, gpu = (
        functools.partial(form.attend, options, **sizes) for form in (xla, mosaic_tpu, mosaic_gpu)
    )
    fits = mosaic_tpu.pages_of(*arrays[:4], V=sizes["V"]) > 0
    _, k, _, table, *_ = arrays
    row = device_table.find(k, table, sizes["V"])
    return lambda *arrays: placing.run(
        arrays, implementation, xla=xla_, tpu=tpu, gpu=gpu, fits=fits, row=row
    )


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _run(attend, *arrays):
    return attend(*arrays)


@_run.defjvp
def _no_derivative(*_):
    raise NotImplementedError("decode_attention has no derivative; dot_product_attention has")
