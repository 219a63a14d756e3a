"""Does a threshold keep its promise, as diagnoses come in? monitor.py at the root asks it.

In the order to read them:

    log.py         the table of scores and diagnoses: the first image of each patient
    sequential.py  tests that may be looked at daily
"""
