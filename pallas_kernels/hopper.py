"""What kernels for Hopper GPUs ask of dtypes and of the device."""

import re

import jax

from pallas_kernels import tables

_NAMES = re.compile(r"\bG?H(20|100|200|800)\b")
# precisions that let XLA multiply float32 as TF32 on a GPU, or as less
_TF32 = (
    *(None, "default", "fastest", "high", "bfloat16", "bfloat16_3x", "tensorfloat32"),
    "TF32_TF32_F32",
)


def check_device(interpret=False) -> None:
    """Raises NotImplementedError where the device that is traced for is known to be another GPU.

    That is the device of the mesh in use, or else the first of this process; what is compiled ahead
    for a GPU may be traced anywhere, and what is interpreted runs anywhere.
    """
    device = tables.device()
    another = device.platform in ("gpu", "cuda") and not _NAMES.search(device.device_kind)
    if another and not interpret:
        raise NotImplementedError(f"the kernel is for Hopper GPUs, not for {device.device_kind}")


def check_dtype(*dtypes) -> str:
    """The one dtype of products: bfloat16, float16, or float32, which is multiplied as TF32.

    Raises NotImplementedError for several, for others, and for float32 where
    `jax.default_matmul_precision` asks for more than TF32.
    """
    names = sorted({str(dtype) for dtype in dtypes})
    if len(names) > 1 or names[0] not in ("bfloat16", "float16", "float32"):
        raise NotImplementedError(
            f"the kernel for Hopper multiplies bfloat16, float16 or float32, not {names}"
        )
    precision = jax.config.jax_default_matmul_precision
    if names == ["float32"] and precision not in _TF32:
        raise NotImplementedError(
            f"the kernel for Hopper multiplies float32 as TF32, not with {precision=}"
        )
    return names[0]
