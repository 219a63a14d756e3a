"""Choose each run's threshold on validation, recall first, and apply it, unchanged, to test.

    python calibrate.py --min-recall 0.95

For every finished run under outputs/ (or --run DIR ...), scores the validation images and chooses two
thresholds there. @Rec has the highest precision among thresholds with recall >= --min-recall. @Guar has a
true recall >= --min-recall with probability --guarantee, for patients like the validation patients. Each
lies in the middle between two validation scores, so that rounding changes no decision there. Of several
findings, each gets both; --jointly asks that all guarantees hold at once. --min-specificity 0.95 adds @In,
of highest recall with that specificity: below @Rec negative, from @In on positive, between them unsure.

Then scores the test images (no other script opens them for that) and prints both sides with intervals.
Writes scores.npz, calibration.json and, for spreadsheets, predictions.csv into the run folder (with --tta:
scores-tta.npz and so on). --by study or patient takes the images of a study or patient together. Scores are
kept while model, images, labels and patients are unchanged, so another --min-recall takes seconds. A run
that cannot be read is passed over with a note; the exit code is then 2 if --run named it.

    python calibrate.py --ensemble outputs/scratch-seed0 outputs/scratch-seed1 --out outputs/scratch-ensemble

first makes one run of several: its probability is the mean of theirs.
"""

import common.prelude  # noqa: F401  (first: see there)

from dataclasses import replace
from functools import partial

import data
from calibration import site
from calibration.ensemble import make_ensemble
from calibration.operating_point import SIDES, Rule, evaluate
from calibration.pooling import BY, PLURAL, POOLS, remarks, say_scaling, spread_over_images, units_of
from calibration.scores import each_run, score
from calibration.wording import shared_text, show
from cohort import who
from common import scaling
from common.cli import COUNT, Number, Parser, check_name
from common.console import InputError, command_line, notes_once, say, start
from common.device import add_device_argument, pick_device
from common.files import CALIBRATION
from data import load_test, load_train_val, refuse_other_images
from layouts.asked import add_moved_arguments, moved_settings
from models.inputs import Inputs
from records.predictions import write_predictions
from records.run import WITHOUT_CLASSES
from records.track import Tracker, add_track_argument
from report.tables.classes import printed_text
from training import other_hospitals


class Sets:
    """Validation and test Subsets by data settings, each loaded, and each description of a split printed,
    once."""

    def __init__(self):
        self.loaded, self.copies, self.told = {}, {}, set()

    def tell(self, line):
        """Print a line that was not printed yet."""
        if line not in self.told:
            self.told.add(line)
            print(line)

    def of(self, config, fingerprint):
        """(training, validation, test); InputError if the split is not the one with this fingerprint."""
        if config not in self.loaded:
            train, val, split = load_train_val(config, self.tell)
            self.loaded[config] = (train, val, load_test(config)), split["fingerprint"]
        sets, fingerprint_here = self.loaded[config]
        refuse_other_images(config, fingerprint_here, fingerprint, "the run")
        return sets

    def alike(self, config):
        """How many images look the same on two sides (sources.look_alikes), of settings that were loaded."""
        if config not in self.copies:
            self.copies[config] = other_hospitals.look_alikes(config, *self.loaded[config][0])
        return self.copies[config]


# ---------------------------------------------------------------- main


EVERYDAY = (  # what --help shows; --help-all shows the rest
    *("--min-recall", "--min-specificity", "--guarantee", "--jointly"),
    *("--by", "--temperature", "--prevalence"),
    *("--run", "--runs-dir", "--ensemble", "--out", "--overwrite"),
    *("--site", "--name", "--report", "--labels", "--patients"),
    *("--tta", "--tta-flip", "--data-dir", "--skip-bad", "--device"),
)


BETWEEN = Number(float, 0, 1, above=True, below=True)


def add_rule_arguments(parser):
    """The flags of the operating point."""
    group = parser.add_argument_group("threshold")
    group.add_argument(
        "--min-recall",
        type=Number(float, 0, 1, above=True),
        default=0.95,
        metavar="X",
        help="recall floor on validation, in (0, 1]",
    )
    group.add_argument(
        "--min-specificity",
        type=Number(float, 0, 1, above=True),
        metavar="X",
        help="also choose @In, of highest recall with this specificity on validation, in (0, 1]: from it on "
        "positive, below @Rec negative, between them unsure (default: two answers)",
    )
    group.add_argument(
        "--guarantee",
        type=BETWEEN,
        default=None,
        metavar="CONFIDENCE",
        help="confidence, in (0, 1), that the guaranteed threshold keeps --min-recall (and another "
        "--min-specificity); if given, too few patients are an error (default: 0.95, left out where there "
        "are too few)",
    )
    group.add_argument(
        "--jointly",
        action="store_true",
        help="all guaranteed floors, of several findings or of recall and specificity, hold at once with the "
        "confidence of --guarantee",
    )
    add_score_arguments(group)


def add_score_arguments(group):
    """The flags of what thresholds apply to, and of the figures."""
    group.add_argument(
        "--by",
        choices=BY,
        help="what thresholds, promises and figures are for: a study's or patient's score is that of its "
        "images together, and it is sick if any of them is labelled so (default: image; with --site: as the "
        "run)",
    )
    group.add_argument(
        "--pool",
        choices=POOLS,
        help="with --by study or patient: its highest score, or the mean (default: max)",
    )
    group.add_argument(
        "--temperature",
        nargs="?",
        const="scale",
        choices=("scale", "platt"),
        metavar="scale|platt",
        help="turn scores into probabilities, by what fits validation best: scale divides all logits by a "
        "temperature; platt gives each finding's log odds a slope and a bias, which undoes class weights, "
        "and decisions at 0.5 change (default: neither; --temperature alone: scale)",
    )
    group.add_argument(
        "--bootstrap",
        type=Number(int, 100, 10**6),
        default=2000,
        metavar="N",
        help="draws of the patient bootstrap",
    )
    group.add_argument(
        "--prevalence",
        type=BETWEEN,
        default=0.1,
        metavar="X",
        help="share of the sick assumed for PPV and NPV, in (0, 1)",
    )


def add_run_arguments(parser):
    """The flags that name runs and what becomes of them."""
    group = parser.add_argument_group("runs")
    group.add_argument("--run", nargs="+", metavar="DIR", help="run folders (default: all under --runs-dir)")
    group.add_argument("--runs-dir", default="outputs", metavar="DIR", help="where the run folders lie")
    group.add_argument(
        "--ensemble",
        nargs="+",
        metavar="DIR",
        help="run folders: make one run of them in --out, and calibrate it; they may differ in --input",
    )
    group.add_argument("--out", metavar="DIR", help="folder of the run that --ensemble makes")
    group.add_argument("--overwrite", action="store_true", help="replace a run that is already in --out")
    add_track_argument(group)
    group = parser.add_argument_group("another hospital")
    group.add_argument(
        "--site",
        metavar="DIR",
        help="choose thresholds on the images of this folder: a folder for each class, or --labels",
    )
    group.add_argument("--name", metavar="WHERE", help="name of these thresholds, for predict.py --site")
    group.add_argument(
        "--report",
        action="store_true",
        help="with --site: also choose on half of its patients and test on the others, and show figures of "
        "groups of patients",
    )
    who.add_arguments(group)


def add_image_arguments(parser):
    """The flags of the images: where they are now, and how they are scored."""
    group = parser.add_argument_group("images")
    group.add_argument("--tta", action="store_true", help="average scores over small shifts and zooms")
    group.add_argument("--tta-flip", action="store_true", help="mirrored views, too; implies --tta")
    add_moved_arguments(group)
    group.add_argument(
        "--skip-bad", action="store_true", help="leave out unreadable images (default: as trained)"
    )
    group.add_argument(
        "--verify-cache",
        action="store_true",
        help="read the whole cache at the start, to see that it is intact",
    )
    group.add_argument("--batch-size", type=COUNT, default=64, metavar="N", help="images a step")
    add_device_argument(group)


def parse():
    """Checked command line -> (args, Rule)."""
    parser = Parser(__doc__, EVERYDAY)
    add_rule_arguments(parser)
    add_run_arguments(parser)
    add_image_arguments(parser)
    args = parser.parse_args()
    if bool(args.ensemble) != bool(args.out) or args.ensemble and args.run:
        raise InputError("--ensemble RUN RUN ... and --out DIR belong together, without --run")
    if bool(args.site) != bool(args.name) or args.site and args.ensemble or args.report and not args.site:
        raise InputError("--site DIR and --name WHERE belong together, without --ensemble")
    # A site's thresholds are for the scores that the run gives now.
    if args.site and args.track:
        raise InputError("--track follows a run, not a site: leave it out, or leave out --site")
    if args.site and args.temperature:
        raise InputError(
            "--temperature belongs to the run, whose scores a site takes over: calibrate the run with it "
            "first, and then give --site without it"
        )
    if not args.report and (args.subgroups or args.age_bands != who.age_bands()):
        raise InputError("--subgroups and --age-bands belong to --site DIR --report, or to compare.py")
    check_name("--name", args.name)
    if args.name and args.name.endswith("-tta"):
        raise InputError(f"--name {args.name}: thresholds with --tta get the ending -tta themselves")
    if args.pool and args.by in (None, "image") and not args.site:
        raise InputError("--pool says how the images of --by study or --by patient are put together")
    rule = Rule(
        min_recall=args.min_recall,
        confidence=args.guarantee or 0.95,
        strict=args.guarantee is not None,
        jointly=args.jointly,
        temperature=args.temperature == "scale",
        platt=args.temperature == "platt",
        bootstrap=args.bootstrap,
        prevalence=args.prevalence,
        by=args.by or "image",
        pool=args.pool or "max",
        min_specificity=args.min_specificity,
    )
    return args, rule


def settings(args, results):
    """The DataConfig of a run with these results, from where the flags say that its images lie now."""
    config = data.DataConfig.from_json(results["data"])
    return replace(config, **moved_settings(args, config.data_dir, "skip_bad", "verify_cache"))


def images(sets, args, results):
    """The three Subsets of a run with these results."""
    return sets.of(settings(args, results), results["split"]["fingerprint"])


def main():
    with notes_once():  # what is said of the images belongs to all runs
        run_all(*parse())


def run_all(args, rule):
    """What the command line asks for, for every run."""
    say_scaling(rule)
    device, sets, asked = pick_device(args.device), Sets(), None
    if args.tta or args.tta_flip:
        asked = {"flip": args.tta_flip}
    if args.site:
        return site.calibrate(args, rule, device, asked)
    if args.ensemble:
        ready = partial(images, sets, args)
        args.run = [make_ensemble(args.ensemble, args.out, args.overwrite, ready).folder]

    def calibrated(run):
        """(the scores of a Run, what they give), (None, None) where its calibration stays as it is."""
        if run.kind in WITHOUT_CLASSES:
            raise InputError(f"{run} is of kind {run.kind!r}: it has no classes to score")
        _ = run.config  # InputError, by its name, for a run that only an older version reads
        tta = scaling.asked_views(asked, run)
        if asked and tta is None and "" in run.calibrated():
            say(f"note: {run} keeps its calibration: without --tta it is calibrated anew")
            return None, None
        three = images(sets, args, run.results)
        scores = score(run, three, device=device, batch_size=args.batch_size, tta=tta)
        origin = {
            "tta": tta or scaling.own_views(run.results),
            "alike": sets.alike(settings(args, run.results)),
            "precision": Inputs.of_run(run.results, device, tta).precision,
        }
        return scores, calibrate_run(run, scores, rule, origin)

    promised = set()
    try:
        for run, (scores, result) in each_run(args.runs_dir, args.run, calibrated):
            if scores is None:
                continue
            tracker = Tracker(args.track, run)
            tracker.calibrated(result)
            tracker.close()
            for line in remarks(scores, rule, run.task):
                sets.tell(line)
            sets.tell("\n" + shared_text(result))
            show(title_of(run, result), result)
            show_classes(scores, result, rule, run.task)
            promised |= guaranteed_points(result)
    finally:  # also where a run that was asked for by name is passed over
        if promised:
            print(
                f"\n{' and '.join(sorted(promised))}: for patients like the validation patients. No "
                "guarantee survives a shift: compare the validation and test lines."
            )


def calibrate_run(run, scores, rule, origin):
    """Choose the thresholds of a Run from its scores, and keep them -> the content of calibration.json.

    `origin`: what else decided the scores, as JSON. InputError, naming the run, where the rule cannot be met.
    """
    try:
        result, p1 = evaluate(scores, rule, run.task)
    except InputError as error:
        raise InputError(f"{run}: {error}") from None
    result |= {
        "format": CALIBRATION,
        "checkpoint": run.checkpoint_sha256,
        "synthetic": run.results["synthetic"],
        **origin,
        "command": command_line(),
    }
    # The scores that thresholds apply to are kept beside the logits: reports need no torch.
    thresholds_apply_to = {f"{side}_p1": p1[side] for side in SIDES}
    name = scaling.calibration_name(origin["tta"], run)
    run.save_calibration(result, scores | thresholds_apply_to, name)
    spread = spread_over_images(scores, p1, rule, run.task)
    write_predictions(run.predictions_file(name), run.task, result, scores, p1, spread)
    return result


def show_classes(scores, calibration, rule, task):
    """Print precision, recall and F1 of every class on test."""
    units = units_of(scores, "test", rule.by, rule.pool)
    truth = units.truth(task.truth(scores["test_labels"]))
    p1 = units.scores(task.scores_from(scores["test_logits"], calibration))
    if text := printed_text(task, calibration, truth, p1, PLURAL[rule.by]):
        print(text)


def guaranteed_points(calibration):
    """Those of "@Guar" and "@InGuar" that any finding of a calibration has: a set."""
    points = set()
    for of_finding in calibration["findings"].values():
        if of_finding.get("guarantee", {}).get("threshold") is not None:
            points.add("@Guar")
        if of_finding.get("rule_in", {"guarantee": {}})["guarantee"].get("threshold") is not None:
            points.add("@InGuar")
    return points


def title_of(run, calibration):
    """What the printed figures of a run are called."""
    title, views = str(run), calibration["tta"]
    if scaling.calibration_name(views, run):
        title += " with TTA"
    elif views:
        title += f", whose score is {scaling.views_in_words(views)}"
    if run.results["synthetic"]:
        title += " (SYNTHETIC data)"
    return title


if __name__ == "__main__":
    start(main)
