"""A calibrated run as an ONNX file: grey image -> probability, all that predict.py does in between inside the
graph; and the checks that the file does the same."""

import json

import numpy as np
import torch

from common import scaling
from common.console import InputError, progress
from common.files import atomic_path
from data import load_split
from images.drawn import draw_radiograph
from lungs import masks as lung_masks
from lungs.show import DARK, already_cut_in_graph
from models.inputs import unit_grey

BLANK = 120  # the grey of an image without lungs
CLOSE, CLOSE_WITH_LUNGS = 1e-4, 1e-3  # in probability; a pixel on the lungs' edge may change sides


class Exported(torch.nn.Module):
    """Grey float32 [B, 1, S, S] in [0, 1] -> probability float32 [B], of several findings [B, F]: input
    scaling, views and temperature inside, or `lines`, the (slope, bias) of every finding (Platt scaling).

    Where the model needs the lungs, exposure and the U-Net `net` are inside too, and images that show lungs
    alone on black are treated as lungs.already_cut says."""

    def __init__(self, model, inputs, task, temperature, net=None, lines=None):
        super().__init__()
        self.model, self.inputs, self.task, self.temperature = model, inputs, task, temperature
        self.net, self.lines = net, lines

    def forward(self, image):
        """Grey images, float32 (B, 1, S, S) in [0, 1] -> probabilities, float32 (B,) or (B, F); NaN where it
        is not settled whether an image was cut already."""
        unsettled = None
        if self.net is not None:
            image, unsettled = self.shown(image)
        logits = self.logits(image)
        scores = self.probabilities(logits) if self.lines is None else self.scaled(logits)
        if unsettled is not None:  # rather no number than a wrong one
            scores = torch.where(unsettled.flatten(1), torch.nan, scores)
        return scores[:, 0] if self.task.alone else scores

    def logits(self, image):
        """As Inputs.logits, but with the model once in the graph, not once a view."""
        return self.inputs.mean_logits(self.model, image, together=True)

    def shown(self, image):
        """What the model is shown of grey images, and which of them have too winding a shape to tell."""
        levels = (image * 255).round()
        cut, is_cut, unsettled = already_cut_in_graph(levels)
        masks = torch.where(is_cut, cut, self.net.masks(image))
        grey = unit_grey(levels[:, 0].to(torch.uint8))
        return self.inputs.shown(grey, masks), unsettled

    def probabilities(self, logits):
        """As task.Task.scores: [B, K] -> [B, F]."""
        task, logits = self.task, logits / self.temperature
        if task.kind == "softmax" and task.outputs == 2:
            return torch.sigmoid(logits[:, 1:] - logits[:, :1])
        # "Any disease" is the absence of the healthy class.
        p = logits.sigmoid() if task.kind == "sigmoid" else logits.softmax(dim=1)
        columns = []
        for answer in map(task.answer, task.findings):
            column = p[:, answer.k]
            if answer.sign < 0:
                column = 1 - column
            columns.append(column)
        return torch.stack(columns, dim=1)

    def scaled(self, logits):
        """As task.Task.scaled_scores with a slope and a bias for every finding: [B, K] -> [B, F]."""
        columns = []
        for answer, (slope, bias) in zip(map(self.task.answer, self.task.findings), self.lines):
            odds = logits[:, answer.k]
            if self.task.kind == "softmax":
                rest = [k for k in range(self.task.outputs) if k != answer.k]
                odds = odds - logits[:, rest].logsumexp(dim=1)
            columns.append(torch.sigmoid(answer.sign * odds * slope + bias))
        return torch.stack(columns, dim=1)


def described(scorer):
    """{name: text}: what the metadata of an ONNX file say of a predict.Scorer."""
    size, results = scorer.config.img_size, scorer.results
    calibration, findings = scorer.calibration, scorer.task.findings
    scale = scaling.basis(calibration, scorer.run)
    inside = ": lung masks inside the graph" if scorer.finder else ""
    lines = scale["platt"] and dict(zip(findings, scale["platt"]))
    # All that another program needs to score as predict.py does, and to decide by the same thresholds.
    metadata = {
        "run": str(scorer.run),
        "model": results["model"],
        "classes": json.dumps(scorer.task.classes),
        "findings": json.dumps(findings),
        "input": f"grey float32 [batch, 1, {size}, {size}] in [0, 1]; "
        f"files: {scorer.config.resize} to {size} px",
        "shown": ", ".join(scorer.run.input_modes) + inside,
        "mean": json.dumps(results["mean"]),
        "std": json.dumps(results["std"]),
        "scaling": "inside the graph",
        "precision": "fp32",
        "calibrated in": scale["precision"],
        "views": json.dumps(scale["tta"]),
        "temperature": repr(scale["temperature"]),
        "platt": json.dumps(lines),
        "probabilities": scaling.remark(calibration, scorer.run),
        "site": scorer.site or "",
        "threshold@0.5": "0.5",
        "thresholds by": json.dumps(scale["unit"]),  # ["study", "max"]: the highest score of a study's images
        "synthetic": json.dumps(results["synthetic"]),
    }
    for point, decisions in by_point(scorer.decisions).items():
        thresholds = {decision.finding: decision.threshold for decision in decisions}
        metadata[f"threshold{point}"] = json.dumps(scorer.task.by_finding(thresholds))
    return metadata


def by_point(decisions):
    """{name of an operating point: its decisions, one a finding}."""
    points = {}
    for decision in decisions:
        points.setdefault(decision.point, []).append(decision)
    return points


def probes(size):
    """Images that the graph is tried on, uint8 [5, size, size]: noise, two drawn chests, the lungs of one
    alone on black, and an image without lungs."""
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (size, size), dtype=np.uint8)
    chests = [draw_radiograph(rng, side=size) for _ in range(2)]
    across = np.abs(np.mgrid[-1 : 1 : size * 1j, -1 : 1 : size * 1j])
    lungs_alone = ((across[1] - 0.42) / 0.3) ** 2 + (across[0] / 0.62) ** 2 < 1
    cut = np.where(lungs_alone, np.maximum(chests[0], DARK + 1), 0).astype(np.uint8)
    return np.stack([noise, *chests, cut, np.full((size, size), BLANK, np.uint8)])


def on_cpu(scorer):
    """Move a Scorer to the CPU and to fp32, where an ONNX file works."""
    scorer.model = scorer.model.cpu().float()
    scorer.inputs = scorer.inputs.on("cpu")
    scorer.finder = lung_masks.finder_of(scorer.config, "cpu")
    if scorer.finder and scorer.finder.net is None:
        raise InputError("--export: the heuristic that finds the lungs cannot be part of an ONNX file")


def exports():
    """Whether this torch can write our models: 2.6 and 2.7 refuse a batch of any size."""
    return tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 8)


def export(scorer, path):
    """Write an ONNX file with preprocessing and thresholds in its metadata, and say how many decisions on
    validation differ from those of the calibration. InputError if it disagrees with predict.py by > 1e-4
    (with lung masks inside: 1e-3) on one of `probes`."""
    try:
        import onnx
        import onnxruntime
        import onnxscript  # noqa: F401  (torch.onnx needs it)
    except ImportError as error:
        raise InputError(
            f"--export needs packages that are not here ({error.name}): "
            "pip install onnx onnxscript onnxruntime"
        ) from None
    if not exports():
        raise InputError(
            f"--export needs torch 2.8 or newer, this is {torch.__version__}: pip install -U torch"
        )
    on_cpu(scorer)
    scale, net = scaling.basis(scorer.calibration, scorer.run), scorer.finder and scorer.finder.net
    model = Exported(scorer.model, scorer.inputs, scorer.task, scale["temperature"], net, scale["platt"])
    model, pixels = model.eval(), probes(scorer.config.img_size)
    # The file is written, read back and tried before it gets its name.
    with atomic_path(path) as tmp:
        torch.onnx.export(
            model,
            (_as_input(pixels),),
            tmp,
            input_names=["image"],
            output_names=[scorer.task.scores_name],
            dynamo=True,
            dynamic_shapes={"image": {0: torch.export.Dim("batch")}},
            external_data=False,
            verbose=False,
        )
        graph = onnx.load(tmp)
        onnx.helper.set_model_props(graph, described(scorer))
        onnx.save(graph, tmp)
        session = onnxruntime.InferenceSession(str(tmp), providers=["CPUExecutionProvider"])
        batches = (pixels, pixels[:1], pixels[3:])  # of several sizes, one of a single image
        worst = max(_difference(session, scorer, batch) for batch in batches)
        limit = CLOSE if net is None else CLOSE_WITH_LUNGS
        if not worst <= limit:  # NaN is not close
            raise InputError(
                f"the exported model differs from predict.py by {worst:.1e}: nothing was written"
            )
    print(f"wrote {path}: differs from predict.py in fp32 by at most {worst:.1e} in probability")
    print(counted(scorer, session))


def _as_input(pixels):
    """uint8 [B, S, S] -> what an ONNX file takes, float32 [B, 1, S, S]."""
    return torch.from_numpy(pixels).unsqueeze(1).float() / 255


def _run(session, pixels):
    """uint8 [B, S, S] -> probabilities float64 [B, F]."""
    scores = session.run(None, {"image": _as_input(pixels).numpy()})[0].astype(np.float64)
    return scores.reshape(len(pixels), -1)


def _difference(session, scorer, pixels):
    """How far the ONNX file is from predict.py on images, at most."""
    return float(np.abs(_run(session, pixels) - scorer.scores(pixels)[0]).max())


# ---------------------------------------------------------------- decisions on validation


def counted(scorer, session, batch=32):
    """How many decisions on validation differ between the scores of the calibration and an ONNX file, as a
    line; why that cannot be told where the images or the scores are not there."""
    name = scaling.calibration_name(scorer.calibration.get("tta"), scorer.run)
    precision = scaling.precision_of(scorer.calibration, scorer.run.results)[0]
    try:
        kept, val = scorer.run.saved_scores(name), load_split(scorer.run, "val")
        if kept["val_files"].tolist() != list(val.files):
            raise InputError("the kept scores are of other images: run calibrate.py again")
    except (InputError, OSError) as error:
        return f"decisions on validation could not be counted: {' '.join(str(error).split())}"
    before, after = scorer.task.scores_from(kept["val_logits"], scorer.calibration), []
    batches = np.split(np.arange(len(val)), range(batch, len(val), batch))
    for index in progress(batches, len(val), "validation by the ONNX file", "images", size=len):
        after.append(_run(session, val.pixels(index)))
    after, counts = np.concatenate(after), []
    for point, decisions in by_point(scorer.decisions).items():
        # A finding without a threshold is not decided.
        decided = [decision for decision in decisions if decision.threshold is not None]
        changed = sum(_changed(decision, before, after) for decision in decided)
        counts.append(f"{point} {changed} of {len(decided) * len(val)}")
    worst = np.abs(after - before).max()
    what = "decisions"
    if scorer.unit != "image":  # the file knows no patients
        what = f"answers on single images, at thresholds by {scorer.unit},"
    return (
        f"{what} on validation that differ from calibrate.py's ({precision} there, fp32 here): "
        f"{', '.join(counts)}; probabilities by at most {worst:.1e}"
    )


def _changed(decision, before, after):
    """How many images a Decision answers otherwise by the scores `after` than by those `before`, [N, F]."""
    first, second = (scores[:, decision.k] >= decision.threshold for scores in (before, after))
    return int((first != second).sum())
