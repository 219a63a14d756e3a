"""Score new radiographs with a calibrated run: probability and decision for each file.

    python predict.py PATHS... --run outputs/pretrained > predictions.csv

PATHS are files, folders (searched recursively) or quoted globs: JPEG, PNG (8 and 16 bit, grey or colour), and
DICOM (needs the package pydicom). Prints CSV (or --jsonl) to stdout, progress to stderr: path, p_pneumonia,
decision@0.5, decision@Rec, note. Preprocessing, temperature and thresholds are the run's own, so the test folder
gives calibrate.py's scores. A file that cannot be read gets a note in its row and makes the exit code 2; the rest
is scored all the same. Memory does not grow with the number of files.

    python predict.py --export model.onnx --run outputs/pretrained

writes an ONNX file instead (needs onnx, onnxscript and onnxruntime), checked against PyTorch. Not a medical device.
"""

import csv
import glob
import itertools
import json
import os
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError

import common
import data
import engine
import metrics

COLUMNS = ("path", "p_pneumonia", "decision@0.5", "decision@Rec", "note")
DICOM = (".dcm", ".dicom")


def find_files(paths):
    """Yield the image files of files, folders (recursive, sorted, hidden ones passed over) and globs, lazily.

    InputError for a path that is none of these, before the first file is yielded."""
    expanded = []
    for path in paths:
        found = [path] if os.path.exists(path) else sorted(glob.glob(path, recursive=True))
        if not found:
            raise common.InputError(f"{path} is no file, no folder and no glob that matches anything")
        expanded += found
    return itertools.chain.from_iterable(map(_walk, expanded))


def _walk(path):
    if not os.path.isdir(path):
        yield path
        return
    for folder, folders, files in os.walk(path):
        folders[:] = sorted(f for f in folders if not f.startswith((".", "__MACOSX")))
        for name in sorted(files):
            if name.lower().endswith(data.EXTENSIONS + DICOM) and not name.startswith("."):
                yield os.path.join(folder, name)


def open_dicom(path):
    """A DICOM file -> grey 8-bit PIL image, dense = bright, window and rescale applied. OSError if impossible."""
    try:
        import pydicom
        from pydicom.errors import InvalidDicomError
        from pydicom.pixels import apply_modality_lut, apply_voi_lut
    except ImportError:
        raise OSError("DICOM needs the package pydicom: pip install pydicom") from None
    try:
        file = pydicom.dcmread(path)
        stored = file.pixel_array
    except (
        InvalidDicomError,
        AttributeError,
        ValueError,
        RuntimeError,
        NotImplementedError,
        KeyError,
    ) as error:
        raise OSError(f"DICOM not readable: {' '.join(str(error).split())[:200]}") from None
    if stored.ndim == 3 and file.get("SamplesPerPixel", 1) == 3:
        return Image.fromarray(stored.astype(np.uint8)).convert("L")
    if stored.ndim != 2:
        raise OSError(f"DICOM with {stored.shape[0]} frames: give single images")
    values = np.asarray(apply_voi_lut(apply_modality_lut(stored, file), file), dtype=np.float64)
    low, high = values.min(), values.max()
    if high <= low:
        raise OSError("DICOM image is constant")
    grey = (values - low) / (high - low)
    if file.get("PhotometricInterpretation") == "MONOCHROME1":  # low values are bright there
        grey = 1 - grey
    return Image.fromarray(np.round(grey * 255).astype(np.uint8))


def load_image(path, config):
    """A file -> (uint8 [S, S], (width, height), colourfulness in [0, 1]); OSError if it cannot be read."""
    if path.lower().endswith(DICOM):
        image = open_dicom(path)
        return data.to_square(image, config.img_size, config.resize), image.size, 0.0
    if os.path.getsize(path) == 0:
        raise OSError("the file is empty")
    colour = 0.0
    with Image.open(path) as image:
        size = image.size
        if image.mode in ("RGB", "RGBA", "P", "CMYK", "YCbCr"):
            image.draft("RGB", (64, 64))
            small = np.asarray(image.convert("RGB").resize((64, 64)), dtype=np.float64)
            colour = float((small.max(axis=2) - small.min(axis=2)).mean() / 255)
    return data.decode(path, config.img_size, config.resize), size, colour


def unlike(pixels, size, colour, results):
    """What about an image is unlike the training images, as text; empty if nothing."""
    notes = []
    values = {"mean": float(pixels.mean()) / 255, "std": float(pixels.std()) / 255}
    for key, word in (("mean", "brightness"), ("std", "contrast")):
        low, high = results["input_range"][key]
        if not low - 1e-6 <= values[key] <= high + 1e-6:
            notes.append(f"{word} {values[key]:.2f} outside the training range {low:.2f} to {high:.2f}")
    for value, (key, (low, high)) in zip(size, results["split"]["original_size"].items()):
        if low < high and not low <= value <= high:  # a set resized beforehand has one size and tells nothing
            notes.append(f"{key} {value} px outside the training range {low} to {high}")
    if colour > 0.08:
        notes.append("colour photograph?")
    return "unlike the training images: " + ", ".join(notes) if notes else ""


class Scorer:
    """A calibrated run, ready to score: model, preprocessing, temperature, thresholds."""

    def __init__(self, run, device, tta):
        self.model, self.results = engine.load_run(run)
        calibration = common.read_calibration(run, "-tta" if tta else "")
        self.threshold = float(calibration["threshold"])
        self.temperature = float(calibration["temperature"]) if calibration["temperature_applied"] else 1.0
        self.config = data.config_from_json(self.results["data"])
        try:
            self.views = data.tta_views(**calibration["tta"]) if tta else None
            self.results["input_range"], self.results["split"]["original_size"]
        except (KeyError, TypeError) as error:
            raise common.InputError(
                f"{run}: results.json or its calibration is incomplete ({error!r})"
            ) from None
        self.device, self.classes = device, self.config.classes
        self.amp = engine.trained_precision(self.results, device)
        self.model.to(device)

    @torch.inference_mode()
    def scores(self, images):
        """uint8 [B, S, S] -> P(PNEUMONIA), float64 [B]."""
        x = data.normalise(torch.from_numpy(images).to(self.device), self.config.normalise)
        logits = engine.forward(
            self.model, x, mean=self.results["mean"], std=self.results["std"], amp=self.amp, views=self.views
        )
        scores = metrics.tempered(logits.cpu().numpy(), self.temperature)
        if not np.isfinite(scores).all():
            raise common.InputError(
                "the model gives NaN scores: its checkpoint is damaged, or its precision too low"
            )
        return scores

    def rows(self, paths, batch_size):
        """Yield a dict of COLUMNS for every path, in order; unreadable files have None for scores and decisions."""

        def read(path):
            try:
                return load_image(path, self.config)
            except (
                OSError,
                UnidentifiedImageError,
                Image.DecompressionBombError,
                ValueError,
                SyntaxError,
            ) as error:
                return f"unreadable: {error}"

        paths = iter(paths)
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            chunk = list(itertools.islice(paths, batch_size))
            reading = pool.map(read, chunk)
            while chunk:
                following = list(itertools.islice(paths, batch_size))
                images, names, chunk = list(reading), chunk, following
                reading = pool.map(read, following)  # the next batch is decoded while this one is scored
                good = [i for i in images if not isinstance(i, str)]
                scores = iter(self.scores(np.stack([i[0] for i in good])) if good else ())
                for name, image in zip(names, images):
                    if isinstance(image, str):
                        yield dict(zip(COLUMNS, (name, None, None, None, image)))
                        continue
                    p = float(next(scores))
                    yield dict(
                        zip(
                            COLUMNS,
                            (
                                name,
                                p,
                                self.classes[p >= 0.5],
                                self.classes[p >= self.threshold],
                                unlike(*image, self.results),
                            ),
                        )
                    )


class Exported(torch.nn.Module):
    """Grey float32 [B, 1, S, S] in [0, 1] -> P(PNEUMONIA) float32 [B]: scaling and temperature inside."""

    def __init__(self, model, mean, std, temperature):
        super().__init__()
        self.model, self.mean, self.std, self.temperature = model, mean, std, temperature

    def forward(self, image):
        logits = self.model(engine.scale_input(image, self.mean, self.std)) / self.temperature
        return torch.sigmoid(logits[:, 1] - logits[:, 0])


def export(scorer, run, path):
    """Write an ONNX file with preprocessing and thresholds in its metadata; InputError if it disagrees by > 1e-4."""
    try:
        import onnx
        import onnxruntime
        import onnxscript  # noqa: F401  (torch.onnx needs it)
    except ImportError as error:
        raise common.InputError(
            f"--export needs packages that are not here ({error.name}): "
            "pip install onnx onnxscript onnxruntime"
        ) from None
    size, results = scorer.config.img_size, scorer.results
    model = Exported(scorer.model.cpu().float(), results["mean"], results["std"], scorer.temperature).eval()
    probe = torch.rand(3, 1, size, size, generator=torch.Generator().manual_seed(0))
    with common.atomic_path(path) as tmp:
        torch.onnx.export(
            model,
            (probe,),
            tmp,
            input_names=["image"],
            output_names=["p_pneumonia"],
            dynamo=True,
            dynamic_shapes={"image": {0: torch.export.Dim("batch")}},
            external_data=False,
            verbose=False,
        )
        graph = onnx.load(tmp)
        onnx.helper.set_model_props(
            graph,
            {
                "run": str(run),
                "model": results["model"],
                "classes": json.dumps(scorer.classes),
                "input": f"grey float32 [batch, 1, {size}, {size}] in [0, 1]; files: {scorer.config.resize} to {size} px, "
                f"then data.normalise(..., {scorer.config.normalise!r})",
                "mean": json.dumps(results["mean"]),
                "std": json.dumps(results["std"]),
                "scaling": "inside the graph",
                "normalise": scorer.config.normalise,
                "temperature": repr(scorer.temperature),
                "threshold@0.5": "0.5",
                "threshold@Rec": repr(scorer.threshold),
                "synthetic": json.dumps(results["synthetic"]),
            },
        )
        onnx.save(graph, tmp)
        session = onnxruntime.InferenceSession(str(tmp), providers=["CPUExecutionProvider"])
        with torch.inference_mode():
            worst = max(
                float(np.abs(session.run(None, {"image": x.numpy()})[0] - model(x).numpy()).max())
                for x in (probe, probe[:1])
            )
        if not worst <= 1e-4:
            raise common.InputError(
                f"the exported model differs from PyTorch by {worst:.1e}: nothing was written"
            )
    print(f"wrote {path}: differs from PyTorch by at most {worst:.1e} in probability")


def parse():
    """Checked command line."""
    parser = common.parser(__doc__)
    parser.add_argument("paths", nargs="*", metavar="PATHS", help="files, folders or globs")
    parser.add_argument("--run", default="outputs/pretrained", metavar="DIR", help="a calibrated run folder")
    parser.add_argument(
        "--tta", action="store_true", help="test-time augmentation, as calibrated with calibrate.py --tta"
    )
    parser.add_argument("--jsonl", action="store_true", help="JSON lines instead of CSV")
    parser.add_argument(
        "--export", default=None, metavar="FILE.onnx", help="write an ONNX model instead of scoring"
    )
    parser.add_argument("--device", default="auto", help="auto (cuda > mps > cpu), cuda, mps, cpu")
    parser.add_argument("--batch-size", type=int, default=64, help="images a step")
    args = parser.parse_args()
    if bool(args.paths) == bool(args.export):
        raise common.InputError("give either PATHS to score or --export FILE.onnx")
    if args.batch_size < 1:
        raise common.InputError(f"--batch-size must be at least 1, got {args.batch_size}")
    return args


def main():
    args = parse()
    scorer = Scorer(args.run, engine.pick_device(args.device), args.tta)
    if scorer.results["synthetic"]:
        common.say("note: this run was trained on SYNTHETIC images; its scores mean nothing for patients")
    if args.export:
        return export(scorer, args.run, args.export)
    files = find_files(args.paths)
    writer = csv.DictWriter(sys.stdout, COLUMNS, lineterminator="\n")
    if not args.jsonl:
        writer.writeheader()
    count = bad = odd = 0
    for row in scorer.rows(files, args.batch_size):
        count += 1
        bad += row["p_pneumonia"] is None
        odd += row["note"].startswith("unlike")
        if args.jsonl:
            print(json.dumps(row))
        else:
            writer.writerow(row)
        if count % 1000 == 0:
            common.say(f"{count} files")
    common.say(f"{count} files: {bad} unreadable, {odd} unlike the training images")
    if not count:
        raise common.InputError("no image files in " + ", ".join(args.paths))
    if bad:
        raise common.InputError(f"{bad} of {count} files could not be read; their rows say why")


if __name__ == "__main__":
    common.start(main)
