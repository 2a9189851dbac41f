# Serves an exported detector on an NVIDIA GPU; the host needs a driver for CUDA 13. Build from the
# root of a clone:
#
#     docker build -f docker/cuda.Dockerfile -t dn-detr-serve-cuda .
#     docker run --rm --gpus all -p 8000:8000 -v "$PWD/detector.zip:/detector.zip:ro" dn-detr-serve-cuda
FROM python:3.13-slim

WORKDIR /src
COPY pyproject.toml setup.py requirements.txt README.md LICENSE ./
COPY dn_detr_jax dn_detr_jax
COPY configs configs
RUN pip install --no-cache-dir ".[serve]" "jax[cuda13]" flatbuffers && rm -rf /src/* \
    && useradd --create-home --uid 10001 serve

USER serve
WORKDIR /home/serve
ENV JAX_PLATFORMS=cuda XLA_PYTHON_CLIENT_PREALLOCATE=false \
    PYTHONDONTWRITEBYTECODE=1
EXPOSE 8000
HEALTHCHECK --start-period=120s CMD ["python", "-c", \
    "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health', timeout=5)"]
ENTRYPOINT ["dn-detr", "serve", "--host=0.0.0.0"]
CMD ["--artifact=/detector.zip"]
