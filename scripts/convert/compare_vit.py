"""What comparing a ViT takes besides its output: the tokens before the quantiser, and the codes it jumps to.

A token becomes the codebook row of the greatest cosine. Where two rows are almost equally near, rounding decides, and
one such code moves the embedding far beyond rounding. So each code that differs must be explained by the error of the
tokens as it was measured, that error by rounding, and the embeddings are compared for the same codes on both sides.
"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import normalize

from convertation.vit.ctvit import CTViT

if TYPE_CHECKING:
    from scripts.convert.answer import Answer
    from scripts.convert.judge import Judge

Array = NDArray[Any]

CHUNK = 1024  # tokens at a time: with 8192 rows 67 MB of cosines in float64
MEASURED = 1728  # tokens whose cosines are looked at for their error, of 13,824
LISTED = 20  # margins in the report
ROUNDING = 2.0**-24  # of one float32 operation, relative
DISTINCT = 0.5  # of PyTorch's distinct codes, which every side must have at least


class Checked(NamedTuple):
    output: Array  # (n, output): PyTorch's
    expected: list[Array]  # (batch, output) per answer: PyTorch's, for the codes of that answer
    flips: list[list[Array]]  # per sample, for each token that may fall the other way: what that would change
    report: dict[str, Any]


class Cosines(NamedTuple):
    margins: Tensor  # (tokens,) float64: the greatest cosine of a token minus its second; of near ties exact
    error: float  # the largest of float32, on either side, against float64 on PyTorch's tokens

    @property
    def limit(self) -> float:
        """Up to this margin two cosines, each wrong by `error`, may change places: then and only then float64 allows
        either side the row that it took.
        """
        return 2 * self.error


def check_inside(network: CTViT, volumes: NDArray[np.float32], answers: Sequence["Answer"], judge: "Judge") -> Checked:
    """Compare inside the network; `judge` ends it where tokens differ beyond the tolerance, cosines by more than
    float32 rounds, codes beyond what that explains, or where a side has few distinct codes.

    `volumes` (n, 1, frames, height, width); an answer of ONNX Runtime holds `tokens` (batch, t, h, w, d) and `codes`
    (batch, t, h, w) of the first `batch` volumes.
    """
    outputs: list[Array] = []
    changes: list[list[Array]] = []
    expected: list[list[Array]] = [[] for _ in answers]
    margins: list[float] = []
    apart = error = 0.0
    near = compared = 0
    distinct: set[int] = set()
    flipped = {answer.name: 0 for answer in answers}
    for index in range(len(volumes)):
        print(f"  PyTorch, volume {index + 1} of {len(volumes)}", flush=True)
        tokens = network.encode(torch.from_numpy(volumes[index : index + 1]))
        codes = network.quantise(tokens)
        outputs.append(network.project(codes).numpy())
        distinct.update(codes.flatten().tolist())
        theirs = []
        for answer, projected in zip(answers, expected, strict=True):
            if index < len(answer.values["codes"]):
                name = f"of sample {index} {answer.name}"
                one = [answer.values[value][index : index + 1] for value in ("tokens", "codes")]
                apart = max(apart, judge.same(f"tokens {name}", tokens.numpy(), one[0]))
                judge.sane(f"codes {name}", codes.numpy(), one[1])
                theirs.append((answer.name, torch.from_numpy(one[0]), torch.from_numpy(one[1])))
                projected.append(network.project(theirs[-1][2]).numpy())
        cosines = measure_cosines(network, tokens, [their_tokens for _, their_tokens, _ in theirs])
        if not cosines.error <= (most := bound_rounding(products := math.prod(network.patch) + tokens.shape[-1])):
            judge.fail(
                f"cosines of sample {index} are wrong by {cosines.error:.2e}; expected at most {most:.1e}, "
                f"what float32 makes of {products} products, from a patch to its cosine",
                "the tokens differ by more than rounding",
            )
        for name, _, their_codes in theirs:
            found = find_flips(network, tokens, codes, their_codes, cosines.limit, f"of sample {index} {name}", judge)
            margins += found
            flipped[name] += len(found)
            compared += codes.numel()
            many, few = len(set(codes.flatten().tolist())), len(set(their_codes.flatten().tolist()))
            if few < DISTINCT * many:
                judge.fail(
                    f"codes of sample {index} {name} are {few} distinct ones; expected about PyTorch's {many}",
                    "different patches become the same code",
                )
        changes.append(find_near_ties(network, tokens, codes, cosines))
        near, error = near + int((cosines.margins <= cosines.limit).sum()), max(error, cosines.error)
    report = {
        "compared": compared,
        "flipped": len(margins),
        "flipped_by": flipped,
        "share": len(margins) / compared,
        "margins": sorted(margins, reverse=True)[:LISTED],
        "cosine_error": error,
        "near_ties": near,
        "distinct": len(distinct),
        "tokens_difference": apart,
    }
    return Checked(np.concatenate(outputs), [np.concatenate(part) for part in expected], changes, {"codes": report})


def read_codebook(network: CTViT) -> Tensor:
    """The codebook (codebook, d) as stored."""
    return network.get_buffer("VIT.vq._codebook.embed")[0]


def bound_rounding(products: int) -> float:
    """The most by which float32 gets a cosine wrong: a patch's voxels become a token, and that a cosine, each by sums.

    λ √n u for n products of independent rounding, wrong once in 10²¹ with λ = 10 (Higham and Mary 2019, A New Approach
    to Probabilistic Rounding Error Analysis, theorem 3.1); n u, the bound of the worst case, is never met.
    """
    return 10 * math.sqrt(products) * ROUNDING


def measure_cosines(network: CTViT, tokens: Tensor, theirs: list[Tensor]) -> Cosines:
    """Margins of all tokens, in float64 where they are near ties, and on every n-th token the error of float32 for
    PyTorch's and `theirs`.
    """
    directions = normalize(read_codebook(network).double(), dim=-1)
    rounded_directions = normalize(read_codebook(network), dim=-1)
    flat, *others = (side.flatten(0, -2) for side in (tokens, *theirs))
    step = max(1, len(flat) // MEASURED)
    parts, error = [], 0.0
    for start in range(0, len(flat), CHUNK):
        part = slice(start, start + CHUNK)
        rounded = normalize(flat[part], dim=-1) @ rounded_directions.T
        best, second = rounded.topk(2).values.T
        parts.append((best - second).double())
        cosines = normalize(flat[part][::step].double(), dim=-1) @ directions.T
        sides = [rounded[::step], *(normalize(side[part][::step], dim=-1) @ rounded_directions.T for side in others)]
        error = max(error, *(float((side - cosines).abs().max()) for side in sides))
    margins = torch.cat(parts)
    doubtful = (margins <= 4 * error).nonzero().flatten()  # each is wrong by two errors at most
    for near in torch.split(doubtful, CHUNK):
        best, second = (normalize(flat[near].double(), dim=-1) @ directions.T).topk(2).values.T
        margins[near] = best - second
    return Cosines(margins, error)


def find_flips(
    network: CTViT, tokens: Tensor, codes: Tensor, theirs: Tensor, limit: float, name: str, judge: "Judge"
) -> list[float]:
    """The margins between both codes where they differ; `judge` ends it where one is above `limit`."""
    differ = codes != theirs
    count = int(differ.sum())
    if not count:
        return []
    token = normalize(tokens[differ].double(), dim=-1)
    ours, other = (normalize(read_codebook(network)[side[differ]].double(), dim=-1) for side in (codes, theirs))
    margins = ((token * ours).sum(-1) - (token * other).sum(-1)).abs()
    worst = int(margins.argmax())
    if margins[worst] > limit:
        judge.fail(
            f"{count} of {codes.numel()} codes {name} differ, most at {differ.nonzero()[worst, 1:].tolist()}: "
            f"PyTorch {codes[differ][worst]}, ONNX Runtime {theirs[differ][worst]}, "
            f"cosines {margins[worst]:.2e} apart; expected at most {limit:.1e}, what rounding explains",
            "tokens become codebook rows that are not the nearest",
        )
    found: list[float] = margins.tolist()
    return found


def find_near_ties(network: CTViT, tokens: Tensor, codes: Tensor, cosines: Cosines) -> list[Array]:
    """What each near tie that falls the other way would add to the output: per token (other rows, output) float64,
    nearest ties first.

    The output is linear in the codebook rows: one token's row is a t-th of the mean at its place (h, w).
    """
    book = read_codebook(network).double()
    directions = normalize(book, dim=-1)
    projection: Tensor = network.projection_layer.weight
    weight = projection.view(len(projection), -1, book.shape[1])  # (output, h·w, d)
    flat, chosen = tokens.flatten(0, -2), codes.flatten()
    limit = cosines.limit
    near = [token for token in cosines.margins.argsort().tolist() if cosines.margins[token] <= limit]
    changes = []
    for token, cosine in zip(near, normalize(flat[near].double(), dim=-1) @ directions.T, strict=True):
        others = (cosine >= cosine.max() - limit).nonzero().flatten()
        others = others[others != chosen[token]]
        change = (book[others] - book[chosen[token]]) / tokens.shape[1]
        changes.append((change @ weight[:, token % weight.shape[1]].double().T).numpy())
    return changes
