"""What a run leaves on disk.

In the order to read them:

    run.py       a run folder
    weights.py   its model
    schema.py    what its files must hold; calibrations of older versions
    predictions.py  its scores and decisions, for spreadsheets
    progress.py  how far training is
    begin.py     which folder a training may write
    lock.py      who trains there
    curves.py    training curves
    track.py     TensorBoard, MLflow, W&B
    onnx.py      a run as one file for other programs
"""
