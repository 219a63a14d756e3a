"""From flags to what is asked: the classes of folders, or the findings of a table and its layout; and where
the images of a run are now."""

from common.console import InputError
from layouts import folders, tables
from layouts.choices import uncertain_values

MOVED = {  # field of data.DataConfig: (what its flag takes, what it says)
    "data_dir": ("DIR", "where the images are now"),
    "labels": ("CSV", "where the table of findings is now"),
    "patients": ("CSV", "where the table of patients is now"),
    "cache_dir": ("DIR", "folder of the decoded images"),
}
OF_TABLES = {"findings": None, "layout": "", "uncertain": "ignore", "blank": "auto"}  # flags: usual values


def asked(args, values):
    """{field of data.DataConfig: value} that the parsed flags `args` and what was made of them, `values`,
    mean: of class folders "classes", of a table "labels", "layout" and "blank" too.

    InputError where there are none, where a flag is of tables and there is none, or where the table is for
    evaluation only."""
    data_dir = values["data_dir"]
    if not values.get("labels"):
        others = [text.rpartition(":") for text in values.get("also", ())]
        other_table = any(folder and table.lower().endswith(tables.ENDINGS) for folder, _, table in others)
        for name, usual in OF_TABLES.items():
            if name == "blank" and other_table:
                continue
            if (getattr(args, name, usual) or usual) != usual:
                raise InputError(f"--{name} belongs to a table of findings: give --labels too")
        root = folders.find_root(data_dir)
        return {"classes": folders.find_classes(root, getattr(args, "healthy", None))}
    named = values.get("layout", "")
    path = tables.find_table(values["labels"], data_dir, named)
    layout = tables.find_layout(path, named)
    if not layout.trains:
        raise InputError(
            f"{path} ({layout.title}) is for evaluation only: train on another table, and give this one to "
            "calibrate.py --site DIR --labels CSV"
        )
    if values.get("readers", "majority") != "majority" and layout.name != "vindr":
        raise InputError(f"--readers is for VinDr's several readers; {path} is of the layout {layout.name}")
    wanted = [name.strip() for name in (getattr(args, "findings", None) or "").split(",") if name.strip()]
    classes = tables.table_findings(path, wanted, named)
    uncertain_values(values.get("uncertain", ""), classes)
    blank = values.get("blank", "auto")
    if blank == "auto":
        blank = layout.blank
    return {"labels": str(path), "layout": layout.name, "blank": blank, "classes": classes}


def add_moved_arguments(group, leave_out=()):
    """The flags that say where the images of a run are now, but those of the fields `leave_out`."""
    for name, (metavar, text) in MOVED.items():
        flag = f"--{name.replace('_', '-')}"
        if name not in leave_out:
            group.add_argument(flag, metavar=metavar, help=f"{text} (default: as trained)")


def moved_settings(args, data_dir, *more, leave_out=()):
    """{field of data.DataConfig: value} that the flags of `add_moved_arguments`, but those of the fields
    `leave_out`, and those of the fields `more`, change of a run whose images were in `data_dir`. InputError
    if there is no such table."""
    names = [name for name in (*MOVED, *more) if name not in leave_out]
    moved = {name: getattr(args, name) for name in names if getattr(args, name)}
    if "labels" in moved:
        moved["labels"] = str(tables.find_table(moved["labels"], moved.get("data_dir", data_dir)))
    return moved
