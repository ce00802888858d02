import chex
import jax
import jax.numpy as jnp
import jaxtyping
import pytest

from attnjax.core import masks, registry
from attnjax.softmax import super_attention as lib

KEY = jax.random.key(0)
N, H, D, T, L = 2, 4, 8, 6, 7
X = jax.random.normal(KEY, (2, T, D))
LENGTHS = dict(optimised=None, efficient=None, super=L)
SLICES = {"heads": {"kernel": jnp.eye(D).reshape(D, N, H)}}  # a projection to X_n


def module(form, num_heads=N, **options):
    return lib.SuperAttention(num_heads, D // num_heads, form, LENGTHS[form], **options)


def random_params(form, num_heads=N):
    """With an alignment that is not the identity."""
    params = module(form, num_heads).init(KEY, X)["params"]
    keys = iter(jax.random.split(KEY, 9))
    return {"params": jax.tree.map(lambda p: p + jax.random.normal(next(keys), p.shape), params)}


def mha(num_heads, kernels):
    attention = registry.get("multi_head_attention").module(num_heads, D // num_heads)
    return attention.apply({"params": kernels}, X, mask=masks.Causal())


def run(form, params, num_heads=N):
    return module(form, num_heads).apply(params, X, mask=masks.Causal())


def test_parameters_are_four_to_three_to_two():
    size = lambda m: sum(map(jnp.size, jax.tree.leaves(m.init(KEY, X))))
    assert size(registry.get("multi_head_attention").module(N, H)) == 4 * D**2
    sizes = {form: size(module(form)) for form in LENGTHS}
    assert sizes == dict(optimised=3 * D**2, efficient=2 * D**2, super=2 * D**2 + L**2)


def test_for_one_head_the_projections_left_out_lose_nothing():
    kernels = jax.random.normal(KEY, (4, D, D)) / D**0.5
    q, k, v, o = kernels
    standard = dict(zip(("query", "key", "value"), kernels[:3, :, None], strict=True))
    standard = {name: {"heads": {"kernel": x}} for name, x in standard.items()}
    standard["out"] = {"merge": {"kernel": o[None]}}
    merged = {
        "query": {"heads": {"kernel": (q @ k.T)[:, None]}},
        "out": {"merge": {"kernel": (v @ o)[None]}},
    }
    actual = run("efficient", {"params": merged}, num_heads=1)
    chex.assert_trees_all_close(actual, mha(1, standard), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("form", ["optimised", "efficient"])
def test_is_multi_head_attention_whose_heads_have_slices_of_the_tokens(form):
    params = random_params(form)
    kernels = {"key": SLICES, "value": SLICES} | params["params"]
    chex.assert_trees_all_close(run(form, params), mha(N, kernels), rtol=1e-5, atol=1e-5)


def test_super_begins_as_efficient_attention():
    params = module("super").init(KEY, X)
    rest = {name: p for name, p in params["params"].items() if name != "alignment"}
    chex.assert_trees_all_close(
        run("super", params), run("efficient", {"params": rest}), rtol=1e-6, atol=1e-6
    )


def test_the_alignment_knows_positions():
    """Looking at itself, each token finds the one before it, which no attention by content does."""
    keys = jnp.eye(T)[None, :, None]
    values = jax.random.normal(KEY, (1, T, 1, 3))
    o = lib.super_attention(1000 * keys, keys, values, jnp.eye(T, k=-1), mask=masks.Causal())
    expected = jnp.pad(values[:, :-1], ((0, 0), (1, 0), (0, 0), (0, 0)))
    chex.assert_trees_all_close(o, expected, atol=1e-6)


def test_documents_and_padding_do_not_mix():
    args = lib.SPEC.example(KEY, 6)
    ids = jnp.array([[0, 0, 0, 1, 1, 1]])
    mask = masks.Segments(ids) & masks.Valid(jnp.array([[True, True, False, True, True, True]]))
    seen = lambda v: lib.super_attention(**(args | dict(v=v)), mask=mask)
    influence = lambda t: jax.grad(lambda v: (seen(v)[:, t] ** 2).sum())(args["v"]).any((0, 2, 3))
    chex.assert_trees_all_equal(influence(1), jnp.arange(6) < 2)
    chex.assert_trees_all_equal(influence(4), jnp.arange(6) >= 3)


@pytest.mark.parametrize("form", LENGTHS)
def test_streams_in_every_form(form):
    params = random_params(form)
    call = lambda name, *args: module(form).apply(params, *args, method=name)
    state, ys = call("init_state", 2, T), []
    for piece in (X[:, :1], X[:, 1:4], X[:, 4:]):
        state, y = call("extend", state, piece)
        ys.append(y)
    chex.assert_trees_all_close(jnp.concatenate(ys, 1), run(form, params), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "error, match, mask",
    [
        (NotImplementedError, "can't honour Window", masks.Window(1, 0)),
        (
            NotImplementedError,
            "Segments with ids",
            masks.Segments(jnp.zeros((2, T), int), jnp.zeros((2, T), int)),
        ),
    ],
)
def test_masks_that_an_alignment_would_leak_through(error, match, mask):
    with pytest.raises(error, match=match):
        lib.super_attention(**lib.SPEC.example(KEY, T), mask=mask)


def test_refuses_what_does_not_fit(monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as it is for users
    args = lib.SPEC.example(KEY, T)
    with pytest.raises(ValueError, match="S=6 must be at most L=5"):
        lib.super_attention(**(args | dict(alignment=jnp.eye(5))))
    for options, match in (
        (dict(), "length=None must be given just where form is 'super'"),
        (dict(form="efficient", length=4), "length=4 must be given just where"),
        (dict(form="best"), "form='best' must be one of"),
        (dict(num_heads=3, length=L), "num_heads=3 times head_dim=4 must be D=8"),
    ):
        with pytest.raises(ValueError, match=match):
            lib.SuperAttention(**(dict(num_heads=N, head_dim=H) | options)).init(KEY, X)
