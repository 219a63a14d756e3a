"""From a file of weights, as other libraries write it, to our parameters by name. npz_loader.py at the root
and models/cnn.py put them into a model.

In the order to read them:

    files.py      one reader of .pth and .safetensors: wrappers and prefixes are taken off
    families.py   whose ViT it is, and its names in ours
    dinov3.py     the three layouts of DINOv3
    vits.py       a complete ViT: its arrays and its architecture
    settings.py   input scaling and heads: flags, files beside the weights, timm
    cnns.py       torchvision's, CheXNet's and torchxrayvision's names in timm's
"""
