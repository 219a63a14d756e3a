"""Thresholds, what they promise, and where they no longer do. metrics.py at the root chooses them.

In the order to read them:

    operating_point.py  thresholds on validation, figures on both sides
    triage.py           a second threshold, @In: three answers instead of two
    pooling.py          one score for all images of a study or patient
    intervals.py        how sure a figure is
    ensemble.py         several runs as one
    site.py             thresholds for another hospital
    scores.py           scores of runs, one after the other
    shift.py            is a batch like validation?
    shares.py           the same at another share of the sick
    wording.py          what is said of thresholds, and what calibrate.py prints
"""
