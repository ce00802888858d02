"""What every record owes, checked for every file in the families. Nothing is listed here.

A claim of `registry.Claim` has exactly one test, run for every mechanism that makes it.
"""

import dataclasses
import functools
import inspect

import chex
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from attnjax import papers, parallel
from attnjax.core import edit, registry, sharding
from attnjax.core.registry import Claim
from pallas_kernels import tables
from tests import cost, cotangents
from tests.programs import (
    KEY,
    RNGS,
    all_of,
    apply,
    build,
    every_variant,
    example,
    floats,
    inputs,
    known,
    module,
    module_with_gradients,
    on_host,
    params_of,
    plain,
    program,
    recent,
    single_token,
    variant,
    with_gradients,
)
from tests.records import every, every_mechanism, every_mechanism_with

IN_TILES = tables.Table(
    "cpu",
    "cpu",
    (
        tables.Row(
            operation="dot_product_attention",
            implementation="blocked",
            source=dict(how="computed", rule="whatever the length"),
        ),
    ),
)
WITH_ORACLE = (registry.Mechanism, registry.Intervention, registry.Objective, registry.Probe)


# ---- every record ----


@every(WITH_ORACLE)
def test_agrees_with_its_oracle(name):
    """In the output and in every gradient, by autodiff of the oracle, with each option.

    Two implementations under one custom_vjp share its mistakes, so neither can judge the other.
    """
    learned = floats(example(name, 67))  # no multiple of any tile
    chex.assert_trees_all_close(*every_variant(name, 67)(learned), rtol=1e-4, atol=1e-4)


@every(WITH_ORACLE)
def test_a_single_token_agrees_with_its_oracle(name):
    """With every option in the output; gradients are finite."""
    ((out, grads), others), expected = single_token(name)(floats(example(name, 1)))
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(grads))
    chex.assert_trees_all_close([out, *others], expected, rtol=1e-4, atol=1e-4)


@every(registry.Record)
def test_cites_a_source(name):
    record = registry.get(name)
    doc = inspect.getdoc(inspect.getmodule(record.fn)) or ""
    assert set(record.papers) <= papers.titles().keys()
    if not isinstance(record, registry.Task):
        assert "Paper:" in doc and len(doc.splitlines()) > 6


# ---- every mechanism ----


@every_mechanism
def test_module_is_pure_and_differentiable(name):
    xs, params, run = inputs(name), params_of(name), module(name)
    assert set(params) <= {"params"}
    out, (grads, _) = run(params, xs)
    if registry.get(name).layout in ("sequence", "grid"):
        assert out.shape == xs[0].shape
    chex.assert_trees_all_equal(run(params, xs)[0], out)
    for path, grad in jax.tree.leaves_with_path(grads):
        assert np.isfinite(grad).all() and grad.any(), jax.tree_util.keystr(path)


@every_mechanism
def test_module_computes_in_bfloat16(name):
    """With parameters in float32. It is traced, which is where dtypes clash."""
    model, xs, params = build(name, dtype="bfloat16"), inputs(name, "bfloat16"), params_of(name)
    drawn = jax.eval_shape(model.init, RNGS, *xs)
    chex.assert_trees_all_equal_shapes_and_dtypes(drawn, params)
    run = module_with_gradients(name, dtype="bfloat16")
    y, grads = jax.eval_shape(run, params, xs, *all_of(name, xs))
    assert y.dtype == "bfloat16"
    chex.assert_trees_all_equal_shapes_and_dtypes(grads, (params, list(xs)))


@every_mechanism
def test_module_takes_its_function_as_a_field(name):
    record, called = registry.get(name), []

    def spy(*args, **kwargs):
        called.append(True)
        return record.fn(*args, **kwargs)

    assert {f.name: f.default for f in dataclasses.fields(record.module)}["fn"] is record.fn
    jax.eval_shape(build(name, fn=functools.wraps(record.fn)(spy)).init, RNGS, *inputs(name))
    assert called


@every_mechanism
def test_module_gives_the_same_on_a_mesh(name):
    mesh = sharding.make_mesh(fsdp=2, tensor=2)
    xs, params = inputs(name), params_of(name)
    split = jax.NamedSharding(mesh, jax.P("fsdp"))
    places = sharding.shardings(mesh, params)
    run = jax.jit(functools.partial(apply, name, **plain(name)))
    y = run(jax.device_put(jax.device_get(params), places), *jax.device_put(xs, split))
    chex.assert_trees_all_close(y, module(name)(params, xs)[0], rtol=1e-4, atol=1e-4)


@every_mechanism
def test_module_works_in_nnx(name):
    def run(*xs):
        model = nnx.bridge.ToNNX(build(name), rngs=nnx.Rngs(0, noise=0))
        return model.lazy_init(*xs)(*xs)

    xs = inputs(name)
    expected, _ = module(name)(params_of(name), xs)
    assert jax.eval_shape(run, *xs).shape == expected.shape


@every_mechanism
def test_survives_large_inputs(name):
    large = [x * 100 for x in inputs(name)]
    for leaf in jax.tree.leaves(module(name)(params_of(name), large)):
        assert np.isfinite(leaf).all()


@every_mechanism
def test_bfloat16_is_as_good_as_a_naive_bfloat16(name):
    record, args = registry.get(name), example(name, 67)
    options, *_ = record.variants
    # Rounded out here: a compiler may leave out a rounding whose result is at once raised again.
    rounded = {k: x.astype(jnp.bfloat16) for k, x in floats(args).items()}
    raised = {k: x.astype(jnp.float32) for k, x in rounded.items()}

    def both(rounded):
        given = args | rounded
        return record.oracle(**given, **known(options)), record.fn(**given, **options)

    naive, fast = jax.device_get(jax.jit(both)(rounded))
    truth, _ = variant(name, 67, "oracle", **known(options))(raised)
    error = lambda x: np.sqrt(np.mean((x.astype(np.float32) - truth) ** 2))
    assert fast.dtype == jnp.bfloat16
    scale = np.sqrt(np.mean(truth**2))
    assert error(fast) <= 2 * error(naive.astype(jnp.bfloat16)) + 2**-9 * scale


# ---- one test for each claim ----


@every_mechanism_with(Claim.CAUSAL)
def test_causal(name):
    run, params, [x] = module(name), params_of(name), inputs(name)
    each = np.eye(8, dtype=np.float32)[:, None, :, None]  # the weights of each output alone
    grads = np.stack([run(params, [x], weight=one)[1][1][0] for one in each])
    reaches = grads.any((1, 3))  # t s
    assert reaches[4].any() and not np.triu(reaches, 1).any()


@every_mechanism_with(Claim.MASKABLE)
def test_masked_token_has_no_influence(name):
    run, params, (*first, last) = module(name), params_of(name), inputs(name)
    valid = np.ones(last.shape[:2], bool)
    valid[0, 5:] = valid[1, 2] = False
    itself = registry.get(name).layout == "sequence"  # a masked query gives what nobody reads
    kept = valid[..., None] if itself else True
    y, (_, [*_, grad]) = run(params, [*first, last], valid, kept)
    assert not grad[~valid].any() and grad[valid].any()
    other, _ = run(params, [*first, np.where(valid[..., None], last, 1e3)], valid, kept)
    chex.assert_trees_all_equal(*(np.where(kept, x, 0) for x in (y, other)))


@every_mechanism_with(Claim.MASKABLE)
def test_query_that_sees_nothing_is_zero(name):
    args = example(name, 1)
    ((value, grads), _), _ = single_token(name)(floats(args), real=False)
    for leaf in jax.tree.leaves((value, grads)):
        assert np.isfinite(leaf).all()
    if "v" in args:
        assert not value.any() and not grads["v"].any()


@every_mechanism_with(Claim.CROSS)
def test_takes_other_keys_than_queries(name):
    record, args = registry.get(name), example(name, 67)
    args = args | dict(q=args["q"][:, :5])
    actual, expected = jax.jit(lambda args: (record.fn(**args), record.oracle(**args)))(args)
    chex.assert_trees_all_close(actual, expected, rtol=1e-4, atol=1e-4)
    assert actual.shape[1] == 5


def _permuted(name):
    """Without the mask that makes a causal one causal."""
    params, [x] = params_of(name), inputs(name)
    run = on_host(jax.jit(functools.partial(apply, name)))
    order = np.random.default_rng(0).permutation(8)
    return run(params, x), run(params, x[:, order]), order


@every_mechanism_with(Claim.PERMUTATION_EQUIVARIANT)
def test_permutation_equivariant(name):
    y, permuted, order = _permuted(name)
    chex.assert_trees_all_close(permuted, y[:, order], rtol=1e-4, atol=1e-5)


@every_mechanism_with(Claim.PERMUTATION_INVARIANT)
def test_permutation_invariant(name):
    y, permuted, _ = _permuted(name)
    chex.assert_trees_all_close(permuted, y, rtol=1e-4, atol=1e-5)


@every_mechanism_with(Claim.STREAMABLE)
def test_streams(name):
    """Step by step and in chunks, from an empty state and from one that holds something."""
    params, [x] = params_of(name), inputs(name)
    extend = jax.jit(functools.partial(apply, name, method="extend"))
    for pieces in ((1, 3, 1, 3), (3, 3, 1, 1)):
        state, ys = apply(name, params, 2, 8, method="init_state"), []
        for piece in np.split(x, np.cumsum(pieces)[:-1], axis=1):
            state, y = extend(params, state, piece)
            ys.append(y)
        expected, _ = module(name)(params, [x])
        chex.assert_trees_all_close(np.concatenate(ys, 1), expected, rtol=1e-4, atol=1e-5)


def _with_gradient(name, **options):
    fn = functools.partial(registry.get(name).fn, **options)

    def run(args):
        loss = lambda learned: sum(
            x.astype(jnp.float32).sum() for x in jax.tree.leaves(fn(**(args | learned)))
        )
        return jax.value_and_grad(loss)(floats(args))

    return run, lambda T: jax.eval_shape(lambda: registry.get(name).example(KEY, T))


@recent
def _jaxpr(name, T):
    run, example = _with_gradient(name)
    return jax.make_jaxpr(run)(example(T))


@every_mechanism_with(Claim.LINEAR_MEMORY)
def test_linear_memory(name):
    short, long = (cost.largest_array_in(_jaxpr(name, T)) for T in (2048, 4096))
    assert long <= 2.1 * short


@every_mechanism_with(Claim.LINEAR_COMPUTE)
def test_linear_compute(name):
    short, long = (cost.operations_in(_jaxpr(name, T)) for T in (2048, 4096))
    assert long <= 2.1 * short


@every_mechanism_with(Claim.FUSED)
def test_kernel_agrees_with_its_oracle_and_lowers_for_tpu(name):
    learned = floats(example(name, 67))
    actual = program(name, 67, implementation="interpret")(learned)
    expected = variant(name, 67, "oracle")(learned)
    chex.assert_trees_all_close(actual, expected, rtol=1e-4, atol=1e-4)
    run, of_length = _with_gradient(name, implementation="pallas")
    exported = jax.export.export(jax.jit(run), platforms=["tpu"])(of_length(256))
    assert "tpu_custom_call" in exported.mlir_module()


@every_mechanism_with(Claim.CONTEXT_PARALLEL)
def test_four_devices_equal_one(name):
    record = registry.get(name)
    mesh, args = sharding.make_mesh(context=4), example(name, 16)
    options = plain(name)
    expected = program(name, 16, **options)(floats(args))
    assert record.context
    for strategy in record.context:
        fn = functools.partial(parallel.shard(strategy, record, mesh), **options)
        actual = jax.jit(functools.partial(with_gradients, fn))(args)
        chex.assert_trees_all_close(actual, expected, rtol=1e-5, atol=1e-5)


@every_mechanism_with(Claim.DENSE_TWIN)
def test_dense_twin(name):
    xs, params = inputs(name), params_of(name)
    run = functools.partial(apply, name, **plain(name))
    twin = jax.jit(edit.rewrite(run, weights=lambda w: w))(params, *xs)
    chex.assert_trees_all_close(twin, module(name)(params, xs)[0], rtol=1e-4, atol=1e-5)
    _, maps = jax.eval_shape(edit.read(run), params, *xs)
    assert all(w.ndim == 4 for w in maps.values())


@every_mechanism_with(Claim.FORWARD_MODE)
def test_forward_mode(name):
    """Softmax attention in tiles, as it is at lengths that are too long for tests, is traced."""
    args = example(name, 67)
    learned, draw = floats(args), np.random.default_rng(1).normal
    tangents = {k: draw(size=x.shape).astype(np.float32) for k, x in learned.items()}
    fn = lambda learned: registry.get(name).fn(**(args | learned))
    with tables.using(IN_TILES):  # whose numbers are those of tests/ops/forward_mode_test.py
        jax.eval_shape(lambda *pair: jax.jvp(fn, *pair), (learned,), (tangents,))
    _, tangent = on_host(jax.jit(lambda *pair: jax.jvp(fn, *pair)))((learned,), (tangents,))
    out, grads = variant(name, 67)(learned)
    forward = (tangent * cotangents.like(out)).sum()
    backward = sum((grads[k] * tangents[k]).sum() for k in learned)
    chex.assert_trees_all_close(forward, backward, rtol=1e-3)


def test_each_claim_has_one_test_that_runs():
    text = inspect.getsource(inspect.getmodule(test_each_claim_has_one_test_that_runs))
    made = {claim for r in registry.of_kind(registry.Mechanism).values() for claim in r.claims}
    for claim in Claim:
        assert f"@every_mechanism_with(Claim.{claim.name})" in text and claim in made
