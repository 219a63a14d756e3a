"""Which threshold, and what is left of its promise on test. No torch, no drawing."""

from collections import Counter

from calibration.wording import calls, four_digits, guaranteed_too, new_patients
from cohort.figures import clustered_proportion
from common.task import is_healthy
from report.cells import alone, floors, interval, named, with_interval
from report.render import Bad, Bullets, Heading, Paragraph, marked
from report.rows import POINTS

HEADING = Heading(4, "Which threshold?")
SHOWN = 4  # models whose thresholds and marks "In short" shows
VERDICTS = ("kept", "not refuted", "broken")


def recall_span(entry, finding, row):
    """The interval [lo, hi] of the recall in a `row` of figures on test, by patient and exact: a bootstrap's
    is too narrow where few are missed. Of several findings all hold at once (Bonferroni), or of twenty kept
    floors one would look broken."""
    known = max(1, sum(entry.row(name, "test", "at_rec") is not None for name in entry.findings))
    test = entry.column(finding, "test")
    sick = test.truth == 1
    hits = test.scores[sick] >= row["thr"]
    return clustered_proportion(hits, test.patients[sick], 1 - 0.05 / known)


def floor_verdict(entry, finding, row):
    """What is left of the recall floor in a `row` of figures on test: "kept" where the interval lies at or
    above it, "broken" where it lies below, "not refuted" where it holds the floor."""
    low, high = recall_span(entry, finding, row)
    if low >= entry.min_recall:
        return "kept"
    return "broken" if high < entry.min_recall else "not refuted"


def recall_text(entry, finding, row):
    """ "0.951 [0.931, 0.968]" of the recall in a `row`."""
    return f"{row['recall']:.3f} {interval(*recall_span(entry, finding, row))}"


def threshold_blocks(remaining):
    """The answer for those that remain (Candidates)."""
    if not remaining:
        return []
    entries = [e for c in remaining for e in c.entries]
    text = (
        f"@Rec meets the recall floor ({floors(entries)}) on validation. {below_text(entries)}"
        f"{advice_on(remaining)} On test the floor is kept (the 95% interval by patients lies above it), not "
        "refuted (the interval contains it: too few patients, or close to it) or broken (it lies below)."
    )
    healthy = sorted({name for e in entries for name in e.findings if is_healthy(name)})
    if healthy:
        text += f' "Sick" means with the finding: of {", ".join(healthy)}, the healthy.'
    items = []
    for c in remaining[:SHOWN]:
        items += [line for point in ("at_rec", "at_guaranteed") for line in lines_of(c, point)]
    if len(remaining) > SHOWN:
        items.append(f"{len(remaining) - SHOWN} more of those that remain: in the tables below.")
    return [HEADING, Paragraph(text), Bullets(items)]


def advice_on(remaining):
    """When to take @Guar, and what it costs, as a sentence."""
    found = [one for c in remaining for one in rows_of(c, "at_guaranteed")]
    if not found:
        return "None has @Guar, so no threshold here is guaranteed."
    same = [guaranteed_too(e.calibrated[finding]) for e, finding, _ in found]
    if all(same):
        return "@Guar does not lie below @Rec, so @Rec is guaranteed for new patients like those, too."
    advice = "Take @Guar where the floor must hold for new patients like those: it costs specificity"
    if any(same):
        advice += " where it lies below @Rec, and elsewhere @Rec is guaranteed, too"
    return f"{advice}."


def below_text(entries):
    """How likely the true recall @Rec is below the floor, as a sentence; "" where that differs by model or no
    finding has a threshold: the table of promises has it."""
    chances = {new_patients(e.calibrated, e.min_recall) for e in entries}
    if len(chances) > 1 or "" in chances:
        return ""
    return f"For new patients like those, its true recall is below the floor with {chances.pop()}. "


def lines_of(candidate, point):
    """What one operating point of a Candidate promises, costs and keeps: a list of at most one item."""
    mark, found = POINTS[point], rows_of(candidate, point)
    start = f"{candidate.name}, {mark}"
    if not found:
        return [f"{start}: none; {missing(candidate, point)}."]
    if len(found) == 1:
        e, finding, _ = found[0]
        if not alone(candidate.entries):
            start += f", {finding} alone ({len(e.findings) - 1} other findings have none)"
        return [(f"{start} ", *one_line(*found[0], point))]
    return [(f"{start}: ", *many_line(candidate, found))]


def rows_of(candidate, point):
    """[(entry, finding, row of figures on test)] of all seeds and findings that have one."""
    found = []
    for e in candidate.entries:
        for finding in e.findings:
            if row := e.row(finding, "test", point):
                found.append((e, finding, row))
    return found


def missing(candidate, point):
    """Why a Candidate has no figures at a point, as text: the reason of the first finding stands for all."""
    reasons = {}
    for e in candidate.entries:
        for finding, of_finding in e.calibrated.items():
            reason = of_finding.get("why_not") or of_finding.get("test_why_not")
            if reason is None and point == "at_guaranteed":
                reason = of_finding["guarantee"].get("why_not")
            if reason:
                reasons.setdefault(reason, finding)
    if not reasons:
        return "no figures on test"
    reason, finding = next(iter(reasons.items()))
    return named(candidate.entries[0], finding, reason)


def one_line(entry, finding, row, point):
    """The parts of a line on one threshold."""
    on_validation = entry.row(finding, "val", point)["specificity"]
    parts = [
        f"{four_digits(row['thr'])}: recall {recall_text(entry, finding, row)} on test, ",
        marked(floor_verdict(entry, finding, row)),
        f"; specificity {with_interval(row, 'specificity')} ({on_validation:.3f} on validation)",
    ]
    if said := calls(row):
        parts += ["; ", Bad(said)]
    return (*parts, ".")


def of_several(candidate, entry, finding):
    """What tells one threshold of a Candidate from the others: the finding, the seed, or both."""
    if len(candidate.entries) == 1:
        return finding
    seed = f"seed {entry.results.get('seed')}"
    return named(entry, finding, seed)


def many_line(candidate, found):
    """The parts of a line on the thresholds of several seeds or findings."""
    counts = Counter(floor_verdict(*one) for one in found)
    said = ", ".join(f"{counts[name]} {name}" for name in VERDICTS if counts[name])
    recalls, specificities = ([row[key] for *_, row in found] for key in ("recall", "specificity"))
    parts = [
        f"{len(found)} thresholds: {said}; recall {min(recalls):.3f} to {max(recalls):.3f}, specificity "
        f"{min(specificities):.3f} to {max(specificities):.3f} on test"
    ]
    for e, finding, row in found:
        if floor_verdict(e, finding, row) == "broken":
            parts += ["; ", Bad(f"broken: {of_several(candidate, e, finding)}")]
            parts.append(f" {recall_text(e, finding, row)}")
        if told := calls(row):
            parts += ["; ", Bad(f"{told}: {of_several(candidate, e, finding)}")]
    without = {finding for e in candidate.entries for finding in e.findings} - {name for _, name, _ in found}
    if without:
        names = ", ".join(sorted(without)[:3]) + (", ..." if len(without) > 3 else "")
        text = "no threshold, or no figures on test,"
        parts.append(f"; {text} for {len(without)} others ({names}): too few {found[0][0].unit}")
    return (*parts, ".")
