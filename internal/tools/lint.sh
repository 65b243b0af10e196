#!/usr/bin/env bash
# lint.sh builds the pinned golangci-lint once, outside the checkout, and runs
# it. The module beside it (lint/) says which version.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
tools=${DRC_TOOLS_DIR:-${XDG_CACHE_HOME:-$HOME/.cache}/drc/tools}
version=$(sed -n 's|^[[:space:]]*github.com/golangci/golangci-lint/v2 \(v[^ ]*\).*|\1|p' "$here/lint/go.mod" | head -n 1)
[[ -n $version ]] || { echo "lint.sh: $here/lint/go.mod names no version of golangci-lint" >&2; exit 1; }
bin=$tools/golangci-lint-$version-$(go env GOVERSION)
if [[ ! -x $bin ]]; then
	mkdir -p "$tools"
	exec 9>"$bin.lock"
	flock 9
	if [[ ! -x $bin ]]; then
		echo "lint.sh: building golangci-lint $version, once" >&2
		(cd "$here/lint" && CGO_ENABLED=0 go build -trimpath -o "$bin.new" github.com/golangci/golangci-lint/v2/cmd/golangci-lint)
		mv "$bin.new" "$bin"
	fi
	exec 9>&-
fi
cd "$here/../.."
exec "$bin" run --timeout 15m "$@" ./...
