# An image with the command mergeforge.
#
#   docker build -t mergeforge .
#   docker run --rm --user "$(id -u):$(id -g)" -v "$PWD:/work" mergeforge run recipe.yaml --memory 2GiB
#
# For NVIDIA GPUs (then run it with --gpus all):
#
#   docker build -t mergeforge:cuda --build-arg BASE=nvidia/cuda:12.8.1-base-ubuntu24.04 \
#     --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu128 .

ARG BASE=python:3.12-slim-bookworm

FROM python:3.12-slim-bookworm AS wheel
RUN apt-get update \
 && apt-get install --yes --no-install-recommends gcc libc6-dev \
 && rm -rf /var/lib/apt/lists/*
COPY . /source
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels /source

FROM ${BASE}
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
# the CUDA images have no Python
RUN command -v python3 > /dev/null \
 || { apt-get update \
 && apt-get install --yes --no-install-recommends python3 python3-venv \
 && rm -rf /var/lib/apt/lists/*; }
RUN --mount=type=bind,from=wheel,source=/wheels,target=/wheels \
    python3 -m venv /opt/mergeforge \
 && /opt/mergeforge/bin/pip install --no-cache-dir --index-url "$TORCH_INDEX" "torch>=2.4,<3" \
 && /opt/mergeforge/bin/pip install --no-cache-dir /wheels/*.whl \
 && /opt/mergeforge/bin/python -c "from mergeforge.native import bindings; bindings.kernels()"
# Hub downloads stay in the mounted folder, which any --user can write
ENV PATH=/opt/mergeforge/bin:$PATH HF_HOME=/work/.huggingface
RUN useradd --create-home mergeforge && mkdir -p /work && chown mergeforge /work
USER mergeforge
WORKDIR /work
ENTRYPOINT ["mergeforge"]
CMD ["--help"]
