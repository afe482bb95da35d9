# What every process of a cluster needs, in one file: all templates here put it on each host and source it before
# `ray start`. Jobs and members inherit it. Edit the store; keep the rest unless you know why.

# Who may talk to Ray. Whoever reaches Ray's ports without a token runs code on the hosts.
export RAY_AUTH_MODE=token
export RAY_AUTH_TOKEN_PATH="$HOME/moepipe/ray_token" # mode 0600; the same bytes on every host and on your laptop

# Where results live. Every node reads and writes it: an object store (s3://, gs://) or a folder that all hosts mount.
export MOEPIPE_STORE="${MOEPIPE_STORE:-s3://my-bucket/moepipe}"
# Downloads, checkpoints and run records on this host; they are copied to an object store while a run goes on.
export MOEPIPE_CACHE="${MOEPIPE_CACHE:-$HOME/moepipe/cache}"
# Prepared data sets: a folder that all hosts see (or the same content on each).
export MOEPIPE_DATA="${MOEPIPE_DATA:-$HOME/moepipe/data}"
# One MLflow server for all, or leave it unset: then runs are tracked in a file on the head.
# export MLFLOW_TRACKING_URI=http://mlflow.internal:5000

export PATH="$HOME/moepipe/venv/bin:$PATH"
ulimit -n 65536 2> /dev/null || ulimit -n "$(ulimit -H -n)" # Ray keeps many files open: as many as this user may
export RAY_USAGE_STATS_ENABLED=0 # nothing is reported to anybody
export MLFLOW_DISABLE_TELEMETRY=true
export RAY_JOB_STOP_WAIT_TIME_S=120 # `moepipe cluster cancel` waits for the members' checkpoints
export RAY_TRAIN_ENABLE_PRINT_PATCH=0
export RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO=0
export DS_BUILD_OPS=0 # DeepSpeed compiles nothing while it is installed
export OMP_NUM_THREADS=1 # members set their own number of threads

# How soon the head believes that a host is gone: it asks each node every 2 s and gives it 4 s to answer; after three
# misses the node is dead for good (its Ray starts anew). A host that loses power is noticed in about 20 s; Ray's own
# values take up to a minute. Shorter ones would bury hosts that are only busy.
export RAY_health_check_period_ms=2000
export RAY_health_check_timeout_ms=4000
export RAY_health_check_failure_threshold=3
# A node that has lost its head for so long ends itself and what it runs. The count begins when its connection breaks: at
# once when the head's processes die, after some minutes when a cable is cut and nothing answers.
export RAY_gcs_rpc_server_reconnect_timeout_s=30
