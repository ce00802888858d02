"""Pallas kernels for TPU: the grid walks (part of the heads, sequence, step), a loop the packs."""

import functools
import math
import types

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.neighborhood import layout, tile


def forward(cut: layout.Cut, arrays, near, *, scale, interpret=False):
    """The output, in v's dtype, of arrays (q, k, v, bias or None)."""
    q, _, v, _ = arrays
    inputs = _inputs(cut, arrays, near)
    like = jax.ShapeDtypeStruct((*q.shape[:-1], v.shape[-1]), v.dtype)
    outputs = dict(o=jax.eval_shape(cut.queries, like))
    kernel = functools.partial(_forward, cut, scale)
    out = _call(kernel, cut, inputs, outputs, interpret=interpret, name="neighborhood_attention")
    return cut.apart(out["o"], like)


def _forward(cut, scale, refs):
    @pl.loop(0, cut.packs)
    def _(p):
        seen, parts = _seen(cut, refs, p), []
        for n in range(cut.heads):
            q, ks, vs, bias = _head(cut, refs, p, n)
            w = tile.weights(q, ks, seen, bias, T=cut.T, scale=scale)
            parts.append(tile.output(w, vs, T=cut.T))
        refs.o[p] = _rows(parts, refs.o)


def backward(cut: layout.Cut, arrays, near, do, *, scale, interpret=False):
    """Gradients of arrays by that of the output."""
    *_, bias = arrays
    inputs = _inputs(cut, arrays, near) | dict(do=cut.queries(do))
    outputs = dict(dq=inputs["q"], dk=inputs["k"], dv=inputs["v"])
    if bias is not None:
        outputs["dbias"] = jax.ShapeDtypeStruct(inputs["bias"].shape, jnp.float32)
    kernel = functools.partial(_backward, cut, scale)
    name = "neighborhood_attention_backward"
    out = _call(kernel, cut, inputs, outputs, interpret=interpret, name=name)
    dqkv = (cut.apart(out[name], x) for name, x in zip(("dq", "dk", "dv"), arrays[:3], strict=True))
    if bias is None:
        return *dqkv, None
    dbias = out["dbias"].reshape(*out["dbias"].shape[:2], cut.pack, cut.T).sum(2).mT
    return *dqkv, dbias.astype(bias.dtype)


def _backward(cut, scale, refs):
    if hasattr(refs, "dbias"):
        _begin(refs.dbias)

    @pl.loop(0, cut.packs)
    def _(p):
        seen, dqs = _seen(cut, refs, p), []
        dks, dvs = ([[0] * cut.kv_heads for _ in range(cut.pack)] for _ in range(2))
        for n in range(cut.heads):
            q, ks, vs, bias = _head(cut, refs, p, n)
            w = tile.weights(q, ks, seen, bias, T=cut.T, scale=scale)
            do = _columns(refs.do[p], n, cut.heads)
            dx, dq, *more = tile.gradients(q, ks, vs, w, do, T=cut.T, scale=scale)
            if hasattr(refs, "dbias"):
                refs.dbias[n] += dx
            dqs.append(dq)
            for totals, parts in zip((dks, dvs), more, strict=True):
                for total, part in zip(totals, parts, strict=True):
                    total[n * cut.kv_heads // cut.heads] += part
        refs.dq[p] = _rows(dqs, refs.dq)
        for g in range(cut.pack):
            refs.dk[p, g], refs.dv[p, g] = _rows(dks[g], refs.dk), _rows(dvs[g], refs.dv)


def _head(cut, refs, p, n):
    """(queries, keys and values of each group, bias or None) of one head."""
    of_kv = lambda ref: [
        _columns(ref[p, g], n * cut.kv_heads // cut.heads, cut.kv_heads) for g in range(cut.pack)
    ]
    bias = refs.bias[n].astype(jnp.float32) if hasattr(refs, "bias") else None
    return _columns(refs.q[p], n, cut.heads), of_kv(refs.k), of_kv(refs.v), bias


def _columns(x, n, heads):
    """The features of one head."""
    F = x.shape[-1] // heads
    return x[:, n * F : (n + 1) * F]


def _rows(parts, ref):
    """Features of heads (F, tokens) as they lie in memory: (tokens, heads F)."""
    return jnp.concatenate(parts).T.astype(ref.dtype)


def _seen(cut, refs, p):
    if not hasattr(refs, "at"):
        return None
    shared = refs.at.shape[0] == 1 and refs.at.shape[1] == 1
    ats = [refs.at[0, 0]] if shared else [refs.at[p, g] for g in range(cut.pack)]
    return tile.sees(ats, refs.ends[p], T=cut.T)


def _begin(ref):
    """Zero at the first step of a part of the heads."""

    @pl.when((pl.program_id(1) == 0) & (pl.program_id(2) == 0))
    def _():
        ref[...] = jnp.zeros_like(ref)


def _inputs(cut, arrays, near):
    q, k, v, bias = arrays
    inputs = dict(q=cut.queries(q), k=cut.keys(k), v=cut.keys(v))
    inputs |= {} if near is None else cut.near(near)
    return inputs if bias is None else inputs | dict(bias=cut.bias(bias))


def _call(kernel, cut, inputs, outputs, *, interpret, name):
    """{name: array} of the outputs; `kernel(refs)` gets references by their names."""
    arrays = inputs | outputs
    mat = jax.typeof(inputs["q"]).mat  # outputs vary over the axes of a mesh that inputs vary over
    like = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, manual_axis_type=mat)
    rest = "arbitrary" if "dbias" in outputs else "parallel"  # which is added up over them
    out = pl.pallas_call(
        lambda *refs: kernel(types.SimpleNamespace(**dict(zip(arrays, refs, strict=True)))),
        grid=(cut.parts, inputs["q"].shape[0], cut.steps),
        in_specs=[cut.block(name, x) for name, x in inputs.items()],
        out_specs=[cut.block(name, x) for name, x in outputs.items()],
        out_shape=[like(x) for x in outputs.values()],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", rest, rest)),
        cost_estimate=_cost(cut, inputs, arrays, products=5 if "do" in inputs else 2),
        interpret=interpret,
        name=name,
    )(*inputs.values())
    return dict(zip(outputs, out, strict=True))


def _cost(cut, inputs, arrays, *, products):
    """What XLA can't see inside the kernel."""
    q, heads = inputs["q"], cut.heads * cut.parts
    entries = q.size // q.shape[-1] * cut.S  # of one head
    return pl.CostEstimate(
        flops=2 * products * entries * q.shape[-1],
        transcendentals=entries * heads,
        bytes_accessed=sum(math.prod(x.shape) * x.dtype.itemsize for x in arrays.values()),
    )
