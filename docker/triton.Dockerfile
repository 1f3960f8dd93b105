# Triton with the chest-CT models inside. `make image` builds it. The context, made from the published repository, holds
#
#   requirements.txt    exact pins of the packages that its Python models need
#   ca.pem              only if pip must trust another authority
#   *.tar               parts of /models. The largest part changes least and comes first, so that the push of a new head
#                       is megabytes. Each part makes the same layer on every machine, with BuildKit and without
ARG BASE

# Triton and the packages of the Python models. `make up` runs this stage with the published repository at /models
FROM ${BASE} AS server
ARG PIP_INDEX_URL
ARG PIP_EXTRA_INDEX_URL
ARG PIP_TRUSTED_HOST
COPY requirements.txt ca.pem* /tmp/pip/
# An address with a password is a secret of the build: no layer and no history keeps it
RUN for name in PIP_INDEX_URL PIP_EXTRA_INDEX_URL; do \
      if [ -e /run/secrets/$name ]; then export "$name=$(cat /run/secrets/$name)"; fi; done; \
    if [ -e /tmp/pip/ca.pem ]; then export PIP_CERT=/tmp/pip/ca.pem; fi; \
    python3 -m pip install --no-cache-dir --disable-pip-version-check --root-user-action=ignore \
      --requirement /tmp/pip/requirements.txt && rm -r /tmp/pip
# NVIDIA's user triton-server; by number, so that Kubernetes can see that it is not root
USER 1000:1000
EXPOSE 8000 8001 8002
# The models' configs are complete, so Triton must not change them
ENV CHEST_OPTIONS=--disable-auto-complete-config
# Checks the server, not the models: in explicit mode a client loads the models that it asks
HEALTHCHECK --interval=5s --timeout=5s --start-period=60s --retries=6 \
  CMD curl --fail --silent --noproxy '*' http://127.0.0.1:8000/v2/health/ready
# Batches are copied to the GPU from pinned memory; this pool holds two batches of four volumes.
# docker/compose.yaml tells which requests need a key, and what LOCK=1 does
CMD ["sh", "-c", "key=chest-key=${CHEST_KEY:-$(cat /proc/sys/kernel/random/uuid)}; \
exec tritonserver --model-repository=/models --model-control-mode=explicit $CHEST_OPTIONS \
--pinned-memory-pool-byte-size=1769472000 \
${LOCK:+\"--load-model=*\"} \
\"--http-restricted-api=model-repository,shared-memory,trace,logging:$key\" \
\"--grpc-restricted-protocol=${LOCK:+model-repository,}shared-memory,trace,logging:$key\""]

FROM server
ADD vit.tar /
ADD bpr.tar /
ADD heads.tar /
