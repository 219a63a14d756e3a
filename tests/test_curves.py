"""Tests of the training curves: what is drawn in which panel, and what is said of the rest."""

from types import SimpleNamespace

import numpy as np

from records.curves import draw_training, plt
from report.rows import Entry
from report.tables.method import training_blocks
from report.view import view_of
from tests.test_answers import ASKED
from tests.test_compare import write_ensemble, write_run

PANELS = [f"{side}_{figure}" for side in ("train", "val") for figure in ("loss", "accuracy", "auroc")]


def entry(name, rows, best=1, **recipe):
    return SimpleNamespace(name=name, results={"history": rows, "best_epoch": best, "recipe": recipe})


def rows(count, keys=PANELS, start=0.1):
    """A history of distinct values, some of them not recorded."""
    return [
        {key: start + 0.01 * i + 0.1 * k for k, key in enumerate(PANELS) if key in keys} for i in range(count)
    ]


def drawn(entries):
    """{figure: ({name: values}, texts in the panel)}."""
    figure, title = draw_training(entries)
    assert title == "Training curves" and len(figure.axes) == 6
    found = {}
    for key, ax in zip(PANELS, figure.axes):
        lines = {line.get_label(): line.get_ydata() for line in ax.get_lines() if line.get_label()[0] != "_"}
        found[key] = lines, [text.get_text() for text in ax.texts]
        word = {"train": "Training", "val": "Validation"}[key.split("_")[0]]
        assert ax.get_title().startswith(word)
        # The dot is the epoch kept, on the line.
        for line in ax.get_lines():
            if line.get_marker() == "o":
                x, y = line.get_xdata()[0], line.get_ydata()[0]
                assert any(np.array_equal(values[int(x) - 1], y, equal_nan=True) for values in lines.values())
    plt.close(figure)
    return found


def test_every_figure_has_a_panel_whatever_chose_the_epoch():
    for watch in ("auroc", "loss", "accuracy"):
        found = drawn([entry("a", rows(4), best=3, watch=watch)])
        for k, key in enumerate(PANELS):
            lines, texts = found[key]
            assert np.allclose(lines["a"], [0.1 + 0.01 * i + 0.1 * k for i in range(4)]) and texts == []


def test_a_figure_that_was_not_recorded_is_said_to_be_missing():
    """Older runs have no accuracy, or none at all but the losses and the AUROC of validation."""
    old = entry("old", rows(3, ("train_loss", "val_loss", "val_auroc")))
    found = drawn([old])
    missing = {key for key in PANELS if found[key][1] == ["not recorded"]}
    assert missing == {"train_accuracy", "val_accuracy", "train_auroc"}
    found = drawn([old, entry("new", rows(2))])
    assert found["val_accuracy"][1] == ["not recorded by 1 of 2 runs"] and found["val_loss"][1] == []
    # A figure that one epoch lacks is a gap, not a missing line.
    some = rows(3)
    some[1]["train_auroc"] = None
    lines, texts = drawn([entry("gap", some)])["train_auroc"]
    assert np.isnan(lines["gap"]).tolist() == [False, True, False] and texts == []


def test_the_losses_of_a_teacher_are_named():
    figure, _ = draw_training([entry("hybrid", rows(2), seg_weight=0.5)])
    titles = [ax.get_title() for ax in figure.axes]
    assert [("with all its terms" in title) for title in titles] == [True] + [False] * 5
    plt.close(figure)


def test_which_runs_have_curves(tmp_path):
    """Epochs, one fit, an ensemble: a line, a dot, a sentence. Without any run of two epochs, no picture."""
    long = write_run(tmp_path / "long")
    once = write_run(
        tmp_path / "once", 1, history=[dict(train_loss=0.5, val_loss=0.5, val_auroc=0.8)], best_epoch=1
    )
    both = write_ensemble(tmp_path / "both", [long, once])
    view = view_of([Entry(run) for run in (long, once, both)], ASKED)
    assert {e.run.folder.name for e in view.trained} == {"long", "once"}
    heading, paragraph, picture = training_blocks(view, ["picture"])
    assert "No curve: " in paragraph.text and "(both)" in paragraph.text and picture == "picture"
    assert "most probable class" in paragraph.text
    alone = view_of([Entry(once)], ASKED)
    assert alone.trained == [] and training_blocks(alone, []) == []
