r"""Titans: a memory that is a network, trained on each token by gradient descent with momentum.

Paper: Behrouz et al., "Titans: Learning to Memorize at Test Time", arXiv:2501.00663, sections 3.1
(the memory), 3.2 (chunks) and 4.4 (the module).

    S_t = eta_t S_{t-1} - theta_t grad |M(k_t) - v_t|^2 / 2       surprise, of the past and the new
    M_t = (1 - alpha_t) M_{t-1} + S_t,       o_t = M_t(q_t)
    M(x) = W_L^T silu(W_{L-1}^T silu(... W_1^T x))                M_0 is learned, S_0 is zero
    q, k = unit(silu(conv(x P))),  v = unit(silu(conv(x P_v)))
    theta, eta, alpha = sigmoid(x P + bias),  y = P_o (rms_norm(o) * silu(P_g x))

The gradient is at the memory before the chunk of token t, as in section 3.2: all of a chunk's are
found at once. With chunk=1 it is at M_{t-1}, as in section 3.1: a deep memory goes token by token,
while tokens of a linear one (depth 1) are still taken together, exactly (`ops.neural_memory`); it
is DeltaNet with beta = theta where it has neither momentum nor forgetting.

Shapes: B batch, T time, N heads, H head dim of keys and values, D model dim, L depth of the memory;
conv is causal and short, for each channel by itself, and its last tokens are a part of the state.
Unlike the paper: heads, each with its own memory; the factor 2 of the gradient is a part of theta;
values have length 1, for the steps of a deep memory grow without bound with them; this is the
memory by itself (LMM), without the attention beside it (MAC, MAG, MAL) and its persistent tokens.
A stack of both, as MAL is, is a pattern of mixers of a model.
"""

import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from attnjax.core import layers, masks, recurrent, registry, short_conv
from attnjax.core.registry import Claim
from attnjax.ops import blocked_arguments, unit_vectors
from attnjax.ops import neural_memory as ops


def titans(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T N H"],
    v: Float[Array, "B T N H"],
    rate: Float[Array, "B T N"],
    log_momentum: Float[Array, "B T N"],
    log_keep: Float[Array, "B T N"],
    memory: Float[Array, "N L H H"],
    *,
    mask: masks.Mask | None = None,
    chunk: int = 1,
    initial_state: ops.State | None = None,
    return_state: bool = False,
) -> Float[Array, "B T N H"] | tuple[Float[Array, "B T N H"], ops.State]:
    """o in v's dtype, and with `return_state` also the state in float32. Always causal.

    Args:
      rate: theta >= 0.
      log_momentum, log_keep: log(eta) and log(1 - alpha), finite and <= 0.
      memory: M_0, its L matrices.
      mask: Causal and Valid. A padded token changes nothing.
      chunk: tokens whose gradients are taken at the same memory.
      initial_state: after the tokens before these, instead of M_0; made with the same `chunk`.

    Raises NotImplementedError for any other mask, ValueError for chunk < 1.
    """
    arrays = memory, q, k, v, rate, log_momentum, log_keep
    memory = blocked_arguments.varying(memory, like=arrays)  # as a state will vary
    state = ops.State.begin(memory, q.shape[0]) if initial_state is None else initial_state
    options = dict(mask=mask, chunk=chunk, by="titans")
    o, state = ops.neural_memory(q, k, v, rate, log_momentum, log_keep, state, **options)
    return (o, state) if return_state else o


class Titans(recurrent.Recurrent):
    """The neural memory of section 4.4 over (B T D), with `depth` matrices for each head."""

    depth: int = 2
    chunk: int = 16
    conv_width: int = 4
    fn: Callable[..., jax.Array] = titans

    def setup(self):
        if self.depth < 1:
            raise ValueError(f"depth={self.depth} must be at least 1")
        N, H = self.num_heads, self.head_dim
        self.query = short_conv.ConvProjection(N, H, self.conv_width, self.dtype)
        self.key = short_conv.ConvProjection(N, H, self.conv_width, self.dtype)
        self.value = short_conv.ConvProjection(N, H, self.conv_width, self.dtype)
        self.rate = layers.Dense(N, dtype=self.dtype)
        self.momentum = layers.Dense(N, dtype=self.dtype)
        self.forget = layers.Dense(N, dtype=self.dtype)
        self.memory = layers.Table((N, self.depth, H, H), nn.initializers.normal(H**-0.5))
        self.attend = layers.Attend(functools.partial(self.fn, chunk=self.chunk))
        self.norm = nn.RMSNorm(dtype=self.dtype)
        self.gate = layers.HeadProjection(N, H, self.dtype)
        self.out = layers.OutputProjection(self.dtype)

    def _memory(self, batch) -> ops.State:
        return ops.State.begin(self.memory(), batch)

    def _before(self, batch):
        return tuple(part.init_state(batch) for part in (self.query, self.key, self.value))

    def _project_after(self, x, before, mask):
        q, last_q = self.query(x, before[0], mask=mask)
        k, last_k = self.key(x, before[1], mask=mask)
        v, last_v = self.value(x, before[2], mask=mask)
        gates = (
            nn.sigmoid(self.rate(x)),
            nn.log_sigmoid(self.momentum(x).astype(jnp.float32)),
            nn.log_sigmoid(-self.forget(x).astype(jnp.float32)),
        )
        units = map(unit_vectors.unit, (q, k, v))
        return (*units, *gates, self.memory()), (last_q, last_k, last_v)

    def _gated(self, o, x):
        return self.norm(o) * nn.silu(self.gate(x))


def _example(key: jax.Array, T: int) -> dict[str, jax.Array]:
    keys = jax.random.split(key, 3)
    q, k, v = unit_vectors.unit(jax.random.normal(keys[0], (3, 2, T, 4, 4)))
    gates = jax.random.uniform(keys[1], (3, 2, T, 4), minval=0.1, maxval=0.9)
    logs = dict(log_momentum=jnp.log(gates[1]), log_keep=jnp.log(gates[2]))
    memory = jax.random.normal(keys[2], (4, 2, 4, 4)) / 2
    return dict(q=q, k=k, v=v, rate=gates[0], memory=memory) | logs


def _oracle(q, k, v, rate, log_momentum, log_keep, memory, *, chunk=1):
    def read(M, x):
        for i in range(M.shape[2]):
            x = jnp.einsum("BNHV,BNH->BNV", M[:, :, i], jax.nn.silu(x) if i else x)
        return x

    def step(carry, x):
        M, S, anchor = carry
        t, q, k, v, theta, eta, keep = x
        anchor = jnp.where(t % chunk == 0, M, anchor)
        gradient = jax.grad(lambda M: ((read(M, k) - v) ** 2).sum() / 2)(anchor)
        S = eta[..., None, None, None] * S - theta[..., None, None, None] * gradient
        M = keep[..., None, None, None] * M + S
        return (M, S, anchor), read(M, q)

    M = jnp.broadcast_to(memory[None], (q.shape[0], *memory.shape))
    xs = [x.swapaxes(0, 1) for x in (q, k, v, rate, jnp.exp(log_momentum), jnp.exp(log_keep))]
    _, o = jax.lax.scan(step, (M, jnp.zeros_like(M), M), (jnp.arange(q.shape[1]), *xs))
    return o.swapaxes(0, 1)


SPEC = registry.Mechanism(
    fn=titans,
    module=Titans,
    small=dict(num_heads=4, head_dim=4, chunk=3),
    papers=("titans",),
    example=_example,
    oracle=_oracle,
    variants=({}, dict(chunk=5)),
    claims=frozenset(
        {
            Claim.CAUSAL,
            Claim.STREAMABLE,
            Claim.LINEAR_MEMORY,
            Claim.LINEAR_COMPUTE,
            Claim.FORWARD_MODE,
            Claim.CONTEXT_PARALLEL,
        }
    ),
    context=("all_to_all",),
)
