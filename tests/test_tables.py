"""Tests of tables as people have them: separators, encodings, names of images, findings, contradictions."""

import csv
import itertools
import time

import numpy as np
import pytest
from PIL import Image

import data
from common.console import InputError
from common.task import Task
from layouts import chexpert, lookup, sheets, tables
from layouts.choices import Choices
from layouts.nih import NIH_FINDINGS, nih_names
from layouts.patients import read_patients
from layouts.tables import read_table
from monitor import read_log
from tests.shared import SHARED, cli, refused, touch
from training import other_hospitals

FILES = ("x/a.png", "x/b.png", "c.jpg")
LABELS = [[1, 0], [0, -1], [-1, 1]]
PLAIN = "path,patient,Edema,Mass\nx/a.png,1,1,0\nx/b.png,2,0,\nc.jpg,2,-1,1\n"


def put(root, content, name="t.csv", files=FILES):
    """A folder with empty images, and a table (text or bytes) in it."""
    root.mkdir(parents=True, exist_ok=True)
    touch(root, *files)
    path = root / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def read_plain_set(root, content, findings=("Edema", "Mass"), files=FILES):
    return read_table(put(root, content, files=files), root, findings)


# ---------------------------------------------------------------- separators and encodings


@pytest.mark.parametrize("separator", [",", ";", "\t"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-be", "utf-32"])
def test_separators_and_encodings(tmp_path, capsys, separator, encoding):
    """Every separator in every encoding with its mark says what the plain table says, umlauts too."""
    text = PLAIN.replace("2,-1", "Müller,-1").replace(",", separator).replace("\n", "\r\n")
    mark = "\ufeff" if encoding == "utf-16-be" else ""  # Python writes it for the others
    found = read_plain_set(tmp_path, (mark + text).encode(encoding))
    assert found.targets.tolist() == LABELS and found.patients == ["1", "2", "Müller"]
    assert found.files == list(FILES)
    word = {",": None, ";": "semicolons", "\t": "tabs"}[separator]
    err = capsys.readouterr().err
    assert (f"is separated by {word}" in err) if word else err == ""


@pytest.mark.parametrize("first", ["sep=;", "SEP=;", '"sep=;"', "sep=|"])
def test_the_separator_that_a_spreadsheet_names(tmp_path, first):
    separator = first.strip('"')[-1]
    text = f"{first}\r\n" + PLAIN.replace(",", separator).replace("\n", "\r\n")
    assert read_plain_set(tmp_path, text).targets.tolist() == LABELS
    bad = text.replace(f"-1{separator}1", f"7{separator}1")
    with pytest.raises(InputError, match="row 4: Edema is '7'"):  # rows as the spreadsheet counts them
        read_plain_set(tmp_path, bad)


def test_separators_inside_fields_and_names(tmp_path):
    """Quoted fields keep other separators; a header with more commas than semicolons is not misread."""
    text = 'remark, free, long; path;patient;"Edema";Mass\n"a; b, c";x/a.png;1;1;0\nfine;x/b.png;2;0;\n'
    found = read_plain_set(tmp_path, text)
    assert found.targets.tolist() == LABELS[:2] and found.patients == ["1", "2"]
    text = 'path,patient,"a;b;c;d;e",Edema,Mass\nx/a.png,1,,1,0\n'
    assert read_plain_set(tmp_path, text).targets.tolist() == LABELS[:1]


@pytest.mark.parametrize(
    "content, message",
    [
        (b"PK\x03\x04\x14\x00", "workbook of a spreadsheet program.*save it as CSV"),
        (PLAIN.encode("utf-16-le"), "zero bytes.*save it as UTF-8"),
        (b"\xff\xfep\x00a", "begins as UTF-16, but is damaged"),
        (PLAIN.replace(",", "|"), "it has path|patient|Edema|Mass.*commas, semicolons or tabs"),
        (PLAIN.replace("path", "file"), "or path; it has file, patient, Edema, Mass"),
        ("path;patient;Edema\nx/a.png,1,1\n", "row 2: 1 values for 3 columns, separated by semicolons"),
        (
            PLAIN.replace(",", ";").replace("2;0;", "2;0,5;"),
            "row 3: Edema is '0,5'.*decimal comma is not read",
        ),
        (PLAIN.replace(",", ";").replace("2;0;", "2,0;0;"), "row 3: the patient is '2,0': a decimal comma"),
        ("Image Index,Finding Labels,Patient ID,\nx/a.png,Mass, Edema,1\n", "row 2: 4 values for 3 columns"),
    ],
)
def test_files_that_are_no_such_table(tmp_path, content, message):
    with pytest.raises(InputError, match=message.replace("|", r"\|")):
        path = put(tmp_path, content)
        read_table(path, tmp_path, tables.table_findings(path, ())[:2])


def test_monitor_reads_what_the_others_read(tmp_path):
    text = "path;score;diagnosis\na.png;0.9;PNEUMONIA\nb.png;0.2;NORMAL\n"
    path = put(tmp_path, text.encode("utf-16"))
    words = (("normal", "0"), ("pneumonia", "1"))
    assert read_log(path, 0.5, words).called.tolist() == [True, False]
    with pytest.raises(InputError, match="row 2: score '0,9' is no probability"):
        read_log(put(tmp_path, text.replace("0.9", "0,9")), 0.5, words)


def test_monitor_counts_patients_of_other_folders(tmp_path):
    """Viewers number the images of every patient from IM-0001 on: a hundred patients, not one."""
    rows = [f"p{k:03d}/IM-0001-0001.jpg,{0.9 if k == 0 else 0.1},1" for k in range(100)]
    rows.append("p000/IM-0001-0002.jpg,0.1,1")
    log = read_log(put(tmp_path, "path,score,diagnosis\n" + "\n".join(rows)), 0.5, (["0"], ["1"]))
    assert len(log.sick) == 100 and log.called.sum() == 1 and log.left_out == 1


def test_monitor_by_study_and_patient(tmp_path):
    """Sick by any row of the study, or the patient, as in calibrate.py; by image the first row counts."""
    text = (
        "path,patient,study,score,diagnosis,time\n"
        "a,P1,s1,0.1,0,2026-11-01\nb,P1,s1,0.1,1,2026-11-01\nw,P9,s9,0.2,,\n"
        "c,P2,s2,0.8,0,2026-11-02\nd,P2,s3,0.8,1,2026-11-03\n"
    )
    path, words = put(tmp_path, text), (["0"], ["1"])
    for unit, sick in (("image", [0, 0]), ("study", [1, 0]), ("patient", [1, 1])):
        log = read_log(path, 0.5, words, unit=unit)
        assert log.sick.tolist() == sick, unit
        assert log.called.tolist() == [False, True] and log.waiting == 1 and log.left_out == 2
    with pytest.raises(InputError, match="row 3: time 2026-10-31 is before that of an earlier row"):
        read_log(put(tmp_path, text.replace("1,2026-11-01\nw", "1,2026-10-31\nw")), 0.5, words)


# ---------------------------------------------------------------- names of images


@pytest.mark.parametrize(
    "names",
    [
        ("x\\a.png", ".\\x\\b.png", "c.jpg"),
        ("{root}/x/a.png", "{root}/x/b.png", "{root}/c.jpg"),
        ("{relative}/x/a.png", "{relative}//x/b.png", "{relative}/c.jpg"),
        ("D:\\Data\\set\\x\\a.png", "D:\\Data\\set\\x\\b.png", "D:\\Data\\set\\c.jpg"),
        ("\\\\server\\share\\x\\a.png", "\\\\server\\share\\x\\b.png", "\\\\server\\share\\c.jpg"),
        ("/home/me/x/a.png", "/home/me/x/b.png", "/home/me/c.jpg"),
        ("old-set/x/a.png", "old-set/x/b.png", "old-set/c.jpg"),
        ("x/a", "x/b", "c"),
        ("a", "b", "c"),
        ("a.png", "b.png", "c.jpg"),
        ("X/A.PNG", "X/B.PNG", "C.JPG"),
    ],
)
def test_names_that_can_mean_one_image_only(tmp_path, monkeypatch, names):
    monkeypatch.chdir(tmp_path.parent)
    names = [name.format(root=tmp_path.resolve(), relative=tmp_path.name) for name in names]
    rows = [f"{name},{line.split(',', 1)[1]}" for name, line in zip(names, PLAIN.splitlines()[1:])]
    path = put(tmp_path, "\n".join([PLAIN.splitlines()[0], *rows]))
    root = tmp_path.name if names[0].startswith(tmp_path.name) else tmp_path
    found = read_table(path, root, ("Edema", "Mass"))
    assert found.files == list(FILES) and found.targets.tolist() == LABELS
    named = read_patients(path, found._replace(patients=list(FILES)), root)
    assert named.patients == ["1", "2", "2"] and named.known.all()


def test_numbers_with_dots_have_no_extension():
    """1.2.840.7 is another object than 1.2.840.7.5."""
    listed = lookup.Listed("t.csv", "set", {"i/1.2.840.7.5": "i/1.2.840.7.5"})
    assert listed.find("1.2.840.7", 2) is None and listed.find("1.2.840.7.5", 3) == "i/1.2.840.7.5"


def test_rows_that_end_early(tmp_path, capsys):
    """What they lack is empty, and counted; a file that ends within a row has been cut off."""
    text = "path,patient,Edema,Mass\na.png,1,1,0\nb.png,2,1\nc.png,3,0,1\nd.png,4"
    path = tmp_path / "t.csv"
    path.write_text(text + "\n")
    assert sheets.open_sheet(path).text("Mass") == ["0", "", "1", ""]
    assert "2 rows end before the last column" in capsys.readouterr().err
    path.write_text(text)
    with pytest.raises(InputError, match="row 5: 2 values for 4 columns"):
        sheets.open_sheet(path)


def test_accents_in_either_form_are_one_name():
    """As macOS writes a file name, and as a spreadsheet does."""
    files = {"x/Mu\u0308ller.png": "x/Mu\u0308ller.png"}
    assert lookup.Listed("t.csv", "set", files).find("x/M\u00fcller.png", 2) == "x/Mu\u0308ller.png"


def test_names_against_all_pairs():
    """Listed against its rule, tried on every pair of a name and a file: an end of the other, the last part
    alike with its extension and case, else without case, else without the extension."""
    files = ["a.png", "x/a.png", "y/x/a.png", "b.PNG", "x/b.jpg", "z/b", "x/B.png", "q/1.2.34.png", "w/A.png"]
    parts = ["", "x/", "y/x/", "v/x/", "/r/y/x/", "w/"]
    lasts = ["a.png", "A.png", "a", "b", "b.png", "B.PNG", "1.2.34", "1.2", "a.jpg"]

    def possible(name):
        *folders, last = name.split("/")
        near = []
        for file in files:
            *place, end = file.split("/")
            n = min(len(place), len(folders))
            if [f.lower() for f in folders[len(folders) - n :]] == [
                p.lower() for p in place[len(place) - n :]
            ]:
                near.append((file, end))
        for same in (
            lambda end: end == last,
            lambda end: end.lower() == last.lower(),
            lambda end: "." in end and end.rpartition(".")[0].lower() == last.lower(),
        ):
            if found := {file for file, end in near if same(end)}:
                return found
        return set()

    several = 0
    for start, last in itertools.product(parts, lasts):
        name = start + last
        listed = lookup.Listed("t.csv", "set", {file: file for file in files})
        expected = {name} if name in files else possible(name)
        if len(expected) > 1:
            several += 1
            with pytest.raises(InputError, match=r"row 5: .* could be .* or "):
                listed.find(name, 5)
        else:
            assert listed.find(name, 5) == (expected.pop() if expected else None), name
    assert several > 5


def test_many_names_of_a_set_that_is_half_there_are_looked_up_in_seconds():
    """CheXpert calls most of its images view1_frontal.jpg; each that is missing is looked for among them."""
    names = [f"train/patient{i:05d}/study1/view1_frontal.jpg" for i in range(40_000)]
    listed = lookup.Listed("t.csv", "set", {name: name for name in names[::2]})
    started = time.process_time()
    found = [listed.find(name, 2) for name in names]
    assert found[::2] == names[::2] and found[1::2] == [None] * 20_000
    assert time.process_time() - started < 20


def test_names_that_could_mean_several_images(tmp_path):
    files = ("train/a.png", "test/a.png", "train/b.png", "train/b.jpg")
    for name, message in (
        ("a.png", "row 2: a.png could be test/a.png or train/a.png: write the path relative to"),
        ("train/b", "row 2: train/b could be train/b.jpg or train/b.png"),
    ):
        with pytest.raises(InputError, match=message):
            read_plain_set(tmp_path, f"path,Edema\n{name},1\n", ("Edema",), files)
    text = "path,Edema\nfirst/train/a.png,1\nsecond/train/a.png,1\n"
    with pytest.raises(InputError, match="row 3: second/train/a.png and.*first/train/a.png could both be"):
        read_plain_set(tmp_path, text, ("Edema",), files)
    index = read_plain_set(tmp_path, "path,Edema\ntrain/a.png,1\ntest/a.png,0\n", ("Edema",), files)
    with pytest.raises(InputError, match="row 2: a.png could be test/a.png or train/a.png"):
        read_patients(put(tmp_path, "path,patient\na.png,1\n", "p.csv", files), index, tmp_path)


def test_errors_show_columns_and_names(tmp_path):
    with pytest.raises(InputError, match="It lists y/no.png; there is c.jpg; it has path, Edema"):
        read_plain_set(tmp_path, "path,Edema\ny/no.png,1\n", ("Edema",))
    with pytest.raises(InputError, match="It lists y/no.png; there is no image;"):
        read_plain_set(tmp_path / "empty", "path,Edema\ny/no.png,1\n", ("Edema",), files=())
    with pytest.raises(InputError, match="has no column Mass; it has path, Edema"):
        read_plain_set(tmp_path, "path,Edema\nx/a.png,1\n", ("Mass",))
    index = read_plain_set(tmp_path, PLAIN)
    with pytest.raises(InputError, match="such as x/a.png; it lists no.png; it has path, patient"):
        read_patients(put(tmp_path, "path;patient\nno.png;1\n", "p.csv"), index, tmp_path)


def test_guesses_are_counted(tmp_path, capsys):
    read_plain_set(tmp_path, PLAIN.replace("x/", "D:\\set\\x\\"))
    assert (
        "2 names are no paths in the data folder; D:/set/x/a.png is read as x/a.png"
        in capsys.readouterr().err
    )


# ---------------------------------------------------------------- NIH's Finding Labels

NIH_HEAD = "Image Index,Finding Labels,Patient ID\n"


def read_nih_set(root, *texts, findings=(), head=NIH_HEAD):
    """The table of images 0.png, 1.png, ... with these Finding Labels -> (findings, Index)."""
    rows = "".join(f'{i}.png,"{text}",{i}\n' for i, text in enumerate(texts))
    path = put(root, head + rows, files=[f"images/{i}.png" for i in range(len(texts))])
    findings = findings or tables.table_findings(path)
    return findings, read_table(path, root, findings)


@pytest.mark.parametrize(
    "text",
    [
        *("Cardiomegaly, Consolidation", "Cardiomegaly,Consolidation", "Mass;Nodule", "Mass / Nodule"),
        *("Mass\\Nodule", "Mass & Nodule", "Mass+Nodule", "Mass and Nodule", "Mass Nodule", "Mass - Nodule"),
        *("Mass\nNodule", "MassNodule", "mass_nodule", "Pleural_Thickening Mass", "Effusion|Mass,Nodule"),
        *("No Finding, Mass", "Left side, Apex", "Mass. Nodule", "Pleural Thickening Mass"),
    ],
)
def test_findings_joined_otherwise_are_never_negative(tmp_path, text):
    """Whatever joins them, and whichever findings are asked."""
    for findings in ((), ("No Finding", "Hernia")):
        with pytest.raises(InputError, match="row 3: Finding Labels has .* could be several findings"):
            read_nih_set(tmp_path, "No Finding", text, "Mass", findings=findings)


def test_the_case_with_commas(tmp_path):
    path = SHARED / "cases/nih_other_separator/commalabels.csv"
    if not path.exists():
        pytest.skip("../shared is absent")
    with pytest.raises(InputError, match="row 3: Finding Labels has 'Cardiomegaly, Consolidation'"):
        tables.table_findings(path)


def test_names_of_its_own_keep_working(tmp_path, capsys):
    """Unknown names without a separator are findings, and are said; other spellings are the known ones."""
    texts = ("No Finding", "Round|Lung Mass", "COVID-19", "Mass|Round", "Cardiac Enlargement")
    findings, index = read_nih_set(tmp_path, *texts)
    names = ("COVID-19", "Cardiac Enlargement", "Lung Mass", "Mass", "Round")
    assert findings == ("No Finding", *names)
    assert [[f for f, on in zip(findings, row) if on] for row in index.targets.tolist()] == [
        *(["No Finding"], ["Lung Mass", "Round"], ["COVID-19"], ["Mass", "Round"], ["Cardiac Enlargement"])
    ]
    err = capsys.readouterr().err
    assert "4 of its 6 findings are not NIH's: COVID-19, Cardiac Enlargement, Lung Mass, Round" in err
    findings, index = read_nih_set(tmp_path / "b", "no finding", "Pleural Thickening|effusion", "Effusion")
    assert findings == NIH_FINDINGS and "other spellings are read" in capsys.readouterr().err
    expected = [{"No Finding"}, {"Pleural_Thickening", "Effusion"}, {"Effusion"}]
    assert [{f for f, on in zip(findings, row) if on} for row in index.targets.tolist()] == expected
    for texts, message in (
        (("Round", "round"), "row 3: Finding Labels has 'round', and elsewhere 'Round'"),
        (("No Finding", "Normal"), "row 3: .*No Finding and elsewhere Normal, which mean the same"),
        (("No Finding|Mass",), "row 2: Finding Labels is No Finding.Mass, which contradicts itself"),
    ):
        with pytest.raises(InputError, match=message):
            read_nih_set(tmp_path / "c", *texts)
    read_nih_set(tmp_path / "d", "No Finding|Support Devices", "Mass")


def test_nih_in_other_words(tmp_path):
    """Columns in lower case, semicolons, absolute names without extension."""
    text = "image index;finding labels;patient id\n/nih/images/0;Mass|Hernia;7\nC:\\nih\\1.png;No Finding;8\n"
    path = put(tmp_path, text, files=("images_001/images/0.png", "images_002/images/1.png"))
    found = read_table(path, tmp_path, tables.table_findings(path))
    assert found.files == ["images_001/images/0.png", "images_002/images/1.png"]
    assert found.patients == ["7", "8"]
    assert [sum(row) for row in found.targets.tolist()] == [2, 1]


def test_the_full_nih_table_is_read_as_before():
    """All 112,120 rows against a plain reading, without images."""
    path = SHARED / "nih_labels/Data_Entry_2017.csv"
    if not path.exists():
        pytest.skip("../shared is absent")
    with open(path, newline="") as file:
        head, *rows = csv.reader(file)
    names = nih_names(sheets.open_sheet(path))
    assert len(rows) == 112_120 and names == {row[1]: frozenset(row[1].split("|")) for row in rows}


# ---------------------------------------------------------------- healthy and sick


@pytest.mark.parametrize("healthy", ["No Finding", "NORMAL", "no_findings", "Healthy"])
@pytest.mark.parametrize("asked", [("H", "Edema"), ("Edema",), ("H",), ("Edema", "Fracture"), ("H", "Odd")])
def test_a_row_that_says_healthy_and_sick(tmp_path, healthy, asked):
    """Whichever findings are asked: the diseases that are known, and those asked."""
    asked = tuple(healthy if name == "H" else name for name in asked)
    head = f"path,patient,Frontal,{healthy},Edema,Fracture,Odd,Support Devices,Age"
    good = f"{head}\nx/a.png,1,1,1,0,,0,1,1\nx/b.png,2,1,0,1,1,1,1,57\nc.jpg,3,1,1.0,-1,-1,0,1.0,1\n"
    assert len(read_plain_set(tmp_path, good, asked).files) == 3
    for number, cells in ((4, "Edema"), (5, "Fracture"), (6, "Odd")):
        values = ["c.jpg", "3", "1", "1.0", "0", "0", "0", "1", "1"]
        values[number] = "1.0"
        bad = "\n".join([*good.splitlines()[:3], ",".join(values)])
        if cells == "Odd" and "Odd" not in asked:  # it may be no finding
            assert len(read_plain_set(tmp_path, bad, asked).files) == 3
            continue
        with pytest.raises(InputError, match=f"row 4: {healthy} is 1 and {cells} is 1"):
            read_plain_set(tmp_path, bad, asked)


def test_two_healthy_columns_that_disagree(tmp_path):
    text = "path,No Finding,Normal,Edema\nx/a.png,1,1,0\nx/b.png,1,0,0\n"
    with pytest.raises(InputError, match="row 3: No Finding is 1 and Normal is 0"):
        read_plain_set(tmp_path, text, ("Edema",))


def test_chexpert_rows_are_read_as_a_plain_table(tmp_path):
    """400 real rows: no contradiction, "any finding" by hand, and one made by hand is found."""
    path = SHARED / "tables/chexpert_train_head.csv"
    if not path.exists():
        pytest.skip("../shared is absent")
    names = chexpert.FINDINGS
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    put(tmp_path, path.read_bytes(), files=[row["Path"] for row in rows])
    plain = Choices(layout="plain", views="all")
    found = read_table(tmp_path / "t.csv", tmp_path, names, plain)
    truth = Task(names, "sigmoid").truth(found.targets)
    both = 0
    for row, any_finding in zip(rows, truth[:, 0].tolist()):
        sick = any(row[name] == "1.0" for name in chexpert.FINDINGS[1:-1])
        well = row["No Finding"] == "1.0"
        both += well and row["Support Devices"] == "1.0"
        assert any_finding == (0 if well else 1 if sick else -1)
    assert both == 14
    lines = path.read_text().splitlines()
    assert lines[1].split(",")[5] == "1.0"
    lines[1] = ",".join([*lines[1].split(",")[:8], "1.0", *lines[1].split(",")[9:]])
    (tmp_path / "t.csv").write_text("\n".join(lines))
    with pytest.raises(InputError, match="row 2: No Finding is 1 and Lung Opacity is 1"):
        read_table(tmp_path / "t.csv", tmp_path, names[:2], plain)


def test_any_finding_never_contradicts_a_finding():
    """Over all rows of three findings, a device and a healthy column that the reader lets pass."""
    names = ("A", "No Finding", "B", "Normal", "Support Devices")
    values = np.array(list(itertools.product((-1, 0, 1), repeat=5)), dtype=np.int8)
    well = (values[:, [1, 3]] == 1).any(axis=1)
    against = (values[:, [0, 2]] == 1).any(axis=1) | (values[:, [1, 3]] == 0).any(axis=1)
    values = values[~(well & against)]
    any_finding = Task(names, "sigmoid").truth(values)[:, 0]
    sick = (values[:, [0, 2]] == 1).any(axis=1)
    assert not (any_finding[sick] == 0).any() and not (any_finding[values[:, 1] == 1] == 1).any()
    told = (values[:, 1] < 0) & ~sick
    assert (any_finding[told] == -1).all()  # a device, or a second healthy column, is no disease


# ---------------------------------------------------------------- from the command line


def test_a_table_of_a_spreadsheet_from_the_command_line(tmp_path):
    """UTF-16, `sep=;`, names of another computer without extension; then with a contradiction in a row."""
    rng, rows = np.random.default_rng(0), ["sep=;", "Path;Patient;No Finding;Edema"]
    (tmp_path / "set/img").mkdir(parents=True)
    for i in range(40):
        sick = i // 2 % 2
        picture = rng.integers(0, 120, (32, 32)) + 100 * sick
        Image.fromarray(picture.astype(np.uint8)).save(tmp_path / f"set/img/{i:02d}.png")
        rows.append(f"C:\\scans\\img\\{i:02d};{i // 2};{1 - sick};{sick}")
    argv = ("train_linear", "--data-dir", "set", "--labels", "t.csv", "--img-size", 32)
    (tmp_path / "set/t.csv").write_bytes("\r\n".join(rows).encode("utf-16"))
    done = cli(*argv, cwd=tmp_path)
    assert done.code == 0 and "is separated by semicolons" in done.err
    assert "40 names are no paths in the data folder; C:/scans/img/00 is read as img/00.png" in done.err
    rows[3] = rows[3][:-1] + "1"
    (tmp_path / "set/t.csv").write_bytes("\r\n".join(rows).encode("utf-16"))
    done = cli(*argv, "--overwrite", cwd=tmp_path)
    refused(done, "row 3: No Finding is 1 and Edema is 1", "contradiction")


def test_site_and_patients_go_through_the_same_reading(tmp_path):
    """--site --labels and its --patients: semicolons, foreign paths; a contradiction is refused there too."""
    for name in "abcd":
        (tmp_path / "site/k").mkdir(parents=True, exist_ok=True)
        noise = np.random.default_rng(ord(name)).integers(0, 255, (8, 8), dtype=np.uint8)
        Image.fromarray(noise).save(tmp_path / f"site/k/{name}.png")
    config = data.DataConfig(
        "x", 8, cache_dir=str(tmp_path / "cache"), labels="t.csv", classes=("Edema", "Mass")
    )
    text = "path;Edema;Normal\nE:\\k\\a;1;0\nE:\\k\\b;0;1\nE:\\k\\c;0;0\nE:\\k\\d;1;0\n"
    put(tmp_path / "site", text, files=())
    put(tmp_path / "site", "path\tpatient\n/z/k/a.png\t7\n/z/k/d.png\t7\n", "p.tsv", files=())
    site = other_hospitals.load_site(config, tmp_path / "site", "t.csv", tmp_path / "site/p.tsv")
    assert site.targets.tolist() == [[1, -1], [0, -1], [0, -1], [1, -1]]
    assert site.patients == ["7", "k/b.png", "k/c.png", "7"]
    put(tmp_path / "site", text.replace("b;0", "b;1"), files=())
    with pytest.raises(InputError, match="row 3: Normal is 1 and Edema is 1"):
        other_hospitals.load_site(config, tmp_path / "site", "t.csv")


def test_columns_that_differ_in_case_alone_are_told_apart(tmp_path):
    """A column is found in any case, but first as it is written."""
    put(tmp_path, "path,patient,Mass,mass,MASS\na.png,1,1,0,0\nb.png,2,0,1,0\n", files=["a.png", "b.png"])
    found = read_table(tmp_path / "t.csv", tmp_path, ("mass", "MASS", "Mass"))
    assert found.targets.tolist() == [[0, 0, 1], [1, 0, 0]]


def test_a_head_may_hold_marks_that_nobody_sees(tmp_path):
    put(
        tmp_path,
        "\ufeff\ufeffpath,patient,\u200bMass\na.png,1,1\nb.png,2,0\n".encode(),
        files=["a.png", "b.png"],
    )
    assert read_table(tmp_path / "t.csv", tmp_path, ("Mass",)).targets.ravel().tolist() == [1, 0]


@pytest.mark.parametrize(
    "text, refused", [("8.68687E+37", True), ("1E+12", True), ("7E12", False), ("-", False)]
)
def test_numbers_of_patients_that_a_spreadsheet_has_rounded(tmp_path, text, refused):
    put(tmp_path, f"path,patient,Mass\na.png,{text},1\nb.png,2,0\n", files=["a.png", "b.png"])
    if refused:
        with pytest.raises(
            InputError, match="row 2: the patient is .*, a number that a spreadsheet has rounded"
        ):
            read_table(tmp_path / "t.csv", tmp_path, ("Mass",))
    else:
        assert read_table(tmp_path / "t.csv", tmp_path, ("Mass",)).known.tolist() == [text != "-", True]


def test_a_table_of_one_name_here_and_in_the_data_folder(tmp_path, monkeypatch, capsys):
    """Neither is taken in silence: both are named, and a path that begins with ./ or ../ means one."""
    monkeypatch.chdir(tmp_path)
    put(tmp_path, PLAIN, "labels.csv")
    put(tmp_path / "theirs", PLAIN, "labels.csv")
    put(tmp_path / "theirs", PLAIN, "own.csv")
    with pytest.raises(
        InputError, match="labels.csv and theirs/labels.csv: write ./labels.csv or theirs/lab"
    ):
        tables.find_table("labels.csv", "theirs")
    assert (
        other_hospitals.parse("theirs:labels.csv")[1].resolve() == tmp_path / "labels.csv"
    )  # as runs keep it
    assert "of two tables, labels.csv is read and not theirs/labels.csv" in capsys.readouterr().err
    for text, meant in (
        ("./labels.csv", "labels.csv"),
        ("theirs/../labels.csv", "labels.csv"),
        (str(tmp_path / "labels.csv"), "labels.csv"),
        ("theirs/labels.csv", "theirs/labels.csv"),
        ("own.csv", "theirs/own.csv"),
    ):
        assert tables.find_table(text, "theirs").resolve() == tmp_path / meant
    assert tables.find_table("labels.csv", ".").resolve() == tmp_path / "labels.csv"
    assert other_hospitals.parse("theirs:./labels.csv")[1].resolve() == tmp_path / "labels.csv"
    with pytest.raises(InputError, match="own.csv: there is no such file$"):
        tables.find_table("./own.csv", "theirs")
    # What a run keeps is read again as it stands, without another search.
    config = data.DataConfig(data_dir="theirs", labels="labels.csv", classes=("Edema", "Mass"))
    assert tables.read_set(config.labels, "theirs", config.classes)[1].index.files == list(FILES)


@pytest.mark.parametrize(
    "encoding, name, said",
    [("cp1252", "Müller–“A”€", "cp1252"), ("latin-1", "Müller\x81", "Latin-1"), ("utf-8", "Müller–€", None)],
)
def test_tables_of_windows_and_of_latin(tmp_path, capsys, encoding, name, said):
    """Dashes, quotation marks and the euro of Windows; bytes that mean nothing there are Latin-1."""
    text = PLAIN.replace("2,-1", f"{name},-1").replace(
        "Edema", "Größe–x" if encoding != "latin-1" else "Größe"
    )
    path = put(tmp_path, text.encode(encoding))
    head = sheets.open_sheet(path).head
    assert sheets.head_of(path) == head and head[2] in text.splitlines()[0]
    assert sheets.open_sheet(path).text("patient")[2] == name
    err = capsys.readouterr().err
    assert f"is not UTF-8; read as {said}\n" in err if said else err == ""


def test_rows_without_a_name_are_passed_over(tmp_path, capsys):
    found = read_plain_set(tmp_path, PLAIN + ",5,1,1\n,6,0,0\n , ,1,\n")
    assert found.files == list(FILES) and found.targets.tolist() == LABELS
    assert "t.csv: 3 rows name no image; passed over\n" in capsys.readouterr().err
    patients = put(tmp_path, "path,patient\nc.jpg,9\n,5\n,6\n", "p.csv")
    assert read_patients(patients, found, tmp_path).patients == ["1", "9", "9"]


def test_repeated_rows_that_describe_otherwise_are_counted(tmp_path, capsys):
    head = "path,patient,Edema,Mass,age,sex,ward\n"
    rows = ["x/a.png,1,1,0,30,F,A", "x/b.png,2,0,,,M,A", "c.jpg,2,-1,1,50,M,B"]
    again = ["x/a.png,1,1,0,31,F,B", "x/a.png,1,1,0,,F,A", "x/b.png,2,0,,40,M,A", "c.jpg,2,-1,1,50,M,B"]
    found = read_plain_set(tmp_path, head + "\n".join(rows + again))
    assert found.cohort["age"].tolist()[::2] == [30, 50]
    said = (
        "4 rows repeat an earlier row; counted once; of them 2 say another age, 1 say another ward: the first"
    )
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("name", ["Patient ID", "patient_id", "PatientID", "subject_id"])
def test_a_column_of_patients_by_another_name_is_hinted_at(tmp_path, capsys, name):
    found = read_plain_set(tmp_path, PLAIN.replace("patient", name))
    assert not found.known.any()
    said = f"t.csv has a column {name} and no column patient: call it patient\n"
    assert capsys.readouterr().err.count(said) == 1


def test_of_two_columns_of_patients_one_is_named(tmp_path, capsys):
    found = read_plain_set(tmp_path, "path,Patient,patient,Edema,Mass\nx/a.png,7,8,1,0\nc.jpg,7,9,1,0\n")
    assert found.patients == ["8", "9"]
    assert "t.csv has the columns Patient and patient: patient is read\n" in capsys.readouterr().err
