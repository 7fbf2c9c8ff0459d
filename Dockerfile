# An image whose command is `tinymamba`. It serves by default.
#
#     docker build --tag tinymamba:cpu .
#     docker build --tag tinymamba:cuda --build-arg DEVICE=cuda .
#     docker run --publish 127.0.0.1:8000:8000 --volume tinymamba:/work tinymamba:cpu
#     docker run --no-healthcheck --volume tinymamba:/work tinymamba:cpu train --preset demo

FROM python:3.11-slim-bookworm AS build
ARG DEVICE=cpu
ENV PATH=/opt/tinymamba/bin:$PATH PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python -m venv /opt/tinymamba
WORKDIR /src
COPY requirements.txt ./
# By default pip installs PyTorch for CUDA, several gigabytes. The CPU build has its own index.
RUN case "$DEVICE" in \
      cpu) pip install --index-url https://download.pytorch.org/whl/cpu \
             "$(grep '^torch==' requirements.txt)" ;; \
      cuda) ;; \
      *) echo "error: DEVICE: '$DEVICE' is unknown; pass cpu or cuda" >&2; exit 2 ;; \
    esac \
    && pip install --requirement requirements.txt
COPY . ./
# A local folder has no version to pin.
# hadolint ignore=DL3013
RUN pip install ".[serve]"

FROM python:3.11-slim-bookworm
ENV PATH=/opt/tinymamba/bin:$PATH PYTHONUNBUFFERED=1
COPY --from=build /opt/tinymamba /opt/tinymamba
RUN useradd --uid 1000 --create-home tinymamba \
    && install --directory --owner=tinymamba --group=tinymamba /work
USER 1000
WORKDIR /work
VOLUME /work
EXPOSE 8000
HEALTHCHECK --interval=30s --timeout=5s --start-period=60s \
    CMD ["python", "-c", "from urllib.request import urlopen; urlopen('http://127.0.0.1:8000/health', timeout=4)"]
ENTRYPOINT ["tinymamba"]
CMD ["serve", "--host", "0.0.0.0", "--port", "8000", "--checkpoint", "tinymamba_model_latest.pt", \
     "--session_dir", "sessions", "--keep_sessions"]
