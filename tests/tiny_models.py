"""Models that compile in seconds, for tests that train or store one."""

from var_jax.models.tokenizer import TokenizerConfig


def tokenizer_config(scales: tuple[int, ...] = (1, 2)) -> TokenizerConfig:
  """Return two levels: images of twice the finest scale, 16 codes of 4."""
  return TokenizerConfig(
    vocab_size=16,
    latent_channels=4,
    channels=8,
    norm_groups=4,
    channel_mults=(1, 1),
    encoder_blocks=1,
    decoder_blocks=1,
    scales=scales,
  )
