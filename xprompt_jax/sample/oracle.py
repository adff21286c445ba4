"""Arguments of `XPrompt.logits`: filled in where they are left out, and refused where the contract of prompt.py forbids them."""

from __future__ import annotations

import numpy as np

from xprompt_jax.config import ModelConfig
from xprompt_jax.errors import UserError
from xprompt_jax.prompt import Role


def check_slots(config: ModelConfig, ids, roles, groups, positions, segments) -> tuple[np.ndarray, ...]:
    """ids, roles, groups, positions and segments, all int32 [B, L]; see `XPrompt.logits` for what they are and what None stands for.

    Raises:
      UserError: shapes differ, a role or id is unknown, or a group has more XP tokens than the model.
    """
    ids = np.asarray(ids, np.int32)
    full = lambda value, default: np.asarray(default if value is None else value, np.int32)
    roles = full(roles, np.full_like(ids, Role.TD))
    groups = full(groups, np.zeros_like(ids))
    positions = full(positions, np.broadcast_to(np.arange(ids.shape[-1]), ids.shape))
    segments = full(segments, np.zeros_like(ids))
    if ids.ndim != 2 or not ids.size or any(a.shape != ids.shape for a in (roles, groups, positions, segments)):
        raise UserError("logits: ids, roles, groups, positions and segments must all be [B, L], with at least one token")
    if not np.isin(roles, [r.value for r in Role]).all():
        raise UserError(f"logits: roles must be values of Role, {[r.value for r in Role]}")
    table = (roles != Role.XP) & (roles != Role.PAD)
    if ((ids < 0) | (ids >= config.vocab_size))[table].any():
        raise UserError(f"logits: ids must be in 0..{config.vocab_size - 1}")
    for row, (role, group, segment) in enumerate(zip(roles, groups, segments, strict=True)):
        is_xp = role == Role.XP
        blocks, counts = np.unique(np.stack([segment[is_xp], group[is_xp]]), axis=1, return_counts=True)
        if blocks.size and counts.max() > config.num_xp_tokens:
            raise UserError(f"logits: row {row} has a group of {counts.max()} XP tokens, the model has {config.num_xp_tokens}")
    return np.where(table, ids, 0), roles, groups, positions, segments
