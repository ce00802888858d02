r"""Exact softmax attention tile by tile on TPU: O(T) memory forward and backward.

    x_ts  = softcap * tanh(scale * (q_t . k_s) / softcap)             (without softcap: no tanh)
    y_ts  = score_mod(x_ts + bias_ts, t, s)                     where t sees s, else -inf
    lse_t = log(sum_s exp(y_ts) + exp(sink))
    o_t   = sum_s drop(exp(y_ts - lse_t)) v_s

Source: Dao, "FlashAttention-2". `walk` says which tiles are visited in which order, `tile` is the
maths of one, `forward` and `backward` are the kernels, `sheet` lays out what has an entry for each
score, `call` runs a kernel, `vjp` ties them together.

What queries see is data: a state for each tile, of which the empty ones cost nothing and the full
ones no mask, and a function of positions and of arrays for the others, run within the kernel.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Float, Int, UInt32

from pallas_kernels.flash_attention import vjp
from pallas_kernels.flash_attention.tile import Options
from pallas_kernels.flash_attention.tile_sizes import LANES, Sizes, choices  # noqa: F401
from pallas_kernels.flash_attention.walk import EMPTY, FULL, MOST_STATES, PARTIAL, fits  # noqa: F401


class Mask(NamedTuple):
    """What queries see.

    Args:
      states: EMPTY, PARTIAL or FULL for each tile; in numpy, the grid is as short as it needs.
      visible: (t, s, *arrays) -> bool for a PARTIAL tile; None where only the end of the keys
        makes one. All have the shape of the tile, (keys, queries).
      arrays: what `visible` needs, for each query and key.
    """

    states: Int[Array | np.ndarray, "#B #N tq tk"]
    visible: Callable[..., jax.Array] | None = None
    arrays: tuple[Array, ...] = ()  # each (#B #N #T #S)


class ScoreMod(NamedTuple):
    """`function(score, t, s, factors, numbers)`, of tiles: all arguments have the shape of a tile.

    It may do arithmetic only. factors have gradients, numbers none.
    """

    function: Callable[..., jax.Array]
    factors: tuple[Float[Array, "B N 1 1"], ...] = ()
    numbers: tuple[Array, ...] = ()  # each (B N 1 1)


class Dropout(NamedTuple):
    """Drop weights for which `keep(seed, b, n, t, s)` is False, of a tile (keys, queries).

    keep is called with two scalars as seed, scalars b and n, and positions by query and key.
    """

    rate: float
    keep: Callable[..., jax.Array]
    seed: UInt32[Array, "2"]


def flash_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K V"],
    t: Int[Array | np.ndarray, "T"],
    s: Int[Array | np.ndarray, "S"],
    mask: Mask,
    *,
    sizes: Sizes,
    scale: float,
    bias: Float[Array, "#B #N #T #S"] | None = None,
    softcap: float | None = None,
    sinks: Float[Array, "N"] | None = None,
    dropout: Dropout | None = None,
    score_mod: ScoreMod | None = None,
    whole: tuple[Float[Array, "B T N V"], Float[Array, "B T N"]] | None = None,
    interpret=False,
) -> tuple[Float[Array, "B T N V"], Float[Array, "B T N"]]:
    """(o in v's dtype, lse in float32); query head n uses key head n // (N / K).

    Args:
      t, s: positions, for the mask, for dropout and for score_mod.
      mask: what queries see; a query that sees nothing gives zeros, with lse -inf.
      sizes: of tiles, for which the states of the mask are: one of `choices`.
      whole: what is returned instead, and has the gradients that these keys have of it
        (`whole.part_of`).
      interpret: run on any platform, slowly; True, or `pltpu.InterpretParams`.

    q, k, v, bias, sinks and factors of score_mod have gradients, of reverse mode; lse may be used.
    k has q's dtype.

    Raises ValueError for states that don't fit the tiles, NotImplementedError for more tiles than
    scalar memory has room for.
    """
    _check(q, k, mask.states, sizes)
    known = isinstance(mask.states, np.ndarray)
    keep, rate, seed = (dropout.keep, dropout.rate, dropout.seed) if dropout else (None, 0.0, None)
    modify, factors, numbers = score_mod or (None, (), ())
    options = Options(scale, softcap, modify, mask.visible, keep, rate, k.shape[1], sizes)
    given = vjp.Given(t, s, mask.arrays, seed, None if known else mask.states, numbers)
    static = vjp.Static(options, mask.states if known else None, interpret)
    learned = vjp.Learned(q, k, v, bias, sinks, factors)
    if whole is not None:
        return vjp.attend_to_part(static, learned, given, whole)
    return vjp.attend(static, learned, given)


def _check(q, k, states, sizes):
    tiles = -(-q.shape[1] // sizes.block_q), -(-k.shape[1] // sizes.block_k)
    if states.shape[2:] != tiles:
        raise ValueError(f"states of shape {states.shape} must be for {tiles} tiles of {sizes}")
    if q.dtype != k.dtype:
        raise ValueError(f"keys of {k.dtype} must have the dtype of queries, {q.dtype}")
    if not fits(states.shape):
        raise NotImplementedError(
            f"states of shape {states.shape} don't fit scalar memory: {MOST_STATES} would, "
            "of larger tiles or of fewer batch entries and heads"
        )
