# Stet as an image. The last target, cpu, is what `docker build .` makes; --target gpu is for NVIDIA, --target loadtest
# for locust. Which index PyTorch comes from, and how large that makes an image: docs/operations.md.
#
#   docker build --build-arg TORCH_INDEX=… --tag stet:cpu .
#   docker build --target gpu --tag stet:gpu .

ARG PYTHON_IMAGE=python:3.11.14-slim-bookworm

# What all build stages share: a compiler, and the packages that the project builds with.
FROM ${PYTHON_IMAGE} AS build
RUN apt-get update \
 && apt-get install --yes --no-install-recommends g++ \
 && rm -rf /var/lib/apt/lists/*
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 PIP_ROOT_USER_ACTION=ignore
WORKDIR /src
COPY pyproject.toml constraints.txt ./
COPY deploy/image/ deploy/image/

# The project with its CPU kernels, compiled here.
FROM build AS wheel
RUN deploy/image/install.sh build-tools
COPY README.md LICENSE ./
COPY kernels/ kernels/
COPY models/ models/
COPY server/ server/
RUN deploy/image/install.sh wheel /wheels

# Dependencies come before the project: a change of our sources leaves the largest layer as it is.
FROM build AS build-cpu
ARG TORCH_INDEX=
ARG EXTRAS=tracing
RUN deploy/image/install.sh dependencies /opt/stet cpu
COPY --from=wheel /wheels /wheels
RUN deploy/image/install.sh project /opt/stet /wheels

FROM build AS build-gpu
ARG EXTRAS=tracing
RUN deploy/image/install.sh dependencies /opt/stet gpu
COPY --from=wheel /wheels /wheels
RUN deploy/image/install.sh project /opt/stet /wheels

FROM build AS build-loadtest
RUN deploy/image/install.sh loadtest /opt/loadtest

# What all images share. Everything that may be written is under /cache (a volume) and /tmp (a tmpfs).
FROM ${PYTHON_IMAGE} AS runtime
RUN groupadd --gid 10001 stet \
 && useradd --uid 10001 --gid stet --home-dir /cache --no-create-home --shell /usr/sbin/nologin stet \
 && install --directory --owner=stet --group=stet /cache
ENV PATH=/opt/stet/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    HOME=/cache \
    XDG_CACHE_HOME=/cache \
    HF_HOME=/cache/huggingface \
    TRITON_CACHE_DIR=/cache/triton \
    STET_HOST=0.0.0.0 \
    STET_PORT=8000 \
    STET_LOG_FORMAT=json
WORKDIR /cache
USER 10001:10001

FROM runtime AS serve
COPY deploy/image/healthcheck.py /opt/healthcheck.py
VOLUME /cache
EXPOSE 8000
# Loading and warming up may take minutes, and more if the model has to be downloaded.
HEALTHCHECK --interval=10s --timeout=5s --start-period=10m --retries=3 CMD ["python", "-I", "/opt/healthcheck.py"]
STOPSIGNAL SIGTERM
ENTRYPOINT ["stet"]
CMD ["serve"]

# Triton compiles its launchers with a C compiler while the server warms up.
FROM serve AS gpu
USER root
RUN apt-get update \
 && apt-get install --yes --no-install-recommends gcc libc6-dev \
 && rm -rf /var/lib/apt/lists/*
USER 10001:10001
COPY --from=build-gpu /opt/stet /opt/stet

FROM runtime AS loadtest
ENV PATH=/opt/loadtest/bin:$PATH PYTHONPATH=/opt/stet
WORKDIR /opt/stet
COPY --from=build-loadtest /opt/loadtest /opt/loadtest
COPY loadtests/ loadtests/
COPY server/ server/
EXPOSE 8089
ENTRYPOINT ["locust"]
CMD ["-f", "loadtests/locust/locustfile.py", "--host", "http://server:8000"]

FROM serve AS cpu
COPY --from=build-cpu /opt/stet /opt/stet
