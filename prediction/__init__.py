"""Scoring new images with a calibrated run.

In the order to read them:

    scorer.py   files in, a row each out: scores, decisions, typicality, notes
    people.py   whose images they are: patients and studies, as calibrate.py tells them
    output.py   order, digits and destination of the rows
    mlflow_model.py   a run as a model of MLflow's registry
"""
