#!/usr/bin/env bash
# Build the image of a packaged model on a Debian base, and run it as a cluster does: user 1000,
# read-only, no capabilities. By hand, as root, where buildah, podman, runc and mmdebstrap are; it
# takes minutes. `make images` calls it.
set -euo pipefail
cd "$(dirname "$0")/../.."
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cache=${PT_DEPLOY_HOME:-$HOME/.cache/mlflow-pt-deploy}/images
port=${PORT:-18080}
mkdir -p "$cache"
storage=(--storage-driver vfs --root "$cache/root" --runroot "$work/run")

if [ ! -f "$cache/base.tar" ]; then
  mmdebstrap --variant=minbase --include=python3,python3-venv,python3-pip bookworm "$cache/base.tar.new"
  mv "$cache/base.tar.new" "$cache/base.tar"
fi
printf 'FROM scratch\nADD base.tar /\n' >"$cache/Dockerfile"
buildah "${storage[@]}" build --isolation chroot -t localhost/pt-python:local "$cache"

python -m mlflow_pt_deploy.cli package tests/fixtures/saved-by-0.1.0 --target docker \
  --image localhost/pt-model:local --out "$work/package"
# the build has no index: the base has no settings for one
pip download --quiet --no-deps --only-binary :all: --dest "$work/wheelhouse" \
  --find-links "$work/package/wheels" -r "$work/package/requirements.txt"
buildah "${storage[@]}" build --isolation chroot --network host \
  --build-arg BASE=localhost/pt-python:local \
  --build-arg PIP_ARGS="--no-index --find-links /wheelhouse" \
  --volume "$work/wheelhouse:/wheelhouse:ro" -t localhost/pt-model:local "$work/package"

podman "${storage[@]}" --cgroup-manager cgroupfs --runtime "$(command -v runc || echo /usr/sbin/runc)" \
  run --name pt-model --detach --ulimit nofile=1024:1024 --ulimit nproc=1000:1000 \
  --network host --read-only --tmpfs /tmp --cap-drop ALL --security-opt no-new-privileges \
  -e PORT="$port" -e PT_DEPLOY_INSECURE=1 localhost/pt-model:local
podman=(podman "${storage[@]}" --cgroup-manager cgroupfs)
trap '"${podman[@]}" rm --force pt-model >/dev/null; rm -rf "$work"' EXIT

for _ in $(seq 120); do
  curl --silent --fail "http://127.0.0.1:$port/readyz" && break
  sleep 0.5
done
answer=$(curl --silent --fail "http://127.0.0.1:$port/invocations" \
  -H 'Content-Type: application/json' -d '{"inputs": ["my card"]}')
echo "$answer"
grep -q '"label": "card"' <<<"$answer"
"${podman[@]}" top pt-model user pid args
"${podman[@]}" stop --time 20 pt-model
status=$("${podman[@]}" inspect --format '{{.State.ExitCode}}' pt-model)
echo "exit status $status"
test "$status" = 0
"${podman[@]}" images --format '{{.Repository}} {{.Size}}'
