# What a user without privilege does with a store of his own, in the folder where layerctl is. Fails at the first thing that isn't as it should be.
l() { ./layerctl --store "$PWD/store" --quiet "$@"; }
is() { if [ "$1" != "$2" ]; then echo "$1 instead of $2"; exit 1; fi; }
trap 'l daemon stop --force > /dev/null' EXIT

mkdir tree mnt
echo below > tree/below
echo kept > tree/kept
l import tree app
l mount app mnt
options=$(grep " $PWD/mnt " /proc/mounts | cut -d' ' -f4)
case $options in *nosuid*nodev*) ;; *) echo "mounted with $options"; exit 1 ;; esac

echo above > mnt/above
ln mnt/above mnt/linked
mkdir mnt/folder
mv mnt/below mnt/folder
truncate -s 1M mnt/kept
chmod 600 mnt/linked
fails mknod mnt/device c 1 3
fails chown root mnt/above
fails setfattr -n trusted.a -v 1 mnt/above
is "$(cat mnt/folder/below mnt/above | tr '\n' ' ')" 'below above '

# The mount outlives its daemon, with what is open.
exec 3>> mnt/log
echo one >&3
kill -9 "$(l daemon status --json | sed -n 's/.*"pid": *\([0-9]*\).*/\1/p')"
echo two >&3
exec 3>&-
is "$(tr '\n' ' ' < mnt/log)" 'one two '

l seal mnt sealed
l umount mnt
l mount sealed mnt --read-only
is "$(stat -c '%s %a %h' mnt/kept mnt/linked | tr '\n' ' ')" '1048576 644 1 6 600 2 '
fails sh -c 'echo no > mnt/above'
l umount mnt
fails grep " $PWD/mnt " /proc/mounts
l fsck
