"""Your own images: a folder with one sub-folder per class. Run it as ``python examples/own_images.py FOLDER``."""

import sys
from dataclasses import replace
from pathlib import Path

from gatewright.data import DataConfig
from gatewright.recipes import digits
from gatewright.report import write_all
from gatewright.train import TrackingConfig, load_run, train


def main(folder: str) -> Path:
    """Train a mixture on the images, classify one of them, and return the page that shows the experts."""
    recipe = digits()
    data = DataConfig(name="folder", path=folder, image_size=32, batch_size=32)
    config = replace(recipe, data=data, epochs=3, tracking=TrackingConfig(enabled=False))
    result, run = train(config, report=write_all)
    print(f"test accuracy {result['test_accuracy']:.1%}")

    trained = load_run(run)
    image = next(path for path in Path(folder).rglob("*") if path.suffix in (".png", ".jpg"))
    prediction = trained.task.predict(trained.model, image, trained.fingerprint, top=1)
    print(f"{image.name}: {trained.task.sentence(prediction)}")
    return run / "report.html"


if __name__ == "__main__":
    print(main(sys.argv[1]))
