"""Where the lungs are, and what of an image a model is shown.

In the order to read them:

    unet.py   the network that finds lungs; its weights lie beside it
    show.py   boxes, crops, what is hidden
    masks.py  the masks of a set
"""
