"""`xprompt demo`: the whole way in a few minutes on a laptop, from pictures to a model that follows an example.

Photographs and rendered scenes -> a VQGAN and a BPE tokenizer of their own -> tokens -> a small X-Prompt model trained on
a device mesh -> compiled prompts -> new images, in a picture and a page. Every step is the code that the 7B uses; only
the sizes differ. The pictures it draws are of scenes, and of example parameters, that training has not seen.
"""

from __future__ import annotations

import dataclasses
import logging
import time
import webbrowser
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image

from xprompt_jax.checkpoint import load_params
from xprompt_jax.config import (
    BucketConfig,
    ComputeConfig,
    Config,
    DataConfig,
    MeshConfig,
    ModelConfig,
    OptimConfig,
    TrainConfig,
    VQConfig,
    to_json,
)
from xprompt_jax.data import pipeline, sources, tasks, tokenise
from xprompt_jax.data.images import list_images, open_image, resize_center_crop, save_png
from xprompt_jax.errors import UserError
from xprompt_jax.evaluate.metrics import psnr_rgb
from xprompt_jax.evaluate.report import ReportRow, contact_sheet, write_report
from xprompt_jax.model.params import unflatten
from xprompt_jax.prompt import DESCRIBE_QUESTION, Prompter
from xprompt_jax.sample.sampler import Example, XPrompt
from xprompt_jax.tokens import Layout, train_tokenizer
from xprompt_jax.train.loop import train
from xprompt_jax.train.vqgan import train_vqgan
