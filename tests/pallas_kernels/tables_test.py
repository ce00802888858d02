"""Tables of devices: what is shipped, which row answers, and that operations do as it says."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import pytest

from attnjax.ops import dot_product_attention as ops
from attnjax.ops import softmax_choice
from pallas_kernels import (
    decay_attention,
    flash_attention,
    linear_recurrence,
    placing,
    selective_scan,
    tables,
)
from pallas_kernels.flash_attention.mosaic_gpu import tile_sizes

RULE = {"how": "computed", "rule": "r"}
PATHS = sorted(tables.FOLDER.glob("*.json"))
CASE = dict(dtype="float32", head_dim=64, length=100)


def row(implementation, **options):
    return tables.Row(operation="f", implementation=implementation, source=RULE, **options)


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_shipped_tables(path):
    table = tables.read(path)  # which refuses a measured row that doesn't say of what
    assert tables.path_of(table.kind) == path and tables.of(table.kind) == table
    names = {"cpu": {"dense", "blocked"}, "tpu": {"dense", "blocked", "pallas"}}
    names |= {"cuda": names["tpu"] | {"cudnn"}}
    for x in table.rows:
        assert x.operation == "dot_product_attention" and x.implementation in names[table.platform]
    most = 512 if table.platform == "cpu" else 256
    for length in (1, most, most + 1, 10**6):  # small matrices are held, larger ones aren't
        for dtype in ("float32", "bfloat16"):
            found = table.find("dot_product_attention", dtype=dtype, head_dim=128, length=length)
            assert found is None or (found.implementation == "dense") == (length <= most)


def test_what_is_shipped_as_measured_is_in_the_benchmark():
    measured = [x for x in tables.of("cpu").rows if x.source["how"] == "measured"]
    pages = {x.source["where"] for x in measured}
    [page] = [json.loads((tables.FOLDER.parents[1] / page).read_text()) for page in pages]
    for x in measured:
        assert x.source["jax"] == page["versions"]["jax"]
        assert x.source["driver"] == page["machine"]["platform"]
    assert not any(
        x.source["how"] == "measured"
        for path in PATHS
        for x in tables.read(path).rows
        if path.stem != "cpu"
    )


@pytest.mark.parametrize(
    "how, reason",
    [(None, "must have a `how`"), ("guessed", "must have a `how`"), ("computed", "say .'rule'"),
     ("measured", "say .'date', 'device', 'driver'"), ("published", "say .'what', 'where'")],
)  # fmt: skip
def test_a_row_says_where_it_comes_from(how, reason):
    with pytest.raises(ValueError, match=reason):
        tables.Row(operation="f", implementation="a", source={"how": how})


def test_nearest_classes():
    narrow = [row("a", head_dim=64, length=256), row("b", head_dim=64, tiles={"chunk": 32})]
    wide = [row("c", head_dim=128, length=256), row("d", head_dim=128, length=512)]
    table = tables.Table("x", "cpu", (*narrow, *wide, row("e", dtype="bfloat16")))
    find = lambda **case: table.find("f", **dict(CASE) | case).implementation
    assert [find(length=n) for n in (1, 256, 256.5, 10**6)] == ["a", "a", "b", "b"]
    assert [find(head_dim=n) for n in (8, 64, 65, 1000)] == ["a", "a", "c", "c"]
    assert find(head_dim=128, length=10**6) == "d"  # of the largest class that there is
    assert find(implementation="b") == "b" and find(dtype=jnp.bfloat16) == "e"
    assert table.find("g", **CASE) is None is table.find("f", **CASE, implementation="z")
    assert table.tile("chunk", 64, "f", **dict(CASE) | {"length": 999}) == 32
    assert table.tile("chunk", 64, "f", **CASE) == 64 == table.tile("chunk", 64, "g", **CASE)


def test_a_table_is_written_as_it_is_read(tmp_path):
    table = tables.Table("a B-1", "cpu", (row("a", tiles={"x": 1}), row("b", length=3)))
    assert tables.path_of(table.kind).name == "a_b_1.json"
    tables.write(tmp_path / "new/t.json", table)
    assert tables.read(tmp_path / "new/t.json") == table


def test_the_table_in_force():
    assert tables.here() == tables.of("cpu") and tables.here().rows
    assert tables.of("no such device") == tables.Table("no such device")
    mine = tables.Table("mine", "tpu")
    with tables.using(mine):
        assert tables.here() is mine is tables.of("mine") and tables.of("cpu").rows
    assert tables.here().kind == "cpu"


@pytest.mark.parametrize(
    "kind, dtype, most",
    [("TPU v5", "bfloat16", 1024), ("TPU v6 lite", "bfloat16", 2048), ("TPU v4", "float32", 512),
     ("NVIDIA H100 80GB HBM3", "bfloat16", 1024), ("unknown", "bfloat16", 1024)],
)  # fmt: skip
def test_tiles_of_the_kernel_for_tpu(kind, dtype, most):
    def largest(**options):
        found = []
        take = lambda q: found.extend(flash_attention.choices(q, q, q, **options))
        jax.eval_shape(take, jax.ShapeDtypeStruct((1, 8192, 1, 128), dtype))
        return found[0][:2]

    assert largest(kind=kind) == (most, most)
    tiles = dict(block_q=256, block_k=512)
    mine = dataclasses.replace(row("pallas", tiles=tiles), operation="dot_product_attention")
    with tables.using(tables.Table("new", "tpu", (mine,))):
        assert largest() == (256, 512)


SHAPE = jax.ShapeDtypeStruct((1, 64, 1, 8), "float32")
LONG = jax.ShapeDtypeStruct((1, 2048, 1, 8), "float32")


@pytest.mark.parametrize("platform", ["cpu", "tpu", "cuda"])
def test_attention_is_what_the_table_says(monkeypatch, platform):
    """Of a fake table: which function is called for the device at hand."""
    asked = []
    for name in ("dense_attention", "_blocked", "_by_platform"):
        real = getattr(softmax_choice, name)
        spy = lambda *args, real=real, name=name, **options: (
            asked.append(name) or real(*args, **options)
        )
        monkeypatch.setattr(softmax_choice, name, spy)

    def first(*rows, k=LONG):
        asked.clear()
        rows = (tables.Row(operation="dot_product_attention", source=RULE, **x) for x in rows)
        with tables.using(tables.Table("x", platform, tuple(rows))):
            jax.eval_shape(lambda *x: ops.dot_product_attention(*x), SHAPE, k, k)  # traced anew
        return asked[0]

    assert first(dict(implementation="dense")) == "dense_attention"
    assert first() == "_by_platform" and first(k=SHAPE) == "dense_attention"
    own = "_blocked" if platform == "tpu" else "_by_platform"
    assert first(dict(implementation="blocked"), k=SHAPE) == own
    for name in ("xla", "tokamax" if platform == "cpu" else "new"):
        with pytest.raises(ValueError, match="must name an implementation that there is on x"):
            first(dict(implementation=name))


@pytest.mark.parametrize("implementation", ["xla", "pallas", "new"])
@pytest.mark.parametrize("here", ["tpu", "cuda", "cpu"])
def test_kernels_are_what_the_table_says(monkeypatch, implementation, here):
    monkeypatch.setattr(placing, "whole", lambda: True)
    kernels = dict(xla=jnp.sin, tpu=jnp.cos, gpu=jnp.tanh)
    chosen = row(implementation)

    def lowered(platform, gpu=jnp.tanh, fits=True):
        options = kernels | dict(gpu=gpu, row=chosen, fits=fits)
        with tables.using(tables.Table("x", here)):
            program = jax.jit(lambda x: placing.run((x,), None, **options)).trace(1.0)
        text = program.lower(lowering_platforms=(platform,)).as_text()
        return [x for x in ("sine", "cosine", "tanh") if f"stablehlo.{x}" in text]

    if implementation == "new" or (implementation, here) == ("pallas", "cpu"):
        with pytest.raises(ValueError, match="must name 'xla', or a kernel that there is for"):
            lowered("tpu")
        return
    by_xla = implementation == "xla"
    assert lowered("tpu") == (["sine"] if by_xla and here == "tpu" else ["cosine"])
    assert lowered("cuda") == (["sine"] if by_xla or here == "tpu" else ["tanh"])
    assert lowered("cpu") == ["sine"] == lowered("tpu", fits=False)
    assert lowered("cuda", fits=False) == lowered("cuda")  # a TPU's memory is of no matter there
    if here == "cuda":

        def refuses(x):
            raise NotImplementedError

        assert lowered("cuda", gpu=refuses) == ["sine"]


X = jax.ShapeDtypeStruct((1, 32, 2, 8), "float32")
OPERATIONS = {
    "linear_recurrence": lambda x: linear_recurrence.linear_recurrence(x, x, x),
    "decay_attention": lambda x: decay_attention.decay_attention(x, x, x, -(x[0, 0, :, 0] ** 2)),
    "selective_scan": lambda x: selective_scan.selective_scan(
        x, x**2, jnp.zeros((2, 8, 8)), x, x, x[0, 0]
    ),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_chunks_are_those_of_the_table(name):
    """One that can't be shows that it is asked for."""
    wrong = dataclasses.replace(row("xla", tiles={"chunk": 24}), operation=name)
    refused = pytest.raises(ValueError, match="chunk=24 must be a positive multiple of 16")
    with tables.using(tables.Table("x", "cpu", (wrong,))), refused:
        jax.eval_shape(OPERATIONS[name], X)
    jax.eval_shape(OPERATIONS[name], X)


def test_columns_on_hopper():
    narrow = row("pallas", tiles={"block_k": 64})
    narrow = dataclasses.replace(narrow, operation="dot_product_attention")
    q = jnp.zeros((1, 256, 1, 64), "bfloat16")
    assert tile_sizes.columns(128, q, q, q) == 128  # compiled ahead, or interpreted
    with tables.using(tables.Table("x", "cuda", (narrow,))):
        assert tile_sizes.columns(128, q, q, q) == 64 and tile_sizes.columns(32, q, q, q) == 32
