"""Images of other hospitals that join training: where --also and --also-unlabelled find them, and what their
tables say in the words of the first hospital's classes.

Validation and test stay the first hospital's, and so does the choice of epoch and threshold.
"""

import itertools
from pathlib import Path

import numpy as np

from common.console import InputError, say
from common.files import sha256
from common.task import is_healthy
from data import load, read_listing
from images import twins
from images.dicom import KEYED, keyed
from images.find import Search
from images.split import cut
from images.subset import Subset, same_images
from layouts import tables
from layouts.choices import select, training_targets
from layouts.folders import list_images
from layouts.headers import with_headers
from layouts.listing import Index, Reading
from layouts.patients import read_patients
from layouts.same_set import refuse_same_set
from layouts.synonyms import matched, same_finding

EITHER = "--also or --also-unlabelled"


def parse(text):
    """DIR or DIR:LABELS.csv -> (folder, path of the table or None). InputError if either is not there."""
    folder, colon, table = text.rpartition(":")
    if not colon or not table.lower().endswith(tables.ENDINGS):
        folder, table = text, None
    if not Path(folder).is_dir():
        raise InputError(f"{EITHER} {text}: there is no folder {folder}")
    if table is None:
        return Path(folder), None
    return Path(folder), tables.find_table(table, folder, flag=f"{EITHER} {text}", stored=True)


def names(texts):
    """A name for each source, unique: the last part of its folder, or the whole where two would be alike."""
    folders = [parse(text)[0].resolve() for text in texts]
    short = [f.name for f in folders]
    if len(set(map(str, folders))) < len(folders):
        raise InputError(f"{EITHER} names a folder twice")
    unique = []
    for folder in folders:
        name = folder.name
        if short.count(name) > 1:
            name = folder.as_posix().strip("/")
        unique.append(name)
    return unique


def read(text, config):
    """(root, Index) of one --also of a DataConfig: class folders DIR/CLASS/, or DIR/train/CLASS/ where there
    is a train/, or the images of a table.

    InputError where it asks something else than the first hospital."""
    folder, table = parse(text)
    refuse_same_set(config, folder, table, EITHER)
    if table:
        if not tables.find_layout(table).trains:
            raise InputError(f"--also {text}: {table} is for evaluation only: calibrate.py --site takes it")
        return folder, _of_table(table, folder, config)
    if config.task.kind == "sigmoid":
        raise InputError(f"--also {text}: with --labels give DIR:LABELS.csv, its table of findings")
    if (folder / "train").is_dir():
        return folder, list_images(folder, "train", config.classes)
    root = folder.resolve()
    return root.parent, list_images(root.parent, root.name, config.classes)


def load_site(config, folder, labels="", patients=""):
    """The Subset of another hospital's labelled images, prepared as `config` says: folders of the classes, or
    the images of a table `labels`, as for --also; `patients`: a table path,patient. InputError where classes
    or findings are not those of `config`."""
    if config.task.kind == "sigmoid" and not labels:
        raise InputError(f"--site {folder}: this run was trained on a table of findings: give --labels CSV")
    table = tables.find_table(labels, folder, flag="--site: --labels") if labels else None
    refuse_same_set(config, Path(folder), table, "--site")
    if labels:
        root = Path(folder)
        index = _of_table(table, root, config)
    else:
        place = Path(folder).resolve()
        root, index = place.parent, list_images(place.parent, place.name, config.classes)
    index = index._replace(side=np.full(len(index.files), "site"))
    if patients:  # a header knows better than a file name, and this table better than both
        index = with_headers(root, index, config.cache_dir, names_tell=not labels)
        index = read_patients(patients, index, root)
    index = known_from_headers(root, index, config, names_tell=not (labels or patients))
    index = with_copies_joined(root, index, f"--site {folder}")
    subset, kept, _ = load(config, root, index, "site")
    if kept.unknown:
        which = "every image counts"
        if kept.unknown < len(subset):
            which = f"{kept.unknown} of {len(subset)} images count, each,"
        say(f"note: {folder}: patients unknown: {which} as a patient of its own; see --patients")
    return subset


def with_copies_joined(root, index, where):
    """The Index with one patient for all who share a file, byte for byte: copies tell nothing new, and a
    promise counts patients. Notes say so, and which copies have other labels; `where` names the images."""
    content = twins.contents(root, index.files)
    patients = twins.joined(index.patients, content)
    if fewer := len(set(index.patients)) - len(set(patients)):
        copies = int((content >= 0).sum()) - len(set(content[content >= 0].tolist()))
        say(
            f"note: {where}: {copies} of {len(content)} images are copies of another one; who shares a file "
            f"counts as one patient, which leaves {fewer} fewer"
        )
    twins.warn_of_labels(index.files, content, index.targets)
    return index._replace(patients=patients)


def known_from_headers(root, index, config, names_tell):
    """The Index with what DICOM headers say (headers.with_headers), without images of views that are not
    used."""
    known = with_headers(root, index, config.cache_dir, names_tell)
    if known is index:
        return index
    count = len(known.files)
    return select(Reading(known, [["listed", count], ["found", count]], True), config)[0]


def _of_table(table, folder, config):
    """The Index of a table's images, in the words of the first hospital's findings or classes."""
    choices = config.of_other(tables.find_layout(table).name)
    if config.task.kind == "sigmoid":
        return _findings(table, folder, config.classes, choices)
    return _classes(table, folder, config.classes, choices)


def read_unlabelled(text, config):
    """(root, Index) of one --also-unlabelled: every image under a folder; the targets are unknown."""
    folder = Path(text)
    if not folder.is_dir():
        raise InputError(f"--also-unlabelled {text}: there is no folder {folder}")
    search = Search()
    files = [Path(f).relative_to(folder).as_posix() for f in search.walk(folder)]
    if not files:
        raise InputError(f"--also-unlabelled {text}: no image there; {search.nothing()}")
    search.tell(folder)
    if config.task.kind == "sigmoid":
        targets = np.full((len(files), config.task.outputs), -1, np.int8)
    else:
        targets = np.full(len(files), -1, np.int64)
    unknown = np.zeros(len(files), dtype=bool)
    return folder, Index(files, targets, list(files), unknown, np.full(len(files), "", dtype="U5"))


def _findings(table, folder, findings, choices):
    """The Index of a table for a task of findings; what the table does not ask is unknown."""
    there = tables.table_findings(table)
    found = matched(findings, there)
    if not found:
        raise InputError(
            f"{table}: it has none of the findings {', '.join(findings)}; it has {', '.join(there[:40])}"
        )
    index = tables.read_table(table, folder, tuple(found.values()), choices)
    _say_unsure(table, index)
    columns = [findings.index(name) for name in found]
    shape = (len(index.files), len(findings))
    wide = {"targets": np.full(shape, -1, dtype=np.int8)}
    wide |= {name: np.zeros(shape, dtype=bool) for name in ("uncertain", "blank")}
    for name, values in wide.items():
        values[:, columns] = getattr(index, name)
    if renamed := [f"{other} as {name}" for name, other in found.items() if other != name]:
        say(f"note: {table}: read as the same finding: {', '.join(renamed)}")
    if absent := [name for name in findings if name not in found]:
        say(f"note: {table} does not ask {', '.join(absent)}: unknown on its images")
    if further := [name for name in there if name not in found.values()]:
        some = ", ".join(further[:10]) + (f" and {len(further) - 10} more" if len(further) > 10 else "")
        say(f"note: {table} also asks {some}, which the model does not know")
    return index._replace(**wide)


def _say_unsure(table, index):
    """A note on uncertain and blank labels, and what they count as."""
    uncertain, blank = int(index.uncertain.sum()), int(index.blank.sum())
    parts = []
    if uncertain:
        parts.append(f"{uncertain} labels are uncertain, left out of every figure")
    if blank:
        meaning = "negative" if (index.targets[index.blank] == 0).any() else "unknown"
        parts.append(f"{blank} are blank, taken for {meaning}")
    if parts:
        say(f"note: {table}: {'; '.join(parts)}")


def _classes(table, folder, classes, choices):
    """The Index of a table for a task of classes: an image is of the class whose column has a 1, and healthy
    where every disease is 0 and the table's healthy column, if it has one, says 1 or nothing; in a layout
    where a blank says that nobody spoke of it (Layout.infers), only where it says 1. Images of which the
    table does not say that are left out, and counted."""
    there = tables.table_findings(table)
    found = matched(classes[1:], there)
    if absent := [name for name in classes[1:] if name not in found]:
        raise InputError(
            f"{table}: it needs a column for {', '.join(absent)}, with 1 and 0; it has {', '.join(there)}"
        )
    # One disease and no other makes a class; none, all of them known, makes the healthy one.
    healthy = [name for name in there if is_healthy(name) or same_finding(name, classes[0])][:1]
    index = tables.read_table(table, folder, (*found.values(), *healthy), choices)
    diseases = index.targets[:, : len(found)]
    well = (diseases == 0).all(axis=1)
    sick = ((diseases == 1).sum(axis=1) == 1) & (diseases >= 0).all(axis=1)
    if healthy:
        nothing = index.blank[:, -1] & (index.targets[:, -1] < 0)
        if tables.find_layout(table).infers:
            nothing[:] = False
        well &= (index.targets[:, -1] == 1) | nothing
        sick &= index.targets[:, -1] != 1
    # An image that the table gives no class, or two, teaches nothing here.
    kept = np.flatnonzero(well | sick)
    if len(kept) < len(well):
        out = len(well) - len(kept)
        say(f"note: {table}: {out} of {len(well)} images are of none of {', '.join(classes)}; left out")
    number = np.where(sick, 1 + diseases.argmax(axis=1), 0).astype(np.int64)
    index = index._replace(targets=number, uncertain=None, blank=None).take(kept)
    for k, name in enumerate(classes):
        if not (index.targets == k).any():
            raise InputError(f"{table}: no image is {name}: every class needs some")
    return index


class Joined:
    """Several arrays of images, or of masks, read as one: the rows of the first, then those of the next."""

    def __init__(self, arrays):
        self.arrays = arrays
        self.starts = np.cumsum([0, *map(len, arrays)])

    def __len__(self):
        return int(self.starts[-1])

    def __getitem__(self, rows):
        rows = np.asarray(rows)
        which = np.searchsorted(self.starts, rows, side="right") - 1
        if rows.ndim == 0:
            return self.arrays[which][rows - self.starts[which]]
        first = self.arrays[0]
        out = np.empty((len(rows), *first.shape[1:]), first.dtype)
        for k, array in enumerate(self.arrays):
            here = which == k
            out[here] = array[rows[here] - self.starts[k]]
        return out


# ---------------------------------------------------------------- joining


def join(config, train, val, tell=print):
    """Add the images of --also and --also-unlabelled to the training Subset -> (train, {name: Subset held
    out}, JSON description).

    Of every labelled source, validation's share of whole patients is held out; it only tells how the model
    does there, and chooses nothing. InputError where a source holds an image of `val`, or a file of test."""
    if not config.also and not config.also_unlabelled:
        return train, {}, {}
    everything = [*config.also, *config.also_unlabelled]
    trained_on, held_out, description = [train], {}, {}
    earlier = [(config.data_dir, read_listing(config).root, train.files)]
    for number, (name, text) in enumerate(zip(names(everything), everything), 1):
        labelled = number <= len(config.also)
        if labelled:
            root, index = read(text, config)
        else:
            root, index = read_unlabelled(text, config)
        index = known_from_headers(root, index, config, names_tell=parse(text)[1] is None)
        index = index._replace(content=twins.contents(root, index.files))
        subset, readable, _ = load(config, root, index, "also")

        # What may not join is looked for by their own names, before the source's name is put in front.
        refuse_known(config, name, root, subset, val)
        say_known(name, root, subset, earlier)
        earlier.append((name, root, subset.files))
        subset.files = [f"{name}/{file}" for file in readable.files]
        say_known_patients(name, readable.patients, val)
        subset.patients = [of_source(name, patient) for patient in readable.patients]
        subset.sources = np.full(len(subset), number)
        fingerprint = sha256([subset.files, subset.targets.tolist()])

        # Whole patients are held out; without labels there is nothing to measure on them.
        sides = {"train": subset}
        if labelled:
            positions = cut(readable, config.task, True, config.val_share, config.split_seed)
            sides = {side: subset.take(some) for side, some in zip(("train", "val"), positions)}
            held_out[name] = sides["val"]
            if readable.uncertain is not None:
                uncertain = readable.uncertain[np.asarray(positions[0])]
                sides["train"].targets = training_targets(sides["train"].targets, uncertain, config)
        trained_on.append(sides["train"])
        description[name] = {side: len(images) for side, images in sides.items()}
        description[name] |= {"unknown_patients": readable.unknown, "fingerprint": fingerprint}
        listed = [f"{side} {describe(config, images, labelled)}" for side, images in sides.items()]
        tell(f"also {name}: {'; '.join(listed)}")
    return concatenated(trained_on), held_out, description


def describe(config, subset, labelled):
    """How many images of which class, or with which finding, as text."""
    if not labelled:
        return f"{len(subset)} without labels"
    if config.task.kind == "softmax":
        return " + ".join(f"{(subset.targets == k).sum()} {name}" for k, name in enumerate(config.classes))
    return f"{len(subset)} images"


def refuse_known(config, name, root, subset, val):
    """InputError if a source holds validation images, pixel for pixel, or test images, byte for byte (those
    are not decoded)."""
    listing = read_listing(config)
    test_files = listing.test_index.files
    known = same_images(subset, (val,)), twins.same_files(root, subset.files, listing.root, test_files)
    for what, files in zip(("validation", "test"), known):
        if files:
            some = f"{len(files)} of its images, {', '.join(files[:3])} and so on"
            raise InputError(
                f"{EITHER} {name}: {some}, are {what} images of {config.data_dir}: trained on them, a model "
                "would know the answers"
            )
    if pairs := twins.alike(subset, val):
        say(
            f"note: also {name}: {len(pairs)} of its images look like validation images of "
            f"{config.data_dir}, such as {' and '.join(pairs[0])}: if they were saved anew, validation is "
            "flattered"
        )


def of_source(name, patient):
    """The patient of a source, told from those of others; one of a DICOM header is the same everywhere."""
    return patient if patient.startswith(KEYED) else f"{name}/{patient}"


def say_known_patients(name, patients, val):
    """A note if patients of a source, known by their DICOM ids, are patients of validation."""
    shared = keyed(patients) & set(val.patients)
    if shared:
        say(
            f"note: also {name}: {len(shared)} of its patients are patients of validation (DICOM headers): "
            "validation is flattered"
        )


def say_known(name, root, subset, others):
    """A note if images of a source are, byte for byte, images of `others`, [(name, root, files)] that train
    already."""
    for other, other_root, files in others:
        if same := twins.same_files(root, subset.files, other_root, files):
            say(
                f"note: also {name}: {len(same)} of its images are images of {other} that train already, "
                f"such as {same[0]}: they count twice, or are held out though the model knows them"
            )


def look_alikes(config, train, val, test):
    """{"val_train", "test_train", "test_val": images of one side that look like one of the other}, training
    images of other hospitals among them; says it where there are any."""
    try:
        train = join(config, train, val, lambda line: None)[0]
    except InputError as error:
        say(f"note: images of other hospitals are not compared with those of test ({error})")
    counts, note = twins.count_alike({"train": train, "val": val, "test": test})
    if note:
        say(note)
    return counts


def concatenated(subsets):
    """Subsets one after the other as one, without copying their images."""
    images, masks = Joined([s.images for s in subsets]), None
    if subsets[0].masks is not None:
        masks = Joined([s.masks for s in subsets])
    return Subset(
        list(itertools.chain.from_iterable(s.files for s in subsets)),
        np.concatenate([s.targets for s in subsets]),
        images,
        np.concatenate([s.rows + start for s, start in zip(subsets, images.starts)]),
        patients=list(itertools.chain.from_iterable(s.patients for s in subsets)),
        levels=np.concatenate([s.levels for s in subsets]),
        masks=masks,
        sources=np.concatenate([s.sources for s in subsets]),
    )
