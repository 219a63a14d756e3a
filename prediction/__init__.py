"""Scoring new images with a calibrated run.

scorer.py   files in, a row each out: scores, decisions, typicality, notes
"""
