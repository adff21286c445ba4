"""Tools are scripts, which import each other by their bare names; so do the tests of them."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2] / "tools"))
