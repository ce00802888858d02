"""What every record owes, checked for every file in the families. Nothing is listed here.

A claim of `registry.Claim` has exactly one test, run for every mechanism that makes it.

Each second spent here on one mechanism is spent on all, and compiling takes nearly all of it. So
shapes are tiny, bodies are jitted whole, and the tests of one mechanism run in a row and share its
programs, which are kept by `recent`.
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


def each(names):
    """Runs a test for each name. The scope puts it next to the other tests of that name."""
    return pytest.mark.parametrize("name", names, scope="module")


def every(kind):
    return each([name for name, record in NAMES.items() if isinstance(record, kind)])


def every_mechanism_with(claim):
    mechanisms = registry.of_kind(registry.Mechanism)
    return each([name for name, record in mechanisms.items() if claim in record.claims])


every_mechanism = every(registry.Mechanism)
WITH_ORACLE = (registry.Mechanism, registry.Intervention, registry.Objective, registry.Probe)
recent = functools.lru_cache(maxsize=16)  # enough for one mechanism; programs take memory


def on_host(run):
    """`run` that gives numpy arrays: JAX would compile each operation of an assertion as well."""
    return lambda *args: jax.device_get(run(*args))


# ---- a function and its oracle ----


@recent
def example(name, T):
    return registry.get(name).example(KEY, T)


def floats(tree):
    return {k: x for k, x in tree.items() if jnp.issubdtype(x.dtype, jnp.floating)}


def cotangent(x):
    """A fixed random one for an output; of the kind that JAX asks for where that is no float."""
    if not jnp.issubdtype(x.dtype, jnp.inexact):
        return np.zeros(x.shape, jax.dtypes.float0)
    return np.asarray(np.random.default_rng(0).normal(size=x.shape), x.dtype)


def with_gradients(fn, args):
    """Output of fn and the gradient of each array of floating point, by random cotangents."""
    learned = floats(args)
    out, vjp = jax.vjp(lambda learned: fn(**(args | learned)), learned)
    if any(jnp.issubdtype(x.dtype, jnp.inexact) for x in jax.tree.leaves(out)):
        return out, vjp(jax.tree.map(cotangent, out))[0]
    return out, {}


@recent
def program(name, T, by="fn", **options):
    """The floats of an example -> output and gradients, by the record's `fn` or its `oracle`."""
    fn, args = getattr(registry.get(name), by), example(name, T)
    run = functools.partial(with_gradients, functools.partial(fn, **options))
    return on_host(jax.jit(lambda learned: run(args | learned)))


def assert_agrees_with_its_oracle(name, T, **options):
    """In the output and in every gradient, by autodiff of the oracle.

    Two implementations under one custom_vjp share its mistakes, so neither can judge the other.
    """
    known = {k: v for k, v in options.items() if k != "implementation"}
    learned = floats(example(name, T))
    actual = program(name, T, **options)(learned)
    expected = program(name, T, "oracle", **known)(learned)
    chex.assert_trees_all_close(actual, expected, rtol=1e-4, atol=1e-4)


# ---- a module ----


def build(name, **options):
    record = registry.get(name)
    return record.module(**(dict(record.small) | options))


def inputs(name, dtype="float32", T=8):
    """What the module of a mechanism takes, by its layout."""
    shape = dict(sequence=[(T,)], grid=[(T, T)], set=[(T,)], cross=[(T,), (T + 3,)])
    shapes = [(2, *axes, D) for axes in shape[registry.get(name).layout]]
    keys = jax.random.split(jax.random.key(1), len(shapes))
    return [jax.random.normal(k, s, dtype) for k, s in zip(keys, shapes, strict=True)]


@recent
def params_of(name):
    return jax.jit(build(name).init)(RNGS, *inputs(name))


def apply(name, *args, **options):
    return build(name).apply(*args, rngs=dict(noise=KEY), **options)


@recent
def module(name, dtype="float32"):
    """The module as one program (params, inputs, mask, weight) -> (output, gradients of both).

    They are gradients of a random projection of the output, in which each entry has its weight.
    """

    def loss(params, xs, mask, weight):
        options = {} if mask is None else dict(mask=mask)
        y = build(name, dtype=dtype).apply(params, *xs, rngs=dict(noise=KEY), **options)
        y32 = y.astype(jnp.float32)
        return (y32 * cotangent(y32) * weight).sum(), y

    def run(params, xs, mask=None, weight=1.0):
        grads, y = jax.grad(loss, (0, 1), has_aux=True)(params, xs, mask, weight)
        return y, grads

    return on_host(jax.jit(run))


# ---- every record ----


@every(WITH_ORACLE)
@pytest.mark.parametrize("T", [1, 67])  # a single token; no multiple of any tile
def test_agrees_with_its_oracle(name, T):
    for options in registry.get(name).variants:
        assert_agrees_with_its_oracle(name, T, **options)


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
    xs, params, run = inputs(name, dtype), params_of(name), module(name, dtype)
    assert set(params) <= {"params"}
    drawn = jax.eval_shape(build(name, dtype=dtype).init, RNGS, *xs)
    chex.assert_trees_all_equal_shapes_and_dtypes(drawn, params)
    out, (grads, _) = run(params, xs)
    assert out.dtype == dtype
    if registry.get(name).layout in ("sequence", "grid"):
        assert out.shape == xs[0].shape
    chex.assert_trees_all_equal(run(params, xs)[0], out)
    for path, grad in jax.tree.leaves_with_path(grads):
        assert np.isfinite(grad).all() and grad.any(), jax.tree_util.keystr(path)


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
    run = jax.jit(functools.partial(apply, name))
    y = run(jax.device_put(params, places), *jax.device_put(xs, split))
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
    record, args = registry.get(name), example(name, 33)
    # Rounded out here: a compiler may leave out a rounding whose result is at once raised again.
    rounded = {k: x.astype(jnp.bfloat16) for k, x in floats(args).items()}
    raised = {k: x.astype(jnp.float32) for k, x in rounded.items()}

    def all_three(raised, rounded):
        raised, rounded = args | raised, args | rounded
        return record.oracle(**raised), record.oracle(**rounded), record.fn(**rounded)

    truth, naive, fast = jax.device_get(jax.jit(all_three)(raised, rounded))
    error = lambda x: np.sqrt(np.mean((x.astype(np.float32) - truth) ** 2))
    assert fast.dtype == jnp.bfloat16
    scale = np.sqrt(np.mean(truth**2))
    assert error(fast) <= 2 * error(naive.astype(jnp.bfloat16)) + 2**-9 * scale


# ---- one test for each claim ----


@every_mechanism_with(Claim.CAUSAL)
def test_causal(name):
    run, params, [x] = module(name), params_of(name), inputs(name)
    each = np.eye(8, dtype=np.float32)[:, None, :, None]  # the weights of each output alone
    grads = np.stack([run(params, [x], masks.Causal(), one)[1][1][0] for one in each])
    reaches = grads.any((1, 3))  # t s
    assert reaches[4].any() and not np.triu(reaches, 1).any()


@every_mechanism_with(Claim.MASKABLE)
def test_masked_token_has_no_influence(name):
    run, params, (*first, last) = module(name), params_of(name), inputs(name)
    valid = np.ones(last.shape[:2], bool)
    valid[0, 5:] = valid[1, 2] = False
    mask = masks.Valid(jnp.asarray(valid))
    if Claim.CAUSAL in registry.get(name).claims:
        mask = mask & masks.Causal()
    itself = registry.get(name).layout == "sequence"  # a masked query gives what nobody reads
    kept = (valid if itself else np.ones((2, 1)))[..., None].astype(np.float32)
    y, (_, [*_, grad]) = run(params, [*first, last], mask, kept)
    assert not grad[~valid].any() and grad[valid].any()
    other, _ = run(params, [*first, np.where(valid[..., None], last, 1e3)], mask, kept)
    chex.assert_trees_all_equal(*(np.where(kept, x, 0) for x in (y, other)))


@every_mechanism_with(Claim.MASKABLE)
def test_query_that_sees_nothing_is_zero(name):
    args = example(name, 8)
    size = args["k"].shape[1] if "k" in args else 8
    fn = functools.partial(registry.get(name).fn, mask=masks.Valid(jnp.zeros((2, size), bool)))
    run = on_host(jax.jit(lambda learned: with_gradients(fn, args | learned)))
    value, grads = run(floats(args))
    for leaf in jax.tree.leaves((value, grads)):
        assert np.isfinite(leaf).all()
    if "v" in args:
        assert not value.any() and not grads["v"].any()


@every_mechanism_with(Claim.CROSS)
def test_takes_other_keys_than_queries(name):
    record, args = registry.get(name), example(name, 9)
    args = args | dict(q=args["q"][:, :5])
    actual, expected = jax.jit(lambda args: (record.fn(**args), record.oracle(**args)))(args)
    chex.assert_trees_all_close(actual, expected, rtol=1e-4, atol=1e-4)
    assert actual.shape[1] == 5


def _permuted(name):
    run, params, [x] = module(name), params_of(name), jax.device_get(inputs(name))
    order = np.random.default_rng(0).permutation(8)
    return run(params, [x])[0], run(params, [x[:, order]])[0], order


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
    params, [x] = params_of(name), jax.device_get(inputs(name))
    extend, state, ys = _extend(name), apply(name, params, 2, 8, method="init_state"), []
    for piece in np.split(x, np.cumsum(pieces)[:-1], axis=1):
        state, y = extend(params, state, piece)
        ys.append(y)
    expected, _ = module(name)(params, [x], masks.Causal(), np.ones((1, 8, 1), np.float32))
    chex.assert_trees_all_close(np.concatenate(ys, 1), expected, rtol=1e-4, atol=1e-5)


@recent
def _extend(name):
    return jax.jit(functools.partial(apply, name, method="extend"))


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
    assert_agrees_with_its_oracle(name, 67, implementation="interpret")
    run, example = _with_gradient(name, implementation="pallas")
    exported = jax.export.export(jax.jit(run), platforms=["tpu"])(example(256))
    assert "tpu_custom_call" in exported.mlir_module()


@every_mechanism_with(Claim.CONTEXT_PARALLEL)
def test_four_devices_equal_one(name):
    record = registry.get(name)
    mesh, args = sharding.make_mesh(context=4), example(name, 16)
    options = dict(mask=masks.Causal()) if Claim.CAUSAL in record.claims else {}
    expected = program(name, 16, **options)(floats(args))
    assert record.context
    for strategy in record.context:
        fn = functools.partial(parallel.shard(strategy, record, mesh), **options)
        actual = jax.jit(functools.partial(with_gradients, fn))(args)
        chex.assert_trees_all_close(actual, expected, rtol=1e-5, atol=1e-5)


@every_mechanism_with(Claim.DENSE_TWIN)
def test_dense_twin(name):
    xs, params, run = inputs(name), params_of(name), functools.partial(apply, name)
    twin = jax.jit(edit.rewrite(run, weights=lambda w: w))(params, *xs)
    chex.assert_trees_all_close(twin, module(name)(params, xs)[0], rtol=1e-4, atol=1e-5)
    _, maps = jax.eval_shape(edit.read(run), params, *xs)
    assert all(w.ndim == 4 for w in maps.values())


@every_mechanism_with(Claim.FORWARD_MODE)
def test_forward_mode(name):
    args = example(name, 67)
    learned, draw = floats(args), np.random.default_rng(1).normal
    tangents = {k: draw(size=x.shape).astype(np.float32) for k, x in learned.items()}
    fn = lambda learned: registry.get(name).fn(**(args | learned))
    _, tangent = on_host(jax.jit(lambda *pair: jax.jvp(fn, *pair)))((learned,), (tangents,))
    out, grads = program(name, 67)(learned)
    forward = (tangent * cotangent(out)).sum()
    backward = sum((grads[k] * tangents[k]).sum() for k in learned)
    chex.assert_trees_all_close(forward, backward, rtol=1e-3)


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
