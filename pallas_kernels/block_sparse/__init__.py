r"""Exact softmax attention to chosen blocks of keys, in time of what is chosen.

    lse_t = log(sum_s exp(q_t . k_s / sqrt(H)))         over the keys s that t sees in its blocks
    o_t   = sum_s exp(q_t . k_s / sqrt(H) - lse_t) v_s

Every query and head chooses A blocks, or every run of `query_block` queries and head does. Queries
are laid into tiles so that a tile attends to the same blocks of keys: a run of queries is a tile,
or several, of A blocks; and queries that choose for themselves are lined up by block, so that a
tile has one block and a query lies in A tiles, whose outputs are merged by their lse. Either way a
kernel is given tiles of queries and for each its blocks, and walks over these pairs alone.

`plan` chooses the sizes of tiles, `rows` lays queries into them and merges, `walk` says which pair
comes when, `tile` is the maths of one, `mosaic_tpu` are the kernels for TPU, `vjp` ties them
together; `mosaic_gpu` is the form for Hopper. Source: Lu et al., "MoBA",
arXiv:2502.13189, section 2.3 (lining up); Dao, "FlashAttention-2".

Unlike there: the query heads of a key head are lined up together, and a tile belongs to no head.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped

from pallas_kernels.block_sparse import mosaic_tpu, rows, vjp, walk
from pallas_kernels.block_sparse.plan import NAME, plan_of  # noqa: F401
from pallas_kernels.block_sparse.tile import Options

Implementation = Literal["xla", "pallas", "interpret"]


class Mask(NamedTuple):
    """What queries see of the blocks that they selected.

    Args:
      visible: (t, s, *arrays) -> bool, of positions and of what the arrays say of each query or
        key, all of the shape of a tile (keys, queries). None is everything.
      arrays: 32-bit, or bool; each has an entry for each query or for each key.
    """

    visible: Callable[..., jax.Array] | None = None
    arrays: tuple[Shaped[Array, "#B 1 #T #S"], ...] = ()

    def by_token(self, t: Int[Array, "T"]) -> tuple[Callable | None, tuple, tuple]:
        """(`visible` of numbers by query, t first, and by key; numbers by query; by key)."""
        if self.visible is None:
            return None, (), ()
        number = lambda x: x.astype(jnp.int32) if x.dtype == bool else x
        of_key = [x.shape[3] > 1 for x in self.arrays]
        by_query = [number(x)[:, 0, :, 0] for x in self.arrays if x.shape[3] == 1]
        by_key = [number(x)[:, 0, 0] for x in self.arrays if x.shape[3] > 1]
        boolean = [x.dtype == bool for x in self.arrays]

        def visible(t, s, *numbers):
            rows, columns = iter(numbers[: len(by_query)]), iter(numbers[len(by_query) :])
            found = [next(columns if x else rows) for x in of_key]
            return self.visible(
                t, s, *(x != 0 if y else x for x, y in zip(found, boolean, strict=True))
            )

        return visible, (t[None], *by_query), tuple(by_key)


def block_sparse_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K V"],
    selected: Int[Array, "B I N A"],
    t: Int[Array, "T"],
    mask: Mask,
    *,
    block: int,
    query_block: int = 1,
    interpret=False,
) -> Float[Array, "B T N V"]:
    """o in v's dtype; query head n uses key head n // (N / K).

    Args:
      selected: blocks of each run of queries, I = ceil(T / query_block), no two of one the same;
        block i holds the keys i * block to (i + 1) * block - 1.
      t: positions of queries, for the mask; keys have the positions 0 to S - 1.
      mask: what queries see of that; a query that sees nothing gives zeros.
      interpret: run on any platform, slowly; True, or `pltpu.InterpretParams`.

    q, k and v have gradients, of reverse mode. k has q's dtype. Raises NotImplementedError where
    the plan doesn't fit, and ValueError for tiles of a table that there can't be (`plan_of`).
    """
    plan = plan_of(q, k, v, selected, block=block, query_block=query_block)
    if not plan.fits:
        raise NotImplementedError(
            f"{plan.pairs} pairs of a tile and a block must be at most {walk.MOST_PAIRS}, and "
            f"{plan.keys} keys of their sort {rows.MOST_KEYS}: larger or fewer blocks have fewer"
        )
    if plan.query_block == 1:
        selected = jnp.repeat(selected, query_block, 1)[:, : q.shape[1]]
    visible, by_query, by_key = mask.by_token(t)
    given = vjp.Given(selected, by_query, by_key)
    options = Options(q.shape[-1] ** -0.5, visible, k.shape[1], block, plan.parts)
    static = vjp.Static(mosaic_tpu, options, plan.query_block, plan.size, interpret)
    return vjp.attend(static, vjp.Learned(q, k, v), given)
