"""Compare a ViT inside the network: the tokens before the quantiser, and the codes that it picks.

A token becomes the codebook row with the greatest cosine. If two rows are almost equally near, rounding decides, and
one such flip moves the embedding far more than rounding does. So the measured error of the cosines must explain each
flip, rounding must explain this error, and the embeddings are compared for the same codes on both sides.
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

CHUNK = 1024  # tokens at a time: with 8192 rows, their cosines take 67 MB in float64
MEASURED = 1728  # the error of cosines is measured on so many of the 13,824 tokens
LISTED = 20  # margins in the report
ROUNDING = 2.0**-24  # relative error of one float32 operation
DISTINCT = 0.5  # every side must have at least this share of PyTorch's number of distinct codes


class Checked(NamedTuple):
    output: Array  # (n, output): PyTorch's
    expected: list[Array]  # (batch, output) per answer: PyTorch's output for the codes of that answer
    flips: list[list[Array]]  # per sample, for each near tie: what its flip would add to the output
    report: dict[str, Any]


class Cosines(NamedTuple):
    margins: Tensor  # (tokens,) float64: the greatest cosine of a token minus its second greatest; exact for near ties
    error: float  # the largest error of a float32 cosine, on any side, against float64 on PyTorch's tokens

    @property
    def limit(self) -> float:
        """Up to this margin, two cosines with an error of `error` each may change places, so that a flip is allowed."""
        return 2 * self.error


def check_inside(network: CTViT, volumes: NDArray[np.float32], answers: Sequence["Answer"], judge: "Judge") -> Checked:
    """Compare tokens and codes. `volumes`: (n, 1, frames, height, width); an answer of ONNX Runtime holds `tokens`
    (batch, t, h, w, d) and `codes` (batch, t, h, w) for the first `batch` volumes.

    `judge` ends the comparison if tokens differ beyond the tolerance, if cosines differ by more than float32 rounding,
    if this does not explain a flip, or if a side has too few distinct codes.
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
                apart = max(apart, judge.check_difference(f"tokens {name}", tokens.numpy(), one[0]))
                judge.check_values(f"codes {name}", codes.numpy(), one[1])
                theirs.append((answer.name, torch.from_numpy(one[0]), torch.from_numpy(one[1])))
                projected.append(network.project(theirs[-1][2]).numpy())
        cosines = measure_cosines(network, tokens, [their_tokens for _, their_tokens, _ in theirs])
        if not cosines.error <= (most := bound_rounding(products := math.prod(network.patch) + tokens.shape[-1])):
            judge.fail(
                f"cosines of sample {index} are wrong by {cosines.error:.2e}; expected at most {most:.1e}, "
                f"the error of float32 over {products} products, from a patch to its cosine",
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
                    f"codes of sample {index} {name} are {few} distinct ones; expected about {many}, as PyTorch has",
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
    """Return the codebook as stored: (codebook, d)."""
    return network.get_buffer("VIT.vq._codebook.embed")[0]


def bound_rounding(products: int) -> float:
    """Return the largest error of a cosine in float32. Sums of products make a patch a token, and a token a cosine.

    The bound is λ √n u for n products with independent rounding errors. With λ = 10, an error exceeds it once in 10²¹
    (Higham and Mary 2019, A New Approach to Probabilistic Rounding Error Analysis, theorem 3.1). The bound of the worst
    case, n u, is never reached.
    """
    return 10 * math.sqrt(products) * ROUNDING


def measure_cosines(network: CTViT, tokens: Tensor, theirs: list[Tensor]) -> Cosines:
    """Return the margins of all tokens (near ties in float64), and the error of float32 cosines.

    The error is measured on every n-th token, for PyTorch's tokens and for `theirs`.
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
    doubtful = (margins <= 4 * error).nonzero().flatten()  # a float32 margin is wrong by at most two errors
    for near in torch.split(doubtful, CHUNK):
        best, second = (normalize(flat[near].double(), dim=-1) @ directions.T).topk(2).values.T
        margins[near] = best - second
    return Cosines(margins, error)


def find_flips(
    network: CTViT, tokens: Tensor, codes: Tensor, theirs: Tensor, limit: float, name: str, judge: "Judge"
) -> list[float]:
    """Return the margin of each code that differs. `judge` ends the comparison if a margin is above `limit`."""
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
            f"cosines {margins[worst]:.2e} apart; expected at most {limit:.1e}, which rounding explains",
            "tokens become codebook rows that are not the nearest",
        )
    found: list[float] = margins.tolist()
    return found


def find_near_ties(network: CTViT, tokens: Tensor, codes: Tensor, cosines: Cosines) -> list[Array]:
    """Return what the flip of each near tie would add to the output: per token (other rows, output) float64.

    The nearest ties come first. The output is linear in the codebook rows: of the mean at a place (h, w), the row of
    one token is a t-th.
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
