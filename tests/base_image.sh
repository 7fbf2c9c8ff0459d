#!/bin/sh
# Makes the images that the Dockerfile and compose.yaml begin with from Debian's packages, where no
# image registry can be reached.
#
#     apt-get install debootstrap podman
#     tests/base_image.sh [docker|podman]    # as root, on Debian or Ubuntu
set -eu
engine=${1:-podman}
here=$(dirname "$0")/..
root=$(mktemp -d)
trap 'rm -rf "$root"' EXIT

# SUITE PACKAGES: install Debian into $root.
install_debian() {
    rm -rf "$root"
    debootstrap --variant=minbase --include="$2" "$1" "$root"
    rm -rf "$root"/var/cache/apt/* "$root"/var/lib/apt/lists/*
    chmod 755 "$root"
}

# NAME CHANGE...: make $root an image.
import_as() {
    target=docker.io/$1
    shift
    tar -C "$root" -c . | "$engine" import "$@" - "$target"
}

# NAME: the image of compose.yaml, with its tag.
service_image() {
    sed -n "s|^ *image: \($1:.*\)$|\1|p" "$here/compose.yaml"
}

name=$(sed -n 's/^FROM \([^ ]*\)$/\1/p' "$here/Dockerfile")
version=$(expr "$name" : 'python:\([0-9.]*\)')
install_debian "${name##*-}" \
    "python$version,python$version-venv,python3-distutils,python3-pip,ca-certificates,netbase,tzdata"
ln -s "../../bin/python$version" "$root/usr/local/bin/python"
# pip in the build must trust what this machine trusts, such as a company's proxy.
cp /etc/ssl/certs/ca-certificates.crt "$root/etc/ssl/certs/"
import_as "library/$name" --change 'ENV LANG=C.UTF-8'

# Debian's versions, with the users, folders, signals and commands of the projects' own images.
install_debian trixie haproxy,valkey-server,valkey-tools
cat > "$root/usr/local/bin/docker-entrypoint.sh" <<'SCRIPT'
#!/bin/sh
set -e
[ "$1" != haproxy ] || { shift; set -- haproxy -W -db "$@"; }
# Valkey's image does so too: only the network of the containers leads to the store.
[ "$1" != valkey-server ] || { umask 0077; set -- "$@" --protected-mode no; }
exec "$@"
SCRIPT
chmod 755 "$root/usr/local/bin/docker-entrypoint.sh"
chroot "$root" install --directory --owner=valkey --group=valkey --mode=755 /data
entry='ENTRYPOINT ["docker-entrypoint.sh"]'
import_as "library/$(service_image haproxy)" --change "$entry" --change 'USER haproxy' \
    --change 'WORKDIR /var/lib/haproxy' --change 'STOPSIGNAL SIGUSR1' \
    --change 'CMD ["haproxy", "-f", "/usr/local/etc/haproxy/haproxy.cfg"]'
import_as "$(service_image valkey/valkey)" --change "$entry" --change 'WORKDIR /data' \
    --change 'VOLUME /data' --change 'CMD ["valkey-server"]'
