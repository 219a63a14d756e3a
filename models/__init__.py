"""Networks, and the one way from grey pixels to their logits. The ViT is vit.py at the root.

Read inputs.py (scaling, precision, views), build.py (from a config to a model), then cnn.py, hybrid.py and
mae.py. state_names.py translates other people's weights; maps.py explains a ViT. No data and no training
here.
"""
