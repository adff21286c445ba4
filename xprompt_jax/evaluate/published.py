"""The paper's numbers (arXiv 2412.01824, Tables 1 to 5), to print beside ours.

Two transcriptions of the paper agree in every number here: the text of its PDF, and the tables at ai-paper-reviewer.com/2412.01824. Where
the paper contradicts itself, `CLASHES` says so; what it prints is left as it is. Its "Ours" is called X-Prompt here.
Columns are the paper's: PSNR, SSIM, RMSE (metres), mIoU (%), angle (degrees), CLIP_dir, CLIP_out, CLIP_img, DINO; GenEval's are its tasks.
"""

from __future__ import annotations

from collections.abc import Mapping

SOURCE = "arXiv 2412.01824"

Rows = Mapping[str, Mapping[str, float]]
"""Row of a table -> column -> number."""

NO_EXAMPLE, CAUSAL, XP, FULL = "no example", "in-context, without XP tokens", "in-context, X-Prompt", "trained on the task"
"""The rows of Table 4 that are the paper's own models."""
OMNIGEN = "OmniGen, in-context"

_TASKS = ("single_object", "two_object", "counting", "colors", "position", "color_attr", "overall")
_IMAGE, _EDIT = ("PSNR", "SSIM"), ("CLIP_dir", "CLIP_out")


def _row(columns: tuple[str, ...], *numbers: float) -> Mapping[str, float]:
    return dict(zip(columns, numbers, strict=True))


TABLE_1: Rows = {name: _row(_TASKS, *numbers) for name, numbers in {
    "X-Prompt with text prediction": (0.98, 0.73, 0.33, 0.85, 0.26, 0.28, 0.57),
    "X-Prompt": (0.97, 0.69, 0.28, 0.71, 0.14, 0.15, 0.49),
    "Emu3Gen": (0.98, 0.71, 0.34, 0.81, 0.17, 0.21, 0.54),
    "LlamaGen": (0.71, 0.34, 0.21, 0.58, 0.07, 0.04, 0.32),
    "DALL-E 3": (0.96, 0.87, 0.47, 0.83, 0.43, 0.45, 0.67),
    "SDXL": (0.98, 0.74, 0.39, 0.85, 0.15, 0.23, 0.55),
    "Show-o": (0.95, 0.52, 0.49, 0.82, 0.11, 0.28, 0.53),
    "DALL-E 2": (0.94, 0.66, 0.49, 0.77, 0.10, 0.19, 0.52),
    "SD-2.1": (0.98, 0.51, 0.44, 0.85, 0.07, 0.17, 0.50),
    "SD-1.5": (0.97, 0.38, 0.35, 0.76, 0.04, 0.06, 0.43),
    "LDM": (0.92, 0.29, 0.23, 0.58, 0.02, 0.05, 0.37),
}.items()} | {"Chameleon": {"overall": 0.39}}  # fmt: skip
"""GenEval."""

_TABLE_2: Mapping[str, Rows] = {
    "derain": {
        "X-Prompt": _row(_IMAGE, 25.53, 0.843), "InstructIR": _row(_IMAGE, 36.84, 0.937), "AirNet": _row(_IMAGE, 32.98, 0.951),
        "Painter": _row(_IMAGE, 29.87, 0.882), "InstructDiffusion": _row(_IMAGE, 19.82, 0.741),
        "Lumina-mGPT": _row(_IMAGE, 16.61, 0.365), "OmniGen": _row(_IMAGE, 12.02, 0.233),
    },
    "low_light": {
        "X-Prompt": _row(_IMAGE, 19.71, 0.810), "InstructIR": _row(_IMAGE, 23.00, 0.836), "Painter": _row(_IMAGE, 22.40, 0.872),
        "AirNet": _row(_IMAGE, 18.18, 0.735), "OmniGen": _row(_IMAGE, 13.38, 0.392),
    },
    "deblur": {
        "X-Prompt": _row(_IMAGE, 21.04, 0.761), "InstructIR": _row(_IMAGE, 29.40, 0.886), "AirNet": _row(_IMAGE, 24.35, 0.781),
        "InstructDiffusion": {"PSNR": 23.58}, "Lumina-mGPT": _row(_IMAGE, 17.59, 0.536), "OmniGen": _row(_IMAGE, 13.39, 0.321),
    },
    "depth": {
        "X-Prompt": {"RMSE": 0.277}, "DepthAnything": {"RMSE": 0.206}, "Marigold": {"RMSE": 0.224}, "Painter": {"RMSE": 0.288},
        "InstructCV": {"RMSE": 0.297}, "Unified-IO": {"RMSE": 0.387}, "OmniGen": {"RMSE": 0.480},
    },
    "segmentation": {
        "X-Prompt": {"mIoU": 31.21}, "Mask DINO": {"mIoU": 60.80}, "Mask2Former": {"mIoU": 56.10}, "Painter": {"mIoU": 49.90},
        "InstructCV": {"mIoU": 47.23}, "Unified-IO": {"mIoU": 25.71}, "Lumina-mGPT": {"mIoU": 20.87},
    },
    "normals": {"X-Prompt": {"angle": 19.17}, "Bae et al.": {"angle": 14.90}, "Lumina-mGPT": {"angle": 22.10}},
    "normals_nyud": {"X-Prompt": {"angle": 19.17}, "InvPT": {"angle": 19.04}, "Lumina-mGPT": {"angle": 22.10}},
}  # fmt: skip
"""Suite -> rows: dense prediction and restoration. Bae et al. and InvPT stand in one column there, of two ground truths."""

RAIE, PLAIN = "X-Prompt + RAIE", "X-Prompt"
"""Rows of Table 3: examples retrieved, or not."""
_TABLE_3: Rows = {name: _row((*_EDIT, "CLIP_img", "DINO"), *numbers) for name, numbers in {
    RAIE: (0.097, 0.279, 0.862, 0.792),
    PLAIN: (0.083, 0.271, 0.857, 0.781),
    "X-Prompt without text prediction": (0.067, 0.263, 0.823, 0.785),
    "Lumina-mGPT": (0.025, 0.253, 0.810, 0.751),
    "MagicBrush's own model": (0.106, 0.278, 0.933, 0.899),
    "UltraEdit": (0.093, 0.274, 0.899, 0.848),
    "InstructPix2Pix": (0.081, 0.276, 0.852, 0.750),
}.items()}  # fmt: skip
"""MagicBrush."""

TABLE_4: Mapping[str, Rows] = {
    suite: {row: _row(columns, *numbers) for row, numbers in zip((NO_EXAMPLE, CAUSAL, XP, FULL, OMNIGEN), rows, strict=True) if numbers}
    for suite, columns, rows in (
        ("low_light", _IMAGE, ((9.140, 0.253), (17.00, 0.633), (17.22, 0.653), (19.71, 0.770), (8.923, 0.243))),
        ("derain_heavy", _IMAGE, ((7.924, 0.212), (18.10, 0.509), (18.91, 0.512), (21.55, 0.633), (13.14, 0.411))),
        ("depth", ("RMSE",), ((0.745,), (0.390,), (0.352,), (0.279,), ())),
        ("object_addition", _EDIT, ((-0.031, 0.252), (0.092, 0.262), (0.092, 0.274), (0.112, 0.283), (0.054, 0.243))),
        ("object_removal", _EDIT, ((0.023, 0.244), (0.069, 0.246), (0.073, 0.251), (0.103, 0.265), (0.031, 0.233))),
    )
}
"""Suite -> rows: novel tasks."""

TABLE_5: Rows = {name: _row(_IMAGE, *numbers) for name, numbers in {
    "Chameleon's tokenizer at 512": (26.34, 0.805), "Chameleon's tokenizer at 1024": (29.77, 0.906),
    "SDXL's VAE at 512": (27.51, 0.810), "SDXL's VAE at 1024": (32.13, 0.922), "Emu3's tokenizer at 512": (27.78, 0.833),
}.items()}  # fmt: skip
"""Reconstruction of Rain100L."""

CLASHES: Mapping[str, str] = {
    "Table 1": "the line of differences prints +0.04 for color_attr, where the rows above differ by 0.13; the tasks of LDM average "
               "to 0.35, not 0.37",
    "Table 4": "the model trained on all tasks has 19.71 dB on LOL in both tables, but SSIM 0.810 in Table 2 and 0.770 in Table 4; "
               "on depth 0.277 m and 0.279 m",
}  # fmt: skip
"""Table -> where it contradicts itself or another."""


def rows_of(suite: str, *, retrieved: bool = False) -> Rows:
    """What may stand beside a suite's scores; row names say their table.

    Args:
      retrieved: of MagicBrush: examples are, so that row comes first.
    """
    if suite == "magicbrush":
        order = [RAIE, PLAIN] if retrieved else [PLAIN, RAIE]
        return {f"{name}, Table 3": _TABLE_3[name] for name in dict.fromkeys([*order, *_TABLE_3])}
    rows = {f"{name}, Table 2": columns for name, columns in _TABLE_2.get(suite, {}).items()}
    if suite == "derain":  # the ceiling on the same images
        rows["Chameleon's tokenizer alone, Table 5"] = TABLE_5["Chameleon's tokenizer at 512"]
    return rows | {f"{name}, Table 4": columns for name, columns in TABLE_4.get(suite, {}).items()}
