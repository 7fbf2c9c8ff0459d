# An image whose command is `tinymamba`. It serves by default.
#
#     docker build --tag tinymamba:cpu .
#     docker build --tag tinymamba:cuda --build-arg DEVICE=cuda .
#     docker run --publish 127.0.0.1:8000:8000 --volume tinymamba:/work tinymamba:cpu
#     docker run --no-healthcheck --volume tinymamba:/work tinymamba:cpu train --preset demo
#
# Its other arguments, and what it writes, are in docs/install.md; `make container` tests it.

FROM python:3.11-slim-bookworm AS build
ARG DEVICE=cpu
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ENV PATH=/opt/tinymamba/bin:$PATH PIP_PYTHON=/opt/tinymamba/bin/python \
    PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python -m venv --without-pip /opt/tinymamba
WORKDIR /src
COPY requirements.txt ./
# By default pip installs PyTorch for CUDA, several gigabytes. The CPU build has its own index.
RUN case "$DEVICE" in \
      cpu) pip install --index-url "$TORCH_INDEX" "$(grep '^torch==' requirements.txt)" \
             --no-deps --no-compile ;; \
      cuda) ;; \
      *) echo "error: DEVICE: '$DEVICE' is unknown; pass cpu or cuda" >&2; exit 2 ;; \
    esac \
    && pip install --requirement requirements.txt --no-compile
COPY . ./
ARG EXTRAS=serve,redis
# A local folder has no version to pin.
# hadolint ignore=DL3013
RUN pip install ".[$EXTRAS]" --no-compile
# Nothing here needs PyTorch's tests, C++ headers and tools: 0.15 GB.
RUN find /opt/tinymamba/lib -type d -path '*/torch/include' -exec rm -r {} + \
    && find /opt/tinymamba/lib -type d -path '*/torch/test' -exec rm -r {} + \
    && find /opt/tinymamba/lib -path '*/torch/bin/*' -type f ! -name torch_shm_manager -delete
# Imports write the bytecode that the commands need. pip's would be four times as large.
RUN for name in train prepare generate serve export finetune quantize benchmark convert; do \
      tinymamba "$name" --help > /dev/null || exit; \
    done

FROM python:3.11-slim-bookworm
# Libraries keep their caches in HOME, which is in the volume: nothing else need be writable.
ENV PATH=/opt/tinymamba/bin:$PATH PIP_PYTHON=/opt/tinymamba/bin/python PYTHONUNBUFFERED=1 HOME=/work
COPY --from=build /opt/tinymamba /opt/tinymamba
RUN useradd --uid 1000 --home-dir /work --no-create-home tinymamba \
    && install --directory --owner=tinymamba --group=tinymamba /work
USER 1000
WORKDIR /work
VOLUME /work
EXPOSE 8000
HEALTHCHECK --interval=30s --timeout=5s --start-period=60s \
    CMD ["python", "-c", "from urllib.request import ProxyHandler, build_opener; build_opener(ProxyHandler({})).open('http://127.0.0.1:8000/health', timeout=4)"]
ENTRYPOINT ["tinymamba"]
# Sessions are kept after the grace time, and before docker kills: 10 seconds.
CMD ["serve", "--host", "0.0.0.0", "--port", "8000", "--checkpoint", "tinymamba_model_latest.pt", \
     "--session_dir", "sessions", "--keep_sessions", "--grace", "5"]
