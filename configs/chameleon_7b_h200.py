"""Chameleon 7B, every weight trained, on one H200: 4 rows of the in-context bucket a step, a constant learning rate.

Memory (GiB = 2^30 bytes; the card has 141e9 bytes = 131):

    weights and two moments   7.01e9 x (4 + 4 + 4) bytes                                     78.4
    gradients                 7.01e9 x 4                                                     26.1
    block inputs (remat)      4 x 4673 slots x 4096 x 2 bytes x 32 layers                     4.6
    one layer in the backward pass, 18,692 slots x (4 x 4096 + 3 x 11008 + 4 x 4096)
                              x 2 bytes, and as much for gradients                            4.6
    logits of a slice         2048 x 65,536 x 4 bytes, and their gradient                     1.0
    weights in bfloat16       two layers, the head twice, the embedding's gradient            3.2
                                                                                            -----
                                                                                            117.9

The TPU compiler asks for 124 for the same step (docs/scaling.md); not yet tried on the card. Start it with
XLA_PYTHON_CLIENT_MEM_FRACTION=0.95. The four rows may be of several buckets, which share their gradients: 2 in context, 1 describe and
1 text to image ask for 122. What does not fit is `train.accumulate` (the sum is kept, 26 more). On two cards with `--mesh.fsdp 2` it does.
On one, there is

    --optim.moment-dtype bfloat16        moments in 26.1 instead of 52.2: 91.8 in all. The TPU compiler asks for 98; `train.accumulate` then
                                         needs as much as this table
    --optim.trainable lora --optim.frozen-dtype bfloat16     weights 7.01e9 x 2 bytes = 13.1, adapters of rank 16, 40e6 x 16 = 0.6.
                                         The TPU compiler asks for 31: also a card of 40 or 48
    --optim.trainable xp --optim.frozen-dtype bfloat16       the TPU compiler asks for 28
"""

from xprompt_jax.config import PRESETS, BucketConfig, ComputeConfig, Config, DataConfig, OptimConfig, TrainConfig

config = Config(
    model=PRESETS["7b"],
    compute=ComputeConfig(dtype="bfloat16", remat="block", attention="cudnn"),
    data=DataConfig(buckets=(BucketConfig("in_context", examples=1, context=2304, todo=2304, answer=1027, rows=4),)),
    optim=OptimConfig(learning_rate=2e-5, warmup_steps=500, schedule="constant"),
    train=TrainConfig(steps=20_000, dropout=0.05, init_from="models/chameleon-7b"),
)
