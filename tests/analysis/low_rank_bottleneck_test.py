"""What is particular to the low-rank bottleneck: the paper's theorem, in both directions."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnjax.analysis import low_rank_bottleneck as lib
from attnjax.core import edit
from attnjax.softmax import multi_head_attention as mha
from tests import training
from tests.cotangents import like

KEY = jax.random.key(0)
S, D = 8, 10
TARGETS = np.random.default_rng(0).dirichlet(np.ones(16), (5, 16)).astype(np.float32)


def draw(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def test_a_head_as_wide_as_the_sequence_pays_any_attention():
    """Theorem 1, the half that gives: a module and tokens of full rank, for chosen weights."""
    x = draw(1, S, D)
    weights = np.random.default_rng(1).dirichlet(np.ones(S), (2, S)).astype(np.float32)
    module = mha.MultiHeadAttention(num_heads=2, head_dim=S)
    params = like(jax.eval_shape(module.init, KEY, x))["params"]

    @jax.jit
    def map_of(params, x, inverse, weights):
        kernels = {}
        for name, y in zip(("query", "key"), lib.queries_and_keys(weights, S), strict=True):
            kernels[name] = {"heads": {"kernel": jnp.einsum("DT,NTH->DNH", inverse, y)}}
        _, maps = edit.read(module.apply)({"params": params | kernels}, x)
        return maps["attend"][0]

    found = map_of(params, x, np.linalg.pinv(x[0]), weights)
    chex.assert_trees_all_close(found, weights, rtol=1e-3, atol=1e-5)


@jax.jit
def bottleneck(weights):
    return lib.low_rank_bottleneck(weights)["needed"]


@pytest.mark.parametrize("head_dim", [1, 3, 7])
def test_a_narrower_head_cannot(head_dim):
    """The half that takes: whatever queries and keys are, their weights need no more features."""
    q, k = draw(2, 5, 16, head_dim)
    e = np.exp(q.astype(float) @ k.swapaxes(1, 2))
    weights = (e / e.sum(-1, keepdims=True)).astype(np.float32)
    assert (jax.device_get(bottleneck(weights)) == head_dim).all()
    assert (jax.device_get(bottleneck(TARGETS)) == 15).all()  # of 16 tokens


def test_divergence_falls_with_the_head_dim_to_nothing():
    dims = (2, 4, 8, 15, 16, 20)
    run = lambda x: [lib.low_rank_bottleneck(x, head_dim=H) for H in dims]
    found = jax.device_get(jax.jit(run)(TARGETS))
    divergence = [float(f["divergence"].max()) for f in found]
    kept = [float(f["kept"].min()) for f in found]
    assert divergence[0] > divergence[1] > divergence[2] > 0.03 and kept[0] < kept[1] < kept[2] < 1
    assert max(divergence[3:]) < 1e-6 and min(kept[3:]) > 1 - 1e-6


@pytest.mark.parametrize("head_dim, least, most", [(2, 0.05, 1.0), (15, 0.0, 1e-3)])
def test_what_can_be_learned_is_bounded_likewise(head_dim, least, most):
    """The divergence is that of one choice of queries and keys; the best isn't much better."""
    target = TARGETS[0]
    begin = jax.jit(
        lambda x: (
            lib.queries_and_keys(x, head_dim),
            lib.low_rank_bottleneck(x, head_dim=head_dim)["divergence"],
        )
    )
    pair, bound = jax.device_get(begin(target))

    def loss(pair, _):
        log = jax.nn.log_softmax(pair[0] @ pair[1].mT * head_dim**-0.5)
        return jnp.sum(target * (np.log(target) - log)) / 16

    fitted = training.fit(loss, pair, steps=500, learning_rate=1e-2)
    assert least <= jax.jit(loss)(fitted, None) <= min(most, float(bound) + 1e-3)


def test_the_head_dim_is_free_of_the_model_dim():
    module = mha.MultiHeadAttention(num_heads=3, head_dim=S)
    params = jax.eval_shape(module.init, KEY, draw(1, 5, D))
    assert sum(p.size for p in jax.tree.leaves(params)) == 4 * D * 3 * S


def test_refuses_a_head_without_features():
    with pytest.raises(ValueError, match="head_dim=0 must be at least 1"):
        jax.eval_shape(lambda x: lib.low_rank_bottleneck(x, head_dim=0), TARGETS)
