# An image of the command `tinymamba`: it serves, and trains and does all else when told to.
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
# What pip takes by default is PyTorch for CUDA, of several gigabytes; the small one is elsewhere.
RUN case "$DEVICE" in \
      cpu) pip install --index-url https://download.pytorch.org/whl/cpu \
             "$(grep '^torch==' requirements.txt)" ;; \
      cuda) ;; \
      *) echo "error: DEVICE: '$DEVICE' is unknown; pass cpu or cuda" >&2; exit 2 ;; \
    esac \
    && pip install --requirement requirements.txt
COPY . ./
# The version of what lies here is that of its files.
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
