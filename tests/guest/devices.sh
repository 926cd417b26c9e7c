# Functions for the bench's guest: work for its devices, which are named by PCI addresses without the segment.

pci=/sys/bus/pci/devices
data=/tmp/data
[ -e $data ] || head -c 4194304 /dev/urandom >$data

# wait_for WHAT COMMAND...: until COMMAND succeeds, for half a minute.
wait_for() {
    what=$1 left=300
    shift
    until "$@" 2>/dev/null; do
        left=$((left - 1))
        [ $left -gt 0 ] || { echo "no $what"; return 1; }
        usleep 100000
    done
}

# Prints the disk of the controller $1.
disk_of() {
    for block in /sys/block/*; do
        case $(readlink -f "$block") in
        */0000:"$1"/*) [ "$(cat "$block/size")" = 0 ] || { echo "/dev/${block##*/}"; return 0; } ;;
        esac
    done
    return 1
}

# Prints the network interface of the adapter $1.
interface_of() {
    ls -d $pci/0000:"$1"/net/* $pci/0000:"$1"/virtio*/net/* 2>/dev/null | sed 's|.*/||' | grep .
}

# A file system on the disk of controller $1 is made and written, and read back from the disk. Prints the file's digest.
use_disk() {
    wait_for "disk of $1" disk_of "$1" >/dev/null && disk=$(disk_of "$1") &&
        mkdosfs "$disk" && mkdir -p /run/disk && mount -t vfat "$disk" /run/disk &&
        cp $data /run/disk/data && umount /run/disk && echo 3 >/proc/sys/vm/drop_caches &&
        mount -t vfat "$disk" /run/disk && cmp $data /run/disk/data && sha256sum </run/disk/data && umount /run/disk
}

# The adapters $1 and $2 sit on one wire. Sends the data from one to the other, and back; the second is put into a network of
# its own, so that nothing goes by the kernel's loopback.
use_network() {
    here=$(interface_of "$1") && there=$(interface_of "$2") || { echo "no interface of $1 or $2"; return 1; }
    unshare -n sleep 1000 &
    peer=$!
    usleep 300000
    at_peer="nsenter --net=/proc/$peer/ns/net"
    # Never ends, so the receiver does not hang up before it has all.
    [ -e /run/never ] || mkfifo /run/never
    # send FROM TO ADDRESS: the first two are words before a command, for the side on which it is to run.
    send() {
        $2 timeout 60 nc -l -p 7 <>/run/never >/tmp/received &
        receiver=$!
        usleep 300000
        # The link may need a moment.
        wait_for "link" $1 timeout 20 nc "$3" 7 <$data && wait $receiver && cmp $data /tmp/received
    }
    ip link set "$there" netns $peer && ip addr add 10.0.0.1/24 dev "$here" && ip link set "$here" up &&
        $at_peer ip addr add 10.0.0.2/24 dev "$there" && $at_peer ip link set "$there" up &&
        send "" "$at_peer" 10.0.0.2 && send "$at_peer" "" 10.0.0.1
    result=$?
    kill $peer
    return $result
}
