"""Does a model look at the lungs, or at the machine? What audit.py measures of a run, and what it concludes.

record.py    audit.json in the run folder: read it here; no torch
"""
