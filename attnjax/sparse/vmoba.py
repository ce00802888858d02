r"""VMoBA: tokens of a video attend to the blocks of space and time that a head chose as a whole.

Paper: Wu et al., "VMoBA: Mixture-of-Block Attention for Video Diffusion Models",
arXiv:2506.23858, section 3 (block partition; global and threshold-based selection).

    g_ti = q_t . mean_{s in block i} k_s,    w_ti = (g_ti - min g) / (max g - min g)
    chosen: the fewest pairs (t, i) of a head, by falling w, that reach tau of the sum of w
    o_t  = attention of q_t to the keys of its chosen blocks and of its own

Blocks are cells of the grid: chunks of frames (c, None, None), columns through time
(None, c, c) or boxes (c, c, c), in turn from layer to layer. Because min, max and the sum are those
of all queries of a head, one query may choose many blocks and another none but its own, and a head
whose similarities are concentrated chooses fewer. Blocks are chosen without a gradient; attention
costs what the chosen pairs cost, the gate a product for each query and block.

Shapes: B batch, T one to three axes of a grid, N heads, K kv-heads, H head dim, V value dim,
D model dim, L blocks, C tokens of a block; below the module's border T is flat.
Unlike the paper: pairs as similar as the last one are chosen, too; tau of 1 or more takes all
blocks, also those whose w is 0; cells at a border that are not full have fewer tokens; thresholds
of a query or a block alone are left out.
"""

import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from attnjax.core import layers, registry
from attnjax.core.registry import Claim
from attnjax.ops import ragged_block_attention

Cell = tuple[int | None, ...]


def vmoba(
    q: Float[Array, "B *T N H"],
    k: Float[Array, "B *T K H"],
    v: Float[Array, "B *T K V"],
    *,
    cell: Cell = (4, 4, 4),
    tau: float = 0.25,
) -> Float[Array, "B *T N V"]:
    """Attention over a grid, each token to its own block and those that it chose.

    Args:
      cell: size of a block along each axis; None is the whole axis.
      tau: share of a head's similarity that the chosen pairs reach; 1 is full attention.

    Returns v's dtype. Raises ValueError for another number of axes, or sizes or tau out of range.
    """
    shape = q.shape[1:-2]
    if len(cell) != len(shape) or any(size is not None and size < 1 for size in cell):
        raise ValueError(f"{cell=} must have a size of at least 1, or None, per axis of {shape}")
    if tau < 0:
        raise ValueError(f"{tau=} must be at least 0")
    own, members = partition(shape, cell)
    flat = lambda x: x.reshape(x.shape[0], -1, *x.shape[-2:])
    exists = jnp.asarray(members >= 0)
    blocks = [flat(x)[:, members] for x in (k, v)]  # -1 takes what `exists` hides
    chosen = select(*jax.lax.stop_gradient((flat(q), blocks[0])), exists, own, tau)
    o = ragged_block_attention.ragged_block_attention(flat(q), *blocks, chosen, exists)
    return o.reshape(*q.shape[:-1], -1)


@functools.cache
def partition(
    shape: tuple[int, ...], cell: Cell
) -> tuple[Int[np.ndarray, "T"], Int[np.ndarray, "L C"]]:
    """The block of each token of a grid in row order, and the tokens of each block, or -1."""
    sizes = [n if size is None else size for size, n in zip(cell, shape, strict=True)]
    at = [x // size for x, size in zip(np.indices(shape), sizes, strict=True)]
    own = np.unique(np.ravel_multi_index(at, shape), return_inverse=True)[1].reshape(-1)
    members = np.full((own.max() + 1, np.bincount(own).max()), -1)
    order = np.argsort(own, stable=True)
    first = np.searchsorted(own[order], own[order])
    members[own[order], np.arange(own.size) - first] = order
    return own, members


def select(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B L C K H"],
    exists: Bool[Array, "L C"],
    own: Int[np.ndarray, "T"],
    tau: float,
) -> Bool[Array, "B N T L"]:
    """The blocks of each query and head, its own among them."""
    (B, T, N, H), (L, _, K) = q.shape, k.shape[1:4]
    if tau >= 1:
        return jnp.ones((B, N, T, L), bool)
    count = exists.sum(1)[None, :, None, None]
    means = jnp.where(exists[None, :, :, None, None], k.astype(jnp.float32), 0).sum(2) / count
    q = q.astype(jnp.float32).reshape(B, T, K, -1, H)
    gate = jnp.einsum("BTKGH,BLKH->BKGTL", q, means).reshape(B, N, T * L)
    weight = gate - gate.min(-1, keepdims=True)  # what divides it divides tau of the sum, too
    falling = -jnp.sort(-weight)  # values alone: as long as all pairs, a sort is what costs here
    needed = jnp.cumsum(falling, -1) - falling < tau * falling.sum(-1, keepdims=True)
    least = jnp.where(needed, falling, jnp.inf).min(-1, keepdims=True)
    chosen = (weight >= least).reshape(B, N, T, L)
    return chosen | (own[:, None] == np.arange(L))[None, None]


class Vmoba(nn.Module):
    """VMoBA over a grid; `layer` says whose turn it is among `cells`."""

    num_heads: int
    head_dim: int
    cells: tuple[Cell, ...] = ((4, None, None), (None, 4, 4), (4, 4, 4))
    layer: int = 0
    tau: float = 0.25
    dtype: DTypeLike | None = None
    fn: Callable[..., jax.Array] = vmoba

    @nn.compact
    def __call__(self, x: Float[Array, "B *T D"]) -> Float[Array, "B *T D"]:
        """Attention of each token to the blocks that it chose; (B T X Y D) for a video."""
        heads = functools.partial(layers.HeadProjection, self.num_heads, self.head_dim, self.dtype)
        q, k, v = (heads(name=name)(x) for name in ("query", "key", "value"))
        cell = self.cells[self.layer % len(self.cells)]
        o = layers.Attend(self.fn, name="attend")(q, k, v, cell=cell, tau=self.tau)
        return layers.OutputProjection(self.dtype, name="out")(o, x.shape[-1])


def _example(key: jax.Array, T: int) -> dict[str, jax.Array]:
    q, k, v = jax.random.normal(key, (3, 2, T, 2, 1, 4, 4))
    return dict(q=q, k=k[..., :2, :], v=v[..., :2, :])


def _oracle(q, k, v, *, cell=(4, 4, 4), tau=0.25):
    shape = q.shape[1:-2]
    at = np.indices(shape).reshape(len(shape), -1)
    sizes = np.array([n if c is None else c for c, n in zip(cell, shape, strict=True)])
    ids = at // sizes[:, None]
    same = (ids[:, :, None] == ids[:, None, :]).all(0)  # (S S)
    q, k, o = (x.reshape(x.shape[0], -1, *x.shape[-2:]) for x in (q, k, v))
    k, o = (jnp.repeat(x, q.shape[2] // x.shape[2], 2) for x in (k, o))
    first = same.argmax(1)  # the first token of a block stands for it
    heads = np.unique(first)
    share = (same / same.sum(1, keepdims=True))[heads].astype(np.float32)
    gate = jnp.einsum("BTNH,LS,BSNH->BNTL", q.astype(jnp.float32), share, k.astype(jnp.float32))
    w = (gate - gate.min((2, 3), keepdims=True)).reshape(*gate.shape[:2], -1)
    falling = -jnp.sort(-w)
    reached = jnp.cumsum(falling, -1) >= tau * w.sum(-1, keepdims=True)
    least = jnp.take_along_axis(falling, reached.argmax(-1)[..., None], -1)
    chosen = (w >= least).reshape(gate.shape) | (tau >= 1)
    seen = chosen[..., np.searchsorted(heads, first)] | same[None, None]
    x = jnp.einsum("BTNH,BSNH->BNTS", q, k) / jnp.sqrt(q.shape[-1])
    w = jax.nn.softmax(jnp.where(seen, x, -jnp.inf))
    return jnp.einsum("BNTS,BSNV->BTNV", w, o).reshape(*v.shape[:-2], *o.shape[-2:])


SPEC = registry.Mechanism(
    fn=vmoba,
    module=Vmoba,
    layout="grid",
    small=dict(num_heads=4, head_dim=8, cells=((3, None), (None, 2), (2, 3)), layer=2),
    papers=("vmoba",),
    example=_example,
    oracle=_oracle,
    variants=({}, dict(cell=(4, None, None)), dict(cell=(None, 1, 1), tau=0.6)),
    claims=frozenset({Claim.DENSE_TWIN, Claim.CONTEXT_PARALLEL}),
    context=("all_to_all",),  # a choice is among all pairs of a head
)
