import chex
import jax
import jax.numpy as jnp
import pytest

from attnjax.core import masks
from attnjax.softmax import multi_head_latent_attention as mla
from attnjax.softmax import tpla

KEY = jax.random.key(0)
B, T, N, H, P, L, D = 2, 7, 3, 4, 2, 8, 12


def draw(i, *shape):
    return jax.random.normal(jax.random.fold_in(KEY, i), shape)


def sliced(c, up, slices):
    return c.reshape(*c.shape[:2], slices, -1), up.reshape(slices, -1, *up.shape[1:])


def arrays(c=None):
    c = draw(2, B, T, L) if c is None else c
    return draw(0, B, T, N, H), draw(1, B, T, N, P), c, draw(3, B, T, P), draw(4, L, N, 2 * H) / 3


def whole(q, q_rope, c, k_rope, up):
    latent = jnp.concatenate([c, k_rope], -1)
    fn, absorbed = mla.multi_head_latent_attention, dict(form="absorbed", mask=masks.Causal())
    return fn(q, q_rope, latent, up, **absorbed)


def in_slices(q, q_rope, c, k_rope, up, slices, shares=None):
    c, up = sliced(c, up, slices)
    return tpla.tpla(q, q_rope, c, k_rope, up, shares, mask=masks.Causal())


def test_one_slice_is_latent_attention_with_its_gradients():
    def run(fn):
        out, pull = jax.vjp(fn, *arrays())
        return out, pull(jnp.cos(out))

    one = lambda *args: in_slices(*args, slices=1)
    actual, expected = jax.jit(lambda: (run(one), run(whole)))()
    chex.assert_trees_all_close(actual, expected, rtol=1e-6, atol=1e-6)


def test_slices_that_are_alike_have_the_scores_of_the_whole():
    """Each is half of a score and of an output: with shares of 1/2 nothing is approximate."""
    q, q_rope, c, k_rope, up = arrays()
    c, up = (jnp.concatenate([x, x], axis) for x, axis in ((c, 2), (up, 0)))
    args = q, q_rope, c, k_rope, up
    halves = lambda: in_slices(*args, slices=2, shares=jnp.full(2, 0.5))
    actual, expected = jax.jit(lambda: (halves(), whole(*args)))()
    chex.assert_trees_all_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_a_rotation_leaves_latent_attention_as_it_is():
    x, down, gain = draw(5, B, T, D), draw(6, D, L), 1 + 0.3 * draw(7, L)
    q, q_rope, _, k_rope, up = arrays()
    norm = lambda c: tpla.normalise(c[:, :, None])[:, :, 0]  # in one slice: of the whole
    attend = jax.jit(lambda c, up: whole(q, q_rope, c, k_rope, up))
    before = attend(norm(x @ down) * gain[None, None], up)
    for rotation in (tpla.hadamard(KEY, L), tpla.principal(x @ down, 2)[0]):
        chex.assert_trees_all_close(rotation.T @ rotation, jnp.eye(L), atol=1e-6)
        new_down, new_up = tpla.absorb(down, gain, up, rotation)
        after = attend(norm(x @ new_down), new_up)
        chex.assert_trees_all_close(after, before, rtol=1e-5, atol=1e-5)


def test_principal_slices_are_nearer_to_the_whole():
    """Latents of which three quarters of the axes hold little, in no particular direction."""
    spread = jnp.array([3.0, 2.0] + [0.1] * (L - 2))
    turn = jnp.linalg.qr(draw(8, L, L))[0]
    args = arrays(draw(2, B, T, L) * spread[None, None] @ turn)
    q, q_rope, c, k_rope, up = args
    rotation, shares = tpla.principal(c, 2)
    turned = c @ rotation, jnp.einsum("LM,LNF->MNF", rotation, up)
    assert shares[0] > 0.95 and jnp.isclose(shares.sum(), 1)
    error = lambda o: float(jnp.linalg.norm(o - whole(*args)))
    naive = error(in_slices(*args, slices=2))
    principal = in_slices(q, q_rope, turned[0], k_rope, turned[1], slices=2, shares=shares)
    assert error(principal) < 0.2 * naive


def test_hadamard_slices_have_norms_alike():
    """Where the first axes of a latent hold most, slices' own norms say little of the whole."""
    c = draw(2, 50, 64) * jnp.where(jnp.arange(64) < 4, 5.0, 0.2)[None]
    norms = lambda c: jnp.linalg.norm(c.reshape(50, 2, 32), axis=-1) / jnp.linalg.norm(c)
    ratio = lambda c: float(jnp.mean(jnp.abs(jnp.log(norms(c)[:, 0] / norms(c)[:, 1]))))
    assert ratio(c @ tpla.hadamard(KEY, 64)) < 0.3 * ratio(c)


def test_shares_say_what_a_slice_is_of_the_whole():
    """Slices of one direction, 3 and 1 of 4 parts of its square, normed as if together."""
    c = jnp.concatenate([jnp.full((1, 4), 3.0**0.5), jnp.full((1, 4), 1.0)], -1).reshape(1, 2, 4)
    together = tpla.normalise(c.reshape(1, 1, 8)).reshape(1, 2, 4)
    actual = tpla.normalise(c, jnp.array([0.75, 0.25]))
    chex.assert_trees_all_close(actual, together, rtol=1e-5)


def test_a_cache_of_one_slice_is_half_and_the_rotated_keys():
    module = tpla.TPLA(num_heads=N, head_dim=H, rank=L, rope_dim=P)
    state = module.init_state(B, 11)
    assert state.latent[:, :, 0].size + state.k_rope.size == B * 11 * (L // 2 + P)


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (lambda: tpla.hadamard(KEY, 6), "size=6 must be a power of two"),
        (lambda: tpla.principal(jnp.ones((3, 8)), 3), "slices=3 must divide L=8"),
        (
            lambda: tpla.TPLA(num_heads=2, head_dim=4, slices=3).init(KEY, jnp.ones((1, 2, 4))),
            "slices=3 must divide rank=16",
        ),
        (
            lambda: tpla.TPLA(num_heads=2, head_dim=4, shares=(1.0,)).init(
                KEY, jnp.ones((1, 2, 4))
            ),
            r"shares=\(1.0,\) must be of slices=2",
        ),
    ],
)
def test_refuses(run, message):
    with pytest.raises(ValueError, match=message):
        run()
