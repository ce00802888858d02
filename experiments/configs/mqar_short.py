"""The shortest recall that still tells mechanisms apart: eight pairs, each asked for at once.

Command: attnjax compare --task mqar_short --mechanisms multi_head_attention delta_net retention
Minutes: about 1 a training on one core. Expect: see docs/comparisons/mqar.

As in mqar the MLPs are next to nothing; two heads, so that one with a short memory isn't alone.
"""

from experiments.config import Experiment

CONFIG = Experiment(
    task="mqar(vocab_size=64, length=32, num_pairs=8)",
    model="lm(features=64, depth=2, num_heads=2, max_length=32, mlp_ratio=0.25)",
    mixers=("multi_head_attention",),
    steps=1000,
    batch_size=64,
    learning_rate=3e-3,
    weight_decay=0.1,
)
