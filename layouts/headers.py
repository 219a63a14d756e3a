"""What the headers of DICOM files say of patients and exposures: patient, study, age, sex, view and machine.

The ids of patients and studies are never kept or shown. In their place stand names made of them with a secret
key (HMAC-SHA256), one key for a cache folder: so runs, teachers and sites that share the cache know a patient
by the same name, and nobody without the key can tell whose it is. Headers are read once, without pixels, and
kept in the cache folder under these names. Files are read only.
"""

import contextlib
import hashlib
import hmac
import os
import secrets
from pathlib import Path

import numpy as np

from common.console import InputError, printable, progress, say, say_once
from common.files import atomic_path, check_regular, sha256
from common.safe_files import load_arrays
from images import twins
from images.decode import read_header
from images.dicom import KEYED
from layouts import arrays, cohort
from layouts.patients import MOST_PATIENTS, NOBODY, as_the_table_calls_them

KEY_FILE, KEY_BYTES = "dicom.key", 32
PICTURES = (".jpeg", ".jpg", ".png", ".tif", ".tiff", ".bmp", ".webp")  # files called so are not looked into
NO_ID = {  # in lower case: what stands in the place of an id that was removed
    *("", "0", *NOBODY, "anon", "anonymous", "anonymized", "anonymised"),
    *("removed", "deidentified", "de-identified", "patient", "patientid", "no id", "noid", "test"),
}
KEPT = ("patient", "study", "age", "sex", "view", "machine")  # as text, what is kept of a header
LONGEST = 60  # characters of a manufacturer
VERSION = 1  # raise it when `told` or what it calls says something else, so that headers are read again


# ---------------------------------------------------------------- the key


def secret_key(cache_dir):
    """The key of a cache folder, 32 bytes; made where there is none. Nobody else may read its file.

    InputError if the file is damaged."""
    path = Path(cache_dir, KEY_FILE)
    if not path.exists():
        _make_key(path)
    check_regular(path)
    if os.name == "posix" and os.stat(path).st_mode & 0o077:
        with contextlib.suppress(OSError):  # it may be somebody else's
            os.chmod(path, 0o600)
    text = path.read_text(encoding="ascii", errors="replace").strip()
    try:
        key = bytes.fromhex(text)
    except ValueError:
        key = b""
    if len(key) != KEY_BYTES:
        raise InputError(
            f"{path} is damaged: delete it; patients known from DICOM headers get other names then"
        )
    return key


def key_of_call(cache_dir):
    """(a key for names that are only printed, whether it is that of the cache folder): where there is no such
    folder, or its key may not be read, one for this call alone."""
    if cache_dir and Path(cache_dir).is_dir():
        with contextlib.suppress(OSError, InputError):
            return secret_key(cache_dir), True
    return secrets.token_bytes(KEY_BYTES), False


def _make_key(path):
    """Write a new key, unless another process is faster."""
    path.parent.mkdir(parents=True, exist_ok=True)
    own = path.with_name(f".{KEY_FILE}.{os.getpid()}.tmp")
    descriptor = os.open(own, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o600)
    try:
        with open(descriptor, "w", encoding="ascii") as file:
            file.write(secrets.token_hex(KEY_BYTES) + "\n")
        try:
            os.link(own, path)  # whole or not at all, and never over another one
        except FileExistsError:
            pass
        except OSError:  # a disk without links
            if not path.exists():
                os.replace(own, path)
    finally:
        own.unlink(missing_ok=True)


def name_of(key, kind, text):
    """The name that stands for an id: the same for the same key, kind ("patient" or "study") and id."""
    digest = hmac.new(key, f"{kind}:{text}".encode("utf-8", "surrogatepass"), hashlib.sha256)
    return KEYED + digest.hexdigest()[:16]


# ---------------------------------------------------------------- one header


def told(header, key):
    """What a header (dicom.header) says: {name of KEPT: text}, ids as names by the key, "" where it says
    nothing. Age, sex and view are as they are written."""
    patient, study = header["PatientID"], header["StudyInstanceUID"]
    found = {"patient": "", "study": ""}
    if patient.lower() not in NO_ID:
        found["patient"] = name_of(key, "patient", patient)
    if study:
        found["study"] = name_of(key, "study", study)
    for name, tag in (("age", "PatientAge"), ("sex", "PatientSex"), ("view", "ViewPosition")):
        found[name] = printable(header[tag])[:16]
    found["machine"] = printable(header["Manufacturer"])[:LONGEST].strip()
    return found


def of_file(path, key):
    """`told` of one file, its view as in listing.COHORT; all is "" where it is no DICOM file, or a damaged
    one, which decoding it will tell."""
    header = None
    if not str(path).lower().endswith(PICTURES):
        with contextlib.suppress(OSError):
            header = read_header(path)
    if header is None:
        return dict.fromkeys(KEPT, "")
    found = told(header, key)
    found["view"] = cohort.view(found["view"])
    return found


# ---------------------------------------------------------------- many headers


def cohort_of_files(root, files, cache_dir):
    """What the headers of the DICOM files among `files` (names relative to `root`) say: {"patient", "study",
    "sex", "view", "machine": text [N], "age": float64 [N]}, "" and NaN where it is not known; None where no
    file is DICOM.

    Headers of files that have not changed are taken from `cache_dir`. Notes count what could not be used."""
    possible = [f for f in files if not (str(f).lower().endswith(PICTURES) or arrays.parts_of(f))]
    if not possible:
        return None
    texts = _headers(root, possible, cache_dir)
    if not any(row is not None for row in texts.values()):
        return None
    nothing = dict.fromkeys(KEPT, "")
    rows = [texts.get(file) or nothing for file in files]
    found = {name: np.array([row[name] for row in rows], dtype=str) for name in KEPT}
    where = f"DICOM headers in {root}"
    mend(found, files, secret_key(cache_dir), where)
    found["age"] = cohort.ages(found["age"].tolist(), where)
    found["sex"] = cohort.sexes(found["sex"].tolist(), where)
    found["view"] = cohort.views(found["view"].tolist(), where)
    return found


def _headers(root, files, cache_dir):
    """{file: {name of KEPT: text}, or None where it is no DICOM file or cannot be read}."""
    key, root = secret_key(cache_dir), Path(root)
    place = sha256([str(root.resolve())])[:8]
    path = Path(cache_dir, f"{root.resolve().name}-headers-{place}.npz")
    kept = _load(path, key)
    stamps = {file: arrays.stamp(root / file) for file in files}
    changed = [file for file in files if kept.get(file, (None,))[0] != stamps[file]]
    unreadable = []
    for file in progress(changed, len(changed), "reading DICOM headers", "files"):
        try:
            header = read_header(root / file)
        except OSError as error:
            unreadable.append(f"{file} ({error})")
            kept[file] = None, None  # so that it is tried again
            continue
        kept[file] = stamps[file], None if header is None else told(header, key)
    if unreadable:
        say(
            f"note: {len(unreadable)} DICOM headers in {root} cannot be read, so nothing is known of these "
            f"patients: {'; '.join(unreadable[:3])}"
        )
    if changed:
        _save(path, key, kept)
    return {file: kept[file][1] for file in files}


def _load(path, key):
    """{file: (stamp, {name of KEPT: text} or None)} of an earlier call with this key, {} without one."""
    if not path.exists():
        return {}
    try:
        arrays = load_arrays(path)
        columns = [arrays[name] for name in ("names", "dicom", *KEPT)]
        stamps = arrays["stamp"].tolist()
        if str(arrays["key"]) != _fingerprint(key) or any(len(c) != len(stamps) for c in columns):
            return {}
        kept = {}
        for stamp, file, is_dicom, *texts in zip(stamps, *(column.tolist() for column in columns)):
            row = dict(zip(KEPT, texts)) if is_dicom else None
            kept[file] = tuple(stamp), row
        return kept
    except (InputError, KeyError, TypeError, ValueError):
        say(f"{path} is damaged: reading the DICOM headers again")
        return {}


def _save(path, key, kept):
    """Write what `_load` reads."""
    kept = {file: (stamp, row) for file, (stamp, row) in kept.items() if stamp is not None}
    nothing = dict.fromkeys(KEPT, "")
    rows = [row or nothing for _, row in kept.values()]
    arrays = {name: np.array([row[name] for row in rows], dtype=str) for name in KEPT}
    arrays |= {
        "names": np.array(list(kept), dtype=str),
        "dicom": np.array([row is not None for _, row in kept.values()], dtype=bool),
        "stamp": np.array([stamp for stamp, _ in kept.values()], dtype=np.int64).reshape(-1, 2),
        "key": np.array(_fingerprint(key)),
    }
    with atomic_path(path) as tmp, open(tmp, "wb") as file:
        np.savez_compressed(file, **arrays)


def _fingerprint(key):
    """What tells two keys, and two VERSIONs, apart, and none of them."""
    return hashlib.sha256(f"fingerprint {VERSION}".encode() + key).hexdigest()[:16]


# ---------------------------------------------------------------- ids that cannot be believed


def mend(found, files, key, where):
    """Mend the "patient" and "study" of `found`, text [N] each, of DICOM files of these names, in place:
    what numbers images is no patient, and a study is of one person. Notes say what was changed, `where`."""
    _forget_file_names(found["patient"], files, key)
    _mend_studies(found, where)


def _forget_file_names(patients, files, key):
    """Empty the names of patients [N] where each id is the name of its file: it numbers images, no people."""
    stems = [name_of(key, "patient", Path(file).stem) for file in files]
    known = patients != ""
    if known.sum() > 1 and (patients == np.array(stems))[known].all():
        patients[known] = ""


def _mend_studies(found, where):
    """Make patients and studies fit each other, with notes and counts.

    A study is of one person. So two or three ids in one study are taken for one patient, whatever the reason:
    then no picture of a person trains while another one tests. More of them, and the study's number says
    nothing. Where there is a study and no patient, the study stands for the patient."""
    patients, studies = found["patient"], found["study"]
    patients_of = {}
    for patient, study in zip(patients.tolist(), studies.tolist()):
        if patient and study:
            patients_of.setdefault(study, set()).add(patient)
    crowded = [study for study, ids in patients_of.items() if len(ids) > MOST_PATIENTS]
    if crowded:
        inside = np.isin(studies, crowded)
        say_once(
            f"note: {where}: {len(crowded)} studies name more than {MOST_PATIENTS} patients: the studies of "
            f"{int(inside.sum())} images are taken as unknown"
        )
        studies[inside] = ""
    mixed = [study for study, ids in patients_of.items() if 1 < len(ids) <= MOST_PATIENTS]
    if mixed:
        say_once(f"note: {where}: {len(mixed)} studies name several patients: these are taken for one")
        _, codes = np.unique(studies, return_inverse=True)
        together = np.where(np.isin(studies, mixed) & (patients != ""), codes, -1)
        found["patient"] = patients = np.array(twins.joined(patients, together), dtype=str)
    nameless = (patients == "") & (studies != "")
    if nameless.any():
        known = dict(zip(studies[patients != ""].tolist(), patients[patients != ""].tolist()))
        names = [known.get(study, study) for study in studies[nameless].tolist()]
        say_once(
            f"note: {where}: {int(nameless.sum())} images name no patient: their study stands for the patient"
        )
        width = max(patients.dtype.itemsize // 4, max(map(len, names)))
        found["patient"] = patients.astype(f"U{width}")
        found["patient"][nameless] = names


# ---------------------------------------------------------------- an Index


def with_headers(root, index, cache_dir, names_tell=False):
    """The Index with what the headers of its DICOM files say, where no table has said it: cohort, patients.

    `names_tell`: known patients are those that file names tell, and a header knows better."""
    found = cohort_of_files(root, index.files, cache_dir)
    if found is None:
        return index
    patients = found.pop("patient")
    told_here = patients != ""
    if not names_tell:
        told_here &= ~index.known
    names = [new if told else old for new, old, told in zip(patients.tolist(), index.patients, told_here)]
    if not names_tell:
        called = as_the_table_calls_them(names, patients, index.known)
        changed = sum(new != old for new, old, known in zip(called, names, index.known) if not known)
        if changed:
            say_once(
                f"note: DICOM headers in {root}: {changed} images that name no patient in the table are of "
                "one whom it names"
            )
        names = called
    columns = dict(index.cohort or {})
    for name, values in found.items():
        told_nowhere = np.isnan(values) if values.dtype.kind == "f" else values == ""
        if not told_nowhere.all():
            columns[name] = _filled(columns.get(name), values)
    return index._replace(patients=names, known=index.known | told_here, cohort=columns or None)


def _filled(column, values):
    """A column of a cohort [N], its unknown values those of a header; None is a column that is not there."""
    if column is None:
        return values
    unknown = np.isnan(column) if values.dtype.kind == "f" else column == ""
    return np.where(unknown, values, column)
