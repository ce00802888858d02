"""Multi-query associative recall with a small vocabulary: what separates mechanisms in a minute.

Command: attnjax train mqar
Minutes: about 3 on two cores. Expect: accuracy 0.99 with softmax attention, after some 650 updates;
0.145 after 800 with linear attention, --mixers "fast_attention(order=1)".
The MLPs are next to nothing, as the paper has none: the wider they are, the longer a model goes on
guessing among the values that were shown. The paper's own cell, 4 pairs of 8192 tokens:
`attnjax reproduce recall_of_paper`.
"""

from experiments.config import Experiment

CONFIG = Experiment(
    task="mqar(vocab_size=256, length=64, num_pairs=8)",
    model="lm(features=64, depth=2, num_heads=1, max_length=64, mlp_ratio=0.25)",
    mixers=("multi_head_attention",),
    steps=1000,
    batch_size=128,
    learning_rate=3e-3,
    weight_decay=0.1,
)
