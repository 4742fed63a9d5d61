"""`xquant`: keep what keys and values are made from in a few bits, and make them again at every step.

Keys and values are projections of one input, `k = x @ Wk` and `v = x @ Wv`. With `Wk = Uk Sk Bk^T` the latents
`x @ Uk` are as many numbers as the keys of all key heads, whose outliers lie in few channels: they are quantised per
channel, and the latents of the values per token. Where the input of the layer is narrower than keys and values
together, as in models without shared key heads, it is kept instead, in the basis of `[Wk|Wv] = U S B^T`: half of the
numbers. Keys are rotated after they are made, by their true positions.

`k @ Bk` is `x @ Uk` times a factor per channel, which a range per channel does not see; so latents are made from the
keys when these leave full precision, and bases are all that is added to the model.

Source: XQuant, arXiv 2508.10395, no code published. Differences: prompts and the newest tokens use the keys and values
themselves, where the source makes those anew, too. The input is kept in a basis and per channel, where the source keeps
it as it is and per token: the error is smaller (DESIGN.md). Biases are added behind the product. Keys that are
normalised per head are kept as they are behind the norm, in the basis of the projection.

Bytes per layer: B * Hkv * residual * (D + Dv) * itemsize + B * T * R * (bits / 8 + 4 / group), T the tokens stored and
R the numbers per token: Hkv * (D + Dv), or E if that is less. A basis has (Hkv * D)^2 numbers for keys and (Hkv * Dv)^2
for values, or R * Hkv * (D + Dv) for both; a step computes T times as many products in every layer.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from jettison.ir.projected_heads import KeyValueProjection
from jettison.passes.options import option
from jettison.passes.policies.base import COS, SIN, AttentionSite
from jettison.passes.policies.storing import GroupingPolicy

# Directions in which a projection is this much shorter than in the longest are noise of its weights.
SHORTEST = 1e-6


@dataclass(frozen=True)
class XQuant(GroupingPolicy):
    """See the module docstring."""

    name: ClassVar[str] = "xquant"
    bits: Literal[2, 4, 8] = option(4, doc="bits of a code")  # type: ignore[misc]
    group: int = option(32, doc="values that share a range, at most", range="a divisor of the residual")

    @property
    def rotates(self) -> bool:
        """Keys are made before they are rotated."""
        return True

    @property
    def projects(self) -> bool:
        """Keys and values are made from what their projections read."""
        return True

    @property
    def why_not_behind(self) -> str | None:
        """Positions are counted."""
        return "rotates keys by the number of tokens before them, which is another one when some are gone"

    def applies_to(self, site: AttentionSite) -> str | None:
        """See `StoringPolicy.applies_to`; where keys and values come from must be known."""
        projection = site.projection
        if isinstance(projection, str) or projection is None:
            return projection or "where keys and values come from is not known"
        return super().applies_to(site)

    def forms(self, site: AttentionSite) -> dict[str, tuple[int, int]]:
        """Latents of keys and values, or the one input if that is narrower."""
        if self._keeps_input(site):
            return {"input": (1, _projection(site).in_features)}
        return {"key": (1, site.kv_heads * site.key_dim), "value": (1, site.kv_heads * site.value_dim)}

    def groups(self, site: AttentionSite) -> dict[str, tuple[int, int]]:
        """Every channel of the slot, but of values some channels of every token."""
        forms = {short: (1, width) for short, (_, width) in self.forms(site).items()}
        if "value" in forms:
            width = forms["value"][1]
            forms["value"] = (self.granule, width // math.gcd(width, self.group))
        return forms

    def _keeps_input(self, site: AttentionSite) -> bool:
        """Keys behind a norm are no product of the input any more."""
        projection = _projection(site)
        width = site.kv_heads * (site.key_dim + site.value_dim)
        return projection.in_features < width and not projection.is_normed

    def constants(self, site: AttentionSite) -> dict[str, Tensor]:
        """Bases `[Hkv * D, R]`, what the latents of values are divided by, and biases."""
        projection = _projection(site)
        weights, biases = projection.weights(), projection.biases()
        found = {f"{short}_bias": bias for short, bias in biases.items() if bias is not None}
        if self._keeps_input(site):
            found["input_basis"], _ = _basis(torch.cat([weights["key"], weights["value"]], 1))
            return found
        found["key_basis"], _ = _basis(weights["key"], is_square=True)
        found["value_basis"], lengths = _basis(weights["value"], is_square=True)
        return {**found, "value_lengths": lengths}

    def compress(
        self, site: AttentionSite, key: Tensor, value: Tensor, states: dict[str, Tensor], slots: Tensor
    ) -> dict[str, Tensor]:
        """See `StoringPolicy.compress`."""
        within = torch.arange(self.granule, device=slots.device)
        positions = (slots.unsqueeze(2) * self.granule + within).flatten(1)
        turned = _rotated(site, _wide(key).flatten(2, 3), positions, is_back=True)
        flat = {
            "key": turned.transpose(1, 2).flatten(2),
            "value": _wide(value).flatten(2, 3).transpose(1, 2).flatten(2),
        }
        for short, bias in ((short, site.constants.get(f"{short}_bias")) for short in flat):
            flat[short] = flat[short] if bias is None else flat[short] - bias
        if self._keeps_input(site):
            latents = {"input": torch.cat([*flat.values()], -1) @ site.constants["input_basis"]}
        else:
            latents = {short: each @ site.constants[f"{short}_basis"] for short, each in flat.items()}
            latents["value"] = latents["value"] / site.constants["value_lengths"]
        return self.packed(
            site, {short: each.unflatten(1, (-1, self.granule)).unsqueeze(1) for short, each in latents.items()}
        )

    def decompress(self, site: AttentionSite, stored: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """See `StoringPolicy.decompress`."""
        latents = {short: each.squeeze(1) for short, each in self.unpacked(site, stored).items()}
        widths = [site.kv_heads * dim for dim in (site.key_dim, site.value_dim)]
        if self._keeps_input(site):
            made = (latents["input"] @ site.constants["input_basis"].t()).split_with_sizes(widths, -1)
        else:
            scaled = latents | {"value": latents["value"] * site.constants["value_lengths"]}
            made = tuple(each @ site.constants[f"{short}_basis"].t() for short, each in scaled.items())
        key, value = (
            (each if bias is None else each + bias).unflatten(2, (site.kv_heads, -1)).transpose(1, 2)
            for each, bias in zip(
                made, (site.constants.get(f"{short}_bias") for short in ("key", "value")), strict=True
            )
        )
        positions = torch.arange(key.shape[2], device=key.device)[None].expand(key.shape[0], -1)
        key = _rotated(site, key, positions, is_back=False)
        return (key, value) if site.dtype == torch.float32 else (key.to(site.dtype), value.to(site.dtype))


def _projection(site: AttentionSite) -> KeyValueProjection:
    assert isinstance(site.projection, KeyValueProjection), "the policy applies to no other site"
    return site.projection


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float32 else x.to(torch.float32)


def _basis(weight: Tensor, *, is_square: bool = False) -> tuple[Tensor, Tensor]:
    """Directions in which a projection makes something, the most first.

    Args:
        weight: `[E, W]`.
        is_square: Whether to give W of them; otherwise as many as there can be.

    Returns:
        `[W, R] f32`, orthonormal columns, and `[R] f32`, how long the projection makes each, the longest being 1.
    """
    _, lengths, directions = torch.linalg.svd(
        weight.to(torch.float64), full_matrices=is_square and weight.shape[0] < weight.shape[1]
    )
    lengths = (lengths / lengths[0].clamp_min(1e-30)).clamp_min(SHORTEST)
    lengths = F.pad(lengths, (0, directions.shape[0] - len(lengths)), value=1.0)
    return directions.t().to(torch.float32).contiguous(), lengths.to(torch.float32)


def _rotated(site: AttentionSite, key: Tensor, positions: Tensor, *, is_back: bool) -> Tensor:
    """Keys `[B, Hkv, S, D]` rotated to `positions [B, S]`, or back from there."""
    if site.frequencies is None:
        return key
    # Not as embeddings, which are weights to be quantised.
    cos, sin = (site.constants[name][positions] for name in (COS, SIN))
    if is_back:  # angles may have a common factor
        length = cos * cos + sin * sin
        cos, sin = cos / length, -sin / length
    return torch.ops.jettison.rotary_embedding(key, cos, sin, site.is_interleaved)
