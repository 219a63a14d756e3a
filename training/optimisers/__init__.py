"""Optimisers that torch does not bring as they are needed here.

muon.py    Muon for the matrices of attention and MLP, and an optimiser that joins two
"""
