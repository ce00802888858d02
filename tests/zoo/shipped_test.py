"""The checkpoints that come with the library do what their cards say."""

import functools

import jax
import pytest

from attnjax import zoo
from attnjax.zoo import store
from experiments import evaluation, finished

NAMES = [card.name for card in zoo.list(root=store.SHIPPED)]


# They run for so long that it takes less to compile them well.
SLOW = ("lm_mamba-tiny.mqar-short@1", "lm_landmark-tiny.mqar-short@1")


@pytest.fixture(scope="module", autouse=True)
def examples_are_drawn_once():
    draw = evaluation.padded_batches
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluation, "padded_batches", functools.cache(lambda *x: [*draw(*x)]))
        yield


@pytest.fixture(params=NAMES)
def name(request):
    jax.config.update("jax_disable_most_optimizations", request.param not in SLOW)
    yield request.param
    jax.config.update("jax_disable_most_optimizations", True)


def test_a_shipped_checkpoint_repeats_its_metric(name):
    module, params, card = zoo.load(name)
    measured = finished.measure(finished.task_text(card), module, params, batch_size=180)
    for metric, value in measured.items():
        assert value == pytest.approx(card.metrics[metric]["per_seed"][0], rel=1e-3)
    assert card.parameters == sum(x.size for x in jax.tree.leaves(params))


def test_there_are_small_ones_of_different_families():
    cards = zoo.list(root=store.SHIPPED)
    families = {name.partition(".")[0] for card in cards for name in card.mechanisms}
    assert len(cards) >= 20 and len(families) >= 6
    for card in cards:
        assert sum(f.stat().st_size for f in (store.SHIPPED / card.name).iterdir()) <= 2**20
        assert len(card.metrics["accuracy"]["per_seed"]) >= 3
        assert card.command.startswith("attnjax train ")
