r"""Modular vision model: tasks share experts, each by a router of its own, and can part again.

Paper: Chen et al., "An Efficient General-Purpose Modular Vision Model via Multi-Task Heterogeneous
Training", arXiv:2306.17165.

    p     = softmax(x W_task)                        a router for each task; a batch is of one
    x'    = x + sum_a gate_a softmax(norm(x) W_q,a K^T / sqrt(H)) V W_o,a
    x''   = x' + sum_a gate_a ffn_a(norm(x'))        with experts and routers of its own
    loss  = -I(task; expert),      I = sum_te P(t, e) log(P(t, e) / (P(t) P(e)))

gate_a = p_a over the sum of the A chosen. The loss makes experts belong to tasks, and lets those
that have much in common share. Then the experts that a task doesn't choose can be taken out of a
copy for that task alone, which stays the same function (`drop_experts`).

P(t, e) = P(e | t) / L needs all tasks at once, where a batch of heterogeneous data has one. So the
other rows of P(e | t), the mean of p, are running means of earlier batches.

Shapes: B batch, T queries, S keys, E experts, A = topk chosen, L tasks, H head dim, D model dim,
F width within.
Unlike the paper: a layer of the model and the loss, without heads for tasks and their data; GELU
feed-forward layers; positions are left to the model. How many experts the paper has, whether all of
its layers are mixtures, and the exact form of its loss are not known here; nor is how well it does.
"""

from collections.abc import Callable, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, PyTree

from attnjax.core import layers, masks, registry
from attnjax.core.registry import Claim
from attnjax.ops import dot_product_attention as ops
from attnjax.ops import routing

Task = int | Int[Array, ""]


def modular_moe_vit(
    x: Float[Array, "B T D"],
    k: Float[Array, "B S 1 H"],
    v: Float[Array, "B S 1 H"],
    query: Float[Array, "E D H"],
    out: Float[Array, "E H D"],
    logits: Float[Array, "B T L E"],
    *,
    task: Task = 0,
    topk: int = 2,
    mask: masks.Mask | None = None,
    implementation: ops.Implementation | None = None,
) -> Float[Array, "B T D"]:
    """The sum of x', in x's dtype.

    Args:
      query, out: W_q and W_o of all experts.
      logits: x W of the routers of all tasks, of which that of `task` counts.
      topk: experts of a token; other options: `ops.dot_product_attention`.

    Raises ValueError for a topk that is not 1 to E, and for a task that is known while tracing and
    is not 0 to L - 1.
    """
    gates, chosen = routing.choose(_of_task(logits, task), topk=topk)
    q = routing.expert_dense(x, query, chosen)
    o = ops.dot_product_attention(q, k, v, mask=mask, implementation=implementation)
    return routing.combine(o, out, gates, chosen)


def _of_task(logits, task):
    """Those (B T E) of one router of (B T L E)."""
    L = logits.shape[2]
    if isinstance(task, int) and not 0 <= task < L:
        raise ValueError(f"{task=} must be 0 to {L - 1}")
    return logits[:, :, task]


def mutual_information(conditional: Float[Array, "L E"]) -> Float[Array, ""]:
    """I(task; expert) in nats by P(e | t), for tasks that are equally likely: 0 to log L."""
    p = conditional.astype(jnp.float32)
    information = jnp.log(jnp.maximum(p, 1e-9)) - jnp.log(jnp.maximum(p.mean(0), 1e-9))[None]
    return (p * information).sum(-1).mean()


def mutual_information_loss(
    logits: Float[Array, "*B E"],
    running: Float[Array, "L E"],
    *,
    task: Task,
    momentum: float = 0.99,
) -> tuple[Float[Array, ""], Float[Array, "L E"]]:
    """(-I, running means of P(e | t) with this batch).

    Args:
      logits: of the router of `task`, for a batch of it.
      running: before this batch; begin with 1 / E.
      momentum: of the running means. The gradient goes to this batch in full, and not by the share
        1 - momentum that it has in them.
    """
    p = jax.nn.softmax(logits.astype(jnp.float32)).reshape(-1, logits.shape[-1]).mean(0)
    constant = jax.lax.stop_gradient(p)
    row = momentum * running[task] + (1 - momentum) * constant
    loss = -mutual_information(running.at[task].set(row + p - constant))
    return loss, running.at[task].set(row)


def drop_experts(params: PyTree, kept: Sequence[int]) -> PyTree:
    """Parameters of a ModularMoeVit or ModularMlp with the experts `kept` alone, in that order.

    For a task that chooses no other it is the same function. Raises ValueError where `kept` names
    an expert twice, or one that is not there.
    """
    if len(set(kept)) != len(kept):
        raise ValueError(f"{kept=} must not name an expert twice")

    def drop(path, leaf):
        names = {entry.key for entry in path}
        axis = 2 if "router" in names else 0 if names & {"query", "out", "up", "down"} else None
        if axis is None:
            return leaf
        if not set(kept) <= set(range(leaf.shape[axis])):
            raise ValueError(f"{kept=} must be among the {leaf.shape[axis]} experts")
        return jnp.take(leaf, jnp.asarray(kept), axis)

    return jax.tree.map_with_path(drop, params)


class ModularMoeVit(nn.Module):
    """The mixture of heads over (B T D): `num_heads` a token, of num_experts (None: twice)."""

    num_heads: int
    head_dim: int
    num_experts: int | None = None
    num_tasks: int = 1
    dtype: DTypeLike | None = None
    fn: Callable[..., jax.Array] = modular_moe_vit

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T D"], *, task: Task = 0, mask: masks.Mask | None = None
    ) -> Float[Array, "B T D"]:
        """Attention of x, all of one task, to itself; `mask` says what each token sees."""
        E, D, H = self.num_experts or 2 * self.num_heads, x.shape[-1], self.head_dim
        init = nn.initializers.lecun_normal(batch_axis=0)
        query = layers.Table((E, D, H), init, name="query")()
        out = layers.Table((E, H, D), init, name="out")()
        logits = layers.HeadProjection(self.num_tasks, E, self.dtype, name="router")(x)
        k, v = (layers.HeadProjection(1, H, self.dtype, name=name)(x) for name in ("key", "value"))
        arrays = x.astype(self.dtype or x.dtype), k, v, query, out, logits
        attend = layers.Attend(self.fn, name="attend")
        return attend(*arrays, task=task, topk=self.num_heads, mask=mask)


class ModularMlp(nn.Module):
    """The mixture of feed-forward layers over (B T D): `topk` a token, of num_experts."""

    mlp_dim: int
    num_experts: int
    topk: int = 2
    num_tasks: int = 1
    dtype: DTypeLike | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"], *, task: Task = 0) -> Float[Array, "B T D"]:
        """The sum of x''; x is all of one task."""
        E, D, F = self.num_experts, x.shape[-1], self.mlp_dim
        init = nn.initializers.lecun_normal(batch_axis=0)
        up = layers.Table((E, D, F), init, name="up")()
        down = layers.Table((E, F, D), init, name="down")()
        logits = layers.HeadProjection(self.num_tasks, E, self.dtype, name="router")(x)
        x = x.astype(self.dtype or x.dtype)
        return routing.mixture_mlp(x, up, down, _of_task(logits, task), topk=self.topk)


class ModularBlock(nn.Module):
    """x'' over (B T D), with as many experts in both mixtures."""

    num_heads: int
    head_dim: int
    mlp_dim: int
    num_experts: int
    topk: int = 2
    num_tasks: int = 1
    dtype: DTypeLike | None = None

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T D"], *, task: Task = 0, mask: masks.Mask | None = None
    ) -> Float[Array, "B T D"]:
        """One layer for images of one task, in tokens."""
        shared = dict(num_experts=self.num_experts, num_tasks=self.num_tasks, dtype=self.dtype)
        norm = lambda name, x: nn.LayerNorm(dtype=self.dtype, name=name)(x)
        attention = ModularMoeVit(self.num_heads, self.head_dim, **shared, name="attention")
        x = x + attention(norm("attention_norm", x), task=task, mask=mask)
        mlp = ModularMlp(self.mlp_dim, topk=self.topk, **shared, name="mlp")
        return x + mlp(norm("mlp_norm", x), task=task)


def _example(key: jax.Array, T: int) -> dict[str, jax.Array]:
    draw = lambda i, *shape: jax.random.normal(jax.random.fold_in(key, i), shape)
    k, v = draw(0, 2, 2, T, 1, 8)
    heads = dict(query=draw(1, 4, 12, 8) / 3, out=draw(2, 4, 8, 12) / 3)
    return dict(x=draw(3, 2, T, 12), k=k, v=v, logits=draw(4, 2, T, 3, 4)) | heads


def _oracle(x, k, v, query, out, logits, *, task=0, topk=2, mask=None):
    logits, y = logits[:, :, task], 0
    rank = jnp.argsort(jnp.argsort(-logits))
    gate = jax.nn.softmax(jnp.where(rank < topk, logits, -jnp.inf))
    for e in range(len(query)):
        z = (x @ query[e]) @ k[:, :, 0].mT / jnp.sqrt(k.shape[-1])
        z = jnp.where(masks.dense(mask, *z.shape[1:])[:, 0], z, -1e30)
        y += gate[..., e, None] * (jax.nn.softmax(z) @ v[:, :, 0] @ out[e])
    return y


SPEC = registry.Mechanism(
    fn=modular_moe_vit,
    module=ModularMoeVit,
    small=dict(num_heads=2, head_dim=8, num_experts=4, num_tasks=2),
    papers=("modular-moe-vit",),
    example=_example,
    oracle=_oracle,
    variants=({}, dict(task=2, topk=3, mask=masks.Causal())),
    claims=frozenset(
        {
            Claim.CAUSAL,
            Claim.MASKABLE,
            Claim.PERMUTATION_EQUIVARIANT,
            Claim.LINEAR_MEMORY,
            Claim.FORWARD_MODE,
        }
    ),
)
