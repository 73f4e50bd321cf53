#!/usr/bin/env bash
# Downloads packages of another Debian suite and unpacks them into a directory, without
# installing them and without touching the machine's apt configuration.
#
#   tools/fetch-deb.sh SUITE DIRECTORY PACKAGE...
#   tools/fetch-deb.sh --mirror debian|debian-security      prints the address
#
# The mirror's address is taken from the machine's own apt sources. With bookworm goes its security suite,
# which has the newer kernel most of the time, if those sources name it and it can be reached. (Not with
# bullseye: a newer kernel there may have lost the old prototype of mark_victim, which it is wanted
# for.) Package lists live in
# DIRECTORY/.apt until it is done. What was unpacked is written to DIRECTORY/.packages, one
# "name version" a line. A kernel's metapackage (linux-image-cloud-amd64) is followed to the newest
# image that it names.
set -euo pipefail

# mirror NAME prints the first http(s) URI of the machine's deb822 or one-line sources that ends with
# NAME: debian is the archive itself, debian-security carries the security suites only.
mirror() {
	{
		sed -n 's/^URIs:[[:space:]]*//p' /etc/apt/sources.list.d/*.sources 2>/dev/null
		sed -n 's/^deb[[:space:]]\+\(\[[^]]*\][[:space:]]\+\)\?\(http[^[:space:]]*\).*/\2/p' \
			/etc/apt/sources.list /etc/apt/sources.list.d/*.list 2>/dev/null
	} | tr ' ' '\n' | grep -E "^https?://.*/$1/?\$" | head -n 1
}

if [[ ${1:-} == --mirror ]]; then
	address=$(mirror "$2" || true)
	[[ -n $address ]] || {
		echo "$0: no mirror of $2 in this machine's apt sources" >&2
		exit 1
	}
	echo "$address"
	exit
fi

if (($# < 3)); then
	echo "usage: $0 SUITE DIRECTORY PACKAGE..." >&2
	exit 2
fi
suite=$1
dir=$2
shift 2
arch=${DEB_ARCH:-$(dpkg --print-architecture)}

uri=$(mirror debian || true)
if [[ -z $uri ]]; then
	echo "$0: no Debian mirror found in this machine's apt sources" >&2
	exit 1
fi

mkdir -p "$dir/.apt/lists/partial" "$dir/.apt/archives/partial"
dir=$(cd "$dir" && pwd)
keyring=/usr/share/keyrings/debian-archive-keyring.gpg
printf 'deb [signed-by=%s arch=%s] %s %s main\n' "$keyring" "$arch" "$uri" "$suite" >"$dir/.apt/sources.list"

apt=(-qq -o "Dir::Etc::sourcelist=$dir/.apt/sources.list" -o Dir::Etc::sourceparts=-
	-o "Dir::State::lists=$dir/.apt/lists" -o "APT::Architecture=$arch" -o "APT::Architectures=$arch"
	-o APT::Get::List-Cleanup=0 -o APT::Sandbox::User=root)
security=
if [[ $suite == bookworm ]]; then
	security=$(mirror debian-security || true)
fi
if [[ -n $security ]]; then
	cp "$dir/.apt/sources.list" "$dir/.apt/without-security"
	printf 'deb [signed-by=%s arch=%s] %s %s-security main\n' "$keyring" "$arch" "$security" "$suite" >>"$dir/.apt/sources.list"
fi
if ! apt-get "${apt[@]}" -o APT::Update::Error-Mode=any update; then
	if [[ -n $security ]]; then
		echo "$0: going on without $suite-security" >&2
		mv "$dir/.apt/without-security" "$dir/.apt/sources.list"
	fi
	apt-get "${apt[@]}" update
fi

names=("$@")
for ((i = 0; i < ${#names[@]}; i++)); do
	name=${names[i]}
	(cd "$dir/.apt/archives" && rm -f -- "${name}"_*.deb && apt-get "${apt[@]}" download "$name")
	deb=$(ls "$dir/.apt/archives/${name}"_*.deb)
	if [[ $name == linux-image-* ]]; then
		# A metapackage names the image; since Linux 7 an image is a shell that names the binary and
		# the base (which has the configuration), and has its modules apart.
		mapfile -t follow < <(dpkg-deb --field "$deb" Depends | grep -oE '\blinux-(image|binary|base|modules)-[0-9][^ ,]*')
		if ((${#follow[@]})); then
			names+=("${follow[@]}")
			continue
		fi
	fi
	dpkg-deb -x "$deb" "$dir"
	# shellcheck disable=SC2016 # dpkg-deb expands these
	dpkg-deb --show --showformat '${Package} ${Version}\n' "$deb"
done >"$dir/.packages.new"
mv "$dir/.packages.new" "$dir/.packages"
rm -rf "$dir/.apt"
