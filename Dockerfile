# The scripts with all that they need. Data, weights and runs stay outside, in volumes: see docs/CONTAINER.md.
FROM python:3.12-slim
WORKDIR /app

# Any user may run it, without an entry in /etc/passwd. Caches of libraries go where everybody may write.
ENV HOME=/tmp PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1

# The packages change less often than the scripts, so their layer comes first. By default torch runs on NVIDIA
# GPUs and on the processor; --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cpu is for the processor
# alone, and several GB smaller.
ARG TORCH_INDEX=
COPY requirements.txt ./
RUN pip install --no-cache-dir ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} -r requirements.txt

# .dockerignore says what comes along: the scripts and their folders, no data.
COPY . ./

# Open to any user: --user names the one that owns the folders of the host.
RUN mkdir -p Data weights outputs && chmod 777 . Data weights outputs
VOLUME ["/app/Data", "/app/weights", "/app/outputs"]
USER 1000:1000

ENTRYPOINT ["python"]
CMD ["train_scratch.py", "--help"]
