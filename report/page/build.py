"""Blocks -> one self-contained page: Jinja2 templates, style.css and page.js, all embedded. No torch.

The page fetches nothing, and its security policy forbids it to: only the style and the script that are
embedded here may act, known by their checksums. Jinja2 escapes whatever a template shows, so names may hold
anything.
"""

import base64
import hashlib
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from common.console import printable
from report.page.gallery import IN_VAIN, MISSED, MOST, Gallery, gallery
from report.page.numbers import Store, panel, quantiles
from report.render import TITLE, Heading, Link, anchors, destinations, parts_of, plain_text

FOLDER = Path(__file__).parent
IN_SHORT = "In short"  # the heading of the part that the threshold by hand follows
BY_HAND, TO_LOOK_AT = "Threshold by hand", "Errors to look at"


class Panel(NamedTuple):
    """The threshold by hand of one test set. `data`: numbers.panel; `notes`: what was left out."""

    data: dict
    notes: list


class Errors(NamedTuple):
    """The errors of one test set to look at."""

    gallery: Gallery


def interactive(blocks, view, store, with_gallery):
    """The blocks of one test set with the threshold by hand after "In short" and, `with_gallery`, the errors
    to look at in the end. `view`: a report.view.View; `store`: the numbers.Store of the page."""
    data, notes = panel(view.shown, store)
    by_hand = [Heading(3, BY_HAND), Panel(data, notes)] if data["models"] or notes else []
    place = end_of_part(blocks, IN_SHORT)
    found = [*blocks[:place], *by_hand, *blocks[place:]]
    if with_gallery:
        found += [Heading(3, TO_LOOK_AT), Errors(gallery(view.detailed, view.asked))]
    return found


def end_of_part(blocks, heading):
    """The position after the part of `blocks` under a heading; without it, before the second Heading of level
    3, or the end."""
    places = [i for i, block in enumerate(blocks) if isinstance(block, Heading) and block.level == 3]
    titles = [plain_text(blocks[i].text) for i in places]
    first = titles.index(heading) if heading in titles else 0
    return places[first + 1] if first + 1 < len(places) else len(blocks)


# ---------------------------------------------------------------- rendering


def embedded(path):
    """A PNG file as the text of an address."""
    return "data:image/png;base64," + base64.b64encode(Path(path).read_bytes()).decode()


def shown_parts(value, leads):
    """[(kind, text, target)] of a cell or paragraph; kind: "str", "Code", "Best", "Bad" or "Link"."""
    found = []
    for part in parts_of(value):
        if isinstance(part, Link):
            target = leads.get(part.target)  # None: a section that this report does not have
            found.append(("Link" if target else "str", part.text, target))
        else:
            found.append((type(part).__name__, part, ""))
    return found


def short(score):
    """A score with three decimals, or two digits if it is smaller than that."""
    return f"{score:.3f}" if score >= 0.001 else f"{score:.1e}"


def policy(style, script):
    """The Content-Security-Policy of a page: nothing is fetched, and no other style or script acts."""
    hashes = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in (style, script)]
    return (
        f"default-src 'none'; img-src data:; style-src 'sha256-{hashes[0]}'; "
        f"script-src 'sha256-{hashes[1]}'; base-uri 'none'; form-action 'none'"
    )


def valid_text(value):
    """What a template shows, as one line of valid Unicode; what is marked as safe stays as it is."""
    if isinstance(value, str) and not isinstance(value, Markup):
        return printable(value)
    return value


def render(template, **values):
    """A template of this folder -> the text of a page."""
    environment = Environment(
        loader=FileSystemLoader(FOLDER),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        finalize=valid_text,
    )
    environment.globals |= {"embedded": embedded, "parts": shown_parts, "plain": plain_text}
    environment.filters["short"] = short
    style, script = (FOLDER.joinpath(name).read_text("utf-8") for name in ("style.css", "page.js"))
    page = {"style": style, "script": script, "policy": policy(style, script)}
    return environment.get_template(template).render(**page, **values)


def to_html(blocks, synthetic, store=None):
    """Blocks, those of `interactive` among them -> one self-contained page. `store`: the numbers.Store that
    these share."""
    named, leads, around = anchors(blocks), destinations(blocks), ""
    shown, sets, galleries = [], [], []
    for i, block in enumerate(blocks):
        item = {"kind": type(block).__name__, "is": block, "anchor": named.get(i, ""), "leads": leads[i]}
        if isinstance(block, Heading):
            around = plain_text(block.text)
        elif isinstance(block, Panel):
            item["number"] = len(sets)
            sets.append(block.data)
        elif isinstance(block, Errors):
            item |= {"number": len(galleries), "words": gallery_words(block.gallery)}
            galleries.append(block.gallery)
        shown.append(item | {"around": around})
    maps = [[card.maps for card in each.cards] for each in galleries]
    data = {"sets": sets, "arrays": (store or Store()).texts, "z": quantiles(), "maps": maps}
    contents = [item for item in shown if item["kind"] == "Heading" and item["is"].level in (2, 3)]
    return render(
        "page.html",
        title=TITLE,
        blocks=shown,
        contents=contents,
        synthetic=synthetic,
        data=data,
        pictures=pictures_text(galleries),
    )


def pictures_text(galleries):
    """How many pictures of patients a page holds, as text."""
    maps = len({address for each in galleries for card in each.cards for _, address in card.maps})
    held = sum(each.held for each in galleries)
    if not held + maps:
        return "This page holds no pictures of patients."
    with_maps = f", and {maps} with maps of explain.py" if maps else ""
    return (
        f"This page holds {held} pictures of patients{with_maps}, with their file names: share it as you "
        "would share the images. compare.py --no-gallery leaves them out."
    )


def gallery_words(found):
    """What a gallery shows and what it leaves out, as a list of sentences."""
    counts, left_out = found.counts, found.left_out
    models = "the model makes" if len(found.models) == 1 else f"these {len(found.models)} models make"
    words = [
        f"At @Rec, {models} {counts[MISSED]} {MISSED}s and {counts[IN_VAIN]} {IN_VAIN}s on validation and "
        "test together. A card is one image and finding. It lists the models that are wrong about it, with "
        "their score and, in brackets, how far it lies from their threshold, in log odds."
    ]
    missing = [f"{count} {kind}s" for kind, count in Counter(left_out).items() if count]
    if missing:
        words.append(
            f"Left out: {' and '.join(missing)}. Of each model, finding and side the false positives of "
            f"highest score are shown, and at most {MOST} cards."
        )
    if found.healthy:
        words.append(f"{', '.join(found.healthy)} has no cards: its errors are those of any finding, turned.")
    if found.absent:
        files = len({card.path for card in found.cards})
        words.append(
            f"{found.absent} of {files} image files cannot be read any more under {found.root}: their cards "
            "have no picture."
        )
    return words
