"""Ask a run whether it looks at the lungs, or at the machine.

    python audit.py --run outputs/pretrained

Takes the validation images (--side test on request) and asks five questions. Does the border decide? Are the
lungs needed? What else do the features tell? Does the threshold hold under thirteen changes of exposure,
sharpness and framing? Are the false alarms of one kind of patients? Each ends in a verdict, kept, open or
broken, and a sentence with its figures; docs/AUDIT.md has the rules.

Writes audit.json into the run folder, which compare.py shows, and audit-SIDE-clusters.png: typical patients of
the group with the most false alarms. What an earlier call found of other sections, of the other side and of
other findings stays. About ten minutes on two cores for a ViT-Ti/16 and 1,000 images.

Any classifier can be audited; sections 4 and 5 need a threshold (calibrate.py). An audit can find a shortcut,
not prove that there is none.
"""

import common.prelude  # noqa: F401  (first: see there)

import numpy as np

from auditing import clusters, looks, rules, signals
from auditing.reader import Change, Reader
from auditing.record import KEYS, NAME, TITLES, kept_of, audit_of, save_side
from auditing.sheet import draw_sheet
from auditing.side import side_of
from calibration.pooling import plural_of, unit_of
from common.cli import COUNT, Number, Parser
from common.console import InputError, say, start
from common.device import add_device_argument, pick_device
from common.proportions import count_of
from data import add_moved_arguments, load_split, read_listing
from images.subset import Subset
from layouts.tables import find_table
from records.run import Run

SIDES = {"val": "validation", "test": "test"}
CORRUPTED = 2  # the images of section 4 are at most this part of all: it scores each thirteen times


class Audit:
    """The sections asked for, on a Side, by a Reader: `changes` lists what is to be scored, `lines` says what
    follows from the scores. What cannot be run is noted in `left_out` {key: why}."""

    def __init__(self, side, reader, sections, most):
        self.side, self.reader, self.sections = side, reader, sections
        self.left_out, self.figures, self.lungs = {}, {}, None
        half = side_positions(side, max(1, most // CORRUPTED))
        self.corrupted = half
        self.check()

    def check(self):
        """Fill in `left_out`, before anything is scored."""
        for key in self.sections:
            why = ""
            if key in ("border", "lungs", "corruptions"):
                why = self.side.too_few
            if key in ("border", "corruptions"):
                why = why or self.reader.why_no_changes
            if key in ("corruptions", "clusters") and self.reader.threshold is None:
                why = self.reader.why_not
            if why:
                self.left_out[key] = why

    def runs(self, key):
        return key in self.sections and key not in self.left_out


def main():
    print("draft")


if __name__ == "__main__":
    start(main)
