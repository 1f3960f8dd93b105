"""Start a Triton and ask its models as the client does.

with serve_models(Path("model_repository_running"), Path("build/logs/fidelity.log")) as ask:
    embedding = ask("vit_onnx", {"input": volume})
"""

import http.client
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from numpy.typing import NDArray
from tritonclient import grpc  # type: ignore[import-untyped]
from tritonclient.utils import InferenceServerException, np_to_triton_dtype  # type: ignore[import-untyped]

from scripts.serve.triton_server import triton_server

Array = NDArray[Any]
Ask = Callable[[str, dict[str, Array]], Array]


# tritonclient's own limits; and no proxy, because HTTP_PROXY must not stand between us and our own server
CHANNEL = [
    ("grpc.max_send_message_length", 2**31 - 1),
    ("grpc.max_receive_message_length", 2**31 - 1),
    ("grpc.enable_http_proxy", 0),
]


class UnservedError(SystemExit):
    """Triton does not serve these models; the message holds Triton's own words. Uncaught, it ends the program."""


def make_input(name: str, array: NDArray[Any]) -> Any:
    """Return a request's input tensor."""
    tensor = grpc.InferInput(name, list(array.shape), np_to_triton_dtype(array.dtype))
    tensor.set_data_from_numpy(array)
    return tensor


@contextmanager
def serve_models(
    repository: Path,
    log: Path,
    *,
    image: str | None = None,
    venv: Path | None = None,
    timeout: float = 600,
    foreign: bool = False,
) -> Iterator[Ask]:
    """Yield ask(model, inputs by name) -> the tensor `output` of the model's version 1. `foreign`: see triton_server.

    UnservedError if the server does not start, dies or refuses a request.
    """
    with ExitStack() as running:
        try:
            server = running.enter_context(
                triton_server(repository, log, image=image, venv=venv, timeout=timeout, foreign=foreign)
            )
        except SystemExit as error:
            if not isinstance(error.code, str):  # a signal
                raise
            raise UnservedError(error.code) from None
        client = grpc.InferenceServerClient(server.grpc, channel_args=CHANNEL)

        def ask(name: str, request: dict[str, Array]) -> Array:
            try:
                inputs = [make_input(key, array) for key, array in request.items()]
                answer = client.infer(name, inputs, model_version="1", client_timeout=timeout).as_numpy("output")
            except InferenceServerException as error:
                raise UnservedError(f"{name}: {server.explain_trouble(f'Triton says: {error.message()}')}") from error
            except (OSError, http.client.HTTPException) as error:
                raise UnservedError(f"{name}: {server.explain_trouble(str(error))}") from error
            if answer is None:
                raise UnservedError(f"{name}: the answer has no tensor `output`, which the client reads")
            found: Array = answer
            return found

        running.callback(client.close)
        yield ask
