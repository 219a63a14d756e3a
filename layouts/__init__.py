"""Which images there are, what their labels say and whose they are. No image is decoded here.

In the order to read them:

    listing.py   the Index that every reader returns
    folders.py   labels from class folders
    tables.py    labels and patients from tables
    nih.py       cells of NIH's table
    plain.py     cells of a table with a column a finding
    sheets.py    how tables are spelt
    download.py  a set from Kaggle
"""
