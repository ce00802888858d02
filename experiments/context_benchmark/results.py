"""Files of the context-parallel benchmark: rows that are kept, JSON, a page and pictures."""

import json
import pathlib
from typing import Any

from experiments.context_benchmark import masks as context_masks
from experiments.context_benchmark import plots, tables
from experiments.measuring import results

_CELL = "function", "strategy", "implementation", "mask", "length", "devices"


def circumstances(target: str, config: dict[str, Any]) -> dict[str, Any]:
    """All that rows of one file have in common, as JSON reads it back."""
    about = {"machine": results.machine(), "versions": results.versions()}
    return json.loads(json.dumps({**about, "target": target, "config": config}))


def kept(out: pathlib.Path | None, about: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows that the file has; ValueError where they were measured elsewhere or otherwise."""
    if out is None or not out.exists():
        return []
    page = json.loads(out.read_text(encoding="utf-8"))
    rows = page.pop("rows")
    if page != about:
        raise ValueError(
            f"{out.name} has another machine, versions or settings: name another with --out, or "
            "remove it"
        )
    return rows


def joined(old: list[dict[str, Any]], new: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows by function, mask, length and devices; the new in the place of the old."""
    cell = lambda row: tuple(row[name] for name in _CELL)
    rows = {cell(row): row for row in old} | {cell(row): row for row in new}
    masks = list(context_masks.by_name(1))
    place = lambda row: (row["function"], masks.index(row["mask"]), row["length"], row["devices"])
    return sorted(rows.values(), key=place)


def write(about: dict[str, Any], rows: list[dict[str, Any]], out: pathlib.Path) -> None:
    """The JSON file."""
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(about | {"rows": rows}, indent=1) + "\n", encoding="utf-8")


def draw(out: pathlib.Path) -> None:
    """Beside the JSON file a page (.md), and pictures by mask and by length (.png)."""
    page = json.loads(out.read_text(encoding="utf-8"))
    out.with_suffix(".md").write_text(tables.page(page), encoding="utf-8")
    plots.by_mask(page).savefig(out.with_suffix(".png"), dpi=110)
    lengths = plots.by_length(page)
    if lengths is not None:
        lengths.savefig(out.with_name(f"{out.stem}_lengths.png"), dpi=110)
    print(f"wrote {out}, with .md and .png beside it")
