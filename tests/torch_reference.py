"""The tokenizer and the transformer once more, in PyTorch, for tests only.

Written from a description of the official models, not from their code nor from
var_jax: an error has to be made twice to pass unseen. Values come from a state
dict in the official names, which can be assigned to a model on "meta".
"""

import collections
import itertools
import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.functional import scaled_dot_product_attention as attend


def _chain(**modules) -> nn.Sequential:
  """Return the modules one after the other, under the names given."""
  return nn.Sequential(collections.OrderedDict(modules))


def _conv3(before: int, width: int) -> nn.Conv2d:
  return nn.Conv2d(before, width, 3, padding=1)


class ResBlock(nn.Module):
  def __init__(self, before: int, width: int, groups: int):
    super().__init__()
    self.norm1 = nn.GroupNorm(groups, before, eps=1e-6)
    self.conv1 = _conv3(before, width)
    self.norm2 = nn.GroupNorm(groups, width, eps=1e-6)
    self.conv2 = _conv3(width, width)
    same = before == width
    self.nin_shortcut = nn.Identity() if same else nn.Conv2d(before, width, 1)

  def forward(self, x_BCHW):
    y_BCHW = self.conv1(F.silu(self.norm1(x_BCHW)))
    y_BCHW = self.conv2(F.silu(self.norm2(y_BCHW)))
    return self.nin_shortcut(x_BCHW) + y_BCHW


class PixelAttention(nn.Module):
  def __init__(self, width: int, groups: int):
    super().__init__()
    self.norm = nn.GroupNorm(groups, width, eps=1e-6)
    self.qkv = nn.Conv2d(width, 3 * width, 1)
    self.proj_out = nn.Conv2d(width, width, 1)

  def forward(self, x_BCHW):
    qkv_BLE = self.qkv(self.norm(x_BCHW)).flatten(2).mT  # E = 3C
    y_BLC = attend(*qkv_BLE.chunk(3, dim=-1))
    return x_BCHW + self.proj_out(y_BLC.mT.reshape(x_BCHW.shape))


class Level(nn.Module):
  """The blocks of resolution i, 0 the finest, and the way to the next one."""

  def __init__(self, cfg, i: int, up: bool):
    super().__init__()
    mults, groups = cfg.channel_mults, cfg.norm_groups
    top, width = len(mults) - 1, cfg.channels * mults[i]
    before = cfg.channels * [1, *mults, mults[-1]][i + 2 if up else i]
    attention = PixelAttention if i == top else nn.Identity
    self.block, self.attn = nn.ModuleList(), nn.ModuleList()
    for j in range(cfg.decoder_blocks if up else cfg.encoder_blocks):
      self.block.append(ResBlock(width if j else before, width, groups))
      self.attn.append(attention(width, groups))
    self.downsample = self.upsample = nn.Identity()
    if up and i > 0:
      grow = nn.Upsample(scale_factor=2)  # nearest
      self.upsample = _chain(grow=grow, conv=_conv3(width, width))
    elif not up and i < top:
      pad = nn.ZeroPad2d((0, 1, 0, 1))  # right and bottom only
      self.downsample = _chain(pad=pad, conv=nn.Conv2d(width, width, 3, 2))

  def forward(self, x_BCHW):
    for block, attn in zip(self.block, self.attn, strict=True):
      x_BCHW = attn(block(x_BCHW))
    return self.upsample(self.downsample(x_BCHW))


def _tower(cfg, up: bool) -> nn.Sequential:
  """Return the decoder if up, else the encoder."""
  groups, count = cfg.norm_groups, len(cfg.channel_mults)
  fine, coarse = (cfg.channels * cfg.channel_mults[i] for i in (0, -1))
  mid = _chain(
    block_1=ResBlock(coarse, coarse, groups),
    attn_1=PixelAttention(coarse, groups),
    block_2=ResBlock(coarse, coarse, groups),
  )
  levels = [(str(i), Level(cfg, i, up)) for i in range(count)]
  if up:
    first, last = _conv3(cfg.latent_channels, coarse), _conv3(fine, 3)
    body = {"mid": mid, "up": _chain(**dict(levels[::-1]))}
  else:
    first, last = _conv3(3, cfg.channels), _conv3(coarse, cfg.latent_channels)
    body = {"down": _chain(**dict(levels)), "mid": mid}
  norm = nn.GroupNorm(groups, last.in_channels, eps=1e-6)
  return _chain(
    conv_in=first, **body, norm_out=norm, act=nn.SiLU(), conv_out=last
  )


def phi_indices(num_phis: int, num_scales: int) -> list[int]:
  """Return the phi of each scale: the nearest tick, float64 breaking ties."""
  margin = 1 / (3 if num_phis == 4 else 2) / num_phis
  ticks = np.linspace(margin, 1 - margin, num_phis)
  places = [s / (num_scales - 1) for s in range(num_scales)]
  return [int(np.argmin(np.abs(ticks - place))) for place in places]


class Quantizer(nn.Module):
  """Each scale gives codes to what the coarser scales left over."""

  def __init__(self, cfg):
    super().__init__()
    self.scales, self.cosine = cfg.scales, cfg.distance == "cosine"
    self.areas, self.resi = [n * n for n in cfg.scales], abs(cfg.quant_resi)
    S, V, Z = len(cfg.scales), cfg.vocab_size, cfg.latent_channels
    self.register_buffer("ema_vocab_hit_SV", torch.zeros(S, V))
    self.embedding = nn.Embedding(V, Z)
    self.phi_of_scale = [nn.Identity()] * S
    if self.resi > 1e-6:
      phis = nn.ModuleList(_conv3(Z, Z) for _ in range(cfg.num_phis or S))
      # A plain list: nn.Module would add its names to the official ones.
      self.phi_of_scale = [phis[i] for i in phi_indices(len(phis), S)]
      shared = {"qresi": phis[0]} if cfg.num_phis == 1 else {"qresi_ls": phis}
      self.quant_resi = nn.ModuleDict(shared) if cfg.num_phis else phis

  def lookup(self, z_BZij):
    """Return the nearest codes, [B, i * j]."""
    z_BlZ, codes_VZ = z_BZij.flatten(2).mT, self.embedding.weight
    if self.cosine:
      return (F.normalize(z_BlZ, dim=-1) @ F.normalize(codes_VZ).mT).argmax(-1)
    squares_BlV = z_BlZ.square().sum(-1, True) + codes_VZ.square().sum(-1)
    return (squares_BlV - 2 * z_BlZ @ codes_VZ.mT).argmin(-1)

  def contribution(self, s: int, tokens_Bl):
    """Return what the tokens of scale s add to f_hat."""
    n, last = self.scales[s], self.scales[-1]
    h_BZij = self.embedding(tokens_Bl).mT.unflatten(-1, (n, n))
    h_BZhw = F.interpolate(h_BZij, (last, last), mode="bicubic")
    return (1 - self.resi) * h_BZhw + self.resi * self.phi_of_scale[s](h_BZhw)

  def encode(self, f_BZhw):
    tokens, rest_BZhw = [], f_BZhw
    for s, n in enumerate(self.scales):  # the last n resizes nothing
      z_BZij = F.interpolate(rest_BZhw, (n, n), mode="area")
      tokens.append(self.lookup(z_BZij))
      rest_BZhw = rest_BZhw - self.contribution(s, tokens[-1])
    return torch.cat(tokens, dim=1)

  def f_hats(self, tokens_BL) -> list:
    """Return the sum of the contributions so far, after each scale."""
    parts = enumerate(tokens_BL.split(self.areas, dim=1))
    steps = itertools.starmap(self.contribution, parts)
    return list(itertools.accumulate(steps))


class Tokenizer(nn.Module):
  def __init__(self, cfg):
    super().__init__()
    self.encoder, self.decoder = _tower(cfg, up=False), _tower(cfg, up=True)
    self.quantize = Quantizer(cfg)
    self.quant_conv = _conv3(cfg.latent_channels, cfg.latent_channels)
    self.post_quant_conv = _conv3(cfg.latent_channels, cfg.latent_channels)

  def encode(self, image_B3HW):
    return self.quantize.encode(self.quant_conv(self.encoder(image_B3HW)))

  def decode(self, tokens_BL):
    # Resizing leaves channels last in memory, where convolutions round more.
    f_hat_BZhw = self.quantize.f_hats(tokens_BL)[-1].contiguous()
    return self.decoder(self.post_quant_conv(f_hat_BZhw)).clamp(-1, 1)

  def inputs(self, tokens_BL):
    """Return what the transformer reads of scales 1.., [B, L - n0, Z]."""
    f_hats = self.quantize.f_hats(tokens_BL)
    parts = [
      F.interpolate(f_hats[s], (n, n), mode="area").flatten(2).mT
      for s, n in enumerate(self.quantize.scales[1:])
    ]
    return torch.cat(parts, dim=1)


def _adaln(width: int, chunks: int) -> nn.Sequential:
  return nn.Sequential(nn.SiLU(), nn.Linear(width, chunks * width))


def _modulated_norm(x_BLD, scale_B1D, shift_B1D, eps: float):
  x_BLD = F.layer_norm(x_BLD, x_BLD.shape[-1:], eps=eps)
  return x_BLD * (1 + scale_B1D) + shift_B1D


class Attention(nn.Module):
  def __init__(self, cfg):
    super().__init__()
    D, N = cfg.width, cfg.heads
    self.heads, self.qk_norm = N, cfg.qk_norm
    self.seen = lambda *kv_BNLK: kv_BNLK  # where a cache would come in
    if cfg.qk_norm:
      self.scale_mul_1H11 = nn.Parameter(torch.full((1, N, 1, 1), math.log(4)))
    self.q_bias = nn.Parameter(torch.zeros(D))
    self.v_bias = nn.Parameter(torch.zeros(D))
    self.register_buffer("zero_k_bias", torch.zeros(D))
    self.mat_qkv = nn.Linear(D, 3 * D, bias=False)
    self.proj = nn.Linear(D, D)

  def forward(self, x_BLD, mask_11LL):
    bias = torch.cat([self.q_bias, self.zero_k_bias, self.v_bias])
    qkv_BLE = F.linear(x_BLD, self.mat_qkv.weight, bias)  # E = 3D
    qkv_BL3NK = qkv_BLE.unflatten(-1, (3, self.heads, -1))
    q_BNLK, k_BNLK, v_BNLK = qkv_BL3NK.permute(2, 0, 3, 1, 4)
    if self.qk_norm:
      sharpness_1N11 = self.scale_mul_1H11.clamp(max=math.log(100)).exp()
      q_BNLK = F.normalize(q_BNLK, dim=-1) * sharpness_1N11
      k_BNLK = F.normalize(k_BNLK, dim=-1)
    else:  # VAR: a quarter of the usual scale.
      q_BNLK = q_BNLK * (0.25 / math.sqrt(q_BNLK.shape[-1]))
    kv = self.seen(k_BNLK, v_BNLK)
    y_BNLK = attend(q_BNLK, *kv, mask_11LL, scale=1.0)
    return self.proj(y_BNLK.transpose(1, 2).flatten(2))


class Block(nn.Module):
  def __init__(self, cfg):
    super().__init__()
    D, shared = cfg.width, cfg.shared_adaln
    hidden = round(D * cfg.mlp_ratio)
    self.eps = cfg.norm_eps
    self.attn = Attention(cfg)
    fc1, fc2 = nn.Linear(D, hidden), nn.Linear(hidden, D)
    self.ffn = _chain(fc1=fc1, act=nn.GELU("tanh"), fc2=fc2)
    self.ada_lin = nn.Identity() if shared else _adaln(D, 6)
    self.ada_gss = nn.Parameter(torch.zeros(1, 1, 6, D)) if shared else 0.0

  def forward(self, x_BLD, cond, mask_11LL):
    """Return the next x; cond is [B, D], or [B, 6D] if AdaLN is shared."""
    chunks_B16D = self.ada_lin(cond).unflatten(-1, (1, 6, -1)) + self.ada_gss
    gamma1, gamma2, scale1, scale2, shift1, shift2 = chunks_B16D.unbind(2)
    y_BLD = _modulated_norm(x_BLD, scale1, shift1, self.eps)
    x_BLD = x_BLD + gamma1 * self.attn(y_BLD, mask_11LL)
    y_BLD = _modulated_norm(x_BLD, scale2, shift2, self.eps)
    return x_BLD + gamma2 * self.ffn(y_BLD)


class VAR(nn.Module):
  def __init__(self, cfg):
    super().__init__()
    D, areas = cfg.width, [n * n for n in cfg.scales]
    L, S = sum(areas), len(areas)
    self.eps = cfg.norm_eps
    self.pos_start = nn.Parameter(torch.zeros(1, areas[0], D))
    self.pos_1LC = nn.Parameter(torch.zeros(1, L, D))
    level_L = torch.cat([torch.full((l,), s) for s, l in enumerate(areas)])
    self.register_buffer("lvl_1L", level_L[None])
    later_LL = level_L[None, :] > level_L[:, None]
    mask_LL = torch.zeros(L, L).masked_fill(later_LL, -math.inf)
    self.register_buffer("attn_bias_for_masking", mask_LL[None, None])
    self.word_embed = nn.Linear(cfg.latent_channels, D)
    self.class_emb = nn.Embedding(cfg.num_classes + 1, D)
    self.lvl_embed = nn.Embedding(S, D)
    self.shared_ada_lin = _adaln(D, 6) if cfg.shared_adaln else nn.Identity()
    self.blocks = nn.ModuleList(Block(cfg) for _ in range(cfg.depth))
    self.head_nm = nn.ModuleDict({"ada_lin": _adaln(D, 2)})
    self.head = nn.Linear(D, cfg.vocab_size)

  def forward(self, labels_B, inputs_BLZ):
    """Return the logits of scale 0 and of the scales there are inputs for."""
    cond_BD = self.class_emb.weight[labels_B]  # C and -1 are the same row
    start_BlD = cond_BD[:, None] + self.pos_start
    x_BLD = torch.cat([start_BlD, self.word_embed(inputs_BLZ)], dim=1)
    L = x_BLD.shape[1]
    x_BLD = x_BLD + self.lvl_embed(self.lvl_1L[:, :L]) + self.pos_1LC[:, :L]
    cond = self.shared_ada_lin(cond_BD)
    for block in self.blocks:
      x_BLD = block(x_BLD, cond, self.attn_bias_for_masking[..., :L, :L])
    return self.logits(x_BLD, cond_BD)

  def logits(self, x_BLD, cond_BD):
    chunks_B12D = self.head_nm["ada_lin"](cond_BD).unflatten(-1, (1, 2, -1))
    scale_B1D, shift_B1D = chunks_B12D.unbind(2)
    return self.head(_modulated_norm(x_BLD, scale_B1D, shift_B1D, self.eps))


def greedy(tokenizer: Tokenizer, var: VAR, labels_B, guidance: float):
  """Return the likeliest tokens, scale by scale, and their image in [-1, 1].

  Every scale runs all before it again; guidance grows from 0 at the first.
  """
  areas, end = tokenizer.quantize.areas, 0
  both_B = torch.cat([labels_B, torch.full_like(labels_B, -1)])
  tokens_BL = labels_B.new_zeros(len(labels_B), sum(areas))
  for s, area in enumerate(areas):
    start, end = end, end + area
    inputs_BLZ = tokenizer.inputs(tokens_BL)[:, : end - areas[0]]
    logits = var(both_B, inputs_BLZ.repeat(2, 1, 1))[:, start:]
    cond_BlV, uncond_BlV = logits.chunk(2)
    t = guidance * s / (len(areas) - 1)
    tokens_BL[:, start:end] = ((1 + t) * cond_BlV - t * uncond_BlV).argmax(-1)
  return tokens_BL, tokenizer.decode(tokens_BL)
