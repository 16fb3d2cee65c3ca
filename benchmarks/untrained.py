"""Teachers for benchmarks that only time them: random weights, adopted as a model folder."""

from __future__ import annotations

from pathlib import Path

from kdprune_pipelines import teacher
from kdprune_pipelines._console import quiet
from safetensors.torch import save_file

from kdprune_data.formats.dataset import Dataset
from kdprune_data.learn.models import build, resolve
from kdprune_data.learn.views import Normalisation
from kdprune_data.learn.weights import weights

NORMALISATION = Normalisation((0.4914, 0.4822, 0.4465), (0.247, 0.2435, 0.2616))


def adopted(work: Path, data: Dataset, model: str) -> Path:
    """The folder of a teacher for images of one size, made in a folder of the caller's, once."""
    size, folder, file = int(data.sizes[0, 0]), work / model, work / f"{model}.safetensors"
    if (folder / "manifest.json").is_file():
        return folder
    work.mkdir(parents=True, exist_ok=True)
    save_file(weights(build(resolve(model, classes=len(data.classes), size=size), seed=1)), file)
    given = {"weights": file, "epochs": 0, "mean": NORMALISATION.mean, "std": NORMALISATION.std}
    with quiet():
        teacher.run(teacher.TeacherConfig.from_dict(given | {"data": data.folder, "model": model, "size": size, "out": folder}))
    return folder
