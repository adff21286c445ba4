"""Files and folders that appear whole or not at all."""

import os
import tempfile
from pathlib import Path

import numpy as np
import pytest

from xprompt_jax.errors import UserError
from xprompt_jax.files import atomic_path, check_place, read_tensors, write_tensors


def test_temporary_names_are_one_processs_own(tmp_path):
    """Also where two processes have one number, as the first processes of two containers have."""
    with atomic_path(tmp_path / "a") as first, atomic_path(tmp_path / "a") as second:
        assert first != second
        first.write_text("1")
        second.write_text("2")
    assert [p.name for p in tmp_path.iterdir()] == ["a"] and (tmp_path / "a").read_text() == "1"


@pytest.mark.parametrize("name", ["x" * 255, "é" * 127, "x" + "日" * 84], ids=["ascii", "two", "three"])
def test_a_name_may_have_all_the_bytes_that_it_can(tmp_path, name):
    with atomic_path(tmp_path / name) as temporary:
        temporary.write_text("1")
    assert [p.name for p in tmp_path.iterdir()] == [name]


def test_a_folder_behind_a_link_is_replaced_where_it_lies(tmp_path):
    (tmp_path / "big").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "big")
    with atomic_path(tmp_path / "link") as temporary:
        temporary.mkdir()
        (temporary / "new").touch()
    assert (tmp_path / "link").is_symlink() and (tmp_path / "big" / "new").exists()


@pytest.mark.parametrize("name", [".", "/", "a/.."])
def test_what_has_no_name_is_refused(name):
    with pytest.raises(UserError, match="cannot be replaced by what is made"), atomic_path(name):
        pass


def test_only_what_is_ours_or_empty_is_replaced(tmp_path):
    check = lambda name: check_place(tmp_path / name, ("mark", "other"), "one of ours")
    for name in ("empty", "ours", "mine"):
        (tmp_path / name).mkdir()
    for name in ("ours/mark", "ours/other", "mine/mark"):
        (tmp_path / name).touch()
    (tmp_path / "file").touch()
    assert [check(name).name for name in ("new", "empty", "ours")] == ["new", "empty", "ours"]
    for name in ("mine", "file"):
        with pytest.raises(UserError, match=f"{name}: there already, and not one of ours; choose another place"):
            check(name)


def test_tensors_that_may_not_be_read_are_one_line():
    with tempfile.TemporaryDirectory() as place:
        Path(place).chmod(0o755)
        path = Path(place) / "task.xprompt"
        write_tensors(path, "kind", {"x": np.zeros(2)}, {})
        path.chmod(0)
        user = os.geteuid()
        if user == 0:
            os.seteuid(65534)  # root reads everything; nobody does not
        try:
            with pytest.raises(UserError, match=r"task\.xprompt: not a readable task \(Permission denied\); make it again with `x`"):
                read_tensors(path, "kind", "task", "x")
        finally:
            os.seteuid(user)
