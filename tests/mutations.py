"""Plants bugs and shows that the suite finds each: python -m tests.mutations

Each mutation changes one line in a copy of the sources, runs the tests that should notice, and must
make one fail. A mutation that no test notices, or whose line is no longer there, ends with 1.
"""

import dataclasses
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time

import rich.console
import rich.table

ROOT = pathlib.Path(__file__).parents[1]
COPIED = ("attnjax", "pallas_kernels", "experiments", "tests", "docs", "pyproject.toml", "setup.py")


@dataclasses.dataclass(frozen=True)
class Mutation:
    """A bug of some kind: `old` becomes `new` in `file`; pytest with `tests` must fail."""

    kind: str
    file: str
    old: str
    new: str
    tests: str


def conforms(name: str) -> str:
    """Arguments that run the conformance tests of one record."""
    return f"tests/conformance_test.py -k {name}"


MUTATIONS = (
    Mutation(
        "mask off by one",
        "attnjax/core/masks.py",
        "(s[None, :] <= t[:, None])",
        "(s[None, :] <= t[:, None] + 1)",
        conforms("multi_head_attention"),
    ),
    Mutation(
        "tile wrongly full",
        "attnjax/core/masks.py",
        "most >= low\n    every = (most == most) if low is None else least >= low",
        "most >= low\n    every = (most == most) if low is None else most >= low",
        "tests/core/masks_test.py",
    ),
    Mutation(
        "wrong gradient of keys",
        "attnjax/ops/blocked_gradients.py",
        "dk, dv = dk.at[j].add(grads[1])",
        "dk, dv = dk.at[j].add(grads[1] * 1.01)",
        "tests/ops/dot_product_attention_test.py",
    ),
    Mutation(
        "decay one step late",
        "pallas_kernels/decay_attention/chunk.py",
        "_decay(log_decay, t - s), 0.0)",
        "_decay(log_decay, t - s - 1), 0.0)",
        conforms("lightning_attention_2"),
    ),
    Mutation(
        "padded key leaks",
        "attnjax/ops/blocked_attention.py",
        "columns.shape) < S",
        "columns.shape) <= S",
        "tests/ops/dot_product_attention_test.py",
    ),
    Mutation(
        "padded token leaks into the state",
        "attnjax/ops/state_masks.py",
        "jnp.where(part.keys[:, :, None, None], x, 0)",
        "jnp.where(part.keys[:, :, None, None], x, x)",
        conforms("lightning_attention_2"),
    ),
    Mutation(
        "order of heads",
        "attnjax/ops/dense_attention.py",
        "q = q.swapaxes(1, 2).reshape(B, k.shape[2], -1, H)",
        "q = q.swapaxes(1, 2).reshape(B, -1, k.shape[2], T, H).swapaxes(1, 2)"
        ".reshape(B, k.shape[2], -1, H)",
        conforms("gqa"),
    ),
    Mutation(
        "sign of a gate",
        "attnjax/channel_spatial/eca_net.py",
        "jax.nn.sigmoid(logits[:, 0])",
        "jax.nn.sigmoid(-logits[:, 0])",
        conforms("eca_net"),
    ),
    Mutation(
        "scale",
        "attnjax/ops/dot_product_attention.py",
        "q.shape[-1] ** -0.5",
        "v.shape[1] ** -0.5",
        conforms("multi_head_attention"),
    ),
    Mutation(
        "state not reset at a new document",
        "pallas_kernels/decay_attention/chunk.py",
        "kept = jnp.where(last < 0,",
        "kept = jnp.where(last < 10**9,",
        "tests/pallas_kernels tests/linear_recurrent/lightning_attention_2_test.py",
    ),
    Mutation(
        "cache not moved on",
        "attnjax/core/decode.py",
        "self.length + k.shape[1])",
        "self.length + 1)",
        conforms("multi_head_attention"),
    ),
    Mutation(
        "softmax over the wrong axis",
        "attnjax/slots/slot_attention.py",
        "axis=2)",
        "axis=3)",
        conforms("slot_attention"),
    ),
    Mutation(
        "sharded positions begin at zero on every device",
        "attnjax/parallel/ring.py",
        "t = travel.positions(self.order, self.ring.here, self.ring.size, q.shape[1])",
        "t = travel.positions(self.order, 0 * self.ring.here, self.ring.size, q.shape[1])",
        conforms("multi_head_attention"),
    ),
)


def main() -> int:
    """Runs every mutation; 0 where the suite found each of them."""
    console = rich.console.Console(soft_wrap=True)
    table = rich.table.Table("planted bug", "file", "found", "by", "seconds")
    survivors = 0
    for mutation in MUTATIONS:
        console.print(f"planting: {mutation.kind}")
        start = time.perf_counter()
        found, by = run(mutation)
        survivors += not found
        seconds = f"{time.perf_counter() - start:.0f}"
        table.add_row(mutation.kind, mutation.file, "yes" if found else "NO", by, seconds)
    console.print(table)
    return 1 if survivors else 0


def run(mutation: Mutation) -> tuple[bool, str]:
    """(whether a test failed, the first that did)."""
    with tempfile.TemporaryDirectory() as folder:
        copy = pathlib.Path(folder)
        for name in COPIED:
            source = ROOT / name
            (shutil.copytree if source.is_dir() else shutil.copy)(source, copy / name)
        file = copy / mutation.file
        text = file.read_text()
        if mutation.old not in text:
            return False, "the line is not there"
        file.write_text(text.replace(mutation.old, mutation.new, 1))
        command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider"]
        done = subprocess.run(
            [*command, *mutation.tests.split()], cwd=copy, capture_output=True, text=True
        )
        # 1 is "tests failed"; a file that can't be imported would give another code
        failed = [line for line in done.stdout.splitlines() if line.startswith("FAILED ")]
        by = failed[0].split()[1].partition("::")[2] if failed else f"exit {done.returncode}"
        return done.returncode == 1 and bool(failed), by


if __name__ == "__main__":
    sys.exit(main())
