"""ListOps with short expressions: values of nested MIN, MAX, MED and SM.

Command: attnjax train lra_listops
Minutes: 5 on one core. Expect: accuracy 0.52 with softmax attention, and 0.48 after 500 updates.
The commonest value is right in 0.11, so two layers learn a part of the task, and far from all.
"""

from experiments.config import Experiment

CONFIG = Experiment(
    task="lra_listops(length=64, min_length=8, max_depth=3, max_args=5)",
    model="lm(features=64, depth=2, num_heads=4, max_length=64)",
    mixers=("multi_head_attention",),
    steps=1000,
    batch_size=128,
    learning_rate=3e-3,
    weight_decay=0.1,
)
