"""Networks, and the one way from grey pixels to their logits. The ViT is vit.py at the root.

In the order to read them:

    inputs.py        scaling, precision, views
    batches.py       batches of a Subset on the device
    build.py         from a config to a model
    cnn.py           timm's convolutional networks
    hybrid.py        left and right lung, read apart
    mae.py           the masked autoencoder
    dinov3.py        DINOv3
    maps.py          where a ViT looked
    map_pictures.py  the maps drawn
"""
