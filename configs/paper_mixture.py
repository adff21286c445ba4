"""The paper's training mixture (Tables 6 and 7) for the 7B: every dataset counts for the pairs that the paper had of it.

`data/all` joins the stores of the datasets (docs/data.md, "From downloads to the whole mixture"). What it lacks is not drawn:
`xprompt inspect --config configs/paper_mixture.py --mixture` shows the paper's counts beside the store's. A step's rows are in proportion
to the paper's samples, in multiples of 32:

    images          2 x 1,442,700             416 rows
    descriptions    2 x 1,442,700 + 500,000   512
    from captions   500,000                    64
    several inputs  240,000                    32

Machine as for chameleon_7b_pod.py, but with 32 rows in the smallest bucket, data x fsdp is 32 at most and tensor takes the rest: 8 on 256
chips. A device then holds rows 13 + 16 + 2 + 1, 113,249 slots, whose block inputs alone are 27.7 GiB.
"""

from xprompt_jax.config import PRESETS, BucketConfig, ComputeConfig, Config, DataConfig, MeshConfig, OptimConfig, TrainConfig
from xprompt_jax.data.mixture import PAPER_WEIGHTS

config = Config(
    model=PRESETS["7b"],
    compute=ComputeConfig(dtype="bfloat16", remat="block", attention="splash"),
    mesh=MeshConfig(data=1, fsdp=32, tensor=-1),
    data=DataConfig(
        store="data/all",
        weights=PAPER_WEIGHTS,
        buckets=(
            BucketConfig("in_context", examples=1, context=2304, todo=2304, answer=1027, rows=416),
            BucketConfig("describe", examples=1, context=2304, todo=512, answer=448, rows=512, kind="describe"),
            BucketConfig("text_to_image", examples=0, context=0, todo=1536, answer=1027, rows=64, kind="text_to_image"),
            BucketConfig("several_inputs", examples=0, context=0, todo=3328, answer=1027, rows=32, several_inputs=True),
        ),
    ),
    optim=OptimConfig(learning_rate=1e-4, schedule="cosine", warmup_steps=1000),
    train=TrainConfig(steps=20_000, dropout=0.05, loss_chunk=8192, init_from="models/chameleon-7b"),
)
