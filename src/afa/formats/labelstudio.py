"""Label Studio's predictions: tasks with brush labels, and the labeling interface that shows them."""

from __future__ import annotations

from pathlib import PurePosixPath
from urllib.parse import quote
from xml.sax.saxutils import quoteattr

from afa.formats.job import Job, JsonList, MaskItem
from afa.formats.rle import label_studio_rle


def write_labelstudio(job: Job) -> None:
    """Write tasks.json, a task with one prediction for each image, and config.xml, the labeling interface.

    Images are named as Label Studio's local storage does, from the folder that holds the folder of images.
    """
    with job.place("tasks.json").open("wb") as file:
        file.write(b"[")
        tasks = JsonList(file)
        for item, label in job.masks:
            job.count_ignored(label)
            results = [
                {
                    "id": f"class{value}",
                    "type": "brushlabels",
                    "from_name": "label",
                    "to_name": "image",
                    "original_height": label.shape[0],
                    "original_width": label.shape[1],
                    "image_rotation": 0,
                    "value": {
                        "format": "rle",
                        "rle": label_studio_rle(label == value),
                        "brushlabels": [job.classes[value - 1]],
                    },
                }
                for value in job.present(label)
            ]
            tasks.add({"data": {"image": _url(item)}, "predictions": [{"model_version": "afa", "result": results}]})
        file.write(b"]\n")
    labels = [
        f'    <Label value={quoteattr(name)} background="#{"".join(f"{part:02x}" for part in job.color(value))}"/>'
        for value, name in enumerate(job.classes, start=1)
    ]
    lines = [
        "<View>",
        '  <Image name="image" value="$image" zoom="true"/>',
        '  <BrushLabels name="label" toName="image">',
        *labels,
        "  </BrushLabels>",
        "</View>",
    ]
    job.write("config.xml", "\n".join(lines) + "\n")


def _url(item: MaskItem) -> str:
    """The image as local storage names it: its path below the parent of the folder of images."""
    depth = len(PurePosixPath(item.name).parts)
    root = list(item.image_path.absolute().parents)[:depth][-1]
    return "/data/local-files/?d=" + quote(f"{root.name}/{item.file_name}")
