"""The text and tables of the report, as blocks for render.py. No torch, no drawing.

In the order to read them:

    main.py           one test set: what stands where, promises and intervals
    models.py         the main table, a row a model
    classes.py        precision, recall and F1 of every class
    triage.py         negative, unsure and positive, where calibrations have @In
    cohort.py         who took part, and groups of patients
    pairs.py          which of two models is better
    probabilities.py  are the scores probabilities?
    audit.py          audits: verdicts, and what follows
    evidence.py       other images, and tests of maps
    method.py         how it was done
"""
