"""What records owe that are no mechanisms, checked for every file in the families."""

import functools
import inspect

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnjax.core import registry
from tests.programs import example, floats, program
from tests.records import every


@every(registry.Intervention)
def test_intervention_at_strength_zero_changes_nothing(name):
    record, args = registry.get(name), example(name, 17)

    def three(learned):
        given = args | learned
        changed = record.fn(**given, **record.variants[-1])
        return record.fn(**(given | record.identity)), record.untouched(**given), changed

    actual, untouched, changed = jax.device_get(jax.jit(three)(floats(args)))
    chex.assert_trees_all_equal(actual, untouched)
    same = jax.tree.map(lambda a, b: a.shape == b.shape and bool((a == b).all()), actual, changed)
    assert not all(jax.tree.leaves(same)), "an intervention must do something"


@every(registry.Intervention)
def test_intervention_keeps_its_budget(name):
    record = registry.get(name)
    for T in (5, 64):
        args = example(name, T)
        for options in record.variants:
            if record.budget is not None:
                run = functools.partial(record.fn, **options)
                size = record.size(jax.eval_shape(run, **args))
                assert 0 < size <= record.budget(**args, **options)


@every(registry.Objective)
def test_objective_is_a_finite_scalar(name):
    for T in (1, 67):
        value, grads = program(name, T)(floats(example(name, T)))
        assert value.shape == () and value.dtype == jnp.float32
        assert all(np.isfinite(g).all() and g.any() for g in jax.tree.leaves(grads))


@every(registry.Probe)
def test_probe_gives_named_finite_statistics(name):
    statistics, _ = program(name, 67)(floats(example(name, 67)))
    assert statistics and all(isinstance(key, str) for key in statistics)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(statistics))


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
