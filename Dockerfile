# A CPU server: docker compose up --build
FROM python:3.12-slim AS build
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
# More arguments for pip, such as the index of torch's CPU builds, a tenth the size of the default ones.
ARG PIP_ARGS=""
RUN python -m venv /opt/memoryllm
WORKDIR /src
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY app ./app
COPY kernels ./kernels
RUN /opt/memoryllm/bin/pip install ${PIP_ARGS} -c constraints.txt .

FROM python:3.12-slim
RUN useradd --uid 10001 --create-home memoryllm \
    && install -d -o memoryllm -g memoryllm /data
COPY --from=build /opt/memoryllm /opt/memoryllm
ENV PATH=/opt/memoryllm/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    MEMORYLLM_HOST=0.0.0.0 \
    MEMORYLLM_STORE=disk:///data
USER memoryllm
VOLUME /data
EXPOSE 8000
HEALTHCHECK --start-period=5m --interval=10s --timeout=5s \
    CMD ["python", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:8000/ready', timeout=4)"]
ENTRYPOINT ["memoryllm"]
CMD ["serve"]
