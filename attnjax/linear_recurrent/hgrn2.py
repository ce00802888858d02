r"""HGRN2: a recurrence whose keys are what its gates forget, over a state of outer products.

Paper: Qin et al., "HGRN2: Gated Linear RNNs with State Expansion", arXiv:2404.07904, section 3.

    f_t = gamma + (1 - gamma) sigmoid(P_f x_t)     forget gate, with a lower bound gamma
    S_t = diag(f_t) S_{t-1} + (1 - f_t) i_t^T,     o_t = S_t^T g_t
    i_t = silu(P_i x_t),  g_t = sigmoid(P_g x_t),  y = P_o norm(o)

So linear attention with keys 1 - f, queries g and values i: each row of S is an average of the
values. With H = V = 1 it is HGRN (without its rotation), and the rows are heads.

Shapes: B batch, T time, N heads, H key dim (the expansion), V value dim, D model dim.
Unlike the paper: gamma of layer l of L, a cumulated softmax of parameters shared by all layers, is
kept at what it begins with, l / L; the norm is an RMSNorm.
"""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from attnjax.core import layers, masks, recurrent, registry
from attnjax.core.registry import Claim
from attnjax.ops import forget_gate
from attnjax.ops import linear_recurrence as ops


def hgrn2(
    q: Float[Array, "B T N H"],
    log_forget: Float[Array, "B T N H"],
    v: Float[Array, "B T N V"],
    *,
    mask: masks.Mask | None = None,
    initial_state: Float[Array, "B N H V"] | None = None,
    return_state: bool = False,
) -> Float[Array, "B T N V"] | tuple[Float[Array, "B T N V"], Float[Array, "B N H V"]]:
    """o in v's dtype, and with `return_state` also the final state in float32. Always causal.

    Args:
      q, v: the output gate g and the input i.
      log_forget: log(f), finite and <= 0.
      mask: any of Causal, Valid, Segments. A padded token changes nothing. Where a segment (one
        run of tokens) begins the state is zero.
      initial_state: of the tokens before these, in the first segment.
    """
    log_forget = log_forget.astype(jnp.float32)
    options = dict(mask=mask, initial_state=initial_state, by="hgrn2")
    o, state = ops.linear_recurrence(q, -jnp.expm1(log_forget), v, log_decay=log_forget, **options)
    return (o, state) if return_state else o


class HGRN2(recurrent.Recurrent):
    """The token mixer of section 3 over (B T D); `layer` of `num_layers` sets the lower bound."""

    layer: int = 0
    num_layers: int = 1
    fn: Callable[..., jax.Array] = hgrn2

    def setup(self):
        N, H = self.num_heads, self.head_dim
        self.query = layers.HeadProjection(N, H, self.dtype)
        self.forget = layers.HeadProjection(N, H, self.dtype)
        self.value = layers.HeadProjection(N, H, self.dtype)
        self.attend = layers.Attend(self.fn)
        heads = dict(reduction_axes=(-2, -1), feature_axes=(-2, -1))
        self.norm = nn.RMSNorm(**heads, dtype=self.dtype)
        self.out = layers.OutputProjection(self.dtype)

    def _memory(self, batch) -> Float[Array, "B N H V"]:
        return jnp.zeros((batch, self.num_heads, self.head_dim, self.head_dim))

    def _project(self, x):
        bound = forget_gate.lower_bound(self.layer, self.num_layers)
        log_forget = forget_gate.log_forget(self.forget(x), bound)
        return nn.sigmoid(self.query(x)), log_forget, nn.silu(self.value(x))

    def _gated(self, o, x):
        return self.norm(o)  # the gate is the query


def _carry(q, log_forget, v, *, mask=None):
    """What an initial state is multiplied by until the last token."""
    return ops.carry(log_forget, mask=mask)


def _example(key: jax.Array, T: int) -> dict[str, jax.Array]:
    q, gate, v = jax.random.normal(key, (3, 2, T, 4, 8))
    return dict(q=q, log_forget=forget_gate.log_forget(2 * gate, 0.2), v=v)


def _oracle(q, log_forget, v, *, return_state=False):
    def step(state, x):
        q, f, v = x
        state = f[..., None] * state + (1 - f)[..., None] * v[..., None, :]
        return state, jnp.einsum("BNH,BNHV->BNV", q, state)

    xs = [x.swapaxes(0, 1) for x in (q, jnp.exp(log_forget), v)]
    state, o = jax.lax.scan(step, jnp.zeros_like(q[:, 0, ..., None] * v[:, 0, :, None]), xs)
    return (o.swapaxes(0, 1), state) if return_state else o.swapaxes(0, 1)


SPEC = registry.Mechanism(
    fn=hgrn2,
    module=HGRN2,
    small=dict(num_heads=4, head_dim=8, layer=1, num_layers=4),
    papers=("hybrid-linear-study",),
    example=_example,
    oracle=_oracle,
    variants=({}, dict(return_state=True)),
    claims=frozenset(
        {
            Claim.CAUSAL,
            Claim.MASKABLE,
            Claim.STREAMABLE,
            Claim.LINEAR_MEMORY,
            Claim.LINEAR_COMPUTE,
            Claim.CONTEXT_PARALLEL,
            Claim.DENSE_TWIN,
            Claim.FORWARD_MODE,
        }
    ),
    context=("pass_state", "all_to_all"),
    carry=_carry,
)
