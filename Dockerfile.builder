# The images of OOM Tracer: toolchain -> go -> bpf -> one stage for each image. `make image` builds them all and
# says which engine it uses; what it hands over stands here.
#
#   BASE               where the toolchain is installed: Debian bookworm, which can be pulled; on a closed
#                      network localhost/debian:bookworm (make base-image)
#   context goroot     GOROOT of the Go that builds
#   context modules    what `go mod vendor` makes, for each module: nothing of Go is downloaded inside
#   context kernel     vmlinux.h of the target's architecture; and btf, if the images are for that kernel
#                      only: they are not made unless the program fits it
#   --platform         linux/amd64 or linux/arm64; the other one than the builder's is cross-compiled
ARG BASE=debian:bookworm
ARG BUILDPLATFORM

FROM --platform=${BUILDPLATFORM} ${BASE} AS toolchain
ARG TARGETARCH
# No terminal, and no files in the layers that differ from one day to the next.
ENV DEBIAN_FRONTEND=noninteractive PATH=/usr/local/go/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root
RUN apt-get -qq update && apt-get -qq install --no-install-recommends make >/dev/null && rm -rf /var/lib/apt/lists/*
COPY tools/install-deps.sh tools/fetch-deb.sh /src/tools/
RUN [ ${TARGETARCH} = $(dpkg --print-architecture) ] || cross=-${TARGETARCH}; \
	ARCH=${TARGETARCH} /src/tools/install-deps.sh /root/.cache/oom-tracer/libbpf-bookworm-backports${cross}
COPY --from=goroot . /usr/local/go

FROM toolchain AS go
ARG TARGETARCH
ARG VERSION REVISION
WORKDIR /src
ENV GOTOOLCHAIN=local GOFLAGS=-buildvcs=false
COPY Makefile go.mod go.sum ./
COPY --from=modules . ./
COPY go ./go
# A further program without cgo: its name here, and a stage at the end.
RUN --mount=type=cache,target=/root/.cache/go-build \
	make ARCH=${TARGETARCH} VERSION=${VERSION} REVISION=${REVISION} build/oom-annotator build/oom-auth build/oom-notify build/oom-tap
RUN install -d -m 1777 /out/tmp && install -d /out/etc/ssl/certs && \
	cp /etc/ssl/certs/ca-certificates.crt /out/etc/ssl/certs/

# Its own module, and minutes of work: nobody else waits for it.
FROM go AS descheduler
ARG TARGETARCH
ARG VERSION REVISION DATE
RUN --mount=type=cache,target=/root/.cache/go-build \
	make ARCH=${TARGETARCH} VERSION=${VERSION} REVISION=${REVISION} DATE=${DATE} build/oom-descheduler

# The only one that depends on a kernel.
FROM go AS bpf
ARG TARGETARCH
ARG VERSION REVISION
COPY src ./src
COPY --from=kernel . ./vmlinux/${TARGETARCH}/
RUN make ARCH=${TARGETARCH} go/internal/loader/oom.bpf.o
RUN --mount=type=cache,target=/root/.cache/go-build \
	make ARCH=${TARGETARCH} VERSION=${VERSION} REVISION=${REVISION} build/static/oom-tracer
RUN if [ -e vmlinux/${TARGETARCH}/btf ]; then make ARCH=${TARGETARCH} matched KERNEL_BTF=vmlinux/${TARGETARCH}/btf; fi

# Each stage from here on that begins with "FROM base AS" is an image. What all have: the roots of TLS, and no shell. (Their labels come from make image: in a cached layer
# buildah keeps those of an earlier commit.)
FROM scratch AS base
COPY --from=go /out/ /

# User 0 with few capabilities (deploy/docs/runbook.md, doctor): the kernel asks for them in the first user namespace.
FROM base AS oom-tracer
COPY --from=bpf /src/build/static/oom-tracer /oom-tracer
ENTRYPOINT ["/oom-tracer"]

FROM base AS oom-annotator
USER 65532:65532
COPY --from=go /src/build/oom-annotator /oom-annotator
ENTRYPOINT ["/oom-annotator"]

FROM base AS oom-auth
USER 65532:65532
COPY --from=go /src/build/oom-auth /oom-auth
ENTRYPOINT ["/oom-auth"]

FROM base AS oom-notify
USER 65532:65532
COPY --from=go /src/build/oom-notify /oom-notify
ENTRYPOINT ["/oom-notify"]

FROM base AS oom-tap
USER 65532:65532
COPY --from=go /src/build/oom-tap /oom-tap
ENTRYPOINT ["/oom-tap"]

FROM base AS oom-descheduler
USER 65532:65532
COPY --from=descheduler /src/build/oom-descheduler /oom-descheduler
ENTRYPOINT ["/oom-descheduler"]
