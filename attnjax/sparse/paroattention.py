r"""PAROAttention: each head reads a video in the order of axes that makes its attention block-wise.

Paper: Zhao et al., "PAROAttention: Pattern-Aware ReOrdering for Efficient Sparse and Quantized
Attention in Visual Generation Models", arXiv:2506.16054, section 3.

    tokens of head n are sorted by order_n, one of the permutations of the grid's axes
    o = Q(P) Q(v),  P = softmax(Q(q) Q(k)^T / sqrt(H))   over the blocks selected for head n
    Q(x) = scale round(x / scale),  a scale for each block of tokens, or of P

A head that attends along an axis has a diagonal pattern while this axis is slow, and a block-wise
one where it is the fastest. Orders and blocks are chosen once, from weights of calibration:

    order_n = argmax alpha E / sum E - (1 - alpha) I / sum I       sums over orders
    E = share of blocks with next to no weight,   I = mean over blocks of max / mean weight
    blocks  = the share `density` of a head's blocks with the largest sums of weights

Permuting costs a gather of tokens and changes nothing else; blocks not selected aren't computed.

Shapes: B batch, T one to three axes of a grid, N heads, H head dim, V value dim, L blocks,
A blocks of a row, C tokens of a block.
Unlike the paper: no text tokens (they belong outside of the grid, seen by all); how E and I are
weighed there is unknown to us; numbers are rounded as integers would be and multiplied as floats,
so this shows the errors and not the speed of small integers; gradients pass straight through Q.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from attnjax.core import masks, registry
from attnjax.ops import block_selection
from attnjax.ops import dot_product_attention as ops

Order = tuple[int, ...]
"""Axes of a grid, the slowest first."""


def paroattention(
    q: Float[Array, "B *T N H"],
    k: Float[Array, "B *T N H"],
    v: Float[Array, "B *T N V"],
    selected: Bool[np.ndarray, "N L L"] | None = None,
    *,
    orders: tuple[Order, ...] | None = None,
    block: int = 64,
    bits: int | None = None,
) -> Float[Array, "B *T N V"]:
    """Attention over a grid, each head in its order.

    Args:
      selected: blocks of queries and of keys, in the order of each head; None is all.
      orders: for each head; None is the order of the grid for all.
      bits: of queries, keys, values and weights; None is no rounding.

    Returns v's dtype. Raises ValueError for orders that don't fit and bits below 2.
    """
    shape, N = q.shape[1:-2], q.shape[-2]
    orders = (tuple(range(len(shape))),) * N if orders is None else orders
    if len(orders) != N or any(sorted(order) != list(range(len(shape))) for order in orders):
        raise ValueError(f"{orders=} must be {N}, each a permutation of {len(shape)} axes")
    if bits is not None and bits < 2:
        raise ValueError(f"{bits=} must be at least 2")
    to = np.stack([places(shape, order) for order in orders], 1)
    sort = lambda x, at: x.reshape(x.shape[0], -1, *x.shape[-2:])[:, at, np.arange(N)[None]]
    q, k, v = (sort(x, to) for x in (q, k, v))
    if bits is None:
        mask = None
        if selected is not None:
            mask = masks.Blocks(selected[None], block, block)
        o = ops.dot_product_attention(q, k, v, mask=mask)
    else:
        L = -(-len(to) // block)
        selected = np.ones((N, L, L), bool) if selected is None else selected
        o = _quantised(q, k, v, selected, block, bits)
    return sort(o, to.argsort(0)).reshape(q.shape[0], *shape, N, -1)


def places(shape: tuple[int, ...], order: Order) -> Int[np.ndarray, "T"]:
    """The tokens of a grid in an order of its axes."""
    return np.arange(np.prod(shape)).reshape(shape).transpose(order).reshape(-1)


def _quantised(q, k, v, selected, block, bits):
    """By rows of blocks: as many blocks as the longest row of any head has."""
    N, count = len(selected), q.shape[1]
    A = max(1, selected.sum(-1).max())
    lists = np.argsort(~selected, -1, stable=True)[..., :A]
    there = np.take_along_axis(selected, lists, -1)
    exists = np.arange(selected.shape[1] * block).reshape(-1, block) < count
    cut = lambda x: jnp.moveaxis(block_selection.by_block(x.astype(jnp.float32), block), 3, 1)
    q, k, v = (_round(cut(x), (3, 4), 2 ** (bits - 1) - 1) for x in (q, k, v))  # B N L C H

    @jax.checkpoint
    def row(x):
        q, real, lists, there = x  # of queries (B N C H), C, N A, N A
        keys = [x[:, np.arange(N)[:, None], lists] for x in (k, v)]  # B N A C H
        seen = there[..., None] & jnp.asarray(exists)[lists]
        seen = seen[None, :, None] & real[None, None, :, None, None]
        x = jnp.einsum("BNTH,BNACH->BNTAC", q, keys[0]) * q.shape[-1] ** -0.5
        w = jnp.where(seen, jax.nn.softmax(jnp.where(seen, x, -1e30), (3, 4)), 0.0)
        return jnp.einsum("BNTAC,BNACV->BNTV", _round(w, (2, 4), 2**bits - 1), keys[1])

    rows = jnp.moveaxis(q, 2, 0), exists, lists.swapaxes(0, 1), there.swapaxes(0, 1)
    o = jax.lax.map(row, jax.tree.map(jnp.asarray, rows))  # L B N C V
    o = o.transpose(1, 0, 3, 2, 4)
    return o.reshape(o.shape[0], -1, *o.shape[3:])[:, :count].astype(v.dtype)


def _round(x, axes, levels):
    """x on `levels` steps of the largest size along `axes`."""
    largest = jnp.abs(x).max(axes, keepdims=True)
    scale = jnp.where(largest > 0, largest, 1.0) / levels
    return x + jax.lax.stop_gradient(jnp.round(x / scale) * scale - x)


def choose(
    weights: Float[np.ndarray, "N T T"],
    shape: tuple[int, ...],
    *,
    block: int = 64,
    alpha: float = 0.5,
    empty: float = 0.01,
) -> tuple[Order, ...]:
    """The best order of each head for its weights over the flat grid.

    Args:
      alpha: what counts: 1 empty blocks, 0 that the weights of a block are alike.
      empty: a block with less than this share of the mean weight of all blocks is empty.
    """
    every = list(itertools.permutations(range(len(shape))))
    bare, uneven = [], []
    for order in every:
        blocks = _blocks(weights, places(shape, order), block)
        mean = blocks.mean((2, 4))
        bare.append((mean < empty * mean.mean((1, 2), keepdims=True)).mean((1, 2)))
        peak = blocks.max((2, 4)) / np.where(mean > 0, mean, 1.0)
        uneven.append(peak.mean((1, 2)))
    share = lambda x: np.stack(x) / np.maximum(np.sum(x, 0), 1e-30)
    score = alpha * share(bare) - (1 - alpha) * share(uneven)
    return tuple(every[i] for i in score.argmax(0))


def select(
    weights: Float[np.ndarray, "N T T"],
    shape: tuple[int, ...],
    orders: tuple[Order, ...],
    *,
    density: float,
    block: int = 64,
) -> Bool[np.ndarray, "N L L"]:
    """The heaviest blocks of each head, and the heaviest of each row."""
    pairs = zip(weights, orders, strict=True)
    blocks = [_blocks(w[None], places(shape, order), block)[0] for w, order in pairs]
    mass = np.stack(blocks).sum((2, 4))
    rank = np.argsort(np.argsort(-mass.reshape(len(mass), -1), stable=True)).reshape(mass.shape)
    heavy = rank < round(density * mass[0].size)
    return heavy | (rank == rank.min(-1, keepdims=True))


def _blocks(weights, at, block):
    """(N T T), its tokens in the order `at` -> (N L C L C), filled up with zeros."""
    fill = -len(at) % block
    x = np.pad(weights[:, at][:, :, at], ((0, 0), (0, fill), (0, fill)))
    L = x.shape[1] // block
    return x.reshape(-1, L, block, L, block)


def _example(key: jax.Array, T: int) -> dict[str, jax.Array | np.ndarray]:
    q, k, v = jax.random.normal(key, (3, 2, T, 2, 2, 2, 8))
    L = -(-4 * T // 16)
    selected = (np.random.default_rng(T).random((2, L, L)) < 0.4) | np.eye(L, dtype=bool)
    return dict(q=q, k=k, v=v, selected=selected)


def _untouched(q, k, v, selected):
    flat = [x.reshape(x.shape[0], -1, *x.shape[-2:]) for x in (q, k, v)]
    return ops.dot_product_attention(*flat).reshape(v.shape)


def _oracle(q, k, v, selected, *, orders, block, bits=None):
    """Tokens stay where they are; each head knows the block of each."""
    shape, (B, N, H) = q.shape[1:-2], (q.shape[0], *q.shape[-2:])
    q, k, o = (x.reshape(B, -1, N, x.shape[-1]).swapaxes(1, 2) for x in (q, k, v))
    at = np.indices(shape).reshape(len(shape), -1)
    sizes = [tuple(shape[axis] for axis in order) for order in orders]
    ranks = [
        np.ravel_multi_index(at[list(order)], size)
        for order, size in zip(orders, sizes, strict=True)
    ]
    of = np.stack(ranks) // block  # N T
    member = of[:, None] == np.arange(selected.shape[1])[None, :, None]  # N L T

    def coarse(x, levels, largest):
        step = jnp.where(largest > 0, largest, 1.0) / levels
        return x + jax.lax.stop_gradient(step * jnp.round(x / step) - x)

    def tokens(x):
        peak = jnp.where(member[None], jnp.abs(x).max(-1)[:, :, None], 0).max(-1)  # B N L
        return coarse(x, 2 ** (bits - 1) - 1, peak[:, np.arange(N)[:, None], of][..., None])

    def entries(w):
        n = np.arange(N)[:, None, None]
        rows = jnp.where(member[None, ..., None], w[:, :, None], 0).max(3)  # B N L S
        both = jnp.where(member[None, :, None], rows[:, :, :, None], 0).max(-1)  # B N L M
        return coarse(w, 2**bits - 1, both[:, n, of[:, :, None], of[:, None, :]])

    q, k, o = (x if bits is None else tokens(x) for x in (q, k, o))
    seen = selected[np.arange(N)[:, None, None], of[:, :, None], of[:, None, :]]
    x = jnp.einsum("BNTH,BNSH->BNTS", q, k) / jnp.sqrt(H)
    w = jax.nn.softmax(jnp.where(seen[None], x, -jnp.inf))
    w = w if bits is None else entries(w)
    return jnp.einsum("BNTS,BNSV->BTNV", w, o).reshape(v.shape)


SPEC = registry.Intervention(
    fn=paroattention,
    papers=("paroattention",),
    example=_example,
    oracle=_oracle,
    identity=dict(selected=None, orders=None, bits=None),
    untouched=_untouched,
    variants=(
        dict(orders=((2, 1, 0), (0, 2, 1)), block=16),
        dict(orders=((1, 2, 0), (2, 0, 1)), block=16, bits=4),
    ),
)
