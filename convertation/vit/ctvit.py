"""CT-ViT with its projection: a CT volume becomes 512 numbers.

The encoder of CT-CLIP (Hamamci et al. 2024, arXiv 2403.17834; CT-ViT: arXiv 2305.16037), written for inference.
Attribute names are the checkpoints' keys; a few weights that the files hold are registered and never used.
Shapes: b batch, t h w the grid of tokens, d = dim, n = tokens of one sequence.
"""

import math
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from convertation.checkpoint import load_state_dict

LOGIT_SCALE = 8.0  # of the attention between unit vectors
CAUSAL = (1, 1, 1, 1, 2, 0)  # zeros around width, height and time: a token sees itself and what came before
PARTIAL_SUMS = 8  # of the projection
PIECES = 4  # along t, where the whole would take hundreds of megabytes at once
# Keys of real files that inference does not need: the decoder, what training knew of the codebook
UNUSED = r"VIT\.(to_pixels(_first_frame)?\.|vq\._codebook\.(initted|cluster_size|embed_avg)$)"
FEED_FORWARD_PIECES = 2  # along t, or along the places


class Norm(nn.Module):
    """LayerNorm under the names `gamma` and `beta`."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(dim))
        self.beta: Tensor
        self.register_buffer("beta", torch.zeros(dim))

    def forward(self, x: Tensor) -> Tensor:
        """(…, d) -> (…, d)"""
        return functional.layer_norm(x, self.gamma.shape, self.gamma, self.beta)


class Position(nn.Module):
    """A depthwise 3×3×3 convolution that tells tokens where they are; causal along the first of the three axes."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dsconv = nn.Conv3d(dim, dim, 3, groups=dim)

    def forward(self, x: Tensor) -> Tensor:
        """(b, t, h, w, d) -> (b, t, h, w, d)"""
        padded = functional.pad(x.permute(0, 4, 1, 2, 3), CAUSAL)
        moved: Tensor = self.dsconv(padded).permute(0, 2, 3, 4, 1)
        return moved


class Attention(nn.Module):
    """Attention between unit vectors; queries from normed tokens, keys and values from the tokens as they are."""

    def __init__(self, dim: int, heads: int, dim_head: int) -> None:
        super().__init__()
        self.heads = heads
        self.null_kv = nn.Parameter(torch.zeros(heads, 0, dim_head))
        self.q_scale = nn.Parameter(torch.ones(dim_head))
        self.k_scale = nn.Parameter(torch.ones(dim_head))
        self.norm = Norm(dim)
        self.context_norm = Norm(dim)
        self.to_q = nn.Linear(dim, heads * dim_head, bias=False)
        self.to_kv = nn.Linear(dim, 2 * heads * dim_head, bias=False)
        self.to_out = nn.Linear(heads * dim_head, dim, bias=False)
        self.scale: Tensor | None
        self.register_buffer("scale", None, persistent=False)
        self.halves: nn.ParameterList | None = None

    def fold(self) -> None:
        """In place: the three factors of the logits become one, the weights of keys and values two."""
        scale = self.q_scale.double() * self.k_scale.double() * LOGIT_SCALE
        self.scale = scale.float()
        self.halves = frozen(halves(self.to_kv.weight))

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """(b, sequences, n, d), bias (heads, n, n) -> (b, sequences, n, d)"""
        q, (k, v) = split_heads(self.to_q(self.norm(x)), self.heads), self.keys_values(x)
        q, k = unit(q), unit(k).transpose(-2, -1)
        if self.scale is not None:
            q = q * self.scale
        else:
            q, k = q * self.q_scale * LOGIT_SCALE, k * self.k_scale[:, None]
        if bias is None:
            mixed = (q @ k).softmax(dim=-1) @ v
        else:
            pieces = zip(*[part.chunk(PIECES, dim=1) for part in (q, k, v)], strict=True)
            mixed = torch.cat([(q @ k + bias).softmax(dim=-1) @ v for q, k, v in pieces], dim=1)
        moved: Tensor = self.to_out(mixed.transpose(-3, -2).flatten(-2))
        return moved

    def keys_values(self, x: Tensor) -> list[Tensor]:
        """(…, n, d) -> two of (…, heads, n, dim_head)"""
        return [
            split_heads(functional.linear(x, half), self.heads) for half in self.halves or halves(self.to_kv.weight)
        ]


class FeedForward(nn.Sequential):
    """LayerNorm, Linear, gate, Linear; the numbers in the keys count the parts between, too."""

    def __init__(self, dim: int) -> None:
        inner = dim * 8 // 3
        gate, dropout = nn.Identity(), nn.Identity()
        up, down = nn.Linear(dim, 2 * inner, bias=False), nn.Linear(inner, dim, bias=False)
        super().__init__(nn.LayerNorm(dim), up, gate, dropout, down)
        self.halves: nn.ParameterList | None = None

    def fold(self) -> None:
        """In place: the halves of the first Linear become weights of their own."""
        self.halves = frozen(halves(self[1].get_parameter("weight")))

    def forward(self, x: Tensor) -> Tensor:
        """(b, sequences, n, d) -> (b, sequences, n, d)"""
        norm, up, down = self[0], self[1], self[4]
        value, gate = self.halves or halves(up.get_parameter("weight"))  # cut the weights, not what passes through
        return torch.cat(
            [
                down(functional.linear(piece, value) * functional.gelu(functional.linear(piece, gate)))
                for piece in norm(x).chunk(FEED_FORWARD_PIECES, dim=1)
            ],
            dim=1,
        )


class Layer(nn.ModuleList):
    """Position, attention, feed-forward, each added to what came in."""

    def __init__(self, dim: int, heads: int, dim_head: int) -> None:
        super().__init__([Position(dim), Attention(dim, heads, dim_head), nn.Identity(), FeedForward(dim)])


class SpatialLayer(Layer):
    """A layer that attends within each frame."""

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        """(b, t, h, w, d), bias (heads, h·w, h·w) -> (b, t, h, w, d)"""
        position, attention, _, feed_forward = self.children()
        x = x + position(x)
        grid = x.shape[2:4]
        x = x.flatten(2, 3)
        x = x + attention(x, bias)
        x = x + feed_forward(x)
        return torch.unflatten(x, 2, grid)


class TemporalLayer(Layer):
    """A layer that attends along t at each place."""

    def forward(self, x: Tensor, grid: list[int]) -> Tensor:
        """(b, h·w, t, d), grid t h w -> (b, h·w, t, d)"""
        position, attention, _, feed_forward = self.children()
        x = x + as_sequences(position(as_grid(x, grid)), grid)
        x = x + attention(x)
        moved: Tensor = x + feed_forward(x)
        return moved


class Transformer(nn.Module):
    """`depth` layers, then a norm."""

    def __init__(self, layer: type[Layer], dim: int, depth: int, heads: int, dim_head: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layer(dim, heads, dim_head) for _ in range(depth))
        self.norm_out = Norm(dim)


class SpatialBias(nn.Module):
    """What each head adds to the attention between two places of a frame: a small network of their distance."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Sequential(nn.Linear(2, dim), nn.LeakyReLU(0.1)),
            nn.Sequential(nn.Linear(dim, dim), nn.LeakyReLU(0.1)),
            nn.Linear(dim, heads),
        )

    def forward(self, height: int, width: int) -> Tensor:
        """-> (heads, h·w, h·w); the network sees each of the (2h-1)·(2w-1) distances once."""
        last = self.net[2]
        assert isinstance(last, nn.Linear)
        distance = distances(height, width, like=last.weight)
        bias: Tensor = self.net(distance.sign() * distance.abs().log1p())
        return bias.T[:, distance_index(height, width).to(bias.device)]


class Codebook(nn.Module):
    def __init__(self, size: int, dim: int) -> None:
        super().__init__()
        self.embed: Tensor
        self.register_buffer("embed", torch.zeros(1, size, dim))


class Quantiser(nn.Module):
    def __init__(self, size: int, dim: int) -> None:
        super().__init__()
        self._codebook = Codebook(size, dim)


class Encoder(nn.Module):
    """The weights of the part named `VIT`; `frame` = pixels of a patch in one frame."""

    def __init__(
        self,
        frame: int,
        frames: int,
        dim: int,
        heads: int,
        dim_head: int,
        spatial_depth: int,
        temporal_depth: int,
        codebook: int,
    ) -> None:
        super().__init__()
        self.spatial_rel_pos_bias = SpatialBias(dim, heads)
        self.to_patch_emb_first_frame = patch_embedding(frame, dim)
        self.to_patch_emb = patch_embedding(frame * frames, dim)
        self.enc_spatial_transformer = Transformer(SpatialLayer, dim, spatial_depth, heads, dim_head)
        self.enc_temporal_transformer = Transformer(TemporalLayer, dim, temporal_depth, heads, dim_head)
        self.vq = Quantiser(codebook, dim)


class Projection(nn.Module):
    """A Linear of very many inputs, added up in parts: one float32 sum of 294,912 products would lose a digit more."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(outputs, inputs))
        self.columns: nn.ParameterList | None = None

    def fold(self) -> None:
        """In place: the parts become weights of their own."""
        self.columns = frozen(self.parts())

    def parts(self) -> Sequence[Tensor]:
        return self.weight.chunk(PARTIAL_SUMS, dim=1)

    def forward(self, x: Tensor) -> Tensor:
        """(b, inputs) -> (b, outputs)"""
        weights = self.parts() if self.columns is None else list(self.columns)
        parts = torch.split(x, [weight.shape[1] for weight in weights], dim=1)
        first, *rest = map(functional.linear, parts, weights)
        return sum(rest, start=first)


class CTViT(nn.Module):
    """The whole network; `input` (channels, frames, height, width), `patch` (frames, height, width), `output` (n,)."""

    def __init__(
        self,
        *,
        input: list[int],
        output: list[int],
        patch: list[int],
        dim: int,
        heads: int,
        dim_head: int,
        spatial_depth: int,
        temporal_depth: int,
        codebook: int,
    ) -> None:
        super().__init__()
        channels, *volume = input
        if any(size % part for size, part in zip(volume, patch, strict=True)):
            raise ValueError(f"{input=} is not made of whole patches, {patch=}")
        self.patch = patch
        self.grid = [size // part for size, part in zip(volume, patch, strict=True)]
        frame = channels * patch[1] * patch[2]
        self.VIT = Encoder(frame, patch[0], dim, heads, dim_head, spatial_depth, temporal_depth, codebook)
        self.projection_layer = Projection(self.grid[1] * self.grid[2] * dim, output[0])
        self.bias: Tensor | None
        self.register_buffer("bias", None, persistent=False)
        self.directions: Tensor | None
        self.register_buffer("directions", None, persistent=False)

    def fold(self) -> "CTViT":
        """In place, for export: what depends on weights alone becomes constant, in float64 and rounded once."""
        self.bias = self.attention_bias(torch.float64).float()
        self.directions = self.codebook_directions(torch.float64).float()
        for module in self.modules():
            if isinstance(module, Attention | FeedForward | Projection):
                module.fold()
        return self

    def forward(self, volume: Tensor) -> Tensor:
        """(b, 1, frames, height, width) float32, HU / 1000 in [-1, 1] -> (b, output) float32, not normalised."""
        return self.project(self.quantise(self.encode(volume)))

    def encode(self, volume: Tensor) -> Tensor:
        """(b, 1, frames, height, width) -> tokens (b, t, h, w, d)"""
        return self.temporal(self.spatial(self.patches(volume)))

    def patches(self, volume: Tensor) -> Tensor:
        """(b, c, frames, height, width) -> (b, t, h, w, d)"""
        embedded, end, step = [], volume.shape[2], math.ceil(self.grid[0] / PIECES) * self.patch[0]
        for start in range(0, end, step):  # by index, for ONNX Runtime would merge slices into one copy of the volume
            frames = torch.arange(start, min(start + step, end), device=volume.device)
            embedded.append(self.VIT.to_patch_emb(cut(volume.index_select(2, frames), self.patch)))
        return torch.cat(embedded, dim=1)

    def spatial(self, x: Tensor) -> Tensor:
        """(b, t, h, w, d) -> (b, t, h, w, d), attention within each frame"""
        bias = self.bias if self.bias is not None else self.attention_bias()
        for layer in self.VIT.enc_spatial_transformer.layers:
            x = layer(x, bias)
        normed: Tensor = self.VIT.enc_spatial_transformer.norm_out(x)
        return normed

    def temporal(self, x: Tensor) -> Tensor:
        """(b, t, h, w, d) -> (b, t, h, w, d), attention along t at each place"""
        t, h, w, d = *self.grid, x.shape[-1]
        x = x.permute(0, 2, 3, 1, 4).reshape(-1, h * w, t, d)
        for layer in self.VIT.enc_temporal_transformer.layers:
            x = layer(x, self.grid)
        x = self.VIT.enc_temporal_transformer.norm_out(x)
        return torch.unflatten(x, 1, (h, w)).permute(0, 3, 1, 2, 4)

    def quantise(self, tokens: Tensor) -> Tensor:
        """tokens (b, t, h, w, d) -> codes (b, t, h, w) int64, the codebook row of the greatest cosine.

        The length of a token is a positive factor of all its cosines and changes no argmax.
        """
        rows = self.directions if self.directions is not None else self.codebook_directions()
        return torch.cat([(piece @ rows.T).argmax(dim=-1) for piece in tokens.chunk(PIECES, dim=1)], dim=1)

    def project(self, codes: Tensor) -> Tensor:
        """codes (b, t, h, w) -> (b, output)"""
        quantised = functional.embedding(codes, self.rows())
        embedding: Tensor = self.projection_layer(quantised.mean(dim=1).flatten(1))
        return embedding

    def attention_bias(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """-> (heads, h·w, h·w)"""
        network = self.VIT.spatial_rel_pos_bias
        bias: Tensor = torch.func.functional_call(
            network, {key: weight.to(dtype) for key, weight in network.named_parameters()}, tuple(self.grid[1:])
        )
        return bias

    def rows(self) -> Tensor:
        """-> (codebook, d), as stored"""
        return self.VIT.vq._codebook.embed.flatten(0, 1)

    def codebook_directions(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """-> (codebook, d), rows of length 1"""
        return unit(self.rows().to(dtype))


def unit(x: Tensor) -> Tensor:
    """(…, d) -> (…, d) of length 1; zeros stay zeros."""
    length: Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return x / length.clamp_min(1e-12)


def patch_embedding(pixels: int, dim: int) -> nn.Sequential:
    return nn.Sequential(nn.Identity(), nn.LayerNorm(pixels), nn.Linear(pixels, dim), nn.LayerNorm(dim))


def frozen(parts: Sequence[Tensor]) -> nn.ParameterList:
    """Parts of a weight as weights, still mapped from the file."""
    return nn.ParameterList(nn.Parameter(part, requires_grad=False) for part in parts)


def halves(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(2·n, d) -> two of (n, d)"""
    return weight[: len(weight) // 2], weight[len(weight) // 2 :]


def cut(volume: Tensor, patch: list[int]) -> Tensor:
    """(b, c, t·pt, h·ph, w·pw) -> (b, t, h, w, c·pt·ph·pw)"""
    b, c, *sizes = volume.shape
    (pt, ph, pw), (t, h, w) = patch, [size // part for size, part in zip(sizes, patch, strict=True)]
    parts = volume.reshape(b, c, t, pt, h, ph, w, pw)
    return parts.permute(0, 2, 4, 6, 1, 3, 5, 7).reshape(b, t, h, w, c * pt * ph * pw)


def split_heads(x: Tensor, heads: int) -> Tensor:
    """(…, n, heads·dim_head) -> (…, heads, n, dim_head)"""
    parts: Tensor = torch.unflatten(x, -1, (heads, -1))
    return parts.transpose(-3, -2)


def as_grid(x: Tensor, grid: list[int]) -> Tensor:
    """(b, h·w, t, d) -> (b, t, h, w, d) by reshaping alone: axes stay where they are, the weights were trained so."""
    return x.reshape(-1, *grid, x.shape[-1])


def as_sequences(x: Tensor, grid: list[int]) -> Tensor:
    """The way back from `as_grid`."""
    return x.reshape(-1, grid[1] * grid[2], grid[0], x.shape[-1])


def distances(height: int, width: int, like: Tensor) -> Tensor:
    """((2·h-1)·(2·w-1), 2): all (y, x) distances between two places, type and device of `like`."""
    y = torch.arange(1 - height, height).to(like)
    x = torch.arange(1 - width, width).to(like)
    return torch.stack(torch.meshgrid(y, x, indexing="ij"), dim=-1).flatten(0, 1)


def distance_index(height: int, width: int) -> Tensor:
    """(h·w, h·w) int64: where the distance (yᵢ - yⱼ, xᵢ - xⱼ) stands in the list of all distances."""
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    y, x = y.flatten(), x.flatten()
    return (y[:, None] - y + height - 1) * (2 * width - 1) + (x[:, None] - x + width - 1)


def build(entry: dict[str, Any]) -> CTViT:
    """The network an entry of models.yaml describes, without memory for its weights."""
    with torch.device("meta"):
        return CTViT(input=entry["input"], output=entry["output"], **entry["network"])


def load(checkpoint: Path, entry: dict[str, Any]) -> CTViT:
    """The network of `entry` with the weights of `checkpoint`, unfolded; errors as in `load_state_dict`."""
    network = build(entry)
    load_state_dict(checkpoint, network, state_dict=entry.get("state_dict", ""), unused=UNUSED)
    return network


def synthetic(entry: dict[str, Any]) -> dict[str, Tensor]:
    """A seeded state dict of `entry` with all the keys of real files, the decoder and the codebook's statistics too.

    Every tensor depends on the file's name, its own key and shape only. Weights keep the size of what passes through.
    """
    network, (channels, *_), patch = build(entry), entry["input"], entry["network"]["patch"]
    dim, size = entry["network"]["dim"], entry["network"]["codebook"]
    seed = str(entry.get("checkpoint"))  # the variants of the network differ
    tensors = {key: _random(seed + key, tuple(tensor.shape)) for key, tensor in network.state_dict().items()}
    for decoder, pixels in (("to_pixels_first_frame", patch[1] * patch[2]), ("to_pixels", math.prod(patch))):
        for part, shape in (("weight", (channels * pixels, dim)), ("bias", (channels * pixels,))):
            key = f"VIT.{decoder}.0.{part}"
            tensors[key] = _random(seed + key, shape)
    statistics = {"initted": torch.ones(1), "cluster_size": torch.ones(1, size), "embed_avg": torch.zeros(1, size, dim)}
    return tensors | {f"VIT.vq._codebook.{key}": tensor for key, tensor in statistics.items()}


def _random(key: str, shape: tuple[int, ...]) -> Tensor:
    """Uniform, around 1 for what multiplies (norms, scales), else around 0 and as wide as its fan-in allows."""
    draw = np.random.default_rng(zlib.crc32(key.encode())).random(shape, dtype=np.float32)
    tensor = torch.from_numpy(draw).mul_(2).sub_(1)
    if key.endswith("embed"):
        return tensor.mul_(torch.linspace(0.5, 1.5, shape[1])[:, None])  # rows of different length
    if len(shape) == 1:
        multiplies = key.endswith(("gamma", "_scale", ".weight"))
        return tensor.mul_(0.3).add_(1) if multiplies else tensor.mul_(0.1)
    return tensor.mul_(1 / math.sqrt(max(1, math.prod(shape[1:]))))
