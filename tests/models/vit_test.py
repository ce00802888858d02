import jax
import jax.numpy as jnp
import jaxtyping
import pytest

from attnjax.models import vit
from tests.models import helpers


@pytest.mark.parametrize("name", helpers.named("sequence", "grid", "set"))
def test_every_mechanism_by_name(name):
    is_pool = helpers.MECHANISMS[name].layout == "set"
    field = dict(pool=helpers.text(name)) if is_pool else dict(mixers=[helpers.text(name)])
    model, x = helpers.vit(**field), helpers.images()
    y, changed = outputs(model, x, x.at[0, 3, 5].add(9.0))
    assert y.shape == (2, 5) and y.dtype == jnp.float32 and jnp.isfinite(y).all()
    assert not jnp.allclose(y[0], changed[0])


def outputs(model, *xs):
    """Of one call on all inputs, with parameters initialised in the same compilation."""
    run = jax.jit(lambda x: helpers.run(model, helpers.init(model, x), x))
    return jnp.split(run(jnp.concatenate(xs)), len(xs))


@pytest.mark.parametrize("stem", ["patch", "conv"])
@pytest.mark.parametrize("patch", [1, 4])
def test_stem_gives_a_grid_and_sees_every_pixel(stem, patch):
    module = dict(patch=vit.Patches, conv=vit.Convolutions)[stem](patch, 8, None)
    x = jax.random.normal(helpers.KEY, (1, 8, 12, 2))
    params = jax.jit(module.init)(helpers.KEY, x)
    run = lambda x: module.apply(params, x)
    assert run(x).shape == (1, 8 // patch, 12 // patch, 8)
    grad = jax.jit(jax.grad(lambda x: jnp.sum(run(x) ** 2)))(x)
    assert (grad != 0).all()


def test_patches_are_patches():
    module, x = vit.Patches(4, 8, None), jax.random.normal(helpers.KEY, (1, 8, 8, 2))
    params = module.init(helpers.KEY, x)
    changed = module.apply(params, x.at[:, 1, 4].add(1.0)) != module.apply(params, x)
    assert changed[0, 0, 1].all() and changed.sum() == 8


@pytest.mark.parametrize("positions", ["learned", "sinusoidal", "none"])
@pytest.mark.parametrize("pool", ["mean", "cls"])
def test_positions_tell_where_a_patch_is(positions, pool):
    model, x = helpers.vit(positions=positions, pool=pool), helpers.images()
    y, swapped = outputs(model, x, jnp.roll(x, (4, 8), (1, 2)))
    same = jnp.allclose(y, swapped, rtol=1e-4, atol=1e-5)
    assert same == (positions == "none")


def test_sinusoidal_positions_differ_along_both_axes():
    waves = vit._sinusoidal(3, 4, 10).reshape(12, 10)
    distance = jnp.abs(waves[:, None] - waves[None, :]).sum(-1)
    assert waves.shape == (12, 10) and (distance + jnp.eye(12) > 0.1).all()


def test_sequences_and_grids_alternate():
    grids = helpers.named("grid")
    if not grids:
        pytest.skip("no mechanism over grids")
    mixers = ["multi_head_attention", helpers.text(grids[0])]
    model, x = helpers.vit(mixers=mixers, depth=2), helpers.images()
    assert jnp.isfinite(outputs(model, x)[0]).all()


def test_bfloat16():
    model = helpers.vit(depth=2, dtype="bfloat16", stem="conv")
    params, x = helpers.params_of(model)
    assert {p.dtype for p in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    models = model, model.clone(dtype=None)
    y, exact = jax.jit(lambda: [helpers.run(model, params, x) for model in models])()
    assert y.dtype == jnp.float32
    error = jnp.sqrt(jnp.mean((y - exact) ** 2) / jnp.mean(exact**2))
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


@pytest.mark.parametrize("name", helpers.named("grid"))
def test_grids_have_no_place_for_a_class_token(name):
    model = helpers.vit(mixers=[helpers.text(name)], pool="cls")
    with pytest.raises(ValueError, match="over a sequence, as a vit with pool='cls' needs"):
        jax.eval_shape(model.init, helpers.RNGS, helpers.images())


def test_gradients_reach_every_parameter():
    model = helpers.vit(stem="conv", pool="set_transformer(num_seeds=1)")
    _, grads = helpers.value_and_grad(model)
    for path, grad in jax.tree.leaves_with_path(grads):
        assert jnp.isfinite(grad).all() and grad.any(), jax.tree_util.keystr(path)
