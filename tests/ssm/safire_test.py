"""Only what is particular to SaFiRe: how text and regions reach each other."""

import inspect

import chex
import jax
import jax.numpy as jnp
import pytest

from attnjax.core import masks
from attnjax.ssm import safire as lib
from tests.initial import initial

KEY = jax.random.key(0)
ARGS = initial(lambda key: lib.SPEC.example(key, 8), KEY)  # 8 cells and 8 tokens
REST = ARGS | dict(saccade=jnp.zeros((2, 4, 8)))


def off(args, way):
    """Without the scan of one direction: its steps are 0, and so is its skip."""
    return args | dict(
        bias=args["bias"].at[:, way].set(-1e3),
        widen=args["widen"].at[:, way].set(0),
        skip=args["skip"].at[:, way].set(0),
    )


@jax.jit
def reach(args):
    """Which cells, and which tokens of the text, each cell depends on: one cycle, regions of 3."""
    one = {k: a if k in ("x", "text") else a[:1] for k, a in args.items()}
    run = lambda x, text: lib.safire(**one | dict(x=x, text=text), region=3)[0].sum(-1)
    by = jax.jacrev(run, (0, 1))(args["x"], args["text"])
    return [jnp.abs(jacobian[:, 0]).sum(-1) > 0 for jacobian in by]


def test_scans_bring_text_and_all_regions_to_each_cell():
    cells, text = reach(REST)
    assert cells.all() and text.all()


def test_a_scan_goes_from_region_to_text_to_region():
    cells, text = reach(off(REST, 1))
    chex.assert_trees_all_equal(cells, jnp.tri(8, dtype=bool))
    after = jnp.arange(8) >= 3  # the first region comes before any text
    chex.assert_trees_all_equal(text, jnp.broadcast_to(after[:, None], (8, 8)))
    cells, text = reach(off(REST, 0))
    chex.assert_trees_all_equal(cells, jnp.tri(8, dtype=bool).T)
    assert text.all()


def test_saccade_alone_brings_the_sentence_to_each_cell_and_nothing_else():
    alone = off(off(ARGS, 0), 1)
    alone["skip"] = ARGS["skip"]  # what is left of the scans: each cell by itself
    cells, text = reach(alone)
    chex.assert_trees_all_equal(cells, jnp.eye(8, dtype=bool))
    assert text.all()


def test_cycles_follow_each_other():
    @jax.jit
    def run():
        x = ARGS["x"]
        for n in range(2):
            part = {k: a if k in ("x", "text") else a[n : n + 1] for k, a in ARGS.items()}
            x = lib.safire(**part | dict(x=x), region=3)
        return lib.safire(**ARGS, region=3), x

    chex.assert_trees_all_close(*run(), rtol=1e-5, atol=1e-5)


def test_padding_of_the_text_is_as_if_it_were_not_there():
    valid = masks.Valid(jnp.broadcast_to(jnp.arange(8) < 5, (2, 8)))
    short = ARGS | dict(text=ARGS["text"][:, :5])
    run = jax.jit(lambda: (lib.safire(**ARGS, region=3, mask=valid), lib.safire(**short, region=3)))
    chex.assert_trees_all_close(*run(), rtol=1e-5, atol=1e-5)


def test_what_cannot_be_done_raises():
    with pytest.raises(ValueError, match="region=0 must be at least 1"):
        inspect.unwrap(lib.safire)(**ARGS, region=0)
    with pytest.raises(NotImplementedError, match="safire can't honour Causal"):
        lib.safire(**ARGS, mask=masks.Causal())


def test_the_module_hands_on_its_options():
    seen = {}

    def spy(x, *arrays, **options):
        seen.update(options)
        return x

    module = lib.Safire(region=5, fn=spy)
    jax.eval_shape(module.init, KEY, jnp.zeros((1, 7, 8)), jnp.zeros((1, 2, 3)))
    assert seen == dict(region=5, mask=None)
