# Plans and anydoor serve on a Jetson. TensorRT comes in NVIDIA's image; give the one of your JetPack: for JetPack 6
# l4t-tensorrt:r36.x; for JetPack 7 an SBSA image with TensorRT, and --build-arg JETPACK=7.
#
#   docker build -f docker/jetson.Dockerfile --build-arg BASE=nvcr.io/nvidia/l4t-tensorrt:TAG -t anydoor-jetson .
#   docker run --runtime nvidia -v $PWD/engines:/engines anydoor-jetson \
#       build /engines/half --backend tensorrt --output /engines/orin
#   docker run --runtime nvidia -v $PWD/engines/orin:/bundle:ro -v anydoor-cache:/cache \
#       -v $PWD/secrets:/secrets:ro -p 50051:50051 --stop-timeout 33 \
#       --read-only --tmpfs /tmp --cap-drop ALL --security-opt no-new-privileges anydoor-jetson \
#       serve --listen 0.0.0.0:50051 --tls-certificate /secrets/server.pem --tls-key /secrets/server.key \
#       --tokens /secrets/tokens --metrics 127.0.0.1:9090
#
# The health check asks at the address of --metrics. Without these flags it listens within the container alone.
# /engines must be writable for the user id 1000.
ARG BASE
FROM ${BASE}
ARG JETPACK=6

WORKDIR /app
# the versions are those of the JetPack that BASE is of
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends python3-venv python3-libnvinfer \
    && rm -rf /var/lib/apt/lists/*
COPY anydoor_command.py pyproject.toml README.md LICENSE ./
COPY docker/build.lock docker/jetpack${JETPACK}.lock docker/
COPY engines engines
COPY runtime runtime
COPY export export
# no PyTorch: plans are built from ONNX graphs. TensorRT's Python package is the system's, the rest is installed by its
# hashes (make lock)
RUN python3 -m venv --system-site-packages /opt/anydoor
ENV PATH=/opt/anydoor/bin:$PATH
RUN pip install --no-cache-dir --require-hashes --requirement docker/build.lock \
    && pip install --no-cache-dir --require-hashes --no-build-isolation --requirement docker/jetpack${JETPACK}.lock \
    && pip install --no-cache-dir --no-deps --no-build-isolation .

ENV ANYDOOR_BUNDLE=/bundle ANYDOOR_CACHE=/cache
# the group video has the devices of the GPU; images of Ubuntu 24.04 have a user 1000
RUN if getent passwd 1000; then userdel --remove "$(id -un 1000)"; fi \
    && useradd --create-home --uid 1000 --groups video anydoor && mkdir /cache && chown anydoor /cache
USER 1000
VOLUME /cache
EXPOSE 50051
ENTRYPOINT ["anydoor"]
CMD ["serve", "--metrics", "127.0.0.1:9090"]
# a large model takes minutes to load
HEALTHCHECK --start-period=10m --timeout=10s CMD ["anydoor", "health", "http://127.0.0.1:9090"]
