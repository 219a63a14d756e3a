"""What a run leaves on disk.

In the order to read them:

    run.py       a run folder
    weights.py   its model
    schema.py    what its files must hold; calibrations of older versions
    scores.py    its scores on validation and test
    predictions.py  its scores and decisions, for spreadsheets
    lock.py      who trains there
    curves.py    training curves
    track.py     TensorBoard, MLflow, W&B; one file each in trackers/
    onnx.py      a run as one file for other programs
"""
