# anydoor build (plans, from ONNX bundles) and anydoor serve on an RTX card, with TensorRT for RTX. The host needs an
# NVIDIA driver and the NVIDIA Container Toolkit; the image needs no CUDA, the libraries come with the wheels.
#
#   docker build -f docker/rtx.Dockerfile -t anydoor-rtx .
#   docker run --gpus all -v $PWD/build/engines/anydoor:/bundle:ro -v anydoor-cache:/cache \
#       -v $PWD/secrets:/secrets:ro -p 50051:50051 --stop-timeout 33 \
#       --read-only --tmpfs /tmp --cap-drop ALL --security-opt no-new-privileges anydoor-rtx \
#       serve --listen 0.0.0.0:50051 --tls-certificate /secrets/server.pem --tls-key /secrets/server.key \
#       --tokens /secrets/tokens --metrics 127.0.0.1:9090
#
# The health check asks at the address of --metrics. Without these flags it listens within the container alone.
FROM python:3.12-slim

WORKDIR /app
COPY anydoor_command.py pyproject.toml README.md LICENSE ./
COPY docker/build.lock docker/rtx.lock docker/
COPY engines engines
COPY runtime runtime
COPY export export
# the tested versions, by their hashes (make lock): plans run with the version of TensorRT for RTX that built them
RUN pip install --no-cache-dir --require-hashes --requirement docker/build.lock \
    && pip install --no-cache-dir --require-hashes --no-build-isolation --requirement docker/rtx.lock \
    && pip install --no-cache-dir --no-deps --no-build-isolation .

# bundles are mounted read-only; what TensorRT compiles for the card is kept here
ENV ANYDOOR_BUNDLE=/bundle ANYDOOR_CACHE=/cache
RUN useradd --create-home --uid 1000 anydoor && mkdir /cache && chown anydoor /cache
USER 1000
VOLUME /cache
EXPOSE 50051
ENTRYPOINT ["anydoor"]
CMD ["serve", "--metrics", "127.0.0.1:9090"]
# a large model takes minutes to load
HEALTHCHECK --start-period=10m --timeout=10s CMD ["anydoor", "health", "http://127.0.0.1:9090"]
