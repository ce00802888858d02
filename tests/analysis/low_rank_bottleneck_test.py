"""What is particular to the low-rank bottleneck: the paper's theorem, in both directions."""

import chex
import jax
import jax.numpy as jnp
import pytest

from attnjax.analysis import low_rank_bottleneck as lib
from attnjax.core import edit
from attnjax.softmax import multi_head_attention as mha
from tests import training

KEY = jax.random.key(0)
S, D = 8, 10
TARGETS = jax.random.dirichlet(KEY, jnp.ones(16), (5, 16))  # positive rows that sum to 1


def test_a_head_as_wide_as_the_sequence_pays_any_attention():
    """Theorem 1, the half that gives: a module and tokens of full rank, for chosen weights."""
    x = jax.random.normal(KEY, (1, S, D))
    weights = jax.random.dirichlet(KEY, jnp.ones(S), (2, S))
    module = mha.MultiHeadAttention(num_heads=2, head_dim=S)
    params = module.init(KEY, x)["params"]
    for name, y in zip(("query", "key"), lib.queries_and_keys(weights, S), strict=True):
        kernel = jnp.einsum("DT,NTH->DNH", jnp.linalg.pinv(x[0]), y)
        params = params | {name: {"heads": {"kernel": kernel}}}
    _, maps = edit.read(module.apply)({"params": params}, x)
    chex.assert_trees_all_close(maps["attend"][0], weights, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("head_dim", [1, 3, 7])
def test_a_narrower_head_cannot(head_dim):
    """The half that takes: whatever queries and keys are, their weights need no more features."""
    q, k = jax.random.normal(KEY, (2, 4, 16, head_dim))
    needed = lib.low_rank_bottleneck(jax.nn.softmax(q @ k.mT))["needed"]
    chex.assert_trees_all_equal(needed, jnp.full(4, head_dim))
    assert (lib.low_rank_bottleneck(TARGETS)["needed"] == 15).all()  # of 16 tokens


def test_divergence_falls_with_the_head_dim_to_nothing():
    found = [lib.low_rank_bottleneck(TARGETS, head_dim=H) for H in (2, 4, 8, 15, 16, 20)]
    divergence = [float(f["divergence"].max()) for f in found]
    kept = [float(f["kept"].min()) for f in found]
    assert divergence[0] > divergence[1] > divergence[2] > 0.03 and kept[0] < kept[1] < kept[2] < 1
    assert max(divergence[3:]) < 1e-6 and min(kept[3:]) > 1 - 1e-6


@pytest.mark.parametrize("head_dim, least, most", [(2, 0.05, 1.0), (15, 0.0, 1e-3)])
def test_what_can_be_learned_is_bounded_likewise(head_dim, least, most):
    """The divergence is that of one choice of queries and keys; the best isn't much better."""
    target = TARGETS[0]
    q, k = lib.queries_and_keys(target, head_dim)

    def loss(pair, _):
        log = jax.nn.log_softmax(pair[0] @ pair[1].mT * head_dim**-0.5)
        return jnp.sum(target * (jnp.log(target) - log)) / 16

    fitted = training.fit(loss, (q, k), steps=500, learning_rate=1e-2)
    bound = float(lib.low_rank_bottleneck(target, head_dim=head_dim)["divergence"])
    assert least <= loss(fitted, None) <= min(most, bound + 1e-3)


def test_the_head_dim_is_free_of_the_model_dim():
    x = jax.random.normal(KEY, (1, 5, D))
    params = mha.MultiHeadAttention(num_heads=3, head_dim=S).init(KEY, x)
    assert sum(p.size for p in jax.tree.leaves(params)) == 4 * D * 3 * S


def test_refuses_a_head_without_features():
    with pytest.raises(ValueError, match="head_dim=0 must be at least 1"):
        lib.low_rank_bottleneck(TARGETS, head_dim=0)
