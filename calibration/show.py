"""What calibrate.py prints of a calibration. No torch, no files."""

import itertools

from calibration.pooling import plural_of, title_of
from calibration.wording import positives_text, threshold_text, warnings
from common import scaling
from common.proportions import reported_interval
from common.scaling import POINTS, SIDES
from metrics import temperature_limit

COLUMNS = ("recall", "specificity", "precision", "acc", "f1", "auroc")


def show(title, calibration):
    """Print a run's figures, finding by finding, validation beside test, then those over all findings."""
    findings = calibration["findings"]
    print(f"\n{title}{title_of(calibration)}:\n" + " " * 18 + "".join(f"{c:>12}" for c in COLUMNS), end="")
    print("   95% recall      95% specificity")
    for name, found in findings.items():
        show_finding(name, found, calibration)
    if len(findings) > 1:
        for side, word in SIDES.items():
            show_summary(word, calibration["summary"][side])
    if "platt" not in calibration:
        used = "applied" if calibration["temperature_applied"] else "not applied; --temperature applies it"
        used = "; ".join(filter(None, [used, temperature_limit(calibration["temperature"])]))
        print(f"  temperature {calibration['temperature']:.3f} ({used})")
    for line in scaling.told(calibration):
        print(line)


def show_finding(name, found, calibration):
    """Print what a calibration says of one finding: thresholds, figures with intervals of recall and
    specificity, what is bad about them. Figures @0.5 and of the probability only where it is the only one;
    calibration.json has those of several."""
    alone = len(calibration["findings"]) == 1
    if "why_not" in found:
        curves = [
            f"{word} AUROC {found['curves'][s]['auroc']['value']:.3f}"
            for s, word in SIDES.items()
            if s in found["curves"]
        ]
        print("; ".join([f"{name}: no threshold: {found['why_not']}", *curves]))
        return
    sides = {side: word for side, word in SIDES.items() if side in found}
    print(f"{name}: {positives_text(found, plural_of(calibration))}; {threshold_text(found)}")
    for (side, word), (point, mark) in itertools.product(sides.items(), POINTS.items()):
        if point in found[side] and (alone or point != "at_0.5"):
            row = found[side][point]
            spans = ["{:.3f} to {:.3f}".format(*reported_interval(row, k)) for k in COLUMNS[:2]]
            figures = "".join(f"{row[c]:12.4f}" for c in COLUMNS)
            print(f"  {word:10} {mark:5}{figures}   {'  '.join(spans)}")
    if "test_why_not" in found:
        print(f"  no figures on test: {found['test_why_not']}")
    for text in warnings(found, calibration["min_recall"]):
        print(f"  warning: {text}")
    if alone:
        show_probabilities(found, calibration)


def show_probabilities(found, calibration):
    """Print how good a finding's scores are as probabilities, and what they say of people."""
    quality, row = found["probability"], found["test"]["at_rec"]["at_prevalence"]
    changes = []
    for side, when in quality.items():
        before, after = when["before"], when["after"]
        changes.append(
            f"{side} ECE {before['ece']:.3f} -> {after['ece']:.3f}, "
            f"NLL {before['nll']:.3f} -> {after['nll']:.3f}"
        )
    if "platt" not in calibration:  # scaling.told has it
        print(f"  by the temperature: {'; '.join(changes)}")
    if row["ppv"] is not None and row["npv"] is not None:
        print(
            f"  if {row['prevalence']:.0%} of the patients were ill, @Rec on test: PPV {row['ppv']:.3f}, "
            f"NPV {row['npv']:.3f}"
        )


def show_summary(word, summary):
    """Print the figures over all findings on one side."""
    parts = []
    for key, label in (("auroc", "mean AUROC"), ("accuracy", "accuracy"), ("macro_f1", "macro F1")):
        if key in summary:
            parts.append("{} {value:.3f} [{lo:.3f}, {hi:.3f}]".format(label, **summary[key]))
    print(f"  {word}: {', '.join(parts)} ({len(summary['findings'])} findings)")
