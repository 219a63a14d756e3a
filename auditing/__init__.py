"""Does a model look at the lungs, or at the machine? What audit.py measures of a run, and what it concludes.

Read in this order:
record.py    audit.json in the run folder, and who reads it; no torch
changes.py   changed images: borders, grey lungs, exposure, sharpness, framing
side.py      the images that an audit looks at
reader.py    a run that scores changed images; its features without the head
figures.py   figures and differences with intervals by patient
looks.py     sections 1, 2 and 4: borders, lungs, changed images
signals.py   section 3: what else the features tell
clusters.py  section 5: whether the false alarms are of one kind
rules.py     the verdicts
sheet.py     pictures with a text under each
labels/      images whose label is likely to be wrong
"""
