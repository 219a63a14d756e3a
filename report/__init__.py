"""What compare.py prints and draws, from the files of calibrated runs. No torch.

Read rows.py (what is compared with what), tables.py (the main tables), then pairs.py, probabilities.py,
evidence.py and method.py (further ones), cells.py (what they are made of), plots.py, render.py (markdown and
HTML).
"""
