"""What results.json says of a split: counts, patients on two sides, where test comes from."""

from pathlib import Path

from sklearn.model_selection import train_test_split

from common import prelude  # noqa: F401  (first: see there)
from common.console import say
from common.files import sha256


def describe(config, root, train, val, test, kept, test_from):
    """The "split" of a results.json, but for the sizes of the originals."""
    sides, seen = {"train": train, "val": val, "test": test}, set(train.patients)
    either = seen | set(val.patients)
    sigmoid = config.task.kind == "sigmoid"
    counts = {
        s: {
            c: int(((i.targets[:, k] == 1) if sigmoid else (i.targets == k)).sum())
            for k, c in enumerate(config.classes)
        }
        for s, i in sides.items()
    }
    info = {
        **{s: len(i.files) for s, i in sides.items()},
        "counts": counts,
        "shared_patients": sum(patient in seen for patient in val.patients),
        "unknown_patients": kept.unknown,
        "fingerprint": sha256([sorted(train.files), sorted(val.files)]),
        "test_from": test_from,
        "synthetic": Path(root, "SYNTHETIC").exists(),  # demo.py leaves it in what it draws
        "set": root.resolve().name,
    }
    if sigmoid:
        labelled = [sorted(zip(i.files, i.targets.tolist())) for i in (train, val)]
        info["fingerprint"] = sha256([config.classes, labelled])
    # The published parts of a set of folders number their patients separately.
    if test_from != "published" or config.labels or config.patients:
        info["shared_patients_test"] = sum(patient in either for patient in test.patients)
    return info


def _count_text(counts):
    """ "3 A + 5 B", of many findings the first few."""
    items = [f"{n} {c}" for c, n in counts.items()]
    return " + ".join(items[:6]) + (f" + {len(items) - 6} more" if len(items) > 6 else "")


def _say_absent(task, info):
    """A note on findings that no training image, or every one, has."""
    total = info["train"]
    never = [c for c, n in info["counts"]["train"].items() if n == 0]
    always = [c for c, n in info["counts"]["train"].items() if n == total]
    for names, text in ((never, "no training image has"), (always, "every training image has")):
        if names and task.kind == "sigmoid":
            say(f"note: {text} {', '.join(names)}, so nothing can be learnt about it")


def _say_inexact(targets, config, have):
    """A note if whole patients do not add up to the class counts of a stratified split of images."""
    _, plain = train_test_split(
        targets, test_size=config.val_share, stratify=targets, random_state=config.split_seed
    )
    want = [int((plain == k).sum()) for k in range(len(config.classes))]
    if want != have:
        say(f"note: whole patients allow no exact stratified split: validation has {have}, nearest to {want}")
