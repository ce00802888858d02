import jax
import numpy as np
import pytest

from attnjax.parallel import travel
from tests.parallel import helpers

ORDERS = ("contiguous", "zigzag", "striped")


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("size", [1, 3, 4])
def test_pieces_hold_every_position_once(order, size):
    length = 2 * travel.multiple(order, size) // size
    pieces = [travel.positions(order, i, size, length) for i in range(size)]
    assert sorted(np.concatenate(pieces)) == list(range(size * length))
    together = travel.positions(order, np.arange(size)[:, None], size, length)
    assert (together == np.stack(pieces)).all()


def test_orders_are_those_of_the_docstring():
    assert list(travel.positions("zigzag", 1, 4, 4)) == [2, 3, 12, 13]
    assert list(travel.positions("striped", 1, 4, 4)) == [1, 5, 9, 13]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("stride", [1, 2])
def test_arrange_sends_tokens_where_positions_say(order, stride):
    """In rings of `stride` columns, each with a sequence of its own."""
    ring, mesh = travel.Ring("context", stride), helpers.mesh(context=4)
    size = 4 // stride
    length = size * travel.multiple(order, size)
    column = np.stack([np.arange(length) + 1000 * c for c in range(stride)])
    x = column.reshape(stride, size, -1).swapaxes(0, 1).reshape(1, -1)

    def body(x):
        arranged = ring.arrange(x, order, 1)
        return arranged, ring.restore(arranged, order, 1)

    spec = jax.P(None, "context")
    run = jax.shard_map(body, mesh=mesh, in_specs=spec, out_specs=(spec, spec))
    arranged, back = jax.device_get(jax.jit(run)(x))
    assert (back == x).all()
    for device, piece in enumerate(arranged.reshape(4, -1)):
        at = travel.positions(order, device // stride, size, len(piece))
        assert (piece == at + 1000 * (device % stride)).all()


def test_rotation_brings_what_the_device_before_had():
    ring, mesh = travel.Ring("context"), helpers.mesh(context=4)
    spec = jax.P("context")
    run = lambda by: jax.shard_map(
        lambda x: ring.rotate(x, by), mesh=mesh, in_specs=spec, out_specs=spec
    )
    for by in (1, 3, -1, 4):
        assert jax.jit(run(by))(np.arange(4)).tolist() == [(i - by) % 4 for i in range(4)]


def test_refuses_an_unknown_order():
    with pytest.raises(ValueError, match="order='zig' must be one of"):
        travel.check_order("zig")
