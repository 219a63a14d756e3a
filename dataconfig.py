"""Which images are seen, how, and what is asked: DataConfig, from flags or from a results.json."""

from dataclasses import asdict, dataclass

import index as indices
import masks as lung_masks
import tables
from common import InputError, Number, add_flags, check_fields, flag, say
from images import RESIZES
from inputs import MODES
from lungs import LOOKS
from split import POOLED
from task import CLASSES, Task

DEFAULT_DIR = "Data/chest_xray"
KAGGLE = "paultimothymooney/chest-xray-pneumonia"
SPLITS = ("patient", "image", "published", *POOLED)
IMG_SIZE = Number(int, 1, 2048)
FRACTION = Number(float, 0, 1, above=True, below=True)


@dataclass(frozen=True)
class DataConfig:
    """Everything that decides which images are seen, how, and what is asked; kept in results.json.

    `classes`: of class folders, the healthy one first; with `labels`, the findings asked. `fractions`: of
    train, validation and test, () for the usual ones."""

    data_dir: str = flag(
        DEFAULT_DIR, "folder with train/ and test/, or of the images of --labels", metavar="DIR"
    )
    img_size: int = flag(224, "side of the square input (default: 224; of the drawn set 96)", IMG_SIZE, "PX")
    resize: str = flag("squash", "non-square originals: distort, letterbox, or cut to the middle", RESIZES)
    split: str = flag(
        "patient",
        "validation: whole patients, single images, or the published val/; pooled: train and test are put "
        "together and cut anew, by patient or by image",
        SPLITS,
    )
    split_seed: int = flag(0, "seed of the split", Number(int, 0, 2**32 - 1), "N")
    val_fraction: float = 0.2
    skip_bad: bool = flag(False, "leave out unreadable images instead of stopping")
    cache_dir: str = flag("Data/cache", "where decoded images are kept", metavar="DIR")
    verify_cache: bool = flag(False, "read the whole cache at the start to see that it is intact")
    classes: tuple = CLASSES
    normalise: str = flag("none", "exposure: as it is, to one mean and spread, or a flat histogram", MODES)
    input: str = flag(
        "full",
        "what the model sees: everything, the lungs' box, the lungs (the rest grey), both, or, as a control, "
        "everything but the lungs",
        LOOKS,
    )
    lungs: str = flag(
        lung_masks.SHIPPED,
        "where --input and the hybrid take lung masks from: weights of train_lungs.py, heuristic, or a .npz",
        metavar="SOURCE",
    )
    labels: str = flag(
        "", "table of findings instead of class folders: NIH's, or path,patient,FINDING,...", metavar="CSV"
    )
    patients: str = flag("", "table path,patient, where file names do not tell the patient", metavar="CSV")
    fractions: tuple = ()
    also: tuple = ()  # DIR or DIR:LABELS.csv of other hospitals, for training
    also_unlabelled: tuple = ()
    lungs_sha256: str = ""  # of the source of masks, where they are needed
    reads_lungs: bool = False  # the model is given the masks themselves, too
    undersample: bool = False  # pooled splits: as many images of each class as of the rarest, before the cut

    @property
    def needs_lungs(self):
        """Whether the images must come with masks of the lungs."""
        return self.input != "full" or self.reads_lungs

    @property
    def task(self):
        return Task(self.classes, "sigmoid" if self.labels else "softmax")

    @property
    def shares(self):
        """The fractions of train, validation and test that a split aims at."""
        if self.fractions:
            return self.fractions
        if self.split in POOLED:
            return 0.6, 0.2, 0.2
        rest = 0.8
        return (
            (0.7, 0.1, 0.2)
            if self.labels
            else (rest * (1 - self.val_fraction), rest * self.val_fraction, 0.2)
        )

    @property
    def val_share(self):
        """Validation's fraction of all that is not test."""
        if not self.fractions and not self.labels and self.split not in POOLED:
            return self.val_fraction
        return self.shares[1] / (self.shares[0] + self.shares[1])

    @classmethod
    def from_args(cls, args):
        """Parsed flags -> DataConfig; the classes are those found. InputError if there are none."""
        values = {name: getattr(args, name) for name in asdict(cls()) if hasattr(args, name)}
        values["fractions"] = check_fractions(values.get("fractions") or ())
        for name in ("also", "also_unlabelled"):
            values[name] = tuple(getattr(args, name, None) or ())
        if values.get("input", "full") != "full" or values.get("reads_lungs"):
            values["lungs_sha256"] = lung_masks.fingerprint(values["lungs"])
            if lung_masks.holds_masks(values["lungs"]) and values.get("input") != "pair":
                say(
                    f"note: {values['lungs']} holds the masks of certain images, so predict.py cannot show "
                    f"others to this run; --lungs {lung_masks.SHIPPED} finds lungs on any"
                )
        if values.get("labels"):
            values["labels"] = str(tables.find_table(values["labels"], values["data_dir"]))
            wanted = [name.strip() for name in (args.findings or "").split(",") if name.strip()]
            values["classes"] = tables.table_findings(values["labels"], wanted)
        else:
            if getattr(args, "findings", None):
                raise InputError("--findings belongs to a table of findings: give --labels too")
            root = indices.find_root(values["data_dir"])
            values["classes"] = indices.find_classes(root, getattr(args, "healthy", None))
        return cls(**values)

    @classmethod
    def from_json(cls, value):
        """The "data" object of a results.json -> DataConfig; InputError if it is not one."""
        try:
            lists = {k: tuple(value.get(k, ())) for k in ("classes", "fractions", "also", "also_unlabelled")}
            config = cls(**{**value, **lists})
        except (KeyError, TypeError) as error:
            raise InputError(f"the data settings of the run are incomplete or unknown: {error}") from None
        wrong = check_fields(config)
        if not isinstance(value.get("classes"), (list, tuple)) or not all(
            isinstance(c, str) for c in config.classes
        ):
            wrong.append("classes")
        if config.fractions and not (
            len(config.fractions) == 3 and all(map(FRACTION.contains, config.fractions))
        ):
            wrong.append("fractions")
        if wrong:
            named = ", ".join(f"{k} is {str(value.get(k))[:60]}" for k in wrong)
            raise InputError(f"the data settings of the run are damaged: {named}")
        return config


def check_fractions(values):
    """The fractions of train, validation and test as a tuple; InputError unless they add up to 1."""
    if values and abs(sum(values) - 1) > 1e-6:
        raise InputError(f"--fractions must add up to 1, got {' + '.join(f'{v:g}' for v in values)}")
    return tuple(values)


def add_arguments(parser, also=True):
    """The data flags that every training script shares; `also`: images of other hospitals, too."""
    group = parser.add_argument_group("data")
    add_flags(group, DataConfig, img_size=None)  # demo.prepare fills it in
    add_choices(group)
    about = "labelled images of another hospital join training: folders of the classes, or a table"
    if also:
        group.add_argument("--also", nargs="+", default=[], metavar="DIR[:LABELS.csv]", help=about)
    group.add_argument("--demo", action="store_true", help="draw a small synthetic set and use it")
    group.add_argument(
        "--download",
        nargs="?",
        const=KAGGLE,
        metavar="OWNER/NAME",
        help=f"fetch a Kaggle set into --data-dir first ({KAGGLE} unless named)",
    )


def add_unlabelled_argument(group):
    """--also-unlabelled, for training that needs no labels."""
    about = "images of other hospitals without labels, all under a folder, join training"
    group.add_argument("--also-unlabelled", nargs="+", default=[], metavar="DIR", help=about)


def add_choices(group):
    """The flags that choose classes, findings and fractions."""
    group.add_argument("--findings", metavar="A,B,...", help="ask these findings of --labels (default: all)")
    group.add_argument(
        "--healthy", metavar="CLASS", help="the healthy class (default: normal, healthy, no finding)"
    )
    group.add_argument(
        "--fractions",
        type=FRACTION,
        nargs=3,
        metavar=("TRAIN", "VAL", "TEST"),
        help="where no split is published (default: 0.6 0.2 0.2 pooled, 0.7 0.1 0.2 of a table)",
    )
