# From CT studies to findings, with the models inside. `make image TARGET=inference` builds it. The context holds
#
#   requirements-inference.txt    exact pins
#   ca.pem                        only if pip must trust another authority
#   vit/ models/                  models of the published repository; vit/ is the largest, changes least and comes first
#   scripts/infer/                the program
#
# The base has CUDA 12 and cuDNN 9, which ONNX Runtime 1.22 needs on a GPU. Without a GPU any Debian or Ubuntu will do.
ARG BASE=nvidia/cuda:12.6.3-cudnn-runtime-ubuntu24.04

FROM ${BASE}
RUN python3 -c "import ensurepip" 2> /dev/null || { apt-get update -qq && \
    DEBIAN_FRONTEND=noninteractive apt-get install -qq --no-install-recommends python3 python3-venv && \
    rm -rf /var/lib/apt/lists/*; }
ARG PIP_INDEX_URL
ARG PIP_EXTRA_INDEX_URL
ARG PIP_TRUSTED_HOST
COPY requirements-inference.txt ca.pem* /tmp/pip/
# An address with a password is a secret of the build: no layer and no history keeps it
RUN for name in PIP_INDEX_URL PIP_EXTRA_INDEX_URL; do \
      if [ -e /run/secrets/$name ]; then export "$name=$(cat /run/secrets/$name)"; fi; done; \
    if [ -e /tmp/pip/ca.pem ]; then export PIP_CERT=/tmp/pip/ca.pem; fi; \
    python3 -m venv /opt/inference && \
    /opt/inference/bin/python3 -m pip install --no-cache-dir --disable-pip-version-check \
      --requirement /tmp/pip/requirements-inference.txt && rm -r /tmp/pip
COPY vit/ /models/
COPY models/ /models/
COPY scripts/ /app/scripts/
WORKDIR /app
ENV PYTHONDONTWRITEBYTECODE=1
# Root gives the tables to the owner of /output. Any other user works, too: docker run --user "$(id -u):$(id -g)"
ENTRYPOINT ["/opt/inference/bin/python3", "-m", "scripts.infer", "--models", "/models"]
CMD ["/input", "/output"]
