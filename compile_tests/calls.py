"""What stands in an executable about its kernels."""

import dataclasses
import re

TPUS = ("v5e:2x2", "v5p:2x2x1", "v6e:2x2")
GPUS = ("h100:1",)
VMEM = 16 * 2**20  # what each of the TPUs gives a kernel unless asked for more


@dataclasses.dataclass(frozen=True)
class Call:
    """A Pallas kernel that an executable calls."""

    name: str
    vmem: int  # bytes in use at once, as the TPU's compiler counted; 0 on a GPU


def kernels(compiled):
    """The calls of kernels in an executable, in its order; one in a loop counts once.

    Shared memory needs no number: Mosaic refuses a GPU kernel that uses more than there is.
    """
    lines = compiled.as_text().splitlines()
    return [
        Call(name=re.search(r'op_name="[^"]*?(\w+)\)*/\w+"', line)[1], vmem=_vmem(line))
        for line in lines
        if re.search(r'custom_call_target="(tpu_custom_call|mosaic_gpu_v2)"', line)
    ]


def _vmem(line):
    used = re.search(r'"used_scoped_memory_configs":\[(.*?)\]', line)
    return sum(map(int, re.findall(r'"size":"(\d+)"', used[1]))) if used else 0
