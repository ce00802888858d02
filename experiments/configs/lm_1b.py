"""A language model of 1.1 billion parameters on 2 million tokens a step, to plan for pods.

Command: attnjax plan lm_1b --target v5e:16x16 --mesh.fsdp 64 --mesh.context 4
The task is only as long and has as many tokens as a text would: what a step costs is the same.
"""

from experiments.config import Experiment

CONFIG = Experiment(
    task="mqar(vocab_size=32768, length=8192, num_pairs=1024)",
    model="lm(features=2048, depth=16, num_heads=32, scan=True, remat='full')",
    mixers=("gqa(num_kv_heads=8, rotary_base=500000.0)",),
    batch_size=256,
    dtype="bfloat16",
    learning_rate=3e-4,
    weight_decay=0.1,
)
