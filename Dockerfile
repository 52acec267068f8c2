# Image for training on NVIDIA GPUs. It has not been built or run yet; CI does not build it.
#
#   docker build -t nanollama .
#   docker run --rm -it --gpus all --ipc=host \
#       -v "$PWD/data/store:/nanollama/data/store" -v "$PWD/checkpoints:/nanollama/checkpoints" \
#       -v "$PWD/logs:/nanollama/logs" -v "$PWD/results:/nanollama/results" nanollama
#
# torch brings its own CUDA libraries. The development image has nvcc, which compiles flash-attn
# (requirements-gpu.txt), and a C compiler, which Triton calls.
FROM nvidia/cuda:13.0.2-devel-ubuntu24.04

RUN apt-get update \
    && apt-get install -y --no-install-recommends \
        build-essential git make python3 python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /nanollama
COPY . .
# The machine that builds the image may have no GPU.
RUN --mount=type=cache,target=/root/.cache/pip TORCH_BUILD=cuda make setup

ENV PATH=/nanollama/.venv/bin:$PATH
CMD ["bash"]
