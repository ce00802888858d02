"""Induction: find the trigger's first place and say what came after it.

Command: attnjax train induction
Minutes: between 4 and 5 on one core. Expect: accuracy 0.99 with softmax attention after some 640
updates. It guesses, at 0.07, for the first 200.
"""

from experiments.config import Experiment

CONFIG = Experiment(
    task="induction(vocab_size=16, length=64)",
    model="lm(features=64, depth=2, num_heads=1, max_length=64)",
    mixers=("multi_head_attention",),
    steps=1000,
    batch_size=128,
    learning_rate=3e-3,
    weight_decay=0.1,
)
