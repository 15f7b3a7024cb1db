"""Sampling in PyTorch as the official code does it, to be timed beside ours.

Eager, scale by scale, keys and values cached, one doubled batch for guidance,
AdaLN computed at every scale, top-k by `topk`, top-p by a sort, multinomial
draws. The networks are those that the tests compare with.
"""

import sys
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import torch_reference  # noqa: E402


class _Seen:
  """Keys and values of the scales so far, in place of `Attention.seen`."""

  def __init__(self):
    self.kv = None

  def __call__(self, *kv_BNlK):
    if self.kv is not None:
      kv_BNlK = [
        torch.cat(x, dim=2) for x in zip(self.kv, kv_BNlK, strict=True)
      ]
    self.kv = kv_BNlK
    return kv_BNlK


class Sampler:
  """Both networks with random weights.

  Args:
    tokenizer_cfg, cfg: as var_jax has them.
    dtype: "bfloat16" runs blocks and decoder under autocast.
  """

  def __init__(self, tokenizer_cfg, cfg, device: str, dtype: str):
    torch.manual_seed(0)
    with torch.device(device):
      self.tokenizer = torch_reference.Tokenizer(tokenizer_cfg).eval()
      self.var = torch_reference.VAR(cfg).eval()
    self.cfg, self.device = cfg, device
    self.autocast = torch.autocast(
      device, dtype=torch.bfloat16, enabled=dtype == "bfloat16"
    )

  @torch.inference_mode()
  def sample(self, labels_B, decode=True, guidance=1.5, top_k=900, top_p=0.96):
    """Return images [B, 3, H, W] in [-1, 1], or f_hat where not decoded."""
    with self.autocast:
      f_hat_BZhw = self._f_hat(labels_B, guidance, top_k, top_p)
      return self.decode(f_hat_BZhw) if decode else f_hat_BZhw

  @torch.inference_mode()
  def decode(self, f_hat_BZhw):
    with self.autocast:
      image_B3HW = self.tokenizer.decoder(
        self.tokenizer.post_quant_conv(f_hat_BZhw)
      )
    return image_B3HW.float().clamp(-1, 1)

  def _f_hat(self, labels_B, guidance, top_k, top_p):
    var, quantizer = self.var, self.tokenizer.quantize
    B, S, grid = len(labels_B), len(quantizer.areas), quantizer.scales[-1]
    both_B = torch.cat([labels_B, torch.full_like(labels_B, -1)])
    cond_BD = var.class_emb.weight[both_B]
    position_LD = var.lvl_embed(var.lvl_1L)[0] + var.pos_1LC[0]
    for block in var.blocks:
      block.attn.seen = _Seen()
    f_hat_BZhw = torch.zeros(
      B, self.cfg.latent_channels, grid, grid, device=self.device
    )
    x_BlD, end = cond_BD[:, None] + var.pos_start, 0
    for s, area in enumerate(quantizer.areas):
      start, end = end, end + area
      x_BlD = x_BlD + position_LD[start:end]
      cond = var.shared_ada_lin(cond_BD)
      for block in var.blocks:
        x_BlD = block(x_BlD, cond, None)
      cond_BlV, uncond_BlV = var.logits(x_BlD, cond_BD).float().chunk(2)
      t = guidance * s / (S - 1)
      logits_BlV = (1 + t) * cond_BlV - t * uncond_BlV
      tokens_Bl = _draw(logits_BlV, top_k, top_p)
      f_hat_BZhw = f_hat_BZhw + quantizer.contribution(s, tokens_Bl)
      if s + 1 < S:
        n = quantizer.scales[s + 1]
        next_BlZ = F.interpolate(f_hat_BZhw, (n, n), mode="area").flatten(2).mT
        x_BlD = var.word_embed(next_BlZ).repeat(2, 1, 1)
    return f_hat_BZhw


def _draw(logits_BlV, top_k, top_p):
  least = logits_BlV.topk(top_k, dim=-1).values[..., -1:]
  logits_BlV = logits_BlV.masked_fill(logits_BlV < least, -torch.inf)
  ordered, order = logits_BlV.sort(dim=-1)
  drop = ordered.softmax(dim=-1).cumsum(dim=-1) <= 1 - top_p
  drop[..., -1:] = False
  logits_BlV = logits_BlV.masked_fill(drop.scatter(-1, order, drop), -torch.inf)
  probs = logits_BlV.softmax(dim=-1).flatten(0, 1)
  return torch.multinomial(probs, 1).view(logits_BlV.shape[:2])
