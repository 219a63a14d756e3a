"""Tests of what is asked of which images: class folders and tables, good and bad."""

import csv
import itertools
import os
import time

import numpy as np
import pytest
from PIL import Image

import data
from common.console import InputError
from layouts import tables
from layouts.folders import find_classes, find_root, list_images, read_folders
from layouts.nih import NIH_FINDINGS
from layouts.patients import read_patients
from layouts.tables import published_lists, read_table
from tests.shared import SHARED, cli, read_json, refused

NIH = "Image Index,Finding Labels,Follow-up #,Patient ID\n"


def touch(*paths):
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def nih_set(root, rows, images=None):
    """A folder with the images named in `rows` (or `images`) and a table of the rows, as bytes or text."""
    for name in images or [row.split(",")[0] for row in rows]:
        touch(root / "images" / name)
    path = root / "table.csv"
    path.write_text(NIH + "\n".join(rows))
    return path


ROWS = ["a.png,No Finding,0,1", "b.png,Mass|Edema,0,1", "c.png,Edema,1,2.0"]


def table(path, findings=("No Finding", "Edema", "Mass")):
    return read_table(path, path.parent, findings)


# ---------------------------------------------------------------- NIH


def test_nih_table(tmp_path, capsys):
    found = table(nih_set(tmp_path, ROWS))
    assert found.files == ["images/a.png", "images/b.png", "images/c.png"]
    assert found.targets.tolist() == [[1, 0, 0], [0, 1, 1], [0, 1, 0]] and found.targets.dtype == np.int8
    assert found.patients == ["1", "1", "2"] and found.known.all()  # a patient 2.0 is 2
    assert capsys.readouterr().err == ""
    assert tables.table_findings(tmp_path / "table.csv") == NIH_FINDINGS
    assert len(NIH_FINDINGS) == 15 and NIH_FINDINGS[0] == "No Finding"
    assert tables.table_findings(tmp_path / "table.csv", ["Mass", "Edema"]) == ("Mass", "Edema")
    with pytest.raises(InputError, match="has no Masss; it has No Finding, Atelectasis"):
        tables.table_findings(tmp_path / "table.csv", ["Masss"])


def test_nih_folders_of_the_zips(tmp_path):
    path = nih_set(tmp_path, ROWS, images=["a.png"])
    touch(tmp_path / "images_001/images/b.png", tmp_path / "images_002/images/c.png")
    found = table(path)
    assert found.files == ["images/a.png", "images_001/images/b.png", "images_002/images/c.png"]
    touch(tmp_path / "images_003/images/b.png")
    with pytest.raises(InputError, match="b.png is in .* twice: images_001/images/b.png and images_003"):
        table(path)


@pytest.mark.parametrize("nih", [True, False])
def test_linked_folders_of_a_table(tmp_path, nih):
    """Images on another disk, linked into the data folder, are found as those of class folders are."""
    touch(tmp_path / "disk/a.png")
    root = tmp_path / "set"
    (root / "images_001").mkdir(parents=True)
    (root / "images_001/images").symlink_to(tmp_path / "disk")
    (tmp_path / "disk/circle").symlink_to(root)
    row = "a.png,Mass,0,1" if nih else "images_001/images/a.png,1"
    (root / "t.csv").write_text((NIH if nih else "path,Mass\n") + row)
    assert read_table(root / "t.csv", root, ("Mass",)).files == ["images_001/images/a.png"]


def test_what_is_left_out_is_said(tmp_path, capsys):
    path = nih_set(tmp_path, [*ROWS, ROWS[0], "gone.png,Mass,0,9"])
    (tmp_path / "images/gone.png").unlink()
    touch(tmp_path / "images/extra.png", tmp_path / "images/._a.png", tmp_path / "images/notes.txt")
    assert len(table(path).files) == 3
    err = capsys.readouterr().err
    assert "1 rows repeat an earlier row" in err and "1 of 4 images listed are not under" in err
    assert "1 images under" in err and "are not listed" in err
    for name in ("a.png", "b.png", "c.png"):
        (tmp_path / "images" / name).unlink()
    with pytest.raises(InputError, match="none of the 4 images listed .* check --data-dir"):
        table(path)


@pytest.mark.parametrize("change", ["latin-1", "windows", "bom", "spaces", "trailing comma"])
def test_tables_as_programs_write_them(tmp_path, capsys, change):
    nih_set(tmp_path, ROWS)
    text = NIH + "\n".join(ROWS) + "\n"
    if change == "latin-1":
        touch(tmp_path / "images/d.png")
        raw = (text + "d.png,Mass,0,Müller\n").encode("latin-1")
    elif change == "windows":
        raw = text.replace("\n", "\r\n").encode()
    elif change == "bom":
        raw = text.encode("utf-8-sig")
    elif change == "spaces":
        raw = text.replace(",", " , ").encode()
    else:
        raw = text.replace("\n", ",\n").encode()
    (tmp_path / "table.csv").write_bytes(raw)
    found = table(tmp_path / "table.csv")
    assert found.targets[:3].tolist() == [[1, 0, 0], [0, 1, 1], [0, 1, 0]]
    assert found.patients[:3] == ["1", "1", "2"]
    if change == "latin-1":
        assert found.patients[3] == "Müller" and "read as cp1252" in capsys.readouterr().err


@pytest.mark.parametrize(
    "rows, message",
    [
        ([*ROWS, "a.png,Mass,0,1"], "a.png stands in row 2 and in row 5 with different findings"),
        ([*ROWS, "a.png,No Finding,0,7"], "a.png stands in row 2 and in row 5"),
        (["a.png,,0,1"], "row 2: Finding Labels is empty"),
        (["a.png, | ,0,1"], "row 2: Finding Labels is empty"),
        (["a.png,Mass|No Finding,0,1"], "row 2: Finding Labels is Mass.No Finding, which contradicts itself"),
        ([*ROWS, "", ",,,", "a.png,,0,1"], "row 7: Finding Labels is empty"),
        (["a.png,Mass,0,1,surplus"], "row 2: 5 values for 4 columns"),
        ([], "has no rows"),
        (["../table.png,Mass,0,1", "/etc/hosts,Mass,0,1"], "none of the 2 images"),
    ],
)
def test_bad_nih_rows(tmp_path, rows, message):
    with pytest.raises(InputError, match=message):
        table(nih_set(tmp_path, rows, images=["a.png"]))


def test_published_lists(tmp_path, capsys):
    path = nih_set(tmp_path, ROWS)
    (tmp_path / "train_val_list.txt").write_text("a.png\r\n")
    with pytest.raises(InputError, match="test_list.txt: the published split needs both"):
        published_lists(table(path), tmp_path)
    (tmp_path / "test_list.txt").write_text("b.png\n")
    found = published_lists(table(path), tmp_path)
    assert found.files == ["images/a.png", "images/b.png"] and found.side.tolist() == ["train", "test"]
    assert "1 images are in neither train_val_list.txt nor test_list.txt" in capsys.readouterr().err
    _, reading = tables.read_set(path, tmp_path, tables.table_findings(path, ()))
    assert reading.flow[-1] == ["published", 2] and reading.flow[-2][1] == 3
    (tmp_path / "test_list.txt").write_text("b.png\na.png\n")
    with pytest.raises(InputError, match="a.png is in .*train_val_list.txt and in .*test_list.txt"):
        published_lists(table(path), tmp_path)


def test_lists_with_spaces_in_names_and_without_images(tmp_path):
    path = nih_set(tmp_path, ["a b.png,Mass,0,1", "b.png,Edema,0,2"])
    (tmp_path / "train_val_list.txt").write_text("a b.png\n\n")
    (tmp_path / "test_list.txt").write_text("b.png\n")
    assert published_lists(table(path), tmp_path).side.tolist() == ["train", "test"]
    (tmp_path / "train_val_list.txt").write_text("gone.png\n")
    with pytest.raises(InputError, match="none of the images is in .*train_val_list.txt"):
        published_lists(table(path), tmp_path)


# ---------------------------------------------------------------- the plain layout


def plain_set(root, text):
    touch(root / "x/a.png", root / "x/b.png", root / "c.jpg")
    (root / "t.csv").write_text(text)
    return root / "t.csv"


def test_plain_table(tmp_path):
    path = plain_set(
        tmp_path, "Path,Patient,Edema,Mass\nx\\a.png,7,1,0\n./x/b.png,,-1,\nc.jpg,9.0,1.0,-1.0\n"
    )
    found = read_table(path, tmp_path, tables.table_findings(path))
    assert found.files == ["x/a.png", "x/b.png", "c.jpg"]
    assert found.targets.tolist() == [[1, 0], [-1, -1], [1, -1]]
    assert found.patients == ["7", "x/b.png", "9"] and found.known.tolist() == [True, False, True]
    assert found.unknown == 1
    no_patients = plain_set(tmp_path, "path,Edema\nx/a.png,1\n")
    assert read_table(no_patients, tmp_path, ("Edema",)).unknown == 1


@pytest.mark.parametrize(
    "text, message",
    [
        ("path,patient,weight\nx/a.png,1,57\n", "row 2: weight is '57', not 1, 0, -1 or empty.*--findings"),
        ("path,patient\nx/a.png,1\n", "no column of a finding"),
        ("file,Edema\nx/a.png,1\n", "needs the columns Image Index and Finding Labels, or path"),
        ("path,Edema,Edema\nx/a.png,1,0\n", "names the column Edema twice"),
        ("path,Edema\nx/a.png,1\nx/a.png,0\n", "row 2 and in row 3"),
        ("", "has no rows"),
        ('path,Edema\n"x/a.png,1\n', "row 2: a quotation mark opens there"),
    ],
)
def test_bad_plain_tables(tmp_path, text, message):
    path = plain_set(tmp_path, text)
    with pytest.raises(InputError, match=message):
        read_table(path, tmp_path, tables.table_findings(path))


def test_lines_end_at_line_ends_only(tmp_path):
    """Letters that str.splitlines takes for line ends too, in a column of remarks, once lost the labels after
    them; rows are counted as a spreadsheet counts them, blank ones included."""
    head, row = "path,patient,remark,Edema\r\n", "x/a.png,1,Fl\xfcssig\x85 klar\x0b,1\r\n"
    path = plain_set(tmp_path, "")
    for text, encoding in ((head + row, "latin-1"), (head + row + "c.jpg,,\u2028,0\n,,,\n\n", "utf-8")):
        path.write_bytes(text.encode(encoding))
        assert read_table(path, tmp_path, ("Edema",)).targets[:1].tolist() == [[1]]
    (tmp_path / "old.csv").write_bytes((head + row).replace("\r\n", "\r").encode())
    assert read_table(tmp_path / "old.csv", tmp_path, ("Edema",)).targets.tolist() == [[1]]
    path.write_text(head + '\n,,,\nx/a.png,1,"two\nlines",1\nx/b.png,1,,7\n')
    with pytest.raises(InputError, match="row 5: Edema is '7'"):
        read_table(path, tmp_path, ("Edema",))


def test_paths_that_leave_the_data_folder_are_not_images(tmp_path, capsys):
    """Only what lies under the folder is looked up; a table cannot name any other file."""
    root = tmp_path / "set"
    path = plain_set(root, "")
    touch(tmp_path / "out.png", tmp_path / "images/a.png")
    names = ["../out.png", "x/../../out.png", str(tmp_path / "out.png"), "..\\..\\out.png", "c.jpg"]
    path.write_text("path,Edema\n" + "".join(f"{name},1\n" for name in names))
    assert read_table(path, root, ("Edema",)).files == ["c.jpg"]
    assert "4 of 5 images listed are not under" in capsys.readouterr().err
    rows = ["../images/a.png,Mass,0,1", "a.png,Mass,0,1", f"{tmp_path}/images/a.png,Mass,0,2"]
    with pytest.raises(InputError, match="none of the 3 images"):
        table(nih_set(root, rows, images=["b.png"]))


def test_nih_sample_against_a_plain_reading():
    """Every label and patient of real rows, read with csv.DictReader."""
    root = SHARED / "nih_sample"
    if not root.exists():
        pytest.skip("../shared is absent")
    found = read_table(root / "sample_labels.csv", root, NIH_FINDINGS)
    with open(root / "sample_labels.csv", newline="") as file:
        rows = {row["Image Index"]: row for row in csv.DictReader(file)}
    assert len(found.files) == len(list((root / "images").iterdir()))
    for name, labels, patient in zip(found.files, found.targets.tolist(), found.patients):
        row = rows[name.removeprefix("images/")]
        there = row["Finding Labels"].split("|")
        assert labels == [int(finding in there) for finding in NIH_FINDINGS]
        assert patient == row["Patient ID"] and sum(labels) == len(there)


def test_a_large_table_is_read_in_seconds(tmp_path):
    """Rows without end, of which three have images."""
    touch(tmp_path / "images/0.png", tmp_path / "images/1.png", tmp_path / "images/2.png")
    rows = (f"{i}.png,{'Mass|Edema' if i % 3 else 'No Finding'},0,{i // 5}\n" for i in range(50_000))
    (tmp_path / "t.csv").write_text(NIH + "".join(rows))
    started = time.process_time()
    found = table(tmp_path / "t.csv")
    assert found.targets.tolist() == [[1, 0, 0], [0, 1, 1], [0, 1, 1]]
    assert time.process_time() - started < 5


def test_images_of_a_table_have_any_name(tmp_path, capsys):
    """Found by the search of class folders: by content, in any format; the others are counted."""
    (tmp_path / "images").mkdir()
    picture = Image.fromarray(np.arange(400, dtype=np.uint8).reshape(20, 20))
    for name, kind in (("IM_1", "TIFF"), ("b.bmp", "BMP"), ("c.webp", "WEBP")):
        picture.save(tmp_path / "images" / name, kind)
    touch(tmp_path / "images/notes.txt", tmp_path / "images/Thumbs.db")
    rows = ["IM_1,Mass,0,1", "b.bmp,Edema,0,2", "c.webp,No Finding,0,3"]
    (tmp_path / "table.csv").write_text(NIH + "\n".join(rows))
    assert table(tmp_path / "table.csv").files == ["images/IM_1", "images/b.bmp", "images/c.webp"]
    said = "passed over: 1 .txt; recognised by content, not by name: 1 without extension"
    assert capsys.readouterr().err == f"note: {tmp_path}: {said}\n"


def test_patients_of_a_table(tmp_path):
    found = read_table(
        plain_set(tmp_path, "path,Edema\nx/a.png,1\nx/b.png,0\nc.jpg,0\n"), tmp_path, ("Edema",)
    )
    (tmp_path / "p.csv").write_text("path,patient\nx/a.png,1.0\nx/b.png,1\nother.png,3\n")
    named = read_patients(tmp_path / "p.csv", found)
    assert named.patients == ["1", "1", "c.jpg"] and named.known.tolist() == [True, True, False]
    # What stands for no patient is not one.
    (tmp_path / "p.csv").write_text("path,patient\nx/a.png,NA\nx/b.png,unknown\nc.jpg,Nan Wu\n")
    named = read_patients(tmp_path / "p.csv", found)
    assert named.patients == ["x/a.png", "x/b.png", "Nan Wu"] and named.known.tolist() == [False, False, True]
    for text, message in (
        ("path,patient\nx/a.png,1\nx/a.png,2\n", "row 3: x/a.png has two patients"),
        ("path,patient\n/abs/a.png,1\n", "lists none of the images; paths are relative .* x/a.png"),
        ("path,who\nx/a.png,1\n", "needs the columns path and patient, it has path, who"),
    ):
        (tmp_path / "p.csv").write_text(text)
        with pytest.raises(InputError, match=message):
            read_patients(tmp_path / "p.csv", found)


def test_patients_that_were_known_stay_known(tmp_path, capsys):
    """--patients adds to what names or a table tell, and takes people of the two for one rather than two."""
    rows = ["a,1", "b,1", "c,2", "d,2", "e,3", "f,", "g,", "h,4", "i,4", "j,4"]
    text = "path,patient,Edema\n" + "".join(f"{row.replace(',', '.png,')},1\n" for row in rows)
    (tmp_path / "t.csv").write_text(text)
    touch(*(tmp_path / f"{row[0]}.png" for row in rows))
    found = read_table(tmp_path / "t.csv", tmp_path, ("Edema",))
    # a and b stay those of the table; d is c's; g is e; h and i are two people, and either may be j.
    named = ["c.png,x", "g.png,3", "h.png,y", "i.png,z"]
    (tmp_path / "p.csv").write_text("path,patient\n" + "\n".join(named))
    capsys.readouterr()
    now = read_patients(tmp_path / "p.csv", found)
    assert now.patients == ["1", "1", "x", "x", "3", "f.png", "3", "y", "y", "y"]
    assert now.known.tolist() == [row[0] != "f" for row in rows]
    assert capsys.readouterr().err == (
        f"note: --patients {tmp_path / 'p.csv'}: 2 images that it does not list keep the patient of their "
        "name, header or table; 3 images that it does not list are taken for patients whom it names\n"
    )
    # Where every image of a patient is listed, the table alone decides.
    (tmp_path / "p.csv").write_text("path,patient\na.png,u\nb.png,v\nc.png,w\nd.png,w\ne.png,w\n")
    now = read_patients(tmp_path / "p.csv", found)
    assert now.patients == ["u", "v", "w", "w", "w", "f.png", "g.png", "4", "4", "4"]
    assert "divides or joins the images of 3 patients otherwise" in capsys.readouterr().err


def test_patients_of_file_names_stay_known_on_their_side(tmp_path):
    """Of class folders, equal names of train and test are of two people, unless the table names them."""
    files = [f"{side}/NORMAL/IM-0001-0001.png" for side in ("train", "test")]
    files += [f"{side}/PNEUMONIA/person1_{k}.png" for side in ("train", "test") for k in range(2)]
    files += ["train/NORMAL/x.png", "train/NORMAL/IM-0002-0001.png"]
    touch(*(tmp_path / file for file in files))
    (tmp_path / "p.csv").write_text("path,patient\ntrain/NORMAL/x.png,person1\n")
    config = data.DataConfig(
        data_dir=str(tmp_path), patients=str(tmp_path / "p.csv"), cache_dir=str(tmp_path / "cache")
    )
    index = data.read_listing(config).index
    patients = dict(zip(index.files, index.patients))
    assert {patients[f"train/PNEUMONIA/person1_{k}.png"] for k in range(2)} == {"person1"}
    assert patients["train/NORMAL/x.png"] == "person1"
    assert patients["train/NORMAL/IM-0001-0001.png"] == "train/IM-0001"
    assert patients["test/NORMAL/IM-0001-0001.png"] == "test/IM-0001"
    assert patients["test/PNEUMONIA/person1_0.png"] == "test/person1" and index.known.all()


# ---------------------------------------------------------------- class folders


def test_classes_found(tmp_path):
    for name in ("TB", "No_Finding", "COVID-19", ".hidden"):
        touch(tmp_path / "train" / name / "x.png")
    assert find_classes(tmp_path) == ("No_Finding", "COVID-19", "TB")
    assert find_classes(tmp_path, "tb") == ("TB", "COVID-19", "No_Finding")
    with pytest.raises(InputError, match="--healthy x: .* holds COVID-19, No_Finding, TB"):
        find_classes(tmp_path, "x")
    touch(tmp_path / "train/Normal/x.png")
    with pytest.raises(InputError, match="more than one of the classes .* --healthy NAME"):
        find_classes(tmp_path)
    for names, message in (
        (("A",), "holds A: .*two classes"),
        (("A", "B"), "none of the classes A, B is called"),
    ):
        root = tmp_path / "-".join(names)
        for name in names:
            touch(root / "train" / name / "x.png")
        with pytest.raises(InputError, match=message):
            find_classes(root)
    touch(
        tmp_path / "case/train/normal/x.png",
        tmp_path / "case/train/Flu/x.png",
        tmp_path / "case/train/flu/x.png",
    )
    with pytest.raises(InputError, match="Flu and flu, which differ in case only"):
        find_classes(tmp_path / "case")


def test_folders_of_other_classes(tmp_path):
    for part, name in itertools.product(("train", "test"), ("NORMAL", "PNEUMONIA")):
        touch(tmp_path / part / name / "x.png")
    touch(tmp_path / "test/COVID/x.png")
    with pytest.raises(InputError, match="holds COVID, which is none of the classes NORMAL, PNEUMONIA"):
        list_images(tmp_path, "test")
    (tmp_path / "test/PNEUMONIA/x.png").unlink()
    (tmp_path / "test/PNEUMONIA").rmdir()
    with pytest.raises(InputError, match="test/PNEUMONIA does not exist.*there is COVID"):
        list_images(tmp_path, "test")


def test_the_set_is_found_in_what_was_unpacked(tmp_path):
    touch(tmp_path / "Lung Disease/train/Normal/x.png")
    assert find_root(tmp_path) == tmp_path / "Lung Disease"
    touch(tmp_path / "Other/train/Normal/x.png")
    with pytest.raises(InputError, match="holds several sets"):
        find_root(tmp_path)


def test_folders_below_a_class_belong_to_it(tmp_path, capsys):
    names = ["NORMAL/a.png", "NORMAL/z.bmp", "NORMAL/b/c.tif", "NORMAL/b/d/e.webp", "PNEUMONIA/images/x.dcm"]
    others = ["NORMAL/notes.txt", "NORMAL/q.gif", "NORMAL/b/.h.png", "PNEUMONIA/masks/x.png", "loose.png"]
    touch(*(tmp_path / "train" / name for name in (*names, *others)))
    touch(
        tmp_path / "train/NORMAL/@eaDir/a.png", tmp_path / "train/@eaDir/a.png", tmp_path / "train/.DS_Store"
    )
    index = list_images(tmp_path, "train")
    assert index.files == [f"train/{name}" for name in names] and index.targets.tolist() == [0, 0, 0, 0, 1]
    counts = "1 .gif, 1 .txt, 1 files beside the class folders, 1 folders of masks, 1 hidden"
    assert capsys.readouterr().err == f"note: {tmp_path}/train: passed over: {counts}\n"


def test_folders_of_masks_are_neither_images_nor_classes(tmp_path, capsys):
    kinds = ("infection masks", "lung masks", "leftMask", "ground-truth", "Segmentations")
    names = [f"train/{name}/images/x.png" for name in ("NORMAL", "COVID-19")]
    touch(
        *(tmp_path / n for n in (*names, *(f"train/COVID-19/{k}/x.png" for k in kinds), "train/masks/x.png"))
    )
    assert find_classes(tmp_path) == ("NORMAL", "COVID-19")
    assert "folders of masks are no classes: masks" in capsys.readouterr().err
    assert list_images(tmp_path, "train", ("NORMAL", "COVID-19")).files == names
    assert "5 folders of masks" in capsys.readouterr().err


def test_a_class_without_a_readable_image_is_refused(tmp_path):
    draw(tmp_path / "set/train/NORMAL", 20, np.random.default_rng(0))
    touch(*(tmp_path / f"set/train/SICK/{i}.png" for i in range(20)))
    argv = ("--data-dir", "set", "--img-size", 32, "--skip-bad")
    for script in ("train_linear", "train_scratch"):
        refused(cli(script, *argv, cwd=tmp_path), "no training image is left of SICK")


def test_numbers_within_case_folders_are_no_patients(tmp_path):
    """Viewers number the images of every case from IM-0001 on; Kermany's own names lie in the class folder,
    and person1 or NORMAL2-IM-0001 is one child wherever it lies."""
    names = [f"NORMAL/case{k}/IM-0001-000{i}.jpg" for k in (1, 2) for i in (1, 2)]
    names += ["NORMAL/a/NORMAL2-IM-0007-0001.jpeg", "NORMAL/b/NORMAL2-IM-0007-0002.jpeg"]
    names += ["PNEUMONIA/IM-0115-0001.jpeg", "PNEUMONIA/IM-0115-0002.jpeg"]
    names += ["PNEUMONIA/bacteria/person1_bacteria_1.jpeg", "PNEUMONIA/virus/person1_virus_2.jpeg"]
    touch(*(tmp_path / "train" / name for name in names))
    index = list_images(tmp_path, "train")
    found = {file.removeprefix("train/"): who for file, who in zip(index.files, index.patients)}
    assert [found[name] for name in names[:4]] == [f"train/{name}" for name in names[:4]]
    own = ["NORMAL2-IM-0007"] * 2 + ["IM-0115"] * 2 + ["person1"] * 2
    assert [found[name] for name in names[4:]] == own
    assert index.known.sum() == 6


def test_flat_folders_are_listed_as_ever():
    """The order decides the split."""
    root = SHARED / "chest_xray"
    if not root.exists():
        pytest.skip("../shared is absent")
    index = list_images(root, "test")
    plain = [f"test/{c}/{p}" for c in ("NORMAL", "PNEUMONIA") for p in sorted(os.listdir(root / "test" / c))]
    assert index.files == plain and len(plain) == 624 and index.targets.tolist() == [0] * 234 + [1] * 390


def test_an_empty_class_says_what_is_there(tmp_path):
    touch(
        tmp_path / "train/NORMAL/a.png", tmp_path / "train/PNEUMONIA/b.heic", tmp_path / "train/PNEUMONIA/c"
    )
    there = "PNEUMONIA holds no image: .*JPEG, PNG, TIFF.*.dcm.*there is: 1 .heic, 1 without extension"
    with pytest.raises(InputError, match=there):
        list_images(tmp_path, "train")


@pytest.mark.parametrize(
    "files, message",
    [
        (["Train/NORMAL/x.png", "Test/NORMAL/x.png"], "holds Train/: call it train"),
        (["a/training/NORMAL/x.png"], "a holds training/: call it train"),
        (["NORMAL/x.png", "PNEUMONIA/x.dcm"], r"folders of images .NORMAL, PNEUMONIA.*into .*/train/"),
        (["set/COVID/images/x.png", "set/Normal/images/x.png"], "set holds folders of images .COVID, Normal"),
        (["notes.txt"], "has no train/ folder"),
        ([], "There is no such folder"),
    ],
)
def test_what_is_nearly_a_set_is_named(tmp_path, files, message):
    touch(*(tmp_path / "set" / name for name in files))
    with pytest.raises(InputError, match=message):
        find_root(tmp_path / "set")


def test_the_train_folder_itself_is_named(tmp_path):
    touch(tmp_path / "train/NORMAL/x.png", tmp_path / "train/PNEUMONIA/x.png")
    with pytest.raises(InputError, match=f"itself holds .* give --data-dir {tmp_path}[.]"):
        find_root(tmp_path / "train")


def test_parts_of_other_names_are_said(tmp_path, capsys):
    touch(*(tmp_path / part / c / "x.png" for part in ("train", "Test", "valid") for c in ("A", "Normal")))
    read_folders(tmp_path, ("Normal", "A"), ["train"])
    assert capsys.readouterr().err == (
        f"note: {tmp_path}: passed over: Test, valid; parts are called train, val, test\n"
    )
    touch(tmp_path / "other/train/images/Normal/x.png", tmp_path / "other/train/images/A/x.png")
    with pytest.raises(InputError, match="holds images .in it images/A, images/Normal.: .*two classes"):
        find_classes(tmp_path / "other")


# ---------------------------------------------------------------- from the command line


def draw(folder, count, rng, side=32):
    folder.mkdir(parents=True)
    for i in range(count):
        Image.fromarray(rng.integers(0, 255, (side, side), dtype=np.uint8)).save(folder / f"x{i:02d}.png")


def test_bad_questions_end_in_one_line(tmp_path):
    rng = np.random.default_rng(0)
    for name in ("Normal", "Flu"):
        draw(tmp_path / "set/train" / name, 6, rng)
    argv = ["--data-dir", "set", "--img-size", 32]
    (tmp_path / "set/t.csv").write_text(
        "path,Edema\n" + "".join(f"train/Flu/x0{i}.png,{i % 2}\n" for i in range(6))
    )
    for more, words in (
        (["--findings", "Edema"], ["--findings", "--labels"]),
        (["--labels", "none.csv"], ["none.csv", "no such file"]),
        (["--labels", "t.csv", "--findings", "Mass"], ["has no Mass; it has Edema"]),
        (["--split", "published"], ["has no val/ folder"]),
        (["--fractions", 0.5, 0.2, 0.2], ["add up to 1", "0.5 + 0.2 + 0.2"]),
        (["--fractions", 0.5, 0.5, 0], ["--fractions", "not a number in (0, 1)"]),
        (["--healthy", "Well"], ["--healthy Well", "Flu, Normal"]),
        (["--patients", "none.csv"], ["none.csv"]),
    ):
        refused(cli("train_linear", *argv, *more, cwd=tmp_path), *words)
    balance = ["--labels", "t.csv", "--balance", "sampler", "--epochs", 1]
    refused(cli("train_scratch", *argv, *balance, cwd=tmp_path), "--balance sampler needs one class an image")
    refused(cli("train_linear", *argv, "--download", "no-slash", cwd=tmp_path), "OWNER/NAME")


def test_a_class_of_one_patient(tmp_path):
    rng = np.random.default_rng(0)
    draw(tmp_path / "set/train/Normal", 12, rng)
    (tmp_path / "set/train/Flu").mkdir()
    for i in range(12):
        image = Image.fromarray(rng.integers(0, 255, (32, 32), dtype=np.uint8))
        image.save(tmp_path / f"set/train/Flu/person7_virus_{i}.png")
    done = cli("train_linear", "--data-dir", "set", "--img-size", 32, cwd=tmp_path)
    refused(
        done, "no test part", "the class Flu, of 1 patients, would not be on both sides: use --split image"
    )


@pytest.mark.parametrize("label", ["", "1"])
def test_nothing_to_watch_is_said_before_training(tmp_path, label):
    draw(tmp_path / "set/images", 20, np.random.default_rng(0))
    rows = [f"images/x{i:02d}.png,{label}" for i in range(20)]
    (tmp_path / "set/t.csv").write_text("path,Edema\n" + "\n".join(rows))
    for script in ("train_linear", "train_scratch"):
        done = cli(script, "--data-dir", "set", "--labels", "t.csv", "--img-size", 32, cwd=tmp_path)
        refused(done, "in validation no finding is present", "--fractions")
    assert not (tmp_path / "outputs").exists()


def test_a_finding_nobody_has(tmp_path):
    """Is said, trains all the same, and gets no threshold."""
    rng = np.random.default_rng(0)
    draw(tmp_path / "set/images", 60, rng)
    rows = [f"images/x{i:02d}.png,{i // 2},{i % 2},0" for i in range(60)]
    (tmp_path / "set/t.csv").write_text("path,patient,Edema,Mass\n" + "\n".join(rows))
    argv = ["--data-dir", "set", "--labels", "t.csv", "--img-size", 32, "--fractions", 0.4, 0.3, 0.3]
    done = cli("train_linear", *argv, cwd=tmp_path)
    assert done.code == 0 and "no training image has Mass, so nothing can be learnt about it" in done.err
    assert cli("calibrate", "--bootstrap", 100, cwd=tmp_path).code == 0
    found = read_json(tmp_path, "outputs/linear/calibration.json")["findings"]
    assert (
        found["Mass"]["why_not"].startswith("0 validation images with it") and "threshold" in found["Edema"]
    )
    assert data.DataConfig.from_json(
        read_json(tmp_path, "outputs/linear/results.json")["data"]
    ).task.findings == (
        "Edema",
        "Mass",
    )
