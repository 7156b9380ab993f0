# neoxconv in a container: docs/installing.md says how to run it. Nothing outside /work, /cache and /tmp is written.
FROM python:3.13-slim AS wheels
WORKDIR /source
COPY . .
RUN pip wheel --no-cache-dir --wheel-dir /wheels --constraint constraints.txt .

FROM python:3.13-slim
RUN --mount=type=bind,from=wheels,source=/wheels,target=/wheels \
    pip install --no-cache-dir --no-index --find-links=/wheels /wheels/neoxconv-*.whl
# The kernels' machine code; whoever runs the container may write it (`--user`), as in /tmp.
RUN mkdir --mode=1777 /cache
ENV HOME=/tmp NUMBA_CACHE_DIR=/cache PYTHONDONTWRITEBYTECODE=1
VOLUME /cache
WORKDIR /work
# nobody
USER 65534:65534
ENTRYPOINT ["neoxconv"]
CMD ["--help"]
