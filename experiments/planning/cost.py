"""Operations and bytes of one instruction of a compiled program, run once.

Operations are those of matrix products, 2 for each multiplication with its addition; a Pallas
kernel says its own. Bytes are read from and written to the device's main memory; parts of an array
that aren't touched don't count, and neither do arrays that stay on the chip.
"""

import math
import re

import numpy as np

from experiments.planning import hlo

_FREE = {
    *("parameter", "constant", "get-tuple-element", "tuple", "bitcast", "while", "conditional"),
    *("call", "after-all", "partition-id", "replica-id", "optimization-barrier", "domain"),
}  # they move nothing themselves
_VIEWS = ("bitcast", "get-tuple-element", "reshape")


def flops(i: hlo.Instruction, where: hlo.Computation, module: hlo.Module) -> int:
    """Of matrix products in an instruction, and in a fusion those inside."""
    if i.op == "dot":
        left = where.by_name[i.operands[0]].shapes[0].dims
        return _product(i, [left[axis] for axis in i.ints("lhs_contracting_dims")])
    if i.op == "convolution":
        return _convolution(i, where)
    if i.op == "custom-call":
        return _custom(i, where)
    if i.op in ("fusion", "fusion-start", "async-start"):
        inner = module.computations[i.called[0]]
        return sum(flops(j, inner, module) for j in inner.instructions)
    return 0


def is_kernel(i: hlo.Instruction) -> bool:
    """Whether it calls a kernel that the compiler can't look into."""
    return i.op == "custom-call" and re.search(
        r'target="(tpu_custom_call|mosaic_gpu\w*|__cudnn\$\w+)"', i.attributes
    ) is not None  # fmt: skip


def kernel_cost(i: hlo.Instruction) -> dict[str, int]:
    """What a Pallas kernel says about itself: {"flops", "bytes_accessed", ...}, or {}."""
    found = re.search(r'cost_estimate\\?":\s*\{([^}]*)\}', i.attributes)
    return {k: int(n) for k, n in re.findall(r'(\w+)\\?":\s*\\?"?(\d+)', found[1])} if found else {}


def states_of_tiles(i: hlo.Instruction, where: hlo.Computation) -> str:
    """The operand that says which tiles a kernel skips, those with state 0; "" for none.

    Of our `flash_attention`, where that is known only as it runs: it is called with the length of
    its grid, a table of steps and the states. Its cost is then that of all tiles.
    """
    # the name begins with the transformations that the call went through
    if not (is_kernel(i) and "flash_attention" in i.name):
        return ""
    grid = where.by_name[i.operands[0]].shapes[0]
    return "" if grid.dims else i.operands[2]


def moved(
    i: hlo.Instruction, where: hlo.Computation, module: hlo.Module, *, larger_than: int = 0
) -> int:
    """Bytes to and from main memory, of arrays `larger_than` so many: others may be cached."""
    if i.op in _FREE or i.op.endswith(("-done", "-update")):
        return 0
    known = kernel_cost(i).get("bytes_accessed")
    if known is not None:
        return known if known > larger_than else 0
    count = lambda shape, touched: touched if shape.bytes > larger_than else 0
    operands = [where.by_name[name].shapes for name in i.operands]
    if i.op in ("fusion", "fusion-start"):
        inner = module.computations[i.called[0]]
        reads = [
            sum(count(shape, _read(inner, p, shape)) for shape in given)
            for given, p in zip(operands, inner.parameters, strict=True)
        ]
        written = outputs(inner)
        return sum(reads) + sum(count(shape, n) for shape, n in written if shape.bytes)
    if i.op in ("slice", "dynamic-slice", "gather", "slice-start"):
        out = i.shapes[1 if i.op == "slice-start" else 0]
        return count(operands[0][0], out.logical_bytes) + count(out, out.bytes)
    if i.op in ("dynamic-update-slice", "scatter"):
        part = operands[1 if i.op == "dynamic-update-slice" else 2][0]
        return count(part, part.bytes) + count(i.shapes[0], part.logical_bytes)
    made = i.shapes[:1] if i.op == "copy-start" else _written(i)
    return sum(count(s, s.bytes) for shapes in (*operands, made) for s in shapes)


def _written(i):
    """Shapes of the output; what has started gives its operands back beside it."""
    return i.shapes[len(i.operands) :] if i.op.endswith("-start") else i.shapes


def _read(inner, parameter, shape):
    """Bytes of a parameter that a fusion reads: of slices where it takes no more of it."""
    if not shape.bytes:
        return 0
    users = _users(inner, parameter.name)
    taken = 0
    for user, name in users:
        if user.op in ("dynamic-slice", "slice", "gather") and user.operands[0] == name:
            taken += user.shapes[0].logical_bytes
        elif not (user.op == "dynamic-update-slice" and user.operands[0] == name):
            return shape.bytes
    return min(taken, shape.bytes)


def _users(inner, name):
    """(instruction, the operand's name) that use a value, also through other views of it."""
    for i in inner.instructions:
        if name in i.operands:
            if i.op in _VIEWS:
                yield from _users(inner, i.name)
            else:
                yield i, name


def outputs(inner):
    """(shape, bytes written) of each array that a fusion gives."""
    root = inner.root
    parts = [inner.by_name[n] for n in root.operands] if root.op == "tuple" else [root]
    shapes = root.shapes
    if len(shapes) != len(parts):  # a part that is a tuple itself
        return [(shape, shape.bytes) for shape in shapes]
    return [(shape, _update(inner, part, shape)) for shape, part in zip(shapes, parts, strict=True)]


def _update(inner, part, shape):
    """Bytes written of an output: of the update alone where it changes an array in its place."""
    while part.op in _VIEWS:
        part = inner.by_name[part.operands[0]]
    if part.op != "dynamic-update-slice":
        return shape.bytes
    return inner.by_name[part.operands[1]].shapes[0].logical_bytes


def _product(i, contracted):
    return 2 * math.prod(i.shapes[0].dims) * math.prod(contracted)


def _convolution(i, where):
    """Products of a matrix are convolutions to some compilers; a batch is a window then."""
    left, right = (where.by_name[name].shapes[0].dims for name in i.operands[:2])
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", i.attributes)
    size = lambda dims, axes, letter: dims[axes.index(letter)]
    groups = int(i.attribute("batch_group_count") or 1)
    channels = size(right, labels[2], "i") * size(right, labels[2], "o")
    total = 2 * channels * (size(left, labels[1], "b") // groups)
    window = _window(i)
    for axis in (c for c in labels[1] if c.isdigit()):
        sizes = [size(d, a, axis) for d, a in ((left, labels[1]), (i.shapes[0].dims, labels[3]))]
        total *= _pairs(*sizes, **{k: v[int(axis)] for k, v in window.items()})
    return total


def _window(i):
    text = re.search(r"window=\{([^}]*)\}", i.attributes)
    fields = dict(part.split("=") for part in text[1].split()) if text else {}
    sizes = [int(x) for x in fields["size"].split("x")] if "size" in fields else []
    numbers = lambda name: (
        [int(x) for x in fields[name].split("x")] if name in fields else [1] * len(sizes)
    )
    pad = fields["pad"].split("x") if "pad" in fields else ["0_0"] * len(sizes)
    return dict(
        size=sizes,
        stride=numbers("stride"),
        low=[int(x.split("_")[0]) for x in pad],
        spread=numbers("lhs_dilate"),
        step=numbers("rhs_dilate"),
    )


def _pairs(given, out, *, size, stride, low, spread, step):
    """How often an entry of the kernel meets one of the input, along one axis."""
    at = np.arange(out)[:, None] * stride + np.arange(size) * step - low
    return int(((at >= 0) & (at <= (given - 1) * spread) & (at % spread == 0)).sum())


def _custom(i, where):
    if "__cublas$" in i.attributes:
        axes = re.search(r'lhs_contracting_dimensions\\?":\[([^\]]*)\]', i.attributes)
        left = where.by_name[i.operands[0]].shapes[0].dims
        return _product(i, [left[int(axis)] for axis in re.findall(r"\d+", axes[1])])
    return kernel_cost(i).get("flops", 0)
