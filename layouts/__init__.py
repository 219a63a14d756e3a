"""Which images there are, what their labels say and whose they are. No image is decoded here.

In the order to read them:

    listing.py     the Index that every reader returns
    folders.py     labels from class folders
    tables.py      labels from tables: what all layouts have in common
    rows.py        what every layout turns its tables into
    plain.py       a table with a column a finding
    nih.py         NIH ChestX-ray14
    google_nih.py  four findings of NIH images, read again
    chexpert.py    CheXpert
    mimic.py       MIMIC-CXR-JPG
    rsna.py        the RSNA pneumonia challenge
    vindr.py       VinDr-CXR
    padchest.py    PadChest
    medmnist.py    PneumoniaMNIST and ChestMNIST
    arrays.py      images in an .npz
    asked.py       from flags to what is asked
    choices.py     what uncertain and blank mean, which views
    synonyms.py    names that mean the same
    same_set.py    public sets that hold each other's images
    cohort.py      age, sex and view as tables write them
    headers.py     patients and exposures from DICOM headers
    patients.py    names of patients
    sheets.py      how tables are spelt
    lookup.py      which image a name in a table means
    download.py    a set from Kaggle
    download_account.py  which account that can use, and what Kaggle answered
"""
