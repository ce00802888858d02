r"""Agent attention: a few agents gather what all keys have to say and hand it on to the queries.

Paper: Han et al., "Agent Attention: On the Integration of Softmax and Linear Attention",
arXiv:2312.08874, sections 3.2 (the attention) and 3.3 (biases and convolution).

    A = pool(Q)                                             M agents: means over cells of the grid
    V_A = softmax(A K^T / sqrt(H) + B_1) V                  agents gather
    O   = softmax(Q A^T / sqrt(H) + B_2) V_A + conv(V)      queries ask the agents

Two softmax attentions of cost linear in the positions, which together are linear attention with the
features softmax(Q A^T) and softmax(A K^T)^T; the weights of a query sum to 1. conv has a kernel for
each channel and restores the diversity of outputs that M agents alone can't have. Each bias is the
sum of a table of small blocks, one of rows and one of columns, resized to the grid.

Shapes: B batch, X Y image axes, N heads, H head dim, V value dim, D model dim, M agents (a square),
P Q sides of the kernel.
Unlike the paper: the tables of rows and columns are resized, too, so that a model works on any
grid; neither the convolution nor the projections have biases.
"""

import functools
import math
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from attnjax.core import layers, registry
from attnjax.core.registry import Claim
from attnjax.ops import depthwise_conv as convolutions
from attnjax.ops import dot_product_attention as ops


def agent_attention(
    q: Float[Array, "B X Y N H"],
    k: Float[Array, "B X Y N H"],
    v: Float[Array, "B X Y N V"],
    agent_bias: Float[Array, "N M X Y"],
    query_bias: Float[Array, "N M X Y"],
    kernel: Float[Array, "P Q N V"],
    *,
    implementation: ops.Implementation | None = None,
) -> Float[Array, "B X Y N V"]:
    """O in v's dtype, with softmax and sums in float32.

    Args:
      agent_bias, query_bias: B_1 and B_2 of each agent and position; they say how many agents.
      kernel: of the convolution, with odd sides; the values are padded with zeros.
      implementation: of both attentions, see `ops.dot_product_attention`.

    Raises ValueError where the number of agents is no square.
    """
    M = agent_bias.shape[1]
    if math.isqrt(M) ** 2 != M:
        raise ValueError(f"agent_bias {agent_bias.shape} must have a square number of agents, {M=}")
    flat = lambda x: x.reshape(x.shape[0], -1, *x.shape[3:])
    flat_bias = lambda x: x.reshape(1, *x.shape[:2], -1)
    agents = flat(pool(q, math.isqrt(M)))
    attend = functools.partial(ops.dot_product_attention, implementation=implementation)
    gathered = attend(agents, flat(k), flat(v), bias=flat_bias(agent_bias))
    o = attend(flat(q), agents, gathered, bias=flat_bias(query_bias).mT)
    return o.reshape(v.shape) + convolutions.depthwise_conv(v, kernel[None])


def pool(x: Float[Array, "B X Y N H"], side: int) -> Float[Array, "B L L N H"]:
    """Means over side times side cells, which overlap where `side` doesn't divide an axis."""
    rows, columns = (jnp.asarray(_cells(length, side)) for length in x.shape[1:3])
    means = jnp.einsum("LX,MY,BXYNH->BLMNH", rows, columns, x.astype(jnp.float32))
    return means.astype(x.dtype)


def _cells(length, side):
    """(side length) the weight of each position in the mean of each cell of an axis."""
    cell, position = np.arange(side)[:, None], np.arange(length)[None, :]
    first, end = cell * length // side, -(-(cell + 1) * length // side)
    inside = (first <= position) & (position < end)
    return (inside / inside.sum(1, keepdims=True)).astype(np.float32)


class AgentBias(nn.Module):
    """A learned bias for each head, agent and position of a grid: (num_heads agents *shape)."""

    num_heads: int
    agents: int
    grid: tuple[int, int]
    block: int

    @nn.compact
    def __call__(self, shape: tuple[int, int]) -> Float[Array, "N M X Y"]:
        """The sum of three tables, each resized to `shape` by interpolation."""
        sizes = dict(blocks=(self.block,) * 2, rows=(self.grid[0], 1), columns=(1, self.grid[1]))
        lead = (self.num_heads, self.agents)
        tables = [layers.Table((*lead, *size), name=name)() for name, size in sizes.items()]
        # as torch's interpolate does, which does not smooth what it shrinks
        resize = functools.partial(jax.image.resize, method="linear", antialias=False)
        return sum(resize(table, (*lead, *shape)) for table in tables)


class AgentAttention(nn.Module):
    """Multi-head agent attention over (B X Y D), with pool times pool agents.

    `grid` is the number of rows and of columns in the tables of biases, and `block` the side of the
    table of blocks; `size` is that of the kernel.
    """

    num_heads: int
    head_dim: int
    pool: int = 7
    grid: tuple[int, int] = (14, 14)
    block: int = 7
    size: int = 3
    dtype: DTypeLike | None = None
    fn: Callable[..., jax.Array] = agent_attention

    @nn.compact
    def __call__(self, x: Float[Array, "B X Y D"]) -> Float[Array, "B X Y D"]:
        """Attention of each position to all, in two steps."""
        N, H = self.num_heads, self.head_dim
        heads = functools.partial(layers.HeadProjection, N, H, self.dtype)
        q, k, v = (heads(name=name)(x) for name in ("query", "key", "value"))
        bias = functools.partial(AgentBias, N, self.pool**2, self.grid, self.block)
        biases = [bias(name=name)(x.shape[1:3]) for name in ("agent_bias", "query_bias")]
        init = nn.initializers.normal(1 / self.size)
        kernel = layers.Table((self.size, self.size, N, H), init, name="kernel")()
        o = layers.Attend(self.fn, name="attend")(q, k, v, *biases, kernel)
        return layers.OutputProjection(self.dtype, name="out")(o, x.shape[-1])


def _example(key: jax.Array, T: int) -> dict[str, jax.Array]:
    q, k, v = jax.random.normal(key, (3, 2, T, 3, 2, 4))
    agent_bias, query_bias = jax.random.normal(key, (2, 2, 4, T, 3))
    kernel = jax.random.normal(key, (3, 3, 2, 4)) / 3
    return dict(q=q, k=k, v=v, agent_bias=agent_bias, query_bias=query_bias, kernel=kernel)


def _oracle(q, k, v, agent_bias, query_bias, kernel):
    (B, X, Y, N, V), side = v.shape, round(agent_bias.shape[1] ** 0.5)
    cut = lambda i, n: slice(i * n // side, math.ceil((i + 1) * n / side))
    cells = [(cut(i, X), cut(j, Y)) for i in range(side) for j in range(side)]
    agents = jnp.stack([jnp.mean(q[:, x, y], (1, 2)) for x, y in cells], 1)
    gather = jnp.einsum("BMNH,BXYNH->BNMXY", agents, k) / jnp.sqrt(q.shape[-1]) + agent_bias[None]
    ask = jnp.einsum("BXYNH,BMNH->BNMXY", q, agents) / jnp.sqrt(q.shape[-1]) + query_bias[None]
    gather, ask = jax.nn.softmax(gather, (-2, -1)), jax.nn.softmax(ask, 2)
    w = jnp.einsum("BNMXY,BNMxy->BNXYxy", ask, gather)
    options = dict(padding="SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    image, kernel = v.reshape(B, X, Y, N * V), kernel.reshape(*kernel.shape[:2], 1, N * V)
    conv = jax.lax.conv_general_dilated(image, kernel, (1, 1), feature_group_count=N * V, **options)
    return jnp.einsum("BNXYxy,BxyNV->BXYNV", w, v) + conv.reshape(v.shape)


SPEC = registry.Mechanism(
    fn=agent_attention,
    module=AgentAttention,
    layout="grid",
    small=dict(num_heads=4, head_dim=8, pool=2, grid=(6, 5), block=3),
    papers=("agent-attention",),
    example=_example,
    oracle=_oracle,
    claims=frozenset({Claim.LINEAR_MEMORY, Claim.LINEAR_COMPUTE, Claim.FORWARD_MODE}),
)
