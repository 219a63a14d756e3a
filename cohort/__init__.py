"""Patients: who took part, and how figures differ between groups of them. No torch, no files.

In the order to read them:

    who.py      age bands, groups of patients, and a summary of a side
    figures.py  a figure of every group: intervals, and whether a group differs from the rest
    groups.py   all figures of all groups, as a table and in words
"""
