#!/bin/bash
# Trains with Open MPI 4 or 5. Run it on the first host; mpirun's own flags stand before --, those of `xprompt train` after it.
#
#   tools/launch/mpirun.sh --host a:1,b:1 -- --workdir runs/rain --config configs/chameleon_7b_pod.py --data.store data/rain
#
# One process a host drives all GPUs there; several (a:8) get one each. ADDRESS is this host as the others reach it, PORT a free port.
# To save and stop: `pkill -TERM -x xprompt` on any one host, for mpirun itself does not wait for them to save. The same command goes on.
set -euo pipefail
mpi=()
while [ "${1:?usage: mpirun.sh [MPIRUN_FLAGS] -- TRAIN_FLAGS}" != -- ]; do
  mpi+=("$1")
  shift
done
shift
address=${ADDRESS:-$(hostname -f)}:${PORT:-$((20000 + RANDOM % 10000))}

# Addresses are given because Open MPI 5 does not tell JAX where its processes meet; unbound, a process may use all cores of its host.
# shellcheck disable=SC2016 # expanded by each process
exec mpirun --bind-to none -x PATH "${mpi[@]}" bash -c '
  [ "$OMPI_COMM_WORLD_LOCAL_SIZE" = 1 ] || export JAX_LOCAL_DEVICE_IDS=$OMPI_COMM_WORLD_LOCAL_RANK
  exec xprompt train "$@" --distributed "$0,$OMPI_COMM_WORLD_SIZE,$OMPI_COMM_WORLD_RANK"' "$address" "$@"
