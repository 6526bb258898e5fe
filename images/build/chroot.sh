# Runs the shell command $3 in a root file system that is $1/lower with $1/upper over it. $2 says whether the network is
# that of the machine ("online") or none; $4 is the image that $1/lower is, or nothing where it has a copy. Its mounts are in a mount namespace that ends with it.
set -eu
umask 022 # and not that of this process: the modes of what a command makes must not depend on it
dir=$1
root=$dir/root
hostname localhost # in this UTS namespace: the machine's own name must not get into an image
if test -n "$4"; then
	mount -t erofs -o ro,loop "$4" "$dir/lower"
fi
mount -t overlay overlay "$root" \
	-o "lowerdir=$dir/lower,upperdir=$dir/upper,workdir=$dir/work,redirect_dir=off,metacopy=off,index=off,xino=off"
mount -t proc proc "$root/proc"
mount -t sysfs -o ro sysfs "$root/sys"
mount -t tmpfs -o mode=0755 dev "$root/dev"
for node in null:1:3 zero:1:5 full:1:7 random:1:8 urandom:1:9 tty:5:0; do
	IFS=: read -r name major minor <<-END
		$node
	END
	mknod -m 0666 "$root/dev/$name" c "$major" "$minor"
done
ln -s /proc/self/fd "$root/dev/fd"
ln -s fd/0 "$root/dev/stdin"
ln -s fd/1 "$root/dev/stdout"
ln -s fd/2 "$root/dev/stderr"
mkdir "$root/dev/pts" "$root/dev/shm"
mount -t devpts -o newinstance,ptmxmode=0666,mode=0620,gid=5 devpts "$root/dev/pts"
ln -s pts/ptmx "$root/dev/ptmx"
mount -t tmpfs -o mode=1777 shm "$root/dev/shm"
mount -t tmpfs -o mode=0755 run "$root/run"
mount -t tmpfs -o mode=1777 tmp "$root/tmp"
if test "$2" != online; then
	ip link set lo up # programs talk to themselves
fi
exec chroot "$root" /bin/sh -ec "$3"
