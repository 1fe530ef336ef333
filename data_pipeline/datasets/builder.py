"""Shows a list of samples as a TFDS data set, without TensorFlow.

TFDS needs TensorFlow only to encode arrays, so images are given as encoded bytes, and the file format has to
be ArrayRecord: `Builder(data_dir=..., file_format="array_record")`, then `download_and_prepare` and
`as_data_source`. The project's own training data are written by `ingest` from the same samples.
"""

import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import tensorflow_datasets as tfds

from data_pipeline import images
from data_pipeline.datasets.base import Sample, annotated, picture


class SampleBuilder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Base of the builders: a subclass gives VERSION, MANUAL_DOWNLOAD_INSTRUCTIONS and `samples`."""

    samples: Callable[[Path], list[Sample]]
    # Nothing is downloaded, so there are no checksums. Where TFDS looks for them it imports
    # importlib_resources, which it does not ask for when it is installed.
    url_infos: ClassVar[dict] = {}

    def _info(self) -> tfds.core.DatasetInfo:
        text = tfds.features.Text()
        features = tfds.features.FeaturesDict(
            {
                "key": text,
                "image": tfds.features.Image(),
                "patient": text,
                "eye": text,
                "modality": text,
                "labels": tfds.features.Sequence({"task": text, "answer": text}),
                "searched": tfds.features.Sequence(text),
                "findings": tfds.features.Sequence(text),
                "boxes": tfds.features.Sequence(
                    {"finding": text, "corners": tfds.features.Tensor(shape=(4,), dtype=np.int32)}
                ),
            }
        )
        return tfds.core.DatasetInfo(builder=self, features=features, description=type(self).__doc__)

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Iterator]:
        found = type(self).samples(Path(dl_manager.manual_dir))
        splits = sorted({sample.split for sample in found})
        return {split: self._generate_examples([s for s in found if s.split == split]) for split in splits}

    def _generate_examples(self, samples: list[Sample]) -> Iterator[tuple[str, dict[str, Any]]]:
        for sample in map(annotated, samples):
            corners = [{"finding": b.finding, "corners": [b.x1, b.y1, b.x2, b.y2]} for b in sample.boxes]
            yield (
                sample.key,
                {
                    "key": sample.key,
                    "image": io.BytesIO(images.prepare(picture(sample))),
                    "patient": sample.patient,
                    "eye": sample.eye,
                    "modality": sample.modality,
                    "labels": [{"task": t, "answer": a} for t, a in sample.labels.items()],
                    "searched": list(sample.searched),
                    "findings": list(sample.findings or ()),
                    "boxes": corners,
                },
            )
