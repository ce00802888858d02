"""Softmax attention to be timed: who computes it, this library and others, with the same mask."""

import functools
import importlib
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from attnjax.core import masks
from attnjax.ops import dot_product_attention as ops
from experiments.measuring import cases
from experiments.measuring.torch_peer import Torch
from experiments.measuring.turns import Entry, of_jax, refused

LIBRARIES = {  # with the signature of jax.nn's: module, and what it calls the implementation
    "cudnn": ("jax.nn", "cudnn"),
    "tokamax": ("tokamax", "mosaic"),
    "jax.nn": ("jax.nn", "xla"),
}
UNMASKED = "pallas, unmasked"
WINDOW = 1024
_DOCUMENTS = 12
_TILE = 128  # queries, and keys: a tile counts whole of which anything is visible


def entries(
    case: cases.Case, torch: Torch, *, ours: tuple[str, ...], peers: bool, most: int
) -> dict[str, Entry]:
    """`implementation`s of ours ("default" is None), and other libraries.

    What holds whole matrices takes part up to length `most`.
    """
    tokens, data, bias = cases.tokens_of(case), data_of(case), cases.bias_of(case)
    work = cases.operations(case, share(case))
    timed = lambda fn, *given: Entry(of_jax(fn, tokens, case.way, given), work)
    found = {}
    for name in ours:
        implementation = None if name == "default" else name
        fn = functools.partial(attend, case=case, implementation=implementation)
        found[name] = timed(fn, data, bias)
    if case.mask in ("window", "documents") or case.bias:
        full = lambda q, k, v: ops.dot_product_attention(q, k, v, implementation="pallas")
        found[UNMASKED] = Entry(of_jax(full, tokens, case.way), cases.operations(case, 1))
    if peers:
        seen = same(data) if case.mask == "documents" else data
        for name in LIBRARIES:
            found[name] = timed(functools.partial(by_library, case=case, name=name), seen, bias)
        found["torch"] = Entry(lambda: by_torch(case, torch), work)
    for name in {"dense", "jax.nn"} & found.keys() if case.length > most else ():
        found[name] = Entry(refused(f"whole matrices of more than {most}"), work)
    return found


def attend(q, k, v, data, bias, *, case, implementation):
    """Our attention of a case."""
    return ops.dot_product_attention(
        q, k, v, mask=mask_of(case, data), bias=bias, implementation=implementation
    )


def by_library(q, k, v, data, bias, *, case, name):
    """The same by another library; data is what `options_of` takes."""
    library, implementation = LIBRARIES[name]
    attend = importlib.import_module(library).dot_product_attention
    missing = case.head_dim - case.value_dim if library == "jax.nn" else 0  # it knows one size
    v = jnp.pad(v, ((0, 0), (0, 0), (0, 0), (0, missing)))
    o = attend(q, k, v, bias, implementation=implementation, **options_of(case, data))
    return o[..., : case.value_dim]


def beside(case, prefix: str, ours: dict[str, str | None], *, peers: bool) -> dict[str, Callable]:
    """Softmax attention of the same shape, to be called as `attend` is: ours, and cuDNN's.

    ours are implementations, by what is added to the prefix.
    """
    found = {
        f"{prefix}{suffix}": functools.partial(attend, case=case, implementation=name)
        for suffix, name in ours.items()
    }
    cudnn = functools.partial(by_library, case=case, name="cudnn")
    return found | ({f"{prefix} cudnn": cudnn} if peers else {})


def by_torch(case, torch):
    """A timer of PyTorch's attention."""
    if case.mask not in ("full", "causal") or case.bias:
        raise NotImplementedError("PyTorch is timed with full and causal attention only")
    return torch.prepare("attention", case)


def data_of(case):
    """What the mask has to know: which document each token is of (B T), or how many keys (B)."""
    random = np.random.default_rng(0)
    if case.mask == "documents":
        ends = np.sort(random.choice(case.length - 1, _DOCUMENTS - 1, replace=False)) + 1
        ids = np.searchsorted(ends, np.arange(case.length), side="right")
        return jnp.asarray(np.tile(ids, (case.batch, 1)), "int32")
    if case.mask == "padding":
        lengths = random.integers(-(-case.length * 3 // 4), case.length + 1, case.batch)
        return jnp.asarray(lengths, "int32")
    return None


def mask_of(case, data):
    """Our mask."""
    match case.mask:
        case "causal":
            return masks.Causal()
        case "window":
            return masks.Window(WINDOW)
        case "documents":
            return masks.Causal() & masks.Segments(data)
        case "padding":
            return masks.Valid(jnp.arange(case.length)[None] < data[:, None])
    return None


@jax.jit
def same(ids):
    """Which tokens are of one document (B 1 T T): jax.nn knows no ids."""
    return (ids[:, :, None] == ids[:, None, :])[:, None]


def options_of(case, data):
    """The same mask in the words of jax.nn; for documents data is `same`."""
    return {
        "full": {},
        "causal": dict(is_causal=True),
        "window": dict(is_causal=True, local_window_size=(WINDOW, 0)),
        "documents": dict(is_causal=True, mask=data),
        "padding": dict(key_value_seq_lengths=data),
    }[case.mask]


def share(case) -> float:
    """How much of all scores counts as work: visible tiles, and half of a causal square."""
    if case.mask in ("window", "documents"):
        T, mask = case.length, mask_of(case, data_of(case))
        tiles = masks.tiles(mask, T, T, block_q=_TILE, block_k=_TILE)
        return float(np.mean(np.asarray(tiles) != masks.EMPTY))
    return 0.5 if case.mask == "causal" else 1.0
