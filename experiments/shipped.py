"""Train the checkpoints that come with the library: python -m experiments.shipped [NAME ...]

Each is trained with three seeds; the zoo keeps the parameters of seed 0 and what all of them
measured. A checkpoint that is there already is left alone, for a name never changes its meaning.
"""

import pathlib
import shlex
import sys
from collections.abc import Iterator
from typing import NamedTuple

from attnjax.zoo import store

SEEDS = (0, 1, 2)
SVC = {"value": 0.9889, "source": "scikit-learn's SVC(gamma=0.001) on the same split"}
CHOSEN = {"value": 1 / 8, "source": "guessing one of the eight values that were shown"}


class Trained(NamedTuple):
    """Runs of one config with all seeds, and what trains the first."""

    runs: list[str | pathlib.Path]
    command: str
    reference: dict


def digits(name: str, *options: str) -> Trained:
    """A small ViT that reads the digits."""
    from experiments import train

    def run(seed):
        directory = f"runs/shipped/{name}/seed{seed}"
        command = ["digits_small", *options, "--seed", str(seed)]
        if train.main([*command, "--directory", directory]) != 0:
            raise SystemExit(1)
        return directory

    command = shlex.join(["attnjax", "train", "digits_small", *options, "--seed", "0"])
    return Trained([run(seed) for seed in SEEDS], command, SVC)


def recall(name: str, mechanism: str) -> Trained:
    """A small language model that recalls values by their keys: a row of a comparison."""
    import dataclasses

    from experiments import cells, compare
    from experiments.comparing import plan

    softmax = "multi_head_attention"  # first: all others get as many parameters
    mechanisms = (softmax,) if mechanism == softmax else (softmax, mechanism)
    wanted = compare.Compare(mechanisms, task="mqar_short")
    config = plan.make(wanted).models[-1]
    root = compare.directory(wanted) / "cells"

    def run(seed):
        this = dataclasses.replace(config, seed=seed)
        cells.trained(this, root)
        return root / cells.name(this)

    words = "--model", config.model, "--mixers", mechanism, "--target", str(config.target)
    words += "--eval-every", str(config.eval_every), "--seed", "0"
    command = shlex.join(["attnjax", "train", "mqar_short", *words])
    return Trained([run(seed) for seed in SEEDS], command, CHOSEN)


SHORT = "--steps", "300"
CHECKPOINTS = {  # name: what trains it, and with what
    "vit_mha-tiny.digits@1": (digits, "--mixers", "multi_head_attention"),
    "vit_gna-tiny.digits@1": (digits, "--mixers", "gna(window=(5, 5))", *SHORT),
    "vit_swin-tiny.digits@1": (
        digits, "--mixers", "swin(window=4)", "swin(window=4, shift=2)", *SHORT,
    ),
    "vit_lightning-tiny.digits@1": (digits, "--mixers", "lightning_attention_2", *SHORT),
    "vit_hedgehog-tiny.digits@1": (digits, "--mixers", "hedgehog", *SHORT),
    "vit_eca-tiny.digits@1": (digits, "--mixers", "eca_net", "multi_head_attention", *SHORT),
    "lm_mha-tiny.mqar-short@1": (recall, "multi_head_attention"),
    "lm_mla-tiny.mqar-short@1": (recall, "multi_head_latent_attention"),
    "lm_moba-tiny.mqar-short@1": (recall, "moba(block=8, topk=2)"),
    "lm_landmark-tiny.mqar-short@1": (recall, "landmark_attention(block=8)"),
    "lm_hedgehog-tiny.mqar-short@1": (recall, "hedgehog"),
    "lm_fast-tiny.mqar-short@1": (recall, "fast_attention(order=1)"),
    "lm_lightning-tiny.mqar-short@1": (recall, "lightning_attention_2"),
    "lm_retention-tiny.mqar-short@1": (recall, "retention"),
    "lm_gla-tiny.mqar-short@1": (recall, "gated_linear_attention"),
    "lm_hgrn2-tiny.mqar-short@1": (recall, "hgrn2"),
    "lm_delta-tiny.mqar-short@1": (recall, "delta_net"),
    "lm_gated_delta-tiny.mqar-short@1": (recall, "gated_delta_net"),
    "lm_mamba-tiny.mqar-short@1": (recall, "mamba"),
    "lm_transnormer-tiny.mqar-short@1": (recall, "transnormerllm"),
}  # fmt: skip


def main(argv: list[str]) -> int:
    """Trains the checkpoints in `argv`, or all; returns the exit code."""
    for name in argv or CHECKPOINTS:
        if name not in CHECKPOINTS:
            print(f"{name} is not one of {', '.join(CHECKPOINTS)}", file=sys.stderr)
            return 2
    for name in missing(argv or CHECKPOINTS):
        train, *options = CHECKPOINTS[name]
        publish(name, train(name, *options))
    return 0


def missing(names) -> Iterator[str]:
    """Those of the names that the library doesn't hold yet."""
    for name in names:
        if (store.SHIPPED / name).exists():
            print(f"{name} is there already")
        else:
            yield name


def publish(name: str, trained: Trained):
    """Into the library, and prints what was measured."""
    from experiments import finished

    options = dict(command=trained.command, reference=trained.reference)
    card = finished.publish(name, trained.runs, root=store.SHIPPED, **options)
    print(name, {key: round(value["mean"], 4) for key, value in card.metrics.items()})


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
