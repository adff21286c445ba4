"""Hugging Face's `generate` drawing image codes under guidance, as the benchmarks run it beside ours."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from xprompt_jax.tokens import Vocabulary


def compile_options() -> dict[str, Any]:
    """Of `generate`: a static cache, and every decoding step compiled, on a CPU as transformers does it on a GPU."""
    from transformers import CompileConfig

    compiling = CompileConfig(mode=None, dynamic=False)
    compiling._compile_all_devices = True  # transformers' own switch
    return {"cache_implementation": "static", "compile_config": compiling}


def guided_draw(
    theirs: Any, bare: Sequence[np.ndarray], full: Sequence[np.ndarray], vocab: Vocabulary, count: int, scale: float, **options: Any
) -> Callable[[int], None]:
    """A function that draws the first n images, `count` codes each, at temperature 1.

    Guidance is two rows of one batch whose token one logits processor draws: transformers' own `guidance_scale` computes a second forward
    for every token, which would be slower.

    Args:
      theirs: `ChameleonForConditionalGeneration`, on any device.
      bare, full: int32 [tokens] prompts of every image, without what guidance moves away from and with it.
      options: of `generate`.
    """
    import torch
    from transformers import LogitsProcessor, LogitsProcessorList

    codes = slice(vocab.image_start, vocab.image_start + vocab.num_codes)

    class Guided(LogitsProcessor):
        """Guides, and draws one token for both rows of an image."""

        def __call__(self, input_ids, scores):
            without, with_it = scores[:, codes].float().chunk(2)
            guided = without + scale * (with_it - without)
            noise = -torch.log(-torch.log(torch.rand_like(guided).clamp(1e-20, 1 - 1e-7)))
            drawn = torch.argmax(guided + noise, -1) + vocab.image_start
            return torch.full_like(scores, -torch.inf).scatter_(1, drawn.repeat(2)[:, None], 0.0)

    def draw(batch: int) -> None:
        rows = [*bare[:batch], *full[:batch]]
        width = max(map(len, rows))
        ids = torch.tensor(np.stack([np.pad(r, (width - len(r), 0), constant_values=vocab.pad) for r in rows]), device=theirs.device)
        mask = torch.tensor(np.stack([np.arange(width) >= width - len(r) for r in rows]).astype(int), device=theirs.device)
        with torch.no_grad():
            out = theirs.generate(
                input_ids=ids, attention_mask=mask, do_sample=False, min_new_tokens=count, max_new_tokens=count,
                pad_token_id=vocab.pad, eos_token_id=None, logits_processor=LogitsProcessorList([Guided()]), **options,
            )  # fmt: skip
        assert out.shape[1] == width + count and ((out[:, width:] >= codes.start) & (out[:, width:] < codes.stop)).all()

    return draw
