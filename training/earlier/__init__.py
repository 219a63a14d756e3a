"""What an earlier run gives to a training, and what it must not lose by one.

folder.py   the folder that is written to: what may be there
masked.py   an encoder, by masked epochs
teacher.py  its answers
"""
