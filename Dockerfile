# Floe as a container: `docker build -t floe .`
#
# Three variables are enough to run it on the telemetry example: KAFKA_BOOTSTRAP_SERVERS, KAFKA_TOPIC and
# CHECKPOINT_LOCATION. For a pipeline of your own, mount its TOML and its schema and set FLOE_CONFIG. It runs as an ordinary
# user and writes nothing but /var/lib/floe (tables and checkpoint, unless they are on s3://), so the root file system can be
# read-only.

FROM rust:1.95-bookworm AS build
# Versions follow the base image: it is what is pinned.
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install --yes --no-install-recommends libssl-dev pkg-config \
 && rm -rf /var/lib/apt/lists/*
WORKDIR /floe
COPY Cargo.toml Cargo.lock ./
COPY src src
COPY bench bench
COPY benches benches
# `floe demo` has its schema inside.
COPY schemas schemas
# `--build-arg PROFILE=release` builds in half the time and runs some percent slower.
ARG PROFILE=dist
RUN cargo build --locked --profile "$PROFILE" --bin floe \
 && mv target/*/floe /usr/local/bin/floe

FROM debian:bookworm-slim
# Versions follow the base image: it is what is pinned.
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install --yes --no-install-recommends ca-certificates libssl3 \
 && rm -rf /var/lib/apt/lists/* \
 && groupadd --system --gid 10001 floe \
 && useradd --system --uid 10001 --gid floe --home-dir /var/lib/floe --create-home floe
COPY --from=build /usr/local/bin/floe /usr/local/bin/floe
COPY config/telemetry.toml /etc/floe/config/telemetry.toml
COPY schemas /etc/floe/schemas
ENV FLOE_CONFIG=/etc/floe/config/telemetry.toml \
    FLOE_HTTP__LISTEN=0.0.0.0:8080 \
    FLOE_LOG_FORMAT=json
WORKDIR /var/lib/floe
VOLUME /var/lib/floe
USER 10001:10001
EXPOSE 8080
HEALTHCHECK --interval=10s --timeout=3s --start-period=10s \
  CMD ["bash", "-c", "exec 3<>/dev/tcp/127.0.0.1/8080 && printf 'GET /healthz HTTP/1.0\\r\\n\\r\\n' >&3 && head -1 <&3 | grep -q ' 200 '"]
# SIGTERM finishes the batch in hand and exits with 0, within 25 seconds.
STOPSIGNAL SIGTERM
ENTRYPOINT ["floe"]
CMD ["run"]
