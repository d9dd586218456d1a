# Plans and anydoor serve on a Jetson Orin. TensorRT comes with JetPack, in NVIDIA's image for it; give the tag of
# your JetPack (JetPack 6: r36.x, JetPack 7: r38.x).
#
#   docker build -f docker/jetson.Dockerfile --build-arg BASE=nvcr.io/nvidia/l4t-tensorrt:TAG -t anydoor-jetson .
#   docker run --runtime nvidia -v $PWD/engines:/engines anydoor-jetson \
#       build /engines/half --backend tensorrt --output /engines/orin
#   docker run --runtime nvidia -p 50051:50051 -v $PWD/engines/orin:/bundle:ro anydoor-jetson
ARG BASE
FROM ${BASE}

WORKDIR /app
# the versions are those of the JetPack that BASE is of
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends python3-pip python3-libnvinfer \
    && rm -rf /var/lib/apt/lists/*
COPY anydoor_command.py pyproject.toml README.md LICENSE ./
COPY engines engines
COPY runtime runtime
COPY export export
# no PyTorch: plans are built from ONNX graphs
# hadolint ignore=DL3013
RUN python3 -m pip install --no-cache-dir '.[serve]' 'cuda-python>=12.6,<13'

ENV ANYDOOR_BUNDLE=/bundle ANYDOOR_CACHE=/cache
VOLUME /cache
EXPOSE 50051
ENTRYPOINT ["anydoor"]
CMD ["serve", "--listen", "0.0.0.0:50051"]
