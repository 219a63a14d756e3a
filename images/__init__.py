"""From image files to grey uint8 arrays, and to training, validation and test.

Read decode.py (one file), cache.py (a set), subset.py (what training sees of a set), split.py (the sides),
augment.py (random changes). dicom.py, find.py, twins.py, describe.py and drawn.py stand beside them. What
labels say is in layouts/.
"""
