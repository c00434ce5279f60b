"""`--out` is tried before anything is computed, and the trial leaves nothing."""

from __future__ import annotations

import pytest

from camtrain import InputError
from camtrain.cli.folder import check_writable
from camtrain.cli.main import main


def test_a_folder_that_can_be_made_is_not_made(tmp_path):
    check_writable(tmp_path / "a" / "b")
    check_writable(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_what_is_there_stays(tmp_path):
    (tmp_path / "kept").mkdir()
    check_writable(tmp_path / "kept" / "new")
    assert [path.name for path in tmp_path.rglob("*")] == ["kept"]


@pytest.mark.parametrize("below", ["", "below"])
def test_a_file_is_no_folder(tmp_path, below):
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(InputError, match=r"--out expects a folder.*: choose another"):
        check_writable(file / below if below else file)


@pytest.mark.parametrize("words", [("evaluate", "--ckpt_path", "x.ckpt"), ("study", "make", "--ckpt_path", "x.ckpt")])
def test_commands_try_it_first(tmp_path, capsys, words):
    (tmp_path / "file").touch()
    assert main([*words, "--out", str(tmp_path / "file" / "below")]) == 2
    assert "--out expects a folder that can be written to" in capsys.readouterr().err
