"""What a run leaves on disk.

In the order to read them:

    run.py       a run folder
    progress.py  how far its training is
    begin.py     which folder a training may write
    schema.py    what its files must hold
    lock.py      who trains there
    curves.py    training curves
    track.py     TensorBoard, MLflow, W&B
    onnx.py      a run as one file for other programs
"""
