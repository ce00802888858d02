#!/usr/bin/env bash
# Trains on Cloud TPU in a GKE cluster made by XPK: JAX finds the hosts of a slice by itself.
#
#   CLUSTER=mine IMAGE=gcr.io/mine/attnjax launch/xpk.sh run1 v5litepod-64 \
#     lm_1b --directory /shared/runs/lm_1b --mesh.fsdp 64
#
# IMAGE holds this project, installed with the extras tpu and experiments. The run directory lies on
# a volume that `xpk storage` has attached to the cluster (Filestore, say): a gs:// path won't do.
# A slice that fails is started again up to RESTARTS times and goes on from the last checkpoint.
set -u

if [[ $# -lt 3 || $1 == -* || $2 == -* || -z ${CLUSTER:-} || -z ${IMAGE:-} ]]; then
  echo 'usage: CLUSTER=... IMAGE=... [SLICES=1] [RESTARTS=5] [XPK_OPTIONS="--zone ... --project ..."] \' >&2
  echo '         launch/xpk.sh WORKLOAD TPU_TYPE CONFIG [OPTION ...]' >&2
  echo 'CONFIG and OPTIONs are those of `attnjax train`' >&2
  exit 2
fi
workload=$1 tpu_type=$2
shift 2

# shellcheck disable=SC2086  # XPK_OPTIONS are several words
exec xpk workload create \
  --cluster "$CLUSTER" \
  --workload "$workload" \
  --tpu-type "$tpu_type" \
  --num-slices "${SLICES:-1}" \
  --docker-image "$IMAGE" \
  --max-restarts "${RESTARTS:-5}" \
  --command "python -u -m attnjax.cli train $(printf '%q ' "$@")--coordinator auto" \
  ${XPK_OPTIONS:-}
