"""What the operations of a compiled program do to integers: as much as loops' bounds need."""

import re
from collections.abc import Callable, Mapping

import numpy as np

from experiments.planning import hlo

_COMPARE = dict(LT="less", LE="less_equal", GT="greater", GE="greater_equal", EQ="equal",
                NE="not_equal")  # fmt: skip
_REDUCE = dict(add=np.add, maximum=np.maximum, minimum=np.minimum, multiply=np.multiply, **{
    "and": np.bitwise_and, "or": np.bitwise_or})  # fmt: skip
_PLAIN: Mapping[str, Callable] = {
    "add": np.add, "subtract": np.subtract, "multiply": np.multiply, "maximum": np.maximum,
    "minimum": np.minimum, "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor,
    "not": np.invert, "negate": np.negative, "abs": np.abs, "sign": np.sign,
    "shift-left": np.left_shift, "shift-right-arithmetic": np.right_shift,
    "shift-right-logical": np.right_shift, "select": np.where,
    "divide": lambda a, b: np.abs(a) // np.abs(b) * np.sign(a) * np.sign(b),
    "remainder": np.fmod, "clamp": lambda low, x, high: np.clip(x, low, high),
}  # fmt: skip
_SAME = (
    *("copy", "copy-start", "copy-done", "slice-done", "call-done", "custom-call-done"),
    "optimization-barrier",
)
# Entries of a vector, looked up by another core of a TPU; versions of libtpu name it differently.
_LOOK_UPS = ("call-update", "custom-call-update")


class Unknown(Exception):
    """It depends on data, or is no integer."""


def apply(
    i: hlo.Instruction,
    where: hlo.Computation,
    module: hlo.Module,
    get: Callable[[int], np.ndarray],
) -> np.ndarray:
    """The output of an instruction from `get(n)`, operand n; Unknown for other operations."""
    if i.op == "bitcast":
        return _bitcast(get(0), where.by_name[i.operands[0]].shapes[0], i.shapes[0])
    if i.op in _PLAIN:
        return np.asarray(_PLAIN[i.op](*map(get, range(len(i.operands)))))
    if i.op in _SAME or 'target="AssumeGatherIndicesInBound"' in i.attributes:
        return get(0)
    if 'target="AllocateBuffer"' in i.attributes:  # to be written before it is read
        return np.zeros(i.shapes[0].dims, np.int64)
    if i.op in _LOOK_UPS and "gather_offload" in i.name:
        return _entries(i, get(1), get(2))
    if i.op in _SHAPING:
        return _SHAPING[i.op](i, get)
    if i.op == "reduce" and len(i.operands) == 2:
        return _reduce(i, get, module)
    raise Unknown(i.name)


def _constant(i, get):
    numbers = re.findall(r"-?\d+|true|false", i.literal)
    values = np.array([x == "true" if x in ("true", "false") else int(x) for x in numbers])
    if values.size != np.prod(i.shapes[0].dims, dtype=int):  # left out of the text
        raise Unknown(i.name)
    return values.reshape(i.shapes[0].dims)


def _convert(i, get):
    return get(0).astype(bool if i.shapes[0].dtype == "pred" else np.int64)


def _compare(i, get):
    return getattr(np, _COMPARE[i.attribute("direction")])(get(0), get(1))


def _iota(i, get):
    dims = i.shapes[0].dims
    axis = int(i.attribute("iota_dimension") or 0)
    line = np.arange(dims[axis]).reshape([-1 if n == axis else 1 for n in range(len(dims))])
    return np.broadcast_to(line, dims)


def _broadcast(i, get):
    x, dims, axes = get(0), i.shapes[0].dims, i.ints("dimensions")
    shape = [1] * len(dims)
    for axis, size in zip(axes, x.shape, strict=True):
        shape[axis] = size
    return np.broadcast_to(x.reshape(shape), dims)


def _bitcast(x, given, wanted):
    """What lies at the same places in memory, of an array in another layout."""
    if hlo.bits(given.dtype) != hlo.bits(wanted.dtype) or x.size != np.prod(wanted.dims, dtype=int):
        raise Unknown(str(wanted))
    if sum(size > 1 for size in x.shape) <= 1:
        return x.reshape(wanted.dims)
    old, new = given.places(), wanted.places()
    real = new[: len(old)] >= 0
    old, new = old[: len(new)][real], new[: len(old)][real]
    if len(new) < x.size or old.min() < 0:  # what filled up would become an entry
        raise Unknown(str(wanted))
    out = np.empty(x.size, x.dtype)
    out[new] = x.ravel()[old]
    return out.reshape(wanted.dims)


def _slice(i, get):
    bounds = re.findall(r"\[(\d+):(\d+)(?::(\d+))?\]", i.attribute("slice"))
    return get(0)[tuple(slice(int(a), int(b), int(step or 1)) for a, b, step in bounds)]


def _dynamic_slice(i, get):
    return get(0)[_place(get, 1, get(0).shape, i.ints("dynamic_slice_sizes"))]


def _dynamic_update_slice(i, get):
    x, new = get(0).copy(), get(1)
    x[_place(get, 2, x.shape, new.shape)] = new
    return x


def _place(get, first, shape, sizes):
    """Where a slice lies that starts as the operands from `first` on say, within the array."""
    starts = [int(get(first + n)) for n in range(len(shape))]
    starts = [min(max(a, 0), full - n) for a, full, n in zip(starts, shape, sizes, strict=True)]
    return tuple(slice(a, a + n) for a, n in zip(starts, sizes, strict=True))


def _pad(i, get):
    x, fill = get(0), get(1)
    sides = [tuple(map(int, part.split("_"))) for part in i.attribute("padding").split("x")]
    if any(min(side) < 0 or side[2:] not in ((), (0,)) for side in sides):
        raise Unknown(i.name)
    return np.pad(x, [side[:2] for side in sides], constant_values=fill)


def _gather(i, get):
    if i.ints("slice_sizes") != (1,):
        raise Unknown(i.name)
    return _entries(i, get(0), get(1)).reshape(i.shapes[0].dims)


def _entries(i, x, at):
    """Single entries of a vector."""
    if x.ndim != 1:
        raise Unknown(i.name)
    return x[np.clip(at.ravel(), 0, len(x) - 1)]


def _concatenate(i, get):
    return np.concatenate([get(n) for n in range(len(i.operands))], i.ints("dimensions")[0])


def _reduce(i, get, module):
    root = module.computations[i.attribute("to_apply")].root
    if root.op not in _REDUCE:
        raise Unknown(i.name)
    reduced = _REDUCE[root.op].reduce(get(0), axis=i.ints("dimensions"))
    return _REDUCE[root.op](reduced, get(1))


_SHAPING: Mapping[str, Callable] = {
    "constant": _constant, "convert": _convert, "compare": _compare, "iota": _iota,
    "broadcast": _broadcast, "slice": _slice, "slice-start": _slice,
    "dynamic-slice": _dynamic_slice, "dynamic-update-slice": _dynamic_update_slice,
    "pad": _pad, "gather": _gather, "concatenate": _concatenate,
    "reshape": lambda i, get: get(0).reshape(i.shapes[0].dims),
    "transpose": lambda i, get: get(0).transpose(i.ints("dimensions")),
    "reverse": lambda i, get: np.flip(get(0), i.ints("dimensions")),
}  # fmt: skip
