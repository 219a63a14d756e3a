"""Image files -> small JPEGs that a page embeds. Pictures are read by the project's own decoder. No torch."""

import base64
import io
import os
from concurrent.futures import ThreadPoolExecutor

from PIL import Image

from common.console import progress
from images.decode import decode

SIDE, QUALITY = 224, 75  # px and JPEG's quality: about 6 kB; the page shows them at 128 px until enlarged
MAP_WIDTH = 900  # px of a picture of maps
JPEG = "data:image/jpeg;base64,"


def as_jpeg(image):
    """A PIL image -> the text of an address that holds it as JPEG."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=QUALITY)
    return JPEG + base64.b64encode(buffer.getvalue()).decode()


def picture(path):
    """An image file, whole and undistorted on a square -> the text of an address; None if it cannot be
    read."""
    try:
        return as_jpeg(Image.fromarray(decode(path, SIDE, "pad")))
    except OSError:
        return None


def pictures(paths, title):
    """{path: `picture`} of image files, each once; `title`: what the progress line says."""
    paths = list(dict.fromkeys(paths))
    if not paths:
        return {}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return dict(zip(paths, progress(pool.map(picture, paths), len(paths), title, "images")))


def map_picture(path):
    """A PNG of explain.py, made smaller -> the text of an address; None if it cannot be read."""
    try:
        with Image.open(path, formats=("PNG",)) as image:
            small = image.convert("RGB")
    except OSError:
        return None
    small.thumbnail((MAP_WIDTH, MAP_WIDTH))
    return as_jpeg(small)
