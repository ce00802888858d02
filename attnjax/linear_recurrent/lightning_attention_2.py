r"""Lightning Attention-2: linear attention with a fixed decay per head, tile by tile.

Paper: Qin et al., "Lightning Attention-2: A Free Lunch for Handling Unlimited Sequence Lengths in
Large Language Models", arXiv:2401.04658, section 3. The same operation in Qin et al., "Various
Lengths, Constant Speed" (TNL), arXiv:2405.17381, and MiniMax, "MiniMax-01", arXiv:2501.08313.

    o_t  = sum_{s <= t} lambda^(t - s) (q_t . k_s) v_s                  parallel form
    S_t  = lambda S_{t-1} + k_t v_t^T,          o_t = S_t^T q_t         recurrent form
    O_i  = ((Q_i K_i^T) * M) V_i + Lambda Q_i S                         a tile i of tokens, then
    S    = lambda^C S + (lambda^C Lambda^-1 K_i)^T V_i                  Lambda = diag(lambda^1..C)

Within the module: q, k = silu(projections of x), y = P_o (rms_norm(o) * sigmoid(gate)).

TNL, whose whole layer is `linear_recurrent.transnormerllm`, shows that a token costs the same in a
sequence of any length. MiniMax-01 puts softmax attention after each seven of these layers: in a
model, mixers=["lightning_attention_2"] * 7 + ["gqa(num_kv_heads=8)"]; its devices pass on states
as `parallel.pass_state` does.

Shapes: B batch, T time, N heads, H key dim, V value dim, D model dim, C chunk.
Unlike the paper: lambda is exp(-slope) with ALiBi's slopes, that shrink with depth by the factor
1 - layer / num_layers; there is no rotation in the first layer (compose with `core.positions`);
masks, packed documents and an initial state are honoured. MiniMax-01's silu of v and its experts
are left out.
"""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from attnjax.core import layers, masks, positions, recurrent, registry
from attnjax.core.registry import Claim
from attnjax.ops import decay_attention as ops
from pallas_kernels import decay_attention as kernels


def lightning_attention_2(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T N H"],
    v: Float[Array, "B T N V"],
    log_decay: Float[Array, "N"],
    *,
    mask: masks.Mask | None = None,
    initial_state: Float[Array, "B N H V"] | None = None,
    return_state: bool = False,
    implementation: kernels.Implementation | None = None,
) -> Float[Array, "B T N V"] | tuple[Float[Array, "B T N V"], Float[Array, "B N H V"]]:
    """o in v's dtype, and with `return_state` also the final state in float32. Always causal.

    Args:
      log_decay: log(lambda) <= 0, a constant: it has no gradient.
      mask: any of Causal, Valid, Segments. A padded key adds nothing, but time passes: the state
        decays there as elsewhere. Where a segment (one run of tokens) begins the state is zero.
      initial_state: of the tokens before these, in the first segment.
      implementation: "xla", "pallas" (TPU, Hopper) or "interpret"; None chooses by platform.
    """
    o, state = ops.decay_attention(
        q,
        k,
        v,
        log_decay,
        mask=mask,
        initial_state=initial_state,
        implementation=implementation,
        by="lightning_attention_2",
    )
    return (o, state) if return_state else o


def log_decays(num_heads: int, *, layer: int = 0, num_layers: int = 1) -> Float[Array, "N"]:
    """log(lambda) of each head: minus ALiBi's slopes, nearer to 0 in deeper layers.

    Raises ValueError where `layer` is not one of `num_layers`.
    """
    if not 0 <= layer < num_layers:
        raise ValueError(f"{layer=} must be at least 0 and below {num_layers=}")
    return jnp.asarray(-positions.alibi_slopes(num_heads) * (1 - layer / num_layers))


class LightningAttention2(recurrent.Recurrent):
    """Gated attention with decay over (B T D); `layer` of `num_layers` sets how slow it decays."""

    layer: int = 0
    num_layers: int = 1
    fn: Callable[..., jax.Array] = lightning_attention_2

    def setup(self):
        N, H = self.num_heads, self.head_dim
        self.query = layers.HeadProjection(N, H, self.dtype)
        self.key = layers.HeadProjection(N, H, self.dtype)
        self.value = layers.HeadProjection(N, H, self.dtype)
        self.gate = layers.HeadProjection(N, H, self.dtype)
        self.attend = layers.Attend(self.fn)
        self.norm = nn.RMSNorm(use_scale=False, reduction_axes=(-2, -1), dtype=self.dtype)
        self.out = layers.OutputProjection(self.dtype)

    def _memory(self, batch) -> Float[Array, "B N H V"]:
        return jnp.zeros((batch, self.num_heads, self.head_dim, self.head_dim))

    def _project(self, x):
        log_decay = log_decays(self.num_heads, layer=self.layer, num_layers=self.num_layers)
        return nn.silu(self.query(x)), nn.silu(self.key(x)), self.value(x), log_decay

    def _gated(self, o, x):
        return self.norm(o) * nn.sigmoid(self.gate(x))


def _carry(q, k, v, log_decay, *, mask=None):
    """What an initial state is multiplied by until the last token."""
    return ops.carry(log_decay, q.shape[1], mask=mask)


def _example(key: jax.Array, T: int) -> dict[str, jax.Array]:
    q, k, v = jax.random.normal(key, (3, 2, T, 4, 16))
    return dict(q=q, k=k, v=v, log_decay=log_decays(4))


def _oracle(q, k, v, log_decay, *, mask=None, return_state=False):
    t = jnp.arange(q.shape[1])
    power = jax.lax.stop_gradient(log_decay)[:, None, None] * (t[:, None] - t[None, :])[None]
    causal = masks.Causal() if mask is None else mask & masks.Causal()
    decay = jnp.where(masks.dense(causal, len(t), len(t)), jnp.exp(power)[None], 0)  # B N T S
    o = jnp.einsum("BNTS,BTNH,BSNH,BSNV->BTNV", decay, q, k, v)
    state = jnp.einsum("BNS,BSNH,BSNV->BNHV", decay[:, :, -1], k, v)
    return (o, state) if return_state else o


SPEC = registry.Mechanism(
    fn=lightning_attention_2,
    module=LightningAttention2,
    small=dict(num_heads=4, head_dim=8),
    papers=("lightning-attention-2", "lightning-attention-tnl", "minimax-01"),
    example=_example,
    oracle=_oracle,
    variants=({}, dict(mask=masks.Causal()), dict(return_state=True)),
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
