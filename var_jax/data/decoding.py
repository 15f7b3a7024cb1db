"""Image files to pixels."""

import io

import numpy as np


def decode(data: bytes, name: str) -> np.ndarray:
  """Decode an image file to uint8 [H, W, 3].

  Raises:
    ValueError: names the image, which is damaged or has more than 8 bits.
  """
  from PIL import Image

  try:
    with Image.open(io.BytesIO(data)) as image:
      mode = image.mode
      pixels = np.asarray(image.convert("RGB"))
  except MemoryError:
    raise  # Says nothing about the image.
  except Exception as error:  # Pillow's decoders share no base class.
    raise ValueError(
      f"{name} cannot be decoded ({type(error).__name__}); "
      "repair or remove the file."
    ) from error
  # Pillow would saturate them without a word.
  if mode.startswith(("I", "F")):
    raise ValueError(
      f"{name} has pixels of mode {mode}, more than 8 bits; save it with 8."
    )
  return pixels
