"""Likely label errors: images whose label a classifier, trained on the other patients, contradicts.

Read in this order:
errors.py    which labels are contradicted: confident learning on out-of-fold probabilities; no torch
asked.py     the questions that the labels of a run answer, and the features of its images
written.py   what is printed and written: a CSV and a sheet
"""
