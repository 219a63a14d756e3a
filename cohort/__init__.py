"""Patients: who took part, and how figures differ between groups of them. No torch, no files.

In the order to read them:

    who.py      age bands, groups of patients, and a summary of a side
    figures.py  figures of every group, and whether it differs from the rest
"""
