r"""Limits of softmax: how far it can set a few tokens apart, and what that costs the gradient.

Paper: Mudarisov et al., "Limitations of Normalization in Attention Mechanism", arXiv:2508.17821,
sections on distances, geometric separability and gradients.

    a = softmax(logits / temperature),    s = sum over the top tokens of a_i x_i
    mass            = sum over the top tokens of a_i
    distance        = |sum over the other tokens of a_i x_i - s|
    distinguishable = share of the top tokens with |a_i x_i - s| < min over the others |a_j x_j - s|
    jacobian_norm   = |(diag(a) - a a^T) / temperature|_2  <=  1 / (2 temperature)
    max_weight     <= e^r / (e^r + S - 1),    r = (max logit - min logit) / temperature

With bounded logits every weight is O(1/S): softmax can't pick a token out of many. A low
temperature can, but its Jacobian, and so the gradient, grows as 1/temperature.

Shapes: B any leading axes, S tokens, D features.
Unlike the paper: it bounds the Jacobian by 1/(4 temperature), which holds for its entries; the
spectral norm reaches twice that for two equal weights. The bound of the largest weight is the
tight one, attained where all other logits are equal; the paper's is e^r / S. That a token is
distinguishable is judged against the nearest of the others.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from attnjax.core import registry


def softmax_limits(
    logits: Float[Array, "*B S"],
    x: Float[Array, "*B S D"],
    *,
    top: int = 4,
    temperature: float = 1.0,
) -> dict[str, Float[Array, "*B"]]:
    """The statistics above, in float32, for each row of logits over the tokens x.

    Raises ValueError where `top` is not between 1 and S - 1.
    """
    S = logits.shape[-1]
    if not 1 <= top < S:
        raise ValueError(f"{top=} must be at least 1 and less than {S=}")
    logits, x = logits.astype(jnp.float32), x.astype(jnp.float32)
    a = jax.nn.softmax(logits / temperature)
    chosen = jax.nn.one_hot(jax.lax.top_k(logits, top)[1], S).sum(-2)  # 1 for a top token, else 0
    scaled = a[..., None] * x
    s = jnp.einsum("...S,...SD->...D", chosen, scaled)
    from_s = jnp.linalg.norm(scaled - s[..., None, :], axis=-1)
    nearest = jnp.min(from_s, -1, where=chosen == 0, initial=jnp.inf)
    return dict(
        mass=(chosen * a).sum(-1),
        distance=jnp.linalg.norm(scaled.sum(-2) - 2 * s, axis=-1),
        distinguishable=(chosen * (from_s < nearest[..., None])).sum(-1) / top,
        jacobian_norm=jacobian_norm(a, temperature=temperature),
        jacobian_bound=jnp.full(a.shape[:-1], 1 / (2 * temperature)),
        max_weight=a.max(-1),
        max_weight_bound=weight_bound(jnp.ptp(logits, -1), S, temperature=temperature),
    )


def jacobian_norm(weights: Float[Array, "*B S"], *, temperature: float = 1.0) -> Float[Array, "*B"]:
    """The largest singular value of the Jacobian of softmax, by its weights; O(S^3)."""
    S = weights.shape[-1]
    outer = weights[..., :, None] * weights[..., None, :]
    diagonal = weights[..., None] * jnp.eye(S).reshape((1,) * (weights.ndim - 1) + (S, S))
    return jnp.linalg.eigvalsh(diagonal - outer)[..., -1] / temperature


def weight_bound(
    spread: Float[Array, "*B"], count: int, *, temperature: float = 1.0
) -> Float[Array, "*B"]:
    """The most that one of `count` weights can be where logits differ by at most `spread`."""
    return 1 / (1 + (count - 1) * jnp.exp(-spread / temperature))


def _example(key: jax.Array, T: int) -> dict[str, jax.Array]:
    keys = jax.random.split(key)
    logits = jax.random.normal(keys[0], (2, 3, T + 7))
    return dict(logits=logits, x=jax.random.normal(keys[1], (2, 3, T + 7, 5)))


def _oracle(logits, x, *, top=4, temperature=1.0):
    def row(logits, x):
        S = len(logits)
        softmax = lambda logits: jnp.exp(logits / temperature) / jnp.exp(logits / temperature).sum()
        a, order = softmax(logits), jnp.argsort(-logits)
        first, rest = order[:top], order[top:]
        parts = a[:, None] * x
        s = parts[first].sum(0)
        radius = jnp.sqrt(((parts[rest] - s[None]) ** 2).sum(1)).min()
        near = jnp.sqrt(((parts[first] - s[None]) ** 2).sum(1)) < radius
        spread = jnp.exp((logits.max() - logits.min()) / temperature)
        return dict(
            mass=a[first].sum(),
            distance=jnp.sqrt(((parts[rest].sum(0) - s) ** 2).sum()),
            distinguishable=near.mean(),
            jacobian_norm=jnp.linalg.norm(jax.jacobian(softmax)(logits), 2),
            jacobian_bound=jnp.array(0.5 / temperature),
            max_weight=a.max(),
            max_weight_bound=spread / (spread + S - 1),
        )

    return jax.vmap(jax.vmap(row))(logits, x)


SPEC = registry.Probe(
    fn=softmax_limits,
    papers=("softmax-limits",),
    example=_example,
    oracle=_oracle,
    variants=({}, dict(top=1, temperature=0.5)),
)
