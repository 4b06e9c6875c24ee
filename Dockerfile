# docker build -t memoryllm-serve .                              for CPUs
# docker build -t memoryllm-serve:cuda --build-arg VARIANT=cuda .   for NVIDIA GPUs
#
# Stages go from what changes least to what changes most: torch, the other dependencies, this project. A change
# of the code alone makes one small layer.
ARG PYTHON_IMAGE=python:3.12-slim-bookworm

FROM ${PYTHON_IMAGE} AS base
ENV PATH=/opt/memoryllm/bin:$PATH \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_ROOT_USER_ACTION=ignore
RUN python -m venv /opt/memoryllm
WORKDIR /src

FROM base AS dependencies
ARG VARIANT=cpu
# PyTorch's own index of CPU builds, a tenth of the size of the default ones, which on Linux are those for CUDA
# and bring all its libraries but the driver. Empty: pip's own index.
ARG CPU_INDEX=https://download.pytorch.org/whl/cpu
ARG CUDA_INDEX=
COPY constraints.txt ./
RUN --mount=type=cache,target=/root/.cache/pip \
    case "$VARIANT" in \
        cpu) index="$CPU_INDEX" ;; \
        cuda) index="$CUDA_INDEX" ;; \
        *) echo "VARIANT is cpu or cuda" >&2; exit 1 ;; \
    esac \
    && pip install ${index:+--index-url "$index"} -c constraints.txt torch
COPY pyproject.toml ./
RUN --mount=type=cache,target=/root/.cache/pip \
    python -c "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['dependencies'], sep='\n')" \
        > requirements.txt \
    && pip install -c constraints.txt -r requirements.txt

FROM base AS package
COPY pyproject.toml README.md LICENSE ./
COPY app ./app
COPY kernels ./kernels
RUN --mount=type=cache,target=/root/.cache/pip \
    pip install --no-deps --prefix /install .

# The load generator of docker-compose.yml: docker build --target loadtest .
FROM base AS loadtest
COPY pyproject.toml ./
RUN --mount=type=cache,target=/root/.cache/pip \
    python -c "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['optional-dependencies']['load'], sep='\n')" \
        > requirements.txt \
    && pip install -r requirements.txt
COPY --chmod=755 loadtest ./loadtest
USER 10001:10001
ENTRYPOINT ["locust", "--locustfile", "loadtest/locustfile.py"]

FROM ${PYTHON_IMAGE} AS server
ARG VARIANT=cpu
# triton compiles the launchers of its kernels with the system's C compiler
RUN if [ "$VARIANT" = cuda ]; then \
        apt-get update \
        && apt-get install --yes --no-install-recommends gcc libc6-dev \
        && rm -rf /var/lib/apt/lists/*; \
    fi
RUN groupadd --gid 10001 memoryllm \
    && useradd --uid 10001 --gid 10001 --create-home memoryllm \
    && install -d -o 10001 -g 10001 -m 700 /data /cache
COPY --from=dependencies /opt/memoryllm /opt/memoryllm
COPY --from=package /install /opt/memoryllm
COPY --chmod=644 deploy/healthcheck.py /opt/memoryllm/healthcheck.py
ENV PATH=/opt/memoryllm/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    HF_HOME=/cache/huggingface \
    TRITON_CACHE_DIR=/cache/triton \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    MEMORYLLM_HOST=0.0.0.0 \
    MEMORYLLM_PORT=8000 \
    MEMORYLLM_STORE=disk:///data/store \
    MEMORYLLM_SPOOL_DIR=/cache/spool
USER 10001:10001
WORKDIR /home/memoryllm
VOLUME ["/data", "/cache"]
EXPOSE 8000
# as long as start_timeout, since a large model takes its time to load
HEALTHCHECK --start-period=10m --interval=10s --timeout=5s --retries=3 \
    CMD ["python", "/opt/memoryllm/healthcheck.py"]
STOPSIGNAL SIGTERM
ENTRYPOINT ["memoryllm"]
CMD ["serve"]
