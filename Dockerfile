# docker build -t photofinish . && mkdir -p data logs
# docker run --rm --gpus all --shm-size=2g --user "$(id -u):$(id -g)" \
#     -v "$PWD/data:/photofinish/data" -v "$PWD/logs:/photofinish/logs" photofinish ./run.sh
FROM python:3.12.11-slim-bookworm

# torch.compile needs a C++ compiler on the CPU, and triton one on the GPU; git names the commit.
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ git \
    && rm -rf /var/lib/apt/lists/*

# The one place where packages are installed; run.sh finds them and installs nothing over them.
COPY requirements.txt /tmp/requirements.txt
COPY tools/requirements.txt /tmp/tools.txt
RUN pip install --no-cache-dir -r /tmp/requirements.txt -r /tmp/tools.txt

# Any user may run it, without a name or a home, so that data and logs belong to who started it.
ENV HOME=/tmp USER=runner
WORKDIR /photofinish
COPY . .
CMD ["./run.sh"]
