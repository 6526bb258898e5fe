# Unpacks the kernel of package $2 into the root file system $1 and leaves the locks of its packages in .troupe/kernel.
#
# It is not installed as a package: that would bring the tools that make an initramfs, and run them, for an initramfs
# that nobody boots. Run by mmdebstrap as a hook, before it removes apt's lists.
set -eu
root=$1
package=$2
export APT_CONFIG="$MMDEBSTRAP_APT_CONFIG"

mkdir "$root/.troupe"
cd "$root/.troupe"
# The package may be one that only depends on the newest kernel: take what apt would, as far as it is kernel.
packages=$(apt-get --simulate --option Debug::NoLocking=1 --no-install-recommends install "$package" |
	sed -n 's/^Inst \([^ ]*\).*/\1/p' | while read -r p; do
	case $p in linux-image-* | linux-modules-* | linux-binary-* | "$package") echo "$p" ;; esac
done)
test -n "$packages" || { echo "no kernel comes with package $package" >&2; exit 1; }
apt-get --option APT::Sandbox::User=root download $packages
for deb in *.deb; do
	dpkg-deb --show --showformat='${Package}=${Version}\n' "$deb" >>kernel
	dpkg-deb --fsys-tarfile "$deb" |
		tar --extract --directory "$root" --keep-directory-symlink --exclude=./usr/share
	rm "$deb"
done
cd "$root"
for dir in usr/lib/modules/*; do
	test -d "$dir" || { echo "package $package has no modules" >&2; exit 1; }
	chroot "$root" depmod "${dir##*/}"
done
