"""From flags to what is asked: the classes of folders, or the findings of a table and its layout."""

from common.console import InputError
from layouts import folders, tables
from layouts.choices import uncertain_values

OF_TABLES = {"findings": None, "layout": "", "uncertain": "ignore", "blank": ""}  # flags: usual values


def asked(args, values):
    """{field of data.DataConfig: value} that the parsed flags `args` and what was made of them, `values`,
    mean: of class folders "classes", of a table "labels", "layout" and "classes" too.

    InputError where there are none, where a flag is of tables and there is none, or where the table is for
    evaluation only."""
    data_dir = values["data_dir"]
    if not values.get("labels"):
        for name, usual in OF_TABLES.items():
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
    wanted = [name.strip() for name in (getattr(args, "findings", None) or "").split(",") if name.strip()]
    classes = tables.table_findings(path, wanted, named)
    uncertain_values(values.get("uncertain", ""), classes)
    return {"labels": str(path), "layout": layout.name, "classes": classes}
