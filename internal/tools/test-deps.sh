#!/usr/bin/env bash
# test-deps.sh sees to it that the programs which the tests talk to are there:
# as root on Debian it installs what is missing, otherwise it names it and
# fails. Each line: a program (or python module), and the package that has it.
set -euo pipefail

needs="
fio:fio
nbdkit:nbdkit
nbdinfo:libnbd-bin
nbdcopy:libnbd-bin
qemu-img:qemu-utils
qemu-io:qemu-utils
nbd-client:nbd-client
mkfs.ext4:e2fsprogs
fsck.ext4:e2fsprogs
mkfs.xfs:xfsprogs
xfs_repair:xfsprogs
nbdfuse:libnbd-bin
fusermount3:fuse3
losetup:mount
mount:mount
gcc:gcc
ld:binutils
/usr/include/stdio.h:libc6-dev
/usr/bin/python3:python3
"

export PATH=$PATH:/usr/sbin:/sbin

missing=()
check() {
	missing=()
	for need in $needs; do
		program=${need%%:*}
		package=${need##*:}
		command -v "$program" >/dev/null 2>&1 || [[ -e $program ]] || missing+=("$package")
	done
	[[ -x /usr/bin/python3 ]] && /usr/bin/python3 -c 'import nbd' 2>/dev/null || missing+=(python3-libnbd)
	# Each package once.
	if ((${#missing[@]})); then
		mapfile -t missing < <(printf '%s\n' "${missing[@]}" | sort -u)
	fi
}

check
((${#missing[@]} == 0)) && exit 0
if [[ $(id -u) != 0 ]] || ! command -v apt-get >/dev/null; then
	echo "The tests need these Debian packages: ${missing[*]}" >&2
	echo "Install them:  sudo apt-get install ${missing[*]}" >&2
	exit 1
fi
echo "installing ${missing[*]}" >&2
export DEBIAN_FRONTEND=noninteractive
apt-get update -q >/dev/null
apt-get install -q -y --no-install-recommends "${missing[@]}" >/dev/null
check
if ((${#missing[@]})); then
	echo "still missing after the installation: ${missing[*]}" >&2
	exit 1
fi
