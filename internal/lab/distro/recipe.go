package distro

import (
	"fmt"

	"perdure/internal/lab/bootdisk"
)

// suite is the release that is installed.
const suite = "bookworm"

// packages are installed besides the smallest set.
var packages = []string{"linux-image-cloud-amd64", "initramfs-tools", "zstd", "systemd-sysv", "dbus", "udev", "kmod", "iproute2", "util-linux-extra", "e2fsprogs", "postgresql", "qemu-guest-agent"}

// recipeFiles are written over the installed system; an empty one masks a unit
// that would only take time from a guest that is emulated.
func recipeFiles(address string) map[string]string {
	files := map[string]string{
		"etc/hostname": "debian\n",
		"etc/hosts":    "127.0.0.1 localhost debian\n::1 localhost\n",
		"etc/fstab":    "UUID=" + rootUUID + " / ext4 errors=remount-ro 0 1\n",
		"etc/systemd/network/10-lan.network": fmt.Sprintf(`[Match]
Type=ether

[Network]
Address=%s
LinkLocalAddressing=no
IPv6AcceptRA=no
`, address),
		"etc/systemd/system/serial-getty@ttyS0.service.d/autologin.conf": `[Service]
ExecStart=
ExecStart=-/sbin/agetty --autologin root --noclear --keep-baud 115200,38400,9600 %I vt100
`,
		// Nothing of the journal goes to the disk: it would be the busiest writer.
		"etc/systemd/journald.conf.d/volatile.conf": "[Journal]\nStorage=volatile\n",
		"etc/initramfs-tools/conf.d/small.conf":     "MODULES=list\nCOMPRESS=zstd\n",
		"etc/initramfs-tools/modules":               "virtio_pci\nvirtio_blk\next4\ncrc32c_generic\n",
		"boot/grub/grub.cfg":                        bootdisk.Config("/vmlinuz", "/initrd.img", Append),
		// An emulated guest is slow enough: small, and nothing in the background
		// that the test did not ask for. What keeps data safe stays as it is.
		"etc/perdure-postgresql.conf": `listen_addresses = '*'
max_connections = 20
shared_buffers = 24MB
jit = off
autovacuum_max_workers = 1
autovacuum_naptime = 60s
max_wal_size = 128MB
min_wal_size = 32MB
checkpoint_timeout = 60s
max_parallel_workers = 0
max_worker_processes = 2
max_logical_replication_workers = 0
max_wal_senders = 0
wal_level = minimal
log_checkpoints = on
tcp_keepalives_idle = 600
`,
		"etc/perdure-hba.conf": "local all all trust\nhost all all all trust\n",
	}
	for _, unit := range []string{"apt-daily.timer", "apt-daily-upgrade.timer", "dpkg-db-backup.timer", "e2scrub_all.timer", "e2scrub_reap.service", "fstrim.timer",
		"systemd-pstore.service", "systemd-networkd-wait-online.service", "systemd-update-utmp.service", "getty@tty1.service"} {
		files["etc/systemd/system/"+unit] = ""
	}
	return files
}

// setupScript runs inside the tree when everything is in place.
const setupScript = `
version=$(ls /etc/postgresql)
pg_dropcluster "$version" main
pg_createcluster "$version" main -- --data-checksums --locale=C.UTF-8
mv /etc/perdure-postgresql.conf "/etc/postgresql/$version/main/conf.d/perdure.conf"
mv /etc/perdure-hba.conf "/etc/postgresql/$version/main/pg_hba.conf"
chown -R postgres:postgres "/etc/postgresql/$version/main"
systemctl enable systemd-networkd.service
passwd -d root
update-initramfs -u
ln -sf boot/vmlinuz-* /vmlinuz
ln -sf boot/initrd.img-* /initrd.img
: > /etc/machine-id
apt-get clean
rm -rf /var/lib/apt/lists /var/log/* /var/cache/debconf/*-old /usr/share/doc/* /usr/share/man/* /usr/share/locale/* /usr/share/info/* /tmp/*
# Just-in-time compilation is off, and is half of what is installed.
rm -rf /usr/lib/x86_64-linux-gnu/libLLVM* /usr/lib/llvm-* "/usr/lib/postgresql/$version/lib/bitcode"
mkdir -p /var/log/postgresql && chown root:postgres /var/log/postgresql && chmod 1775 /var/log/postgresql
`
