import functools

import chex
import jax
import pytest

from attnjax.core import edit, sharding
from attnjax.models import backbone
from tests.initial import initial
from tests.models import helpers

MIXERS = ["multi_head_attention", "multi_head_attention(rotary_base=100.0)"]
MODELS = dict(lm=helpers.lm(depth=2), vit=helpers.vit(depth=2))
HYBRID = helpers.lm(depth=4, mixers=MIXERS)


@pytest.mark.parametrize("model", [MODELS["vit"], HYBRID], ids=["vit", "hybrid lm"])
def test_scan_equals_loop(model):
    """With one mixer and with two in turn."""
    scanned = model.clone(scan=True)
    (params, _), (stacked, _) = (jax.device_get(helpers.params_of(x)) for x in (model, scanned))
    _, shapes = helpers.shapes_of(scanned)
    chex.assert_trees_all_equal_shapes_and_dtypes(stacked, shapes)
    chex.assert_trees_all_equal(backbone.unstacked(stacked), params)
    value, grads = helpers.value_and_grad(model)
    actual, scanned_grads = helpers.value_and_grad(scanned)
    chex.assert_trees_all_close(actual, value, rtol=1e-5)
    chex.assert_trees_all_close(backbone.unstacked(scanned_grads), grads, rtol=1e-4, atol=1e-6)


def test_layers_of_a_scan_begin_differently():
    init = functools.partial(helpers.init, MODELS["lm"].clone(scan=True))
    params = jax.device_get(initial(init, helpers.tokens()))
    for x in jax.tree.leaves(params["layers"]["block_0"]["mixer"]):
        assert (x[0] != x[1]).any()


@pytest.mark.parametrize(
    "remat, model",
    [("full", HYBRID.clone(scan=True)), ("dots", MODELS["vit"])],
    ids=["full", "dots"],
)
def test_remat_changes_no_number(remat, model):
    """Each kind and each way through the layers once: the one knows nothing of the other."""
    actual = helpers.value_and_grad(model.clone(remat=remat))
    chex.assert_trees_all_close(actual, helpers.value_and_grad(model), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("scan", [False, True])
def test_remat_computes_again(scan):
    model = MODELS["lm"].clone(scan=scan)
    _, params = helpers.shapes_of(model)

    def products(remat):
        loss = lambda params: helpers.loss(model.clone(remat=remat), params, helpers.tokens())
        return str(jax.make_jaxpr(jax.grad(loss))(params)).count("dot_general")

    assert products("none") < products("dots") < products("full")


def test_scan_needs_whole_repetitions():
    with pytest.raises(ValueError, match="scan needs depth=3 to be a multiple of 2 mixers"):
        helpers.init(HYBRID.clone(depth=3, scan=True), helpers.tokens())


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("scan", [False, True])
def test_every_parameter_has_a_place_on_a_mesh(kind, scan):
    model = (HYBRID if kind == "lm" else MODELS["vit"]).clone(scan=scan)
    params, x = helpers.params_of(model)
    places = sharding.shardings(sharding.make_mesh(fsdp=2, tensor=2), params)
    specs = {str(place.spec) for place in jax.tree.leaves(places)}
    assert any("tensor" in spec for spec in specs) and any("fsdp" in spec for spec in specs)
    value, _ = helpers.value_and_grad(model)
    placed = jax.jit(lambda params: helpers.loss(model, params, x))(jax.device_put(params, places))
    chex.assert_trees_all_close(placed, value, rtol=1e-4)


def test_a_function_in_the_place_of_the_records_own():
    model, seen = helpers.lm(), []
    params, x = helpers.params_of(model)

    def parallel(record):
        seen.append(record)
        return lambda *args, **options: 2 * record.fn(*args, **options)

    double = edit.rewrite(model.apply, weights=lambda w: 2 * w)
    ours = functools.partial(helpers.run, model.clone(parallel=parallel))
    both = jax.jit(lambda params, x: (ours(params, x), double({"params": params}, x)))
    chex.assert_trees_all_close(*jax.device_get(both(params, x)), rtol=1e-4, atol=1e-5)
    assert {record.fn.__name__ for record in seen} == {"multi_head_attention"}
