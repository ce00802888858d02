import chex
import jax
import pytest

from attnjax.core import edit, sharding
from attnjax.models import backbone
from tests.models import helpers

MIXERS = ["multi_head_attention", "multi_head_attention(rotary_base=100.0)"]
MODELS = dict(lm=helpers.lm(depth=2), vit=helpers.vit(depth=2))
HYBRID = helpers.lm(depth=4, mixers=MIXERS)
every_model = pytest.mark.parametrize("model", [*MODELS.values(), HYBRID], ids=[*MODELS, "hybrid"])


@every_model
def test_scan_equals_loop(model):
    params, x = helpers.params_of(model)
    scanned, stacked = model.clone(scan=True), backbone.stacked(params, len(model.mixers))
    shapes = jax.eval_shape(lambda: helpers.init(scanned, x))
    chex.assert_trees_all_equal_shapes_and_dtypes(stacked, shapes)
    chex.assert_trees_all_equal(backbone.unstacked(stacked), params)
    value, grads = helpers.value_and_grad(model)
    run = jax.jit(jax.value_and_grad(lambda params: helpers.loss(scanned, params, x)))
    actual, scanned_grads = run(stacked)
    chex.assert_trees_all_close(actual, value, rtol=1e-5)
    chex.assert_trees_all_close(backbone.unstacked(scanned_grads), grads, rtol=1e-4, atol=1e-6)


def test_layers_of_a_scan_begin_differently():
    params, _ = helpers.params_of(MODELS["lm"].clone(scan=True))
    for x in jax.tree.leaves(params["layers"]["block_0"]["mixer"]):
        assert (x[0] != x[1]).any()


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("remat", ["full", "dots"])
def test_remat_changes_no_number(scan, remat):
    model = MODELS["lm"].clone(scan=scan)
    actual = helpers.value_and_grad(model.clone(remat=remat))
    chex.assert_trees_all_close(actual, helpers.value_and_grad(model), rtol=1e-5, atol=1e-7)


def test_remat_computes_again():
    params, x = helpers.params_of(MODELS["lm"])

    def products(remat):
        loss = lambda params: helpers.loss(MODELS["lm"].clone(remat=remat), params, x)
        return str(jax.make_jaxpr(jax.grad(loss))(params)).count("dot_general")

    assert products("none") < products("dots") < products("full")


def test_scan_needs_whole_repetitions():
    with pytest.raises(ValueError, match="scan needs depth=3 to be a multiple of 2 mixers"):
        helpers.init(HYBRID.clone(depth=3, scan=True), helpers.tokens())


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("scan", [False, True])
def test_every_parameter_has_a_place_on_a_mesh(kind, scan):
    model = MODELS[kind].clone(scan=scan)
    params, x = helpers.params_of(model)
    places = sharding.shardings(sharding.make_mesh(fsdp=2, tensor=2), params)
    specs = {str(place.spec) for place in jax.tree.leaves(places)}
    assert any("tensor" in spec for spec in specs) and any("fsdp" in spec for spec in specs)
    value, _ = helpers.value_and_grad(model)
    placed = jax.jit(lambda params: helpers.loss(model, params, x))(jax.device_put(params, places))
    chex.assert_trees_all_close(placed, value, rtol=1e-4)


def test_a_function_in_the_place_of_the_records_own():
    model, seen = MODELS["lm"], []
    params, x = helpers.params_of(model)

    def parallel(record):
        seen.append(record)
        return lambda *args, **options: 2 * record.fn(*args, **options)

    double = edit.rewrite(model.apply, weights=lambda w: 2 * w)
    y = jax.jit(lambda: helpers.run(model.clone(parallel=parallel), params, x))()
    expected = jax.jit(lambda: double({"params": params}, x))()
    chex.assert_trees_all_close(y, expected, rtol=1e-4, atol=1e-5)
    assert {record.fn.__name__ for record in seen} == {"multi_head_attention"}
