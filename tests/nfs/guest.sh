# The first process of the guest. `/` is the host's; everything that is changed lies in memory or on the guest's own disk.
export PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/root
mount -t proc proc /proc
mount -t sysfs sysfs /sys
for place in /run /mnt /var/lib/nfs; do mount -t tmpfs tmpfs "$place"; done
mkdir -p /run/lock /run/tmp /run/export /dev/shm
mount -t tmpfs tmpfs /dev/shm
. "$STAGE/environment"

finish() {
    echo "$1" >"$STAGE/exit-code"
    sync
    echo o >/proc/sysrq-trigger
    sleep 10
}
must() {
    "$@" || { echo "the guest cannot: $*"; finish 3; }
}

for module in veth nfsd nfs nfsv3 nfsv4 fuse; do modprobe -d "$STAGE" "$module" || echo "no module $module"; done
ip link set lo up
for node in 0 1; do
    must ip netns add "node-$node"
    must ip link add "to-$node" type veth peer name wire netns "node-$node"
    must ip addr add "10.9.$node.1/24" dev "to-$node"
    must ip link set "to-$node" up
    must ip -n "node-$node" link set lo up
    must ip -n "node-$node" addr add "10.9.$node.2/24" dev wire
    must ip -n "node-$node" link set wire up
done

must mount -t ext4 /dev/ubda /run/export
chmod 777 /run/export
mkdir -p /var/lib/nfs/{sm,sm.bak,rpc_pipefs,v4recovery,nfsdcld}
touch /var/lib/nfs/{etab,rmtab,state}
mount -t rpc_pipefs rpc_pipefs /var/lib/nfs/rpc_pipefs
mount -t nfsd nfsd /proc/fs/nfsd
echo 20 >/proc/fs/nfsd/nfsv4leasetime
echo 10 >/proc/fs/nfsd/nfsv4gracetime
rpcbind -w
rpc.statd --no-notify
rpc.mountd
must exportfs -o rw,no_root_squash,fsid=0,no_subtree_check,sync 10.9.0.0/16:/run/export
must rpc.nfsd 4

path=/
[ "${NFS_OPTIONS#*vers=3}" = "$NFS_OPTIONS" ] || path=/run/export
for node in 0 1; do
    mkdir "/mnt/node-$node"
    # The host name is what tells one NFSv4 client from another.
    name="node-$node"
    [ -z "$SAME_NAME" ] || name=node
    mounting="hostname $name; mount -t nfs -o $NFS_OPTIONS 10.9.$node.1:$path /mnt/node-$node"
    must nsenter --net="/run/netns/node-$node" unshare --uts sh -c "$mounting"
done
grep ' nfs' /proc/mounts
cd "$PLACE" && "${COMMAND[@]}"
finish $?
