"""A DICOM file -> its grey values, as the file means them: padding known, modality and VOI tables applied,
dense = bright; and what its header says of patient and exposure.

Values that a file leaves empty or that cannot be (a rescale slope of 0, a window without width) are ignored.
pydicom is imported where the first file is read. Anything may be raised on a damaged file; decode.py turns it
into OSError.
"""

import contextlib
from typing import NamedTuple

import numpy as np

from common.console import in_one_line

JPEG, JPEG2000 = "pylibjpeg pylibjpeg-libjpeg", "pylibjpeg pylibjpeg-openjpeg"
DECODERS = (  # beginnings of transfer syntaxes, longest first, and the packages that decode them
    ("1.2.840.10008.1.2.4.9", JPEG2000),
    ("1.2.840.10008.1.2.4.2", JPEG2000),
    ("1.2.840.10008.1.2.4", JPEG),
)
PIXELS = ("PixelData", "FloatPixelData", "DoubleFloatPixelData")
PADDING = (
    ("PixelPaddingValue", "PixelPaddingRangeLimit"),
    ("FloatPixelPaddingValue", "FloatPixelPaddingRangeLimit"),
    ("DoubleFloatPixelPaddingValue", "DoubleFloatPixelPaddingRangeLimit"),
)

KEYED = "dicom-"  # how the name of a patient or study begins that stands for an id of a header
HEADER = ("PatientID", "StudyInstanceUID", "PatientAge", "PatientSex", "ViewPosition", "Manufacturer")


def keyed(patients):
    """Those names of patients that stand for an id of a header, which is one person's anywhere: a set."""
    return {patient for patient in patients if patient.startswith(KEYED)}


class Grey(NamedTuple):
    """values: float64 [H, W], or uint8 [H, W, 3] of a picture in colour; padding: bool [H, W], or None where
    the file names none; white: the value that is white where black is 0, or None where the file does not
    tell."""

    values: np.ndarray
    padding: np.ndarray
    white: float


def read(path, max_pixels):
    """The Grey of a DICOM file of one image. OSError, with what to do, for kinds that are not read."""
    try:
        import pydicom
        from pydicom.pixels import apply_windowing, pixel_array
    except ImportError:
        raise OSError("DICOM needs the package pydicom: pip install pydicom") from None
    file = _parse(path, pydicom)
    frames = int(file.get("NumberOfFrames") or 1)
    if frames != 1:
        raise OSError(f"DICOM of {frames} frames: only single images can be read")
    if "Rows" not in file or not any(name in file for name in PIXELS):
        raise OSError(f"DICOM without a picture ({_kind(file)})")
    if file.Rows * file.Columns > max_pixels:
        raise OSError(f"{file.Columns} x {file.Rows} pixels are more than the limit of {max_pixels}")
    _check_decoder(file)
    photometric = file.get("PhotometricInterpretation")
    try:
        raw = pixel_array(
            file, correct_unused_bits=False
        )  # a padding value may lie in bits that are not used
    except RuntimeError as error:
        raise OSError(_not_decoded(file.file_meta.TransferSyntaxUID, error)) from None
    if raw.ndim == 3 and raw.dtype == np.uint8:
        return Grey(raw, None, 255)
    if raw.ndim != 2 or photometric == "PALETTE COLOR":
        raise OSError("only grey and 8-bit RGB DICOM images are supported")
    # Padding is named in stored values, before any table; the tables then hold for the picture alone.
    padding, values = _padding(file, raw), _used_bits(raw, file)
    _forget_unusable(file)
    white = _white(file)
    values = _modality(file, values)
    if file.get("VOILUTSequence"):
        values = _look_up(file.VOILUTSequence[0], values)
    elif "WindowWidth" in file:
        # pydicom rescales the window's output once more, which a negative slope turns round; what becomes
        # black and white is found later.
        _delete(file, "RescaleSlope", "RescaleIntercept")
        values = apply_windowing(values, file)
    values = np.asarray(values, dtype=np.float64)
    if photometric == "MONOCHROME1":  # low values are bright there
        values = -values if white is None else white - values
    return Grey(values, padding, white)


def header(path):
    """{name of HEADER: text} of a DICOM file, "" where it says nothing. Its pixels are not read.

    The bytes are taken as they are (Latin-1): what is no valid age or id is for the reader to find."""
    try:
        import pydicom
    except ImportError:
        raise OSError("DICOM needs the package pydicom: pip install pydicom") from None
    marked = _check_beginning(path, pydicom)
    file = pydicom.dcmread(path, stop_before_pixels=True, specific_tags=list(HEADER), force=not marked)
    found = {}
    for name in HEADER:
        element = file.get_item(name)
        value = b"" if element is None else element.value
        text = value.decode("latin-1") if isinstance(value, bytes) else str(value or "")
        found[name] = text.strip(" \0\t\r\n")
    return found


def _parse(path, pydicom):
    """The data set of a file; one without the DICM mark is taken for a bare data set, as older archives wrote
    them."""
    marked = _check_beginning(path, pydicom)
    file = pydicom.dcmread(path, force=not marked)
    if "TransferSyntaxUID" not in file.file_meta:
        if "PixelData" in file and file["PixelData"].is_undefined_length:
            raise OSError("DICOM with compressed pixels that does not say how (no transfer syntax)")
        implicit, little = file.original_encoding
        if not little:
            syntax = pydicom.uid.ExplicitVRBigEndian
        elif implicit:
            syntax = pydicom.uid.ImplicitVRLittleEndian
        else:
            syntax = pydicom.uid.ExplicitVRLittleEndian
        file.file_meta.TransferSyntaxUID = syntax
    return file


def _check_beginning(path, pydicom):
    """Whether a file has the DICM mark. OSError where it is no DICOM file, or its data set is deflated."""
    with open(path, "rb") as file:
        head = file.read(132)
    marked = head[128:] == b"DICM"
    if marked:
        meta = pydicom.filereader.read_file_meta_info(path)
        if meta.get("TransferSyntaxUID") == pydicom.uid.DeflatedExplicitVRLittleEndian:
            raise OSError("deflated DICOM is not supported: a small file could unpack to any size")
    elif not head.startswith(b"\x08\0"):  # a header without mark could name the deflated syntax unseen
        raise OSError("not a DICOM file")
    return marked


def _kind(file):
    """What a DICOM file holds, in the standard's words."""
    uid = file.get("SOPClassUID")
    return getattr(uid, "name", None) or "of an unknown kind"


# ---------------------------------------------------------------- compressed pixels


def _packages(syntax):
    """The packages that decode a transfer syntax, or None."""
    return next((names for begin, names in DECODERS if str(syntax).startswith(begin)), None)


def _check_decoder(file):
    """OSError naming the packages to install if nothing here decodes the file's pixels."""
    from pydicom.pixels import get_decoder

    syntax = file.file_meta.TransferSyntaxUID
    try:
        known = get_decoder(syntax).is_available
    except NotImplementedError:
        raise OSError(f"DICOM compressed as {syntax.name}, which is not read: convert it first") from None
    if not known:
        packages = _packages(syntax) or JPEG
        raise OSError(f"DICOM compressed as {syntax.name} needs other packages: pip install {packages}")


def _not_decoded(syntax, error):
    """Why compressed pixels could not be decoded, and what may help."""
    reason = in_one_line(error)
    packages = _packages(syntax)
    if packages is None or not syntax.is_encapsulated:
        return f"damaged or not supported ({reason})"
    return f"damaged, or {syntax.name} of a kind that needs: pip install {packages} ({reason})"


# ---------------------------------------------------------------- values


def _number(file, name):
    """The first finite number of an element, or None where it is absent, empty or no number."""
    value = file.get(name)
    with contextlib.suppress(TypeError, IndexError):
        if not isinstance(value, (str, bytes)):
            value = value[0]
    try:
        value = float(value)
    except (TypeError, ValueError):
        return None
    return value if np.isfinite(value) else None


def _padding(file, raw):
    """bool [H, W], where stored values are padding; None if the file names none."""
    for name, limit in PADDING:
        first = _number(file, name)
        if first is None:
            continue
        last = _number(file, limit)
        ends = [_stored(value, raw.dtype) for value in (first, first if last is None else last)]
        return (raw >= min(ends)) & (raw <= max(ends))
    return None


def _stored(value, dtype):
    """A padding value as it is stored: 63536 is -2000 in signed 16 bits, and some writers mix the two up."""
    if dtype.kind not in "iu":
        return value
    lowest, count = np.iinfo(dtype).min, 2 ** (8 * dtype.itemsize)
    return (int(value) - lowest) % count + lowest


def _used_bits(raw, file):
    """Stored values without what stands in bits above Bits Stored, which mean nothing. OSError where the
    picture itself stands in others than the lowest bits."""
    used = int(file.get("BitsStored") or 0)
    unused = 8 * raw.dtype.itemsize - used
    if raw.dtype.kind not in "iu" or not 0 < unused < 8 * raw.dtype.itemsize:
        return raw
    if (high := file.get("HighBit")) is not None and int(high) != used - 1:
        raise OSError(f"HighBit is {high}, and BitsStored {used}: only pictures in the lowest bits are read")
    return raw << unused >> unused


def _forget_unusable(file):
    """Delete rescaling, windows and tables that say nothing: empty, half given, or without width."""
    slope, intercept = _number(file, "RescaleSlope"), _number(file, "RescaleIntercept")
    if not slope or intercept is None or (slope, intercept) == (1, 0):
        _delete(file, "RescaleSlope", "RescaleIntercept")
    linear = str(file.get("VOILUTFunction") or "LINEAR").upper() == "LINEAR"
    width, centre = _number(file, "WindowWidth"), _number(file, "WindowCenter")
    if width is None or centre is None or width <= 0 or (linear and width < 1):
        _delete(file, "WindowWidth", "WindowCenter")
    if "VOILUTFunction" in file and not file.VOILUTFunction:
        _delete(file, "VOILUTFunction")
    table = (file.get("VOILUTSequence") or [{}])[0]
    if table.get("LUTDescriptor") is None or table.get("LUTData") is None:
        _delete(file, "VOILUTSequence")


def _delete(file, *names):
    for name in names:
        if name in file:
            delattr(file, name)


def _white(file):
    """2^bits - 1 of a picture of at most 8 unsigned bits whose values no table changes, else None. A window
    leaves them in that range."""
    bits, signed = int(file.get("BitsStored") or 0), file.get("PixelRepresentation")
    changed = any(name in file for name in ("ModalityLUTSequence", "RescaleSlope", "VOILUTSequence"))
    if not 0 < bits <= 8 or signed or changed or "PixelData" not in file:
        return None
    return 2**bits - 1


def _modality(file, values):
    """Stored values -> modality values (C.11.1 of the standard's part 3)."""
    if file.get("ModalityLUTSequence"):
        return _look_up(file.ModalityLUTSequence[0], values)
    if "RescaleSlope" in file:
        return values * _number(file, "RescaleSlope") + _number(file, "RescaleIntercept")
    return values


def _look_up(item, values):
    """Values through a table (a LUT item): below its first value its first entry, above its last its last.

    pydicom's own look-up takes the index modulo 256 where the entries have 8 bits."""
    count, first, bits = item.LUTDescriptor
    count = count or 2**16
    if not 8 <= bits <= 16:
        raise OSError(f"DICOM with a table of {bits} bits an entry")
    table = item.LUTData
    if isinstance(table, bytes):  # one byte an entry, or two
        kind = "<u2" if len(table) >= 2 * count else np.uint8
        table = np.frombuffer(table, kind)
    table = np.asarray(table, dtype=np.float64).reshape(-1)
    if len(table) < count:
        raise OSError(f"DICOM with a table of {len(table)} entries instead of {count}")
    index = np.rint(np.asarray(values, dtype=np.float64)) - first
    return table[np.clip(index, 0, count - 1).astype(np.int64)]
