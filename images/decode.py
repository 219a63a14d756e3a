"""From an image file to grey uint8 pixels: decoding, orientation, grey range, the cache of decoded images.

JPEG, PNG, TIFF, BMP and WebP are read by Pillow, DICOM by dicom.py; what a file is, its first bytes tell, not
its name. Whatever is wrong with a file, reading it raises OSError with the reason and nothing else, so that
one bad file never stops work on the others.

Files of 8 bits keep their grey values. Above 8 bits (PNG, TIFF, DICOM, whole numbers or floats) the 0.5 and
the 99.5 percentile of the pixels that are no padding become black and white; padding becomes black. So
neither the depth of a file nor a single bright marker decides how bright the picture is.
"""

import contextlib
import os
import stat

import numpy as np
from PIL import Image, UnidentifiedImageError

from common.console import in_one_line
from images import dicom
from images.find import HEAD, READ, kind_of
from layouts import arrays

FORMATS = ("JPEG", "PNG", "TIFF", "BMP", "WEBP")  # what Pillow may open, whatever the file is called
RESIZES = ("squash", "pad", "crop")
MAX_PIXELS = 178_956_970  # Pillow's own limit, applied also where Pillow does not check
PERCENTILES = (0.5, 99.5)  # black and white of what has more than 8 bits
TURNS = {  # the EXIF tag Orientation -> what puts the stored picture upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
ORIENTATION, PHOTOMETRIC, BITS_PER_SAMPLE, SAMPLE_FORMAT = 274, 262, 258, 339  # tags of TIFF and EXIF
TILE_WIDTH, TILE_LENGTH = 322, 323


# ---------------------------------------------------------------- one file


@contextlib.contextmanager
def _oserror_only():
    """Turn whatever the block raises into an OSError that gives the reason; also usable as a decorator.

    Pillow and pydicom raise nearly anything on damaged files, StopIteration and struct.error included.
    """
    try:
        yield
    except OSError:
        raise
    except Exception as error:  # MemoryError too, but not KeyboardInterrupt
        reason = in_one_line(f"{type(error).__name__}: {error}").rstrip(": ")
        raise OSError(f"damaged or not supported ({reason})") from None


def _check_regular(path):
    """OSError if `path` is not a regular file: opening a named pipe, say, could wait for ever."""
    mode = os.stat(path).st_mode
    if stat.S_ISDIR(mode):
        raise OSError("a folder, not a file")
    if not stat.S_ISREG(mode):
        raise OSError("a named pipe, socket or device, not a regular file")


@contextlib.contextmanager
def _file(path):
    """(file object, its kind by find.kind_of) of a path."""
    _check_regular(path)
    if os.path.getsize(path) == 0:
        raise OSError("the file is empty")
    with open(path, "rb") as file:
        kind = kind_of(file.read(HEAD))
        file.seek(0)
        yield file, kind


def _open(file, kind):
    """A file object of a kind -> PIL image, its pixels not yet decoded. OSError for what is no single picture
    of a size that is read."""
    try:
        image = Image.open(file, formats=FORMATS)
    except UnidentifiedImageError:
        if kind is None:
            raise OSError(f"not a file that is read ({READ})") from None
        raise OSError(f"a damaged {kind} file, or of a kind that is not read") from None
    if image.format not in ("JPEG", "MPO", "PNG"):  # those Pillow has checked, against twice the limit
        _check_size(image)
    # The further pictures of a JPEG (MPO) are previews of the first; elsewhere nobody could say which is
    # meant.
    if getattr(image, "is_animated", False) and image.format != "MPO":
        raise OSError(f"a {image.format} file of several pages or frames: only single images are read")
    return image


def _check_size(image):
    """OSError if an image, or a tile of a TIFF, which is decoded whole, has more than MAX_PIXELS."""
    sizes = [image.size]
    if image.format == "TIFF":
        sizes.append((image.tag_v2.get(TILE_WIDTH, 0), image.tag_v2.get(TILE_LENGTH, 0)))
    for width, height in sizes:
        if width * height > MAX_PIXELS:
            raise OSError(f"{width} x {height} pixels are more than the limit of {MAX_PIXELS}")


def decode(path, size, resize="squash"):
    """An image file -> uint8 [size, size], grey, upright.

    Large JPEGs are decoded at reduced scale (never below twice the target, so nothing visible is lost),
    then shrunk with an anti-aliased bilinear filter. Above 8 bits the grey range is `stretch`ed.
    OSError, and nothing else, if the file cannot be read.
    """
    return _decode(path, size, resize)[0]


@_oserror_only()
def _decode(path, size, resize):
    """`decode`, and the original's (width, height) as it is seen upright."""
    if arrays.parts_of(path):
        image = Image.fromarray(arrays.pixels(path))
        return to_square(image.convert("L"), size, resize), image.size
    with _file(path) as (file, kind):
        if kind == "DICOM":
            image = open_dicom(path)
            return to_square(image.convert("L"), size, resize), image.size
        image = _open(file, kind)
        original = image.size
        image.draft("L", (2 * size, 2 * size))
        grey = to_grey(image)
        if image.format == "TIFF":  # Pillow itself puts these upright as they are loaded
            return to_square(grey, size, resize), grey.size
        orientation = _orientation(image)
        if orientation in TURNS:
            grey = grey.transpose(TURNS[orientation])
        if orientation >= 5:  # width and height change places
            original = original[::-1]
        return to_square(grey, size, resize), original


def _orientation(image):
    """The EXIF tag Orientation of a loaded image, 1 to 8; 1 where there is none that is valid."""
    try:
        orientation = image.getexif().get(ORIENTATION, 1)
    except Exception:  # damaged EXIF data say nothing, and the picture may be good
        return 1
    if not isinstance(orientation, int) or not 1 <= orientation <= 8:
        return 1
    return orientation


def to_grey(image):
    """A PIL image of any mode -> mode "L" (8-bit grey), above 8 bits by `stretch`. OSError if a pixel is NaN
    or infinite."""
    if image.format == "TIFF":
        return _tiff_to_grey(image)
    if image.mode.startswith("I") or image.mode == "F":
        return stretch(np.asarray(image))
    if image.format == "PNG" and _sixteen_bits(image):
        return _deep_png_to_grey(image)
    return image.convert("L")


def _tiff_to_grey(image):
    """`to_grey` of a TIFF, whose tags tell what its values mean."""
    tags = image.tag_v2
    bits, white_is_zero = max(tags.get(BITS_PER_SAMPLE, (1,))), tags.get(PHOTOMETRIC) == 0
    if not (image.mode.startswith("I") or image.mode == "F"):
        if bits > 8:
            raise OSError(f"colour TIFF of {bits} bits: save it as grey, or with 8 bits")
        if (
            image.mode == "L" and tags.get(SAMPLE_FORMAT, (1,))[0] == 2
        ):  # signed, of which Pillow knows nothing
            return stretch(np.asarray(image).view(np.int8))
        return image.convert("L")
    values = np.asarray(image)
    if image.mode == "I" and bits == 32 and max(tags.get(SAMPLE_FORMAT, (1,))) == 1:
        values = values.view(np.uint32)  # Pillow knows signed ones only
    if white_is_zero:  # Pillow turns these round at 8 bits only
        values = -values.astype(np.float64)
    return stretch(values)


def _sixteen_bits(image):
    """Whether a PNG that is open has 16 bits a channel: byte 24 of the file says so."""
    place = image.fp.tell()
    image.fp.seek(24)
    depth = image.fp.read(1)
    image.fp.seek(place)
    return depth == b"\x10"


def _deep_png_to_grey(image):
    """`to_grey` of a PNG of 16 bits in colour or with transparency, of which Pillow keeps the upper 8 bits
    only."""
    import torch
    from torchvision.io import ImageReadMode, decode_png

    image.fp.seek(0)
    raw = torch.frombuffer(bytearray(image.fp.read()), dtype=torch.uint8)
    channels = decode_png(raw, ImageReadMode.UNCHANGED).numpy().astype(np.float64)
    if len(channels) < 3:
        return stretch(channels[0])
    red, green, blue = channels[:3]
    return stretch(0.299 * red + 0.587 * green + 0.114 * blue)


def stretch(values, padding=None):
    """Grey values of any depth [H, W] -> PIL image of mode "L": the 0.5 and the 99.5 percentile of the pixels
    that are not `padding` (bool [H, W], or None) become 0 and 255, what lies beyond is cut; padding becomes
    0.

    OSError if a pixel is NaN or infinite, or if (nearly) all are equal."""
    values = np.asarray(values, dtype=np.float64)
    _check_values(values, padding)
    known = values if padding is None else values[~padding]
    low, high = np.percentile(known, PERCENTILES)
    if not 0 < high - low < np.inf:
        raise OSError("hardly any pixel of the image differs from the others")
    return _to_image((values - low) / (high - low) * 255, padding)


def _check_values(values, padding):
    """OSError unless pixels that are not padding are finite and differ."""
    known = values if padding is None else values[~padding]
    if not known.size:
        raise OSError("all pixels of the image are padding")
    if not np.isfinite(known).all():
        raise OSError("some pixels are NaN or infinite")
    if known.max() <= known.min():
        raise OSError("all pixels of the image are equal")


def _to_image(values, padding):
    """Values, 0 black and 255 white, -> PIL image of mode "L"; padding becomes black."""
    if padding is not None:
        values = np.where(padding, 0, values)
    return Image.fromarray(values.round().clip(0, 255).astype(np.uint8))


def to_square(image, size, resize):
    """A grey PIL image -> uint8 [size, size]: "squash" it, "pad" it with black, or "crop" it to the middle.

    OSError for an image so long and narrow that its padded square would not fit in memory.
    """
    width, height = image.size
    box = None
    if resize == "crop":
        side = min(width, height)
        left, top = (width - side) / 2, (height - side) / 2
        box = (left, top, left + side, top + side)
    elif resize == "pad" and width != height:
        side = max(width, height)
        if side * side > MAX_PIXELS:
            raise OSError(f"{width} x {height} pixels are too many to be padded to a square")
        canvas = Image.new("L", (side, side))
        canvas.paste(image, ((side - width) // 2, (side - height) // 2))
        image = canvas
    if image.size != (size, size) or box:
        image = image.resize((size, size), Image.Resampling.BILINEAR, box=box)
    return np.asarray(image)


@_oserror_only()
def open_dicom(path):
    """A DICOM file of one image -> PIL image of mode "L", dense = bright, or "RGB".

    Up to 8 bits values stay as they are, or as the file's window shows them; above, or where a table or a
    rescaling changes them, they are `stretch`ed. OSError, and nothing else, if the file cannot be read."""
    _check_regular(path)
    found = dicom.read(path, MAX_PIXELS)
    if found.values.ndim == 3:
        return Image.fromarray(found.values)
    if found.white is None:
        return stretch(found.values, found.padding)
    _check_values(found.values, found.padding)
    return _to_image(found.values * (255 / found.white), found.padding)


@_oserror_only()
def read_header(path):
    """What the header of a DICOM file says, as `dicom.header`; None of any other file. OSError, and nothing
    else, if it cannot be read."""
    with _file(path) as (_, kind):
        if kind != "DICOM":
            return None
    return dicom.header(path)


@_oserror_only()
def read_image(path, size, resize="squash"):
    """An image file -> (uint8 [size, size], original (width, height), colourfulness in [0, 1]), upright.

    Colourfulness is the mean difference between the strongest and the weakest of red, green and blue: 0 for
    grey. OSError, and nothing else, if the file cannot be read.
    """
    with _file(path) as (file, kind):
        if kind == "DICOM":
            image = open_dicom(path)
            return to_square(image.convert("L"), size, resize), image.size, colourfulness(image)
        colour = colourfulness(_open(file, kind))
    return *_decode(path, size, resize), colour


def colourfulness(image):
    """Mean difference between the strongest and the weakest of red, green and blue of a PIL image, 0 to 1."""
    if image.mode not in ("RGB", "RGBA", "P", "CMYK", "YCbCr"):
        return 0.0
    image.draft("RGB", (64, 64))
    small = np.asarray(image.convert("RGB").resize((64, 64)), dtype=np.float64)
    return float((small.max(axis=2) - small.min(axis=2)).mean() / 255)
