"""The kernels for Hopper, interpreted, against the recurrence, and what they refuse."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import decay_attention, placing
from pallas_kernels import linear_recurrence as kernels
from pallas_kernels.decay_attention import mosaic_gpu as decay_gpu
from pallas_kernels.decay_attention import xla as decay_xla
from tests.pallas_kernels import linear_recurrence_test as recurrence

INTERPRET = plgpu.InterpretGPUParams(detect_races=True)


@pytest.fixture
def on_gpu(monkeypatch):
    """As if lowered for CUDA, but interpreted, with products that TF32 is allowed for."""

    def run(args, implementation, *, xla, tpu, gpu, row):
        return gpu(*args, interpret=INTERPRET)

    monkeypatch.setattr(placing, "run", run)
    with jax.default_matmul_precision("tensorfloat32"):
        yield


def packed(T):
    """Segments that begin within chunks of 64 and at their borders."""
    at = lambda *starts: np.isin(np.arange(T), starts)
    return np.cumsum(np.stack([at(3, 4, 64), at(66)]), 1)


@pytest.mark.parametrize(
    ("gate", "T", "segmented"),
    [("delta, channel", 70, True), ("none", 1, False)],
)
def test_equals_the_recurrence(gate, T, segmented, on_gpu):
    """Outputs, final state and every gradient; a large decay costs no digits of a small one."""
    segments = packed(T) * segmented
    fn = functools.partial(kernels.linear_recurrence, segments=jnp.asarray(segments))
    slow = functools.partial(recurrence.oracle, segments=segments)

    @jax.jit
    def both():
        args = recurrence.inputs(gate, T, N=1, strength=1e4)
        return [recurrence.with_gradients(f, args) for f in (fn, slow)]

    recurrence.assert_close(*both())


def test_bfloat16_is_no_worse_than_token_by_token(on_gpu, capfd):
    """Three chunks; features of two and of three times 64, some of them filled up; no races."""
    draw, shape = np.random.default_rng(0), (1, 130, 1)
    normal = lambda *shape: draw.standard_normal(shape, np.float32)
    args = dict(q=normal(*shape, 72), k=normal(*shape, 72), v=normal(*shape, 130))
    args |= dict(log_decay=-draw.random((*shape, 1), "f4"), initial_state=normal(1, 1, 72, 130))
    slow = functools.partial(recurrence.oracle, segments=np.zeros(shape[:2], int))

    def run(fn, args):
        wide = lambda **args: jax.tree.map(lambda x: x.astype(jnp.float32), fn(**args))
        return jax.tree.leaves(recurrence.with_gradients(wide, args))

    @jax.jit
    def runs(args):
        short = jax.tree.map(lambda x: x.astype(jnp.bfloat16), args)
        exact = run(slow, jax.tree.map(lambda x: x.astype(jnp.float32), short))
        return run(kernels.linear_recurrence, short), run(slow, short), exact

    for x, naive, exact in zip(*runs(args), strict=True):
        error, bar = (np.asarray(y, np.float32) - np.asarray(exact) for y in (x, naive))
        assert np.sqrt((error**2).mean()) <= np.sqrt((bar**2).mean())
    assert "race" not in capfd.readouterr().out.lower()


def test_decay_attention_takes_the_same_kernel(on_gpu):
    draw, log_decay = np.random.default_rng(1), np.array([-0.1, -3.0], np.float32)
    q, k, v = draw.standard_normal((3, 2, 70, 2, 8), np.float32)
    state, starts = draw.standard_normal((2, 2, 8, 8), np.float32), np.full((2, 70), -1)
    starts[0, 66:] = 66

    @jax.jit
    def both():
        args = q, k, v, state, starts, log_decay
        found = decay_gpu.decay_attention(*args, chunk=128, interpret=INTERPRET)
        return found, decay_xla.decay_attention(*args, chunk=128)

    recurrence.assert_close(*both())


def arrays(H=64, dtype="bfloat16", T=100):
    return {name: jax.ShapeDtypeStruct((1, T, 2, H), dtype) for name in "qkv"}


@pytest.mark.parametrize(
    ("args", "options", "message"),
    [
        (arrays(), dict(chunk=128), "chunks of 64, not 128"),
        (arrays(H=136), {}, "keys of 128 in bfloat16, not 136"),
        (arrays(H=72, dtype="float32"), {}, "keys of 64 in float32, not 72"),
        (arrays(dtype="float8_e4m3fn"), {}, "float16 or float32, not .'float8_e4m3fn'."),
    ],
)
def test_it_refuses_where_it_is_lowered_for_a_gpu(args, options, message):
    fn = lambda args: kernels.linear_recurrence(**args, **options, implementation="pallas")
    with jax.default_matmul_precision("tensorfloat32"):
        traced = jax.jit(fn).trace(args)
        with pytest.raises(NotImplementedError, match=f"{message}; implementation='xla'"):
            traced.lower(lowering_platforms=("cuda",))
        traced.lower(lowering_platforms=("tpu",))


def test_tf32_only_where_it_is_allowed():
    fn = lambda args: kernels.linear_recurrence(**args, implementation="pallas")
    with pytest.raises(NotImplementedError, match="float32 as TF32, not with precision='highest'"):
        jax.jit(fn).trace(arrays(dtype="float32")).lower(lowering_platforms=("cuda",))


def test_decay_attention_refuses_what_is_no_multiple_of_a_chunk():
    decay = jnp.zeros(2)
    options = dict(chunk=96, implementation="pallas")
    fn = lambda args: decay_attention.decay_attention(**args, log_decay=decay, **options)
    with pytest.raises(NotImplementedError, match="tokens by 64, not by 96"):
        jax.jit(fn).trace(arrays()).lower(lowering_platforms=("cuda",))
