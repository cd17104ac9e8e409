"""What a tool is to write is looked at before its work."""

import os

import pytest

from utils.system.errors import UserError
from utils.system.files import check_free, check_new_file


def test_what_is_free(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    for folder in (None, "empty", "new", "new/deep"):
        check_free(folder)
    for file in (None, "new.json", "empty/new.json"):
        check_new_file(file)
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]


def test_what_is_not(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    for check, name, message in (
        (check_free, ".", "is in use"),
        (check_free, "file", "is a file"),
        (check_free, "file/in/it", "cannot write to .*file"),
        (check_new_file, "file", "exists already"),
        (check_new_file, "gone/file", "there is no folder .*gone"),
        (check_new_file, "file/in", "there is no folder .*file"),
    ):
        with pytest.raises(UserError, match=message):
            check(name)
    monkeypatch.setattr(os, "access", lambda *_: False)  # as for everyone but root
    for check in (check_free, check_new_file):
        with pytest.raises(UserError, match=r"new: cannot write to /.*; mend its rights"):
            check("new")
