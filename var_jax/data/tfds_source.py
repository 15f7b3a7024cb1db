"""TensorFlow Datasets, read at random from ArrayRecord, without TensorFlow.

The dataset must be on disk: nothing is downloaded from here. It is looked for
where the package looks, in $TFDS_DATA_DIR or ~/tensorflow_datasets.
"""

import dataclasses
import difflib
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

from var_jax.data.decoding import decode

# Which splits may serve for validation, the best first.
VAL_SPLITS = ("validation", "test", "val")


@dataclasses.dataclass(frozen=True)
class TfdsSource:
  """Images of a split, decoded on access by Pillow as files are.

  Args:
    records: encoded images and labels, under the two keys.
    name: of the dataset and the split.
  """

  records: Sequence[Mapping[str, Any]]
  image_key: str
  label_key: str
  class_names: tuple[str, ...]
  name: str

  def __len__(self) -> int:
    return len(self.records)

  def name_of(self, i: int) -> str:
    return f"{self.name}[{i}]"

  def __getitem__(self, i: int) -> dict:
    record = self.records[i]
    label = int(record[self.label_key])
    if not 0 <= label < len(self.class_names):
      raise ValueError(
        f"{self.name_of(i)} has label {label}, outside of 0.."
        f"{len(self.class_names) - 1}; use a split with labels."
      )
    image = decode(record[self.image_key], self.name_of(i))
    return {"image": image, "label": label}


def open_tfds(name: str, split: str) -> TfdsSource:
  """Open `name`, which is dataset[/config][:version]; split "train" or "val".

  Raises:
    ValueError: there is no such dataset, it is not prepared on this machine
      for random access, or it does not hold one image and one class a sample.
  """
  from tensorflow_datasets import decode as decoders

  builder = _builder(name)
  _check_prepared(builder, name)
  chosen = _split(builder, name, split)
  image_key, label_key, class_names = _keys(builder, name)
  records = builder.as_data_source(
    split=chosen,
    decoders={image_key: decoders.SkipDecoding()},
    file_format="array_record",
  )
  spec = f"tfds:{name} {chosen}"
  return TfdsSource(records, image_key, label_key, class_names, spec)


def _builder(name: str):
  import tensorflow_datasets as tfds

  try:
    return tfds.builder(name, data_dir=os.environ.get("TFDS_DATA_DIR") or None)
  except tfds.core.DatasetNotFoundError:
    known = tfds.list_builders(with_community_datasets=False)
    near = difflib.get_close_matches(re.split("[/:]", name)[0], known)
    hint = (
      f"did you mean {', '.join(near)}?"
      if near
      else "see tensorflow.org/datasets."
    )
    raise ValueError(f"tfds has no dataset {name!r}; {hint}") from None
  except Exception as error:  # A builder's own code may raise anything.
    reason = " ".join(str(error).split())
    raise ValueError(
      f"tfds:{name} cannot be opened ({reason[:300]}); give it as "
      "tfds:name[/config][:version]."
    ) from error


def _check_prepared(builder, name: str) -> None:
  if not builder.info.splits:
    raise ValueError(
      f"tfds:{name} is not in {builder.data_dir}; set TFDS_DATA_DIR to where "
      'it is, or prepare it: python -c "import tensorflow_datasets as tfds; '
      f"tfds.builder('{name}', file_format='array_record')"
      '.download_and_prepare()"'
    )
  formats = {f.value for f in builder.info.available_file_formats()}
  if "array_record" not in formats:
    raise ValueError(
      f"tfds:{name} is stored as {', '.join(sorted(formats))} in "
      f"{builder.data_dir}; prepare it with file_format='array_record' in "
      "another TFDS_DATA_DIR."
    )


def _split(builder, name: str, split: str) -> str:
  wanted = ("train",) if split == "train" else VAL_SPLITS
  found = [
    candidate for candidate in wanted if candidate in builder.info.splits
  ]
  if not found:
    raise ValueError(
      f"tfds:{name} has the splits {', '.join(builder.info.splits)}, none of "
      f"{', '.join(wanted)}; use a dataset that has one."
    )
  return found[0]


def _keys(builder, name: str) -> tuple[str, str, tuple[str, ...]]:
  """Return the keys of the image and of the class, and the class names."""
  from tensorflow_datasets import features as kinds

  features = builder.info.features
  held = features if isinstance(features, kinds.FeaturesDict) else {}
  keys = []
  for usual, kind in (("image", kinds.Image), ("label", kinds.ClassLabel)):
    of_kind = [key for key in held if isinstance(held[key], kind)]
    if usual not in of_kind and len(of_kind) != 1:
      raise ValueError(
        f"tfds:{name} holds {', '.join(held) or features}: not one "
        f"{kind.__name__} a sample, or one named {usual!r}; use a dataset for "
        "image classification."
      )
    keys.append(usual if usual in of_kind else of_kind[0])
  class_names = tuple(held[keys[1]].names)
  if len(class_names) < 2:
    raise ValueError(
      f"tfds:{name} has {len(class_names)} class; a class-conditional model "
      "needs two or more."
    )
  return keys[0], keys[1], class_names
