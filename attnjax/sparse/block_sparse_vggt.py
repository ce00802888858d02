r"""Block-sparse global attention: patches of many views attend where their pooled map has its mass.

Paper: Wang et al., "Faster VGGT with Block-Sparse Global Attention", arXiv:2509.07120, section 4.

    A     = softmax(mean of a block of queries . mean of a block of keys / sqrt(H)),  of patches
    kept  = for each block of queries the larger of: the fewest blocks of keys that reach tau of A,
            the share 1 - sparsity of all blocks, rounded down; always those with most of A
    patch tokens attend to the patches of the kept blocks and to all special tokens,
    special tokens (camera, registers) to everything

It replaces the attention over all tokens of all views in a trained VGGT or pi^3, without training.
What isn't kept is not computed. Blocks are chosen without a gradient.

Shapes: B batch, I views, P tokens of a view, the special ones first, N heads, K kv-heads,
H head dim, V value dim, tq and tk blocks of queries and of keys.
Unlike the paper: products aren't quantised (the authors' kernel rounds to 8 bits), and special
tokens lie in blocks of their own, so that no patch is kept because it shares one with them.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from attnjax.core import masks, registry
from attnjax.ops import block_selection
from attnjax.ops import dot_product_attention as ops


def block_sparse_vggt(
    q: Float[Array, "B I P N H"],
    k: Float[Array, "B I P K H"],
    v: Float[Array, "B I P K V"],
    *,
    specials: int = 5,
    tau: float = 0.9,
    sparsity: float = 1.0,
    block_q: int = 128,
    block_k: int = 64,
) -> Float[Array, "B I P N V"]:
    """Global attention over all views.

    Args:
      specials: how many tokens of a view, the first, are no patches.
      tau: share of a pooled row that the kept blocks reach; 1 keeps all.
      sparsity: at most this share of blocks is left out, rounded up to whole blocks.

    Returns v's dtype. Raises ValueError for options out of range.
    """
    if not (0 <= tau <= 1 and 0 <= sparsity <= 1):
        raise ValueError(f"{tau=} and {sparsity=} must be in [0, 1]")
    if not 0 <= specials < q.shape[2]:
        raise ValueError(f"{specials=} must leave a patch of {q.shape[2]} tokens")
    if tau == 1:
        o = ops.dot_product_attention(*(_flat(x) for x in (q, k, v)))
        return o.reshape(*q.shape[:-1], -1)
    patches = [_flat(x[:, :, specials:]) for x in (q, k, v)]
    kept = select(*jax.lax.stop_gradient(patches[:2]), tau, sparsity, block_q, block_k)
    mask = masks.Blocks(kept, block_q, block_k)
    per_view = lambda o: o.reshape(q.shape[0], q.shape[1], -1, *o.shape[2:])
    patch = per_view(_attend(*patches, *(_flat(x[:, :, :specials]) for x in (k, v)), mask))
    if specials == 0:
        return patch
    special = ops.dot_product_attention(_flat(q[:, :, :specials]), _flat(k), _flat(v))
    return jnp.concatenate([per_view(special), patch], 2)


def _flat(x):
    return x.reshape(x.shape[0], -1, *x.shape[3:])


def select(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    tau: float,
    sparsity: float,
    block_q: int,
    block_k: int,
) -> Bool[Array, "B N tq tk"]:
    """Which blocks of patches a block of patches attends to."""
    q, k = block_selection.means(q, block_q), block_selection.means(k, block_k)
    B, _, N, H = q.shape
    q = q.reshape(B, -1, k.shape[2], N // k.shape[2], H)
    x = jnp.einsum("BTKGH,BSKH->BKGTS", q, k) * H**-0.5
    x = x.reshape(B, N, *x.shape[-2:])
    least = math.floor(k.shape[1] * (1 - sparsity))
    return block_selection.smallest_set(jax.nn.softmax(x), tau) | block_selection.best(x, least)


def _attend(q, k, v, special_k, special_v, mask):
    """Patches to the patches that the mask lets them see and to all special tokens."""
    parts = [ops.dot_product_attention(q, k, v, mask=mask, return_lse=True)]
    if special_k.shape[1]:
        parts.append(ops.dot_product_attention(q, special_k, special_v, return_lse=True))
    o, lse = (jnp.stack(x) for x in zip(*parts, strict=True))
    share = jax.nn.softmax(lse, 0)  # every query sees a patch, so lse is finite
    return jnp.einsum("PBTN,PBTNV->BTNV", share, o.astype(jnp.float32)).astype(v.dtype)


def _example(key: jax.Array, T: int) -> dict[str, jax.Array]:
    q, k, v = jax.random.normal(key, (3, 2, T, 3, 4, 8))
    return dict(q=q, k=k[..., :2, :], v=v[..., :2, :])


def _untouched(q, k, v):
    o = ops.dot_product_attention(*(_flat(x) for x in (q, k, v)))
    return o.reshape(*q.shape[:-1], v.shape[-1])


def _oracle(q, k, v, *, specials=5, tau=0.9, sparsity=1.0, block_q=128, block_k=64):
    """A dense mask of tokens, by a loop over blocks of queries in the order of patches."""
    B, I, P, N, H = q.shape
    flat = [x.reshape(B, I * P, *x.shape[3:]) for x in (q, k, v)]
    q, k, v = (jnp.repeat(x, N // x.shape[2], 2) for x in flat)
    patch = np.flatnonzero(np.arange(I * P) % P >= specials)
    keys = [patch[i : i + block_k] for i in range(0, len(patch), block_k)]
    mean_k = jnp.stack([k[:, at].mean(1) for at in keys], 1)
    keep = math.floor(len(keys) * (1 - sparsity))
    seen = jnp.ones((B, N, I * P, I * P), bool)
    for first in range(0, len(patch), block_q):
        rows = patch[first : first + block_q]
        x = jnp.einsum("BNH,BLNH->BNL", q[:, rows].mean(1), mean_k) / jnp.sqrt(H)
        a = jax.nn.softmax(x)
        higher = a[..., None, :] > a[..., :, None]
        above = jnp.where(higher, a[..., None, :], 0.0).sum(-1)  # mass of the more likely ones
        chosen = (above < tau) | (higher.sum(-1) < keep)
        for at, column in zip(keys, jnp.moveaxis(chosen, -1, 0), strict=True):
            seen = seen.at[:, :, rows[:, None], at[None]].set(column[..., None, None])
    x = jnp.einsum("BTNH,BSNH->BNTS", q, k) / jnp.sqrt(H)
    o = jnp.einsum("BNTS,BSNV->BTNV", jax.nn.softmax(jnp.where(seen, x, -jnp.inf)), v)
    return o.reshape(B, I, P, N, -1)


SPEC = registry.Intervention(
    fn=block_sparse_vggt,
    papers=("block-sparse-vggt",),
    example=_example,
    oracle=_oracle,
    identity=dict(specials=1, tau=1.0),
    untouched=_untouched,
    variants=(
        dict(specials=0, tau=0.5, block_q=16, block_k=16),
        dict(specials=2, tau=0.3, sparsity=0.7, block_q=16, block_k=8),
    ),
)
