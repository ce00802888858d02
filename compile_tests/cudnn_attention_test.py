"""The table of the H100 names cuDNN for plain attention: its calls stand in the executable."""

import re

import jax
import pytest
from jax._src.cudnn import fused_attention_stablehlo  # there is no public way to feign a cuDNN

from attnjax.core import masks
from attnjax.ops import dot_product_attention as ops
from experiments import targets
from pallas_kernels import tables


@pytest.fixture(autouse=True)
def with_cudnn(monkeypatch):
    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91000)


def test_an_h100_runs_plain_attention_by_cudnn():
    def loss(q, k, v):
        return ops.dot_product_attention(q, k, v, mask=masks.Causal()).astype("float32").sum()

    token = jax.ShapeDtypeStruct((1, 4096, 2, 128), "bfloat16")
    with tables.using(tables.of("NVIDIA H100 80GB HBM3")):
        compiled = targets.compile_for("h100:1", jax.grad(loss, (0, 1, 2)), token, token, token)
    called = re.findall(r'custom_call_target="__cudnn\$(\w+)"', compiled.as_text())
    assert called == ["fmhaSoftmax", "fmhaSoftmaxBackward"]
