r"""Mamba: a recurrence whose steps, writes and reads each token chooses (S6), behind a gate.

Paper: Gu and Dao, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces",
arXiv:2312.00752, algorithm 2 and section 3.4.

    y = P_o (ssm(u) * silu(P_z x)),                 u = silu(conv(P_u x))

    ssm: h_t = exp(delta_t rate) h_{t-1} + delta_t u_t b_t,   out_t = h_t . c_t + skip u_t
         [r_t, b_t, c_t] = u_t select,   delta_t = softplus(r_t widen + bias)

with rate = -exp(log_rate), h having M entries for each channel. delta_t, of each channel, says how
much of the state goes and how much of the token comes: at 0 the token is passed over, and when it
is large all before it is forgotten. A convolution, whose steps are all alike, has no such choice.

Shapes: B batch, T time, N heads, H channels of a head, M entries of a state, R rank of the steps,
F = R + 2M, D model dim; conv is causal and short, for each channel by itself, and its last tokens
are a part of the state.
Unlike the paper: channels may be grouped in heads, each of which chooses by its own channels alone,
and by which the layer is split over devices; one head is the paper's. The convolution has no bias.
"""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from attnjax.core import layers, masks, recurrent, registry, selection, short_conv
from attnjax.core.registry import Claim
from attnjax.ops import selective_scan as ops
from pallas_kernels import selective_scan as kernels


def mamba(
    u: Float[Array, "B T N H"],
    select: Float[Array, "N H F"],
    widen: Float[Array, "N R H"],
    bias: Float[Array, "N H"],
    log_rate: Float[Array, "N H M"],
    skip: Float[Array, "N H"],
    *,
    mask: masks.Mask | None = None,
    initial_state: Float[Array, "B N H M"] | None = None,
    return_state: bool = False,
    implementation: kernels.Implementation | None = "xla",
) -> Float[Array, "B T N H"] | tuple[Float[Array, "B T N H"], Float[Array, "B N H M"]]:
    """ssm(u) in u's dtype, and with `return_state` also the last h in float32. Always causal.

    Args:
      mask: any of Causal, Valid, Segments. A padded token changes nothing. Where a segment (one
        run of tokens) begins h is zero.
      initial_state: h of the token before these, in the first segment.
      implementation: of the scan, as in `ops.selective_scan`.

    Raises ValueError for weights that don't fit each other.
    """
    options = dict(mask=mask, initial_state=initial_state, by="mamba")
    options |= dict(implementation=implementation)
    y, state = ops.selected_scan(u, select, widen, bias, log_rate, skip, **options)
    return (y, state) if return_state else y


class Mamba(recurrent.Recurrent):
    """The block of section 3.4 over (B T D), of `expand` head_dim channels in each head.

    `state` and `rank` as in `core.selection`. What is remembered is h, and what the convolution
    still sees.
    """

    expand: int = 2
    state: int = 16
    rank: int | None = None
    conv_width: int = 4
    fn: Callable[..., jax.Array] = mamba

    def setup(self):
        N, H = self.num_heads, self.expand * self.head_dim
        self.input = short_conv.ConvProjection(N, H, self.conv_width, self.dtype)
        self.selection = selection.Selection(N, H, self.state, self.rank)
        self.attend = layers.Attend(self.fn)
        self.gate = layers.HeadProjection(N, H, self.dtype)
        self.out = layers.OutputProjection(self.dtype)

    def _memory(self, batch) -> Float[Array, "B N H M"]:
        return jnp.zeros((batch, self.num_heads, self.expand * self.head_dim, self.state))

    def _before(self, batch):
        return self.input.init_state(batch)

    def _project_after(self, x, before, mask):
        u, before = self.input(x, before, mask=mask)
        return (u, *self.selection()), before

    def _gated(self, y, x):
        return y * nn.silu(self.gate(x))


def _carry(u, select, widen, bias, log_rate, skip, *, mask=None):
    """What an initial state is multiplied by until the last token."""
    delta, _, _ = ops.choose(u, select, widen, bias)
    return ops.carry(delta, -jnp.exp(log_rate.astype(jnp.float32)), mask=mask)


def _example(key: jax.Array, T: int) -> dict[str, jax.Array]:
    keys = jax.random.split(key, 6)
    return dict(
        u=jax.random.normal(keys[0], (2, T, 2, 4)),
        select=jax.random.normal(keys[1], (2, 4, 7)) / 2,
        widen=jax.random.normal(keys[2], (2, 1, 4)),
        bias=jax.random.normal(keys[3], (2, 4)) - 1,
        log_rate=jax.random.normal(keys[4], (2, 4, 3)),
        skip=jax.random.normal(keys[5], (2, 4)),
    )


def _oracle(u, select, widen, bias, log_rate, skip, *, return_state=False):
    R, M = widen.shape[1], log_rate.shape[2]

    def step(h, u):
        r, b, c = jnp.split(jnp.einsum("BNH,NHF->BNF", u, select), [R, R + M], -1)
        delta = jnp.logaddexp(jnp.einsum("BNR,NRH->BNH", r, widen) + bias[None], 0)[..., None]
        decay = jnp.exp(-delta * jnp.exp(log_rate)[None])
        h = decay * h + delta * u[..., None] * b[:, :, None]
        return h, jnp.einsum("BNHM,BNM->BNH", h, c) + skip[None] * u

    h = jnp.zeros((*u[:, 0].shape, M), u.dtype)
    h, y = jax.lax.scan(step, h, u.swapaxes(0, 1))
    return (y.swapaxes(0, 1), h) if return_state else y.swapaxes(0, 1)


SPEC = registry.Mechanism(
    fn=mamba,
    module=Mamba,
    small=dict(num_heads=2, head_dim=8, state=4, rank=2),
    papers=(),  # not in the catalogue; others of its family build on it
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
            Claim.FUSED,
            Claim.CONTEXT_PARALLEL,
            Claim.FORWARD_MODE,
        }
    ),
    context=("pass_state",),
    carry=_carry,
)
