"""Tests of the layouts of public sets: real rows where ../shared has them, drawn images of their names."""

import csv
import gzip
import json
import re
import shutil
import zlib
from collections import Counter, defaultdict
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

import data
import vit
from common import console
from common.console import InputError
from layouts import arrays, cohort, mimic, nih, padchest, sheets, synonyms, tables
from layouts import vindr as vindr_layout
from layouts.asked import asked
from layouts.choices import Choices, training_targets, uncertain_values
from layouts.rows import UNUSABLE, Source
from tests.shared import SHARED, cli, read_json, refused, touch
from training import other_hospitals

NO_DISEASE = ("No Finding", "Support Devices")
FOURTEEN = (
    "No Finding,Enlarged Cardiomediastinum,Cardiomegaly,Lung Opacity,Lung Lesion,Edema,Consolidation,"
    "Pneumonia,Atelectasis,Pneumothorax,Pleural Effusion,Pleural Other,Fracture,Support Devices"
)


def rows_of(name, count):
    """The first lines of a real table; drawn ones in its form where ../shared is absent."""
    path = SHARED / "tables" / name
    if not path.exists():
        return DRAWN[name](count)
    return path.read_text().splitlines()[: count + 1]


def drawn_chexpert(count):
    rng, rows = np.random.default_rng(4), [f"Path,Sex,Age,Frontal/Lateral,AP/PA,{FOURTEEN}"]
    for i in range(count):
        view = ("Frontal,AP", "Frontal,PA", "Lateral,")[i % 3]
        name = f"train/patient{i // 2:05d}/study1/view{i % 2}_{view.split(',')[0].lower()}.jpg"
        cells = ["", *rng.choice(["1.0", "0.0", "-1.0", ""], 12), ""] if i % 4 else ["1.0"] + 13 * [""]
        rows.append(
            f"CheXpert-v1.0-small/{name},{('Male', 'Female')[i % 2]},{30 + i},{view},{','.join(cells)}"
        )
    return rows


def drawn_rsna(count):
    """Two rows an image; every other one has boxes."""
    rows = [f"{i // 2:036d},{(',,,,0', f'{i}.0,2.0,3.0,4.0,1')[i // 2 % 2]}" for i in range(count)]
    return ["patientId,x,y,width,height,Target", *rows]


def drawn_vindr(count):
    rng, rows = np.random.default_rng(5), ["image_id,class_name,class_id,rad_id,x_min,y_min,x_max,y_max"]
    for i in range(min(count, 150) // 3):
        for reader in range(3):
            names = rng.choice(["Cardiomegaly", "ILD", "Lung Opacity"], rng.integers(0, 3))
            rows += [f"image{i},{name},0,R{reader},1,2,3,4" for name in names if names.size]
            if not names.size:
                rows.append(f"image{i},No finding,14,R{reader},,,,")
    return rows


def drawn_google(count):
    rows = [
        f"{i:08d}_000.png,No Finding,{i},{('YES,NO,NO,YES', 'NO,NO,YES,NO')[i % 2]},test"
        for i in range(count)
    ]
    return [
        "Image Index,Finding Labels,Patient ID,Fracture,Pneumothorax,Airspace opacity,Nodule or mass,Set Id"
    ] + rows


DRAWN = {
    "chexpert_train_head.csv": drawn_chexpert,
    "rsna_stage_2_train_labels_head.csv": drawn_rsna,
    "vindr_train_head.csv": drawn_vindr,
    "nih_four_findings_google_head.csv": drawn_google,
}


def draw(root, names, side=32):
    """Noise images, each another."""
    for name in names:
        path = root / name
        number = zlib.crc32(name.encode())
        rng = np.random.default_rng(number)
        path.parent.mkdir(parents=True, exist_ok=True)
        picture = rng.integers(0, 120, (side, side)) + number % 120
        Image.fromarray(picture.astype(np.uint8)).save(path, "PNG" if path.suffix != ".jpg" else "JPEG")


# ---------------------------------------------------------------- a small set of every layout


def make_chexpert(root):
    """Sixty real rows, and a valid.csv of four more."""
    head, *rows = rows_of("chexpert_train_head.csv", 64)
    (root / "train.csv").write_text("\n".join([head, *rows[:60]]))
    valid = [
        row.replace("/train/", "/valid/").replace(",,", ",0.0,").replace(",,", ",0.0,") for row in rows[60:]
    ]
    (root / "valid.csv").write_text("\n".join([head, *valid]))
    draw(root, [row.split(",")[0].removeprefix("CheXpert-v1.0-small/") for row in (*rows[:60], *valid)])


def make_mimic(root):
    """Forty studies of twenty patients, a frontal and a lateral image each."""
    labels, images, split = [], [], []
    rng = np.random.default_rng(1)
    for i in range(40):
        who, study = 10000000 + i // 2, 50000000 + i
        cells = rng.choice(["1.0", "0.0", "-1.0", ""], 12)
        labels.append(f"{who},{study},," + ",".join(cells) + ",")
        side = "train" if i < 28 else "validate" if i < 32 else "test"
        for view in ("PA", "LATERAL"):
            images.append(f"img{i}{view[0]},{who},{study},{view},21800506")
            split.append(f"img{i}{view[0]},{study},{who},{side}")
            draw(root, [f"files/p10/p{who}/s{study}/img{i}{view[0]}.jpg"])
    heads = (
        "subject_id,study_id," + FOURTEEN,
        "dicom_id,subject_id,study_id,ViewPosition,StudyDate",
        "dicom_id,study_id,subject_id,split",
    )
    for name, head, rows in zip(("chexpert", "metadata", "split"), heads, (labels, images, split)):
        with gzip.open(root / f"mimic-cxr-2.0.0-{name}.csv.gz", "wt") as file:
            file.write("\n".join([head, *rows]))
    people = [f"{10000000 + k},{'FM'[k % 2]},{30 + k},2170" for k in range(20)]
    with gzip.open(root / "patients.csv.gz", "wt") as file:
        file.write("\n".join(["subject_id,gender,anchor_age,anchor_year", *people]))


def make_rsna(root):
    """Sixty real rows and the headers that are there; the mapping to NIH of all but one."""
    head, *rows = rows_of("rsna_stage_2_train_labels_head.csv", 60)
    (root / "stage_2_train_labels.csv").write_text("\n".join([head, *rows]))
    ids = list(dict.fromkeys(row.split(",")[0] for row in rows))
    headers = [f"{i},PA,{20 + i},{image},{'FM'[i % 2]}" for i, image in enumerate(ids)]
    (root / "headers.csv").write_text("\n".join([",ViewPosition,PatientAge,PatientID,PatientSex", *headers]))
    mapping = [{"subset_img_id": image, "img_id": f"{i // 2:08d}_000.png"} for i, image in enumerate(ids[1:])]
    (root / "pneumonia-challenge-dataset-mappings_2018.json").write_text(json.dumps(mapping))
    draw(root, [f"stage_2_train_images/{image}.dcm.png" for image in ids])
    for image in ids:  # read by content, whatever the ending says
        path = root / f"stage_2_train_images/{image}.dcm.png"
        path.rename(path.with_name(f"{image}.dcm"))


def make_vindr(root):
    """Every row of forty real images."""
    head, *rows = rows_of("vindr_train_head.csv", 2000)
    ids = list(dict.fromkeys(row.split(",")[0] for row in rows))[:40]
    (root / "train.csv").write_text("\n".join([head, *(row for row in rows if row.split(",")[0] in ids)]))
    draw(root, [f"train/{image}.png" for image in ids])


PADCHEST = "ImageID,ImageDir,StudyDate_DICOM,StudyID,PatientID,PatientBirth,PatientSex_DICOM,Projection," + (
    "Manufacturer_DICOM,Labels"
)


def padchest_row(i, labels, view="PA", birth=1950):
    about = f"{i}.png,{i % 3},20140915,s{i // 2},p{i // 2},{birth}.0,{'FMO'[i % 3]},{view},Maker{i % 2}"
    return f'{about},"{labels}"'


def make_padchest(root):
    """Forty images of twenty patients, 16-bit PNG, and rows of each kind that is left out."""
    kinds = ("['normal']", "['pleural effusion ', 'cardiomegaly']", "['cardiomegaly']", "['normal']")
    rows = [padchest_row(i, kinds[i % 4]) for i in range(40)]
    rows += [padchest_row(40, "['exclude']"), padchest_row(41, "['suboptimal study', 'nodule']")]
    rows += [
        padchest_row(42, "['normal', 'nodule']"),
        padchest_row(43, "nan"),
        padchest_row(44, "['normal']", "L"),
    ]
    rows += [padchest_row(45, "['unchanged', 'cardiomegaly']"), padchest_row(46, "['unchanged']")]
    (root / "labels.csv").write_text("\n".join([PADCHEST, *rows]))
    rng = np.random.default_rng(2)
    for i in range(47):
        (root / str(i % 3)).mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 4000, (32, 32)).astype(np.uint16)).save(root / f"{i % 3}/{i}.png")


def make_medmnist(root, name="pneumoniamnist.npz", columns=1):
    rng, found = np.random.default_rng(3), {}
    for side, count in (("train", 40), ("val", 12), ("test", 12)):
        found[f"{side}_images"] = rng.integers(0, 255, (count, 28, 28)).astype(np.uint8)
        found[f"{side}_labels"] = (np.arange(count)[:, None] + np.arange(columns)) % 2
    np.savez_compressed(root / name, **found)


SETS = {  # layout: (how to make a set, the table as --labels names it)
    "chexpert": (make_chexpert, "train.csv"),
    "mimic": (make_mimic, "."),
    "rsna": (make_rsna, "stage_2_train_labels.csv"),
    "vindr": (make_vindr, "."),
    "padchest": (make_padchest, "labels.csv"),
    "medmnist": (make_medmnist, "pneumoniamnist.npz"),
}


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """A function: layout -> (folder, table) of a small set, made once."""
    made = {}

    def get(name):
        if name not in made:
            root = tmp_path_factory.mktemp(name)
            SETS[name][0](root)
            made[name] = root, SETS[name][1]
        return made[name]

    return get


def listing_of(root, table, **settings):
    """The Listing of a set, as a training script would make it."""
    findings = settings.pop("findings", None)
    console._said.clear()  # what earlier tests were told
    about = {**dict(data_dir=str(root), labels=table, findings=findings), **settings}
    return data.read_listing(data.DataConfig.from_args(SimpleNamespace(**about)))


# ---------------------------------------------------------------- listing, split, three steps


@pytest.mark.parametrize("name", SETS)
def test_three_steps_of_every_layout(sets, name, tmp_path, monkeypatch):
    """The layout is found, trained on for three steps, and its counts stand in results.json."""
    monkeypatch.setitem(vit.CONFIGS, "scratch", dict(patch_size=16, embed_dim=24, depth=1, num_heads=3))
    root, table = sets(name)
    argv = ("--data-dir", root, "--labels", table, "--img-size", 32, "--max-steps", 3, "--batch-size", 8)
    done = cli("train_scratch", *argv, "--epochs", 1, cwd=tmp_path)
    assert done.code == 0, done.err
    results = read_json(tmp_path, "outputs/scratch/results.json")
    assert results["data"]["layout"] == name
    split = results["split"]
    flow = dict(split["flow"])
    assert list(flow) == ["listed", "found", "view", "labelled", "readable", "train", "val", "test"]
    left = [flow[step] for step in ("listed", "found", "view", "labelled", "readable")]
    assert left == sorted(left, reverse=True) and flow["train"] + flow["val"] + flow["test"] == left[-1]
    for side in ("train", "val", "test"):
        assert flow[side] == split[side] > 0
        for finding, counts in split["labels"][side].items():
            assert sum(counts.values()) == split[side]
            assert counts["positive"] == split["counts"][side][finding]


def test_where_readers_differ_on_health_nobody_knows():
    """Of three, one sees something; of the second image all see something, and nothing in common."""
    votes, count = np.array([[2, 1, 0], [0, 2, 1], [3, 0, 0]]), np.full((3, 1), 3)
    known = ("No finding", "Edema", "Mass")
    labels = vindr_layout.agreed(votes, count, "all", known)
    assert labels[:, 0].tolist() == [UNUSABLE, 0, 1] and not labels[:, 1:].any()
    assert vindr_layout.agreed(votes, count, "majority", known)[:, 0].tolist() == [1, 0, 1]


def test_chexpert_against_the_rows(sets, capsys):
    """Labels, patients, studies, ages, sexes and views of sixty real rows, read with csv.DictReader."""
    root, table = sets("chexpert")
    with open(root / table, newline="") as file:
        rows = {row["Path"].removeprefix("CheXpert-v1.0-small/"): row for row in csv.DictReader(file)}
    names = tuple(FOURTEEN.split(","))
    meant = {"1.0": 1, "0.0": 0, "-1.0": -1, "": 0}
    index = listing_of(root, table, views="all").index
    assert sorted(index.files) == sorted(rows)
    for i, file in enumerate(index.files):
        row = rows[file]
        expected = [meant[row[name]] for name in names]
        if row["No Finding"] == "" and "1.0" not in [row[name] for name in names if name not in NO_DISEASE]:
            expected[names.index("No Finding")] = -1  # nobody says that it is healthy, or not
        assert index.targets[i].tolist() == expected
        assert index.uncertain[i].tolist() == [row[name] == "-1.0" for name in names]
        who, study = file.split("/")[1:3]
        assert index.patients[i] == who and index.cohort["study"][i] == f"{who}/{study}"
        assert index.cohort["age"][i] == float(row["Age"]) and index.cohort["sex"][i] == row["Sex"][0]
        view = row["AP/PA"] if row["Frontal/Lateral"] == "Frontal" else "lateral"
        assert index.cohort["view"][i] == view
    # As a database writes the names of columns.
    head, _, rest = (root / table).read_text().partition("\n")
    (root / "lower.csv").write_text(f"{head.lower()}\n{rest}")
    again = listing_of(root, "lower.csv", views="all").index
    assert again.files == index.files and np.array_equal(again.targets, index.targets)
    # As a program of Windows writes the paths.
    text = (root / table).read_text()
    slashed = re.sub(r"^[^,]*", lambda path: path[0].replace("/", "\\"), text, flags=re.M)
    (root / "windows.csv").write_text(slashed)
    windows = listing_of(root, "windows.csv", views="all").index
    assert windows.files == index.files and windows.patients == index.patients and windows.known.all()
    assert windows.cohort["study"].tolist() == index.cohort["study"].tolist()
    frontal = [file for file in rows if rows[file]["Frontal/Lateral"] == "Frontal"]
    capsys.readouterr()
    assert sorted(listing_of(root, table).index.files) == sorted(frontal)
    assert f"left out {60 - len(frontal)} lateral of 60 images" in capsys.readouterr().err
    only = listing_of(root, table, views="AP").index.cohort["view"]
    assert set(only) == {"AP"}


def test_chexpert_blank_ignored(sets):
    """Without --blank negative a blank cell is unknown, but what a healthy row says follows."""
    root, table = sets("chexpert")
    index = listing_of(root, table, views="all", blank="ignore").index
    with open(root / table, newline="") as file:
        rows = {row["Path"].removeprefix("CheXpert-v1.0-small/"): row for row in csv.DictReader(file)}
    names = FOURTEEN.split(",")
    for file, labels in zip(index.files, index.targets.tolist()):
        row = rows[file]
        well = row["No Finding"] == "1.0"
        ill = any(row[name] == "1.0" for name in names[1:-1])
        for name, label in zip(names, labels):
            expected = {"1.0": 1, "0.0": 0, "-1.0": -1, "": -1}[row[name]]
            if row[name] == "" and (well and name in names[1:-1] or ill and name == "No Finding"):
                expected = 0
            assert label == expected


def test_chexpert_published_validation(sets, capsys):
    root, table = sets("chexpert")
    listing_of(root, table)
    assert "valid.csv is read with --split published only" in capsys.readouterr().err
    listing = listing_of(root, table, split="published")
    side = listing.index.side
    assert set(side) == {"train", "val"} and set(listing.index.side[listing.test]) == {"train"}
    for file, where in zip(listing.index.files, side):
        assert file.startswith("valid/") == (where == "val")
    assert listing.test_from == "cut off"


def test_chexpert_in_the_folder_above(tmp_path):
    """The names as they stand in the table, where the data folder holds CheXpert-v1.0-small/."""
    head, *rows = rows_of("chexpert_train_head.csv", 12)
    (tmp_path / "train.csv").write_text("\n".join([head, *rows]))
    names = [row.split(",")[0] for row in rows]
    touch(tmp_path, *names)
    found = tables.read(tmp_path / "train.csv", tmp_path, ("Edema",)).index
    assert found.files == names


def test_mimic_against_its_tables(sets):
    """A study's labels are its images'; published sides; age is the anchor's plus the years since."""
    root, _ = sets("mimic")
    with gzip.open(root / "mimic-cxr-2.0.0-chexpert.csv.gz", "rt", newline="") as file:
        studies = {row["study_id"]: row for row in csv.DictReader(file)}
    listing = listing_of(root, ".", split="published")
    index = listing.index
    assert len(index.files) == 40 and set(index.cohort["view"]) == {"PA"}
    names = FOURTEEN.split(",")
    for i, file in enumerate(index.files):
        study = file.split("/")[3].removeprefix("s")
        row = studies[study]
        for name, label in zip(names, index.targets[i].tolist()):
            expected = {"1.0": 1, "0.0": 0, "-1.0": -1, "": 0}[row[name]]
            assert label == expected
        number = int(study) - 50000000
        who = number // 2
        assert index.patients[i] == str(10000000 + who) and index.cohort["study"][i] == study
        assert index.cohort["age"][i] == 30 + who + 2180 - 2170 and index.cohort["sex"][i] == "FM"[who % 2]
        side = "train" if number < 28 else "val" if number < 32 else "test"
        assert index.side[i] == side
    assert listing.test_from == "published" and len(listing.test) == 8
    assert set(listing_of(root, ".").index.side) == {"train", "test"}


def test_what_the_tables_of_mimic_do_not_share_is_counted(sets, tmp_path, capsys):
    """An image that the split does not list, and a study without images."""
    root, _ = sets("mimic")
    shutil.copytree(root, tmp_path / "set")
    before = listing_of(root, ".", views="all").index.files
    for name, change in (
        ("split", lambda lines: lines[:-1]),
        ("chexpert", lambda lines: [*lines, lines[-1].replace(",50000039,", ",59999999,")]),
    ):
        path = tmp_path / "set" / f"mimic-cxr-2.0.0-{name}.csv.gz"
        with gzip.open(path, "rt") as file:
            lines = file.read().split("\n")
        with gzip.open(path, "wt") as file:
            file.write("\n".join(change(lines)))
    capsys.readouterr()
    files = listing_of(tmp_path / "set", ".", views="all").index.files
    said = capsys.readouterr().err
    assert sorted(set(before) - set(files)) == [file for file in before if file.endswith("img39L.jpg")]
    assert "1 studies have labels and no image in" in said and "-split.csv.gz; left out" in said


def test_mimic_without_its_other_tables(tmp_path):
    (tmp_path / "mimic-cxr-2.0.0-chexpert.csv").write_text(
        f"subject_id,study_id,{FOURTEEN}\n1,2{',1.0' * 14}\n"
    )
    with pytest.raises(InputError, match="put mimic-cxr-2.0.0-metadata.csv.gz and -split.csv.gz"):
        listing_of(tmp_path, "mimic-cxr-2.0.0-chexpert.csv")


def test_rsna_against_the_rows(sets, capsys):
    """One row an image, whatever the boxes; NIH's patients by the mapping."""
    root, table = sets("rsna")
    with open(root / table, newline="") as file:
        truth = {row["patientId"]: int(row["Target"]) for row in csv.DictReader(file)}
    index = listing_of(root, table).index
    found = {file.split("/")[-1].removesuffix(".dcm"): y for file, y in zip(index.files, index.targets[:, 0])}
    assert found == truth and len(truth) < 60
    order = list(truth)
    for file, patient, known in zip(index.files, index.patients, index.known):
        at = order.index(file.split("/")[-1].removesuffix(".dcm"))
        assert known == (at > 0) and patient == (str((at - 1) // 2) if at else file)
    assert "names are no paths" not in capsys.readouterr().err


def test_rsna_without_a_mapping_knows_no_patients(tmp_path, capsys):
    (tmp_path / "t.csv").write_text("patientId,x,y,width,height,Target\na,,,,,0\nb,1,2,3,4,1\nb,5,6,7,8,1\n")
    classes = "patientId,class\na,Normal\nb,Lung Opacity\nb,Lung Opacity\n"
    (tmp_path / "stage_2_detailed_class_info.csv").write_text(classes)
    touch(tmp_path, "a.dcm", "b.dcm")
    index = tables.read(tmp_path / "t.csv", tmp_path, ("No Finding", "Pneumonia")).index
    assert index.targets.tolist() == [[1, 0], [0, 1]] and not index.known.any()
    assert "its ids name images, not people: patients are unknown" in capsys.readouterr().err
    (tmp_path / "t.csv").write_text("patientId,Target\na,0\nb,1\nb,0\n")
    with pytest.raises(InputError, match="row 4: Target of b is not what it is in row 3"):
        tables.read(tmp_path / "t.csv", tmp_path, ("Pneumonia",))


@pytest.mark.parametrize("how", ["any", "majority", "all"])
def test_vindr_readers_against_a_count(sets, how):
    root, _ = sets("vindr")
    said = defaultdict(lambda: defaultdict(set))
    with open(root / "train.csv", newline="") as file:
        for row in csv.DictReader(file):
            said[row["image_id"]][row["rad_id"]].add(row["class_name"])
    index = listing_of(root, ".", readers=how).index
    findings = vindr_layout.findings(root / "train.csv")
    assert findings[0] == "No finding" and len(index.files) == 40
    for file, labels in zip(index.files, index.targets.tolist()):
        readers = list(said[file.split("/")[1].removesuffix(".png")].values())
        votes = Counter(name for names in readers for name in names)
        least = {"any": 1, "majority": len(readers) // 2 + 1, "all": len(readers)}[how]
        present = {name for name, number in votes.items() if number >= least}
        if present - {"No finding"}:
            present -= {"No finding"}
        assert {name for name, label in zip(findings, labels) if label == 1} == present


def test_vindr_of_physionet(tmp_path):
    """Two tables; the test part has no readers and is the published one."""
    head = "image_id,rad_id,Aortic enlargement,Other disease,No finding\n"
    rows = "".join(f"i{i},R{r},{int(r < i % 4)},0,{int(r >= i % 4)}\n" for i in range(12) for r in range(3))
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations/image_labels_train.csv").write_text(head + rows)
    test = "image_id,Aortic enlargement,Other disease,No finding\nt0,1,0,0\nt1,0,0,1\n"
    (tmp_path / "annotations/image_labels_test.csv").write_text(test)
    touch(tmp_path, *(f"train/i{i}.dicom" for i in range(12)), "test/t0.dicom", "test/t1.dicom")
    listing = listing_of(tmp_path, "annotations")
    assert [listing.index.files[i] for i in listing.test] == ["test/t0.dicom", "test/t1.dicom"]
    assert listing.test_index.targets.tolist() == [[0, 1, 0], [1, 0, 0]]
    majority = {f"train/i{i}.dicom": int(i % 4 >= 2) for i in range(12)}
    found = dict(zip(listing.index.files, listing.index.targets[:, 1].tolist()))
    assert {name: found[name] for name in majority} == majority


def test_a_reader_who_contradicts_themself(tmp_path):
    rows = "a,No finding,14,R1\na,Mass,3,R2\nb,No finding,14,R1\nb,Mass,3,R1\n"
    (tmp_path / "t.csv").write_text("image_id,class_name,class_id,rad_id\n" + rows)
    touch(tmp_path, "a.png", "b.png")
    with pytest.raises(InputError, match="row 4: of b, reader R1 says No finding and.* a finding"):
        tables.read(tmp_path / "t.csv", tmp_path, ("Mass",))


def test_padchest_by_hand(sets, capsys):
    root, table = sets("padchest")
    listing = listing_of(root, table)
    err, index = capsys.readouterr().err, listing.index
    assert len(index.files) == 41  # of 47: four are unusable, one is lateral, one says only "unchanged"
    for text in (
        "1 rows are labelled exclude",
        "1 rows are labelled suboptimal study",
        "1 rows have no labels",
    ):
        assert text in err
    assert "1 rows say normal and a finding" in err and "left out 1 lateral of 47 images" in err
    assert "5 of 46 images have no usable label of any finding" in err
    assert tables.table_findings(root / table) == ("normal", "cardiomegaly", "pleural effusion")
    expected = ([1, 0, 0], [0, 1, 1], [0, 1, 0], [1, 0, 0])
    for file, labels, age, sex in zip(
        index.files, index.targets.tolist(), *map(index.cohort.get, ("age", "sex"))
    ):
        i = int(file.split("/")[1].removesuffix(".png"))
        wanted = [-1, 1, -1] if i == 45 else expected[i % 4]
        assert labels == wanted
        assert age == 64 and sex == ("F", "M", "")[i % 3]
    assert listing.flow == [["listed", 47], ["found", 47], ["view", 46], ["labelled", 41]]
    negative = listing_of(root, table, blank="negative")  # "unchanged" alone is blank, the others unusable
    assert negative.flow[-1] == ["labelled", 42]
    assert set(index.cohort["machine"]) == {"Maker0", "Maker1"} and index.cohort["study"][0] == "s0"


@pytest.mark.parametrize(
    "cell",
    [
        "__import__('os').system('touch pwned')",
        "[1, 2]",
        "{'normal'}",
        "['normal'",
        "[" * 5000,
        "('normal',)",
        "open",
    ],
)
def test_a_list_cell_that_is_code(tmp_path, cell, monkeypatch):
    """Nothing is run; the error names the row."""
    monkeypatch.chdir(tmp_path)
    rows = [PADCHEST, padchest_row(0, "['normal']"), padchest_row(1, cell)]
    (tmp_path / "t.csv").write_text("\n".join(rows))
    touch(tmp_path, "0/0.png", "1/1.png")
    with pytest.raises(InputError, match=r"row 3: Labels is .* not a list of texts"):
        listing_of(tmp_path, "t.csv")
    assert not (tmp_path / "pwned").exists()


def test_padchest_rare_labels_are_asked_by_name_only(tmp_path, capsys):
    rows = [padchest_row(i, "['normal']" if i else "['hernia']") for i in range(150)]
    (tmp_path / "t.csv").write_text("\n".join([PADCHEST, *rows]))
    touch(tmp_path, *(f"{i % 3}/{i}.png" for i in range(150)))
    assert tables.table_findings(tmp_path / "t.csv") == ("normal",)
    assert "1 labels that fewer than 1% of the rows have are not asked" in capsys.readouterr().err
    assert tables.table_findings(tmp_path / "t.csv", ("hernia",)) == ("hernia",)
    assert padchest.findings(tmp_path / "t.csv") == ("normal", "hernia")


def test_medmnist_against_the_arrays(sets, tmp_path):
    """Names, labels, published parts and pixels."""
    root, table = sets("medmnist")
    listing = listing_of(root, table, split="published")
    with np.load(root / table) as file:
        content = {name: file[name] for name in file.files}
    assert listing.index.files[17] == "pneumoniamnist.npz#train/17"
    assert Counter(listing.index.side.tolist()) == {"train": 40, "val": 12, "test": 12}
    expected = np.concatenate([content[f"{side}_labels"] for side in ("train", "val", "test")])
    assert (listing.index.targets == expected).all() and not listing.index.known.any()
    config = data.DataConfig(
        str(root),
        28,
        labels=str(root / table),
        classes=("Pneumonia",),
        cache_dir=str(tmp_path),
        split="published",
    )
    test = data.load_test(config)
    assert (test.pixels() == content["test_images"]).all()
    with pytest.raises(OSError, match="no image 40 among the 40 of train"):
        arrays.pixels(f"{root / table}#train/40")


def test_medmnist_files_that_are_refused(tmp_path):
    path = tmp_path / "pneumoniamnist.npz"
    good = {f"{side}_images": np.zeros((2, 8, 8), np.uint8) for side in ("train", "val", "test")}
    good |= {f"{side}_labels": np.array([[0], [1]]) for side in ("train", "val", "test")}
    argv = ("train_linear", "--data-dir", ".", "--labels", path.name, "--img-size", 32)
    for changes, message in (
        ({"train_labels": np.array([[0], [object()]], dtype=object)}, "holds Python objects"),
        ({"train_labels": np.array([[0], [2]])}, "labels other than 0 and 1"),
        ({"train_labels": np.array([[0]])}, "train_labels is"),
        ({"test_images": np.zeros((2, 8), np.uint8)}, "test_images is uint8"),
    ):
        np.savez(path, **{**good, **changes})  # an array of objects is pickled
        refused(cli(*argv, "--split", "image", cwd=tmp_path), message)
    np.savez(path, **{name: value for name, value in good.items() if "val" not in name})
    refused(cli(*argv, cwd=tmp_path), "no table of findings", "medmnist: it lacks val_images, val_labels")
    path.write_bytes(path.read_bytes()[:200])
    refused(cli(*argv, cwd=tmp_path), "not a plain .npz")
    np.savez(tmp_path / "breastmnist.npz", **good)
    refused(cli(*argv[:4], "breastmnist.npz", cwd=tmp_path), "told by the file's name")


# ---------------------------------------------------------------- evaluation only, other hospitals, leaks


def make_google(root):
    """Sixty real rows; images of their names."""
    head, *rows = rows_of("nih_four_findings_google_head.csv", 60)
    (root / "four.csv").write_text("\n".join([head, *rows]))
    draw(root, [f"images/{row.split(',')[0]}" for row in rows])
    return root / "four.csv"


def test_google_is_a_site_of_a_model_of_another_set(tmp_path, capsys):
    """YES and NO of real rows, in the words of a CheXpert model; what only one has is named."""
    path = make_google(tmp_path)
    with open(path, newline="") as file:
        rows = {f"images/{row['Image Index']}": row for row in csv.DictReader(file)}
    names = ("Lung Opacity", "Pneumothorax", "Edema")
    config = data.DataConfig("x", 32, labels="x.csv", layout="chexpert", classes=names)
    site = other_hospitals.load_site(replace(config, cache_dir=str(tmp_path / "c")), tmp_path, "four.csv")
    for file, labels in zip(site.files, site.targets.tolist()):
        row = rows[file]
        expected = [int(row[name] == "YES") for name in ("Airspace opacity", "Pneumothorax")]
        assert labels == [*expected, -1]
    err = capsys.readouterr().err
    assert "read as the same finding: Airspace opacity as Lung Opacity" in err
    assert "does not ask Edema" in err and "also asks Fracture, Nodule or mass" in err
    argv = ("train_linear", "--data-dir", ".", "--labels", "four.csv", "--img-size", 32)
    refused(cli(*argv, cwd=tmp_path), "is for evaluation only", "calibrate.py --site DIR --labels CSV")
    refused(cli(*argv, "--layout", "rsna", cwd=tmp_path), "--layout rsna", "lacks patientId, Target")


def test_sites_that_hold_the_images_of_training(sets, tmp_path, capsys):
    """PneumoniaMNIST is Kermany's set, the other way round too; RSNA's images are NIH's."""
    small, table = sets("medmnist")
    touch(
        tmp_path,
        *(f"k/train/{c}/person{i}_virus_{i}.jpeg" for i in range(9) for c in ("NORMAL", "PNEUMONIA")),
    )
    kermany = data.DataConfig(str(tmp_path / "k"))
    with pytest.raises(InputError, match="its images are Kermany's set, and so are those"):
        other_hospitals.load_site(kermany, small, table)
    mnist = data.DataConfig(str(small), labels=str(small / table), layout="medmnist", classes=("Pneumonia",))
    names = [f"{c}/person{i}_virus_{i}.jpeg" for i in range(9) for c in ("NORMAL", "PNEUMONIA")]
    lines = ["path,Pneumonia", *(f"{name},{int(name[0] == 'P')}" for name in names)]
    (tmp_path / "k/train/t.csv").write_text("\n".join(lines))
    with pytest.raises(InputError, match="its images are Kermany's set"):
        other_hospitals.load_site(mnist, tmp_path / "k/train", "t.csv")
    rsna, labels = sets("rsna")
    names = [f"{i:08d}_000.png" for i in range(9)]
    lines = [
        "Image Index,Finding Labels,Patient ID",
        *(f"{name},Pneumonia,{i}" for i, name in enumerate(names)),
    ]
    (tmp_path / "nih").mkdir()
    (tmp_path / "nih/t.csv").write_text("\n".join(lines))
    touch(tmp_path / "nih", *(f"images/{name}" for name in names))
    here = dict(img_size=32, cache_dir=str(tmp_path / "c"), classes=("Pneumonia",))
    nih = data.DataConfig(str(tmp_path / "nih"), labels=str(tmp_path / "nih/t.csv"), layout="nih", **here)
    other_hospitals.load_site(nih, rsna, labels)
    assert "a leak: the images of the RSNA pneumonia challenge and of NIH" in capsys.readouterr().err
    other = data.DataConfig(str(rsna), labels=str(rsna / labels), layout="rsna", **here)
    with pytest.raises(InputError, match="cannot be read"):  # the images are empty files
        other_hospitals.load_site(other, tmp_path / "nih", "t.csv")
    assert "a leak: the images of NIH ChestX-ray14 and of the RSNA" in capsys.readouterr().err


def test_names_that_mean_the_same():
    for a, b in (
        ("Pleural Thickening", "Pleural_Thickening"),
        ("Effusion", "pleural effusion"),
        ("No Finding", "normal"),
        ("Airspace opacity", "Lung Opacity"),
        ("Nodule or mass", "Nodule/Mass"),
    ):
        assert synonyms.same_finding(a, b) and synonyms.same_finding(b, a)
    for a, b in (
        ("Nodule", "Mass"),
        ("Nodule", "Nodule/Mass"),
        ("Lung Lesion", "Mass"),
        ("Fracture", "Fibrosis"),
    ):
        assert not synonyms.same_finding(a, b)
    # Every finding of a set has a meaning of its own.
    for names in (FOURTEEN.split(","), tables.nih.NIH_FINDINGS):
        assert len({synonyms.meaning(name) for name in names}) == len(names)
    there = ("Pleural Effusion", "Effusion", "Edema")
    assert synonyms.matched(("effusion", "Mass"), there) == {"effusion": "Effusion"}


# ---------------------------------------------------------------- uncertain and blank


def test_uncertain_labels_are_of_training_only(sets, tmp_path):
    """U-Ones for Edema, U-Zeros for the others: training labels by hand; validation and test as the table
    says. Which images train does not depend on it."""
    root, table = sets("chexpert")
    names = ("Edema", "Consolidation", "Atelectasis")
    here = dict(labels=str(root / table), classes=names, layout="chexpert", cache_dir=str(tmp_path))
    usual = data.DataConfig(str(root), 32, **here)
    chosen = replace(usual, uncertain="Edema=positive,Consolidation=negative,Atelectasis=ignore")
    (train, val, info), (other, other_val, other_info) = map(data.load_train_val, (usual, chosen))
    assert train.files == other.files and info["fingerprint"] == other_info["fingerprint"]
    assert (val.targets == other_val.targets).all() and (train.targets == -1).any(axis=0).all()
    expected = train.targets.copy()
    expected[:, 0][expected[:, 0] == -1] = 1
    expected[:, 1][expected[:, 1] == -1] = 0
    assert (other.targets == expected).all() and other.targets.dtype == np.int8
    assert info["labels"] == other_info["labels"]
    assert info["labels"]["train"]["Edema"]["uncertain"] == (train.targets[:, 0] == -1).sum()


def test_what_uncertain_means_is_checked():
    findings = ("Edema", "Pleural Effusion")
    assert uncertain_values("positive", findings).tolist() == [1, 1]
    assert uncertain_values("negative,effusion=positive", findings).tolist() == [0, 1]
    assert uncertain_values("Edema=positive", findings).tolist() == [1, -1]
    for text, message in (
        ("maybe", "'maybe' is not one of ignore, negative"),
        ("Mass=positive", "Mass is none of"),
    ):
        with pytest.raises(InputError, match=message):
            uncertain_values(text, findings)
    config = SimpleNamespace(uncertain="positive", classes=findings)
    targets = np.array([[-1, -1], [0, 1]], np.int8)
    uncertain = np.array([[True, False], [False, False]])
    assert training_targets(targets, uncertain, config).tolist() == [[1, -1], [0, 1]]
    assert training_targets(targets, None, config) is targets


def test_a_plain_table_tells_uncertain_from_blank(tmp_path):
    """-1 and an empty cell are both unknown unless --blank says otherwise; age, sex and view are no
    findings."""
    head = "path,patient,Age,Sex,View,Site,Edema\n"
    text = head + "a.png,1,057Y,f,PA,x,-1\nb.png,2,003M,O,LL,y,\nc.png,3,411,M,,y,1\n"
    (tmp_path / "t.csv").write_text(text)
    touch(tmp_path, "a.png", "b.png", "c.png")
    assert tables.table_findings(tmp_path / "t.csv") == ("Site", "Edema")
    index = tables.read(tmp_path / "t.csv", tmp_path, ("Edema",)).index
    assert index.targets.tolist() == [[-1], [-1], [1]]
    assert index.uncertain[:, 0].tolist() == [True, False, False]
    assert index.blank[:, 0].tolist() == [False, True, False]
    negative = tables.read(tmp_path / "t.csv", tmp_path, ("Edema",), Choices(blank="negative")).index
    assert negative.targets.tolist() == [[-1], [0], [1]] and negative.blank[:, 0].tolist() == [
        False,
        True,
        False,
    ]
    about = index.cohort
    assert about["age"].tolist()[:2] == [57, 0.25] and np.isnan(about["age"][2])
    assert about["sex"].tolist() == ["F", "", "M"] and about["view"].tolist() == ["PA", "lateral", ""]
    assert about["Site"].tolist() == ["x", "y", "y"]
    assert tables.read_table(tmp_path / "t.csv", tmp_path, ("Edema",)).files == ["a.png", "c.png"]


@pytest.mark.parametrize(
    "text, years",
    [
        ("57", 57),
        ("057Y", 57),
        ("003M", 0.25),
        ("012W", 84 / 365.25),
        ("010D", 10 / 365.25),
        ("90+", 90),
        ("0", 0),
    ]
    + [(text, None) for text in ("411", "411Y", "-3", "", "adult", "1e3", "12,5", "121")],
)
def test_ages(text, years):
    found = cohort.years(text)
    assert np.isnan(found) if years is None else found == pytest.approx(years)


@pytest.mark.parametrize(
    "text, view",
    [("PA", "PA"), ("POSTEROANTERIOR", "PA"), ("AP_horizontal", "AP"), ("AP SUPINE", "AP"), ("LL", "lateral")]
    + [
        ("LATERAL", "lateral"),
        ("XTABLE LATERAL", "lateral"),
        ("L", "lateral"),
        ("COSTAL", "other"),
        ("LAO", "other"),
    ]
    + [("", ""), ("UNK", ""), ("nan", ""), ("Frontal", ""), ("frontal view", "")]
    + [("postero-anterior", "PA"), ("antero-posterior", "AP"), ("P.A.", "PA"), ("Frontal PA", "PA")]
    + [("PA view", "PA"), ("AP erect", "AP"), ("left lateral", "lateral")],
)
def test_views(text, view):
    assert cohort.view(text) == view


# ---------------------------------------------------------------- tables that are not clear


def test_two_layouts_in_one_folder(sets, tmp_path):
    (tmp_path / "a.csv").write_text("patientId,Target\nx,1\n")
    (tmp_path / "b.csv").write_text("image_id,class_name,rad_id\nx,Mass,R1\n")
    argv = ("train_linear", "--data-dir", ".", "--labels", ".", "--img-size", 32)
    refused(cli(*argv, cwd=tmp_path), "several layouts (a.csv: rsna; b.csv: vindr)", "--layout")
    assert tables.find_table(tmp_path, ".", "vindr").name == "b.csv"
    (tmp_path / "c.csv").write_text("image_id,class_name,rad_id\nx,Mass,R1\n")
    with pytest.raises(InputError, match="several tables .b.csv, c.csv.: name the one"):
        tables.find_table(tmp_path, ".", "vindr")
    (tmp_path / "none").mkdir()
    with pytest.raises(InputError, match="no table of a known layout; it holds no table"):
        tables.find_table(tmp_path / "none", ".")


def test_a_table_of_two_layouts(tmp_path):
    (tmp_path / "t.csv").write_text("path,patientId,Target\nx.png,x,1\n")
    touch(tmp_path, "x.png")
    with pytest.raises(InputError, match="several layouts: say which with --layout rsna or plain"):
        tables.find_layout(tmp_path / "t.csv")
    assert tables.find_layout(tmp_path / "t.csv", "rsna").name == "rsna"
    with pytest.raises(InputError, match="no such layout; there are chexpert, mimic"):
        tables.find_layout(tmp_path / "t.csv", "chexport")


def test_columns_of_no_layout(tmp_path):
    """What is there, the nearest layout, and what it lacks."""
    (tmp_path / "t.csv").write_text("ImageID,PatientID,Projection,Diagnosis\nx,1,PA,well\n")
    with pytest.raises(
        InputError, match="it has ImageID, PatientID, Projection, Diagnosis.*padchest: it lacks Labels"
    ):
        tables.find_layout(tmp_path / "t.csv")


def test_runs_from_before_there_were_layouts(tmp_path):
    """They read a table with CheXpert's columns as the plain one that it was."""
    head = f"Path,Sex,Age,Frontal/Lateral,AP/PA,{FOURTEEN}"
    rows = [f"p{i}.png,Male,50,Lateral,,,,,,,{'1.0' if i % 2 else ''},,,,,,,," for i in range(4)]
    (tmp_path / "t.csv").write_text("\n".join([head, *rows]))
    touch(tmp_path, *(f"p{i}.png" for i in range(4)))
    old = {"data_dir": str(tmp_path), "labels": str(tmp_path / "t.csv"), "classes": ["Edema"]}
    listing = data.read_listing(data.DataConfig.from_json(old))
    assert listing.index.targets[:, 0].tolist() == [-1, 1, -1, 1]
    new = data.DataConfig.from_json({**old, "layout": "chexpert", "views": "all"})
    assert data.read_listing(new).index.targets[:, 0].tolist() == [0, 1, 0, 1]


def test_flags_that_change_nothing_are_said(tmp_path, capsys):
    (tmp_path / "t.csv").write_text("path,Edema\na.png,1\nb.png,0\n")
    touch(tmp_path, "a.png", "b.png")
    listing_of(tmp_path, "t.csv", views="PA", split="image")
    assert "--views PA: nothing tells the view of these images" in capsys.readouterr().err
    with pytest.raises(InputError, match="--readers is for VinDr's several readers"):
        listing_of(tmp_path, "t.csv", readers="any")


def test_a_site_says_what_its_unsure_labels_are(sets, tmp_path, capsys):
    root, table = sets("chexpert")
    config = data.DataConfig(
        "x", 32, labels="x.csv", layout="plain", blank="ignore", classes=("Edema",), cache_dir=str(tmp_path)
    )
    site = other_hospitals.load_site(config, root, table)
    found = site.targets[:, 0].tolist()
    with open(root / table, newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["Frontal/Lateral"] == "Frontal"]
    cells = Counter(row["Edema"] for row in rows)
    inferred = sum(row["Edema"] == "" and row["No Finding"] == "1.0" for row in rows)
    assert Counter(found)[0] == cells["0.0"] + cells[""]  # the layout's default, not that of the run's table
    err = capsys.readouterr().err
    assert f"{cells[''] - inferred} are blank, taken for negative" in err
    assert f"{cells['-1.0']} labels are uncertain" in err


def test_flags_of_tables_without_a_table(tmp_path):
    touch(tmp_path, "set/train/NORMAL/a.png", "set/train/PNEUMONIA/b.png")
    for flag, value in (("--layout", "nih"), ("--uncertain", "positive"), ("--blank", "negative")):
        done = cli("train_linear", "--data-dir", "set", flag, value, cwd=tmp_path)
        refused(done, f"{flag} belongs to a table of findings: give --labels too")
    values = {"data_dir": str(tmp_path / "set"), "blank": "negative", "also": ("there:t.csv",)}
    assert asked(SimpleNamespace(blank="negative"), values) == {"classes": ("NORMAL", "PNEUMONIA")}
    with pytest.raises(InputError, match="--blank belongs to a table"):
        asked(SimpleNamespace(blank="negative"), values | {"also": ("there", "t.csv")})


def test_a_study_of_mimic_with_two_sets_of_labels_is_refused(tmp_path):
    head = "subject_id,study_id,No Finding,Edema\n"
    metadata = "dicom_id,subject_id,study_id,ViewPosition\na,10000033,50414268,PA\n"
    (tmp_path / "mimic-cxr-2.0.0-metadata.csv").write_text(metadata)
    labels = tmp_path / "mimic-cxr-2.0.0-chexpert.csv"
    labels.write_text(f"{head}10000033,50414268,,1.0\n10000033,50414268,1.0,0.0\n")
    with pytest.raises(
        InputError, match="row 2: the labels of study 50414268 are not what they are in row 3"
    ):
        mimic.rows(Source(labels, tmp_path, ()))


def test_of_several_tables_beside_the_published_one_is_read(tmp_path, capsys):
    for name in ("an excerpt.csv", "mimic-cxr-2.0.0-metadata.csv"):
        (tmp_path / name).write_text(f"dicom_id,subject_id\n{name},1\n")
    sheet = sheets.sheet_beside(tmp_path / "mimic-cxr-2.0.0-chexpert.csv", ("dicom_id",))
    assert sheet.path.endswith("metadata.csv") and "an excerpt.csv beside it" in capsys.readouterr().err


def test_rsna_cannot_be_healthy_and_sick(tmp_path):
    touch(tmp_path, "images/x1.png", "images/x2.png")
    (tmp_path / "stage_2_train_labels.csv").write_text("patientId,Target\nx1,1\nx2,0\n")
    info = tmp_path / "stage_2_detailed_class_info.csv"
    info.write_text("patientId,class\nx1,Normal\nx2,Normal\n")
    with pytest.raises(InputError, match="No Finding is 1 and Pneumonia is 1, a contradiction"):
        tables.read_table(tmp_path / "stage_2_train_labels.csv", tmp_path, ("No Finding", "Pneumonia"))
    info.write_text("patientId,class\nx1,Lung Opacity\nx2,Normal\nx2,Lung Opacity\n")
    with pytest.raises(InputError, match="row 4: x2 has another class"):
        tables.read_table(tmp_path / "stage_2_train_labels.csv", tmp_path, ("No Finding", "Pneumonia"))


def test_words_for_nothing_are_no_finding_of_nih(tmp_path):
    for word in ("nan", "NA", "-", "0", "None"):
        (tmp_path / "t.csv").write_text(
            f"Image Index,Finding Labels,Patient ID\na.png,{word},1\nb.png,Mass,2\n"
        )
        with pytest.raises(InputError, match=f"row 2: Finding Labels is '{word}', which is no finding"):
            nih.rows(Source(tmp_path / "t.csv", tmp_path, ("No Finding", "Mass")))


@pytest.mark.parametrize(
    "text, view",
    [
        *[("Posterior-Anterior", "PA"), ("Chest PA", "PA"), ("P.A.", "PA"), ("PA_erect", "PA")],
        *[("Anterior Posterior", "AP"), ("AP_horizontal", "AP"), ("Front", ""), ("LAT", "lateral")],
        *[
            ("patient supine", "other"),
            ("Lat.", "lateral"),
            ("LATERAL DECUBITUS", "lateral"),
            ("Oblique", "other"),
        ],
        *[("Thorax p.a.", "PA"), ("CHEST P.A.", "PA"), ("A. P. supine", "AP"), ("bilateral AP", "AP")],
        *[("PA/LAT", ""), ("Lateral/PA", ""), ("AP/PA", ""), ("Chest PA and lateral", "")],
    ],
)
def test_words_for_views(text, view):
    assert cohort.view(text) == view


def test_exceptions_of_uncertain_labels_may_come_first():
    for text in ("Edema=positive,negative", "negative,Edema=positive"):
        assert uncertain_values(text, ("Edema", "Mass")).tolist() == [1, 0]


def test_spellings_of_vindr_are_one_finding(tmp_path, capsys):
    """Three readers agree, each in another spelling."""
    rows = ["image_id,class_name,rad_id", "a,No finding,R1", "a,No Finding,R2", "a,no finding,R3"]
    rows += ["b,mass,R1", "b,Mass,R2", "b,Mass,R3"]
    (tmp_path / "train.csv").write_text("\n".join(rows))
    (part,) = vindr_layout.rows(Source(tmp_path / "train.csv", tmp_path, ()))
    assert part.findings == ("No Finding", "Mass") and part.labels.tolist() == [[1, 0], [0, 1]]
    assert "3 other spellings are read" in capsys.readouterr().err


def test_views_that_are_none_of_the_usual_are_shown(tmp_path, capsys):
    rows = ["a.png,1,1,PA", "b.png,2,0,Oblique", "c.png,3,0,Apical", "d.png,4,1,Oblique"]
    (tmp_path / "t.csv").write_text("path,patient,Mass,view\n" + "\n".join(rows))
    touch(tmp_path, *(row[:5] for row in rows))
    index = tables.read_table(tmp_path / "t.csv", tmp_path, ("Mass",))
    err = capsys.readouterr().err
    assert index.files == ["a.png"] and "--views frontal: left out 3 other of 4 images" in err
    assert "3 views are neither PA nor AP nor lateral (Oblique, Apical): other" in err


def test_columns_of_labels_that_are_not_asked_are_groups(tmp_path):
    """icu and smoker hold 1 and 0 as findings do, and describe the patient where findings are named."""
    rows = [f"{i:02d}.png,{i},{i % 2},{i // 2 % 2},{'ABC'[i % 3]}" for i in range(12)]
    (tmp_path / "t.csv").write_text("path,patient,Mass,icu,ward\n" + "\n".join(rows))
    touch(tmp_path, *(row[:6] for row in rows))
    index = tables.read_table(tmp_path / "t.csv", tmp_path, ("Mass",))
    assert sorted(index.cohort) == ["icu", "ward"] and index.targets.shape == (12, 1)
    assert index.cohort["icu"].tolist() == [str(i // 2 % 2) for i in range(12)]
    assert tables.table_findings(tmp_path / "t.csv") == ("Mass", "icu", "ward")
    assert tables.read_table(tmp_path / "t.csv", tmp_path, ("Mass", "icu")).cohort.keys() == {"ward"}
