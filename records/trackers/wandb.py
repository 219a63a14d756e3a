"""Weights & Biases: offline unless WANDB_API_KEY is set; files are in wandb/ next to the run folder. It
measures processor, memory and GPU by itself."""

import os
import uuid

from records.trackers.kept import PATIENCE, PROJECT, title
from records.trackers.usage import SECONDS


class Wandb:
    """A run of Weights & Biases."""

    chosen = None  # the folder of artifacts that this process has named; another one is the user's

    def __init__(self, run, known):
        beside = os.path.abspath(run.folder.parent)
        # Artifacts wait there for `wandb sync`; it would take the home folder.
        if os.environ.get("WANDB_DATA_DIR") in (None, Wandb.chosen):
            Wandb.chosen = os.environ["WANDB_DATA_DIR"] = os.path.join(beside, "wandb")
        import wandb

        usual = "online" if os.environ.get("WANDB_API_KEY") else "offline"
        mode = os.environ.get("WANDB_MODE") or usual
        settings = wandb.Settings(
            silent=True, console="off", init_timeout=PATIENCE, x_stats_sampling_interval=SECONDS
        )
        place = dict(dir=beside, mode=mode, settings=settings)
        self.image, self.artifact, self.title = wandb.Image, wandb.Artifact, title(run)
        about = dict(name=run.folder.name)
        if "WANDB_SWEEP_ID" not in os.environ:  # a sweep has its own project, and a name for each run
            about |= dict(project=PROJECT, id=known or uuid.uuid4().hex[:8])
        self.run = wandb.init(**about, **place, resume="allow", reinit="finish_previous")
        self.reference = self.run.id

    def parameters(self, values):
        self.run.config.update(values, allow_val_change=True)

    def watch(self):
        """It does so by itself, from `init` on."""

    def figures(self, values, epoch):
        if epoch is None:
            self.run.summary.update(values)
        else:
            self.run.log({**values, "epoch": epoch})

    def picture(self, name, path):
        self.run.log({name: self.image(path)})

    def last(self, files):
        self._keep(files, ["last"])

    def best(self, files, name):
        # The newest version is `latest`, whoever names it so: the best is kept after the last.
        self._keep(files, ["best", "latest"])

    def _keep(self, files, aliases):
        """A new version of the artifact that has the name of the run folder."""
        artifact = self.artifact(self.title, type="model")
        for name, path in files.items():
            artifact.add_file(str(path), name=name)
        self.run.log_artifact(artifact, aliases=aliases)

    def close(self):
        self.run.finish()
