"""Kernels are chosen by default only where XLA need not partition them."""

import jax
import jax.numpy as jnp
import pytest

from attnjax.core import sharding
from pallas_kernels import placing

SPEC = jax.P(("data", "context"))


def seen_in(run):
    """What `whole` says while `run`, of one array over all devices, is traced."""
    said = []

    def body(x):
        said.append(placing.whole())
        return x

    jax.eval_shape(run(body), jax.ShapeDtypeStruct((4,), "float32"))
    [answer] = said
    return answer


def test_many_devices_without_a_mesh():
    assert jax.device_count() > 1 and not seen_in(jax.jit)


def test_a_mesh():
    mesh = sharding.make_mesh(data=2, context=2)
    shard = lambda axes: (
        lambda body: jax.shard_map(
            body, mesh=mesh, in_specs=SPEC, out_specs=SPEC, axis_names=axes, check_vma=False
        )
    )
    assert seen_in(shard(set(mesh.axis_names)))
    one = sharding.make_mesh(devices=jax.devices()[:1])
    with jax.sharding.use_abstract_mesh(one.abstract_mesh):
        assert seen_in(jax.jit)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        assert not seen_in(jax.jit)


def by_gpu(x):
    raise NotImplementedError("the kernel has no room")


@pytest.mark.parametrize("gpu", [None, by_gpu])
@pytest.mark.parametrize("way", [lambda f: f, jax.grad])
def test_no_kernel_of_this_platform(gpu, way):
    f = lambda x: placing.run((x,), "pallas", xla=jnp.sin, tpu=jnp.sin, gpu=gpu)
    program = jax.jit(way(f)).trace(1.0)
    program.lower(lowering_platforms=("tpu",))
    with pytest.raises(NotImplementedError, match="kernel for tpu.* only; implementation='xla'"):
        program.lower()
    with pytest.raises(NotImplementedError, match="no room; implem" if gpu else "for tpu only"):
        program.lower(lowering_platforms=("cuda",))
