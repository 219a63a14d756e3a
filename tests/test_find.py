"""Tests of listing: which files are found, and what is said of the others."""

import glob
import os
import shutil
import time
from pathlib import Path

import pytest
from PIL import Image

from common.console import InputError
from images import find
from images.find import Search, find_files, kind_of
from tests.shared import smooth_picture, touch


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

    monkeypatch.setattr(find, "SEARCH_NOTE", 0.1)
    monkeypatch.setattr(glob, "iglob", slow)
    assert len(list(find_files([f"{tmp_path}/**"], Search()))) == 2
    assert f"still looking for {tmp_path}/**: 1 found so far" in capsys.readouterr().err
    monkeypatch.setattr(find, "SEARCH_NOTE", -1)
    assert len(list(find_files([tmp_path], Search()))) == 5
    assert f"still looking for images, now in {tmp_path}/d" in capsys.readouterr().err


# ---------------------------------------------------------------- what is found, and what is said


def test_content_tells_what_a_name_does_not(tmp_path):
    """Every format under a name of its own, without extension, and under a number, as archives export it."""
    pydicom = pytest.importorskip("pydicom")
    picture = Image.fromarray(smooth_picture(40, 40))
    kinds = ("JPEG", "PNG", "TIFF", "BMP", "WEBP")
    for kind in kinds:
        for name in (f"{kind}_0001", f"1.2.840.{len(kind)}.{kind[0]}.77", f"{kind}.img"):
            picture.save(tmp_path / name, kind)
    (tmp_path / "BIG").write_bytes(b"MM\0*" + bytes(60))
    meta = pydicom.dataset.FileMetaDataset()
    meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    meta.MediaStorageSOPClassUID = meta.MediaStorageSOPInstanceUID = pydicom.uid.generate_uid()
    file = pydicom.dataset.FileDataset(
        "x", {}, file_meta=meta, preamble=b"II*\0" * 32
    )  # TIFF and DICOM at once
    file.save_as(tmp_path / "IM_0001", enforce_file_format=True)
    texts = {
        "a.txt": b"BM and so on, a text of some length",
        "b": b"BM",
        "c": b"",
        "d.gif": b"GIF89a",
        "e.CSV": b"x",
    }
    for name, raw in texts.items():
        (tmp_path / name).write_bytes(raw)
    search = Search()
    found = [Path(path).name for path in search.walk(tmp_path)]
    assert len(found) == 17 and not set(found) & texts.keys()
    assert search.by_content == {"without extension": 12, ".img": 5}
    assert search.passed == {".txt": 1, "without extension": 2, ".gif": 1, ".csv": 1}
    assert kind_of((tmp_path / "IM_0001").read_bytes()[:200]) == "DICOM"
    assert [kind_of((tmp_path / f"{kind}.img").read_bytes()[:200]) for kind in kinds] == list(kinds)


def test_listing_reads_no_more_than_the_head(tmp_path, monkeypatch):
    """Of files with an image's name nothing, of others 200 bytes."""
    touch(tmp_path, *(f"{i}{end}" for i, end in enumerate(find.EXTENSIONS)))
    (tmp_path / "long.bin").write_bytes(bytes(100_000))
    opened, real = [], open

    class Counted:
        def __init__(self, path, mode):
            self.file = real(path, mode)

        def __enter__(self):
            return self

        def __exit__(self, *error):
            self.file.close()

        def read(self, count):
            opened.append(count)
            return self.file.read(count)

    monkeypatch.setattr("builtins.open", Counted)
    assert len(list(Search().walk(tmp_path))) == len(find.EXTENSIONS)
    monkeypatch.undo()
    assert opened == [200]


DEBRIS = (
    *(
        ".DS_Store",
        "._a.jpg",
        "Thumbs.db",
        "desktop.ini",
        "@eaDir/a.jpg/SYNOPHOTO_THUMB_M.jpg",
        "#recycle/a.jpg",
    ),
    *("__MACOSX/._b.jpg", ".Spotlight-V100/a.png", "$RECYCLE.BIN/$R1.jpg", "b.jpg:Zone.Identifier"),
    *(".Trashes/1.jpg", "System Volume Information/a.jpg", ".AppleDouble/a.jpg", ".@__thumb/a.jpg"),
)


def test_debris_of_systems_is_no_news(tmp_path, capsys):
    touch(tmp_path, "a.jpg", "inner/b.jpg", *DEBRIS, *(f"inner/{name}" for name in DEBRIS))
    search = Search()
    assert [Path(path).name for path in search.walk(tmp_path)] == ["a.jpg", "b.jpg"]
    assert search.passed == {} and search.summary() == ""
    search.tell("x")
    assert capsys.readouterr().err == "" and find.subfolders(tmp_path) == ["inner"]


def test_everything_else_is_counted_by_reason(tmp_path, capsys):
    touch(tmp_path, "a.jpg", ".b.jpg", ".c/d.jpg", "masks/a.png", "e.heic", "f.heic", "README", "x/g.HEIC")
    (tmp_path / "gone").symlink_to("nowhere")
    (tmp_path / "gone.dcm").symlink_to("nowhere")  # found: reading it gives the reason
    search = Search()
    assert [Path(path).name for path in search.walk(tmp_path)] == ["a.jpg", "gone.dcm"]
    search.tell(tmp_path)
    search.tell(tmp_path)
    counts = "3 .heic, 1 broken links, 1 folders of masks, 1 hidden, 1 hidden folders, 1 without extension"
    assert capsys.readouterr().err == f"note: {tmp_path}: passed over: {counts}\n"  # once a command


def test_linked_folders_are_searched_once(tmp_path):
    """What lies on another disk is found; a circle, or a link to the folder above, is not followed."""
    touch(tmp_path / "disk", "a.png", "deep/b.png")
    touch(tmp_path / "set/sick", "c.png")
    touch(tmp_path / "set/well", "d.png")
    (tmp_path / "set/sick/more").symlink_to(tmp_path / "disk")
    (tmp_path / "set/sick/again").symlink_to(tmp_path / "disk/deep")
    (tmp_path / "disk/circle").symlink_to(tmp_path / "disk")
    (tmp_path / "set/sick/up").symlink_to(tmp_path / "set")
    search = Search()
    found = sorted(os.path.realpath(path) for path in search.walk(tmp_path / "set/sick"))
    names = ("disk/a.png", "disk/deep/b.png", "set/sick/c.png")
    assert found == sorted(os.path.realpath(tmp_path / name) for name in names)
    assert search.passed["folders linked again"] == 3


def test_an_empty_folder_says_what_is_read_and_what_is_there(tmp_path):
    touch(tmp_path, "a.gif", "b.gif", "c.csv")
    search = Search()
    assert list(search.walk(tmp_path)) == []
    for word in ("JPEG, PNG, TIFF, BMP, WebP and DICOM", ".dcm .dicom", "there is: 2 .gif, 1 .csv"):
        assert word in search.nothing()
