"""What an earlier run gives to a training.

masked.py   an encoder, by masked epochs
teacher.py  its answers
"""
