#!/bin/bash
# Installs what Perdure's build, lab and tests need and this machine lacks.
# Asks for the programs themselves, not for packages: where all are there it
# ends at once, needs no root and no network, and works on any distribution.
#   --go-only  only check Go (for targets that need neither root nor QEMU)
#   --soak     also what the long tests need
set -euo pipefail
cd "$(dirname "$0")/.."
go=${GO:-go}

die() { echo "setup: $*" >&2; exit 1; }

command -v "$go" >/dev/null 2>&1 || die "Go is missing: install Go 1.26 or newer and put it on the PATH (https://go.dev/dl)"
v=$("$go" env GOVERSION 2>/dev/null) || die "'$go env' fails: is this Go 1.26 or newer? ($("$go" version 2>&1 | head -n 1))"
[[ $v =~ go([0-9]+)\.([0-9]+) ]] || die "cannot make sense of the Go version '$v'; 1.26 or newer is needed"
(( BASH_REMATCH[1] > 1 || (BASH_REMATCH[1] == 1 && BASH_REMATCH[2] >= 26) )) || die "Go 1.26 or newer is needed, this is $v"
[ "${1:-}" != --go-only ] || exit 0

PATH=$PATH:/usr/sbin:/sbin
need=()
# want PACKAGE PROGRAM…: the package is needed unless all programs are there
want() { local pkg=$1 p; shift; for p; do command -v "$p" >/dev/null 2>&1 || { need+=("$pkg"); return; }; done; }
want qemu-system-x86 qemu-system-x86_64
want qemu-utils qemu-img qemu-io qemu-nbd
want libnbd-bin nbdinfo nbdcopy
want python3-libnbd nbdsh
want fio fio
want nbdkit nbdkit
want busybox-static busybox
want cpio cpio
want kmod depmod
want iproute2 ip
want nftables nft
want e2fsprogs mke2fs e2fsck
want util-linux nsenter
want zstd zstd
want xz-utils xz
want procps ps
want grub-common grub-mkimage
want dosfstools mkfs.fat
want mtools mcopy
# wantfile PACKAGE FILE…: the package is needed unless one of the files is there
wantfile() { local pkg=$1 f; shift; for f; do [ ! -e "$f" ] || return 0; done; need+=("$pkg"); }
wantfile grub-pc-bin /usr/lib/grub/i386-pc/normal.mod
wantfile grub-efi-amd64-bin /usr/lib/grub/x86_64-efi/normal.mod
wantfile ovmf /usr/share/OVMF/OVMF_CODE_4M.fd /usr/share/OVMF/OVMF_CODE.fd /usr/share/edk2/x64/OVMF_CODE.4m.fd /usr/share/edk2/ovmf/OVMF_CODE.fd /usr/share/qemu/ovmf-x86_64-4m-code.bin
if [ "${1:-}" = --soak ]; then
	want debootstrap debootstrap
	wantfile debian-archive-keyring /usr/share/keyrings/debian-archive-keyring.gpg
	want gpgv gpgv
fi
if command -v busybox >/dev/null 2>&1 && ! busybox 2>/dev/null | head -n 1 | grep -q .; then need+=(busybox-static); fi
[ ${#need[@]} -gt 0 ] || exit 0

list=${need[*]}
command -v apt-get >/dev/null 2>&1 || die "missing: $list (Debian's names); there is no apt-get here, so install them with this distribution's package manager"
[ "$(id -u)" = 0 ] || die "missing: $list; run 'make setup' as root, it installs them by apt"
echo "setup: installing $list"
export DEBIAN_FRONTEND=noninteractive
install() { apt-get install -y -q --no-install-recommends "${need[@]}" >"$log" 2>&1; }
log=$(mktemp); trap 'rm -f "$log"' EXIT
install || { apt-get update -q >>"$log" 2>&1 && install; } || { tail -n 20 "$log" >&2; die "apt-get could not install: $list"; }
