"""What this library means to reach on an H100: bars, each a value of one row of a benchmark."""

import dataclasses
import functools
import itertools
from collections.abc import Callable

from experiments.measuring import attention
from experiments.measuring import cases as benchmark_cases

DEVICE = "H100"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bar:
    """A value of one row that must be at least so much."""

    what: str
    least: float
    value: Callable[[dict], float | None]
    """None where a time is missing."""
    benchmark: str
    """`attnjax benchmark` of it measures the row."""
    case: dict
    """What the row says of its case."""
    options: str = ""
    """That the command takes."""

    @property
    def command(self) -> str:
        """What measures it."""
        return f"attnjax benchmark {self.benchmark} {self.options}".strip()


def speed(row: dict, ours: tuple[str, ...], others: tuple[str, ...]) -> float | None:
    """How many times as fast the fastest of ours is as the fastest of others."""
    seconds = row["median_seconds"]
    ours, others = ([seconds[x] for x in names if x in seconds] for names in (ours, others))
    return min(others) / min(ours) if ours and others else None


def beside_best(row: dict) -> float | None:
    """`speed` of the default beside all others; None unless both fast libraries have a time."""
    if not {"cudnn", "tokamax"} <= row["median_seconds"].keys():
        return None
    return speed(row, ("default",), ("cudnn", "tokamax", "jax.nn", "torch"))


def rate(row: dict, name: str, unit: float) -> float | None:
    """Work a second, in units."""
    return row["rate"][name] / unit if name in row["rate"] else None


def rates(row: dict, name: str, other: str) -> float | None:
    """Work a second as a multiple of another's."""
    found = row["rate"]
    return found[name] / found[other] if name in found and other in found else None


def beside_copy(row: dict) -> float | None:
    """The best of our `rates` beside that of a copy."""
    found = [rates(row, name, "copy") for name in ("xla", "pallas")]
    return max((x for x in found if x is not None), default=None)


def _of_attention():
    make = functools.partial(Bar, benchmark="attention")
    full, causal, wide = benchmark_cases.PLAIN[:3]  # 16k tokens
    for shape in benchmark_cases.PLAIN:
        yield make(
            what="plain attention, forward, beside the best of cuDNN, tokamax and XLA",
            least=1.0,
            value=beside_best,
            case=shape | {"way": "forward"},
        )
    for way, peer, least in (("forward", "cudnn", 0.85), ("backward", "tokamax", 0.8)):
        for shape in (full, causal):
            yield make(
                what=f"our kernel, {way}, beside {peer}",
                least=least,
                value=functools.partial(speed, ours=("pallas",), others=(peer,)),
                case=shape | {"way": way},
            )
    yield make(
        what="our kernel, backward with heads of 256, TFLOP/s",
        least=250.0,
        value=functools.partial(rate, name="pallas", unit=1e12),
        case=wide | {"way": "backward"},
    )


def _of_masks():
    for shape in benchmark_cases.MASKED:
        for way in ("forward", "backward"):
            yield Bar(
                what="our kernel, rate on visible tiles, beside that without mask and bias",
                least=0.8,
                value=functools.partial(rates, name="pallas", other=attention.UNMASKED),
                benchmark="attention",
                case=shape | {"way": way},
            )


def _of_block_sparse():
    for way in ("forward", "backward"):
        yield Bar(
            what="a sixteenth of the blocks, beside the fastest dense kernel",
            least=10.0,
            value=functools.partial(
                speed,
                ours=("xla", "pallas", "mask", "mask pallas"),
                others=("dense pallas", "dense cudnn"),
            ),
            benchmark="block_sparse",
            case=dict(length=65536, heads=8, head_dim=128, block=128, chosen=32, way=way),
        )


def _of_linear():
    sizes = dict(batch=1, heads=96, head_dim=128)
    make = functools.partial(Bar, benchmark="linear", options="--torch-python PYTHON")
    beside = functools.partial(speed, ours=("xla", "pallas"))
    cases = [
        sizes | dict(decay=decay, way=way)
        for decay in ("scalar", "channel")
        for way in ("forward", "backward")
    ]
    for case in cases:
        yield make(
            what="linear recurrence, beside flash-linear-attention",
            least=1 / 1.5,
            value=functools.partial(beside, others=("fla",)),
            case=case | {"length": 8192},
        )
    for case, length in itertools.product(cases, (4096, 8192, 16384)):
        yield make(
            what="linear recurrence, beside the fastest softmax attention",
            least=1.0,
            value=functools.partial(beside, others=("softmax pallas", "softmax cudnn")),
            case=case | {"length": length},
        )


def _of_decode():
    yield Bar(
        what="bytes of the cache read a second, beside those that a copy moves",
        least=0.8,
        value=beside_copy,
        benchmark="decode",
        case=dict(batch=64, length=32768, heads=32, kv_heads=8, head_dim=128),
    )


BARS: tuple[Bar, ...] = (
    *_of_attention(), *_of_masks(), *_of_block_sparse(), *_of_linear(), *_of_decode()
)  # fmt: skip
