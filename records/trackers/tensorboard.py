"""TensorBoard: event files in RUN/tensorboard. The checkpoints lie next to them, so none is copied."""

from records.trackers.usage import Usage, measured


class TensorBoard:
    """Event files in RUN/tensorboard."""

    def __init__(self, run, known):
        from torch.utils.tensorboard import SummaryWriter

        self.writer, self.reference = SummaryWriter(str(run.folder / "tensorboard")), "tensorboard"
        self.usage = None

    def parameters(self, values):
        rows = [f"| {name} | {value} |" for name, value in values.items()]
        self.writer.add_text("parameters", "\n".join(["| name | value |", "| --- | --- |", *rows]))

    def watch(self):
        self.usage = measured("tensorboard", Usage)

    def figures(self, values, epoch):
        if epoch and self.usage:
            values = {**values, **self.usage.figures()}
        for name, value in values.items():
            self.writer.add_scalar(name, value, epoch or 0)

    def picture(self, name, path):
        import matplotlib.image

        self.writer.add_image(name, matplotlib.image.imread(path)[..., :3], dataformats="HWC")

    def last(self, files):
        """Nothing: see above."""

    def best(self, files, name):
        """Nothing: see above."""

    def close(self):
        if self.usage:
            self.usage.stop()
        self.writer.close()
