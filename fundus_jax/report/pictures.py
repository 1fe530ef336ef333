"""Pictures as data URIs, small enough to put many into one file.

The report shows what a person should see, not the tensor: large photographs are reduced, small phantoms
enlarged smoothly; JPEG is enough for that. Neighbours: `cases` asks for them, `fundus_jax.data` opens the
images and bounds their size.
"""

import base64
import io

from PIL import Image

# Pixels of the longer side. Pictures are shown 220 CSS pixels wide, so 448 are sharp on any screen.
LARGEST, SMALLEST = 448, 224
QUALITY = 88


def data_uri(image: Image.Image) -> str:
    """A JPEG data URI of a picture of any mode. Raises OSError for pixels that can not be decoded."""
    if max(image.size) > LARGEST:
        image.draft("RGB", (LARGEST, LARGEST))
    if image.mode.startswith(("I", "F")):
        image = _eight_bits(image)
    image = image.convert("RGB")
    factor = LARGEST / max(image.size) if max(image.size) > LARGEST else SMALLEST / max(image.size)
    if factor < 1 or max(image.size) < SMALLEST:
        size = [max(1, round(side * factor)) for side in image.size]
        image = image.resize((size[0], size[1]), Image.Resampling.LANCZOS)
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=QUALITY, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(stream.getvalue()).decode()


def _eight_bits(image: Image.Image) -> Image.Image:
    """Grey values of any depth, stretched from their extremes to 0 and 255."""
    wide = image.convert("F")
    low, high = wide.getextrema()
    scale = 255 / max(float(high) - float(low), 1e-9)  # type: ignore[arg-type]
    return wide.point(lambda value: value * scale - float(low) * scale).convert("L")  # type: ignore[arg-type]
