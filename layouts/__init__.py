"""Which images there are, what their labels say and whose they are: a reader for each layout of labels. No
image is decoded here.

Read listing.py (the Index that every reader returns), folders.py (class folders), tables.py (tables; nih.py
and plain.py know their cells, sheets.py their spelling). download.py fetches a set.
"""
