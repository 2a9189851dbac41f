# Serves an exported detector on CPUs. Build from the root of a clone:
#
#     docker build -f docker/cpu.Dockerfile -t dn-detr-serve .
#     docker run --rm -p 8000:8000 -v "$PWD/detector.zip:/detector.zip:ro" dn-detr-serve
FROM python:3.13-slim

WORKDIR /src
COPY pyproject.toml setup.py requirements.txt README.md LICENSE ./
COPY dn_detr_jax dn_detr_jax
COPY configs configs
RUN pip install --no-cache-dir ".[serve]" flatbuffers && rm -rf /src/* \
    && useradd --create-home --uid 10001 serve

USER serve
WORKDIR /home/serve
ENV JAX_PLATFORMS=cpu PYTHONDONTWRITEBYTECODE=1
EXPOSE 8000
HEALTHCHECK --start-period=120s CMD ["python", "-c", \
    "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health', timeout=5)"]
ENTRYPOINT ["dn-detr", "serve", "--host=0.0.0.0"]
CMD ["--artifact=/detector.zip"]
