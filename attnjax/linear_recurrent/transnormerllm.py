r"""TransNormerLLM: linear attention whose weights turn and fade with distance, normed and gated.

Paper: Qin et al., "Scaling TransNormer to 175 Billion Parameters", arXiv:2307.14995, section 3, and
"Various Lengths, Constant Speed: Efficient Language Modeling with Lightning Attention" (TNL),
arXiv:2405.17381, eqs. 9-14: the same layer, of which the latter computes the sums in blocks.

    o_t = sum_{s <= t} lambda^(t - s) sum_h q_th k_sh cos(theta_h (t - s)) v_s          (LRPE-d)
    S_t = lambda S_{t-1} + k_t v_t^T,   o_t = S_t^T q_t,   k, q = [x cos(t theta), x sin(t theta)]
    y   = P_o (srms_norm(o) * P_u x),   q, k = swish(x P),   srms_norm(o) = o sqrt(N V) / |o|
    lambda = exp(-(8 n / N) (1 - l / L)) in head n of layer l

The recurrence multiplies by lambda alone: lambda^-t, which overflows, never appears. The first
layer alone turns, and learns theta; the others only fade.

Shapes: B batch, T time, N heads, H key dim, V value dim, D model dim, L layers.
Unlike the paper: n and l count from 0, which it leaves open (so one head of a layer never forgets);
the rest of the model (SGLU, norms) is left to `models`.
"""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from attnjax.core import layers, masks, recurrent, registry
from attnjax.core.registry import Claim
from attnjax.ops import decay_attention as ops
from pallas_kernels import decay_attention as kernels


def transnormerllm(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T N H"],
    v: Float[Array, "B T N V"],
    log_decay: Float[Array, "N"],
    angle: Float[Array, "#B T N H"] | None = None,
    *,
    mask: masks.Mask | None = None,
    initial_state: Float[Array, "B N F V"] | None = None,
    return_state: bool = False,
    implementation: kernels.Implementation | None = None,
) -> Float[Array, "B T N V"] | tuple[Float[Array, "B T N V"], Float[Array, "B N F V"]]:
    """o in v's dtype, and with `return_state` also the final state in float32. Always causal.

    Args:
      log_decay: log(lambda) <= 0, a constant: it has no gradient.
      angle: theta times the position of each token; None is none, and F = H, else F = 2H.
      mask: any of Causal, Valid, Segments. A padded key adds nothing, but time passes: the state
        decays there as elsewhere. Where a segment (one run of tokens) begins the state is zero.
      initial_state: of the tokens before these, in the first segment.
      implementation: "xla", "pallas" (TPU, Hopper) or "interpret"; None chooses by platform.
    """
    if angle is not None:
        q, k = lrpe(q, angle), lrpe(k, angle)
    o, state = ops.decay_attention(
        q,
        k,
        v,
        log_decay,
        mask=mask,
        initial_state=initial_state,
        implementation=implementation,
        by="transnormerllm",
    )
    return (o, state) if return_state else o


def lrpe(x: Float[Array, "B T N H"], angle: Float[Array, "#B T N H"]) -> Float[Array, "B T N F"]:
    """[x cos(angle), x sin(angle)], F = 2H: products of two depend on the difference of angles."""
    y, angle = x.astype(jnp.float32), angle.astype(jnp.float32)
    return jnp.concatenate([y * jnp.cos(angle), y * jnp.sin(angle)], -1).astype(x.dtype)


def log_decays(num_heads: int, *, layer: int = 0, num_layers: int = 1) -> Float[Array, "N"]:
    """log(lambda) of each head, eq. 10. ValueError where `layer` is not one of `num_layers`."""
    if not 0 <= layer < num_layers:
        raise ValueError(f"{layer=} must be at least 0 and below {num_layers=}")
    return -8 * jnp.arange(num_heads) / num_heads * (1 - layer / num_layers)


def angles(num_heads: int, head_dim: int) -> Float[Array, "N H"]:
    """What theta begins as: 10000^(-2j/D') for channel j of all D' = N H."""
    count = num_heads * head_dim
    return (10_000.0 ** (-2 * jnp.arange(count) / count)).reshape(num_heads, head_dim)


class TransNormerLLM(recurrent.Recurrent):
    """Gated linear attention, eq. 11, over (B T D), as layer number `layer` of `num_layers`."""

    layer: int = 0
    num_layers: int = 1
    fn: Callable[..., jax.Array] = transnormerllm

    def setup(self):
        N, H = self.num_heads, self.head_dim
        self.query = layers.HeadProjection(N, H, self.dtype)
        self.key = layers.HeadProjection(N, H, self.dtype)
        self.value = layers.HeadProjection(N, H, self.dtype)
        self.gate = layers.HeadProjection(N, H, self.dtype)
        if self.layer == 0:
            self.theta = layers.Table((N, H), lambda key, shape: angles(*shape))
        self.attend = layers.Attend(self.fn)
        self.norm = nn.RMSNorm(use_scale=False, reduction_axes=(-2, -1), dtype=self.dtype)
        self.out = layers.OutputProjection(self.dtype)

    def _memory(self, batch) -> Float[Array, "B N F V"]:
        H = self.head_dim
        return jnp.zeros((batch, self.num_heads, H if self.layer else 2 * H, H))

    def _before(self, batch) -> Int[Array, ""]:
        return jnp.zeros((), jnp.int32)  # how many tokens

    def _project_after(self, x, before, mask):
        log_decay = log_decays(self.num_heads, layer=self.layer, num_layers=self.num_layers)
        arrays = nn.swish(self.query(x)), nn.swish(self.key(x)), self.value(x), log_decay
        if self.layer == 0:
            at = before + jnp.arange(x.shape[1])
            arrays = *arrays, at[None, :, None, None] * self.theta()[None, None]
        return arrays, before + x.shape[1]

    def _gated(self, o, x):
        return self.norm(o) * self.gate(x)


def _carry(q, k, v, log_decay, angle=None, *, mask=None):
    """What an initial state is multiplied by until the last token."""
    return ops.carry(log_decay, q.shape[1], mask=mask)


def _example(key: jax.Array, T: int) -> dict[str, jax.Array]:
    q, k, v = jax.random.normal(key, (3, 2, T, 4, 8))
    angle = jnp.arange(T)[None, :, None, None] * angles(4, 8)[None, None]
    return dict(q=q, k=k, v=v, log_decay=log_decays(4, layer=3, num_layers=4), angle=angle)


def _oracle(q, k, v, log_decay, angle, *, mask=None):
    t = jnp.arange(q.shape[1])
    power = jax.lax.stop_gradient(log_decay)[:, None, None] * (t[:, None] - t[None, :])[None]
    causal = masks.Causal() if mask is None else mask & masks.Causal()
    decay = jnp.where(masks.dense(causal, len(t), len(t)), jnp.exp(power)[None], 0)  # B N T S
    turn = jnp.cos(angle[:, :, None] - angle[:, None])  # 1 T S N H
    turn = jnp.broadcast_to(turn, (len(q), *turn.shape[1:]))
    return jnp.einsum("BNTS,BTNH,BSNH,BTSNH,BSNV->BTNV", decay, q, k, turn, v)


SPEC = registry.Mechanism(
    fn=transnormerllm,
    module=TransNormerLLM,
    small=dict(num_heads=4, head_dim=8),
    papers=("transnormerllm", "lightning-attention-tnl"),
    example=_example,
    oracle=_oracle,
    variants=({}, dict(mask=masks.Causal())),
    claims=frozenset(
        {
            Claim.CAUSAL,
            Claim.MASKABLE,
            Claim.STREAMABLE,
            Claim.LINEAR_MEMORY,
            Claim.LINEAR_COMPUTE,
            Claim.FUSED,
            Claim.CONTEXT_PARALLEL,
            Claim.DENSE_TWIN,
        }
    ),
    context=("pass_state", "all_to_all"),
    carry=_carry,
)
