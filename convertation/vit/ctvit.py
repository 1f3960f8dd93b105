"""CT-ViT with its projection: it turns a CT volume into 512 numbers.

The encoder of CT-CLIP (Hamamci et al. 2024, arXiv 2403.17834; CT-ViT: arXiv 2305.16037), written for inference.
Attribute names are the checkpoints' keys; a few weights that the files hold are registered and never used.
Shapes: b batch, t h w the grid of tokens, d = dim, n = tokens of one sequence.
The file is long because it is one architecture, which is easiest to read in one file from top to bottom.
"""

import math
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from convertation.checkpoint import load_state_dict

LOGIT_SCALE = 8.0  # factor of the attention's logits, which are cosines
CAUSAL = (1, 1, 1, 1, 2, 0)  # zeros around width, height and time: a token sees its own frame and earlier ones
PARTIAL_SUMS = 8  # in the projection
PIECES = 4  # along t, because the whole needs hundreds of megabytes at once; for a GPU nothing is cut
# Keys of real files that inference does not need: the decoder, and the codebook's statistics from training
UNUSED = r"VIT\.(to_pixels(_first_frame)?\.|vq\._codebook\.(initted|cluster_size|embed_avg)$)"
FEED_FORWARD_PIECES = 2  # along t, or along the places
MULTIPLE = 32  # GPUs have fast kernels for inner sizes that are multiples of this


class Norm(nn.Module):
    """LayerNorm whose parameters are named `gamma` and `beta`."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(dim))
        self.beta: Tensor
        self.register_buffer("beta", torch.zeros(dim))

    def forward(self, x: Tensor) -> Tensor:
        """(…, d) -> (…, d)"""
        return functional.layer_norm(x, self.gamma.shape, self.gamma, self.beta)


class Position(nn.Module):
    """A depthwise 3×3×3 convolution that gives tokens their position; causal along the first of the three axes."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dsconv = nn.Conv3d(dim, dim, 3, groups=dim)
        self.taps: nn.ParameterList | None = None

    def fold(self, gpu: bool) -> None:
        """In place: for a GPU, split the weights by the three frames that a token sees."""
        if gpu:
            self.taps = freeze_parts([tap.contiguous() for tap in self.dsconv.weight.unbind(dim=2)])

    def forward(self, x: Tensor) -> Tensor:
        """(b, t, h, w, d) -> (b, t, h, w, d)"""
        if self.taps is not None:
            return self.convolve_frames(x, list(self.taps))
        padded = functional.pad(x.permute(0, 4, 1, 2, 3), CAUSAL)
        moved: Tensor = self.dsconv(padded).permute(0, 2, 3, 4, 1)
        return moved

    def convolve_frames(self, x: Tensor, taps: list[Tensor]) -> Tensor:
        """The same as three 2-D convolutions of frames: a GPU has no fast kernel for the 3-D one."""
        t, dim = x.shape[1], x.shape[-1]
        frames = x.permute(0, 1, 4, 2, 3)
        zeros = frames[:, :1] * 0  # concatenated, because ONNX Runtime's Pad is slow on a GPU
        before, after = CAUSAL[4:]
        frames = torch.cat([zeros] * before + [frames] + [zeros] * after, dim=1)
        parts = [
            functional.conv2d(
                frames[:, start : start + t].flatten(0, 1),
                tap,
                None if start else self.dsconv.bias,
                padding=1,
                groups=dim,
            )
            for start, tap in enumerate(taps)
        ]
        moved: Tensor = torch.unflatten(parts[0] + parts[1] + parts[2], 0, (-1, t))
        return moved.permute(0, 1, 3, 4, 2)


class Attention(nn.Module):
    """Attention between unit vectors; queries come from normed tokens, keys and values from tokens without the norm."""

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
        self.gains: nn.ParameterList | None = None
        self.pieces = PIECES

    def fold(self, gpu: bool) -> None:
        """In place: make one factor of the three factors of the logits; split the weights of keys and values in two.

        For a GPU, lengths become mean squares, which ONNX Runtime fuses, and the factor goes into theirs.
        """
        scale = self.q_scale.double() * self.k_scale.double() * LOGIT_SCALE
        self.scale = scale.float()
        self.halves = freeze_parts(split_in_two(self.to_kv.weight))
        if gpu:
            root = math.sqrt(len(scale))
            self.pieces = 1
            self.gains = freeze_parts([(scale / root).float(), torch.full_like(self.scale, 1 / root)])

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """(b, sequences, n, d), bias (heads, n, n) -> (b, sequences, n, d)"""
        q, (k, v) = self.to_q(self.norm(x)), self.project_keys_values(x)
        # For a GPU, normalise before heads are split: else ONNX Runtime moves k's transposes into it and fuses less
        if self.gains is not None:
            split = [torch.unflatten(part, -1, (self.heads, -1)) for part in (q, k)]
            q, k = [(normalise_mean_square(p) * gain).flatten(-2) for p, gain in zip(split, self.gains, strict=True)]
        q, k, v = [split_heads(part, self.heads) for part in (q, k, v)]
        if self.gains is None and self.scale is not None:
            q, k = normalise(q) * self.scale, normalise(k)
        elif self.gains is None:
            q, k = normalise(q) * self.q_scale * LOGIT_SCALE, normalise(k) * self.k_scale
        k = k.transpose(-2, -1)

        def mix(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            logits = q @ k if bias is None else q @ k + bias
            return logits.softmax(dim=-1) @ v

        mixed = compute_in_pieces(mix, 1 if bias is None else self.pieces, q, k, v)
        moved: Tensor = self.to_out(mixed.transpose(-3, -2).flatten(-2))
        return moved

    def project_keys_values(self, x: Tensor) -> list[Tensor]:
        """(…, n, d) -> two of (…, n, heads·dim_head)"""
        return [functional.linear(x, half) for half in self.halves or split_in_two(self.to_kv.weight)]


class FeedForward(nn.Sequential):
    """LayerNorm, Linear, gate, Linear; the numbers in the keys count gate and dropout, too."""

    def __init__(self, dim: int) -> None:
        inner = dim * 8 // 3
        gate, dropout = nn.Identity(), nn.Identity()
        up, down = nn.Linear(dim, 2 * inner, bias=False), nn.Linear(inner, dim, bias=False)
        super().__init__(nn.LayerNorm(dim), up, gate, dropout, down)
        self.parts: nn.ParameterList | None = None
        self.pieces = FEED_FORWARD_PIECES

    def fold(self, gpu: bool) -> None:
        """In place: split the first Linear into its halves, and pad the inner size to a multiple of 32.

        The padding is zeros, which change no sum; GPUs are slow with an odd size.
        """
        (value, gate), down = split_in_two(self[1].get_parameter("weight")), self[4].get_parameter("weight")
        more = -len(value) % MULTIPLE
        rows = [functional.pad(half, (0, 0, 0, more)) for half in (value, gate)]
        self.parts = freeze_parts([*rows, functional.pad(down, (0, more))])
        self.pieces = 1 if gpu else FEED_FORWARD_PIECES

    def forward(self, x: Tensor) -> Tensor:
        """(b, sequences, n, d) -> (b, sequences, n, d)"""
        norm, up, down = self[0], self[1].get_parameter("weight"), self[4].get_parameter("weight")
        value, gate, down = self.parts or (
            *split_in_two(up),
            down,
        )  # the weights are cut, not the values that pass through

        def gated(x: Tensor) -> Tensor:
            return functional.linear(functional.linear(x, value) * functional.gelu(functional.linear(x, gate)), down)

        return compute_in_pieces(gated, self.pieces, norm(x))


class Layer(nn.ModuleList):
    """Position, attention, feed-forward; the result of each is added to its input."""

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
        x = x + reshape_to_sequences(position(reshape_to_grid(x, grid)), grid)
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
    """What each head adds to the logits between two places of a frame: a small network of their distance."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Sequential(nn.Linear(2, dim), nn.LeakyReLU(0.1)),
            nn.Sequential(nn.Linear(dim, dim), nn.LeakyReLU(0.1)),
            nn.Linear(dim, heads),
        )

    def forward(self, height: int, width: int) -> Tensor:
        """-> (heads, h·w, h·w); the network is computed once for each of the (2h-1)·(2w-1) distances."""
        last = self.net[2]
        assert isinstance(last, nn.Linear)
        distance = list_distances(height, width, like=last.weight)
        bias: Tensor = self.net(distance.sign() * distance.abs().log1p())
        return bias.T[:, index_distances(height, width).to(bias.device)]


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
    """The weights of the part named `VIT`; `frame` is the number of pixels of a patch in one frame."""

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
        self.to_patch_emb_first_frame = make_patch_embedding(frame, dim)
        self.to_patch_emb = make_patch_embedding(frame * frames, dim)
        self.enc_spatial_transformer = Transformer(SpatialLayer, dim, spatial_depth, heads, dim_head)
        self.enc_temporal_transformer = Transformer(TemporalLayer, dim, temporal_depth, heads, dim_head)
        self.vq = Quantiser(codebook, dim)


class Projection(nn.Module):
    """A Linear with very many inputs, summed in parts: one float32 sum of 294,912 products loses one more digit."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(outputs, inputs))
        self.columns: nn.ParameterList | None = None

    def fold(self, gpu: bool) -> None:
        """In place: make each part a weight."""
        self.columns = freeze_parts(self.cut_columns())

    def cut_columns(self) -> Sequence[Tensor]:
        return self.weight.chunk(PARTIAL_SUMS, dim=1)

    def forward(self, x: Tensor) -> Tensor:
        """(b, inputs) -> (b, outputs)"""
        weights = self.cut_columns() if self.columns is None else list(self.columns)
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
        self.centred = False
        self.pieces = PIECES

    def fold(self, gpu: bool = False) -> "CTViT":
        """In place, for export: compute what depends only on weights in float64, and round it once.

        `gpu`: compute in one piece and with operators that are fast on a GPU; a CPU would need more memory and time.
        """
        self.bias = self.compute_bias(torch.float64).float()
        self.directions = self.compute_directions(torch.float64).float()
        self.centred = True
        self.pieces = 1 if gpu else PIECES
        for module in self.modules():
            if isinstance(module, Position | Attention | FeedForward | Projection):
                module.fold(gpu)
        return self

    def forward(self, volume: Tensor) -> Tensor:
        """(b, 1, frames, height, width) float32, HU / 1000 in [-1, 1] -> (b, output) float32, not normalised."""
        return self.project(self.quantise(self.encode(volume)))

    def encode(self, volume: Tensor) -> Tensor:
        """(b, 1, frames, height, width) -> tokens (b, t, h, w, d)"""
        return self.attend_along_time(self.attend_in_frames(self.embed_volume(volume)))

    def embed_volume(self, volume: Tensor) -> Tensor:
        """(b, c, frames, height, width) -> (b, t, h, w, d)"""
        if self.pieces == 1:
            return self.embed_frames(volume)
        embedded, end, step = [], volume.shape[2], math.ceil(self.grid[0] / self.pieces) * self.patch[0]
        for start in range(0, end, step):  # by index, because ONNX Runtime merges slices into one copy of the volume
            frames = torch.arange(start, min(start + step, end), device=volume.device)
            embedded.append(self.embed_frames(volume.index_select(2, frames)))
        return torch.cat(embedded, dim=1)

    def embed_frames(self, volume: Tensor) -> Tensor:
        """(b, c, frames, height, width) -> (b, t, h, w, d)

        After `fold`, the mean of each patch is subtracted before LayerNorm, which gives the same result: ONNX Runtime
        (still 1.22) computes the variance as mean square minus squared mean, and for air, at -1, that loses all digits.
        """
        pixels = cut_patches(volume, self.patch)
        if self.centred:
            pixels = pixels - pixels.mean(dim=-1, keepdim=True)
        embedded: Tensor = self.VIT.to_patch_emb(pixels)
        return embedded

    def attend_in_frames(self, x: Tensor) -> Tensor:
        """(b, t, h, w, d) -> (b, t, h, w, d), attention within each frame"""
        bias = self.bias if self.bias is not None else self.compute_bias()
        for layer in self.VIT.enc_spatial_transformer.layers:
            x = layer(x, bias)
        normed: Tensor = self.VIT.enc_spatial_transformer.norm_out(x)
        return normed

    def attend_along_time(self, x: Tensor) -> Tensor:
        """(b, t, h, w, d) -> (b, t, h, w, d), attention along t at each place"""
        t, h, w, d = *self.grid, x.shape[-1]
        x = x.permute(0, 2, 3, 1, 4).reshape(-1, h * w, t, d)
        for layer in self.VIT.enc_temporal_transformer.layers:
            x = layer(x, self.grid)
        x = self.VIT.enc_temporal_transformer.norm_out(x)
        return torch.unflatten(x, 1, (h, w)).permute(0, 3, 1, 2, 4)

    def quantise(self, tokens: Tensor) -> Tensor:
        """tokens (b, t, h, w, d) -> codes (b, t, h, w) int64: the codebook row with the greatest cosine.

        The length of a token is a positive factor of all its cosines, so it does not change the argmax.
        """
        rows = self.directions if self.directions is not None else self.compute_directions()
        return compute_in_pieces(lambda piece: (piece @ rows.T).argmax(dim=-1), self.pieces, tokens)

    def project(self, codes: Tensor) -> Tensor:
        """codes (b, t, h, w) -> (b, output)"""
        quantised = functional.embedding(codes, self.get_rows())
        embedding: Tensor = self.projection_layer(quantised.mean(dim=1).flatten(1))
        return embedding

    def compute_bias(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """-> (heads, h·w, h·w)"""
        network = self.VIT.spatial_rel_pos_bias
        bias: Tensor = torch.func.functional_call(
            network, {key: weight.to(dtype) for key, weight in network.named_parameters()}, tuple(self.grid[1:])
        )
        return bias

    def get_rows(self) -> Tensor:
        """-> (codebook, d), as stored"""
        return self.VIT.vq._codebook.embed.flatten(0, 1)

    def compute_directions(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """-> (codebook, d), rows of length 1"""
        return normalise(self.get_rows().to(dtype))


def compute_in_pieces(work: Callable[..., Tensor], pieces: int, *tensors: Tensor) -> Tensor:
    """Return `work(*tensors)`, computed part by part: tensors are cut and results joined along the second axis."""
    if pieces == 1:
        return work(*tensors)
    parts = zip(*[x.chunk(pieces, dim=1) for x in tensors], strict=True)
    return torch.cat([work(*part) for part in parts], dim=1)


def normalise(x: Tensor) -> Tensor:
    """(…, d) -> (…, d) of length 1; zeros stay zeros."""
    length: Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return x / length.clamp_min(1e-12)


def normalise_mean_square(x: Tensor) -> Tensor:
    """(…, d) -> (…, d) of length √d; zeros stay zeros."""
    tiny = x.new_full((1,), 1e-24)  # a tensor: the exporter takes such a small number for a zero and leaves it out
    return x / (x.pow(2).mean(dim=-1, keepdim=True) + tiny).sqrt()


def make_patch_embedding(pixels: int, dim: int) -> nn.Sequential:
    return nn.Sequential(nn.Identity(), nn.LayerNorm(pixels), nn.Linear(pixels, dim), nn.LayerNorm(dim))


def freeze_parts(parts: Sequence[Tensor]) -> nn.ParameterList:
    """Return the parts of a weight as weights, still mapped from the file."""
    return nn.ParameterList(nn.Parameter(part, requires_grad=False) for part in parts)


def split_in_two(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(2·n, d) -> two of (n, d)"""
    return weight[: len(weight) // 2], weight[len(weight) // 2 :]


def cut_patches(volume: Tensor, patch: list[int]) -> Tensor:
    """(b, c, t·pt, h·ph, w·pw) -> (b, t, h, w, c·pt·ph·pw)"""
    b, c, *sizes = volume.shape
    (pt, ph, pw), (t, h, w) = patch, [size // part for size, part in zip(sizes, patch, strict=True)]
    parts = volume.reshape(b, c, t, pt, h, ph, w, pw)
    return parts.permute(0, 2, 4, 6, 1, 3, 5, 7).reshape(b, t, h, w, c * pt * ph * pw)


def split_heads(x: Tensor, heads: int) -> Tensor:
    """(…, n, heads·dim_head) -> (…, heads, n, dim_head)"""
    parts: Tensor = torch.unflatten(x, -1, (heads, -1))
    return parts.transpose(-3, -2)


def reshape_to_grid(x: Tensor, grid: list[int]) -> Tensor:
    """(b, h·w, t, d) -> (b, t, h, w, d) by reshaping only: no axis is moved, as in the training."""
    return x.reshape(-1, *grid, x.shape[-1])


def reshape_to_sequences(x: Tensor, grid: list[int]) -> Tensor:
    """The inverse of `reshape_to_grid`."""
    return x.reshape(-1, grid[1] * grid[2], grid[0], x.shape[-1])


def list_distances(height: int, width: int, like: Tensor) -> Tensor:
    """((2·h-1)·(2·w-1), 2): all (y, x) distances between two places, type and device of `like`."""
    y = torch.arange(1 - height, height).to(like)
    x = torch.arange(1 - width, width).to(like)
    return torch.stack(torch.meshgrid(y, x, indexing="ij"), dim=-1).flatten(0, 1)


def index_distances(height: int, width: int) -> Tensor:
    """(h·w, h·w) int64: the index of the distance (yᵢ - yⱼ, xᵢ - xⱼ) in the list of all distances."""
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    y, x = y.flatten(), x.flatten()
    return (y[:, None] - y + height - 1) * (2 * width - 1) + (x[:, None] - x + width - 1)


def build_network(entry: dict[str, Any]) -> CTViT:
    """Return the network that an entry of models.yaml describes, without memory for its weights."""
    with torch.device("meta"):
        return CTViT(input=entry["input"], output=entry["output"], **entry["network"])


def load_network(checkpoint: Path, entry: dict[str, Any]) -> CTViT:
    """Return the network of `entry` with the weights of `checkpoint`, not folded; errors as in `load_state_dict`."""
    network = build_network(entry)
    load_state_dict(checkpoint, network, state_dict=entry.get("state_dict", ""), unused=UNUSED)
    return network


def make_synthetic_state_dict(entry: dict[str, Any]) -> dict[str, Tensor]:
    """Return a seeded state dict of `entry` with all keys of real files, also the decoder and codebook statistics.

    Each tensor depends only on the file's name, its own key and shape. Weights keep the size of the values.
    """
    network, (channels, *_), patch = build_network(entry), entry["input"], entry["network"]["patch"]
    dim, size = entry["network"]["dim"], entry["network"]["codebook"]
    seed = str(entry.get("checkpoint"))  # so the variants of the network differ
    tensors = {key: _random_tensor(seed + key, tuple(tensor.shape)) for key, tensor in network.state_dict().items()}
    for decoder, pixels in (("to_pixels_first_frame", patch[1] * patch[2]), ("to_pixels", math.prod(patch))):
        for part, shape in (("weight", (channels * pixels, dim)), ("bias", (channels * pixels,))):
            key = f"VIT.{decoder}.0.{part}"
            tensors[key] = _random_tensor(seed + key, shape)
    statistics = {"initted": torch.ones(1), "cluster_size": torch.ones(1, size), "embed_avg": torch.zeros(1, size, dim)}
    return tensors | {f"VIT.vq._codebook.{key}": tensor for key, tensor in statistics.items()}


def _random_tensor(key: str, shape: tuple[int, ...]) -> Tensor:
    """Return uniform numbers: around 1 for factors (norms, scales), else around 0, scaled by the fan-in."""
    draw = np.random.default_rng(zlib.crc32(key.encode())).random(shape, dtype=np.float32)
    tensor = torch.from_numpy(draw).mul_(2).sub_(1)
    if key.endswith("embed"):
        return tensor.mul_(torch.linspace(0.5, 1.5, shape[1])[:, None])  # rows of different length
    if len(shape) == 1:
        multiplies = key.endswith(("gamma", "_scale", ".weight"))
        return tensor.mul_(0.3).add_(1) if multiplies else tensor.mul_(0.1)
    return tensor.mul_(1 / math.sqrt(max(1, math.prod(shape[1:]))))
