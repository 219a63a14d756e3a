"""Thresholds, what they promise, and where they no longer do. metrics.py at the root chooses them.

In the order to read them:

    operating_point.py  thresholds on validation, figures on both sides
    intervals.py        how sure a figure is
    subgroups.py        figures of groups of patients
    ensemble.py         several runs as one
    site.py             thresholds for another hospital
    shift.py            is a batch like validation?
    shares.py           the same at another share of the sick
    sequential.py       tests that may be looked at daily
    wording.py          what is said of thresholds
    show.py             what calibrate.py prints
"""
