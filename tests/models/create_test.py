import jax
import numpy as np
import pytest

from attnjax import models, zoo
from tests.models import helpers


@pytest.mark.parametrize("name", helpers.named("sequence", "grid", "set"))
def test_every_mechanism_through_the_zoo(name, tmp_path):
    kind, options = helpers.model_of(name)
    model = models.create(kind, **options)
    _, shapes = helpers.shapes_of(model)
    params = jax.tree.map(lambda leaf: np.random.rand(*leaf.shape).astype(leaf.dtype), shapes)
    card = zoo.Card(
        name="some-tiny.copy@1",
        task=dict(name="copy", options={}),
        model=dict(kind=kind, options=options),
        mechanisms=(name,),
        config={},
        commit="0" * 40,
        seed=0,
        command="attnjax train copy",
        data_hash="0",
        metrics={},
        reference=None,
        licence="Apache-2.0",
        created="2026-11-21",
    )
    zoo.save(card.name, params, card, root=tmp_path)
    loaded, weights, _ = zoo.load(card.name, root=tmp_path)
    assert loaded == model
    jax.tree.map(np.testing.assert_array_equal, weights, params)


def test_kinds_are_files():
    assert {"lm", "vit"} <= set(models.kinds())
    assert not {"block", "backbone"} & set(models.kinds())


def test_lists_are_tuples():
    model = helpers.vit(mixers=["gqa", "multi_head_attention"])
    assert model.image_size == (32, 32) and model.mixers == ("gqa", "multi_head_attention")
    hash(model)


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("vitt", {}, "no model is called 'vitt'; did you mean vit"),
        ("block", {}, "no model is called 'block'.*there are .*lm"),
        ("lm", dict(feature=3), "lm has no option 'feature'; did you mean features"),
        ("lm", dict(features=3), "lm needs the options depth, num_heads, vocab_size"),
        ("lm", dict(parent=None), "lm has no option 'parent'"),
    ],
)
def test_refuses(kind, options, message):
    with pytest.raises(ValueError, match=message):
        models.create(kind, **options)
