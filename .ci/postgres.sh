#!/usr/bin/env bash
# Starts a PostgreSQL server of its own in a folder and prints its URL; `stop FOLDER` ends it.
# Installs the Debian package where there is none and it may. Exit status 1: there can be none here,
# the reason is on stderr.
set -euo pipefail
what=$1 folder=$2

tools=$(find /usr/lib/postgresql/*/bin -maxdepth 0 2>/dev/null | sort -V | tail -n 1 || true)
if [ -z "$tools" ] && command -v initdb >/dev/null; then
  tools=$(dirname "$(command -v initdb)")
fi
if [ -z "$tools" ]; then
  if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
    echo "PostgreSQL is not installed, and only root can install it here" >&2
    exit 1
  fi
  export DEBIAN_FRONTEND=noninteractive
  if ! { apt-get install -y -qq postgresql || { apt-get update -qq && apt-get install -y -qq postgresql; }; } \
    >"$folder.apt" 2>&1; then
    echo "PostgreSQL cannot be installed: $(tail -n 1 "$folder.apt")" >&2
    exit 1
  fi
  tools=$(find /usr/lib/postgresql/*/bin -maxdepth 0 | sort -V | tail -n 1)
fi

# The server refuses to be root's.
as_user() {
  if [ "$(id -u)" = 0 ]; then
    (cd / && runuser -u postgres -- "$@")
  else
    "$@"
  fi
}

if [ "$what" = stop ]; then
  as_user "$tools/pg_ctl" -D "$folder/data" -m immediate -w stop >/dev/null
  exit 0
fi

mkdir -p "$folder"
if [ "$(id -u)" = 0 ]; then
  chmod 755 "$(dirname "$folder")" "$folder"
  chown postgres "$folder"
fi
port=$(python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
printf 'tests-only' >"$folder/word"
chmod 644 "$folder/word"
as_user "$tools/initdb" -D "$folder/data" -U searchlab -A scram-sha-256 --pwfile "$folder/word" \
  --no-sync >"$folder/initdb.log" 2>&1 || { tail -n 3 "$folder/initdb.log" >&2; exit 1; }
as_user "$tools/pg_ctl" -D "$folder/data" -w -t 60 -l "$folder/data/server.log" \
  -o "-p $port -c listen_addresses=127.0.0.1 -c unix_socket_directories= -c fsync=off" start \
  >/dev/null || { echo "PostgreSQL does not start" >&2; exit 1; }
echo "postgresql+psycopg://searchlab:tests-only@127.0.0.1:$port/postgres"
