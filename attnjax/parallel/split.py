"""What a strategy is, and a call with the letters of its arrays' annotations."""

import inspect
import re
import typing
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from attnjax.core import masks, registry

COLUMNS = "columns"  # S where it stands beside T
SEQUENCES = ("T", "S", "I")  # letters of queries, keys, and runs of queries that choose as one
TOKENS = (*SEQUENCES, "X")  # and of the first axis of a grid
HEADS = ("N", "K")


class Call(NamedTuple):
    """The arguments of a function: arrays whose axes have letters, the mask, and the rest."""

    letters: dict[str, tuple[str, ...]]  # of arrays, and of the output as "return"
    arrays: dict[str, jax.Array]
    mask: masks.Mask | None
    options: dict[str, Any]


class Strategy(NamedTuple):
    """What a strategy does. Each function takes the strategy's options by keyword."""

    check: Callable[..., None]  # (record, call, places): raises for what it can't honour
    run: Callable[..., Any]  # (record, call, places) on one device, with its part of the arrays
    # (devices, call) -> what must divide a length
    multiple: Callable[..., int] = lambda size, call: size
    over: tuple[str, ...] = TOKENS  # letters of what lies over the axis of the mesh
    papers: tuple[str, ...] = ()  # keys of docs/papers.csv that the strategy is of


def bind(fn: Callable, args, options) -> Call:
    """The call `fn(*args, **options)`, with every default."""
    signature = inspect.signature(fn)
    bound = signature.bind(*args, **options)
    bound.apply_defaults()
    given = dict(bound.arguments)
    letters = {name: _letters(p.annotation) for name, p in signature.parameters.items()}
    arrays = {name: x for name, x in given.items() if hasattr(x, "shape") and letters[name]}
    letters["return"] = _letters(signature.return_annotation)
    many = [x.ndim - len(letters[name]) for name, x in arrays.items() if _starred(letters[name])]
    letters = {name: _spread(x, *many[:1]) if _starred(x) else x for name, x in letters.items()}
    letters |= _told_apart({name: letters[name] for name in arrays}, arrays)
    mask = jax.tree.map(jnp.asarray, given.pop("mask", None))
    return Call(letters, arrays, mask, {k: x for k, x in given.items() if k not in arrays})


def only(record: registry.Mechanism, call: Call, honoured: tuple[str, ...], *, by: str) -> None:
    """Raises NotImplementedError, saying what would work, for any other argument than `honoured`.

    An option that has its default is not an argument.
    """
    defaults = {n: p.default for n, p in inspect.signature(record.fn).parameters.items()}
    for name, value in (call.options | call.arrays).items():
        if name not in honoured and (name in call.arrays or value != defaults[name]):
            raise NotImplementedError(f"{by} can't honour {name}, no strategy can")


def each_query_chooses(call: Call, *, by: str) -> None:
    """NotImplementedError where queries that choose as one may lie in several devices.

    ValueError where there isn't a choice (letter I) for each query.
    """
    if call.options.get("query_block", 1) > 1:
        raise NotImplementedError(f"{by} can't honour query_block, all_to_all can")
    found = sizes(call.letters, call.arrays)
    if found.get("I", found["T"]) != found["T"]:
        raise ValueError(f"I={found['I']} choices must be as many as the T={found['T']} queries")


def heads(record: registry.Mechanism, call: Call, N: int, devices: int, *, by: str):
    """NotImplementedError where N heads can't lie over devices, or an output isn't by heads."""
    if N % devices:
        others = [name for name in record.context if name not in ("all_to_all", "tensor")]
        able = " or ".join(others) or "no strategy"
        raise NotImplementedError(f"{by} can't split {N=} heads over {devices} devices, {able} can")
    if call.options.get("return_lse", False):
        raise NotImplementedError(f"{by} can't honour return_lse, no strategy can")
    if call.options.get("return_state", False) and "N" not in call.letters["initial_state"]:
        raise NotImplementedError(f"{by} can't honour return_state without heads")
    if call.options.get("initial_state") is not None:  # no array, so nothing says what its axes are
        raise NotImplementedError(f"{by} can't honour an initial_state of several arrays")


def apply(fn: Callable, call: Call):
    """The function of a call, which may not know of masks: then there is none."""
    mask = {} if call.mask is None else dict(mask=call.mask)
    return fn(**call.arrays, **call.options, **mask)


def _letters(annotation):
    """The axes of the first jaxtyping annotation in a type; () where there is none."""
    for kind in (annotation, *typing.get_args(annotation)):
        if hasattr(kind, "dim_str"):
            return tuple(re.sub(r"[#?_]", "", axis) for axis in kind.dim_str.split())
    return ()


def _starred(letters):
    return any(letter.startswith("*") for letter in letters)


def _spread(letters, more):
    """The letters of "*T" over 1 + `more` axes: T and then axes that are whole."""
    spread = lambda letter: (letter[1:], *[""] * more) if letter.startswith("*") else (letter,)
    return tuple(axis for letter in letters for axis in spread(letter))


def _told_apart(letters, arrays):
    """Letters in which S beside T is called `COLUMNS`, and "1" what is one entry for all."""
    columns = lambda axes: tuple(COLUMNS if a == "S" and "T" in axes else a for a in axes)
    letters = {name: columns(axes) for name, axes in letters.items()}
    most = sizes(letters, arrays)
    tell = lambda letter, size: "1" if size == 1 < most[letter] else letter
    pairs = lambda name: zip(letters[name], arrays[name].shape, strict=True)
    return {name: tuple(tell(*pair) for pair in pairs(name)) for name in arrays}


def sizes(letters: dict[str, tuple[str, ...]], arrays: dict[str, Any]) -> dict[str, int]:
    """The largest size that an axis of each letter has."""
    found = {}
    for name, array in arrays.items():
        for letter, size in zip(letters[name], array.shape, strict=True):
            found[letter] = max(size, found.get(letter, 1))
    return found
