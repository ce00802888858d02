"""Only what is particular to HGRN; the rest is tests/conformance_test.py."""

import chex
import jax
import jax.numpy as jnp
import pytest

from attnjax.linear_recurrent import hgrn as lib

KEY = jax.random.key(0)


def test_an_input_turns_and_fades():
    """f^t (1 - f) e^(i t theta): the answer to a single 1."""
    t, f, theta = jnp.arange(200), jnp.array([0.9, 0.99]), jnp.array([[0.3, 0.0]])
    v = jnp.zeros((1, 200, 1, 4)).at[0, 0, 0, :2].set(1.0)
    log_forget = jnp.broadcast_to(jnp.log(f)[None, None, None], (1, 200, 1, 2))
    size = (1 - f)[None] * f[None] ** t[:, None]
    turn = t[:, None] * theta
    expected = jnp.concatenate([size * jnp.cos(turn), size * jnp.sin(turn)], -1)
    actual = lib.hgrn(v, log_forget, theta)[0, :, 0]
    chex.assert_trees_all_close(actual, expected, rtol=1e-4, atol=1e-8)  # 200 rounded factors


def test_without_angles_it_is_an_average_of_the_past():
    args = lib.SPEC.example(KEY, 150)
    args |= dict(theta=jnp.zeros((4, 8)), v=jnp.full_like(args["v"], 3.0))
    forgotten = jnp.exp(jnp.cumsum(args["log_forget"], 1))
    expected = 3 * (1 - jnp.concatenate([forgotten, forgotten], -1))
    chex.assert_trees_all_close(lib.hgrn(**args), expected, rtol=1e-4, atol=1e-5)


def test_never_grows_beyond_its_inputs():
    args = lib.SPEC.example(KEY, 300)
    size = lambda x: jnp.hypot(*jnp.split(x, 2, -1))
    assert size(lib.hgrn(**args)).max() <= size(args["v"]).max()


def test_higher_layers_forget_more_slowly():
    """The headline: the same projections, and memories that are longer with each layer."""
    x = jax.random.normal(KEY, (1, 20, 8))
    params = lib.HGRN(num_heads=2, head_dim=4).init(KEY, x)
    kept = []
    for layer in range(4):
        module = lib.HGRN(num_heads=2, head_dim=4, layer=layer, num_layers=4)
        given = {}

        def spy(*arrays, given=given, **options):
            given["log_forget"] = arrays[1]
            return lib.hgrn(*arrays, **options)

        module.clone(fn=spy).apply(params, x)
        f = jnp.exp(given["log_forget"])
        gate = jax.nn.sigmoid(
            jnp.einsum("BTD,DNH->BTNH", x, params["params"]["forget"]["heads"]["kernel"])
        )
        chex.assert_trees_all_close(f, layer / 4 + (1 - layer / 4) * gate, rtol=1e-5)
        kept.append(f.min())
    assert kept[0] < 0.25 <= kept[1] < 0.5 <= kept[2] < 0.75 <= kept[3]


def test_module_norms_what_its_gate_lets_out():
    module = lib.HGRN(num_heads=2, head_dim=4)
    x = jax.random.normal(KEY, (1, 5, 8))
    params = module.init(KEY, x)
    w = params["params"]
    heads = lambda name: jnp.einsum("BTD,DNH->BTNH", x, w[name]["heads"]["kernel"])
    log_forget = jax.nn.log_sigmoid(heads("forget"))
    h = lib.hgrn(jax.nn.silu(heads("value")), log_forget, w["theta"]["table"])
    h = jax.nn.sigmoid(heads("gate")) * h
    centred = h - h.mean((-2, -1), keepdims=True)
    h = centred / jnp.sqrt((centred**2).mean((-2, -1), keepdims=True) + 1e-6)
    expected = jnp.einsum("BTNV,NVD->BTD", h, w["out"]["merge"]["kernel"])
    chex.assert_trees_all_close(module.apply(params, x), expected, rtol=1e-4, atol=1e-5)


def test_angles_begin_as_a_scale_over_all_heads():
    expected = (10_000.0 ** (-jnp.arange(6) / 3)).reshape(2, 3)
    chex.assert_trees_all_close(lib.angles(2, 3), expected, rtol=1e-5)


def test_wrong_arguments_raise():
    args = lib.SPEC.example(KEY, 3)
    with pytest.raises(ValueError, match=r"v \(2, 3, 4, 8\) must have twice as many features"):
        lib.hgrn(args["v"][..., :8], args["log_forget"], args["theta"])
    with pytest.raises(ValueError, match="layer=4 must be at least 0 and below num_layers=4"):
        lib.HGRN(num_heads=2, head_dim=4, layer=4, num_layers=4).init(KEY, jnp.zeros((1, 2, 8)))
