"""Where a table may name tokamax, what it is taken for then, and who measures it."""

import functools
import importlib.util
import sys
import types

import jax
import jax.numpy as jnp
import pytest

from attnjax.ops import dot_product_attention as ops
from attnjax.ops import tokamax_attention, tuning_candidates
from pallas_kernels import placing, tables


@pytest.fixture
def on_device(monkeypatch):
    """Whether a device whose table names tokamax takes it: a program has a sine then."""
    marked = types.SimpleNamespace(dot_product_attention=lambda q, k, v, **options: jnp.sin(q))
    monkeypatch.setitem(sys.modules, "tokamax", marked)
    monkeypatch.setattr(tokamax_attention, "_check_device", lambda platform: None)
    monkeypatch.setattr(placing, "whole", lambda: True)

    def taken(here, target, *, implementation=None, dtype="bfloat16", **options):
        source = {"how": "computed", "rule": "r"}
        row = dict(operation="dot_product_attention", implementation="tokamax", source=source)
        q, k = (jax.ShapeDtypeStruct((1, n, 2, 64), dtype) for n in (128, 256))
        attend = functools.partial(
            ops.dot_product_attention, implementation=implementation, **options
        )
        with tables.using(tables.Table("x", here, (tables.Row(**row),))):
            traced = jax.jit(lambda *x: attend(*x)).trace(q, k, k)
        return "stablehlo.sine" in traced.lower(lowering_platforms=(target,)).as_text()

    return taken


def test_a_table_may_name_it(on_device):
    for here in ("cuda", "tpu"):
        assert {x for x in ("cuda", "tpu", "cpu") if on_device(here, x)} == {here}


def test_it_is_not_taken_where_an_option_is_not_honoured(on_device, monkeypatch):
    assert on_device("tpu", "tpu", softcap=2.0)
    for here in ("cuda", "tpu"):
        assert not on_device(here, here, return_lse=True)
    assert not on_device("cuda", "cuda", sinks=jnp.ones(2))
    assert not on_device("tpu", "tpu", dtype="float32")
    assert not on_device("cuda", "cuda", implementation="blocked")
    monkeypatch.setattr(placing, "whole", lambda: False)
    assert not on_device("cuda", "cuda")


def test_without_the_package_it_is_as_before(on_device, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokamax", None)
    assert not on_device("cuda", "cuda")


def test_it_is_a_candidate_where_it_can_be_imported():
    by = tuning_candidates.CANDIDATES["dot_product_attention"]
    named = {x for x in by if "tokamax" in {candidate.implementation for candidate in by[x]}}
    assert named == ({"cuda", "tpu"} if importlib.util.find_spec("tokamax") else set())
