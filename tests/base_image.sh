#!/bin/sh
# Makes the base image of the Dockerfile from Debian's packages, where no image registry can be reached.
#
#     apt-get install debootstrap podman
#     tests/base_image.sh [docker|podman]    # as root, on Debian or Ubuntu
set -eu
engine=${1:-podman}
name=$(sed -n 's/^FROM \([^ ]*\)$/\1/p' "$(dirname "$0")/../Dockerfile")
version=$(expr "$name" : 'python:\([0-9.]*\)')
root=$(mktemp -d)
trap 'rm -rf "$root"' EXIT

packages=python$version,python$version-venv,python3-distutils,python3-pip,ca-certificates,netbase,tzdata
debootstrap --variant=minbase --include="$packages" "${name##*-}" "$root"
rm -rf "$root"/var/cache/apt/* "$root"/var/lib/apt/lists/*
ln -s "../../bin/python$version" "$root/usr/local/bin/python"
# pip in the build must trust what this machine trusts, such as a company's proxy.
cp /etc/ssl/certs/ca-certificates.crt "$root/etc/ssl/certs/"
chmod 755 "$root"
tar -C "$root" -c . | "$engine" import --change 'ENV LANG=C.UTF-8' - "docker.io/library/$name"
