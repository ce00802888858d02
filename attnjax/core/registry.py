"""Finds records by file path and says what a record is.

A file `attnjax/<family>/<name>.py` with a line that starts `SPEC = ` holds one record, known as
`family.name`, or as `name` where that is unique. Nothing is listed by hand and nothing is imported
before it is asked for.

Every kind of record names a pure function and the papers it comes from, and carries what a test
needs to judge it: an example, an oracle that shares no code with the function, and the claims.
`tests/conformance_test.py` holds exactly one test for each claim.
"""

import ast
import dataclasses
import difflib
import enum
import functools
import importlib
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, Literal

import flax.linen as nn
import jax

_ROOT = pathlib.Path(__file__).parents[1]

Layout = Literal["sequence", "grid", "set", "cross"]
"""What a module maps: sequence (B T D) -> (B T D), grid (B X Y D) -> (B X Y D),
set (B S D) -> (B M D), cross (B T D), (B S D) -> (B T D or a distribution over S)."""


class Claim(enum.Enum):
    """A claim about a mechanism. Each member names one test in tests/conformance_test.py."""

    CAUSAL = "with mask=Causal(), output t never depends on an input after t"
    MASKABLE = "a masked token has no influence on the outputs and gradients of the others"
    CROSS = "queries and keys may come from different sequences of different lengths"
    PERMUTATION_EQUIVARIANT = "permuting the tokens permutes the outputs"
    PERMUTATION_INVARIANT = "permuting the inputs does not change the output"
    STREAMABLE = "token by token through a state gives the same as all at once"
    LINEAR_MEMORY = "no array grows faster than T"
    LINEAR_COMPUTE = "operations grow no faster than T"
    FUSED = "has a Pallas implementation, chosen by `implementation=`"
    CONTEXT_PARALLEL = "gives the same with its sequence sharded, by each strategy in `context`"
    DENSE_TWIN = "is linear in its values, so its attention matrix can be had"
    FORWARD_MODE = "has forward-mode derivatives (jax.jvp)"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mechanism:
    """An attention mechanism: a pure function and a thin module around it."""

    fn: Callable[..., Any]  # the pure function
    module: type[nn.Module]  # projections and one call of fn
    papers: tuple[str, ...]  # keys of docs/papers.csv
    example: Callable[[jax.Array, int], dict[str, jax.Array]]  # (key, T) -> arguments of fn
    oracle: Callable[..., Any]  # slow, obvious, same arguments and options as fn
    claims: frozenset[Claim] = frozenset()
    layout: Layout = "sequence"
    small: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # options of a small module
    variants: tuple[Mapping[str, Any], ...] = ({},)  # options of fn, each judged by the oracle
    context: tuple[str, ...] = ()  # names of strategies in attnjax.parallel
    carry: Callable[..., Any] | None = None  # arguments of fn -> factor on its initial_state


@dataclasses.dataclass(frozen=True, kw_only=True)
class Intervention:
    """A change to a decode state, a token set or an attention map, with a strength or a budget."""

    fn: Callable[..., Any]
    papers: tuple[str, ...]
    example: Callable[[jax.Array, int], dict[str, jax.Array]]
    oracle: Callable[..., Any]
    identity: Mapping[str, Any]  # options at which nothing is changed: strength 0, full budget
    untouched: Callable[..., Any]  # same arguments as fn: what `identity` must give
    variants: tuple[Mapping[str, Any], ...] = ({},)
    size: Callable[..., int] | None = None  # of an output of fn: what the budget limits
    budget: Callable[..., int] | None = None  # same arguments as fn: the most that `size` may be


@dataclasses.dataclass(frozen=True, kw_only=True)
class Objective:
    """A loss, or a way to weigh or combine losses: gives a scalar to minimise."""

    fn: Callable[..., jax.Array]
    papers: tuple[str, ...]
    example: Callable[[jax.Array, int], dict[str, jax.Array]]
    oracle: Callable[..., jax.Array]
    variants: tuple[Mapping[str, Any], ...] = ({},)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Probe:
    """A measurement of an attention map or a representation: gives a dict of named statistics."""

    fn: Callable[..., Mapping[str, jax.Array]]
    papers: tuple[str, ...]
    example: Callable[[jax.Array, int], dict[str, jax.Array]]
    oracle: Callable[..., Mapping[str, jax.Array]]
    variants: tuple[Mapping[str, Any], ...] = ({},)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """A source of examples: fn(split, *, seed, ...) -> random access to dicts of arrays."""

    fn: Callable[..., Any]
    kind: Literal["tokens", "image", "vectors", "objects"]
    papers: tuple[str, ...] = ()
    baselines: Callable[[], dict[str, float]] | None = None  # cheap reference numbers


Record = Mechanism | Intervention | Objective | Probe | Task


def names() -> list[str]:
    """All records as `family.name`: the files that define a SPEC. Nothing is imported."""
    return list(_names())


@functools.cache
def _names() -> tuple[str, ...]:
    has_record = lambda path: "\nSPEC = " in path.read_text(encoding="utf-8")
    return tuple(sorted(f"{p.parent.name}.{p.stem}" for p in _ROOT.glob("*/*.py") if has_record(p)))


def full_name(name: str) -> str:
    """`family.name` of a record given by that or by `name` alone.

    Raises ValueError, naming the nearest records, where there is none.
    """
    found = [full for full in _names() if name in (full, full.partition(".")[2])]
    if len(found) == 1:
        return found[0]
    if found:
        raise ValueError(f"{name!r} is ambiguous: {', '.join(found)}")
    short = {full.partition(".")[2]: full for full in _names()}
    raise ValueError(f"no record is called {name!r}{nearest(name, [*short, *_names()])}")


def nearest(word: str, choices) -> str:
    """An ending for an error message that names the choices most like `word`."""
    matches = difflib.get_close_matches(word, list(choices), n=3, cutoff=0.5)
    return f"; did you mean {' or '.join(matches)}?" if matches else ""


def get(name: str) -> Record:
    """The record called `name`; ValueError where there is none."""
    return importlib.import_module(f"attnjax.{full_name(name)}").SPEC


def of_kind(kind: type[Record]) -> dict[str, Any]:
    """Every record of a kind by name. Imports all of them."""
    records = {name: get(name) for name in _names()}
    return {name: record for name, record in records.items() if isinstance(record, kind)}


def parse_call(text: str) -> tuple[str, dict[str, Any]]:
    """`"gqa(num_kv_heads=2)"` -> ("gqa", {"num_kv_heads": 2}); `"gqa"` -> ("gqa", {}).

    A name and its options in one string, so that a command line, a config and a card of the zoo
    say the same. Options are Python literals; nothing is executed. ValueError for other text.
    """
    try:
        tree = ast.parse(text.strip(), mode="eval").body
        call = tree if isinstance(tree, ast.Call) else ast.Call(func=tree, args=[], keywords=[])
        if call.args or any(keyword.arg is None for keyword in call.keywords):
            raise ValueError
        options = {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords}
        return ast.unparse(call.func), options
    except (SyntaxError, ValueError):
        raise ValueError(f"{text!r} is not of the form name or name(option=value, ...)") from None


def parse(text: str) -> tuple[str, dict[str, Any]]:
    """As `parse_call`, with the full name of a record: ("softmax.gqa", {"num_kv_heads": 2})."""
    name, options = parse_call(text)
    return full_name(name), options


def build(text: str, **defaults) -> nn.Module:
    """The module that `text` asks for, as in `build("gqa(num_kv_heads=2)", num_heads=8)`.

    Options in the text win over `defaults`, of which those that the module has no field for are
    left out. Raises ValueError as `construct` does, and for what is no mechanism.
    """
    name, options = parse(text)
    record = get(name)
    if not isinstance(record, Mechanism):
        raise ValueError(f"{name} is a {type(record).__name__}, not a Mechanism")
    known = fields(record.module)
    defaults = {option: value for option, value in defaults.items() if option in known}
    return construct(name, record.module, defaults | options)


def construct(name: str, module: type[nn.Module], options: Mapping[str, Any]) -> nn.Module:
    """`module(**options)`, checked.

    Raises ValueError, beginning with `name`, for an option that is no field, naming the nearest,
    and for a field without default that has no option.
    """
    known = fields(module)
    for option in options:
        if option not in known:
            raise ValueError(f"{name} has no option {option!r}{nearest(option, known)}")
    required = {option for option, f in known.items() if f.default is dataclasses.MISSING}
    if missing := sorted(required - options.keys()):
        raise ValueError(f"{name} needs the options {', '.join(missing)}")
    return module(**options)


def fields(module: type[nn.Module]) -> dict[str, dataclasses.Field]:
    """The options of a module by name: its fields but those that Flax adds."""
    return {f.name: f for f in dataclasses.fields(module) if f.name not in ("parent", "name")}
