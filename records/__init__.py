"""What a run leaves on disk.

Read run.py (a run folder), schema.py (what its files must hold), lock.py (who trains there), curves.py and
track.py (its history, as a picture and for a tracker), onnx.py (a run as one file for other programs).
"""
