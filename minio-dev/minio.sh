#!/usr/bin/env bash
# minio.sh builds and runs the MinIO that DRC is developed and tested against.
# See README.md beside this file, or run it without arguments.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
tools=${DRC_TOOLS_DIR:-${XDG_CACHE_HOME:-$HOME/.cache}/drc/tools}
state=${DRC_MINIO_STATE:-${XDG_STATE_HOME:-$HOME/.local/state}/drc/minio}
# The credentials are those of a throw-away server on the loopback interface.
user=${MINIO_ROOT_USER:-drcdev}
password=${MINIO_ROOT_PASSWORD:-drcdevsecret}
buckets=${DRC_MINIO_BUCKETS:-drc}
region=us-east-1
ready_seconds=60

die() {
	echo "minio.sh: $*" >&2
	exit 1
}

usage() {
	cat >&2 <<'USAGE'
minio.sh build                    build MinIO once (about 4 minutes the first time)
minio.sh path                     print where the built binary is
minio.sh start [N] [options]      run N instances (default 1) until Ctrl-C
    --ports P1,P2,...             use these ports instead of free ones
    --background                  return when all are ready; end them with stop
minio.sh stop                     end the instances that start --background left

ENVIRONMENT
  DRC_TOOLS_DIR       where the binary is kept (default ~/.cache/drc/tools)
  DRC_MINIO_STATE     data, logs and pids      (default ~/.local/state/drc/minio)
  DRC_MINIO_BUCKETS   buckets to create, separated by spaces (default drc)
  MINIO_ROOT_USER, MINIO_ROOT_PASSWORD   credentials (default drcdev, drcdevsecret)
USAGE
	exit 2
}

# The version in go.mod names the binary, so that a new pin is a new file and
# two checkouts with different pins do not fight over one.
version() {
	sed -n 's|^\(require \)\{0,1\}[[:space:]]*github.com/minio/minio \(v[^ ]*\).*|\2|p' "$here/go.mod" | head -n 1
}

binary() {
	local v
	v=$(version)
	[[ -n $v ]] || die "$here/go.mod names no version of github.com/minio/minio"
	echo "$tools/minio-$v"
}

# build makes the binary if it is missing. The lock lets parallel builds wait
# for the first one; the rename at the end means that nobody ever runs half a file.
build() {
	local bin tmp
	bin=$(binary)
	[[ -x $bin ]] && return
	command -v go >/dev/null || die "go is not installed; it is needed to build MinIO"
	mkdir -p "$tools"
	exec 9>"$bin.lock"
	if ! flock --nonblock 9; then
		echo "minio.sh: another build is running, waiting for it" >&2
		flock 9
	fi
	if [[ ! -x $bin ]]; then
		echo "minio.sh: building $(basename "$bin") (about 4 minutes, once)" >&2
		tmp=$bin.tmp.$$
		(cd "$here" && CGO_ENABLED=0 GOWORK=off go build -trimpath -ldflags='-s -w' -o "$tmp" github.com/minio/minio) || {
			rm -f "$tmp"
			die "building MinIO failed, see above"
		}
		mv "$tmp" "$bin"
	fi
	exec 9>&-
}

# free_ports prints N ports that were free when it asked. Two calls may collide,
# in which case the server says that the address is in use.
free_ports() {
	local n=$1 port tries=0
	local -a found=()
	while ((${#found[@]} < n)); do
		((++tries < 1000)) || die "no $n free ports found"
		port=$((20000 + RANDOM % 12000))
		[[ " ${found[*]:-} " == *" $port "* ]] && continue
		(exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null && continue
		found+=("$port")
	done
	echo "${found[@]}"
}

# ready asks with an access key that nobody has. The answer is 403 once both the
# objects and the users are loaded; the server's health page says yes before that.
ready() { # port
	local line now
	now=$(date -u +%Y%m%dT%H%M%SZ)
	{
		exec 3<>"/dev/tcp/127.0.0.1/$1" || return 1
		printf '%s\r\n' "GET /bucket/?location= HTTP/1.0" "Host: 127.0.0.1:$1" \
			"X-Amz-Date: $now" "X-Amz-Content-Sha256: UNSIGNED-PAYLOAD" \
			"Authorization: AWS4-HMAC-SHA256 Credential=nobody/${now%T*}/us-east-1/s3/aws4_request, SignedHeaders=host;x-amz-content-sha256;x-amz-date, Signature=$(printf %064d 0)" \
			"" >&3
		read -r -t 5 line <&3 || return 1
		exec 3>&-
	} 2>/dev/null
	[[ $line == *" 403 "* ]]
}

# owns says whether a pid is still the server that start ran: a pid from a file
# may have been given to another process since.
owns() { # pid
	[[ -r /proc/$1/cmdline ]] && tr '\0' ' ' <"/proc/$1/cmdline" | grep -qF "$(basename "$(binary)") server $state/"
}

pids=()
# stop_pids asks the servers to end, and ends them after ten seconds.
stop_pids() {
	local pid i
	for pid in "$@"; do owns "$pid" && kill -TERM "$pid" 2>/dev/null; done
	for pid in "$@"; do
		for ((i = 0; i < 100; i++)); do
			owns "$pid" || break
			sleep 0.1
		done
		owns "$pid" && kill -KILL "$pid" 2>/dev/null
	done
	return 0
}

start() {
	local n=1 background=no ports=() bin i port dir bucket deadline
	while (($#)); do
		case $1 in
		--background) background=yes ;;
		--ports)
			[[ $# -ge 2 ]] || die "--ports needs a list such as 9000,9001"
			IFS=, read -r -a ports <<<"$2"
			n=${#ports[@]}
			shift
			;;
		[1-9] | [1-9][0-9]) n=$1 ;;
		*) die "start: unknown argument $1" ;;
		esac
		shift
	done
	if compgen -G "$state/*/pid" >/dev/null; then
		for i in "$state"/*/pid; do
			owns "$(<"$i")" && die "instances are running already (state in $state); end them with: $0 stop"
		done
		rm -f "$state"/*/pid
	fi
	build
	bin=$(binary)
	((${#ports[@]} == n)) || read -r -a ports <<<"$(free_ports "$n")"

	trap 'stop_pids "${pids[@]}"; rm -f "$state"/*/pid' EXIT
	trap 'exit 130' INT TERM
	for ((i = 0; i < n; i++)); do
		dir=$state/$((i + 1))
		mkdir -p "$dir/data"
		# setsid keeps Ctrl-C from reaching the servers directly: this script
		# ends them, in the foreground case too.
		MINIO_ROOT_USER=$user MINIO_ROOT_PASSWORD=$password MINIO_BROWSER=off MINIO_CALLHOME_ENABLE=off \
			setsid "$bin" server "$dir/data" --address "127.0.0.1:${ports[i]}" >"$dir/log" 2>&1 </dev/null &
		pids+=($!)
		echo $! >"$dir/pid"
	done
	deadline=$((SECONDS + ready_seconds))
	for ((i = 0; i < n; i++)); do
		dir=$state/$((i + 1))
		until ready "${ports[i]}"; do
			kill -0 "${pids[i]}" 2>/dev/null || die "instance $((i + 1)) ended: $(tail -n 5 "$dir/log")"
			((SECONDS < deadline)) || die "instance $((i + 1)) was not ready in $ready_seconds s; its log is $dir/log"
			sleep 0.1
		done
		# A folder below the data directory is a bucket.
		for bucket in $buckets; do mkdir -p "$dir/data/$bucket"; done
	done

	echo "export AWS_ACCESS_KEY_ID=$user"
	echo "export AWS_SECRET_ACCESS_KEY=$password"
	for port in "${ports[@]}"; do
		for bucket in $buckets; do
			echo "s3://$bucket/?endpoint=http://127.0.0.1:$port&region=$region"
		done
	done
	if [[ $background == yes ]]; then
		trap - EXIT INT TERM
		disown -a
		echo "end them with: $0 stop" >&2
		return
	fi
	echo "data is in $state; Ctrl-C ends the servers" >&2
	wait -n || true
	for ((i = 0; i < n; i++)); do
		kill -0 "${pids[i]}" 2>/dev/null || echo "minio.sh: instance $((i + 1)) ended, its log is $state/$((i + 1))/log" >&2
	done
	exit 1
}

stop() {
	local file list=()
	for file in "$state"/*/pid; do
		[[ -e $file ]] && list+=("$(<"$file")")
	done
	((${#list[@]} == 0)) || stop_pids "${list[@]}"
	rm -f "$state"/*/pid
}

case ${1:-} in
build) build && binary ;;
path) binary ;;
start)
	shift
	start "$@"
	;;
stop) stop ;;
*) usage ;;
esac
