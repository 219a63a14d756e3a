"""What compare.py prints and draws, from the files of calibrated runs. No torch.

In the order to read them:

    rows.py           what is compared with what
    cohort.py         who took part, and groups of patients
    tables.py         the main tables
    pairs.py          which of two models is better
    probabilities.py  are the scores probabilities?
    evidence.py       other images, and tests of maps
    method.py         how it was done
    cells.py          what tables are made of
    plots.py          pictures
    render.py         markdown and HTML
"""
