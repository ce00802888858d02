"""A small language model on the bytes of Python's own standard library.

Command: attnjax train source_text
Minutes: about 4 on two cores. Expect: 2.4 bits per byte (unigram entropy: 4.44).
"""

from experiments.config import Experiment

CONFIG = Experiment(
    task="source_text(length=256)",
    model="lm(features=128, depth=2, num_heads=4)",
    mixers=("multi_head_attention(rotary_base=10000.0)",),
    steps=600,
    batch_size=16,
    learning_rate=3e-3,
    eval_examples=128,
)
