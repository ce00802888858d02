r"""Routing: which experts a token goes to, and how those that it doesn't go to cost nothing.

    p_e     = exp(z_e) / sum_e' exp(z_e')              z = x W, the logits of a router
    gate_a  = p_a / sum_a' p_a'                        over the A experts of highest z
    balance = E sum_e f_e P_e                          f_e: share of all choices that fell on e,
    z_loss  = mean of (log sum_e exp(z_e))^2           P_e: mean of p_e

A token and an expert that it chose are a pair. Pairs are sorted by expert and laid into tiles, each
of one expert, so that an expert meets no more than its own tokens. Whatever is chosen, no token is
dropped, and shapes don't depend on it.

Source: Fedus et al., "Switch Transformers", eqs. 4 to 6 (balance); Zoph et al., "ST-MoE", eq. 5
(z_loss); tiles as in `ops.selected_block_attention`.

Nothing has to be built in for a loss to get at the logits of a router inside of a model:
`model.apply(params, x, capture_intermediates=lambda m, _: m.name == "router")` returns them, too.

Letters: A experts chosen by a token, E experts, F features out, P pairs, M tiles, X pairs a tile.
"""

from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from attnjax.core import masks
from attnjax.ops import dot_product_attention as ops

Total = Literal["one", "constant"]

_KINDS = masks.Causal, masks.Window, masks.Prefix, masks.Segments, masks.Valid


def choose(
    logits: Float[Array, "*B E"], *, topk: int, total: Total = "one"
) -> tuple[Float[Array, "*B A"], Int[Array, "*B A"]]:
    """(gates in float32, experts) of the A = topk experts of highest logit, the highest first.

    total: what the gates are divided by, so that they add up to one: their sum, or the same as a
    constant to the gradient, which a router of topk=1 learns by. Raises ValueError for a topk that
    is not 1 to E, and for another total.
    """
    if not 1 <= topk <= logits.shape[-1]:
        raise ValueError(f"{topk=} must be 1 to the {logits.shape[-1]} experts")
    if total not in get_args(Total):
        raise ValueError(f"{total=} must be one of {get_args(Total)}")
    chosen = jax.lax.top_k(logits, topk)[1]
    p = jnp.take_along_axis(jax.nn.softmax(logits.astype(jnp.float32)), chosen, -1)
    whole = p.sum(-1, keepdims=True)
    return p / (whole if total == "one" else jax.lax.stop_gradient(whole)), chosen


def load_balance_loss(logits: Float[Array, "*B E"], chosen: Int[Array, "*B A"]) -> Float[Array, ""]:
    """`balance` over all tokens: 1 where all experts share alike, up to E where one has all.

    The gradient is that of P: it lowers p of the experts that are chosen most.
    """
    E = logits.shape[-1]
    share = jnp.bincount(chosen.reshape(-1), length=E) / chosen.size
    p = jax.nn.softmax(logits.astype(jnp.float32)).reshape(-1, E).mean(0)
    return E * (share * p).sum()


def router_z_loss(logits: Float[Array, "*B E"]) -> Float[Array, ""]:
    """`z_loss` over all tokens, which keeps logits small."""
    return jnp.mean(jax.nn.logsumexp(logits.astype(jnp.float32), -1) ** 2)


class Tiles(NamedTuple):
    """Places for pairs, X to a tile, each tile of one expert. Pair 0 fills what is left over."""

    pair: Int[Array, "*B M X"]
    expert: Int[Array, "*B M"]
    place: Int[Array, "*B P"]  # of each pair, in M * X


def lay(expert: Int[Array, "P"], *, num_experts: int, tile: int) -> Tiles:
    """Tiles of X = tile pairs for the pairs of these experts, in the order of pairs."""
    P, E, X = len(expert), num_experts, tile
    M = min(P, (P + E * (X - 1)) // X)  # the most that any choice needs
    count = jnp.bincount(expert, length=E)
    end = jnp.cumsum(-(-count // X))  # an expert's tiles are those up to its end
    order = jnp.argsort(expert)
    nth = jnp.zeros_like(expert).at[order].set(jnp.arange(P, dtype=expert.dtype))
    nth = nth - (jnp.cumsum(count) - count)[expert]  # among the pairs of its expert
    place = (end + (-count // X))[expert] * X + nth
    pair = jnp.zeros_like(expert, shape=M * X).at[place].set(jnp.arange(P, dtype=expert.dtype))
    owner = (end[None, :] <= jnp.arange(M)[:, None]).sum(1)  # E for tiles that are left over
    return Tiles(pair.reshape(M, X), jnp.minimum(owner, E - 1), place)


def expert_dense(
    x: Float[Array, "*B D"], kernel: Float[Array, "E D F"], chosen: Int[Array, "*B A"]
) -> Float[Array, "*B A F"]:
    """x by the matrix of each expert that it chose, in x's dtype.

    Takes at most 5/4 of A products a token, for any E, and memory for 5 times the kernel.
    """
    E, _, F = kernel.shape
    tiles = lay(chosen.reshape(-1), num_experts=E, tile=-(-chosen.size // (4 * E)))
    rows = x.reshape(-1, x.shape[-1])[tiles.pair // chosen.shape[-1]]
    kernels = kernel.astype(x.dtype)[tiles.expert]
    y = jnp.einsum("MXD,MDF->MXF", rows, kernels, preferred_element_type=jnp.float32)
    return y.reshape(-1, F)[tiles.place].reshape(*chosen.shape, F).astype(x.dtype)


def combine(
    x: Float[Array, "*B A F"],
    kernel: Float[Array, "E F D"],
    gates: Float[Array, "*B A"],
    chosen: Int[Array, "*B A"],
) -> Float[Array, "*B D"]:
    """sum_a gate_a x_a kernel_a: from the experts back to the token, in x's dtype."""
    y = expert_dense(x, kernel, chosen[..., None])[..., 0, :]
    return jnp.einsum("...AD,...A->...D", y.astype(jnp.float32), gates).astype(x.dtype)


def mixture_mlp(
    x: Float[Array, "*B D"],
    up: Float[Array, "E D F"],
    down: Float[Array, "E F D"],
    logits: Float[Array, "*B E"],
    *,
    topk: int,
) -> Float[Array, "*B D"]:
    """sum_a gate_a gelu(x up_a) down_a: a token goes through `topk` of E feed-forward layers."""
    gates, chosen = choose(logits, topk=topk)
    return combine(jax.nn.gelu(expert_dense(x, up, chosen)), down, gates, chosen)


def routed_attention(
    q: Float[Array, "B T A H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K V"],
    chosen: Int[Array, "B T A"],
    *,
    num_heads: int,
    mask: masks.Mask | None = None,
    q_offset: int | Int[Array, ""] = 0,
    by: str = "routed_attention",
) -> Float[Array, "B T A V"]:
    """Softmax attention of query a of token t in head chosen[t, a] alone, with scale 1/sqrt(H).

    Args:
      chosen: heads, each of `num_heads`; head n has key head n // (num_heads / K).
      mask: honours Causal, Window, Prefix, Segments and Valid; NotImplementedError for others.
      q_offset: position of the first query; keys begin at 0.
      by: who asks, for error messages.

    Takes the products of at most 9/8 of A heads, for any num_heads; memory linear in T and S.
    """
    masks.select(mask, *_KINDS, by=by)
    (B, T, A, H), (S, K, V) = q.shape, v.shape[1:]
    size = min(-(-T * A // (8 * num_heads)), 512)
    spread = jax.vmap(lambda x: lay(x.reshape(-1), num_experts=num_heads, tile=size))
    tiles, group = spread(chosen), num_heads // K
    leaves, tree = jax.tree.flatten(mask)  # each (B or 1, length)
    leaves = [jnp.broadcast_to(x, (B, *x.shape[1:])) for x in leaves]
    t, s = q_offset + jnp.arange(T), jnp.arange(S)

    def attend(q, k, v, leaves, pair, head):  # one tile of one sequence
        k, v = (x[None, :, head // group][:, :, None] for x in (k, v))
        options = dict(mask=tree.unflatten([x[None] for x in leaves]), positions=(t[pair // A], s))
        return ops.dot_product_attention(q[pair][None, :, None], k, v, **options)[0, :, 0]

    # scores are computed again in the backward pass, not kept
    tile = jax.checkpoint(lambda x: jax.vmap(attend)(q.reshape(B, -1, H), k, v, leaves, *x))
    o = jax.lax.map(tile, (tiles.pair.swapaxes(0, 1), tiles.expert.T))
    o = o.swapaxes(0, 1).reshape(B, -1, V)
    return jnp.take_along_axis(o, tiles.place[..., None], 1).reshape(B, T, A, V)
