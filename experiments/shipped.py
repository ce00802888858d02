"""Train the checkpoints that come with the library: python -m experiments.shipped [NAME ...]

Each is trained with three seeds; the zoo keeps the parameters of seed 0 and what all of them
measured. A checkpoint that is there already is left alone, for a name never changes its meaning.
"""

import sys

from attnjax.zoo import store
from experiments import finished, train

SEEDS = (0, 1, 2)
SVC = {"value": 0.9889, "source": "scikit-learn's SVC(gamma=0.001) on the same split"}
SHORT = ["--steps", "300"]
CHECKPOINTS = {  # name: (config, what the command line adds to it, reference)
    "vit_mha-tiny.digits@1": ("digits_small", ["--mixers", "multi_head_attention"], SVC),
    "vit_gna-tiny.digits@1": ("digits_small", ["--mixers", "gna(window=(5, 5))", *SHORT], SVC),
    "vit_swin-tiny.digits@1": (
        "digits_small",
        ["--mixers", "swin(window=4)", "swin(window=4, shift=2)", *SHORT],
        SVC,
    ),
    "vit_lightning-tiny.digits@1": (
        "digits_small",
        ["--mixers", "lightning_attention_2", *SHORT],
        SVC,
    ),
    "vit_hedgehog-tiny.digits@1": ("digits_small", ["--mixers", "hedgehog", *SHORT], SVC),
    "vit_eca-tiny.digits@1": (
        "digits_small",
        ["--mixers", "eca_net", "multi_head_attention", *SHORT],
        SVC,
    ),
}


def main(argv: list[str]) -> int:
    """Trains the checkpoints in `argv`, or all; returns the exit code."""
    for name in argv or CHECKPOINTS:
        if name not in CHECKPOINTS:
            print(f"{name} is not one of {', '.join(CHECKPOINTS)}", file=sys.stderr)
            return 2
        if (store.SHIPPED / name).exists():
            print(f"{name} is there already")
            continue
        config, extra, reference = CHECKPOINTS[name]
        runs = [f"runs/shipped/{name}/seed{seed}" for seed in SEEDS]
        for seed, run in zip(SEEDS, runs, strict=True):
            if train.main([config, *extra, "--seed", str(seed), "--directory", run]) != 0:
                return 1
        quoted = [f'"{word}"' if "(" in word else word for word in extra]
        command = " ".join(["attnjax train", config, *quoted, "--seed 0"])
        card = finished.publish(
            name, runs, root=store.SHIPPED, command=command, reference=reference
        )
        print(name, {key: round(value["mean"], 4) for key, value in card.metrics.items()})
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
