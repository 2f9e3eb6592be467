# An image for NVIDIA cards; docs/install.md has the commands that build and use it.
FROM python:3.11-slim
ARG TORCH_BACKEND=cu130
ARG USER_ID=1000
# torch.compile calls a compiler
RUN apt-get update && apt-get install -y --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
WORKDIR /nanoswitch
COPY requirements.txt ./
RUN pip install --no-cache-dir uv && \
    uv pip install --system --no-cache --torch-backend=$TORCH_BACKEND -r requirements.txt
COPY *.py ./
COPY nanoswitch nanoswitch
COPY variants variants
COPY configs configs
RUN useradd --create-home --uid $USER_ID trainer && mkdir data runs && chown trainer data runs
USER trainer
ENV TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 TORCH_ELASTIC_SHUTDOWN_TIMEOUT=110
CMD ["python", "train_gpt2.py", "--help"]
