"""Your own images, from a folder of tagged files to masks in COCO's format; each `# %%` is a cell.

    python examples/own_data.py [FOLDER]

The script writes everything below FOLDER (default: runs/own_data). It generates its images, and trains random weights
for a few steps only. With photographs, leave out the settings of `afa.train` below; it then chooses them.
"""

# %% afa needs a folder of images and a file that says what is in each. docs/data.md shows the other layouts that it
# reads.
import csv
import json
import sys
from pathlib import Path

import numpy as np
from PIL import Image

import afa
from afa.demo.shapes import SHAPE_CLASSES, draw_shapes

folder = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/own_data")
photos = folder / "photos"
(photos / "images").mkdir(parents=True, exist_ok=True)
with (photos / "tags.csv").open("w", newline="") as file:
    table = csv.writer(file)
    table.writerow(["file", "tags"])
    for number in range(60):
        scene = draw_shapes(np.random.default_rng(number), 96, classes=SHAPE_CLASSES[:3])
        Image.fromarray(scene.image).save(photos / "images" / f"{number:03d}.jpg")
        table.writerow([f"{number:03d}.jpg", " ".join(scene.visible)])

# %% Check the data first. `afa check FOLDER` prints the same as text and writes a page with `--out`.
report = afa.check_data(photos, fast=True)
print(report["layout"])
for problem in report["problems"]:
    print(f"{problem['severity']}: {problem['message']}")
assert not report["errors"]

# %% Train. For photographs: afa.train(photos, folder / "run"), or `afa train PHOTOS --out RUN`.
settings = {
    "model.weights": "",  # random; for photographs leave this out, or name a folder of weights
    "schedule.max_steps": 20,  # far too few
    "schedule.batch_size": 8,
    "augment.crop_size": 64,
    "train.device": "cpu",
}
predictor = afa.train(photos, folder / "run", resume=True, **settings)

# %% Score the run. Without masks this is the F1 of the tags; with index PNGs in photos/masks it is the mIoU.
scores = afa.evaluate(folder / "run", photos, **{"train.device": "cpu"})
print(scores.to_json())

# %% One image in memory ...
prediction = predictor(photos / "images" / "000.jpg")
print({prediction.classes[value]: int((prediction.label == value).sum()) for value in np.unique(prediction.label)})
prediction.overlay(photos / "images" / "000.jpg").save(folder / "000_overlay.png")

# %% ... or a folder of files, in the format of another tool.
summary = afa.predict(folder / "run", photos / "images", folder / "masks", formats="coco", **{"train.device": "cpu"})
print(summary, *summary.formats, sep="\n")

# %% What the other tool sees: pycocotools reads this file as it stands.
coco = json.loads((folder / "masks" / "coco.json").read_text())
print(len(coco["images"]), "images,", len(coco["annotations"]), "regions,", [c["name"] for c in coco["categories"]])
