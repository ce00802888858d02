r"""HGRN: a linear recurrence of vectors, with forget gates that close less in higher layers.

Paper: Qin et al., "Hierarchically Gated Recurrent Neural Network for Sequence Modeling",
arXiv:2311.04823, section 3.

    f_t = gamma + (1 - gamma) sigmoid(P_f x_t)                    with a lower bound gamma
    h_t = f_t e^(i theta) h_{t-1} + (1 - f_t) c_t                 complex, each entry by itself
    c_t = silu(P_r x_t) + i silu(P_i x_t),   g_t = sigmoid(P_g x_t)
    y_t = P_o layer_norm(g_t * [Re h_t, Im h_t])

Shapes: B batch, T time, N heads, H entries of a head, V = 2H, D model dim. The paper has no heads;
here they are groups of entries, by which the layer is split over devices.
Unlike the paper: gamma of layer l of L, a cumulated softmax of parameters shared by all layers, is
kept at what it begins with, l / L; the projections have no biases.
"""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Complex, Float

from attnjax.core import layers, masks, recurrent, registry
from attnjax.core.registry import Claim
from attnjax.ops import elementwise_recurrence as ops
from attnjax.ops import forget_gate


def hgrn(
    v: Float[Array, "B T N V"],
    log_forget: Float[Array, "B T N H"],
    theta: Float[Array, "N H"],
    *,
    mask: masks.Mask | None = None,
    initial_state: Complex[Array, "B N H"] | None = None,
    return_state: bool = False,
) -> Float[Array, "B T N V"] | tuple[Float[Array, "B T N V"], Complex[Array, "B N H"]]:
    """[Re h, Im h] in v's dtype, and with `return_state` also the last h. Always causal.

    Args:
      v: [Re c, Im c], so V = 2H.
      log_forget: log(f) <= 0.
      theta: angle by which an entry turns with each token.
      mask: any of Causal, Valid, Segments. A padded token changes nothing. Where a segment (one
        run of tokens) begins h is zero.
      initial_state: h of the token before these, in the first segment.

    Raises ValueError where V is not 2H.
    """
    if v.shape[-1] != 2 * theta.shape[-1]:
        raise ValueError(f"v {v.shape} must have twice as many features as theta {theta.shape}")
    real, imaginary = jnp.split(v.astype(jnp.float32), 2, -1)
    given = -jnp.expm1(log_forget.astype(jnp.float32)) * jax.lax.complex(real, imaginary)
    options = dict(mask=mask, initial_state=initial_state, by="hgrn")
    h, state = ops.elementwise_recurrence(_turn(log_forget, theta), given, **options)
    o = jnp.concatenate([h.real, h.imag], -1).astype(v.dtype)
    return (o, state) if return_state else o


def _turn(log_forget, theta):
    """f e^(i theta)."""
    theta = jnp.broadcast_to(theta.astype(jnp.float32)[None, None], log_forget.shape)
    return jnp.exp(jax.lax.complex(log_forget.astype(jnp.float32), theta))


def angles(num_heads: int, head_dim: int) -> Float[Array, "N H"]:
    """What theta begins as: 10000^(-2j/D') for entry j of all D' = N H."""
    count = num_heads * head_dim
    return (10_000.0 ** (-2 * jnp.arange(count) / count)).reshape(num_heads, head_dim)


class HGRN(recurrent.Recurrent):
    """The token mixer of section 3 over (B T D); `layer` of `num_layers` sets the lower bound."""

    layer: int = 0
    num_layers: int = 1
    fn: Callable[..., jax.Array] = hgrn

    def setup(self):
        N, H = self.num_heads, self.head_dim
        self.value = layers.HeadProjection(N, 2 * H, self.dtype)
        self.forget = layers.HeadProjection(N, H, self.dtype)
        self.theta = layers.Table((N, H), lambda key, shape: angles(*shape))
        self.attend = layers.Attend(self.fn)
        self.gate = layers.HeadProjection(N, 2 * H, self.dtype)
        heads = dict(reduction_axes=(-2, -1), feature_axes=(-2, -1))
        self.norm = nn.LayerNorm(**heads, dtype=self.dtype)
        self.out = layers.OutputProjection(self.dtype)

    def _memory(self, batch) -> Complex[Array, "B N H"]:
        return jnp.zeros((batch, self.num_heads, self.head_dim), jnp.complex64)

    def _project(self, x):
        bound = forget_gate.lower_bound(self.layer, self.num_layers)
        log_forget = forget_gate.log_forget(self.forget(x), bound)
        return nn.silu(self.value(x)), log_forget, self.theta()

    def _gated(self, o, x):
        return self.norm(nn.sigmoid(self.gate(x)) * o)


def _carry(v, log_forget, theta, *, mask=None):
    """What an initial state is multiplied by until the last token."""
    return ops.carry(_turn(log_forget, theta), mask=mask)


def _example(key: jax.Array, T: int) -> dict[str, jax.Array]:
    keys = jax.random.split(key, 2)
    v, gate = jax.random.normal(keys[0], (2, T, 4, 16)), jax.random.normal(keys[1], (2, T, 4, 8))
    return dict(v=v, log_forget=forget_gate.log_forget(2 * gate, 0.2), theta=angles(4, 8))


def _oracle(v, log_forget, theta):
    """Token by token, without complex numbers."""
    cos, sin = jnp.cos(theta)[None], jnp.sin(theta)[None]

    def step(h, x):
        (re, im), (f, c_re, c_im) = h, x
        h = f * (re * cos - im * sin) + (1 - f) * c_re, f * (re * sin + im * cos) + (1 - f) * c_im
        return h, jnp.concatenate(h, -1)

    f, parts = jnp.exp(log_forget), jnp.split(v, 2, -1)
    xs = [x.swapaxes(0, 1) for x in (f, *parts)]
    return jax.lax.scan(step, (jnp.zeros_like(f[:, 0]),) * 2, xs)[1].swapaxes(0, 1)


SPEC = registry.Mechanism(
    fn=hgrn,
    module=HGRN,
    small=dict(num_heads=4, head_dim=8, layer=1, num_layers=4),
    papers=("hybrid-linear-study",),
    example=_example,
    oracle=_oracle,
    claims=frozenset(
        {
            Claim.CAUSAL,
            Claim.MASKABLE,
            Claim.STREAMABLE,
            Claim.LINEAR_MEMORY,
            Claim.LINEAR_COMPUTE,
            Claim.CONTEXT_PARALLEL,
            Claim.FORWARD_MODE,
        }
    ),
    context=("pass_state", "all_to_all"),
    carry=_carry,
)
