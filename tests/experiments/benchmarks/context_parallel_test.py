import json

import jax
import numpy as np
import pytest

from attnjax.core import masks, sharding
from attnjax.parallel import matrix
from experiments.benchmarks import context_parallel
from experiments.context_benchmark import cells as context_cells
from experiments.context_benchmark import counts, results
from experiments.context_benchmark import masks as context_masks
from experiments.context_benchmark import rows as context_rows
from experiments.planning import hlo
from experiments.planning import runs as plan_runs

SIZES = context_cells.Sizes(heads=2, kv_heads=2, head_dim=4, dtype="float32")
FLOAT = 4  # bytes


def place(**options):
    return context_rows.Place(jax.devices(), SIZES, **options)


def test_masks():
    T = 64
    found = {
        name: None if mask is None else np.asarray(masks.dense(mask, T, T))[0, 0]
        for name, mask in context_masks.by_name(T).items()
    }
    document = np.repeat(np.arange(8), np.arange(1, 16, 2))  # of 1, 3, 5 ... 15 tokens
    t, s = np.arange(T)[:, None], np.arange(T)[None]
    same, past = document[:, None] == document[None], s <= t
    assert found["full"] is None
    np.testing.assert_array_equal(found["causal"], past)
    np.testing.assert_array_equal(found["sliding"], past & (t - s < 8))
    np.testing.assert_array_equal(found["document"], past & same)
    np.testing.assert_array_equal(found["shared-prefix"], past & (same | (s < 4)))
    assert found["block"].diagonal().all() and 0.1 < found["block"].mean() < 0.2
    assert found["block"].sum() < context_masks.by_name(40 * T)["block"].selected.size / 4


def test_everything_there_is_takes_part():
    (record, strategies), *_ = context_cells.functions().values()
    assert set(matrix.tables()[0].strategies) <= set(strategies)
    assert context_cells.implementations(record.fn)[:3] == (None, "dense", "blocked")
    assert "interpret" not in context_cells.ways() and "block_ring" in context_cells.ways()


@pytest.fixture(scope="module")
def rows():
    """One device, two that work, and one that has fewer heads than devices."""
    only = "dense", "gather", "ring", "all_to_all"
    cells = context_cells.of("dot_product_attention", "document", 32, (4,), only)
    advanced = []
    rows = context_rows.of(cells, place(runs=1, gigabytes=1.0), lambda: advanced.append(1))
    assert len(advanced) == len(rows) == len(cells)
    return rows


def of(rows, strategy):
    return next(row for row in rows if row["strategy"] == strategy)


def test_rows_are_exact_or_refused(rows):
    assert rows[0]["times_one_device"] == 1 and rows[0]["error"] == 0 and not rows[0]["sent"]
    assert "can't split N=2 heads over 4 devices" in of(rows, "all_to_all")["refused"]
    run = [row for row in rows if "refused" not in row]
    assert len(run) == len(rows) - 1
    for row in run:
        assert row["seconds"] > 0 and row["error"] <= context_parallel.TOLERANCE


def test_bytes_against_formulas(rows):
    piece = 32 // 4 * SIZES.kv_heads * SIZES.head_dim * FLOAT  # of keys, or values
    back = 3 * 2 * piece  # gradients reach their owner from three other devices
    assert of(rows, "gather")["sent"] == {"all-gather": 3 * 2 * piece, "reduce-scatter": back}
    # three rotations forward, three backward of which the first is the same, four of gradients
    assert of(rows, "ring")["sent"] == {"collective-permute": (3 + 2 + 4) * 2 * piece}


def test_an_error_is_seen(rows):
    one, other = [np.ones(4), np.arange(4.0)], [np.ones(4), np.arange(4.0) + [0, 0, 0, 1e-3]]
    assert context_rows.largest_error(one, one) == 0
    assert 2e-4 < context_rows.largest_error(other, one) < 3e-4


@pytest.mark.parametrize("known", [True, False])
def test_balance_of_a_loop_that_is_longer_in_some_devices(known):
    def fn(x, n):
        trips = jax.lax.axis_index("context") + 1 if known else n[0]
        return jax.lax.fori_loop(0, trips, lambda _, x: x @ x, x)

    mesh, P = sharding.make_mesh(context=4), jax.sharding.PartitionSpec
    run = jax.shard_map(fn, mesh=mesh, in_specs=(P("context"), P()), out_specs=P("context"))
    compiled = jax.jit(run).lower(np.ones((16, 4), np.float32), np.ones(1, np.int32)).compile()
    found = counts.of(compiled, [0] * 4)
    assert found["operations"] == (4 * 2 * 4**3 if known else None)
    assert found["balance"] == (4 / np.mean([1, 2, 3, 4]) if known else None)


KERNEL = """HloModule m, is_scheduled=true

ENTRY %main (n: s32[], x: f32[4,4]) -> f32[4,4] {{
  %n = s32[] parameter(0)
  %x = f32[4,4] parameter(1)
  ROOT %k = f32[4,4] custom-call({operands}), custom_call_target="tpu_custom_call"
}}
"""


@pytest.mark.parametrize(("operands", "expected"), [("%n, %x", ["k"]), ("%x, %n", [])])
def test_kernels_that_may_skip_tiles_are_named(operands, expected):
    module = hlo.read(KERNEL.format(operands=operands))
    assert counts.in_full(module, plan_runs.runs(module, [0, 1])) == expected


def test_what_is_too_large_is_not_run():
    cells = context_cells.of("dot_product_attention", "full", 16, (4,), ("gather",))
    rows = context_rows.of(cells, place(runs=1, gigabytes=0.0), lambda: None)
    assert all("temporaries would take" in row["not_run"] for row in rows)
    assert all(row["temporaries"] > 0 and "seconds" not in row for row in rows)


@pytest.mark.parametrize(("target", "length"), [("", 2**20), ("v5e:4x4", 2**17)])
def test_scores_that_nobody_can_hold_are_refused_before_their_mask_is_made(target, length):
    cell, *_ = context_cells.of("dot_product_attention", "causal", length, (4,), ("dense",))[1:]
    row, run = place(target=target, gigabytes=4.0).compiled(cell)
    assert cell.implementation == "dense" and run is None
    assert row["refused"] == f"its scores alone would take {2 * length**2 * FLOAT / 1e9:.1f} GB"


def test_files(rows, tmp_path):
    out, about = tmp_path / "numbers.json", results.circumstances("", SIZES._asdict())
    longer = [row | {"length": 64} for row in rows]
    results.write(about, results.joined(rows, longer), out)
    results.draw(out)
    text = out.with_suffix(".md").read_text()
    assert "refused: all_to_all can't split" in text and "32 tokens" in text and "64 tokens" in text
    assert all((tmp_path / f"{name}.png").exists() for name in ("numbers", "numbers_lengths"))
    kept = results.kept(out, about)
    renewed = results.joined(kept, [rows[0] | {"seconds": 7.0}])
    assert len(renewed) == len(kept) == 2 * len(rows) and renewed[0]["seconds"] == 7.0
    with pytest.raises(ValueError, match="has another machine, versions or settings"):
        results.kept(out, json.loads(json.dumps(about)) | {"target": "v5e:2x2"})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(target="v9:2x2"), "no accelerator is called 'v9'"),
        (dict(target="v5e:2x2", devices=(2,)), "devices=(2,) must not be given"),
    ],
)
def test_what_cannot_be_is_named(options, message, capsys):
    assert context_parallel.run(context_parallel.Config(**options)) == 2
    assert message in capsys.readouterr().err
