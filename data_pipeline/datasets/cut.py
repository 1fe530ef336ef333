"""Images and masks that are a part of a file: a B-scan of a volume, one half of a picture.

They are cut where their shard is written, so that listing a data set stays a matter of names. Neighbours:
`base.Sample` holds them in the place of files, `masks` unites them, `metaimage` reads volumes.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from numpy.typing import NDArray
from PIL import Image

from data_pipeline import images


@dataclass(frozen=True)
class Cut:
    """What `draw(file, *part)` gives: pixels [H, W] or [H, W, 3] in uint8, or a mask [H, W] in bool.

    `draw` is a function of a module, so that a cut can be sent to a worker process in place of its pixels. It
    raises DataError with the reason where the file is bad.
    """

    file: Path
    draw: Callable[..., NDArray]
    part: tuple[str | int, ...] = ()

    @property
    def name(self) -> str:
        """For messages: the file and the part of it."""
        return f"{self.file.name}[{', '.join(map(str, self.part))}]"

    def pixels(self) -> NDArray:
        """The pixels, read now."""
        return self.draw(self.file, *self.part)

    def encoded(self) -> bytes:
        """The image as PNG, without loss."""
        return images.encode(Image.fromarray(self.pixels()))
