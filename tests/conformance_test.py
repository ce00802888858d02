"""What every record owes, checked for every file in the families. Nothing is listed here.

A claim of `registry.Claim` has exactly one test, run for every mechanism that makes it. Bodies are
jitted whole and shapes are tiny: each second spent here on one mechanism is spent on all.
"""

import dataclasses
import functools
import inspect

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnjax import parallel
from attnjax.core import edit, masks, registry, sharding
from attnjax.core.registry import Claim
from tests import cost

KEY = jax.random.key(0)
RNGS = dict(params=KEY, noise=KEY)
D = 48
NAMES = {name: registry.get(name) for name in registry.names()}


def every(kind):
    names = [name for name, record in NAMES.items() if isinstance(record, kind)]
    return pytest.mark.parametrize("name", names)


def every_mechanism_with(claim):
    mechanisms = registry.of_kind(registry.Mechanism)
    return pytest.mark.parametrize("name", [n for n, r in mechanisms.items() if claim in r.claims])


every_mechanism = every(registry.Mechanism)
WITH_ORACLE = (registry.Mechanism, registry.Intervention, registry.Objective, registry.Probe)


def build(name, **options):
    record = registry.get(name)
    return record.module(**(dict(record.small) | options))


def inputs(name, dtype="float32", T=8):
    """What the module of a mechanism takes, by its layout."""
    shape = dict(sequence=[(T,)], grid=[(T, T)], set=[(T,)], cross=[(T,), (T + 3,)])
    shapes = [(2, *axes, D) for axes in shape[registry.get(name).layout]]
    keys = jax.random.split(jax.random.key(1), len(shapes))
    return [jax.random.normal(k, s, dtype) for k, s in zip(keys, shapes, strict=True)]


@functools.cache
def params_of(name):
    with jax.ensure_compile_time_eval():  # the cache must hold no tracer of who asks first
        return jax.jit(build(name).init)(RNGS, *inputs(name))


def apply(name, *args, **kwargs):
    return build(name).apply(params_of(name), *args, rngs=dict(noise=KEY), **kwargs)


def floats(tree):
    return {k: x for k, x in tree.items() if jnp.issubdtype(x.dtype, jnp.floating)}


def with_gradients(fn, args):
    """Output of fn and the gradient of each array of floating point, by random cotangents."""
    learned = floats(args)
    out, vjp = jax.vjp(lambda learned: fn(**(args | learned)), learned)
    draw = lambda x: jax.random.normal(KEY, x.shape, x.dtype)
    if any(jnp.issubdtype(x.dtype, jnp.inexact) for x in jax.tree.leaves(out)):
        exact = lambda x: np.zeros(x.shape, jax.dtypes.float0)
        is_float = lambda x: jnp.issubdtype(x.dtype, jnp.inexact)
        cotangents = jax.tree.map(lambda x: draw(x) if is_float(x) else exact(x), out)
        return out, vjp(cotangents)[0]
    return out, {}


def assert_agrees_with_its_oracle(record, args, **options):
    """In the output and in every gradient, by autodiff of the oracle.

    Two implementations under one custom_vjp share its mistakes, so neither can judge the other.
    """
    known = {k: v for k, v in options.items() if k != "implementation"}
    actual = jax.jit(lambda: with_gradients(functools.partial(record.fn, **options), args))()
    expected = jax.jit(lambda: with_gradients(functools.partial(record.oracle, **known), args))()
    chex.assert_trees_all_close(actual, expected, rtol=1e-4, atol=1e-4)


# ---- every record ----


@every(WITH_ORACLE)
@pytest.mark.parametrize("T", [1, 67])  # a single token; no multiple of any tile
def test_agrees_with_its_oracle(name, T):
    record = registry.get(name)
    for options in record.variants:
        assert_agrees_with_its_oracle(record, record.example(KEY, T), **options)


@every(registry.Record)
def test_cites_a_source(name):
    record = registry.get(name)
    doc = inspect.getdoc(inspect.getmodule(record.fn)) or ""
    known = set(papers_by_key())
    assert set(record.papers) <= known
    if not isinstance(record, registry.Task):
        assert "Paper:" in doc and len(doc.splitlines()) > 6


@functools.cache
def papers_by_key():
    from attnjax import papers

    return papers.titles()


# ---- every mechanism ----


@every_mechanism
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_module_is_pure_and_differentiable(name, dtype):
    module, xs = build(name, dtype=dtype), inputs(name, dtype)
    params = jax.jit(module.init)(RNGS, *xs)
    assert set(params) <= {"params"}
    run = lambda params: module.apply(params, *xs, rngs=dict(noise=KEY))
    loss = lambda params, run=run: jnp.mean(run(params).astype(jnp.float32) ** 2)
    out = jax.eval_shape(run, params)
    assert out.dtype == dtype
    if registry.get(name).layout in ("sequence", "grid"):
        assert out.shape == xs[0].shape
    run, grads = jax.jit(run), jax.jit(jax.grad(loss))(params)
    chex.assert_trees_all_equal(run(params), run(params))
    for path, grad in jax.tree.leaves_with_path(grads):
        assert jnp.isfinite(grad).all() and grad.any(), jax.tree_util.keystr(path)


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
    xs, params = [jnp.concatenate([x, x]) for x in inputs(name)], params_of(name)
    places = sharding.shardings(mesh, params)
    run = jax.jit(lambda params, *xs: build(name).apply(params, *xs, rngs=dict(noise=KEY)))
    split = jax.NamedSharding(mesh, jax.P("fsdp"))
    y = run(jax.device_put(params, places), *jax.device_put(xs, split))
    chex.assert_trees_all_close(y, run(params, *xs), rtol=1e-4, atol=1e-4)


@every_mechanism
def test_module_works_in_nnx(name):
    xs = inputs(name)
    model = nnx.bridge.ToNNX(build(name), rngs=nnx.Rngs(0, noise=0))
    y = jax.eval_shape(lambda: apply(name, *xs))
    assert model.lazy_init(*xs)(*xs).shape == y.shape


@every_mechanism
def test_survives_large_inputs(name):
    record = registry.get(name)
    large = jax.tree.map(lambda x: x * 100 if x.dtype == jnp.float32 else x, inputs(name))
    loss = lambda params: build(name).apply(params, *large, rngs=dict(noise=KEY)).sum()
    for leaf in jax.tree.leaves(jax.jit(jax.value_and_grad(loss))(params_of(name))):
        assert jnp.isfinite(leaf).all(), record


@every_mechanism
def test_bfloat16_is_as_good_as_a_naive_bfloat16(name):
    record = registry.get(name)
    exact = record.example(KEY, 33)
    change = lambda args, dtype: args | {k: x.astype(dtype) for k, x in floats(args).items()}
    rounded = change(exact, jnp.bfloat16)
    raised = change(rounded, jnp.float32)
    truth = jax.jit(record.oracle)(**raised)
    naive = jax.jit(record.oracle)(**rounded)
    fast = jax.jit(record.fn)(**rounded)
    error = lambda x: float(jnp.sqrt(jnp.mean((x.astype(jnp.float32) - truth) ** 2)))
    assert fast.dtype == jnp.bfloat16
    scale = float(jnp.sqrt(jnp.mean(truth**2)))
    assert error(fast) <= 2 * error(naive.astype(jnp.bfloat16)) + 2**-9 * scale


# ---- one test for each claim ----


@every_mechanism_with(Claim.CAUSAL)
def test_causal(name):
    loss = lambda x: (apply(name, x, mask=masks.Causal())[:, 4] ** 2).sum()
    grad = jax.jit(jax.grad(loss))(*inputs(name))
    assert grad[:, :5].any() and not grad[:, 5:].any()


@every_mechanism_with(Claim.MASKABLE)
def test_masked_token_has_no_influence(name):
    *_, last = xs = inputs(name)
    valid = jnp.ones(last.shape[:2], bool).at[0, 5:].set(False).at[1, 2].set(False)
    mask = masks.Valid(valid)
    if Claim.CAUSAL in registry.get(name).claims:
        mask = mask & masks.Causal()

    def seen(last):
        y = apply(name, *xs[:-1], last, mask=mask)
        kept = valid if y.shape[1] == valid.shape[1] and len(xs) == 1 else jnp.ones(y.shape[:2])
        return jnp.where(kept[..., None], y, 0)

    grad = jax.jit(jax.grad(lambda last: (seen(last) ** 2).sum()))(last)
    assert not grad[~valid].any() and grad[valid].any()
    other = jnp.where(valid[..., None], last, 1e3)
    chex.assert_trees_all_equal(*jax.jit(lambda: (seen(last), seen(other)))())


@every_mechanism_with(Claim.MASKABLE)
def test_query_that_sees_nothing_is_zero(name):
    record = registry.get(name)
    args = record.example(KEY, 8)
    size = args["k"].shape[1] if "k" in args else 8
    mask = masks.Valid(jnp.zeros((2, size), bool))
    value, grads = with_gradients(functools.partial(record.fn, mask=mask), args)
    for leaf in jax.tree.leaves((value, floats(grads))):
        assert jnp.isfinite(leaf).all()
    if "v" in args:
        assert not value.any() and not grads["v"].any()


@every_mechanism_with(Claim.CROSS)
def test_takes_other_keys_than_queries(name):
    record = registry.get(name)
    args = record.example(KEY, 9)
    args = args | dict(q=args["q"][:, :5])
    actual, expected = jax.jit(lambda: (record.fn(**args), record.oracle(**args)))()
    chex.assert_trees_all_close(actual, expected, rtol=1e-4, atol=1e-4)
    assert actual.shape[1] == 5


def _permuted(name):
    x, order = *inputs(name), jax.random.permutation(KEY, 8)
    run = jax.jit(lambda x: apply(name, x))
    return run(x), run(x[:, order]), order


@every_mechanism_with(Claim.PERMUTATION_EQUIVARIANT)
def test_permutation_equivariant(name):
    y, permuted, order = _permuted(name)
    chex.assert_trees_all_close(permuted, y[:, order], rtol=1e-4, atol=1e-5)


@every_mechanism_with(Claim.PERMUTATION_INVARIANT)
def test_permutation_invariant(name):
    y, permuted, _ = _permuted(name)
    chex.assert_trees_all_close(permuted, y, rtol=1e-4, atol=1e-5)


@every_mechanism_with(Claim.STREAMABLE)
@pytest.mark.parametrize("pieces", [(1,) * 8, (5, 1, 2)], ids=["step by step", "in chunks"])
def test_streams(name, pieces):
    module, params, (x,) = build(name), params_of(name), inputs(name)

    @jax.jit
    def stream(x):
        state, ys = module.apply(params, 2, 8, method="init_state"), []
        for piece in jnp.split(x, np.cumsum(pieces)[:-1], axis=1):
            state, y = module.apply(params, state, piece, method="extend")
            ys.append(y)
        return jnp.concatenate(ys, 1)

    expected = jax.jit(lambda x: apply(name, x, mask=masks.Causal()))(x)
    chex.assert_trees_all_close(stream(x), expected, rtol=1e-4, atol=1e-5)


def _with_gradient(name):
    record = registry.get(name)

    def run(args):
        loss = lambda learned: sum(
            x.astype(jnp.float32).sum() for x in jax.tree.leaves(record.fn(**(args | learned)))
        )
        return jax.value_and_grad(loss)(floats(args))

    return run, lambda T: jax.eval_shape(lambda: record.example(KEY, T))


@every_mechanism_with(Claim.LINEAR_MEMORY)
def test_linear_memory(name):
    run, example = _with_gradient(name)
    assert cost.largest_array(run, example(4096)) <= 2.1 * cost.largest_array(run, example(2048))


@every_mechanism_with(Claim.LINEAR_COMPUTE)
def test_linear_compute(name):
    run, example = _with_gradient(name)
    assert cost.operations(run, example(4096)) <= 2.1 * cost.operations(run, example(2048))


@every_mechanism_with(Claim.FUSED)
def test_kernel_agrees_with_its_oracle_and_lowers_for_tpu(name):
    record = registry.get(name)
    assert_agrees_with_its_oracle(record, record.example(KEY, 67), implementation="interpret")
    run, example = _with_gradient(name)
    exported = jax.export.export(jax.jit(run), platforms=["tpu"])(example(256))
    assert "tpu_custom_call" in exported.mlir_module()


@every_mechanism_with(Claim.CONTEXT_PARALLEL)
def test_four_devices_equal_one(name):
    record = registry.get(name)
    mesh, args = sharding.make_mesh(context=4), record.example(KEY, 16)
    options = dict(mask=masks.Causal()) if Claim.CAUSAL in record.claims else {}
    expected = jax.jit(lambda: with_gradients(functools.partial(record.fn, **options), args))()
    assert record.context
    for strategy in record.context:
        fn = functools.partial(parallel.shard(strategy, record, mesh), **options)
        actual = jax.jit(functools.partial(with_gradients, fn))(args)
        chex.assert_trees_all_close(actual, expected, rtol=1e-5, atol=1e-5)


@every_mechanism_with(Claim.DENSE_TWIN)
def test_dense_twin(name):
    xs, params = inputs(name), params_of(name)
    run = functools.partial(build(name).apply, rngs=dict(noise=KEY))
    same = edit.rewrite(run, weights=lambda w: w)
    y, twin, (_, maps) = jax.jit(
        lambda: (run(params, *xs), same(params, *xs), edit.read(run)(params, *xs))
    )()
    chex.assert_trees_all_close(twin, y, rtol=1e-4, atol=1e-5)
    assert all(w.ndim == 4 for w in maps.values())


@every_mechanism_with(Claim.FORWARD_MODE)
def test_forward_mode(name):
    record = registry.get(name)
    args = record.example(KEY, 9)
    learned = floats(args)
    fn = lambda learned: record.fn(**(args | learned))
    keys = dict(zip(learned, jax.random.split(KEY, len(learned)), strict=True))
    tangents = {k: jax.random.normal(keys[k], x.shape) for k, x in learned.items()}
    out, tangent = jax.jit(lambda: jax.jvp(fn, (learned,), (tangents,)))()
    _, vjp = jax.vjp(fn, learned)
    back = vjp(out)[0]
    left = sum((back[k] * tangents[k]).sum() for k in learned)
    chex.assert_trees_all_close((tangent * out).sum(), left, rtol=1e-3)


def test_each_claim_has_one_test_that_runs():
    text = inspect.getsource(inspect.getmodule(test_each_claim_has_one_test_that_runs))
    made = {claim for r in registry.of_kind(registry.Mechanism).values() for claim in r.claims}
    for claim in Claim:
        assert f"@every_mechanism_with(Claim.{claim.name})" in text and claim in made


# ---- the other kinds of record ----


@every(registry.Intervention)
def test_intervention_at_strength_zero_changes_nothing(name):
    record = registry.get(name)
    args = record.example(KEY, 17)
    actual = record.fn(**(args | record.identity))
    chex.assert_trees_all_equal(actual, record.untouched(**args))
    changed = record.fn(**args, **record.variants[-1])
    same = jax.tree.map(lambda a, b: a.shape == b.shape and bool((a == b).all()), actual, changed)
    assert not all(jax.tree.leaves(same)), "an intervention must do something"


@every(registry.Intervention)
def test_intervention_keeps_its_budget(name):
    record = registry.get(name)
    for T in (5, 64):
        args = record.example(KEY, T)
        for options in record.variants:
            if record.budget is not None:
                run = functools.partial(record.fn, **options)
                size = record.size(jax.eval_shape(run, **args))
                assert 0 < size <= record.budget(**args, **options)


@every(registry.Objective)
def test_objective_is_a_finite_scalar(name):
    record = registry.get(name)
    for T in (1, 9):
        args = record.example(KEY, T)
        value, grads = jax.jit(lambda args: with_gradients(record.fn, args))(args)
        assert value.shape == () and value.dtype == jnp.float32
        assert all(jnp.isfinite(g).all() and g.any() for g in jax.tree.leaves(grads))


@every(registry.Probe)
def test_probe_gives_named_finite_statistics(name):
    record = registry.get(name)
    statistics = jax.jit(record.fn)(**record.example(KEY, 9))
    assert statistics and all(isinstance(key, str) for key in statistics)
    assert all(jnp.isfinite(x).all() for x in jax.tree.leaves(statistics))


@every(registry.Task)
def test_task_is_a_fixed_sequence_of_examples(name):
    record = registry.get(name)
    if "name" in inspect.signature(record.fn).parameters:
        pytest.skip("needs a data set that somebody prepared; tests/tasks covers it")
    keys = dict(
        tokens={"inputs", "targets", "weights"},
        image={"image", "label"},
        vectors={"inputs", "target"},
        objects={"image", "masks"},
    )[record.kind]
    source, again = record.fn("train"), record.fn("train")
    example = source[1]
    assert set(example) == keys and source.fingerprint() == again.fingerprint()
    for key in keys:
        np.testing.assert_array_equal(example[key], again[1][key])
    assert record.fn("test").fingerprint() != source.fingerprint()
