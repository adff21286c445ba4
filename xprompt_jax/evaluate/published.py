"""The paper's numbers (arXiv 2412.01824, Tables 1 to 5), to print beside ours.

Only numbers that are at hand are here, as they were once noted from the paper: check them against it before you print them. What is
missing is listed in MISSING and stays an empty cell, on every page and in the docs.
Columns are the paper's: PSNR, SSIM, RMSE (metres), mIoU (%), angle (degrees), CLIP_dir, CLIP_out, CLIP_img, DINO.
"""

from __future__ import annotations

from collections.abc import Mapping

SOURCE = "arXiv 2412.01824"

Rows = Mapping[str, Mapping[str, float]]
"""Row of a table -> column -> number."""

NO_EXAMPLE, CAUSAL, XP, FULL = "no example", "in-context, without XP tokens", "in-context, X-Prompt", "trained on the task"
"""The rows of Table 4, in the paper's order."""

TABLE_4: Mapping[str, Rows] = {
    "low_light": {
        NO_EXAMPLE: {"PSNR": 9.140, "SSIM": 0.253}, CAUSAL: {"PSNR": 17.00, "SSIM": 0.633}, XP: {"PSNR": 17.22, "SSIM": 0.653},
        FULL: {"SSIM": 0.770},
    },
    "derain_heavy": {
        NO_EXAMPLE: {"PSNR": 7.924, "SSIM": 0.212}, CAUSAL: {"PSNR": 18.10, "SSIM": 0.509}, XP: {"PSNR": 18.91, "SSIM": 0.512},
        FULL: {"PSNR": 21.55, "SSIM": 0.633},
    },
    "depth": {NO_EXAMPLE: {"RMSE": 0.745}, CAUSAL: {"RMSE": 0.390}, XP: {"RMSE": 0.352}, FULL: {"RMSE": 0.279}},
    "object_addition": {},
    "object_removal": {},
}  # fmt: skip
"""Suite -> rows."""

_TABLE_2: Mapping[str, Rows] = {
    "derain": {"X-Prompt": {"PSNR": 25.53, "SSIM": 0.843}, "Painter": {"PSNR": 29.87, "SSIM": 0.882},
               "OmniGen": {"PSNR": 12.02, "SSIM": 0.233}},
    "low_light": {"X-Prompt": {"PSNR": 19.71, "SSIM": 0.810}, "Painter": {"PSNR": 22.40, "SSIM": 0.872}},
    "deblur": {"X-Prompt": {"PSNR": 21.04, "SSIM": 0.761}, "InstructIR": {"PSNR": 29.40, "SSIM": 0.886},
               "OmniGen": {"PSNR": 13.39, "SSIM": 0.321}},
    "depth": {"X-Prompt": {"RMSE": 0.277}, "Painter": {"RMSE": 0.288}, "OmniGen": {"RMSE": 0.480}},
    "segmentation": {"X-Prompt": {"mIoU": 31.21}, "Painter": {"mIoU": 49.90}, "Lumina-mGPT": {"mIoU": 20.87}},
    "normals": {"X-Prompt": {"angle": 19.17}, "Bae et al.": {"angle": 14.90}},
    "normals_nyud": {"X-Prompt": {"angle": 19.17}, "InvPT": {"angle": 19.04}},
}  # fmt: skip
_TABLE_3: Rows = {"MagicBrush's own model": {"CLIP_out": 0.278, "CLIP_img": 0.933, "DINO": 0.899}}

TOKENIZER: Rows = {
    "Chameleon's tokenizer at 512, Rain100L, Table 5": {"PSNR": 26.34, "SSIM": 0.805},
    "Chameleon's tokenizer at 1024, Rain100L, Table 5": {"PSNR": 29.77, "SSIM": 0.906},
}

MISSING: Mapping[str, str] = {
    "Table 1": "every number",
    "Table 3": "X-Prompt's rows, with and without RAIE; MagicBrush's CLIP_dir",
    "Table 4": "object addition and removal, every number; LOL's PSNR of the model that was trained on it",
}
"""Table -> what is not at hand."""


def rows_of(suite: str) -> Rows:
    """What may stand beside a suite's scores; row names say their table."""
    if suite == "magicbrush":
        return {f"{name}, Table 3": columns for name, columns in _TABLE_3.items()}
    rows = {f"{name}, Table 2": columns for name, columns in _TABLE_2.get(suite, {}).items()}
    if suite == "derain":  # the ceiling on the same images
        first = next(iter(TOKENIZER.values()))
        rows["Chameleon's tokenizer alone, Table 5"] = first
    return rows | {f"{name}, Table 4": columns for name, columns in TABLE_4.get(suite, {}).items()}
