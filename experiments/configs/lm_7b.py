"""A language model of 7.2 billion parameters on sequences of a million tokens, to plan for pods.

Command: attnjax plan lm_7b --target v5p:4x4x4 --mesh.fsdp 4 --mesh.context 16
What plan says of shorter sequences on eight H100: docs/plan.md. The task is only as long and has as
many tokens as a text would: what a step costs is the same.
"""

from experiments.config import Experiment

CONFIG = Experiment(
    task="mqar(vocab_size=32768, length=1048576, num_pairs=1024)",
    model="lm(features=4096, depth=32, num_heads=32, mlp_ratio=3.5, scan=True, remat='full')",
    mixers=("gqa(num_kv_heads=8, rotary_base=500000.0)",),
    batch_size=4,
    dtype="bfloat16",
    learning_rate=3e-4,
    weight_decay=0.1,
)
