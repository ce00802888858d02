#!/usr/bin/env bash
# Trains on a plain list of hosts, one process on each, and waits for all of them.
#
#   launch/hosts.sh "node1 node2" lm_1b --directory /shared/runs/lm_1b --mesh.fsdp 16
#   launch/hosts.sh "localhost localhost" digits_small --cpu-devices 1      # two on this machine
#
# The first host is where the processes meet, so the others must reach it under that name, at PORT.
# Every host needs this folder under this path, the same packages, and the run directory on a file
# system that all share. Hosts other than localhost are reached by ssh, with keys. All devices of a
# host are its process's. The same command again resumes the run; so does one with other hosts.
#
# SIGTERM and Ctrl-C are passed on: the run is saved, and everything ends with 0. Otherwise the exit
# status is that of the first process that failed by itself, or 75 where all the others saw is that
# one of them was lost.
set -u

usage() {
  echo 'usage: [PORT=8476] [PYTHON=.venv/bin/python] launch/hosts.sh "HOST HOST ..." CONFIG [OPTION ...]' >&2
  echo 'CONFIG and OPTIONs are those of `attnjax train`, less --coordinator, --num-processes, --process-id' >&2
  exit 2
}

[[ $# -ge 2 && $1 != -* && $2 != -* ]] || usage
[[ " $* " != *" --coordinator"* && " $* " != *" --num-processes"* && " $* " != *" --process-id"* ]] || usage
read -ra hosts <<< "$1"
shift
(( ${#hosts[@]} )) || usage
cd "$(dirname "$0")/.." || exit
port=${PORT:-8476} python=${PYTHON:-.venv/bin/python}

is_here() { [[ $1 == localhost || $1 == 127.* ]]; }
for host in "${hosts[@]}"; do
  if is_here "${hosts[0]}" && ! is_here "$host"; then
    echo "launch/hosts.sh: $host can't reach this machine as ${hosts[0]}: name it otherwise" >&2
    exit 2
  fi
done

at() { if is_here "$1"; then bash -c "$2"; else ssh -n -o BatchMode=yes "$1" "$2"; fi; }

# Process 0 leaves its id beside the run on its host, as ending ssh wouldn't end what runs there; told
# to stop, it tells the others.
there="cd $(printf %q "$PWD")"
id_file=.attnjax-$port.pid
trap 'at "${hosts[0]}" "$there && kill -TERM \$(cat $id_file)"' TERM INT
trap 'at "${hosts[0]}" "$there && rm -f $id_file"' EXIT

jobs=()
for i in "${!hosts[@]}"; do
  command="exec $(printf '%q ' "$python" -u -m attnjax.cli train "$@" \
    --coordinator "${hosts[0]}:$port" --num-processes "${#hosts[@]}" --process-id "$i")"
  (( i )) || command="echo \$\$ > $id_file && $command"
  at "${hosts[i]}" "$there && $command" &
  jobs+=($!)
done

status=0
for job in "${jobs[@]}"; do
  wait "$job"; ended=$?
  while (( ended > 128 )) && kill -0 "$job" 2> /dev/null; do wait "$job"; ended=$?; done  # a trap
  if (( ended && (status == 0 || status == 75) )); then status=$ended; fi
done
exit "$status"
