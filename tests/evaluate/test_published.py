"""The paper's numbers: the tables agree with themselves where they should, and every one finds the metric that it may stand beside."""

import numpy as np
import pytest

from xprompt_jax.evaluate import published
from xprompt_jax.evaluate.geneval import TAGS
from xprompt_jax.evaluate.suites import SUITES, get_suite
from xprompt_jax.evaluate.table4 import ROWS, TASKS


def test_overall_is_the_mean_of_the_tasks():
    off = {}
    for name, row in published.TABLE_1.items():
        assert set(row) <= {*TAGS, "overall"}
        if len(row) > 1:
            off[name] = abs(np.mean([row[tag] for tag in TAGS]) - row["overall"])
    assert {name for name, gap in off.items() if gap > 0.0101} == {"LDM"} and "LDM" in published.CLASHES["Table 1"]
    paper = published.TABLE_1
    gap = paper["X-Prompt with text prediction"]["color_attr"] - paper["X-Prompt"]["color_attr"]
    assert gap == pytest.approx(0.13) and "0.13" in published.CLASHES["Table 1"]


@pytest.mark.parametrize("name", [*SUITES, "magicbrush", "object_addition", "object_removal"])
def test_every_column_is_that_of_a_metric(name):
    suite = get_suite(name)
    columns = set().union(*suite.published.values())
    assert columns <= {m.column for m in suite.metrics} and all("Table" in row for row in suite.published)


def test_rows_of_the_tables():
    assert tuple(published.TABLE_4) == TASKS
    assert all(row in ROWS or row == published.OMNIGEN for rows in published.TABLE_4.values() for row in rows)
    raie, plain = ("X-Prompt + RAIE, Table 3", "X-Prompt, Table 3")
    assert next(iter(published.rows_of("magicbrush"))) == plain and next(iter(published.rows_of("magicbrush", retrieved=True))) == raie
    gains = [published.rows_of("magicbrush")[raie][c] - published.rows_of("magicbrush")[plain][c] for c in ("CLIP_dir", "CLIP_out")]
    assert gains == pytest.approx([0.014, 0.008])
    assert published.TABLE_4["low_light"][published.FULL]["PSNR"] == published.rows_of("low_light")["X-Prompt, Table 2"]["PSNR"]
