"""What a run that another starts from, or learns from, has seen: nothing of it may be held out here."""

from dataclasses import replace
from pathlib import Path

import numpy as np

from common.console import InputError, say
from common.files import sha256
from data import load, load_test, load_train_val, read_listing
from images import twins
from images.dicom import keyed
from images.split import cut
from images.subset import same_images
from layouts import tables
from records.run import Run
from records.schema import mismatches
from training import other_hospitals

# What decides which images validate and test, and the flag of each.
DECIDES = {
    "data_dir": "--data-dir",
    "labels": "--labels",
    "patients": "--patients",
    "classes": "--findings",
    "split": "--split",
    "split_seed": "--split-seed",
    "fractions": "--fractions",
    "views": "--views",
    "blank": "--blank",
    "readers": "--readers",
    "skip_bad": "--skip-bad",
    "undersample": "--balance undersample-once",
}


def refuse_known(flag, run, config, sides, split, held_out):
    """InputError where `run`, named by `flag`, or a run that it was made from, may have learnt from images
    that are held out here: its training and validation images are not those of `sides`, the Subsets (train,
    val) of the first hospital, or its other sources hold images of validation, test, or `held_out`. A run
    whose checkpoint is given as --weights may be of quite other images, so each of them is compared.

    config: the DataConfig here; split: its description; held_out: {name: Subset} of --also."""
    for name, other in [(str(run), run), *forebears(run)]:
        title = f"{flag} {run}"
        if other is not run:
            title += f": {name}, from which it was made,"
        if other is None:
            say(f"note: {title} is not there any more: whether it saw images held out here is not known")
            continue
        if _same_split(other, config, sides, split):
            _refuse_other_pictures(title, other, config, sides)
        elif flag == "--weights":
            _refuse_its_images(title, other, config, sides[1], held_out)
        else:
            raise InputError(_other_split(flag, title, other, config, split))
        _refuse_other_sources(title, other, config, sides[1], split, held_out)


def run_of_weights(weights):
    """The Run whose checkpoint.pth `weights` of results.json ({"path", "sha256"}) are, as it is there still;
    else None, with a note where a results.json beside them is none of ours."""
    path = Path(weights.get("path", ""))
    run = Run(path.parent)
    if path.name != "checkpoint.pth" or not _is_there(run, weights.get("sha256")):
        return None
    try:
        return run if run.results else None
    except InputError as error:
        say(f"note: {error}; whether {path} saw images held out here is not known")
        return None


def forebears(run):
    """The runs that a Run was made from, and those they were made from: the one whose weights or encoder it
    began with, its teacher, the members of an ensemble -> [(folder, Run)], None for a Run that is not there
    any more as it was. InputError if results.json is damaged."""
    results = run.results
    parts = [results[k] for k in ("init", "teacher") if k in results]
    found = []
    for part in parts + results.get("members", []):
        if mismatches(part, {"run": str, "checkpoint": str}):
            raise InputError(f"{run.folder / 'results.json'} is damaged: wrong init, teacher or members")
        # Masked epochs lie in the run's own folder, which may have been moved.
        other = run.masked if part.get("own") else Run(part["run"])
        if _is_there(other, part["checkpoint"]):
            found += [(part["run"], other), *forebears(other)]
        else:
            found.append((part["run"], None))
    weights = results.get("weights", {})
    if first := run_of_weights(weights):
        found += [(str(first), first), *forebears(first)]
    elif "results.json" in str(weights.get("scaling")):  # only a run has that beside its weights
        found.append((str(Path(weights["path"]).parent), None))
    return found


def _is_there(run, checkpoint):
    """Whether a Run is there with the checkpoint of this checksum."""
    return run.begun and run.checkpoint.exists() and run.checkpoint_sha256 == checkpoint


# ---------------------------------------------------------------- the split


def _same_split(other, config, sides, split):
    """Whether a run was trained and validated on the files of `sides`, proved by the checksum that it keeps.

    That of a table holds the findings, too; where others were asked, it is computed for those."""
    kept = other.results["split"]["fingerprint"]
    if kept == split["fingerprint"]:
        return True
    there = other.config
    if not (config.labels and there.labels) or there.classes == config.classes:
        return False
    index = tables.read_table(config.labels, Path(config.data_dir), there.classes, config)
    targets = dict(zip(index.files, index.targets.tolist()))
    labelled = []
    for side in sides:
        if not targets.keys() >= set(side.files):
            return False
        labelled.append(sorted((file, targets[file]) for file in side.files))
    return kept == sha256([there.classes, labelled])


def _other_split(flag, title, other, config, split):
    """The message on a run with another split: what differs, and what to do."""
    there, kept = other.config, other.results["split"]
    differ = [k for k in DECIDES if getattr(there, k) != getattr(config, k)]
    if config.labels == there.labels == "":
        differ = [k for k in differ if k != "classes"]
    listed = "; ".join(f"{DECIDES[k]} {_text(there, k)}, here {_text(config, k)}" for k in differ)
    if not listed:
        listed = (
            f"the files or labels have changed since: {kept['train']} + {kept['val']} images then, "
            f"{split['train']} + {split['val']} now"
        )
    again = "pretrain_mae.py" if flag == "--init" else "the teacher"
    advice = f"run {again} again with the settings of this run, or give this run those"
    if "undersample" in differ and config.undersample and flag == "--init":
        advice = "leave out --balance undersample-once here: the encoder saw no balanced set"
    return (
        f"{title} was trained on another split of these images ({listed}): validation and test here may "
        f"hold some that it learnt; {advice}"
    )


def _text(config, name):
    """A setting as text."""
    value = getattr(config, name)
    if isinstance(value, tuple):
        return " ".join(map(str, value)) or "as usual"
    return str(value) or "none"


def _refuse_other_pictures(title, other, config, sides):
    """InputError where a run's data folder is another one, in which files of the same names hold other
    pictures."""
    there = other.config
    if Path(there.data_dir).resolve() == Path(config.data_dir).resolve():
        return
    if not Path(there.data_dir).is_dir():
        say(
            f"note: {title} was trained on {there.data_dir}, which is not there any more; its files have the "
            "names of those here and are taken for the same"
        )
        return
    theirs = load_train_val(_seen_here(there, config), lambda line: None)[:2]
    for theirs_side, side in zip(theirs, sides):
        alike = len(same_images(theirs_side, (side,)))
        if alike < len(theirs_side):
            raise InputError(
                f"{title} was trained on {there.data_dir}, where {len(theirs_side) - alike} files hold other "
                f"pictures than those of the same names in {config.data_dir}, perhaps ones that validate or "
                "test here: train it again with this --data-dir"
            )


def _refuse_its_images(title, other, config, val, held_out):
    """InputError where the images that a run with another split was trained or validated on are among those
    that validate or test here, or `held_out`."""
    there = other.config
    if not Path(there.data_dir).is_dir():
        say(f"note: {title} was trained on {there.data_dir}, which is not there any more: it is not compared")
        return
    learnt = load_train_val(_seen_here(there, config), lambda line: None)[:2]
    held = {f"held out of {name} here": subset for name, subset in held_out.items()}
    known = {
        what: same_images(subset, learnt) for what, subset in (held | {"validation images here": val}).items()
    }
    listing, theirs = read_listing(config), read_listing(there)
    files = [file for side in learnt for file in side.files]
    known["test images here"] = twins.same_files(theirs.root, files, listing.root, listing.test_index.files)
    for what, files in known.items():
        if files:
            raise InputError(
                f"{title} learnt from {len(files)} images, {', '.join(files[:3])} and so on, that are {what}"
                ": give both trainings the same split, or name other images here"
            )


def _seen_here(there, config, **changes):
    """The DataConfig of a run with pictures prepared as here, and without masks of the lungs."""
    return replace(
        there,
        img_size=config.img_size,
        resize=config.resize,
        cache_dir=config.cache_dir,
        input="full",
        reads_lungs=False,
        **changes,
    )


# ---------------------------------------------------------------- other hospitals


def _refuse_other_sources(title, other, config, val, split, held_out):
    """InputError where a run's --also or --also-unlabelled hold images of validation, test or `held_out`."""
    there = other.config
    # The same files, cut alike, were compared with validation and test already.
    same = other.results["split"].get("also", {}) == split.get("also", {})
    if same and there.split_seed == config.split_seed:
        return
    # Otherwise every source that is still there is read again and compared with all that is held out here.
    settings = _seen_here(there, config, data_dir=config.data_dir, labels=config.labels)
    listing = read_listing(config)
    test_files = listing.test_index.files
    for text in (*there.also, *there.also_unlabelled):
        folder = text if text in there.also_unlabelled else text.partition(":")[0]
        if not Path(folder).is_dir():
            say(f"note: {title} also learnt from {folder}, which is not there any more: it is not compared")
            continue
        root, learnt = _learnt(text, text in there.also, settings)
        known = {}
        for name, subset in held_out.items():
            known[f"held out of {name} here"] = same_images(learnt, (subset,))
        known["validation images here"] = same_images(learnt, (val,))
        known["test images here"] = twins.same_files(root, learnt.files, listing.root, test_files)
        for what, files in known.items():
            if files:
                raise InputError(
                    f"{title} also learnt from {folder}: {len(files)} of its images, "
                    f"{', '.join(files[:3])} and so on, are {what}; train it without them, or name other "
                    "images here"
                )


def _learnt(text, labelled, settings):
    """(root, Subset) of what a run with these settings learnt from one of its sources."""
    if labelled:
        root, index = other_hospitals.read(text, settings)
    else:
        root, index = other_hospitals.read_unlabelled(text, settings)
    subset, readable, _ = load(settings, root, index, "also")
    if not labelled:
        return root, subset
    train, _ = cut(readable, settings.task, True, settings.val_share, settings.split_seed)
    return root, subset.take(np.asarray(train))


# ---------------------------------------------------------------- the images of a site


def refuse_seen(run, site, folder, moved):
    """InputError if the Subset `site` holds images that the run, or one it was made from, was trained or
    validated on. `moved`: settings of the data that are not as they were trained."""
    for name, other in [(str(run), run), *forebears(run)]:
        if other is None:
            say(f"note: {run} was made from {name}, which is not there any more: its images are not compared")
            continue
        # Images of other hospitals that joined training were learnt from, too.
        config = replace(other.config, **moved)
        train, val, _ = load_train_val(config, say)
        train = other_hospitals.join(config, train, val, say)[0]
        say_seen_patients(site, folder, name, {*train.patients, *val.patients})
        if known := same_images(site, (train, val)):
            trained = str(run) if other is run else f"{name}, from which {run} was made,"
            raise InputError(
                f"--site {folder}: {len(known)} images, {', '.join(known[:3])} and so on, are among those "
                f"that {trained} was trained and validated on: they can promise nothing"
            )
        if other is run and (tested := same_images(site, (load_test(config),))):
            say(
                f"note: --site {folder}: {len(tested)} of its images are test images of {run}: the figures "
                "of that test say nothing of thresholds chosen on them"
            )
        pairs = [*twins.alike(site, train), *twins.alike(site, val)]
        if pairs:
            say(
                f"note: --site {folder}: {len(pairs)} images look like images that {name} was trained or "
                f"validated on, such as {' and '.join(pairs[0])}: if they were saved anew, leave them out"
            )


def say_seen_patients(site, folder, name, seen):
    """A note if patients of the Subset `site`, known by their DICOM ids, are among those `seen` by a run."""
    shared = keyed(site.patients) & seen
    if shared:
        say(
            f"note: --site {folder}: {len(shared)} of its patients were seen when {name} was trained and "
            "validated (DICOM headers): leave them out, or the promises are too good"
        )
