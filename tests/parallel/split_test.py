import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from attnjax.core import masks
from attnjax.parallel import layout, split
from tests.parallel import helpers

BATCH = ("data", "fsdp")


def fn(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    gate: Float[Array, "#B T N"] | None = None,
    decay: Float[Array, "N"] | None = None,
    *,
    mask: masks.Mask | None = None,
    scale: float = 1.0,
) -> Float[Array, "B T N H"]:
    raise NotImplementedError


def places(call, **axes):
    return layout.Places(helpers.mesh(**axes), "context", call)


def call(B=2, T=8, S=8, N=4, K=2, **options):
    q, k, gate = jnp.ones((B, T, N, 3)), jnp.ones((B, S, K, 3)), jnp.ones((1, T, N))
    return split.bind(fn, (q, k), dict(gate=gate, decay=jnp.ones(N)) | options)


def test_bind_sorts_arguments():
    mask = masks.Causal()
    bound = call(mask=mask)
    assert set(bound.arrays) == {"q", "k", "gate", "decay"} and bound.mask == mask
    assert bound.options == dict(scale=1.0)
    assert set(split.bind(fn, (bound.arrays["q"],) * 2, {}).arrays) == {"q", "k"}


def test_axes_lie_where_their_letters_say():
    bound = call()
    specs = places(bound, data=1, context=2, tensor=2).of_arrays(bound)
    assert specs["q"] == specs["k"] == P(BATCH, "context", "tensor", None)
    assert specs["gate"] == P(None, "context", "tensor")
    assert specs["decay"] == P("tensor")


@pytest.mark.parametrize(
    ("sizes", "q", "k"),
    [
        (dict(K=1), "tensor", None),
        (dict(N=6, K=3), "tensor", "tensor"),
        (dict(N=3, K=3), None, None),
    ],
    ids=str,
)
def test_heads_that_do_not_divide_are_whole_or_repeated(sizes, q, k):
    bound = call(**sizes)
    specs = places(bound, context=2, tensor=2).of_arrays(bound)
    assert specs["q"][2] == q and specs["k"][2] == k


def test_key_heads_are_repeated_as_often_as_devices_need_them():
    bound = call(N=12, K=2)
    place = places(bound, tensor=4, context=1)
    assert (place.repeat, place.here("N"), place.here("K")) == (2, 3, 1)
    k = place.fill_up(bound).arrays["k"]
    assert k.shape[2] == 4


def test_a_bias_has_the_rows_of_its_queries():
    def biased(
        q: Float[Array, "B T N H"], bias: Float[Array, "#B #N #T #S"], k: Float[Array, "B S H"]
    ):
        raise NotImplementedError

    arrays = lambda *shape: (jnp.ones((2, 6, 4, 3)), jnp.ones(shape), jnp.ones((2, 5, 3)))
    of = lambda *shape: split.bind(biased, arrays(*shape), {})
    bound = of(1, 4, 6, 5)
    assert bound.letters["bias"] == ("1", "N", "T", split.COLUMNS)
    place = places(bound, context=4)
    assert place.of_arrays(bound)["bias"] == P(None, "tensor", "context", None)
    assert place.fill_up(bound).arrays["bias"].shape == (1, 4, 8, 5)
    assert of(2, 1, 1, 5).letters["bias"] == ("B", "1", "1", split.COLUMNS)


def test_a_grid_of_any_rank_is_split_along_its_first_axis():
    def over(v: Float[Array, "B *T N V"]) -> Float[Array, "B *T N V"]:
        raise NotImplementedError

    bound = split.bind(over, (jnp.ones((2, 6, 5, 4, 3)),), {})
    assert bound.letters["v"] == bound.letters["return"] == ("B", "T", "", "N", "V")


def test_a_batch_that_does_not_divide_is_whole():
    bound = call(B=3)
    batch, time, *_ = places(bound, data=2, context=2).of_arrays(bound)["q"]
    assert batch is None and time == "context"


def test_arrays_of_masks_keep_their_positions():
    segments = masks.Segments(jnp.zeros((2, 8), int))
    blocks = masks.Blocks(jnp.ones((1, 4, 2, 2), bool), 4, 4)
    bound = call(mask=segments & blocks)
    specs = places(bound, context=2, tensor=2).of_mask(bound.mask)
    assert specs == [P(BATCH, None), P(None, "tensor", None, None)]


def test_lengths_are_filled_up_and_cut():
    bound = call(T=7, S=5)
    place = places(bound, context=4)
    filled = place.fill_up(bound).arrays
    assert {n: x.shape[1] for n, x in filled.items() if x.ndim > 1} == dict(q=8, k=8, gate=8)
    assert place.cut(filled["q"], bound).shape == (2, 7, 4, 3)
    assert jax.tree.leaves(places(bound, context=1).fill_up(bound)) == jax.tree.leaves(bound)
