"""Errors to look at: who was missed and who was called sick in vain, at @Rec, with pictures. No torch."""

import itertools
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from scipy.special import logit

from cohort import who
from common.console import InputError, printable
from common.scaling import SIDES
from common.task import ANY_DISEASE, ANY_FINDING, is_healthy
from layouts.folders import find_root
from report.page.pictures import map_picture, pictures

FALSE_POSITIVES = 24  # shown of each model, finding and side: those of highest score
MOST = 400  # cards of one test set
MISSED, IN_VAIN = "false negative", "false positive"
CAUSES = {"bacteria": "bacterial", "virus": "viral"}  # words in the file names of the Kaggle set


@dataclass
class Card:
    """An image that models of one test set got wrong about one finding.

    `path`: the file; `facts`: what is known of the patient and exposure, as texts; `groups`: the subgroups to
    filter by; `calls`: [(number of the model, score, logits above the threshold)]; `picture`: an address with
    the image, None where it cannot be read; `maps`: [(name of a model, address of explain.py's picture)]."""

    side: str
    finding: str
    kind: str
    file: str
    patient: str
    truth: str
    path: Path
    facts: list
    groups: list
    calls: list = field(default_factory=list)
    picture: str = None
    maps: list = field(default_factory=list)


@dataclass
class Gallery:
    """`models`: names; `cards`: list of Card; `counts`: {kind: how many errors there are}; `left_out`: {kind:
    how many of them no card shows}; `absent`: files that could not be read; `root`: where these were looked
    for; `healthy`: findings that are the absence of any ("No Finding"), which have no cards."""

    models: list
    cards: list
    counts: Counter
    left_out: Counter
    absent: int = 0
    root: str = ""
    healthy: list = field(default_factory=list)

    @property
    def held(self):
        """How many pictures of patients there are, maps apart."""
        return sum(card.picture is not None for card in self.cards)

    @property
    def findings(self):
        """The findings that cards are about, in order."""
        return list(dict.fromkeys(card.finding for card in self.cards))

    @property
    def choices(self):
        """What cards can be filtered by: [(role, label, what all are called, [(value, text), ...])]. A choice
        among one thing is left out."""
        groups = sorted({group for card in self.cards for group in card.groups})
        found = [
            ("kind", "Error", "both kinds", [(kind, f"{kind}s") for kind in (MISSED, IN_VAIN)]),
            ("side", "Side", "both sides", [(side, SIDES[side]) for side in ("test", "val")]),
            ("model", "Model", "any model", list(enumerate(self.models))),
            ("finding", "Finding", "every finding", [(name, name) for name in self.findings]),
            ("group", "Subgroup", "everybody", [(name, name) for name in groups]),
        ]
        return [choice for choice in found if len(choice[3]) > 1]


def gallery(entries, asked):
    """The Gallery of one test set; `asked`: the groups of patients (who.Asked)."""
    cards, counts, left_out = {}, Counter(), Counter()
    roots = [root_of(entry) for entry in entries]
    # First which images have a card, then every model that is wrong about one of them.
    for number, entry, k, side, kind, positions in wrong_calls(entries):
        counts[kind] += len(positions)
        if kind == IN_VAIN:
            positions = positions[:FALSE_POSITIVES]
        for i in positions:
            key = side, entry.findings[k], kind, str(entry.columns[side].files[i])
            if key not in cards:
                cards[key] = card_of(entry, k, side, kind, i, roots[number], asked)
    maps = [{side: maps_of(entry, side) for side in SIDES} for entry in entries]
    for number, entry, k, side, kind, positions in wrong_calls(entries):
        for i in positions:
            card = cards.get((side, entry.findings[k], kind, str(entry.columns[side].files[i])))
            if card is None:
                left_out[kind] += 1
            else:
                add_call(card, number, entry, k, i, maps[number][side])
    ordered = sorted(cards.values(), key=rank)
    for card in ordered[MOST:]:
        left_out[card.kind] += len(card.calls)
    shown = ordered[:MOST]
    found = pictures([card.path for card in shown], "pictures of errors")
    for card in shown:
        card.picture = found[card.path]
    absent = sum(address is None for address in found.values())
    places = ", ".join(dict.fromkeys(map(str, roots)))
    healthy = [finding for finding in entries[0].findings if is_healthy(finding)]
    return Gallery([e.name for e in entries], shown, counts, left_out, absent, places, healthy)


def wrong_calls(entries):
    """Yield (number of the entry, the entry, number of the finding, side, kind, positions of the images) of
    all `errors`. "No Finding" is left out: whom it misses is not sick, and "any finding" has the rest."""
    for number, entry in enumerate(entries):
        sick = [k for k, finding in enumerate(entry.findings) if not is_healthy(finding)]
        for k, side in itertools.product(sick, SIDES):
            for kind, positions in errors(entry, k, side).items():
                yield number, entry, k, side, kind, positions


def rank(card):
    """The order of cards: false negatives first, test first, those of the most models first, then those
    farthest from the threshold."""
    farthest = max(abs(distance) for _, _, distance in card.calls)
    return card.kind != MISSED, card.side != "test", -len(card.calls), -farthest, card.file


def root_of(entry):
    """The folder that the names of a run's images are relative to."""
    settings = entry.results["data"]
    folder = str(settings.get("data_dir", ""))
    if settings.get("labels"):
        return Path(folder)
    try:
        return find_root(folder, tuple(settings["classes"]))
    except InputError:  # moved, or on another machine: the pictures are counted as absent
        return Path(folder)


def errors(entry, k, side):
    """{kind: positions of the images of a side} that finding number k is wrong about at @Rec, farthest from
    the threshold first; without a threshold, none."""
    threshold = entry.calibrated[entry.findings[k]].get("threshold")
    if threshold is None:
        return {}
    column = entry.columns[side]
    truth, scores = column.truth[:, k], column.scores[:, k]
    missed = np.flatnonzero((truth == 1) & (scores < threshold))
    in_vain = np.flatnonzero((truth == 0) & (scores >= threshold))
    return {
        MISSED: missed[np.argsort(scores[missed], kind="stable")],
        IN_VAIN: in_vain[np.argsort(-scores[in_vain], kind="stable")],
    }


def add_call(card, number, entry, k, i, maps):
    """Add to a card what one model says of its image, with the maps of it."""
    score = float(entry.columns[card.side].scores[i, k])
    threshold = entry.calibrated[card.finding]["threshold"]
    ends = np.clip([score, threshold], 1e-16, 1 - 1e-16)  # the log odds of 0 and 1 are infinite
    card.calls.append((number, score, float(np.subtract(*logit(ends)))))
    if (path := maps.get(Path(card.file).stem.casefold())) and (address := map_picture(path)):
        card.maps.append((entry.name, address))


def maps_of(entry, side):
    """{stem of a file: picture of explain.py} of a side, where explain.json is of this checkpoint. Stems that
    several files of the side share are left out: the picture's name would not tell whose it is."""
    reports = {} if entry.suffix else entry.run.explained()
    if reports.get(side, {}).get("checkpoint") != entry.calibration["checkpoint"]:
        return {}
    stems = Counter(Path(str(file)).stem.casefold() for file in entry.columns[side].files)
    found = entry.run.explained_folder(side).glob("*.png")
    return {path.stem.casefold(): path for path in found if stems[path.stem.casefold()] == 1}


def card_of(entry, k, side, kind, i, root, asked):
    """A new Card of image number i of a side, about finding number k."""
    column, finding = entry.columns[side], entry.findings[k]
    file, patient = str(column.files[i]), str(column.patients[i])
    facts, groups = told_of(entry, side, i, asked)
    return Card(
        side=side,
        finding=finding,
        kind=kind,
        file=file,
        patient=patient if patient != file else "",
        truth=truth_text(entry, k, column.truth[i]),
        path=Path(root, file),
        facts=facts,
        groups=groups,
    )


def truth_text(entry, k, truth):
    """What an image shows, as text. truth [F]: 1, 0, or -1 for unknown."""
    finding = entry.findings[k]
    shown = [name for name, value in zip(entry.findings, truth) if value == 1]
    named = [name for name in shown if name not in (ANY_DISEASE, ANY_FINDING)]
    if truth[k] == 1:
        return ", ".join(named or [finding])
    return ", ".join([entry.absent(finding), *named])


def told_of(entry, side, i, asked):
    """(what is known of image number i of a side, the subgroups that it is in), as texts."""
    facts, groups = [], []
    for name in dict.fromkeys([*who.ATTRIBUTES, *asked.columns]):
        values = entry.cohort[side].get(name) if entry.cohort[side] else None
        if values is None or str(values[i]) in ("", "nan"):
            continue
        value = values[i]
        text = f"{value:g}" if name == "age" else str(value)
        facts.append(f"{name} {text}")
        groups.append(f"{name} {who.label_of(name, value, asked.bands)}")
    for word, cause in CAUSES.items():
        if word in str(entry.columns[side].files[i]).lower():
            facts.append(cause)
            groups.append(cause)
    return facts, [printable(group) for group in groups]
