"""What every room stands on. Imports nothing of the project but itself.

In the order to read them:

    console.py      what a command says and how it ends
    cli.py          the parser of every script
    files.py        files, whole or not at all
    safe_files.py   tensors and arrays of strangers
    device.py       cuda, mps, cpu; precision; processes
    task.py         the yes/no questions asked of an image
    scaling.py      from logits to probabilities
    proportions.py  intervals of proportions
    prelude.py      the first import of every script
    scripts.py      which script has which flag
"""
