# The package with this checkout as its working directory, for launch/gke_xpk.sh or by hand:
#
#   docker build --build-arg EXTRA=tpu -t hybrid_vit .
#   docker run --rm hybrid_vit
#   docker run --rm --gpus all -v /data:/data hybrid_vit \
#     python -m hybrid_vit.main --config=moat:moat_0 --workdir=/data/runs/moat_0

# The Python that constraints.txt was made with.
FROM python:3.11-slim

# tpu, cuda, or empty for the CPU; several with commas, as "cuda,fast".
ARG EXTRA=tpu
# The user that runs are of; root where the nodes' TPU devices are root's alone.
ARG RUN_AS=hybrid_vit

ENV PYTHONUNBUFFERED=1 PIP_NO_CACHE_DIR=1
RUN useradd --create-home --uid 1000 hybrid_vit
WORKDIR /opt/hybrid_vit
COPY . .
RUN pip install -c constraints.txt -e ".${EXTRA:+[$EXTRA]}"

USER ${RUN_AS}
CMD ["python", "-m", "hybrid_vit.tools.doctor"]
