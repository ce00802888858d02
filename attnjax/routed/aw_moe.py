r"""AW-MoE: a user's history chooses the experts, by attention that adds up votes instead of values.

Paper: Gong et al., "Attention Weighted Mixture of Experts with Contrastive Learning for
Personalized Ranking in E-commerce", arXiv:2306.05011.

    g_t  = sum_s a_ts g_ts                     over the items s of the history
    g_ts = gate unit of [h_s, x_t, h_s x_t]         a vote for each of E experts
    a_ts = activation unit of the same              a weight, of any sign and without a softmax
    y_t  = sum_e g_te expert_e(x_t)                 all experts are computed
    unit(z) = relu(z W) U,      expert_e(x) = relu(x W_e) U_e

x is what is to be ranked: items, or queries with items. Users with a short history get the gates
that they would have with a long one by a loss that draws g of a history and g of a random part of
it together, and apart from those of other users:

    loss = -mean log(exp(c_ii) / sum_j exp(c_ij)),      c_ij = cos(g_i, g'_j) / temperature

Shapes: B batch, T things to rank, S items of a history, E experts, D model dim, F width of an
expert, U width of a unit; in the loss B users.
Unlike the paper: units and experts have one hidden layer and no biases, and an expert sees x alone,
into which a model may put the user, too. What the paper's units take, whether its a is normalised
and how its loss compares gates is not known here: the choices are those of DIN and of InfoNCE. That
users with short histories are served better is the paper's result, not seen here: on a toy of users
of four types the loss drew gates together, and the ranking was no better.
"""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Key

from attnjax.core import layers, masks, registry
from attnjax.core.registry import Claim


def aw_moe(
    experts: Float[Array, "B T E F"],
    x: Float[Array, "B T D"],
    history: Float[Array, "B S D"],
    gate_in: Float[Array, "3*D U"],
    gate_out: Float[Array, "U E"],
    activation_in: Float[Array, "3*D U"],
    activation_out: Float[Array, "U 1"],
    *,
    mask: masks.Mask | None = None,
) -> Float[Array, "B T E F"]:
    """g_te times the hidden layer of expert e for x_t, in experts' dtype; O(T S (D + U)) memory.

    The other arrays and `mask`: see `gates`. A thing that sees no item of the history gives zeros.
    """
    g = gates(x, history, gate_in, gate_out, activation_in, activation_out, mask=mask)
    return (g[..., None] * experts).astype(experts.dtype)


def gates(
    x: Float[Array, "B T D"],
    history: Float[Array, "B S D"],
    gate_in: Float[Array, "3*D U"],
    gate_out: Float[Array, "U E"],
    activation_in: Float[Array, "3*D U"],
    activation_out: Float[Array, "U 1"],
    *,
    mask: masks.Mask | None = None,
) -> Float[Array, "B T E"]:
    """g in float32.

    Args:
      gate_in, gate_out, activation_in, activation_out: W and U of either unit.
      mask: which items of the history are seen. ValueError for one that differs between heads.
    """
    seen = masks.dense(mask, x.shape[1], history.shape[1])
    if seen.shape[1] != 1:
        raise ValueError(f"mask for {seen.shape[1]} heads must be for 1")
    votes = _unit(x, history, gate_in, gate_out)
    a = jnp.where(seen[:, 0], _unit(x, history, activation_in, activation_out)[..., 0], 0.0)
    return jnp.einsum("BTS,BTSE->BTE", a, votes)


def _unit(x, history, w_in, w_out):
    """Of every thing with every item: (B T S O)."""
    x, history, w_in, w_out = (a.astype(jnp.float32) for a in (x, history, w_in, w_out))
    of_item, of_thing, of_both = jnp.split(w_in, 3)
    both = x[:, :, None] * history[:, None]
    z = both @ of_both + (history @ of_item)[:, None] + (x @ of_thing)[:, :, None]
    return jax.nn.relu(z) @ w_out


def contrastive_loss(
    gates: Float[Array, "B E"], others: Float[Array, "B E"], *, temperature: float = 0.1
) -> Float[Array, ""]:
    """The loss of the users' gates against those by a part of their history; at least 0."""
    unit = lambda g: g / jnp.sqrt((g.astype(jnp.float32) ** 2).sum(-1, keepdims=True) + 1e-12)
    c = unit(gates) @ unit(others).T / temperature
    return -jnp.diagonal(jax.nn.log_softmax(c)).mean()


def hide_items(
    key: Key[Array, ""], valid: Bool[Array, "B S"], *, rate: float
) -> Bool[Array, "B S"]:
    """`valid` with each item hidden at this rate, as if the user had a shorter history.

    Raises ValueError for a rate that is not in [0, 1].
    """
    if not 0 <= rate <= 1:
        raise ValueError(f"{rate=} must be in [0, 1]")
    return valid & jax.random.bernoulli(key, 1 - rate, valid.shape)


class AwMoe(nn.Module):
    """y for x (B T D) by the history in context (B S D), both of one embedding."""

    num_experts: int = 4
    expert_dim: int = 64
    unit_dim: int = 32
    dtype: DTypeLike | None = None
    fn: Callable[..., jax.Array] = aw_moe

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        context: Float[Array, "B S D"],
        *,
        mask: masks.Mask | None = None,
    ) -> Float[Array, "B T D"]:
        """`mask` says which items of the history are seen."""
        E, U, D = self.num_experts, self.unit_dim, x.shape[-1]
        shapes = dict(gate_in=(3 * D, U), gate_out=(U, E))
        shapes |= dict(activation_in=(3 * D, U), activation_out=(U, 1))
        init = nn.initializers.lecun_normal()
        units = [layers.Table(shape, init, name=name)() for name, shape in shapes.items()]
        hidden = nn.relu(layers.HeadProjection(E, self.expert_dim, self.dtype, name="experts")(x))
        o = layers.Attend(self.fn, name="attend")(hidden, x, context, *units, mask=mask)
        return layers.OutputProjection(self.dtype, name="out")(o, D)


def _example(key: jax.Array, T: int) -> dict[str, jax.Array]:
    draw = lambda i, *shape: jax.random.normal(jax.random.fold_in(key, i), shape)
    units = dict(gate_in=draw(0, 18, 5), gate_out=draw(1, 5, 4))
    units |= dict(activation_in=draw(2, 18, 5), activation_out=draw(3, 5, 1))
    return dict(experts=draw(4, 2, T, 4, 3), x=draw(5, 2, T, 6), history=draw(6, 2, 8, 6)) | units


def _oracle(experts, x, history, gate_in, gate_out, activation_in, activation_out, *, mask=None):
    def thing(experts, x, history, seen):
        def item(h, seen):
            z = jnp.concatenate([h, x, h * x])
            a = jnp.maximum(z @ activation_in, 0) @ activation_out
            return jnp.where(seen, a * (jnp.maximum(z @ gate_in, 0) @ gate_out), 0)

        return jax.vmap(item)(history, seen).sum(0)[:, None] * experts

    (B, T), S = x.shape[:2], history.shape[1]
    seen = jnp.broadcast_to(masks.dense(mask, T, S)[:, 0], (B, T, S))
    return jax.vmap(jax.vmap(thing, (0, 0, None, 0)))(experts, x, history, seen)


SPEC = registry.Mechanism(
    fn=aw_moe,
    module=AwMoe,
    small=dict(num_experts=3, expert_dim=8, unit_dim=8),
    papers=("aw-moe",),
    example=_example,
    oracle=_oracle,
    layout="cross",
    variants=({}, dict(mask=masks.Prefix(3))),
    claims=frozenset({Claim.MASKABLE, Claim.FORWARD_MODE}),
)
