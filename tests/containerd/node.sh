#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# Turns the mount namespace it is started in into a node's own and holds it until stdin ends.
# $1: the run's folder below /run, which stays visible at its place.
#   /run        is $1/run: containerd's state, CNI's network namespaces, our state folder
#   /var/lib    is the machine's, but what is written (CNI's cache) goes to $1/var
#   /sys/fs/bpf is a bpffs of its own
set -eu
folder=$1

# A copy of somebody else's mount would keep a namespace or BPF programs alive that are gone there.
# What its owner has just removed, or another mount hides, cannot be unmounted.
awk '$5 ~ "^/run/" || / - bpf / { print $5 }' /proc/self/mountinfo | sort -r |
	while read -r mount; do umount --lazy "$mount" 2>/dev/null || true; done

mkdir -p "$folder/run/netns" "$folder/run/${folder#/run/}" "$folder/var/new" "$folder/var/work"
mount --bind "$folder" "$folder/run/${folder#/run/}"
mount -o remount,bind,exec "$folder/run/${folder#/run/}" # distributions have noexec on /run
mount --rbind "$folder/run" /run
mount -t overlay -o "lowerdir=/var/lib,upperdir=$folder/var/new,workdir=$folder/var/work" node /var/lib
mount -t bpf node /sys/fs/bpf

echo ready
exec cat
