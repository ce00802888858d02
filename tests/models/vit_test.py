import functools

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

from attnjax.core import registry
from attnjax.models import vit
from tests.initial import initial
from tests.models import helpers

GRIDS = helpers.named("grid")


@pytest.mark.parametrize("name", helpers.named("sequence", "grid", "set"))
def test_every_mechanism_by_name(name):
    """A module that conformance_test judges leaves to be seen that the model takes it."""
    record, text = helpers.MECHANISMS[name], helpers.text(name)
    mixer = registry.build(text, num_heads=2, head_dim=24, dtype=None)
    model = helpers.vit(**(dict(pool=text) if record.layout == "set" else dict(mixers=[text])))
    y, _ = helpers.shapes_of(model)
    assert y.shape == (2, 5) and y.dtype == jnp.float32
    if mixer != record.module(**record.small):  # a layer gives it more options
        assert_sees_an_image(model)


LAYOUTS = dict(
    sequences_and_grids=dict(mixers=["multi_head_attention", helpers.text(GRIDS[0])], depth=2),
    set=dict(pool=helpers.text(helpers.named("set")[0])),
)


@pytest.mark.parametrize("options", LAYOUTS.values(), ids=LAYOUTS)
def test_an_image_is_seen_through_every_layout(options):
    assert_sees_an_image(helpers.vit(**options))


def assert_sees_an_image(model):
    y, changed = outputs(model, helpers.images(), moved())
    assert np.isfinite(y).all() and not np.allclose(y[0], changed[0])
    np.testing.assert_allclose(y[1], changed[1], rtol=1e-5, atol=1e-6)


def moved():
    """The images with another pixel in the first."""
    x = helpers.images()
    x[0, 3, 5] += 9.0
    return x


def outputs(model, *xs):
    """Of one call on all inputs."""
    run = jax.jit(functools.partial(helpers.run, model))
    y = np.asarray(run(helpers.params_of(model)[0], np.concatenate(xs)))
    return np.split(y, len(xs))


@pytest.mark.parametrize("stem", ["patch", "conv"])
@pytest.mark.parametrize("patch", [1, 4])
def test_stem_gives_a_grid_and_sees_every_pixel(stem, patch):
    module = dict(patch=vit.Patches, conv=vit.Convolutions)[stem](patch, 8, None)
    x = normal(8, 12)
    params = initial(module.init, helpers.KEY, x)
    run = lambda x: module.apply(params, x)
    assert jax.eval_shape(run, x).shape == (1, 8 // patch, 12 // patch, 8)
    grad = np.asarray(jax.jit(jax.grad(lambda x: jnp.sum(run(x) ** 2)))(x))
    assert (grad != 0).all()


def normal(X, Y):
    return np.random.default_rng(0).normal(size=(1, X, Y, 2)).astype(np.float32)


def test_patches_are_patches():
    module, x = vit.Patches(4, 8, None), normal(8, 8)
    run, other = jax.jit(lambda x: module.init_with_output(helpers.KEY, x)[0]), x.copy()
    other[:, 1, 4] += 1.0
    changed = np.asarray(run(other)) != np.asarray(run(x))
    assert changed[0, 0, 1].all() and changed.sum() == 8


@pytest.mark.parametrize(
    "positions, pool",
    [("learned", "cls"), ("sinusoidal", "mean"), ("none", "mean"), ("none", "cls")],
)
def test_positions_tell_where_a_patch_is(positions, pool):
    """Patches have their positions before a class token is there."""
    model, x = helpers.vit(positions=positions, pool=pool), helpers.images()
    y, swapped = outputs(model, x, np.roll(x, (4, 8), (1, 2)))
    same = np.allclose(y, swapped, rtol=1e-4, atol=1e-5)
    assert same == (positions == "none")


def test_sinusoidal_positions_differ_along_both_axes():
    waves = np.asarray(jax.jit(lambda: vit._sinusoidal(3, 4, 10))()).reshape(12, 10)
    distance = np.abs(waves[:, None] - waves[None, :]).sum(-1)
    assert waves.shape == (12, 10) and (distance + np.eye(12) > 0.1).all()


def test_bfloat16():
    model = helpers.vit(dtype="bfloat16", stem="conv")
    params, x = helpers.params_of(model)
    assert {p.dtype for p in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    models = model, model.clone(dtype=None)
    both = jax.jit(lambda params: [helpers.run(model, params, x) for model in models])
    y, exact = jax.device_get(both(params))
    assert y.dtype == jnp.float32
    error = np.sqrt(np.mean((y - exact) ** 2) / np.mean(exact**2))
    assert 1e-4 < error < 0.05


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(image_size=[30, 32]), r"image_size=\(30, 32\) must be multiples of self.patch=4"),
        (dict(image_size=[36, 32]), r"an image must be \(36, 32, 1\), not \(32, 32, 1\)"),
        (dict(channels=3), r"an image must be \(32, 32, 3\)"),
        (dict(stem="convolution"), "stem='convolution' must be in"),
        (dict(positions="rotary"), "positions='rotary' must be in"),
        (dict(remat="all"), "remat='all' must be in"),
        (dict(stem="conv", patch=16, features=8), "patch=16 must be a power of two that divides"),
        (dict(pool="multi_head_attention"), "is not 'mean', 'cls' or a mechanism over a set"),
        (dict(mixers=["set_transformer"]), "is not a mechanism over a sequence or a grid"),
        (dict(mixers=[]), r"mixers=\(\) must be a tuple"),
        (dict(mixers="multi_head_attention"), "mixers='multi_head_attention' must be a tuple"),
    ],
)
def test_refuses(options, message, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as it is for users
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(helpers.vit(**options).init, helpers.RNGS, helpers.images())


@pytest.mark.parametrize("name", GRIDS)
def test_grids_have_no_place_for_a_class_token(name):
    model = helpers.vit(mixers=[helpers.text(name)], pool="cls")
    with pytest.raises(ValueError, match="over a sequence, as a vit with pool='cls' needs"):
        jax.eval_shape(model.init, helpers.RNGS, helpers.images())


def test_gradients_reach_every_parameter():
    model = helpers.vit(stem="conv", pool="set_transformer(num_seeds=1, encoder_blocks=1)")
    _, grads = helpers.value_and_grad(model)
    for path, grad in jax.tree.leaves_with_path(grads):
        assert np.isfinite(grad).all() and grad.any(), jax.tree_util.keystr(path)
