"""Tests of listing: which files are found, and what is said of the others."""

import glob
import shutil
import time
from pathlib import Path

import pytest

import listing
from common import InputError
from listing import Search, find_files


def make_tree(root):
    """Files in a few folders; returns the images' names, sorted as a search gives them."""
    shown = ["b.png", "c.JPG", "x.dcm", "d/a.jpeg", "d/e/a.dicom"]
    for name in [*shown, "notes.txt", ".h.png", ".hidden/a.png", "__MACOSX/a.png", "d/._a.jpeg"]:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
    return shown


def test_find_files_searches_folders_and_globs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shown = make_tree(tmp_path)
    assert list(find_files(["."], Search())) == [f"./{name}" for name in shown]
    assert list(find_files(["x.dcm", "notes.txt", "d"], Search())) == [
        *("x.dcm", "notes.txt", "d/a.jpeg", "d/e/a.dicom")
    ]
    assert list(find_files(["?.png", "d/*.jpeg"], Search())) == ["b.png", "d/a.jpeg"]
    assert list(find_files(["d/**/a.*"], Search())) == ["d/a.jpeg", "d/e/a.dicom"]
    for recursive in ("d/**", "d/**/*"):  # each file once, though both it and its folder match
        assert sorted(find_files([recursive], Search())) == ["d/a.jpeg", "d/e/a.dicom"]
    with pytest.raises(InputError, match=r"no\*\.png is not a file"):
        find_files(["b.png", "no*.png"], Search())  # before anything is yielded


def test_find_files_is_lazy_and_names_folders_it_cannot_read(tmp_path, capsys):
    make_tree(tmp_path)
    (tmp_path / "broken.png").symlink_to("nowhere")  # yielded, so that its row says that it cannot be read
    found = find_files([str(tmp_path)], Search())
    assert next(found).endswith("b.png") and next(found).endswith("broken.png")
    shutil.rmtree(tmp_path / "d")
    assert [Path(name).name for name in found] == ["c.JPG", "x.dcm"]
    assert f"{tmp_path}/d cannot be read" in capsys.readouterr().err


def test_long_search_says_that_it_goes_on(tmp_path, monkeypatch, capsys):
    make_tree(tmp_path)

    def slow(pattern, recursive):
        yield str(tmp_path / "b.png")
        time.sleep(0.3)
        yield str(tmp_path / "c.JPG")

    monkeypatch.setattr(listing, "SEARCH_NOTE", 0.1)
    monkeypatch.setattr(glob, "iglob", slow)
    assert len(list(find_files([f"{tmp_path}/**"], Search()))) == 2
    assert f"still looking for {tmp_path}/**: 1 found so far" in capsys.readouterr().err
    monkeypatch.setattr(listing, "SEARCH_NOTE", -1)
    assert len(list(find_files([tmp_path], Search()))) == 5
    assert f"still looking for images, now in {tmp_path}/d" in capsys.readouterr().err
