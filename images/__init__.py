"""From image files to grey uint8 arrays, and to training, validation and test.

In the order to read them:

    find.py      which files are images
    decode.py    one file to grey pixels
    dicom.py     the same for DICOM
    cache.py     a set, decoded once
    subset.py    a side of the data
    split.py     who trains, validates and tests
    twins.py     images that are in a set twice
    describe.py  a split in words
    augment.py   random changes
    drawn.py     a small drawn set
"""
