"""The trackers of --track, one file each. Their packages are optional: each is imported when it is opened.

In the order to read them:

    kept.py          which files of a run are kept, and by what names
    usage.py         use of processor, memory and GPU
    tensorboard.py   event files in the run folder
    mlflow.py        runs and artifacts of MLflow
    registry.py      a run as a version of a registered model of MLflow
    wandb.py         runs and artifacts of Weights & Biases

Each is opened with (run, known): `known` is what its `reference` was the last time, or None. Its methods:

    parameters(values)      {name: text or number}
    watch()                 measure the use of processor, memory and GPU from now on
    figures(values, epoch)  {name: float}; epoch None for figures of the whole run
    picture(name, path)     a PNG
    last(files)             {name: path} of the checkpoint after the last epoch
    best(files, name)       the same of the best epoch, and what scoring with it needs; the calibration's name
    close()
    fail()                  only if it has that: the run is followed no more
"""
