"""Where a table names tokamax its kernels stand in the executable, for widths that it is used for.

tokamax asks the default device which kernel to take, so that is the target's while it is traced.
"""

import contextlib
import re

import jax
import numpy as np
import pytest

from attnjax.core import masks
from attnjax.ops import dot_product_attention as ops
from compile_tests import calls
from experiments import targets
from pallas_kernels import tables

pytest.importorskip("tokamax")  # which the extra `plan` doesn't have
ROW = tables.Row(
    operation="dot_product_attention",
    implementation="tokamax",
    source={"how": "computed", "rule": "asked for"},
)
OURS = "flash_attention_dkv"
SHAPES = pytest.mark.parametrize(
    "options",
    [
        dict(head_dim=64, kv_heads=1, mask=masks.Causal()),
        dict(head_dim=192, value_dim=128, softcap=30.0),
        dict(head_dim=256, T=128),
    ],
    ids=["64", "192", "256"],
)


def kernels_of(target, platform, *, T=1024, kv_heads=2, head_dim=128, value_dim=None, **options):
    """(how many kernels its gradients call, the text of the executable)."""
    device = targets.devices(target)[0]
    mesh = jax.sharding.Mesh(np.array([device]), ("x",))
    token = lambda heads, size: jax.ShapeDtypeStruct((1, T, heads, size), "bfloat16")
    loss = lambda *x: ops.dot_product_attention(*x, **options).astype("float32").sum()
    args = token(4, head_dim), token(kv_heads, head_dim), token(kv_heads, value_dim or head_dim)
    with contextlib.ExitStack() as here:
        here.enter_context(jax.default_device(device))
        here.enter_context(jax.sharding.use_abstract_mesh(mesh.abstract_mesh))
        here.enter_context(tables.using(tables.Table("x", platform, (ROW,))))
        text = targets.compile_for(target, jax.grad(loss, (0, 1, 2)), *args).as_text()
    return len(re.findall(r'custom_call_target="(?:tpu_custom_call|mosaic_gpu_v2)"', text)), text


@SHAPES
def test_h100(options):
    count, text = kernels_of("h100:1", "cuda", **options)
    assert count == 3 and "flash_attention_sm90" in text and OURS not in text


@SHAPES
@pytest.mark.parametrize("target", calls.TPUS)
def test_tpu(target, options):
    count, text = kernels_of(target, "tpu", **options)
    assert count == 2 and OURS not in text
    heads = "mqa" if options.get("kv_heads") == 1 else "mha"
    assert f"splash_{heads}_fwd" in text and f"splash_{heads}_dkv" in text


@pytest.mark.parametrize(
    ("target", "platform", "options"),
    [("h100:1", "cuda", dict(mask=masks.Window(5))), ("v5e:2x2", "tpu", dict(T=1000))],
)
def test_what_it_cannot_honour_is_by_ours(target, platform, options):
    _, text = kernels_of(target, platform, **options)
    assert "sm90" not in text and "splash" not in text
