"""Where the masks of a call go: a folder, with files for other tools beside them, or shards.

What makes the masks is up to `afa.inference.files`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from afa.config import Config, DataConfig
from afa.data.dataset import TaggedImages
from afa.data.stores import is_remote
from afa.errors import AfaError
from afa.formats.write import mask_items, parse_formats, write_format
from afa.inference.files import pseudo_files
from afa.inference.masks import PredictSummary
from afa.inference.shards import ShardFolder
from afa.inference.stamp import current_masks
from afa.model.network import AfaNetwork
from afa.runtime import Processes


class Output:
    """Where the masks of a call go.

    Args:
        place: Folder, or address of a store.
        formats: Formats of other tools to write as well, names separated by commas.
        shard_size: Images of each shard of masks; 0 writes files, or to a store shards as the images come.
        rle: In shards, run lengths as of COCO in place of PNGs.
        scores: Whether class scores are written too.

    Attributes:
        folder: The place, unless it is a store.
        formats: Names of the formats.
        in_shards: Whether shards are written.

    Raises:
        AfaError: An unknown format; something that is not written beside shards, or `rle` without them.
    """

    def __init__(
        self, place: str | Path, *, formats: str = "", shard_size: int = 0, rle: bool = False, scores: bool = False
    ) -> None:
        self.formats = parse_formats(formats) if formats else ()
        self.in_shards = shard_size > 0 or is_remote(str(place))
        if rle and not self.in_shards:
            raise AfaError("--rle is for shards; add --out-shards N, or leave it out")
        if self.in_shards and (refused := "--scores" if scores else formats):
            raise AfaError(
                f"{refused} is not written beside shards of masks; leave it out, or --out-shards and addresses"
            )
        self.folder, self._place, self._size, self._rle = Path(place), str(place).rstrip("/"), shard_size, rle

    def shards(self, classes: Sequence[str], data: DataConfig) -> ShardFolder:
        """What writes shards of masks with values of the C classes; `data` has `store_retries`."""
        return ShardFolder(self._place, self._size, self._rle, classes, data)

    def convert(
        self, summary: PredictSummary, files: Mapping[str, Path], classes: Sequence[str], processes: Processes
    ) -> PredictSummary:
        """Let the first process write the masks for other tools too; `files` has the image of each name."""
        if not processes.is_main:
            return summary
        names = current_masks(self.folder, files) if self.formats else ()
        items = mask_items(((name, files[name]) for name in names), self.folder)
        written = tuple(write_format(name, items, classes, self.folder) for name in self.formats)
        return dataclasses.replace(summary, formats=written)

    def write_labels(
        self,
        network: AfaNetwork,
        images: TaggedImages,
        config: Config,
        processes: Processes,
        *,
        overlay: bool = False,
        look: Callable[[PredictSummary, TaggedImages, Path], object] = lambda *_: None,
        **how: Any,
    ) -> PredictSummary:
        """Write pseudo labels of tagged images.

        Args:
            network, images, config: As of `pseudo_files`.
            processes: Processes that share the images.
            overlay: Beside files, also write OUT/overlays/NAME.jpg.
            look: Sees of each shard what was done, its images and the folder of their masks, before they are packed.
            how: `kind`, `refine` and `tiling` of `pseudo_files`.

        Raises:
            AfaError: As `pseudo_files` and `write_format`.
        """
        if not self.in_shards:
            how |= {"overlay": overlay, "processes": processes}
            summary = pseudo_files(network, images, self.folder, config=config, **how)
            files = {name: images.image_path(i) for i, name in enumerate(images.names)} if self.formats else {}
            return self.convert(summary, files, images.classes, processes)

        def make(part: TaggedImages, place: Path) -> PredictSummary:
            written = pseudo_files(network, part, place, config=config, **how)
            look(written, part, place)
            return written

        return self.shards(images.classes, config.data).write_images(make, images, processes)
