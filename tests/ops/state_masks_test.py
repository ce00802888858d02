"""Each by itself; that recurrences under masks are right is in the tests of their ops."""

import jax.numpy as jnp
import pytest

from attnjax.core import masks
from attnjax.ops import state_masks as ops

FIRST = masks.Segments(jnp.array([[4, 4, 1, 1, 4, 4]]))
SECOND = masks.Segments(jnp.array([[0, 0, 0, 0, 0, 7]]))


def test_a_token_adds_nothing_where_any_mask_says_padding():
    seen = jnp.array([[1, 1, 0, 1]], bool), jnp.array([[0, 1, 1, 1]], bool)
    x = ops.only_valid(jnp.ones((2, 4, 1, 3)), tuple(map(masks.Valid, seen)))
    assert (x == jnp.array([0, 1, 0, 1])[None, :, None, None]).all()
    assert ops.only_valid(x, ()) is x


def test_documents_are_runs_that_no_mask_divides():
    assert (ops.documents((FIRST, SECOND), "me") == jnp.array([[0, 0, 1, 1, 2, 3]])).all()
    assert ops.documents((), "me") is None
    with pytest.raises(NotImplementedError, match="me can't honour Segments with ids of their own"):
        ops.documents((masks.Segments(FIRST.q, FIRST.q),), "me")


def test_a_state_from_before_ends_with_the_first_document():
    same = masks.Segments(jnp.zeros((3, 5), int).at[1, 2].set(1).at[2, :].set(9))
    factor = ops.only_first(jnp.full((1, 2, 4, 1), 0.5), (same,))
    assert (factor == jnp.array([0.5, 0, 0.5])[:, None, None, None]).all()
