"""The four physical forms of data on disk, each as a sequence of rows: folders, parquet, tars, manifests.

A row is a mapping from column to path, bytes, text or number, and always has a "key". Rows are made when they are asked for, by number,
in any order; the readers hold offsets in numpy arrays, no rows and no pixels, and travel to other processes by pickle.
"""

from xprompt_jax.data.readers.folders import Folders
from xprompt_jax.data.readers.manifest import Manifest
from xprompt_jax.data.readers.parquet import Parquet
from xprompt_jax.data.readers.strings import Strings
from xprompt_jax.data.readers.tar import Tar

__all__ = ["Folders", "Manifest", "Parquet", "Strings", "Tar"]
