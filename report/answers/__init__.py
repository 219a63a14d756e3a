"""The three answers at the top of the report: which model, which threshold, can I trust it? No torch, no
drawing.

In the order to read them:

    standing.py    models held against the best one on validation
    which.py       which model?
    threshold.py   which threshold, and what is left of its promise on test
    marks.py       can I trust it? Up to eight marks of one run: kept, open or broken
    short.py       the block "In short"
"""
