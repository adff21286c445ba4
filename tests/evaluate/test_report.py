"""The page and the picture."""

import math
from html.parser import HTMLParser

import numpy as np
import PIL.Image
import pytest

from tools.screenshot_serve import CHROMIUM, Browser
from xprompt_jax.errors import UserError
from xprompt_jax.evaluate.report import Curve, ReportRow, Table, contact_sheet, write_report


def picture(seed, size=32):
    return np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)


ROWS = [
    ReportRow(
        f"task {i}", "do <script>alert(1)</script> & more",
        (("example input", picture(i)), ("example output", picture(i + 9)), ("input", picture(i + 18)), ("generated", picture(i + 27))),
        (("PSNR-RGB", "21.0 dB"),),
    )
    for i in range(3)
]  # fmt: skip


class Page(HTMLParser):
    """What the page holds."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.links = [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.links += [value for name, value in attributes if name in ("src", "href") and value]


def write(path, **changes):
    arguments = {
        "title": "A run", "lead": "What it is.", "facts": [("loss", "7 → 3")], "rows": ROWS,
        "curves": [Curve("training", [1, 2, 3], [7.0, math.nan, 3.0]), Curve("held-out", [3], [4.0])],
        "tables": [Table("Scores", ("what", "dB"), (("a", "1.5"), ("b", "2.5")))],
    }  # fmt: skip
    return write_report(path, **{**arguments, **changes})


def test_page_is_whole_and_self_contained(tmp_path):
    text = write(tmp_path / "index.html").read_text()
    page = Page(text)
    assert page.tags.count("img") == 12 and page.tags.count("polyline") == 2 and page.tags.count("table") == 1
    assert all(link.startswith("data:image/png;base64,") for link in page.links)
    assert page.tags.count("script") == 1 and "&lt;script&gt;alert(1)" in text
    assert "nan" not in text.lower().split("<svg")[1].split("</svg>")[0]


@pytest.mark.parametrize("curves", [[], [Curve("a", [], [])], [Curve("a", [0], [math.inf])], [Curve("a", [0], [0.0])]])
def test_odd_curves_do_not_break_the_page(tmp_path, curves):
    assert "</html>" in write(tmp_path / "index.html", curves=curves, rows=[], tables=[]).read_text()


def test_contact_sheet_holds_every_picture(tmp_path):
    contact_sheet(tmp_path / "sheet.png", ROWS, title="A run", scale=2)
    sheet = np.asarray(PIL.Image.open(tmp_path / "sheet.png"))
    enlarged = picture(0).repeat(2, axis=0).repeat(2, axis=1)
    assert any(np.array_equal(sheet[y : y + 64, x : x + 64], enlarged) for y in range(0, 80) for x in range(0, 40)), (
        "the first picture stands enlarged, unsmoothed, near the corner"
    )
    assert sheet.shape[0] > 3 * 64 and sheet.shape[1] > 4 * 64


def test_nothing_is_left_where_nothing_can_be_written(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot write"):
        write(tmp_path / "file" / "index.html")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")
def test_a_click_on_a_header_sorts_in_a_browser(tmp_path):
    body = (("a", "10.5", ""), ("b", "9.25", "x"), ("c", "", "y"), ("d", "-2", "z"))
    page = write(
        tmp_path / "index.html", rows=[], tables=[Table("t", ("what", "mean", "word"), body), Table("u", ("n",), (("2",), ("1",)))]
    )
    with Browser(700, 500) as browser:
        browser.open(page.as_uri())
        column = lambda i=0, table=0: browser.evaluate(
            f"[...document.querySelectorAll('table')[{table}].tBodies[0].rows].map(r => r.cells[{i}].textContent).join()"
        )
        click = lambda i: browser.evaluate(f"document.querySelectorAll('table')[0].querySelectorAll('th button')[{i}].click()")
        assert column() == "a,b,c,d"
        click(1)
        assert column() == "d,b,a,c"  # as numbers; what is empty stays last
        click(1)
        assert column() == "a,b,d,c"
        click(0)
        assert column() == "a,b,c,d" and column(0, 1) == "2,1"
        sorts = browser.evaluate("[...document.querySelectorAll('table')[0].querySelectorAll('th')].map(h => h.ariaSort).join()")
        assert sorts == "ascending,none,none"
